"""Training on stored tokens: one Adam step per batch of samples, with checkpoints to resume from."""

import csv
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.activations.extraction import TokenReader
from conceptshare.config.settings import SAESettings
from conceptshare.device import default_device, full_float32
from conceptshare.io import provenance
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.files import SAE_FOLDER, Unchanged, atomic_output
from conceptshare.io.progress import info, progress, warn
from conceptshare.sae import _order
from conceptshare.sae._checkpoints import PREEMPTED, Checkpoints, stop_on_sigterm
from conceptshare.sae._metrics import Evaluation, density_histogram, evaluate
from conceptshare.sae._model import SAE, load_sae, save_sae
from conceptshare.sae._trainer import Trainer
from conceptshare.sae.folder import origin_of

_SECONDS_BETWEEN_CHECKPOINTS = 300.0
# Number of prefetched batches.
_AHEAD = 4


class Tokens(Protocol):
    """Source of training tokens by sample, for `train`."""

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def block(self) -> int:
        """The encoder's batch size."""
        ...

    def __len__(self) -> int: ...

    def read(self, samples: NDArray[np.int64]) -> Tensor:
        """``[rows, D]`` tokens of the samples, of any floating-point type."""
        ...

    def global_rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` rows of the samples' global tokens in `read`."""
        ...


@dataclass(frozen=True)
class Origin:
    """Identifies an SAE of a study."""

    encoder: str
    layer: int
    seed: int

    def __str__(self) -> str:
        return f"{self.encoder} layer {self.layer} seed {self.seed}"

    def mixed_seed(self) -> int:
        """A distinct seed for every SAE: with equal initial weights, features of two SAEs would align by index."""
        entropy = [self.seed, self.layer, crc32(self.encoder.encode())]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


@full_float32()
def train(
    tokens: Tokens,
    settings: SAESettings,
    seed: int,
    batch_samples: int | None = None,
    what: str = "SAE",
    checkpoints: Checkpoints | None = None,
) -> tuple[SAE, NDArray[np.float32]]:
    """Train an SAE, on the GPU if there is one, with prefetching of tokens.

    Args:
        tokens: the training tokens.
        settings: size and optimisation.
        seed: seed of the initial weights.
        batch_samples: samples per step; defaults to ``settings.batch_samples``.
        what: name of the training in the progress report.
        checkpoints: checkpoints to resume from and to save to, every few minutes and on SIGTERM.

    Returns:
        The SAE, on the device it was trained on, and the loss of each step.

    Raises:
        NumericsError: if a loss is not finite, or k exceeds the number of latents.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    trainer = _trained(tokens, settings, seed, batch_samples or settings.batch_samples, what, checkpoints)
    return trainer.finish(), trainer.losses.cpu().numpy()


def _trained(
    tokens: Tokens,
    settings: SAESettings,
    seed: int,
    batch_samples: int,
    what: str,
    checkpoints: Checkpoints | None,
) -> Trainer:
    device = default_device()
    batches = _order.steps(len(tokens), batch_samples, tokens.block, settings)
    trainer = Trainer(tokens.width, settings, seed, len(batches), device)
    if checkpoints is not None and checkpoints.restore({what: trainer}):
        info(f"{what}: resuming at step {trainer.step:,} of {len(batches):,}")
    elif settings.standardise and settings.train_on == "global":
        trainer.standardise(tokens.read(batch) for batch in batches[: len(batches) // settings.epochs])
    left = batches[trainer.step :]
    with closing(_prefetch(tokens, left, device)) as ready:
        run_steps(ready, lambda batch: trainer.train_on(*batch), {what: trainer}, what, checkpoints)
    return trainer


Batch = TypeVar("Batch")


def run_steps(
    batches: Iterable[Batch],
    train_on: Callable[[Batch], None],
    trainers: Mapping[str, Trainer],
    what: str,
    checkpoints: Checkpoints | None = None,
    before_saving: Callable[[], None] = lambda: None,
) -> None:
    """Run the remaining steps of trainings that take steps together.

    Args:
        batches: the batch of each step.
        train_on: runs one step of every training.
        trainers: the trainings, by name.
        what: name of the trainings in the progress report.
        checkpoints: checkpoints to save to, every few minutes and on SIGTERM.
        before_saving: called before each checkpoint is saved.

    Raises:
        NumericsError: if a loss is not finite.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    some = next(iter(trainers.values()))
    steps, last = len(some.losses), time.monotonic()
    with stop_on_sigterm() as stop:
        for batch in progress(batches, steps - some.step, f"training {what}", "steps"):
            train_on(batch)
            if checkpoints is not None and (stop.is_set() or time.monotonic() - last >= _SECONDS_BETWEEN_CHECKPOINTS):
                _check_finite(trainers)
                before_saving()
                checkpoints.save(trainers)
                last = time.monotonic()
            if stop.is_set():
                info(f"{what}: stopped by SIGTERM at step {some.step:,} of {steps:,}; run again to resume")
                raise SystemExit(PREEMPTED)
    _check_finite(trainers)


def _check_finite(trainers: Mapping[str, Trainer]) -> None:
    for name, trainer in trainers.items():
        bad = (~trainer.losses.isfinite()).nonzero().flatten().tolist()
        if not bad and not all(parameter.isfinite().all() for parameter in trainer.sae.parameters()):
            bad = [trainer.step]  # the next loss would be the first that is not finite
        if bad:
            raise NumericsError(
                f"{name}: the loss is not finite from step {bad[0]} on; lower learning_rate, or set clip_norm"
            )


def _prefetch(
    tokens: Tokens, batches: list[NDArray[np.int64]], device: torch.device
) -> Generator[tuple[Tensor, NDArray[np.int64]], None, None]:
    def read(batch: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        x, rows = tokens.read(batch), tokens.global_rows(batch)
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x, rows

    with ThreadPoolExecutor(1) as reading:
        yield from in_order((reading.submit(read, batch).result for batch in batches), _AHEAD)


class Imported:
    """An imported SAE in the place of a `Trainer`, which takes no steps.

    Args:
        folder: a folder that `import_sae` wrote.
        width: D of the tokens.
        device: the device to measure it on.
    """

    outlying = 0.0

    def __init__(self, folder: Path, width: int, device: torch.device) -> None:
        record, self.origin = origin_of(folder)
        self.sae = load_sae(folder, record).to(device)
        if self.sae.b_dec.shape != (width,):
            raise StoreError(f"{folder}: an SAE of width {len(self.sae.b_dec)}, but tokens have {width}; name another")
        self.losses = torch.zeros(0, device=device)

    def finish(self) -> SAE:
        """Return the SAE."""
        return self.sae


@full_float32()
def train_sae(
    store: Path, layer: int, settings: SAESettings, seed: int, out: Path, pretrained: Path | None = None
) -> None:
    """Train an SAE on one layer of a store and write its folder.

    The store is one of all tokens, or with ``train_on: global``, one of global tokens.

    The folder holds `sae_weights.safetensors` and `cfg.json`, which SAELens can read, `metrics.json`, `loss.csv` and
    `density.csv`. An interrupted training leaves the folder `{out}.checkpoints` and resumes from it when it is run
    again; the result is the same to the byte as that of an uninterrupted training.

    Args:
        store: the store.
        layer: the layer.
        settings: size and optimisation.
        seed: seed of the initial weights.
        out: the folder to write.
        pretrained: a folder that `import_sae` wrote, whose SAE is taken instead of training one, and measured.

    Raises:
        StoreError: if the store is incomplete, damaged or empty, lacks the layer or has another width than
            ``pretrained``.
        NumericsError: if training diverges.
        AlreadyMadeError: if another process made the same folder while this one waited for the lock.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    inputs = Unchanged(store, *filter(None, [pretrained]))
    tokens = (TokenReader.open_global if settings.train_on == "global" else TokenReader.open)(store, layer)
    if not len(tokens):
        raise StoreError(f"{store}: no samples in it; run the activations stage again")
    origin = Origin(store.stem, layer, seed)
    imported = None if pretrained is None else Imported(pretrained, tokens.width, default_device())
    made = settings.of_training() if imported is None else imported.origin
    key = {"settings": made, "seed": seed, "layer": layer, "made_from": tokens.made_from}
    checkpoints = Checkpoints(out.with_name(out.name + ".checkpoints"), key)
    batch_samples = settings.samples_per_step(tokens.modality)
    with atomic_output(out, SAE_FOLDER, key=checkpoints.key) as folder, inputs:
        trainer = imported or _trained(tokens, settings, origin.mixed_seed(), batch_samples, str(origin), checkpoints)
        sae = trainer.finish()
        batches = _order.evaluated(len(tokens), settings)
        all_tokens = evaluate(sae, (tokens.read(batch) for batch in batches))
        global_tokens = evaluate(sae, (tokens.read_global(batch) for batch in batches))
        held_out = settings.held_out_samples(len(tokens)) > 0
        imported_from = None if imported is None else imported.origin
        report = Report(origin, all_tokens, global_tokens, held_out, trainer.outlying, imported_from)
        write_sae(folder, sae, trainer.losses.cpu().numpy(), settings, report, tokens.made_from)
    checkpoints.remove()


@dataclass(frozen=True)
class Report:
    """Evaluation of an SAE."""

    origin: Origin
    all_tokens: Evaluation
    global_tokens: Evaluation
    held_out: bool
    """Whether it was evaluated on held-out samples."""
    outlying: float
    """Fraction of the training tokens that were left out for their norm."""
    imported_from: dict[str, Any] | None = None
    """The source of the SAE, if it was not trained."""


def write_sae(
    folder: Path,
    sae: SAE,
    losses: NDArray[np.float32],
    settings: SAESettings,
    report: Report,
    made_from: dict[str, Any],
) -> None:
    """Write an SAE's folder and log its quality; ``made_from`` is the spec of the activations."""
    folder.mkdir(parents=True)
    origin, imported = report.origin, report.imported_from
    samples = "held-out samples" if report.held_out else "samples that were trained on"
    metrics = {
        "all_tokens": asdict(report.all_tokens.quality),
        "global_tokens": asdict(report.global_tokens.quality),
        "measured_on": samples if imported is None else "samples of this study",
        "steps": len(losses),
        "outlying": report.outlying,
        "settings": settings.of_training(None if imported is None else imported["source"]),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    _write_csv(folder / "loss.csv", ["step", "loss"], [(step, f"{loss:.6g}") for step, loss in enumerate(losses)])
    rows = [
        (which, *row)
        for which, evaluation in [("all", report.all_tokens), ("global", report.global_tokens)]
        for row in density_histogram(evaluation.density)
    ]
    _write_csv(folder / "density.csv", ["tokens", "kind", "log10_density", "latents"], rows)
    spec: dict[str, Any] = {"layer": origin.layer, "seed": origin.seed}
    spec |= {"settings": metrics["settings"]} if imported is None else {"imported_from": imported}
    spec |= {"made_from": made_from}
    save_sae(sae.cpu(), folder, model_name=origin.encoder, hook_name=f"layer {origin.layer}", spec=spec)
    provenance.record(folder)
    quality = report.all_tokens.quality
    window = f"of {quality.tokens:,} {'held-out' if report.held_out else 'training'} tokens"
    if imported is not None:
        window = f"of {quality.tokens:,} tokens, from {imported['source']}"
    info(f"{report.origin}: FVU {quality.fvu:.3f}, L0 {quality.l0:.1f}, dead {quality.dead:.1%} {window}")
    measurable = quality.tokens * settings.k >= 10 * len(sae.W_dec)  # few tokens activate few latents
    if imported is None and measurable and quality.dead > settings.max_dead:
        warn(
            f"{report.origin}: {quality.dead:.0%} of the latents are dead, more than max_dead = "
            f"{settings.max_dead:g}; train longer (epochs), or with fewer latents (expansion or features), a larger k "
            f"or another learning_rate"
        )
    if (fvu := report.global_tokens.quality.fvu) > settings.max_fvu_global:
        remedy = "train on global tokens (preset: global) or on more samples"
        if imported is not None:
            remedy = "check that it is of this encoder, layer and normalisation"
        warn(
            f"{report.origin}: FVU {fvu:.2f} of the global tokens, more than max_fvu_global = "
            f"{settings.max_fvu_global:g}, so its features explain little of what is compared; {remedy}, or do not "
            f"interpret this layer"
        )


def _write_csv(path: Path, header: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
