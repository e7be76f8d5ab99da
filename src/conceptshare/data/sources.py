"""Which files a data set's source consists of. Files are listed explicitly, never guessed or globbed.

A folder is read as the first of these that it contains: tars; an image folder with `metadata.csv`, `.jsonl` or
`.parquet`; tables of one format; zips of images with metadata. Files are read in lexicographic order of their paths,
so `part-10` comes before `part-2`. Names that start with a dot and folders that start with two underscores are ignored.

Only a part of the files is read if the data set declares parts: configurations and splits in the metadata of its
README.md, or splits by the hub's shard names (``train-00000-of-00002``) or by folders named after splits. Files that
are not read are reported.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from operator import or_
from pathlib import Path
from typing import Any, Literal

from conceptshare.config.catalog import DatasetSpec, is_path
from conceptshare.data.images import suffixes
from conceptshare.io.errors import DatasetError

ALL = "all"
"""The ``split`` that reads every file."""
_SHOWN = 100  # number of unread files that a manifest names per reason

_FORMATS = {
    **{".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".arrow": "arrow"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".tar": "tar", ".tgz": "tar", ".zip": "zip"},
}
_TABLES = ("parquet", "arrow", "csv", "tsv", "json", "jsonl")
_PACKED = {"csv": (".gz", ".bz2", ".zst"), "tar": (".gz", ".bz2", ".xz")}
_PACKED |= dict.fromkeys(("tsv", "json", "jsonl"), _PACKED["csv"])
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
# Files that the hub and its library keep next to the data.
_NO_DATA = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "dummy_data.zip",
}

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\b.*")


@dataclass
class NotRead:
    """Files below a source that are not read, by reason, such as ``split test``."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first files per reason."""

    def add(self, reason: str, name: str) -> None:
        """Add a file."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        some = self.names.setdefault(reason, [])
        if len(some) < _SHOWN:
            some.append(printable(name))

    def entries(self) -> list[dict[str, Any]]:
        """Entries for the manifest: the ``reason``, the number of ``files`` and the ``first`` of them."""
        return [{"reason": reason, "files": n, "first": self.names[reason]} for reason, n in self.counts.items()]

    def lines(self) -> list[str]:
        """Lines for the log."""
        return [
            f"not read: {n:,} {'files' if n > 1 else 'file'} ({reason}), such as {', '.join(self.names[reason][:3])}"
            for reason, n in self.counts.items()
        ]


@dataclass(frozen=True)
class Source:
    """The files of a data set on this machine, in the order in which they are read."""

    name: str
    """The source as the study names it."""
    folder: Path
    """The source's folder, or the folder that contains the source file."""
    revision: str | None
    """The commit of a hub data set; None for a local one, which only its content hash identifies."""
    kind: Literal["tables", "images", "tars"]
    files: list[Path]
    split: str
    """The split that is read; ``train`` for a data set without splits, as on the hub."""
    not_read: NotRead
    configuration: str | None = None
    """The configuration that is read, if there are several."""
    separator: str | None = None
    """Separator of CSV files, if the data set's metadata set one."""


def locate(spec: DatasetSpec) -> Source:
    """Find the files of a data set, after fetching them from the hub if needed.

    Raises:
        DatasetError: if they are missing, or there are several kinds, configurations or splits and none was chosen.
        HubError: if they cannot be fetched from the hub.
    """
    if not is_path(spec.source):
        from conceptshare.io.hub import fetch_files

        folder = fetch_files(spec.source, "dataset", spec.revision).folder
        return _listed(spec, folder, folder.name)
    return _listed(spec, Path(spec.source).expanduser(), None)


