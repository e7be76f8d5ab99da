"""Training on tokens that are never stored: SAEs are trained on an encoder's activations as they are computed."""

import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.activations.extraction import (
    KIND,
    GlobalTokens,
    describe,
    extract_activations,
    forward_pass,
    rows_of_globals,
)
from conceptshare.config.settings import SAESettings
from conceptshare.data.dataset import Data
from conceptshare.device import devices, full_float32
from conceptshare.encoders import Arrays, Encoder
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import StudyError
from conceptshare.io.files import SAES, atomic_output
from conceptshare.io.layout import layer_name, sae_place
from conceptshare.io.progress import info, progress
from conceptshare.io.store import new_store, resuming
from conceptshare.sae import _order
from conceptshare.sae._checkpoints import Checkpoints
from conceptshare.sae._metrics import Evaluation, Evaluator, evaluate
from conceptshare.sae._train import Imported, Origin, Report, run_steps, train_sae, write_sae
from conceptshare.sae._trainer import Trainer
from conceptshare.sae.folder import origin_of

Result = TypeVar("Result")
TokensByLayer = dict[int, Tensor]


@full_float32()
def train_stream(
    encoder: Encoder | Arrays,
    data: Data,
    settings: SAESettings,
    seeds: Sequence[int],
    saes: Path,
    activations: Path,
    workers: int = 1,
    pretrained: Path | None = None,
) -> None:
    """Train the SAEs of all layers and seeds of an encoder during its forward passes, and store its global tokens.

    The SAEs are equal to those that `train_sae` trains on stored tokens. Each epoch is a forward pass over the training
    samples. Held-out samples are read once, at the end; if there are none, the last samples are read again. An
    interrupted training resumes from its last checkpoint and is the same to the byte as an uninterrupted one.

    With ``train_on: global``, one forward pass stores the global tokens, and the SAEs are then trained on these, one
    after the other.

    Args:
        encoder: the encoder, or the arrays in its place.
        data: the samples.
        settings: settings of the SAEs.
        seeds: seeds of their initial weights.
        saes: the folder to write, with `layer-NN/seed-S/` in it.
        activations: the store of global tokens to write.
        workers: number of threads that decode and prepare images and, without a GPU, of SAEs that are trained in
            parallel. With GPUs, layers are distributed over them, and each GPU trains one SAE at a time.
        pretrained: a folder with an imported SAE at `layer-NN/seed-S/` for each of these. They are measured, and none
            is trained.

    Raises:
        NumericsError: if training diverges, or an activation is not finite or does not fit float16.
        EncoderError: if the encoder does not match its catalog entry.
        StoreError: if the partial store of an earlier attempt is damaged.
        StudyError: if the settings' precision would also change that of the encoder.
        AlreadyMadeError: if another process trained the same SAEs while this one waited for the lock.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    if settings.precision == "tf32":
        raise StudyError("precision: tf32 would also round the products of the encoder; use bfloat16, or store tokens")
    spec, name, N = encoder.spec, saes.name, len(data)
    described = describe(encoder, data, name)
    places = product(spec.layer_numbers(), seeds)
    imported = {} if pretrained is None else {place: pretrained / sae_place(*place) for place in places}
    made = settings.of_training() if pretrained is None else [origin_of(folder)[1] for folder in imported.values()]
    if settings.train_on == "global":
        extract_activations(encoder, data, activations, None, workers)
        made_of = {"settings": made, "made_from": described}
        with atomic_output(saes, SAES, resume=True, key=json.dumps(made_of, sort_keys=True)) as folder:
            for layer, seed in product(spec.layer_numbers(), seeds):
                if not (out := folder / sae_place(layer, seed)).exists():
                    train_sae(activations, layer, settings, seed, out, imported.get((layer, seed)))
        return
    steps = [] if imported else _order.steps(N, settings.samples_per_step(spec.modality), spec.batch_size, settings)
    key = {"settings": made, "seeds": list(seeds), "made_from": described}
    checkpoints = Checkpoints(saes.with_name(name + ".checkpoints"), key)
    with (
        atomic_output(saes, SAES, key=checkpoints.key) as folder,
        new_store(activations, KIND, described, resume=True) as store,
        closing(_SAEGroup(encoder, settings, seeds, name, len(steps), workers, imported)) as group,
    ):
        with resuming(activations):
            reader = _Reader(encoder, data, name, workers, store)
        if not imported:
            if done := checkpoints.restore(group.trainers):
                info(f"{name}: resuming at step {done:,} of {len(steps):,}")
            with closing(reader.read(steps[done:])) as batches:
                run_steps(batches, group.train_on, group.trainers, name, checkpoints, reader.save_progress)
        all_tokens, global_tokens = _evaluate(group, reader, _order.evaluated(N, settings), name)
        held_out = settings.held_out_samples(N) > 0
        for origin, trainer in group.by_origin.items():
            imported_from = trainer.origin if isinstance(trainer, Imported) else None
            report = Report(
                origin, all_tokens[origin], global_tokens[origin], held_out, trainer.outlying, imported_from
            )
            sae_folder = folder / sae_place(origin.layer, origin.seed)
            write_sae(sae_folder, trainer.sae, trainer.losses.cpu().numpy(), settings, report, described)
        reader.close()
    checkpoints.remove()


class _SAEGroup:
    """The trainers of an encoder's SAEs, which take each step in parallel."""

    def __init__(
        self,
        encoder: Encoder | Arrays,
        settings: SAESettings,
        seeds: Sequence[int],
        name: str,
        steps: int,
        workers: int,
        imported: dict[tuple[int, int], Path],
    ) -> None:
        spec, available = encoder.spec, devices()
        self.by_origin: dict[Origin, Trainer | Imported] = {}
        for n, layer in enumerate(spec.layer_numbers()):
            device = available[n % len(available)]
            for origin in (Origin(name, layer, seed) for seed in seeds):
                self.by_origin[origin] = (
                    Imported(imported[layer, origin.seed], spec.width_of(layer), device)
                    if imported
                    else Trainer(spec.width_of(layer), settings, origin.mixed_seed(), steps, device)
                )
        self.trainers = {str(origin): sae for origin, sae in self.by_origin.items() if isinstance(sae, Trainer)}
        parallel = {"cpu": workers, "cuda": 1}
        self._pools = {device: _threads(parallel[device.type]) for device in available}

    def each(self, work: Callable[[Origin, Trainer | Imported], Result]) -> dict[Origin, Result]:
        """Call a function for every SAE, sequentially for SAEs on the same GPU."""
        started = {
            origin: self._pools[trainer.losses.device].submit(work, origin, trainer)
            for origin, trainer in self.by_origin.items()
        }
        return {origin: future.result() for origin, future in started.items()}

    def train_on(self, batch: tuple[TokensByLayer, NDArray[np.int64]]) -> None:
        """Train every SAE for one step, on tokens with the rows of global ones."""
        tokens, global_rows = batch
        self.each(lambda origin, _: self.trainers[str(origin)].train_on(tokens[origin.layer], global_rows))

    def evaluate_on(self, tokens: TokensByLayer, evaluators: dict[Origin, Evaluator]) -> None:
        """Add tokens to the evaluation of every SAE."""
        self.each(lambda origin, _: evaluators[origin].add(tokens[origin.layer]))

    def close(self) -> None:
        """Shut down the threads."""
        for pool in self._pools.values():
            pool.shutdown()


