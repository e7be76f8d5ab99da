"""Which files a data set's source is made of: listed here, exactly as they are named, and never guessed or globbed.

A folder is read by the first of these that it holds: tars; an image folder's `metadata.csv`, `.jsonl` or `.parquet`;
tables of one format; zips of images with their metadata. Files are read in the order of their paths, compared letter by
letter, so `part-10` comes before `part-2`. Names that start with a dot and folders that start with two underscores do
not count.

A part of the files is chosen only where the data set declares its parts: configurations and splits in the metadata of
its README.md, splits by the hub's names of shards (``train-00000-of-00002``) or by folders that are named as splits.
Whatever is left out is reported.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from conceptshare.config.catalog import DatasetSpec, is_path
from conceptshare.io.errors import DatasetError

ALL = "all"
"""The ``split`` that reads every file."""
_SHOWN = 100  # names of files of one kind in a manifest

_FORMATS = {
    **{".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".arrow": "arrow"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".tar": "tar", ".tgz": "tar", ".zip": "zip"},
}
_TABLES = ("parquet", "arrow", "csv", "tsv", "json", "jsonl")
_PACKED = {"csv": (".gz", ".bz2", ".zst"), "tar": (".gz", ".bz2", ".xz")}
_PACKED |= dict.fromkeys(("tsv", "json", "jsonl"), _PACKED["csv"])
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
# What the hub and its library keep next to the data.
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
    """Files below a source that are not read, by the reason, such as ``split test``."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first of them."""

    def add(self, reason: str, name: str) -> None:
        """Note one more."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        some = self.names.setdefault(reason, [])
        if len(some) < _SHOWN:
            some.append(printable(name))

    def entries(self) -> list[dict[str, Any]]:
        """For the manifest: the ``reason``, the number of ``files`` and the ``first`` of them."""
        return [{"reason": reason, "files": n, "first": self.names[reason]} for reason, n in self.counts.items()]

    def lines(self) -> list[str]:
        """For the log."""
        return [
            f"not read: {n:,} {'files' if n > 1 else 'file'} ({reason}), such as {', '.join(self.names[reason][:3])}"
            for reason, n in self.counts.items()
        ]


@dataclass(frozen=True)
class Source:
    """The files of a data set on this machine, in the order in which they are read."""

    name: str
    """As in the study."""
    folder: Path
    """The folder that was named, or that of the file that was."""
    revision: str | None
    """The commit of a hub data set; a local one is told by its content hash alone."""
    kind: Literal["tables", "images", "tars"]
    files: list[Path]
    split: str
    """The one that is read; ``train`` of a data set without splits, as the hub has it."""
    not_read: NotRead
    configuration: str | None = None
    """The one that is read, where there are several."""
    separator: str | None = None
    """Of CSV files, where the data set's metadata name one."""


def locate(spec: DatasetSpec) -> Source:
    """Find the files of a data set, once they are on this machine.

    Raises:
        DatasetError: where they are missing, or of several kinds, configurations or splits that none was chosen of.
        HubError: where they are to be fetched from the hub and cannot be.
    """
    if not is_path(spec.source):
        from conceptshare.io.hub import fetch_snapshot

        folder = fetch_snapshot(spec.source, "dataset", spec.revision)
        return _listed(spec, folder, folder.name)
    return _listed(spec, Path(spec.source).expanduser(), None)


def files_below(folder: Path) -> Iterator[str]:
    """The paths, relative to a folder, of all regular files below it, in no particular order.

    Links are followed, and hidden names left out; see the module.
    """
    above = [(folder, "", frozenset([folder.resolve()]))]
    while above:
        place, prefix, parents = above.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    real = Path(entry.path).resolve() if entry.is_symlink() else Path(entry.path)
                    if not entry.name.startswith("__") and real not in parents:
                        above.append((Path(entry.path), f"{prefix}{entry.name}/", parents | {real}))
                elif entry.is_file() or not Path(entry.path).exists():  # a broken link fails where it is read
                    yield prefix + entry.name


