"""How good an SAE is."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.sae._model import TopKSAE


@dataclass(frozen=True)
class Quality:
    """How well an SAE reconstructs some tokens."""

    tokens: int
    """Tokens measured."""
    fvu: float
    """Fraction of variance unexplained, about the per-dimension mean: predicting the mean gives 1."""
    explained_variance: float
    """1 - FVU."""
    cosine: float
    """Mean cosine of a token and its reconstruction."""
    l2_ratio: float
    """Mean ratio of a reconstruction's length to its token's."""
    l0: float
    """Mean number of latents above 0 that reach the decoder."""
    dead: float
    """Share of latents that reached the decoder for none of these tokens."""


@dataclass(frozen=True)
class Measured:
    """What `evaluate` finds."""

    quality: Quality
    density: NDArray[np.float64]
    """``[F]`` share of tokens for which each latent reached the decoder above 0."""


@torch.no_grad()
def evaluate(sae: TopKSAE, batches: Iterable[Tensor]) -> Measured:
    """Measure an SAE over all rows of the batches ``[rows, D]``, in float64 and one pass, where the SAE is."""
    F, D = sae.W_dec.shape

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=sae.W_dec.device)

    n = 0
    error, active, cosine, ratio = zeros(1), zeros(1), zeros(1), zeros(1)
    total, square, counts = zeros(D), zeros(D), zeros(F)
    for batch in batches:
        x = batch.to(sae.W_dec.device)
        latents = sae.top_k(x)
        reconstruction, x = sae.decode(latents).double(), x.double()
        n += len(x)
        total += x.sum(0)
        square += x.square().sum(0)
        error += (reconstruction - x).square().sum()
        lengths, reconstructed = x.norm(dim=1), reconstruction.norm(dim=1)
        # A token of length 0 has no direction, and none of its reconstruction is right.
        cosine += ((reconstruction * x).sum(1) / (lengths * reconstructed).clamp(min=1e-30)).sum()
        ratio += (reconstructed / lengths.clamp(min=1e-30)).sum()
        above = (latents.values > 0).double()
        active += above.sum()
        counts.index_add_(0, latents.indices.flatten(), above.flatten())
    variance = float((square - total.square() / n).sum())
    fvu = float(error) / variance if variance > 0 else float("nan")
    density = counts.cpu().numpy() / n
    quality = Quality(
        tokens=n,
        fvu=fvu,
        explained_variance=1 - fvu,
        cosine=float(cosine) / n,
        l2_ratio=float(ratio) / n,
        l0=float(active) / n,
        dead=float((density == 0).mean()),
    )
    return Measured(quality, density)


def density_histogram(density: NDArray[np.float64]) -> list[tuple[str, float, int]]:
    """How many latents have which log10 density, from -6 to 0 in steps of 0.25, and how many are never active.

    Returns:
        A row a bin: ``"never"`` or ``"bin"``, its lower edge (log10), and its count. The first has the rarer ones too.
    """
    alive = np.log10(density[density > 0]).clip(-6, -1e-12)
    counts, edges = np.histogram(alive, bins=np.arange(-6, 0.25, 0.25))
    rows = [("bin", float(edge), int(count)) for edge, count in zip(edges, counts, strict=False)]
    return [("never", float("-inf"), int((density == 0).sum())), *rows]
