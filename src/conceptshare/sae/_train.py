"""Training: batches of samples in a seeded order, one Adam step a batch, and checkpoints to go on from."""

import csv
import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from conceptshare.activations import TokenReader
from conceptshare.ahead import in_order
from conceptshare.errors import NumericsError
from conceptshare.progress import progress, say
from conceptshare.sae._metrics import Measured, density_histogram, evaluate
from conceptshare.sae._model import TopK, TopKSAE, save_sae
from conceptshare.store import written_aside
from conceptshare.study import SAESettings

PREEMPTED = 75
"""Exit status of a training that was asked to stop (SIGTERM) and saved its state: temporary failure, in sysexits.h."""

# Metrics are taken over at most so many samples, evenly spaced: enough for three digits of FVU.
_EVALUATED_SAMPLES = 4096
_SECONDS_BETWEEN_CHECKPOINTS = 300.0
# What an unfinished training is of; beside it, an attempt at another one is not gone on with.
_KEY = "unfinished.json"
_STEPS_BETWEEN_LOOKS = 50
# Batches read ahead of the one that is trained on.
_AHEAD = 4


class Tokens(Protocol):
    """What `train` reads: training tokens by sample."""

    @property
    def width(self) -> int:
        """D."""
        ...

    def __len__(self) -> int: ...

    def read(self, samples: NDArray[np.int64]) -> Tensor:
        """``[rows, D]`` float32 tokens of the samples."""
        ...


