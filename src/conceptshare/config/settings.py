"""The settings of a study's parts, as its config has them: SAEs, correlations, names and analyses."""

import csv
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from conceptshare.config.catalog import Name, Positive, Spec

MAX_FVU_GLOBAL = 0.9
"""Largest FVU of an SAE at global tokens, by default, whose layer counts as explained."""
SAE_BOUNDS = {"max_dead", "max_fvu_global"}
"""Settings of SAEs that change nothing in them."""
NOT_OF_TRAINING = SAE_BOUNDS | {"pretrained"}
"""Settings of SAEs that change nothing in those that are trained."""
_LATER = {"activation", "matryoshka"}


def _layers(value: Any) -> Any:
    if value in ("last", "all") or (isinstance(value, list) and value and all(type(layer) is int for layer in value)):
        return value
    raise ValueError("write last, all, or a list of layers such as [3, 5]")


Layers = Annotated[Literal["last", "all"] | list[int], BeforeValidator(_layers)]
"""Recorded layers of an encoder."""


class SAESettings(Spec):
    """Training of sparse autoencoders; the defaults are the paper's.

    The preset `gao` follows Gao et al. (2024), and `global` explains the tokens that are compared.
    """

    preset: Literal["paper", "gao", "global"] = "paper"
    """Source of the defaults: ``gao`` sets ``auxk: 0.03125``, ``initial_b_dec: mean``, ``unit_norm_decoder: true`` and
    a learning rate of 2e-4 / sqrt(F / 16384). ``global`` sets ``train_on: global``, ``standardise: true``, ``epochs:
    20``, batches of 64, ``learning_rate: 0.003`` and ``decay_share: 0.7``."""
    train_on: Literal["all", "global"] = "all"
    """Tokens to train on: all, or the global token of each sample alone. For ``global``, no other tokens are stored or
    streamed, and a batch has as many tokens as samples."""
    global_weight: float = Field(default=1.0, ge=1, le=10**6)
    """With ``train_on: all``, how many times the error of a global token counts in the loss (at least 1); the others
    count once."""
    max_norm: float | None = Field(default=None, ge=1, le=10**6)
    """With ``train_on: all``, leave a token out of training if its norm is more than so many times (at least 1) the
    median norm of its batch's tokens, unless it is a global token. None trains on all."""
    expansion: int = Field(default=8, ge=1, le=10_000)
    """Latents per dimension of the residual stream: F = expansion x D."""
    features: Positive | None = None
    """Number of latents F, the same for every encoder, in place of ``expansion``."""
    activation: Literal["topk", "batchtopk"] = "topk"
    """Which latents reach the decoder: the k largest of each token, or with ``batchtopk``, in training the largest of a
    batch, k per token on average, and then those above a threshold (Bussmann et al. 2024)."""
    k: Positive = 32
    """Latents that reach the decoder: per token, or with ``activation: batchtopk``, per token on average."""
    matryoshka: list[Positive] = Field(default=[])
    """Nested numbers of latents, increasing: the loss adds the error of a reconstruction by the first so many latents
    for each (Bussmann et al. 2025). The whole SAE need not be listed."""
    learning_rate: float | None = Field(default=5e-5, gt=0, le=100)
    """Adam's learning rate; none means 2e-4 / sqrt(F / 16384)."""
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    """Steps of linear warm-up of the learning rate."""
    decay_share: float = Field(default=0, ge=0, le=1)
    """Fraction of the steps, at the end, over which the learning rate decays to 0."""
    clip_norm: float | None = Field(default=None, gt=0, le=10**9)
    """Maximum global gradient norm; larger gradients are clipped."""
    epochs: int = Field(default=1, ge=1, le=10_000)
    """Passes over the data set."""
    batch_samples: int = Field(default=16, ge=1, le=10**6)
    """Images per step; a batch has all their tokens."""
    batch_captions: int = Field(default=256, ge=1, le=10**6)
    """Captions per step, for text encoders."""
    held_out: float = Field(default=0, ge=0, lt=1)
    """Fraction of samples (the last ones) held out from training and used for the metrics."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of x and W_enc in the product that selects the k latents; everything else is float32. ``tf32`` is for
    NVIDIA GPUs and stored tokens; other devices use float32 instead."""
    initial_b_dec: Literal["zeros", "mean"] = "zeros"
    """Initial b_dec: zeros, or the mean of the first batch."""
    encoder_bias: bool = False
    """Train an encoder bias."""
    unit_norm_decoder: bool = False
    """Keep each latent's decoder row at length 1."""
    scale_inputs: bool = False
    """Train on tokens scaled to a mean length of sqrt(D); the scale is folded into the saved weights."""
    standardise: bool = False
    """Train on tokens whose dimensions have mean 0 and variance 1 over the training tokens: over all of them with
    ``train_on: global``, over the first batch otherwise. Both are folded into the saved weights."""
    auxk: float = Field(default=0, ge=0, le=10**6)
    """Weight of the auxiliary loss that trains dead latents to reconstruct the residual (Gao et al. 2024, A.2)."""
    auxk_latents: Positive = 512
    """Dead latents per token in the auxiliary loss."""
    dead_after: int = Field(default=10_000_000, ge=1, le=10**15)
    """Tokens without activation after which a latent counts as dead, for ``auxk``."""
    pretrained: dict[Name, str | dict[int, str]] | None = None
    """SAEs of SAELens, sparsify or saev to import instead of training them, by encoder: a folder per layer, or one path
    with ``{layer}`` (or ``{layer:02d}``) for all layers and, if there are several seeds, ``{seed}``. On a hub, write
    ``OWNER/NAME:FOLDER`` or ``OWNER/NAME@REVISION:FOLDER``. Encoders that are not named are trained. The quality is
    measured on the tokens that ``train_on`` names."""
    max_dead: float = Field(default=0.5, ge=0, le=1)
    """Log a warning if a larger fraction of latents is active on no token, of at least 10 F / k tokens."""
    max_fvu_global: float = Field(default=MAX_FVU_GLOBAL, ge=0)
    """If the fraction of variance unexplained of the global tokens, which are compared, is larger, log a warning, and
    mark the layer in tables, figures and pages. Another bound reruns these alone. Predicting their mean gives 1.
    ``correlations.unexplained_layers`` can leave such layers out of wMPPC over several layers; then correlations are
    rerun too."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            default = cls.model_fields["expansion"].default  # in a study's JSON, which has every key
            if values.get("features") is not None and values.get("expansion", default) != default:
                raise ValueError("features and expansion both give the number of latents; leave one of both out")
            return _PRESETS.get(str(values.get("preset")), {}) | values
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.standardise and self.scale_inputs:
            raise ValueError("scale_inputs: standardised tokens have that length already; leave it out")
        if self.matryoshka != sorted(set(self.matryoshka)):
            raise ValueError(f"matryoshka: {self.matryoshka} do not increase; list each size once, smallest first")
        given = {"global_weight": self.global_weight > 1, "max_norm": self.max_norm is not None}
        if self.train_on == "global" and any(given.values()):
            key = max(given, key=lambda name: given[name])
            raise ValueError(f"{key}: train_on: global has no other tokens than global ones; leave one of both out")
        return self

    def of_training(self, source: str | None = None) -> dict[str, Any]:
        """The settings that an SAE depends on: all but the bounds above which warnings are logged and layers marked.

        Later ones are left out at their default, so that records of earlier SAEs keep their bytes. For an imported SAE,
        the settings are its ``source``, as ``pretrained``, and what it is measured on.
        """
        if source is not None:
            return {"pretrained": source, **self.model_dump(mode="json", include={"train_on", "held_out"})}
        unset = {name for name in _LATER if getattr(self, name) == type(self).model_fields[name].default}
        unused = "features" if self.features is None else "expansion"
        return self.model_dump(mode="json", exclude=NOT_OF_TRAINING | unset | {unused})

    def latents(self, width: int) -> int:
        """Number of latents F of an SAE on tokens of a width."""
        return self.expansion * width if self.features is None else self.features

    def held_out_samples(self, samples: int) -> int:
        """How many of so many samples, the last ones, are not trained on."""
        return int(samples * self.held_out)

    def samples_per_step(self, modality: str) -> int:
        """How many samples of a modality one step trains on."""
        return self.batch_captions if modality == "text" else self.batch_samples

    def rate(self, latents: int) -> float:
        """The learning rate for F latents."""
        return 2e-4 / (latents / 2**14) ** 0.5 if self.learning_rate is None else self.learning_rate


_PRESETS: dict[str, dict[str, Any]] = {
    "gao": {"auxk": 1 / 32, "initial_b_dec": "mean", "unit_norm_decoder": True, "learning_rate": None},
    "global": {
        "train_on": "global",
        "standardise": True,
        "epochs": 20,
        "batch_samples": 64,
        "batch_captions": 64,
        "learning_rate": 3e-3,
        "decay_share": 0.7,
    },
}


class CorrelationSettings(Spec):
    """Correlations of features."""

    precision: Literal["float32", "float16"] = "float16"
    """Precision of standardised features in the product on a GPU, which sums in float32. With ``float16`` the error of
    a correlation is below 5e-4. CPUs use float32."""
    unexplained_layers: Literal["mark", "leave_out"] = "mark"
    """What happens to layers whose SAE is above ``max_fvu_global``: with ``mark``, results mark them; with
    ``leave_out``, they also take no part in ``pooled`` and ``layer_mean``, neither as source nor as target. Results of
    single layers, such as the reading ``last``, include them in any case."""
    memory_mb: Positive | None = None
    """Working memory of a job in MB; none means 1 GiB on a CPU, and most of the free memory of a GPU."""


class Matrix(Spec):
    """wMPPC between all pairs of members, over all layers and for the last layers."""

    members: list[str] | None = None
    """The members, as ``encoder`` or ``encoder@seed``; by default, every encoder of the study."""
    seeds: Literal["first", "all"] = "first"
    """Seeds of encoders that are named without one: their first, or all. With ``all``, the table of seeds has
    intervals over seeds and samples for every two encoders; correlations grow with the square of the number of seeds.
    """
    paper: Literal["large", "base"] | None = None
    """Compare with the paper's numbers for encoders of this size, which exist for ``large`` on coco, laion and flowers,
    and for ``base`` on coco."""


class Layerwise(Spec):
    """wMPPC between each layer of one member and each layer of another: one heatmap per pair, in one figure."""

    pairs: list[tuple[str, str]] = Field(min_length=1)
    """Pairs of members: rows first, then columns."""


class Sharedness(Spec):
    """Comparative Sharedness (Eq. 7 and 8): last-layer features that one group shares and another does not."""

    source: str
    """The member whose features are ranked."""
    shared_with: list[str] = Field(min_length=1)
    """The group G of members that should share them."""
    not_shared_with: list[str] = Field(min_length=1)
    """The group H of members that should not."""
    features_shown: int = Field(default=6, ge=1, le=1000)
    """Number of top features in the figure of their samples."""


class Samples(Spec):
    """How well each sample's image and caption fit, by matched features of an image encoder and a text encoder."""

    image: str
    """The member that reads images."""
    text: str
    """The member that reads captions."""
    image_layers: Layers = "last"
    """Its recorded layers whose features are matched, all together: ``last``, ``all``, or a list such as ``[3, 5]``."""
    text_layers: Layers = "last"
    """The same of the other."""


