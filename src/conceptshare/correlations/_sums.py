"""Sums over samples that merge: correlations of shards of samples, taken anywhere, are those of the whole."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conceptshare.correlations._arrays import as_layers, as_tensor, sample_count
from conceptshare.correlations._engine import Product
from conceptshare.correlations._standardise import BlockMemory, Panel, standard_of, standardised
from conceptshare.device import default_device, full_float32
from conceptshare.io.errors import NumericsError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CorrelationSums:
    """What the correlations between two layers' features are made of, over some samples."""

    samples: int
    mean_a: Array
    """``[F_A]``"""
    mean_b: Array
    """``[F_B]``"""
    squares_a: Array
    """``[F_A]`` sum of squared deviations from the mean."""
    squares_b: Array
    """``[F_B]``"""
    products: Array
    """``[F_A, F_B]`` sum of the products of both deviations."""

    def __add__(self, other: "CorrelationSums") -> "CorrelationSums":
        """The sums over the samples of both (Chan, Golub and LeVeque 1979).

        Raises:
            NumericsError: where they are not of the same numbers of features.
        """
        if self.products.shape != other.products.shape:
            raise NumericsError(f"sums of {self.products.shape} and of {other.products.shape} features do not merge")
        N = self.samples + other.samples
        a, b = other.mean_a - self.mean_a, other.mean_b - self.mean_b
        share, both = other.samples / N, self.samples * other.samples / N
        return CorrelationSums(
            N,
            self.mean_a + a * share,
            self.mean_b + b * share,
            self.squares_a + other.squares_a + a**2 * both,
            self.squares_b + other.squares_b + b**2 * both,
            self.products + other.products + np.outer(a, b) * both,
        )

    def correlations(self) -> Array:
        """``[F_A, F_B]`` Pearson correlations; 0 for a feature that does not vary."""
        lengths = np.sqrt(np.outer(self.squares_a, self.squares_b))
        r = np.divide(self.products, lengths, out=np.zeros_like(self.products), where=lengths > 0)
        return r.clip(-1, 1)

    def best_matches(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """``[F_A]`` rho and match of each feature of A, as `max_correlations` has them; `swapped` for those of B."""
        r = np.where(self.squares_b > 0, self.correlations(), -np.inf)
        rho, match = r.max(axis=1), r.argmax(axis=1)
        nothing = (self.squares_a == 0) | np.isinf(rho)
        return np.where(nothing, 0, rho).astype(np.float32), np.where(nothing, -1, match).astype(np.int32)

    def swapped(self) -> "CorrelationSums":
        """The same, seen from B."""
        return CorrelationSums(self.samples, self.mean_b, self.mean_a, self.squares_b, self.squares_a, self.products.T)


@full_float32()
def correlation_sums(a: Any, b: Any) -> CorrelationSums:
    """The sums of one shard of samples.

    Products are of float32 operands and summed in float32, so an error is below 1e-5 of both lengths; all else is
    float64. The whole matrix is kept, ``F_A x F_B`` numbers: this is for spreading samples over machines, layer by
    layer, where `max_correlations` on one machine would take too long.

    Args:
        a: ``[n, F_A]``, an array as of `max_correlations`.
        b: ``[n, F_B]``, the same samples.

    Raises:
        NumericsError: as `max_correlations` does, or where there are several layers.
    """
    sides = [as_layers(a, "a"), as_layers(b, "b")]
    if any(len(layers) > 1 for layers, _ in sides):
        raise NumericsError("sums are of one layer of each side: give one array for a and one for b")
    N = sample_count([layer for layers, _ in sides for layer in layers])
    device = default_device()
    standards, blocks = [], []
    for (layer,), (known,) in sides:
        x = as_tensor(layer[:], device)
        panel = Panel(0, 0, x.shape[1], 0, known)
        standards.append(standard_of(lambda x=x: iter([x]), panel, "float32"))  # type: ignore[misc]
        blocks.append(standardised(x, standards[-1], BlockMemory(device), N))
    product = Product(N, device)
    product.add(blocks[0], blocks[1], anew=True)
    mean_a, mean_b = (standard.mean.cpu().numpy() for standard in standards)
    squares_a, squares_b = (standard.squares.cpu().numpy() for standard in standards)
    products = np.zeros((len(mean_a), len(mean_b)))
    products[np.ix_(*(standard.columns.cpu().numpy() for standard in standards))] = product.correlations().cpu().numpy()
    return CorrelationSums(N, mean_a, mean_b, squares_a, squares_b, products * np.sqrt(np.outer(squares_a, squares_b)))
