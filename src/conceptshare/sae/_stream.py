"""Training on tokens that are never stored: an encoder reads, and its SAEs learn from what it just read."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.activations.extraction import KIND, GlobalTokens, describe, forward_pass
from conceptshare.config.settings import SAESettings
from conceptshare.data.dataset import Data
from conceptshare.device import devices, full_float32
from conceptshare.encoders import Encoder
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import StudyError
from conceptshare.io.files import SAES, atomic_output
from conceptshare.io.layout import layer_name, sae_place
from conceptshare.io.progress import info, progress
from conceptshare.io.store import new_store, resuming
from conceptshare.sae import _order
from conceptshare.sae._checkpoints import Checkpoints
from conceptshare.sae._metrics import Measured, Measuring, evaluate
from conceptshare.sae._train import Origin, Report, descend, write_sae
from conceptshare.sae._trainer import Trainer

Result = TypeVar("Result")
TokensByLayer = dict[int, Tensor]


@full_float32()
def train_stream(
    encoder: Encoder,
    data: Data,
    settings: SAESettings,
    seeds: Sequence[int],
    saes: Path,
    activations: Path,
    workers: int = 1,
) -> None:
    """Train the SAEs of all layers and seeds of an encoder while it reads a data set, and store its global tokens.

    They become the SAEs that `train_sae` makes of stored tokens. Each epoch is a forward pass over the samples that are
    trained on; those that are held out are read once, at the end, or the last samples again where none are. What is
    cut off goes on from its last checkpoint when it is run again, and ends with the bytes of an undisturbed run.

    Args:
        encoder: the encoder.
        data: the samples.
        settings: of the SAEs.
        seeds: of their initial weights.
        saes: the folder to write, with `layer-NN/seed-S/` in it.
        activations: the store of global tokens to write.
        workers: threads that decode and prepare pictures, and, where there is no GPU, SAEs that are trained side by
            side. Where there are GPUs, layers are spread over them, and each GPU trains one SAE at a time.

    Raises:
        NumericsError: where training diverges, or an activation is not finite or does not fit float16.
        EncoderError: where the encoder is not what its entry says.
        StoreError: where what an earlier attempt left of the store is damaged.
        StudyError: where the settings' precision would change the encoder's too.
        MadeMeanwhileError: where another process made the same SAEs while this one waited for them.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    if settings.precision == "tf32":
        raise StudyError("precision: tf32 would also round the products of the encoder; take bfloat16, or store tokens")
    spec, name, N = encoder.spec, saes.name, len(data)
    described = describe(encoder, data, name)
    steps = _order.steps(N, settings.samples_a_step(spec.modality), spec.batch_size, settings)
    key = {"settings": settings.model_dump(mode="json"), "seeds": list(seeds), "made_from": described}
    checkpoints = Checkpoints(saes.with_name(name + ".checkpoints"), key)
    with (
        atomic_output(saes, SAES, key=checkpoints.key) as folder,
        new_store(activations, KIND, described, resume=True) as store,
        closing(_Team(encoder, settings, seeds, name, len(steps), workers)) as team,
    ):
        with resuming(activations):
            reader = _Reader(encoder, data, name, workers, store)
        done = checkpoints.restore(team.trainers)
        if done:
            info(f"{name}: going on at step {done:,} of {len(steps):,}")
        with closing(reader.read(steps[done:])) as batches:
            descend(batches, team.train_on, team.trainers, name, checkpoints, reader.note)
        all_tokens, global_tokens = _measure(team, reader, _order.measured(N, settings), name)
        held_out = settings.held_out_samples(N) > 0
        for origin, trainer in team.by_origin.items():
            report = Report(origin, all_tokens[origin], global_tokens[origin], held_out)
            place = folder / sae_place(origin.layer, origin.seed)
            write_sae(place, trainer.sae, trainer.losses.cpu().numpy(), settings, report, described)
        reader.close()
    checkpoints.remove()


