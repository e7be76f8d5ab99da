"""Training on stored tokens: one Adam step a batch of samples, and checkpoints to go on from."""

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
from conceptshare.io.files import SAE, Unchanged, atomic_output
from conceptshare.io.progress import info, progress
from conceptshare.sae import _order
from conceptshare.sae._checkpoints import PREEMPTED, Checkpoints, asked_to_stop
from conceptshare.sae._metrics import Measured, density_histogram, evaluate
from conceptshare.sae._model import TopKSAE, save_sae
from conceptshare.sae._trainer import Trainer

_SECONDS_BETWEEN_CHECKPOINTS = 300.0
# Batches read ahead of the one that is trained on.
_AHEAD = 4


class Tokens(Protocol):
    """What `train` reads: training tokens by sample."""

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def block(self) -> int:
        """Samples that the encoder read at once."""
        ...

    def __len__(self) -> int: ...

    def read(self, samples: NDArray[np.int64]) -> Tensor:
        """``[rows, D]`` float32 tokens of the samples."""
        ...


@dataclass(frozen=True)
class Origin:
    """Which SAE of a study this is."""

    encoder: str
    layer: int
    seed: int

    def __str__(self) -> str:
        return f"{self.encoder} layer {self.layer} seed {self.seed}"

    def mixed_seed(self) -> int:
        """A seed of its own for every SAE: with equal initial weights, features of two would line up by index."""
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
) -> tuple[TopKSAE, NDArray[np.float32]]:
    """Train an SAE on the GPU if there is one, reading ahead of it.

    Args:
        tokens: the training tokens.
        settings: size and optimisation.
        seed: of the initial weights.
        batch_samples: samples a step; ``settings.batch_samples`` without it.
        what: the step's name in the progress report.
        checkpoints: where to go on from and to save to, every few minutes and when asked to stop (SIGTERM).

    Returns:
        The SAE, where it was trained, and the loss of each step.

    Raises:
        NumericsError: where a loss is not finite, or k exceeds the number of latents.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    device = default_device()
    batches = _order.steps(len(tokens), batch_samples or settings.batch_samples, tokens.block, settings)
    trainer = Trainer(tokens.width, settings, seed, len(batches), device)
    if checkpoints is not None and checkpoints.restore({what: trainer}):
        info(f"{what}: going on at step {trainer.step:,} of {len(batches):,}")
    left = batches[trainer.step :]
    with closing(_read_ahead(tokens, left, device)) as ready:
        descend(ready, trainer.train_on, {what: trainer}, what, checkpoints)
    return trainer.finish(), trainer.losses.cpu().numpy()


Batch = TypeVar("Batch")


def descend(
    batches: Iterable[Batch],
    train_on: Callable[[Batch], None],
    trainers: Mapping[str, Trainer],
    what: str,
    checkpoints: Checkpoints | None = None,
    before_saving: Callable[[], None] = lambda: None,
) -> None:
    """Take the steps that trainings have left, together.

    Args:
        batches: what each step is on.
        train_on: takes a step in every training.
        trainers: the trainings, by name.
        what: the step's name in the progress report.
        checkpoints: where to save to, every few minutes and when asked to stop (SIGTERM).
        before_saving: called before each time.

    Raises:
        NumericsError: where a loss is not finite.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    some = next(iter(trainers.values()))
    steps, last = len(some.losses), time.monotonic()
    with asked_to_stop() as asked:
        for batch in progress(batches, steps - some.step, f"training {what}", "steps"):
            train_on(batch)
            if checkpoints is not None and (asked.is_set() or time.monotonic() - last >= _SECONDS_BETWEEN_CHECKPOINTS):
                _check_finite(trainers)
                before_saving()
                checkpoints.save(trainers)
                last = time.monotonic()
            if asked.is_set():
                info(f"{what}: asked to stop at step {some.step:,} of {steps:,}; run again to go on")
                raise SystemExit(PREEMPTED)
    _check_finite(trainers)


def _check_finite(trainers: Mapping[str, Trainer]) -> None:
    for name, trainer in trainers.items():
        bad = (~trainer.losses.isfinite()).nonzero().flatten().tolist()
        if not bad and not all(parameter.isfinite().all() for parameter in trainer.sae.parameters()):
            bad = [trainer.step]  # its loss would be the first
        if bad:
            raise NumericsError(
                f"{name}: the loss is not finite from step {bad[0]} on; lower learning_rate, or set clip_norm"
            )


