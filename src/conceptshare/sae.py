"""Stage `sae`: TopK sparse autoencoders on the residual stream.

f = ReLU((x - b_dec) W_enc) and x_hat = TopK(f) W_dec + b_dec, trained on mean squared error; W_enc is [D, F] and
W_dec is [F, D]. Only the k largest latents of a token reach the decoder, so decoding and both weight gradients touch
those alone; the one dense product of a step is x W_enc.
"""

import csv
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from conceptshare.activations import TokenReader
from conceptshare.errors import NumericsError, StoreError
from conceptshare.progress import progress, say
from conceptshare.store import written_aside
from conceptshare.study import SAESettings

# Metrics are taken over at most so many samples, evenly spaced: enough for three digits of FVU.
_EVALUATED_SAMPLES = 4096
# The layout that this file writes was tried with this version of SAELens.
_SAE_LENS_VERSION = "6.54.12"


class TopK(NamedTuple):
    """The latents that reach the decoder."""

    values: Tensor
    """``[T, k]`` float32, at least 0."""
    indices: Tensor
    """``[T, k]`` int64."""


class TopKSAE(nn.Module):
    """A TopK sparse autoencoder.

    Args:
        d_in: D, the width of the residual stream.
        d_sae: F, the number of latents.
        k: latents kept for a token.
        generator: source of the initial weights; without one they are left unset, to be loaded.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if k > d_sae:
            raise NumericsError(f"k = {k} is more than the {d_sae} latents there are; lower k or raise expansion")
        self.k = k
        # One row a latent, as in the decoder: an active latent's weights lie together.
        self.W_enc_T = nn.Parameter(torch.empty(d_sae, d_in))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if generator is not None:
            nn.init.kaiming_uniform_(self.W_enc_T, generator=generator)
            with torch.no_grad():
                self.W_dec.copy_(self.W_enc_T / self.W_enc_T.norm(dim=1, keepdim=True))

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 - the equation's name
        """``[D, F]`` encoder weights."""
        return self.W_enc_T.T

    def encode(self, x: Tensor) -> Tensor:
        """``[T, F]`` latents of ``x [T, D]``, before TopK and after ReLU."""
        return torch.relu((x - self.b_dec) @ self.W_enc)

    def top_k(self, x: Tensor) -> TopK:
        """The k largest latents of each row of ``x [T, D]``."""
        values, indices = _TopLatents.apply(x - self.b_dec, self.W_enc_T, self.k)
        return TopK(values, indices)

    def decode(self, latents: TopK) -> Tensor:
        """``[T, D]`` reconstruction."""
        decoded = embedding_bag(latents.indices, self.W_dec, per_sample_weights=latents.values, mode="sum")
        return decoded + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` reconstruction of ``x [T, D]``."""
        return self.decode(self.top_k(x))