class _Team:
    """The trainings of an encoder's SAEs, which take each step side by side."""

    def __init__(
        self, encoder: Encoder, settings: SAESettings, seeds: Sequence[int], name: str, steps: int, workers: int
    ) -> None:
        spec, places = encoder.spec, devices()
        self.by_origin = {
            origin: Trainer(spec.width, settings, origin.mixed_seed(), steps, places[n % len(places)])
            for n, layer in enumerate(spec.layer_numbers())
            for origin in (Origin(name, layer, seed) for seed in seeds)
        }
        self.trainers = {str(origin): trainer for origin, trainer in self.by_origin.items()}
        at_once = {"cpu": workers, "cuda": 1}
        self._pools = {place: _threads(at_once[place.type]) for place in places}

    def each(self, work: Callable[[Origin, Trainer], Result]) -> dict[Origin, Result]:
        """Do something for every SAE, those of one GPU one after another."""
        started = {
            origin: self._pools[trainer.losses.device].submit(work, origin, trainer)
            for origin, trainer in self.by_origin.items()
        }
        return {origin: future.result() for origin, future in started.items()}

    def train_on(self, tokens: TokensByLayer) -> None:
        """One step of every SAE."""
        self.each(lambda origin, trainer: trainer.train_on(_own(tokens, origin, trainer)))

    def measure_on(self, tokens: TokensByLayer, measuring: dict[Origin, Measuring]) -> None:
        """Measure every SAE."""
        self.each(lambda origin, trainer: measuring[origin].add(_own(tokens, origin, trainer)))

    def close(self) -> None:
        """End the threads."""
        for pool in self._pools.values():
            pool.shutdown()


class _Reader:
    """An encoder at a data set: gives the tokens of any samples, and stores the global tokens of all."""

    def __init__(self, encoder: Encoder, data: Data, name: str, workers: int, store: Any) -> None:
        self._encoder, self._data, self._name, self._workers, self._store = encoder, data, name, workers, store
        there = store.attrs.get("progress", {"samples": 0})["samples"]
        self._global = GlobalTokens(store, encoder.spec, there)

    def read(self, wanted: list[NDArray[np.int64]]) -> Generator[TokensByLayer, None, None]:
        """``[rows, D]`` float16 training tokens of each batch of samples, by layer, while the next are computed.

        Samples come in whole blocks, as `_order` gives them, and so each batch of the encoder is what it would be in an
        extraction: the numbers are the same to the bit.
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
                parts = []
                for run in runs:
                    if kept is None or kept.start != run[0] // block * block:
                        kept = next(ready)
                        if kept.start == self._global.samples:
                            self._global.append(kept)
                    parts.append(kept.of(run))
                yield {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    def left_before(self, sample: int) -> list[NDArray[np.int64]]:
        """The samples before ``sample`` whose global tokens are not stored yet, in blocks."""
        block = self._encoder.spec.batch_size
        return [np.arange(start, min(start + block, sample)) for start in range(self._global.samples, sample, block)]

    def global_tokens(self, layer: int, samples: NDArray[np.int64]) -> Tensor:
        """``[n, D]`` float32 global tokens of samples that follow one another, once they are noted."""
        rows = self._store[layer_name(layer)]["global"][samples[0] : samples[-1] + 1]
        return torch.from_numpy(rows.astype(np.float32))

    def note(self) -> None:
        """Let the store hold all global tokens so far, and say how many."""
        self._global.flush()
        self._store.attrs["progress"] = {"samples": self._global.samples}

    def close(self) -> None:
        """Say no more that the store is unfinished."""
        del self._store.attrs["progress"]


def _measure(
    team: _Team, reader: _Reader, samples: list[NDArray[np.int64]], name: str
) -> tuple[dict[Origin, Measured], dict[Origin, Measured]]:
    """What all tokens and the global tokens say of each SAE, after a pass over what is left to read."""
    measuring = team.each(lambda _, trainer: Measuring(trainer.finish()))
    left = reader.left_before(int(samples[0][0]))
    with closing(reader.read(left + samples)) as batches:
        for n, tokens in enumerate(progress(batches, len(left + samples), f"measuring {name}", "batches")):
            if n >= len(left):
                team.measure_on(tokens, measuring)
    reader.note()

    def of_global_tokens(origin: Origin, trainer: Trainer) -> Measured:
        return evaluate(trainer.sae, (reader.global_tokens(origin.layer, batch) for batch in samples))

    return {origin: found.result() for origin, found in measuring.items()}, team.each(of_global_tokens)


def _threads(count: int) -> ThreadPoolExecutor:
    # A thread that is not told multiplies small matrices in another way, with other last digits, than the main one.
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


def _own(tokens: TokensByLayer, origin: Origin, trainer: Trainer) -> Tensor:
    return tokens[origin.layer].to(trainer.losses.device).float()