def _read_ahead(
    tokens: Tokens, batches: list[NDArray[np.int64]], device: torch.device
) -> Generator[Tensor, None, None]:
    def read(batch: NDArray[np.int64]) -> Tensor:
        x = tokens.read(batch)
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    with ThreadPoolExecutor(1) as reading:
        yield from in_order((reading.submit(read, batch).result for batch in batches), _AHEAD)


@full_float32()
def train_sae(token_store: Path, layer: int, settings: SAESettings, seed: int, out: Path) -> None:
    """Train an SAE on one layer of a store of all tokens and write its folder.

    The folder holds `sae_weights.safetensors` and `cfg.json`, which SAELens reads too, `metrics.json`, `loss.csv` and
    `density.csv`. A training that is cut off leaves the folder `{out}.checkpoints`, goes on from there when it is run
    again, and ends with the bytes of an undisturbed one.

    Raises:
        StoreError: where the store is not whole, is empty or lacks the layer.
        NumericsError: where training diverges.
        MadeMeanwhileError: where another process made the same folder while this one waited for it.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    inputs = Unchanged(token_store)
    tokens = TokenReader.open(token_store, layer)
    if not len(tokens):
        raise StoreError(f"{token_store}: no samples in it; run the activations stage again")
    origin = Origin(token_store.stem, layer, seed)
    key = {"settings": settings.model_dump(mode="json"), "seed": seed, "layer": layer, "made_from": tokens.made_from}
    checkpoints = Checkpoints(out.with_name(out.name + ".checkpoints"), key)
    batch_samples = settings.samples_a_step(tokens.modality)
    with atomic_output(out, SAE, key=checkpoints.key) as folder, inputs:
        sae, losses = train(tokens, settings, origin.mixed_seed(), batch_samples, str(origin), checkpoints)
        batches = _order.measured(len(tokens), settings)
        measured = evaluate(sae, (tokens.read(batch) for batch in batches))
        measured_global = evaluate(sae, (tokens.read_global(batch) for batch in batches))
        held_out = settings.held_out_samples(len(tokens)) > 0
        report = Report(origin, measured, measured_global, held_out)
        write_sae(folder, sae, losses, settings, report, tokens.made_from)
    checkpoints.remove()


@dataclass(frozen=True)
class Report:
    """What is told of a trained SAE."""

    origin: Origin
    all_tokens: Measured
    global_tokens: Measured
    held_out: bool
    """Whether it was measured on samples that it was not trained on."""


def write_sae(
    folder: Path,
    sae: TopKSAE,
    losses: NDArray[np.float32],
    settings: SAESettings,
    report: Report,
    made_from: dict[str, Any],
) -> None:
    """Write an SAE's folder, and say how good it is; ``made_from`` is the spec of the activations."""
    folder.mkdir(parents=True)
    origin = report.origin
    metrics = {
        "all_tokens": asdict(report.all_tokens.quality),
        "global_tokens": asdict(report.global_tokens.quality),
        "measured_on": "held-out samples" if report.held_out else "samples that were trained on",
        "steps": len(losses),
        "settings": settings.model_dump(mode="json"),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    _write_csv(folder / "loss.csv", ["step", "loss"], [(step, f"{loss:.6g}") for step, loss in enumerate(losses)])
    rows = [
        (which, *row)
        for which, found in [("all", report.all_tokens), ("global", report.global_tokens)]
        for row in density_histogram(found.density)
    ]
    _write_csv(folder / "density.csv", ["tokens", "kind", "log10_density", "latents"], rows)
    spec = {"layer": origin.layer, "seed": origin.seed, "settings": metrics["settings"], "made_from": made_from}
    save_sae(sae.cpu(), folder, model_name=origin.encoder, hook_name=f"layer {origin.layer}", spec=spec)
    provenance.record(folder)
    quality = report.all_tokens.quality
    window = f"of {quality.tokens:,} {'held-out' if report.held_out else 'training'} tokens"
    info(f"{report.origin}: FVU {quality.fvu:.3f}, L0 {quality.l0:.1f}, dead {quality.dead:.1%} {window}")
    if quality.dead > settings.max_dead:
        info(
            f"warning: {report.origin}: {quality.dead:.0%} of the latents are dead, more than max_dead = "
            f"{settings.max_dead:g}; train longer (epochs), with fewer latents (expansion), a larger k or another "
            f"learning_rate"
        )


def _write_csv(path: Path, header: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
