"""The specifications of data sets and encoders, and the catalog that holds the known ones.

Models and data are data: `workflow/catalog/*.yaml` holds one entry a name. A study may override keys of
an entry, derive a variant from one by ``base``, or describe an encoder of its own in full.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from conceptshare.io.errors import StudyError

CATALOG = Path(__file__).parents[3] / "workflow" / "catalog"
"""The catalog of the clone that this package is installed from."""

# A name becomes part of paths such as a@0__b@1.zarr, so it can hold neither "@" nor "__" nor "/".
NAME = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
# Twice, with seeds and endings, in the name of a file, which most disks bound to 255 bytes.
MAX_NAME_LENGTH = 80

# A number that everyone reads alike; YAML 1.1 also has octal 010, 1_000, and 1:30 to base 60.
_DECIMAL = re.compile(
    r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_AMBIGUOUS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}

# Bounds of a config file, its aliases written out: far more than any study has, and little enough to be read at once.
_MAX_BYTES = 10 * 2**20
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 20
# Letters of a wrong value that an error shows.
_MAX_SHOWN_LENGTH = 200

Positive = Annotated[int, Field(ge=1, le=10**9)]
"""A count without a tighter limit of its own."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A seed, as NumPy and torch take it."""


def _as_name(value: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a name: use letters, digits, and single '.', '_' or '-' between them")
    if len(value) > MAX_NAME_LENGTH:
        raise ValueError(f"{value!r} has {len(value)} letters; shorten it to at most {MAX_NAME_LENGTH}")
    return value


Name = Annotated[str, BeforeValidator(_as_name)]


def _one_or_several(fits: Callable[[Any], bool], wanted: str) -> BeforeValidator:
    """Check a value or each value in a list, with one message for both."""

    def check(value: Any) -> Any:
        if not all(map(fits, value if isinstance(value, list) else [value])):
            raise ValueError(f"expected {wanted}")
        return value

    return BeforeValidator(check)


Widths = Annotated[
    int | list[int],
    _one_or_several(
        lambda one: str(one).isdecimal() and 1 <= int(one) <= 10**6,
        "a whole number from 1 to 1,000,000, or a list with one for each layer",
    ),
]
Paths = Annotated[
    str | list[str] | None,
    _one_or_several(lambda one: isinstance(one, str | None), "the path of a module list, or a list of paths"),
]


class Spec(BaseModel):
    """Base of every part of a study: unknown keys are errors, numbers are finite, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``yes``, ``no``, ``on`` and ``off`` for a number: YAML reads them as true and false."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if wanted is not bool and any(isinstance(item, bool) for item in _leaves(value)):
            raise ValueError(
                "YAML reads yes, no, on, off, true and false as truth values; write a number, or quote text"
            )
        return value


class Download(Spec):
    """Downloads of images, for data sets with image URLs."""

    parallel: int = Field(default=32, ge=1, le=1000)
    """Concurrent requests."""
    timeout: float = Field(default=10, gt=0, le=86400)
    """Timeout in seconds for a connection and for each part of a response. A whole attempt, including redirects, may
    take six times as long."""
    attempts: int = Field(default=3, ge=1, le=100)
    """Attempts per URL on transient errors, with exponential backoff."""
    max_mb: float = Field(default=20, gt=0, le=10**6)
    """Maximum file size in MB, as sent and as decompressed; larger files are not read to the end."""
    allow_private: bool = False
    """Allow requests to hosts that are not on the public internet, such as loopback and private addresses."""


class DatasetSpec(Spec):
    """A data set of image-caption pairs."""

    source: str
    """A hub id, or a path to a Parquet, CSV, TSV, JSON, JSON lines or Arrow file or a folder of them, to a folder in
    the `imagefolder` layout or a zip of one, to COCO's `captions_*.json`, or to a WebDataset tar file or a folder of
    them. An existing path takes precedence over a hub id of the same name."""
    revision: str | None = None
    """The hub revision. The default is the newest, which the manifest records."""
    configuration: str | None = None
    """The configuration to read, if the data set's README.md declares several."""
    split: str | None = None
    """The split to read; ``all`` reads every file. The default is ``train`` if the data set declares splits (in its
    README.md, by shards such as ``train-00000-of-00002``, or by folders named after splits), and every file otherwise.
    """
    image: str = "image"
    """The column of images: the bytes of image files, or paths relative to the table. In a WebDataset, columns are the
    members' extensions; of alternatives such as ``jpg;png;webp``, the first one that a sample has is used."""
    image_folder: str | None = None
    """The folder that paths of images start from, for a table on this machine. The default is the table's folder."""
    image_url: str | None = None
    """The column of image URLs (http or https) to download; ``image`` is then ignored. Downloads are kept in
    `results/{dataset}/downloads/`."""
    caption: str = "caption"
    """The column of captions: strings, lists of strings, or class labels, whose names are the captions."""
    several_captions: Literal["first", "joined", "sampled"] = "first"
    """For lists of captions: use the first, all of them joined by spaces, or a random one. Empty captions are ignored.
    """
    caption_seed: Seed = 0
    """Seed of ``several_captions: sampled``."""
    id: str | None = None
    """The column of unique sample ids (``__key__`` in a WebDataset). The default is the row number."""
    limit: int | None = Field(default=None, ge=1, le=10**12)
    """Read only this many rows, the first ones."""
    order_seed: Seed = 0
    """Seed of the order of samples, which is the same for all encoders and SAEs."""
    max_dropped: float = Field(default=0.01, ge=0, le=1)
    """Maximum fraction of unusable rows; more is an error."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=10**12)
    """Maximum image size in pixels; larger images are dropped before they are decoded."""
    max_mb: float = Field(default=200, gt=0, le=10**6)
    """Maximum size of an image, caption or row of text in MB; larger images are dropped before they are read. Downloads
    have their own limit, ``download.max_mb``."""
    download: Download = Download()
    """Settings for downloading the images at ``image_url``."""
    samples: int | None = Field(default=None, ge=2, le=10**12)
    """Number of samples, for estimates of size and time only."""
    note: str = ""
    """Free text for readers; it has no effect."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_folder is not None and not is_path(self.source):
            raise ValueError("image_folder is for a table on this machine; leave it out, or name a copy as source")
        return self


class ModelSpec(Spec, extra="ignore"):
    """The part of an encoder's entry that determines its files."""

    library: Literal["transformers", "open_clip", "timm", "arrays"]
    """The library that loads the model; ``arrays`` reads embeddings that were computed elsewhere."""
    model: str
    """A hub id or the library's own model name; a path to a folder; ``package:NAME/FOLDER`` for a folder inside an
    installed Python package; or ``script:FILE.py`` for a script that writes the model to the folder given as its
    argument. An existing folder takes precedence over a hub id of the same name. For ``arrays``, a path to their
    folder."""
    weights: str | None = None
    """open_clip only: the pretrained tag, or a path to a checkpoint."""
    revision: str | None = None
    """The hub revision. The default is the newest, which the `weights` stage records."""
    remote_code: bool = False
    """transformers only: download and run the Python code that comes with the model."""
    untrained: bool = False
    """Draw the weights at random, as the library initialises the model, instead of reading trained ones. Tables and
    figures group such an encoder as ``untrained``. ``weights`` then only sets open_clip's preprocessing."""
    untrained_seed: Seed = 0
    """Seed of the weights of ``untrained``."""

    def model_key(self) -> str:
        """The settings that an encoder's files depend on, as canonical JSON."""
        return canonical(self, set(ModelSpec.model_fields))


PLACES = {"image": "{image}", "text": "{caption}"}
"""Where a sample of each modality stands in a template."""

CHAT = "chat"
"""The template that stands for a model's own chat template."""

GlobalToken = Literal["first", "last_token", "last_position", "mean", "max", "reference", "given"]


class EncoderSpec(ModelSpec, extra="forbid"):
    """An encoder: its source, its inputs, and the activations to record."""

    modality: Literal["image", "text"]
    """The input it reads."""
    kind: Literal["vlm", "vision", "language"]
    """Its training data: image-text pairs, images or text."""
    layers: int = Field(ge=1, le=1000)
    """Number of blocks; checked when the encoder is loaded."""
    width: Widths
    """Width of the residual stream, or of each layer of an image encoder whose stages differ, such as Swin or ResNet;
    checked when the encoder is loaded."""
    global_token: GlobalToken
    """The token that stands for a whole sample: the first token; the last one, which in CLIP is the end of text; the
    last position, padding included, of models trained to read it there (SigLIP); or, in each dimension, the mean or the
    maximum of all tokens, special ones included and padding excluded. ``reference`` is the choice of the paper's
    published code: position 0, with SAEs trained on padding too, and captions of SigLIP2 not lower-cased. Entries of
    ``library: arrays`` leave it out and have ``given``."""
    template: str | None = None
    """The prompt through which a multimodal language model of transformers, such as LLaVA, reads a sample, with a place
    for it: ``{image}`` or ``{caption}``. ``chat`` is the model's own chat template, with the sample as the message of
    the user. Layers and width are then those of its language model. Without a template, images are read by its image
    encoder, and captions by its language model alone."""
    use_layers: Literal["all", "last"] | list[int] = "all"
    """The layers to record, counted from 0."""
    image_size: int | None = Field(default=None, ge=1, le=100_000)
    """Side of the input images in pixels, with the crop ratio of the model's processor. The default is the model's own
    size."""
    context_length: int | None = Field(default=None, ge=1, le=10**8)
    """Maximum length of a text in tokens, without those of ``template``; longer texts are cut. The default is the
    model's own length: the smaller of the limits of its tokenizer and its positions, or 512 if neither has a limit,
    which is then logged."""
    blocks: Paths = None
    """Dotted path of the module list that holds the blocks, if it is not the longest run of modules of one class; or
    the paths of the blocks themselves."""
    batch_size: int = Field(default=32, ge=1, le=10**6)
    """Samples per forward pass."""
    parts: int = Field(default=1, ge=1, le=1000)
    """Number of jobs that share the forward pass over a data set, each for a range of the samples. The stores are
    bit-identical to those of a single job; another number recomputes them. Not for images with different numbers of
    tokens, nor for ``stream: true``."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass; 16-bit types use autocast, with weights in float32."""
    max_tokens: Positive | None = None
    """Number of training tokens to keep per sample, drawn at random and including the global token. The default is all.
    """
    token_seed: Seed = 0
    """Seed for drawing ``max_tokens``."""
    seeds: list[Seed] = Field(default=[0], min_length=1, max_length=100)
    """Seeds of the SAEs trained on this encoder. Rankings are resampled over all seeds of an encoder in a group."""
    tokens: Positive | None = None
    """Tokens of a typical sample, without padding. For estimates of size and time only."""
    gflops: float | None = Field(default=None, gt=0, le=10**9)
    """GFLOPs of a sample's forward pass, if they do not follow from layers, width and tokens. For estimates only."""
    parameters: float | None = Field(default=None, gt=0, le=10**9)
    """Millions of parameters of the whole model, if they do not follow from layers and width. For estimates only."""
    trained_on: str = ""
    """Its training data, for readers; it has no effect."""
    note: str = ""
    """Free text for readers; it has no effect."""

    @model_validator(mode="before")
    @classmethod
    def _with_given_token(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("library") == "arrays":
            return {"global_token": "given"} | values
        return values

    @field_validator("global_token", mode="before")
    @classmethod
    def _reject_other_names(cls, value: Any) -> Any:
        if value == "eot":
            raise ValueError("eot is now called last_token")
        if value == "last":
            raise ValueError(
                "last is now called last_position for SigLIP, which reads padding, and last_token for others"
            )
        if value not in get_args(GlobalToken):
            raise ValueError("expected first (the class token of most models), last_token, last_position, mean or max")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.layer_numbers():
            raise ValueError("use_layers is empty: name at least one layer, or say 'all' or 'last'")
        absent = [layer for layer in self.layer_numbers() if not 0 <= layer < self.layers]
        if absent:
            raise ValueError(
                f"use_layers names layer {absent[0]}, which the encoder lacks: it has layers 0 to {self.layers - 1}"
            )
        if (self.global_token == "given") != (self.library == "arrays"):
            raise ValueError("global_token: given is for library: arrays, which has no other; correct one of them")
        unused = self.model_dump(exclude_defaults=True).keys() - _KEYS_OF_ARRAYS
        if self.library == "arrays" and unused:
            raise ValueError(f"{min(unused)} is for encoders that read samples; library: arrays does not, leave it out")
        if self.weights is not None and self.library != "open_clip":
            raise ValueError(f"weights is for library: open_clip; {self.library} takes its weights from model")
        if self.remote_code and self.library != "transformers":
            raise ValueError(f"remote_code is for library: transformers; {self.library} runs no code of a model's")
        if self.remote_code and self.untrained:
            raise ValueError(
                "untrained is for models of the library; leave untrained out, or use one without remote_code"
            )
        if self.untrained_seed and not self.untrained:
            raise ValueError("untrained_seed is for untrained: true; set that too, or leave untrained_seed out")
        if self.template is not None:
            self._check_template(self.template)
        if isinstance(self.width, list):
            self._check_widths(self.width)
        if self.modality == "text" and self.image_size is not None:
            raise ValueError("image_size is for image encoders; leave it out")
        if self.modality == "image" and self.context_length is not None:
            raise ValueError("context_length is for text encoders; leave it out")
        if (self.library, self.modality) == ("timm", "text"):
            raise ValueError("timm's models read images; set modality or library")
        if (self.modality, self.kind) in {("image", "language"), ("text", "vision")}:
            raise ValueError(f"a {self.kind} encoder does not read {self.modality}s; set modality or kind")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds names a seed twice: {self.seeds}; name each once")
        return self

    def _check_template(self, template: str) -> None:
        place = PLACES[self.modality]
        if template != CHAT and template.count(place) != 1:
            instead = ", in place of the model's own token of an image" if self.modality == "image" else ""
            raise ValueError(
                f"template has {'no' if place not in template else 'more than one'} place for the "
                f"{place.strip('{}')}; write {place} once, where it belongs in the prompt{instead}"
            )
        if others := set(re.findall(r"\{\w+\}", template)) - {place}:
            raise ValueError(f"template has {min(others)}, which nothing replaces; {place} is the only place in it")
        if self.library != "transformers" or self.remote_code:
            raise ValueError("template is for library: transformers without remote_code; leave it out")
        if self.global_token == "reference":
            raise ValueError("global_token: reference is not for prompts; set last_token, mean or max")
        if self.image_size is not None:
            raise ValueError("image_size is for image encoders without a template; leave it out")

    def _check_widths(self, widths: list[int]) -> None:
        if len(widths) != self.layers:
            raise ValueError(f"width has {len(widths)} numbers, but there are {self.layers} layers; write one for each")
        if self.library == "arrays":
            return
        if self.modality == "text" or self.template is not None:
            raise ValueError("layers of several widths are for image encoders; set width to one number")
        if self.global_token not in {"mean", "max"}:
            raise ValueError("layers of several widths have no token in common; set global_token: mean or max")
        if self.parts > 1:
            raise ValueError("parts is for layers of one width; leave it out")

    def width_of(self, layer: int) -> int:
        """Width of a layer's tokens."""
        return self.width[layer] if isinstance(self.width, list) else self.width

    @property
    def mean_width(self) -> int:
        """Mean width of the recorded layers, rounded, for estimates."""
        widths = [self.width_of(layer) for layer in self.layer_numbers()]
        return round(sum(widths) / len(widths))

    @property
    def group(self) -> tuple[str, str]:
        """What it reads, and its ``kind`` or ``untrained``: the group of its members in a matrix."""
        return self.modality, "untrained" if self.untrained else self.kind

    def layer_numbers(self) -> list[int]:
        """The recorded layers, ascending."""
        if self.use_layers == "all":
            return list(range(self.layers))
        if self.use_layers == "last":
            return [self.layers - 1]
        return sorted(set(self.use_layers))

    def activations_key(self) -> str:
        """What the `weights` and `activations` stages depend on, as canonical JSON."""
        return canonical(self, set(type(self).model_fields) - INFORMATIVE_KEYS - {"seeds", "parts"})


INFORMATIVE_KEYS = {"samples", "tokens", "gflops", "parameters", "trained_on", "note"}
"""Keys for readers and estimates, which change no result."""

_KEYS_OF_ARRAYS = {"library", "model", "modality", "kind", "layers", "width", "global_token", "use_layers", "seeds"}
_KEYS_OF_ARRAYS |= INFORMATIVE_KEYS


def canonical(spec: BaseModel, keys: set[str] | None = None) -> str:
    """The given keys of ``spec`` that are not at their default, as JSON with sorted keys.

    Snakemake compares parameters as strings; a default left out means that a later version can add a key
    without making old results stale.
    """
    return json.dumps(spec.model_dump(mode="json", include=keys, exclude_defaults=True), sort_keys=True)


def _leaves(value: Any) -> Iterator[Any]:
    """A value, or the values in a list of lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def is_path(text: str, base: Path = Path()) -> bool:
    """Whether a source or model is a path and not a name in a hub or library.

    A path starts with ``.``, ``/`` or ``~``, has more parts than any hub id, or exists below ``base``.
    """
    if text.startswith((".", "/", "~")):
        return True
    if not text or ":" in text:  # hf-hub:OWNER/NAME, package:NAME/FOLDER
        return False
    # Path.exists would raise for a text that is too long for any file system.
    return text.count("/") > 1 or os.path.exists(base / text)  # noqa: PTH110


def local_path(text: str, base: Path = Path()) -> Path | None:
    """The file or folder that a model or source is read from, if it is a path or a script of the user's."""
    if text.startswith("script:"):
        return Path(text.removeprefix("script:")).expanduser()
    return Path(text).expanduser() if is_path(text, base) else None


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that rejects what YAML silently reads otherwise than it looks: equal keys, and odd numbers."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except ValueError as error:  # a number of 5,000 digits, or the 31st of June
            message = str(error).partition(";")[0]
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None
        if node.tag in _AMBIGUOUS and not _DECIMAL.fullmatch(node.value):
            message = f"YAML reads {_shown(node.value)} as {_shown(value)}; write a decimal number, or quote text"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        StudyError: if the file is missing, too large, or not YAML, if a key is given twice, or if it is anything but
            a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise StudyError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: not a readable text file: {error}") from None
    if len(content) > _MAX_BYTES:
        raise StudyError(f"{path}: larger than {_MAX_BYTES >> 20} MiB; a config file is a few lines of YAML")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """The mapping in a YAML text; its aliases must not make it absurdly large.

    Raises:
        StudyError: naming ``origin``, if it is not YAML or not a mapping, gives a key twice, is nested too deeply, or
            has too many values.
    """
    content = None
    try:
        loader = _StrictLoader(text)  # which refuses control characters
        if (node := loader.get_single_node()) is not None:
            _count_values(node, {}, _MAX_DEPTH)
            content = loader.construct_document(node)
    except RecursionError:
        raise StudyError(f"{origin}: {_TOO_DEEP}") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{origin}: not valid YAML: {_yaml_fault(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StudyError(f"{origin}: expected a mapping of keys to values, found {type(content).__name__}")
    return content


def _yaml_fault(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else " ".join(str(error).split())


_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep, or an alias that refers to itself; write it flatter"


def _count_values(node: yaml.Node, counts: dict[int, int], levels: int) -> int:
    """How many values a YAML node holds with its aliases written out, counting each node once.

    Raises:
        yaml.YAMLError: if there are more than `_MAX_VALUES`, or more levels than ``levels``.
    """
    if levels == 0:
        raise yaml.YAMLError(_TOO_DEEP)
    if id(node) not in counts:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        counts[id(node)] = 1 + sum(_count_values(part, counts, levels - 1) for part in parts)
        if counts[id(node)] > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES:,} values once its aliases are written out; use fewer")
    return counts[id(node)]


def read_catalog(what: Literal["datasets", "encoders"], catalog: Path = CATALOG) -> dict[str, dict[str, Any]]:
    """The catalog's entries by name, with their paths, written relative to the clone, made relative to here."""
    entries = read_yaml(catalog / f"{what}.yaml")
    root = catalog.parent.parent
    for entry in entries.values():
        for key in ("source", "model", "weights"):
            if isinstance(entry.get(key), str):
                entry[key] = _from_root(entry[key], root)
    return entries


# Without it, an entry that is not in the catalog is a slip of the pen and not a description.
_ESSENTIAL = {"datasets": "source", "encoders": "model"}


def complete(
    name: str,
    given: dict[str, Any] | None,
    entries: dict[str, dict[str, Any]],
    what: str,
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An entry of a study: the catalog's entry of that name, or of its ``base``, with the study's keys over it.

    A ``base`` that the catalog lacks is one of the study's ``own`` entries, which describes itself in full.

    Raises:
        StudyError: if ``base`` is unknown, or the name is unknown and has no description.
    """
    if given is not None and not isinstance(given, dict):
        raise StudyError(f"{what}.{name}: expected keys and values (or nothing), found {_shown(given)}")
    if not isinstance(name, str):
        raise StudyError(f"{what}.{name}: a name is text; put it into quotes")
    overrides = dict(given or {})
    base = overrides.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise StudyError(f"{what}.{name}.base: expected a name in the catalog, found {_shown(base)}")
    others = {other: entry for other, entry in (own or {}).items() if other != name}
    if base in others and base not in entries:
        entries = entries | {base: complete(base, others[base], entries, what, others)}
    if base is not None and base not in entries:
        raise StudyError(f"{what}.{name}.base: {_unknown(base, entries, what)}")
    if base is None and name not in entries and _ESSENTIAL[what] not in overrides:
        raise StudyError(f"{what}.{name}: {_unknown(name, entries, what)}; or describe it here, see config/README.md")
    return {**entries.get(base or name, {}), **overrides}


def parse(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """Validate ``values``, and report every fault as one line ``where.key: what is wrong``.

    Raises:
        StudyError: if a key is unknown or missing, or a value is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise StudyError("\n".join(_explain(fault, model, where) for fault in error.errors())) from None


def suggest(wrong: str, known: list[str]) -> str:
    """The known name nearest to a wrong one, as a question, or the list of those there are."""
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known)) or 'none'}"


def _unknown(name: str, entries: dict[str, dict[str, Any]], what: str) -> str:
    return f"{name!r} is not in the catalog of {what}; {suggest(name, list(entries))}"


def _from_root(text: str, root: Path) -> str:
    """A catalog's path as seen from the working directory, so that a study keeps no absolute path of its own."""
    path = local_path(text, root)
    if path is None or path.is_absolute():
        return text
    relative = Path(os.path.relpath(root / path)).as_posix()
    if text.startswith("script:"):
        return f"script:{relative}"
    return relative if relative.startswith("..") else f"./{relative}"


def _explain(fault: Any, model: type[BaseModel], where: str) -> str:
    place = ".".join([where, *(str(part) for part in fault["loc"])]).strip(".")
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        return f"{place}: unknown key; {suggest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{place}: missing; it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:  # a fault of the whole names its own place, and the whole is too much to show
        return f"{place}: {message}".removeprefix(": ")
    return f"{place}: {message} (found {_shown(fault['input'])})"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of very many digits"
    return text if len(text) <= _MAX_SHOWN_LENGTH else f"{text[:_MAX_SHOWN_LENGTH]}..."


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys of the part of ``model`` at a location, following model-valued fields and mappings of models."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = _plain(current.model_fields[part].annotation)
        else:
            current = _plain(get_args(current)[-1])
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