class _Reader:
    """Runs an encoder on a data set: yields the tokens of the requested samples, and stores all global tokens."""

    def __init__(self, encoder: Encoder | Arrays, data: Data, name: str, workers: int, store: Any) -> None:
        self._encoder, self._data, self._name, self._workers, self._store = encoder, data, name, workers, store
        stored = store.attrs.get("progress", {"samples": 0})["samples"]
        self._global = GlobalTokens(store, encoder.spec, stored)

    def read(self, wanted: list[NDArray[np.int64]]) -> Generator[tuple[TokensByLayer, NDArray[np.int64]], None, None]:
        """Yield ``[rows, D]`` float16 training tokens of each batch of samples, by layer, with prefetching.

        With them come the rows of global tokens, ``[n]``.

        Samples come in whole blocks, see `_order`, so the encoder's batches and therefore all values are the same to
        the bit as in an extraction.
        """
        block = self._encoder.spec.batch_size
        batches = [np.split(samples, np.flatnonzero(np.diff(samples // block)) + 1) for samples in wanted]
        of_runs = [int(run[0]) // block * block for runs in batches for run in runs]
        starts = [start for n, start in enumerate(of_runs) if n == 0 or start != of_runs[n - 1]]
        passes = forward_pass(self._encoder, self._data, starts, self._workers, self._name)
        with closing(passes), _threads(1) as computing:
            ready = in_order((computing.submit(next, passes).result for _ in starts), 1)
            kept = None
            for runs in batches:
                parts, counts, places = [], [], []
                for run in runs:
                    if kept is None or kept.start != run[0] // block * block:
                        kept = next(ready)
                        if kept.start == self._global.samples:
                            self._global.append(kept)
                    parts.append(kept.of(run))
                    counts.append(kept.counts[run - kept.start])
                    places.append(kept.places[run - kept.start])
                tokens = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
                yield tokens, rows_of_globals(np.concatenate(counts), np.concatenate(places))

    def left_before(self, sample: int) -> list[NDArray[np.int64]]:
        """Samples before ``sample`` whose global tokens are not stored yet, in blocks."""
        block = self._encoder.spec.batch_size
        return [np.arange(start, min(start + block, sample)) for start in range(self._global.samples, sample, block)]

    def global_tokens(self, layer: int, samples: NDArray[np.int64]) -> Tensor:
        """``[n, D]`` float16 global tokens of consecutive samples, after `save_progress`."""
        return torch.from_numpy(self._store[layer_name(layer)]["global"][samples[0] : samples[-1] + 1])

    def save_progress(self) -> None:
        """Write all global tokens so far to the store, and record their number."""
        self._global.flush()
        self._store.attrs["progress"] = {"samples": self._global.samples}

    def close(self) -> None:
        """Remove the record of progress, because the store is finished."""
        del self._store.attrs["progress"]


def _evaluate(
    group: _SAEGroup, reader: _Reader, samples: list[NDArray[np.int64]], name: str
) -> tuple[dict[Origin, Evaluation], dict[Origin, Evaluation]]:
    """Evaluate each SAE on all tokens and on the global tokens, after reading the remaining samples."""
    evaluators = group.each(lambda _, trainer: Evaluator(trainer.finish()))
    left = reader.left_before(int(samples[0][0]))
    with closing(reader.read(left + samples)) as batches:
        for n, (tokens, _) in enumerate(progress(batches, len(left + samples), f"measuring {name}", "batches")):
            if n >= len(left):
                group.evaluate_on(tokens, evaluators)
    reader.save_progress()

    def on_global_tokens(origin: Origin, trainer: Trainer | Imported) -> Evaluation:
        return evaluate(trainer.sae, (reader.global_tokens(origin.layer, batch) for batch in samples))

    return {origin: evaluator.result() for origin, evaluator in evaluators.items()}, group.each(on_global_tokens)


def _threads(count: int) -> ThreadPoolExecutor:
    # Without a set number of threads, a worker multiplies small matrices with different rounding than the main thread.
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