def printable(text: str) -> str:
    """A name with bytes that are no UTF-8 and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def form(name: str) -> str | None:
    """The format of a file of data by the suffix of its name, such as ``csv`` of ``a.csv.gz``."""
    stem, suffix = _halves(name.lower())
    inner = _FORMATS.get(_halves(stem)[1])
    return _FORMATS.get(suffix) or (inner if suffix in _PACKED.get(inner or "", ()) else None)


def _halves(name: str) -> tuple[str, str]:
    """A file's name without its suffix, and that; strings, as there may be millions of names."""
    stem, dot, suffix = name.rpartition(".")
    return stem, dot + suffix


def _listed(spec: DatasetSpec, path: Path, revision: str | None) -> Source:
    not_read = NotRead()
    split = spec.split or "train"
    if os.path.isfile(path):  # noqa: PTH113 - which no path makes fail, however long
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
    images = _image_suffixes()
    for name in files_below(path):
        if form(name) is not None and name.rpartition("/")[2] not in _NO_DATA:
            names.append(name)
        elif _halves(name.lower())[1] in images:
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


def _image_suffixes() -> set[str]:
    from conceptshare.data.images import suffixes

    return suffixes()


@dataclass(frozen=True)
class _Declared:
    """What the metadata of a data set declare of one configuration."""

    configuration: str | None
    """Its name, where there are several."""
    names: list[str]
    splits: dict[str, set[str]] = field(default_factory=dict)
    """The files of each split, where the metadata name any."""
    separator: str | None = None


def _declared(spec: DatasetSpec, folder: Path, names: list[str]) -> _Declared | None:
    """The configuration that is to be read, by the metadata of README.md; None where there are none."""
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
    if not matched & metadata and metadata:  # patterns that name images alone: their rows are in the metadata
        return _Declared(shown, sorted(metadata), {}, separator)
    if not matched:
        raise DatasetError(f"{spec.source}: no file is what README.md declares for configuration {name!r}")
    return _Declared(shown, sorted(matched), splits, separator)


def _configurations(spec: DatasetSpec, readme: Path) -> dict[str, dict[str, Any]]:
    """The keys of each configuration, with its ``data_files`` as the patterns of each split."""
    if not readme.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(readme)
        if not metadata or "configs" not in metadata:
            return {}
        from datasets.data_files import sanitize_patterns
        from datasets.utils.metadata import MetadataConfigs

        configurations = dict(MetadataConfigs.from_dataset_card_data(metadata))
        for keys in configurations.values():
            if keys.get("data_files") is not None:
                keys["data_files"] = sanitize_patterns(keys["data_files"])
        return configurations
    except Exception as error:  # whatever the YAML of others provokes
        raise DatasetError(
            f"{spec.source}: the metadata at the top of README.md cannot be read "
            f"({' '.join(str(error).split())[:200]}); correct or remove them"
        ) from None


def _default(configurations: dict[str, dict[str, Any]]) -> str | None:
    """The only configuration, or the one that the data set's author declared to be read by default."""
    if len(configurations) == 1:
        return next(iter(configurations))
    marked = [name for name, keys in configurations.items() if name == "default" or keys.get("default") is True]
    return marked[0] if len(marked) == 1 else None


def _in_folder(folder: str, pattern: Any) -> str:
    pattern = str(pattern).removeprefix("./")
    return f"{folder}/{pattern}" if folder else pattern


def _matches(name: str, pattern: str) -> bool:
    """Whether a path is the one, or of those, that the metadata of a data set name; ``**`` is any number of folders.

    The places in the pattern that are reached are kept, and none is tried twice: a stranger's pattern costs little.
    """
    wanted = pattern.split("/")
    reached = {0}
    for part in name.split("/"):
        before = _past_folders(reached, wanted)
        stay = {n for n in before if wanted[n : n + 1] == ["**"]}
        reached = stay | {n + 1 for n in before - stay if n < len(wanted) and fnmatchcase(part, wanted[n])}
    return name == pattern or len(wanted) in _past_folders(reached, wanted)