def files_below(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all regular files below a folder, in no particular order.

    Links are followed, and hidden names are skipped; see the module.
    """
    pending = [(folder, "", frozenset([folder.resolve()]))]
    while pending:
        current, prefix, parents = pending.pop()
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    real = Path(entry.path).resolve() if entry.is_symlink() else Path(entry.path)
                    if not entry.name.startswith("__") and real not in parents:
                        pending.append((Path(entry.path), f"{prefix}{entry.name}/", parents | {real}))
                elif entry.is_file() or not Path(entry.path).exists():  # a broken link fails when it is read
                    yield prefix + entry.name


def printable(text: str) -> str:
    """Return a name with invalid UTF-8 and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def form(name: str) -> str | None:
    """Format of a data file by its suffix, such as ``csv`` for ``a.csv.gz``; None if it is not a data file."""
    stem, suffix = _split_suffix(name.lower())
    inner = _FORMATS.get(_split_suffix(stem)[1])
    return _FORMATS.get(suffix) or (inner if suffix in _PACKED.get(inner or "", ()) else None)


def _split_suffix(name: str) -> tuple[str, str]:
    """Split a file's name into stem and suffix. Uses strings, because there may be millions of names."""
    stem, dot, suffix = name.rpartition(".")
    return stem, dot + suffix


def _listed(spec: DatasetSpec, path: Path, revision: str | None) -> Source:
    not_read = NotRead()
    split = spec.split or "train"
    if os.path.isfile(path):  # noqa: PTH113 - does not raise for any path, however long
        kinds: dict[str, Any] = {"tar": "tars", "zip": "images"} | dict.fromkeys(_TABLES, "tables")
        kind = kinds.get(form(path.name) or "")
        if kind is None:
            raise DatasetError(f"{spec.source}: cannot read {path.suffix!r} files; use {', '.join(_FORMATS)}")
        if spec.configuration is not None:
            raise DatasetError(f"{spec.source}: a single file has no configurations; leave configuration out")
        names = _of_split(spec, [path.name], not_read)
        return Source(spec.source, path.parent, revision, kind, [path.parent / name for name in names], split, not_read)
    if not os.path.isdir(path):  # noqa: PTH112
        what = "neither a regular file nor a folder" if os.path.exists(path) else "no such file or folder"  # noqa: PTH110
        raise DatasetError(f"{spec.source}: {what}")
    names, some_image = [], None
    images = suffixes()
    for name in files_below(path):
        if form(name) is not None and name.rpartition("/")[2] not in _NO_DATA:
            names.append(name)
        elif _split_suffix(name.lower())[1] in images:
            some_image = name
    declared = _declared(spec, path, sorted(names)) or _Declared(None, sorted(names))
    kind, chosen = _of_one_kind(spec, declared.names, some_image, not_read)
    if declared.splits:
        if spec.split is None and len(declared.splits) == 1:
            split = next(iter(declared.splits))
        chosen = _of_declared_split(spec, split, chosen, declared.splits, not_read)
    else:
        chosen = _of_split(spec, chosen, not_read)
    files = [path / name for name in chosen]
    names_and_text = declared.configuration, declared.separator
    return Source(spec.source, path, revision, kind, files, split, not_read, *names_and_text)


@dataclass(frozen=True)
class _Declared:
    """One configuration, as declared in the metadata of a data set."""

    configuration: str | None
    """Its name, if there are several configurations."""
    names: list[str]
    splits: dict[str, set[str]] = field(default_factory=dict)
    """The files of each split, if the metadata declare splits."""
    separator: str | None = None


def _declared(spec: DatasetSpec, folder: Path, names: list[str]) -> _Declared | None:
    """The configuration to read, according to the metadata of README.md; None if it declares none."""
    configurations = _configurations(spec, folder / "README.md")
    if not configurations:
        if spec.configuration is not None:
            raise DatasetError(
                f"{spec.source}: its README.md declares no configurations; leave configuration out, or name a folder "
                "or file of it as source"
            )
        return None
    name = spec.configuration or _default(configurations)
    if name not in configurations:
        there = ", ".join(configurations)
        wrong = "has several configurations" if name is None else f"no configuration {name!r}"
        raise DatasetError(f"{spec.source}: {wrong}; there are {there}: set configuration to one of them")
    keys = configurations[name]
    below = str(keys.get("data_dir") or "").strip("./")
    own = [file for file in names if not below or file.startswith(below + "/")]
    separator = keys.get("sep") or keys.get("delimiter")
    shown = name if len(configurations) > 1 else None
    if keys.get("data_files") is None:
        return _Declared(shown, own, {}, separator)
    metadata = {file for file in own if file.rpartition("/")[2] in METADATA}
    splits = {
        split: {file for file in own if any(_matches(file, _in_folder(below, pattern)) for pattern in patterns)}
        for split, patterns in keys["data_files"].items()
    }
    matched = set().union(*splits.values())
    if not matched & metadata and metadata:  # the patterns only name images, whose rows are in the metadata
        return _Declared(shown, sorted(metadata), {}, separator)
    if not matched:
        raise DatasetError(f"{spec.source}: no file matches the patterns in README.md for configuration {name!r}")
    return _Declared(shown, sorted(matched), splits, separator)


def _configurations(spec: DatasetSpec, readme: Path) -> dict[str, dict[str, Any]]:
    """The keys of each configuration, with ``data_files`` as patterns by split."""
    if not readme.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(readme)
        if not metadata or "configs" not in metadata:
            return {}
        from datasets.data_files import sanitize_patterns
        from datasets.utils.metadata import MetadataConfigs

        # YAML reads names such as 2024 and `no` as other types.
        configurations = {str(name): keys for name, keys in MetadataConfigs.from_dataset_card_data(metadata).items()}
        for keys in configurations.values():
            if keys.get("data_files") is not None:
                keys["data_files"] = sanitize_patterns(keys["data_files"])
        return configurations
    except Exception as error:  # third-party YAML can raise any type
        raise DatasetError(
            f"{spec.source}: the metadata at the top of README.md cannot be read "
            f"({' '.join(str(error).split())[:200]}); correct or remove them"
        ) from None


def _default(configurations: dict[str, dict[str, Any]]) -> str | None:
    """The only configuration, or the one declared as the default."""
    if len(configurations) == 1:
        return next(iter(configurations))
    marked = [name for name, keys in configurations.items() if name == "default" or keys.get("default") is True]
    return marked[0] if len(marked) == 1 else None


def _in_folder(folder: str, pattern: Any) -> str:
    pattern = str(pattern).removeprefix("./")
    return f"{folder}/{pattern}" if folder else pattern


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern in the metadata of a data set; ``**`` matches any number of folders.

    Each part of the pattern is compared with each part of the path once, so untrusted patterns cannot take long.
    """
    parts = name.split("/")
    matched = [True] + [False] * len(parts)  # for each number of parts, whether the pattern so far matches the first
    for wanted in pattern.split("/"):
        if wanted == "**":
            matched = list(accumulate(matched, or_))
        else:
            matched = [False, *(m and fnmatchcase(part, wanted) for m, part in zip(matched, parts, strict=False))]
    return name == pattern or matched[-1]


def _of_one_kind(
    spec: DatasetSpec, names: list[str], some_image: str | None, not_read: NotRead
) -> tuple[Literal["tables", "images", "tars"], list[str]]:
    """The files that are read together, and their kind."""
    stems = {_stem(name) for name in names if form(name) in {"tar", "parquet"}}
    statistics = {name for name in names if name.endswith("_stats.json") and _stem(name) in stems}
    names = _all_but(names, set(names) - statistics, "statistics of img2dataset", not_read)
    by_form: dict[str, list[str]] = {}
    for name in names:
        by_form.setdefault(form(name) or "", []).append(name)
    tars, zips = by_form.get("tar", []), by_form.get("zip", [])
    tables = {kind: by_form[kind] for kind in _TABLES if kind in by_form}
    metadata = [name for name in names if name.rpartition("/")[2] in METADATA]
    if tars:
        stems = {_stem(name) for name in tars}
        alone = {kind: [name for name in files if _stem(name) not in stems] for kind, files in tables.items()}
        if any(alone.values()):
            raise _mixed(spec, {"tar": tars} | {kind: files for kind, files in alone.items() if files})
        return "tars", _all_but(names, set(tars), "next to tars", not_read)
    if metadata and (some_image is not None or zips):
        for one, other in pairwise(metadata):
            if one.rpartition("/")[0] == other.rpartition("/")[0]:
                both = f"{printable(one)} and {printable(other)}"
                raise DatasetError(f"{spec.source}: {both} name the same images; remove one of them")
        return "images", _all_but(names, {*metadata, *zips}, "no metadata of an image folder", not_read)
    if some_image is not None and _stem(some_image) in map(_stem, tables.get("json", [])):
        raise _without_captions(spec, some_image)
    if len(tables) > 1:
        raise _mixed(spec, tables)
    if tables:
        return "tables", _all_but(names, set(*tables.values()), "archive next to tables", not_read)
    if zips:
        return "images", zips
    if some_image is not None:
        raise _without_captions(spec, some_image)
    raise DatasetError(f"{spec.source}: no file that can be read; use {', '.join(_FORMATS)}, or images and metadata")


def _stem(name: str) -> str:
    """The path without suffixes, which img2dataset's tars share with the tables next to them."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0].removesuffix('_stats')}"


def _all_but(names: list[str], chosen: set[str], reason: str, not_read: NotRead) -> list[str]:
    for name in names:
        if name not in chosen:
            not_read.add(reason, name)
    return [name for name in names if name in chosen]


def _without_captions(spec: DatasetSpec, image: str) -> DatasetError:
    return DatasetError(
        f"{spec.source}: images such as {printable(image)}, but captions are read from a metadata.csv with the columns "
        "file_name and caption, or from tar files; to pack images and their text files, use "
        "`tar --sort=name -cf SHARD.tar -C FOLDER .`"
    )


def _mixed(spec: DatasetSpec, kinds: dict[str, list[str]]) -> DatasetError:
    several = ", ".join(f"{kind} ({printable(names[0])})" for kind, names in kinds.items())
    return DatasetError(
        f"{spec.source}: holds files of several kinds: {several}. Set source to one file, or to a folder with one "
        f"kind{_copy_command(spec)}"
    )


def _copy_command(spec: DatasetSpec) -> str:
    """How to make a local copy of a hub data set, a part of which can be named as the source."""
    if is_path(spec.source):
        return ""
    return f" (of a copy: hf download {spec.source} --repo-type dataset --local-dir ./{spec.source.rpartition('/')[2]})"


def _of_declared_split(
    spec: DatasetSpec, split: str, names: list[str], splits: dict[str, set[str]], not_read: NotRead
) -> list[str]:
    if split == ALL:
        return names
    if split not in splits:
        raise _no_split(spec, splits)
    chosen = [name for name in names if name in splits[split]]
    for other, files in splits.items():
        for name in sorted(files.intersection(names) - splits[split]):
            not_read.add(f"split {other}", name)
    return chosen


def _of_split(spec: DatasetSpec, names: list[str], not_read: NotRead) -> list[str]:
    """The files of the split to read, according to their names; all files if their names declare no splits."""
    if spec.split == ALL:
        return names
    declared = _splits_by(_split_of_shard, names) or _splits_by(_split_of_folder, names)
    named = declared or {name: split for name in names if (split := _split_in(name)) is not None}
    splits = sorted(set(named.values()))
    if spec.split is None:
        if len(splits) < 2 or len(named) < len(names):
            return names
        if not declared:
            some = "; ".join(f"{split}: {printable(next(n for n in names if named[n] == split))}" for split in splits)
            raise DatasetError(
                f"{spec.source}: its files are named like splits ({some}); set split to one of {', '.join(splits)}, "
                f"or to {ALL} to read every file"
            )
    split = _SPLITS.get(spec.split or "train", spec.split)
    if split == "train" and not named:
        return names
    if split not in splits:
        raise _no_split(spec, splits)
    for name in names:
        if named.get(name) != split:
            not_read.add(f"split {named[name]}" if name in named else "no split by its name", name)
    return [name for name in names if named.get(name) == split]


def _no_split(spec: DatasetSpec, splits: Iterable[str]) -> DatasetError:
    there = ", ".join(splits)
    if not there:
        return DatasetError(f"{spec.source}: no split {spec.split!r} or any other; leave split out to read every row")
    return DatasetError(
        f"{spec.source}: no split {spec.split or 'train'!r}; it has {there}: set split to one, or to {ALL} to read "
        "every file"
    )


def _splits_by(split_of: Callable[[str], str | None], names: list[str]) -> dict[str, str]:
    """The split of each file; empty unless every file has one, and they differ or are one of the usual names."""
    split_by_name = {name: split for name in names if (split := split_of(name)) is not None}
    splits = set(split_by_name.values())
    return split_by_name if len(split_by_name) == len(names) and (len(splits) > 1 or splits <= set(_SPLITS)) else {}


def _split_of_shard(name: str) -> str | None:
    match = _SHARD.fullmatch(name.rpartition("/")[2])
    return None if match is None else _SPLITS.get(match[1], match[1])


def _split_of_folder(name: str) -> str | None:
    folder, _, rest = name.removeprefix("data/").partition("/")
    return _SPLITS.get(folder.lower()) if rest else None


def _split_in(name: str) -> str | None:
    """The split named by a word in a file's name, or else in the name of one of its folders."""
    for part in reversed(name.split("/")):
        splits = {_SPLITS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _SPLITS}
        if len(splits) == 1:
            return splits.pop()
    return None