class _TopLatents(torch.autograd.Function):
    """TopK(ReLU(x W_enc)), whose gradients touch only the latents that were kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc_T: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = torch.relu(x @ W_enc_T.T).topk(k, dim=1)
        ctx.save_for_backward(x, W_enc_T, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, W_enc_T, values, indices = ctx.saved_tensors
        latent_gradients = gradients[0] * (values > 0)
        with torch.enable_grad():
            weights = W_enc_T.detach().requires_grad_()
            x_gradient = embedding_bag(indices, weights, per_sample_weights=latent_gradients, mode="sum")
        # d/dW of sum_j g_j W_j, fed with x, is the sum over tokens of g_j x: the encoder's gradient.
        (W_gradient,) = torch.autograd.grad(x_gradient, weights, grad_outputs=x)
        return x_gradient.detach(), W_gradient, None


class Tokens(Protocol):
    """What `train` reads: training tokens by sample, and the global tokens."""

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def global_tokens(self) -> NDArray[np.float16]:
        """``[N, D]``."""
        ...

    def __len__(self) -> int: ...

    def read(self, samples: NDArray[np.int64]) -> Tensor:
        """``[rows, D]`` float32 tokens of the samples."""
        ...


def train(tokens: Tokens, settings: SAESettings, seed: int, what: str = "SAE") -> tuple[TopKSAE, NDArray[np.float32]]:
    """Train an SAE on the GPU if there is one.

    Args:
        tokens: the training tokens.
        settings: size and optimisation.
        seed: of the initial weights and of the order of samples, a new permutation each epoch.
        what: the step's name in the progress report.

    Returns:
        The SAE, on the CPU, and the loss of each step.

    Raises:
        NumericsError: where a loss is not finite, or k exceeds the number of latents.
    """
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sae = TopKSAE(tokens.width, settings.expansion * tokens.width, settings.k, generator).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.learning_rate, fused=True)
    batches = [
        batch.numpy()
        for _ in range(settings.epochs)
        for batch in torch.split(torch.randperm(len(tokens), generator=generator), settings.batch_samples)
    ]
    losses = torch.empty(len(batches), device=device)
    for step, batch in enumerate(progress(batches, len(batches), f"training {what}", "steps")):
        x = tokens.read(batch).to(device, non_blocking=True)
        loss = (sae(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise NumericsError(f"{what}: the loss is not finite from step {int(bad[0])} on; lower learning_rate")
    return sae.cpu(), losses.cpu().numpy()


@dataclass(frozen=True)
class Quality:
    """How well an SAE reconstructs some tokens."""

    tokens: int
    """Tokens measured."""
    fvu: float
    """Fraction of variance unexplained, about the per-dimension mean: predicting the mean gives 1."""
    l0: float
    """Mean number of latents above 0 that reach the decoder."""
    dead: float
    """Share of latents that reached the decoder for none of these tokens."""


@torch.no_grad()
def evaluate(sae: TopKSAE, batches: Iterable[Tensor]) -> Quality:
    """Measure an SAE over all rows of the batches ``[rows, D]``, in float64 and one pass."""
    n, error, active = 0, 0.0, 0.0
    total = torch.zeros(sae.W_dec.shape[1], dtype=torch.float64)
    square = torch.zeros_like(total)
    alive = torch.zeros(len(sae.W_dec), dtype=torch.bool)
    for x in batches:
        latents = sae.top_k(x)
        x = x.double()
        n += len(x)
        total += x.sum(0)
        square += x.square().sum(0)
        error += float((sae.decode(latents) - x).square().sum())
        active += float((latents.values > 0).sum())
        alive[latents.indices[latents.values > 0]] = True
    variance = float((square - total.square() / n).sum())
    fvu = error / variance if variance > 0 else float("nan")
    return Quality(n, fvu, active / n, 1 - float(alive.double().mean()))


def train_sae(activations: Path, layer: int, settings: SAESettings, seed: int, out: Path) -> None:
    """Train an SAE on one layer of an activation store and write its folder.

    The folder holds `sae_weights.safetensors` and `cfg.json`, which SAELens reads too, `metrics.json`, `loss.csv`.

    Raises:
        StoreError: where the store is not whole or lacks the layer.
        NumericsError: where training diverges.
    """
    tokens = TokenReader.open(activations, layer)
    what = f"{activations.stem} layer {layer} seed {seed}"
    started = time.monotonic()
    sae, losses = train(tokens, settings, _mixed_seed(activations.stem, layer, seed), what)
    seconds = time.monotonic() - started
    batches = _evaluated_samples(tokens)
    quality = evaluate(sae, (tokens.read(batch) for batch in batches))
    global_quality = evaluate(sae, (torch.from_numpy(tokens.global_tokens[b].astype(np.float32)) for b in batches))
    metrics = {
        "all_tokens": asdict(quality),
        "global_tokens": asdict(global_quality),
        "steps": len(losses),
        "settings": settings.model_dump(mode="json"),
    }
    with written_aside(out) as folder:
        folder.mkdir()
        save_sae(sae, folder, model_name=activations.stem, hook_name=f"layer {layer}")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss"])
            writer.writerows((step, f"{loss:.6g}") for step, loss in enumerate(losses))
    rate = len(losses) * settings.batch_samples * (tokens.offsets[-1] / len(tokens)) / seconds
    say(f"{what}: FVU {quality.fvu:.3f}, L0 {quality.l0:.1f}, dead {quality.dead:.1%}, {rate:,.0f} tokens/s")


def save_sae(sae: TopKSAE, folder: Path, model_name: str, hook_name: str) -> None:
    """Write `sae_weights.safetensors` and `cfg.json` in the layout of SAELens."""
    d_sae, d_in = sae.W_dec.shape
    tensors = {
        "W_enc": sae.W_enc.detach().contiguous(),
        "W_dec": sae.W_dec.detach(),
        "b_enc": torch.zeros(d_sae),
        "b_dec": sae.b_dec.detach(),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": _SAE_LENS_VERSION,
            "model_name": model_name,
            "hook_name": hook_name,
            "token_position": "all",
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def load_sae(folder: Path | str) -> TopKSAE:
    """Load an SAE that `save_sae` wrote.

    Raises:
        StoreError: where the folder holds none, or its files do not fit one another.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "sae_weights.safetensors")
        sae = TopKSAE(config["d_in"], config["d_sae"], config["k"])
        with torch.no_grad():
            sae.W_enc_T.copy_(tensors["W_enc"].T)
            sae.W_dec.copy_(tensors["W_dec"])
            sae.b_dec.copy_(tensors["b_dec"])
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        raise StoreError(f"{folder}: no readable SAE there ({error}); run the sae stage") from error
    return sae


def _evaluated_samples(tokens: TokenReader) -> list[NDArray[np.int64]]:
    """Evenly spaced samples, in batches."""
    chosen = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), _EVALUATED_SAMPLES)).astype(np.int64))
    return np.array_split(chosen, max(1, len(chosen) // 32))


def _mixed_seed(encoder: str, layer: int, seed: int) -> int:
    """A seed of its own for every SAE: with equal initial weights, two encoders' features would line up by index."""
    return int(np.random.SeedSequence([seed, layer, crc32(encoder.encode())]).generate_state(1, np.uint64)[0] >> 1)
