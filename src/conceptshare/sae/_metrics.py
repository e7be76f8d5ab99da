"""Quality metrics of SAEs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.sae._model import SAE

_VARIES = 1e-12
"""Variance of tokens, as a fraction of their mean square, below which they count as constant."""


@dataclass(frozen=True)
class Quality:
    """How well an SAE reconstructs a set of tokens."""

    tokens: int
    """Number of tokens."""
    fvu: float
    """Fraction of variance unexplained, relative to the per-dimension mean: predicting the mean gives 1. NaN if the
    tokens do not vary."""
    explained_variance: float
    """1 - FVU."""
    cosine: float
    """Mean cosine similarity of tokens and their reconstructions."""
    l2_ratio: float
    """Mean ratio of a reconstruction's norm to its token's norm."""
    l0: float
    """Mean number of positive latents that reach the decoder."""
    dead: float
    """Fraction of latents that reached the decoder for none of these tokens."""


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    quality: Quality
    density: NDArray[np.float64]
    """``[F]`` fraction of tokens for which each latent was positive and reached the decoder."""


def evaluate(sae: SAE, batches: Iterable[Tensor]) -> Evaluation:
    """Evaluate an SAE on all rows of the batches ``[rows, D]``, in float64 and one pass, on the SAE's device."""
    evaluator = Evaluator(sae)
    for batch in batches:
        evaluator.add(batch)
    return evaluator.result()


class Evaluator:
    """Streaming accumulator of SAE quality metrics."""

    def __init__(self, sae: SAE) -> None:
        F, D = sae.W_dec.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=sae.W_dec.device)

        self._sae = sae
        self._tokens = 0
        self._error, self._active, self._cosine, self._ratio = zeros(1), zeros(1), zeros(1), zeros(1)
        self._total, self._square, self._counts = zeros(D), zeros(D), zeros(F)

    @torch.no_grad()
    def add(self, batch: Tensor) -> None:
        """Add ``batch [rows, D]``."""
        x = batch.to(self._sae.W_dec.device).float()
        active = self._sae.active(x)
        reconstruction, x = self._sae.decode(active).double(), x.double()
        self._tokens += len(x)
        self._total += x.sum(0)
        self._square += x.square().sum(0)
        self._error += (reconstruction - x).square().sum()
        lengths, reconstructed = x.norm(dim=1), reconstruction.norm(dim=1)
        # The clamps avoid divisions by zero: the cosine of a token of norm 0 counts as 0.
        self._cosine += ((reconstruction * x).sum(1) / (lengths * reconstructed).clamp(min=1e-30)).sum()
        self._ratio += (reconstructed / lengths.clamp(min=1e-30)).sum()
        above = (active.values > 0).double()
        self._active += above.sum()
        self._counts.index_add_(0, active.indices.flatten(), above.flatten())

    def result(self) -> Evaluation:
        """Return the metrics over all added batches."""
        n = self._tokens
        variance = float((self._square - self._total.square() / n).sum())
        # A smaller variance is the rounding error of tokens that do not vary.
        fvu = float(self._error) / variance if variance > _VARIES * float(self._square.sum()) else float("nan")
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
        return Evaluation(quality, density)


def density_histogram(density: NDArray[np.float64]) -> list[tuple[str, float, int]]:
    """Histogram of log10 density from -6 to 0 in steps of 0.25, with the number of latents that are never active.

    Returns:
        One row per bin: ``"never"`` or ``"bin"``, its lower edge (log10) and its count. Smaller densities count in the
        first bin.
    """
    alive = np.log10(density[density > 0]).clip(-6, -1e-12)
    counts, edges = np.histogram(alive, bins=np.arange(-6, 0.25, 0.25))
    rows = [("bin", float(edge), int(count)) for edge, count in zip(edges, counts, strict=False)]
    return [("never", float("-inf"), int((density == 0).sum())), *rows]