def or_empty(value: Any) -> Any:
    """A part of a config that is named without keys, as one with none."""
    return {} if value is None else value


class NameSettings(Spec):
    """Names of features."""

    command: str | None = None
    """A program that names features instead of the words of their captions, such as one that queries a language model.
    For each feature, it reads a line of JSON with captions of samples on which it is strong, and of others, and prints
    a line with its name; docs/formats.md describes both."""


class Analyses(Spec):
    """The analyses, by name. Each is done for every data set and SAE setting."""

    matrices: dict[Name, Annotated[Matrix, BeforeValidator(or_empty)]] = Field(default={})
    """wMPPC between all pairs of encoders."""
    layerwise: dict[Name, Layerwise] = Field(default={})
    """wMPPC between all layers of two encoders."""
    sharedness: dict[Name, Sharedness] = Field(default={})
    """Rankings of features by Comparative Sharedness."""
    samples: dict[Name, Samples] = Field(default={})
    """Scores of how well each sample's image and caption fit."""


@cache
def paper_encoders() -> dict[tuple[str, str], list[str]]:
    """The names of the encoders that the paper has numbers for, by data set and size."""
    with (Path(__file__).parents[1] / "analysis" / "paper" / "wmppc.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        (dataset, size): list(dict.fromkeys(r["source"] for r in rows if (r["dataset"], r["size"]) == (dataset, size)))
        for dataset, size in dict.fromkeys((row["dataset"], row["size"]) for row in rows)
    }