class Trainer:
    """The training of one SAE, a batch at a time, with all of its state.

    Args:
        width: D.
        settings: size and optimisation.
        seed: of the initial weights.
        steps: how many steps there will be.
        device: where to train.
    """

    def __init__(self, width: int, settings: SAESettings, seed: int, steps: int, device: torch.device) -> None:
        self._settings = settings
        generator = torch.Generator().manual_seed(seed)
        self.sae = TopKSAE(width, settings.expansion * width, settings.k, generator).to(device)
        self.sae.b_enc.requires_grad_(settings.encoder_bias)
        trained = [parameter for parameter in self.sae.parameters() if parameter.requires_grad]
        self._rate = settings.rate(len(self.sae.W_dec))
        self._adam = torch.optim.Adam(trained, lr=self._rate, fused=True)
        self.losses = torch.zeros(steps, device=device)
        """``[steps]`` mean squared error of each step so far; 0 after that."""
        self.step = 0
        """Steps done."""
        self._scale = torch.ones((), device=device)
        self._seen = 0
        # The count of tokens at which each latent was last active, and whether some were dead when that was looked at.
        self._last_active = torch.zeros(len(self.sae.W_dec), dtype=torch.int64, device=device)
        self._some_dead = False

    def train_on(self, x: Tensor) -> None:
        """One step on the tokens ``x [T, D]``."""
        if self.step == 0:
            self._begin(x)
        x = x * self._scale if self._settings.scale_inputs else x
        latents = self.sae.top_k(x, self._settings.precision)
        reconstruction = self.sae.decode(latents)
        loss = (reconstruction - x).square().mean()
        self.losses[self.step] = (loss / self._scale**2).detach()
        if self._settings.auxk:
            self._count(latents, len(x))
            if self._some_dead:
                loss = loss + self._settings.auxk * self._revival(x, reconstruction)
        self._adam.zero_grad()
        torch.autograd.backward(loss)
        self._descend()
        self.step += 1

    def finish(self) -> TopKSAE:
        """The SAE, for tokens as they are: their scaling is folded into its weights."""
        with torch.no_grad():
            self.sae.W_enc_T.mul_(self._scale)
            self.sae.W_dec.div_(self._scale)
            self.sae.b_dec.div_(self._scale)
            self._scale.fill_(1)
        return self.sae

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        if self._settings.scale_inputs:
            self._scale.copy_(x.shape[1] ** 0.5 / x.norm(dim=1).mean())
        if self._settings.initial_b_dec == "mean":
            self.sae.b_dec.copy_(x.mean(0) * self._scale)

    @torch.no_grad()
    def _descend(self) -> None:
        if self._settings.unit_norm_decoder:
            # What would only change a row's length is taken out of its gradient: Adam's moments would keep it.
            W, gradient = self.sae.W_dec, self.sae.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * W).sum(1, keepdim=True) * W
        if self._settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self._settings.clip_norm, foreach=True)
        for group in self._adam.param_groups:
            group["lr"] = self._rate * rate_share(self.step, len(self.losses), self._settings)
        self._adam.step()
        if self._settings.unit_norm_decoder:
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def _count(self, latents: TopK, tokens: int) -> None:
        self._seen += tokens
        now = torch.where(latents.values > 0, self._seen, 0)
        self._last_active.scatter_reduce_(0, latents.indices.flatten(), now.flatten(), "amax")
        if self.step % _STEPS_BETWEEN_LOOKS == 0:  # looking makes a GPU wait
            self._some_dead = bool(self._dead().any())

    def _dead(self) -> Tensor:
        return self._seen - self._last_active > self._settings.dead_after

    def _revival(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """Mean squared error of the dead latents' reconstruction of what the others left, without b_dec."""
        k = min(self._settings.auxk_latents, len(self.sae.W_dec))
        latents = self.sae.top_k(x, self._settings.precision, k, among=self._dead())
        left = (x - reconstruction).detach()
        return (self.sae.decode(latents) - self.sae.b_dec - left).square().mean()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, on the CPU."""
        state = {f"sae.{name}": x for name, x in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state |= {f"adam.{name}.{key}": x for key, x in self._adam.state.get(parameter, {}).items()}
        state |= {"losses": self.losses, "scale": self._scale, "last_active": self._last_active}
        counts = {"step": self.step, "seen": self._seen, "some_dead": self._some_dead}
        state |= {name: torch.tensor(int(count)) for name, count in counts.items()}
        return {name: x.detach().cpu().contiguous() for name, x in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        weights = {name.removeprefix("sae."): x for name, x in state.items() if name.startswith("sae.")}
        self.sae.load_state_dict(weights)
        for name, parameter in self.sae.named_parameters():
            start = f"adam.{name}."
            own = {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}
            if own:
                self._adam.state[parameter] = {
                    key: x if key == "step" and parameter.device.type == "cpu" else x.to(parameter.device)
                    for key, x in own.items()
                }
        self.losses.copy_(state["losses"])
        self._scale.copy_(state["scale"])
        self._last_active.copy_(state["last_active"])
        self.step, self._seen, self._some_dead = int(state["step"]), int(state["seen"]), bool(state["some_dead"])


class Checkpoints:
    """The states of a training that are on disk, in a folder of their own: the newest two.

    A file is named after its step and the digest of its bytes, so that a torn one is noticed, and the one before used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, trainer: Trainer) -> None:
        """Write a state aside, rename it, and remove what is older than the one before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        content = save(trainer.state())
        path = self._folder / f"{trainer.step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(content)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        for older in self._all()[2:]:
            older.unlink()

    def newest(self) -> dict[str, Tensor] | None:
        """The newest state that is whole."""
        for path in self._all():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.partition("-")[2]:
                state: dict[str, Tensor] = load(content)
                return state
            say(f"{path}: not whole; using the checkpoint before it, if there is one")
        return None

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"), reverse=True)


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = sample_order(len(tokens), batch_samples or settings.batch_samples, settings)
    trainer = Trainer(tokens.width, settings, seed, len(batches), device)
    if checkpoints is not None:
        state = checkpoints.newest()
        if state is not None:
            trainer.restore(state)
            say(f"{what}: going on at step {trainer.step:,} of {len(batches):,}")
    last = time.monotonic()
    with _asked_to_stop() as asked:
        left = batches[trainer.step :]
        for x in progress(_read_ahead(tokens, left, device), len(left), f"training {what}", "steps"):
            trainer.train_on(x)
            if checkpoints is not None and (asked.is_set() or time.monotonic() - last >= _SECONDS_BETWEEN_CHECKPOINTS):
                _check_losses(trainer, what)
                checkpoints.save(trainer)
                last = time.monotonic()
            if asked.is_set():
                say(f"{what}: asked to stop at step {trainer.step:,} of {len(batches):,}; run again to go on")
                raise SystemExit(PREEMPTED)
    _check_losses(trainer, what)
    return trainer.finish(), trainer.losses.cpu().numpy()


def split(samples: int, settings: SAESettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The samples that are trained on and those that are held out, both ascending."""
    held_out = round(samples * settings.held_out)
    shuffled = torch.randperm(samples, generator=torch.Generator().manual_seed(settings.order_seed)).numpy()
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def sample_order(samples: int, batch_samples: int, settings: SAESettings) -> list[NDArray[np.int64]]:
    """The samples of each step: a new permutation each epoch, cut into batches; the same for all layers and seeds."""
    trained, _ = split(samples, settings)
    generator = torch.Generator().manual_seed(settings.order_seed)
    return [
        trained[batch.numpy()]
        for _ in range(settings.epochs)
        for batch in torch.split(torch.randperm(len(trained), generator=generator), batch_samples)
    ]