def _past_folders(places: set[int], wanted: list[str]) -> set[int]:
    """Places in a pattern, and those after each ``**`` there, which may be no folder at all."""
    found: set[int] = set()
    for place in places:
        found.add(place)
        while wanted[place : place + 1] == ["**"]:
            place += 1
            found.add(place)
    return found


def _of_one_kind(
    spec: DatasetSpec, names: list[str], some_image: str | None, not_read: NotRead
) -> tuple[Literal["tables", "images", "tars"], list[str]]:
    """The files that are read together, and what kind they are."""
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
        if any(_stem(name) not in stems for found in tables.values() for name in found):
            raise _mixed(spec, {"tar": tars} | tables)
        return "tars", _all_but(names, set(tars), "next to tars", not_read)
    if metadata and (some_image is not None or zips):
        for one, other in pairwise(metadata):
            if one.rpartition("/")[0] == other.rpartition("/")[0]:
                both = f"{printable(one)} and {printable(other)}"
                raise DatasetError(f"{spec.source}: {both} name the same images; remove one of them")
        return "images", _all_but(names, {*metadata, *zips}, "no metadata of an image folder", not_read)
    if len(tables) > 1:
        raise _mixed(spec, tables)
    if tables:
        return "tables", _all_but(names, set(*tables.values()), "archive next to tables", not_read)
    if zips:
        return "images", zips
    if some_image is not None:
        raise DatasetError(
            f"{spec.source}: images such as {printable(some_image)}, but no captions; add a metadata.csv with the "
            "columns file_name and caption"
        )
    raise DatasetError(f"{spec.source}: no file that can be read; use {', '.join(_FORMATS)}, or images and metadata")


def _stem(name: str) -> str:
    """What img2dataset's tars share with the tables that it writes next to them."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0].removesuffix('_stats')}"


def _all_but(names: list[str], chosen: set[str], reason: str, not_read: NotRead) -> list[str]:
    for name in names:
        if name not in chosen:
            not_read.add(reason, name)
    return [name for name in names if name in chosen]


def _mixed(spec: DatasetSpec, kinds: dict[str, list[str]]) -> DatasetError:
    found = ", ".join(f"{kind} ({printable(names[0])})" for kind, names in kinds.items())
    return DatasetError(
        f"{spec.source}: holds files of several kinds: {found}; which hold the rows? Set source to one file, or to a "
        f"folder with one kind{_fetched(spec)}"
    )


def _fetched(spec: DatasetSpec) -> str:
    """How to name a part of a hub data set."""
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
    """The files of the split that is to be read, by their names; all of them where these declare no splits."""
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
                f"{spec.source}: its files are named as splits are ({some}); set split to one of {', '.join(splits)}, "
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
        return DatasetError(f"{spec.source}: no split {spec.split!r}, nor any other; leave split out to read every row")
    return DatasetError(
        f"{spec.source}: no split {spec.split or 'train'!r}; it has {there}: set split to one, or to {ALL} to read "
        "every file"
    )


def _splits_by(split_of: Callable[[str], str | None], names: list[str]) -> dict[str, str]:
    """The split of each file, where each of them has one, and it is not one word that all of them share."""
    found = {name: split for name in names if (split := split_of(name)) is not None}
    splits = set(found.values())
    return found if len(found) == len(names) and (len(splits) > 1 or splits <= set(_SPLITS)) else {}


def _split_of_shard(name: str) -> str | None:
    match = _SHARD.fullmatch(name.rpartition("/")[2])
    return None if match is None else _SPLITS.get(match[1], match[1])


def _split_of_folder(name: str) -> str | None:
    folder, _, rest = name.removeprefix("data/").partition("/")
    return _SPLITS.get(folder.lower()) if rest else None


def _split_in(name: str) -> str | None:
    """The split that a word of a file's name is, or else one of its folders."""
    for part in reversed(name.split("/")):
        found = {_SPLITS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _SPLITS}
        if len(found) == 1:
            return found.pop()
    return None
