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


def evaluate(sae: TopKSAE, batches: Iterable[Tensor]) -> Measured:
    """Measure an SAE over all rows of the batches ``[rows, D]``, in float64 and one pass, where the SAE is."""
    measuring = Measuring(sae)
    for batch in batches:
        measuring.add(batch)
    return measuring.result()


class Measuring:
    """What is known of an SAE so far, while its tokens come batch by batch."""

    def __init__(self, sae: TopKSAE) -> None:
        F, D = sae.W_dec.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=sae.W_dec.device)

        self._sae = sae
        self._tokens = 0
        self._error, self._active, self._cosine, self._ratio = zeros(1), zeros(1), zeros(1), zeros(1)
        self._total, self._square, self._counts = zeros(D), zeros(D), zeros(F)

    @torch.no_grad()
    def add(self, batch: Tensor) -> None:
        """Measure ``batch [rows, D]``."""
        x = batch.to(self._sae.W_dec.device)
        latents = self._sae.top_k(x)
        reconstruction, x = self._sae.decode(latents).double(), x.double()
        self._tokens += len(x)
        self._total += x.sum(0)
        self._square += x.square().sum(0)
        self._error += (reconstruction - x).square().sum()
        lengths, reconstructed = x.norm(dim=1), reconstruction.norm(dim=1)
        # A token of length 0 has no direction, and none of its reconstruction is right.
        self._cosine += ((reconstruction * x).sum(1) / (lengths * reconstructed).clamp(min=1e-30)).sum()
        self._ratio += (reconstructed / lengths.clamp(min=1e-30)).sum()
        above = (latents.values > 0).double()
        self._active += above.sum()
        self._counts.index_add_(0, latents.indices.flatten(), above.flatten())

    def result(self) -> Measured:
        """Over all that was added."""
        n = self._tokens
        variance = float((self._square - self._total.square() / n).sum())
        fvu = float(self._error) / variance if variance > 0 else float("nan")
        density = self._counts.cpu().numpy() / n
        quality = Quality(
            tokens=n,
            fvu=fvu,
            explained_variance=1 - fvu,
            cosine=float(self._cosine) / n,
            l2_ratio=float(self._ratio) / n,
            l0=float(self._active) / n,
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