def rate_share(step: int, steps: int, settings: SAESettings) -> float:
    """The share of the learning rate at a step, counted from 0: rising over the first steps, falling over the last."""
    rising = (step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0
    falling = (steps - step) / (settings.decay_share * steps) if settings.decay_share else 1.0
    return min(rising, falling, 1.0)


def _read_ahead(tokens: Tokens, batches: list[NDArray[np.int64]], device: torch.device) -> Iterator[Tensor]:
    def read(batch: NDArray[np.int64]) -> Tensor:
        x = tokens.read(batch)
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    with ThreadPoolExecutor(1) as reading:
        yield from in_order((reading.submit(read, batch).result for batch in batches), _AHEAD)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as Slurm sends it before it takes a machine back."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_losses(trainer: Trainer, what: str) -> None:
    bad = (~trainer.losses.isfinite()).nonzero()
    if len(bad):
        raise NumericsError(f"{what}: the loss is not finite from step {int(bad[0])} on; lower learning_rate")


def train_sae(activations: Path, layer: int, settings: SAESettings, seed: int, out: Path) -> None:
    """Train an SAE on one layer of an activation store and write its folder.

    The folder holds `sae_weights.safetensors` and `cfg.json`, which SAELens reads too, `metrics.json`, `loss.csv` and
    `density.csv`. A training that is cut off goes on from its last checkpoint when it is run again, and ends with the
    bytes of an undisturbed one.

    Raises:
        StoreError: where the store is not whole or lacks the layer.
        NumericsError: where training diverges.
        SystemExit: with the status PREEMPTED, after SIGTERM.
    """
    tokens = TokenReader.open(activations, layer)
    what = f"{activations.stem} layer {layer} seed {seed}"
    batch_samples = settings.batch_captions if tokens.of_captions else settings.batch_samples
    key = {"settings": settings.model_dump(mode="json"), "seed": seed, "layer": layer, "made_from": tokens.made_from}
    with written_aside(out, resume=True) as folder:
        _keep_only_of(folder, key)
        checkpoints = Checkpoints(folder / "checkpoints")
        started = time.monotonic()
        mixed = _mixed_seed(activations.stem, layer, seed)
        sae, losses = train(tokens, settings, mixed, batch_samples, what, checkpoints)
        seconds = time.monotonic() - started
        batches = _measured_samples(len(tokens), settings)
        measured = evaluate(sae, (tokens.read(batch) for batch in batches))
        measured_global = evaluate(
            sae, (torch.from_numpy(tokens.global_tokens[batch].astype(np.float32)) for batch in batches)
        )
        _write(folder, sae.cpu(), losses, settings, (measured, measured_global), activations.stem, layer)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / _KEY).unlink()
    quality, rate = measured.quality, len(losses) / seconds
    say(f"{what}: FVU {quality.fvu:.3f}, L0 {quality.l0:.1f}, dead {quality.dead:.1%}, {rate:.3g} steps/s")
    if quality.dead > settings.max_dead:
        say(
            f"warning: {what}: {quality.dead:.0%} of the latents are dead, more than max_dead = {settings.max_dead:g}; "
            f"train longer (epochs), with fewer latents (expansion), a larger k or another learning_rate"
        )


def _keep_only_of(folder: Path, key: dict[str, Any]) -> None:
    """Leave what an earlier attempt at the same SAE left, and remove that of any other."""
    text = json.dumps(key, sort_keys=True)
    if not (folder / _KEY).is_file() or (folder / _KEY).read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True)
        folder.mkdir()
        (folder / _KEY).write_text(text, encoding="utf-8")


def _write(
    folder: Path,
    sae: TopKSAE,
    losses: NDArray[np.float32],
    settings: SAESettings,
    measured: tuple[Measured, Measured],
    encoder: str,
    layer: int,
) -> None:
    save_sae(sae, folder, model_name=encoder, hook_name=f"layer {layer}")
    metrics = {
        "all_tokens": asdict(measured[0].quality),
        "global_tokens": asdict(measured[1].quality),
        "measured_on": "held-out samples" if settings.held_out else "samples that were trained on",
        "steps": len(losses),
        "settings": settings.model_dump(mode="json"),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    _write_csv(folder / "loss.csv", ["step", "loss"], [(step, f"{loss:.6g}") for step, loss in enumerate(losses)])
    rows = [
        (which, *row)
        for which, found in zip(("all", "global"), measured, strict=True)
        for row in density_histogram(found.density)
    ]
    _write_csv(folder / "density.csv", ["tokens", "kind", "log10_density", "latents"], rows)


def _write_csv(path: Path, header: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _measured_samples(samples: int, settings: SAESettings) -> list[NDArray[np.int64]]:
    """Evenly spaced samples of the held-out ones, or of all where none are, in batches."""
    trained, held_out = split(samples, settings)
    known = held_out if len(held_out) else trained
    chosen = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), _EVALUATED_SAMPLES)).astype(np.int64))]
    return np.array_split(chosen, max(1, len(chosen) // 32))


def _mixed_seed(encoder: str, layer: int, seed: int) -> int:
    """A seed of its own for every SAE: with equal initial weights, two encoders' features would line up by index."""
    return int(np.random.SeedSequence([seed, layer, crc32(encoder.encode())]).generate_state(1, np.uint64)[0] >> 1)
