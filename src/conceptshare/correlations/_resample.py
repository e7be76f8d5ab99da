"""Correlations with fixed matches, and S, in bootstrap resamples of the samples."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.correlations._arrays import as_tensor
from conceptshare.correlations._influence import Encoder, inverse
from conceptshare.device import default_device, full_float32
from conceptshare.io.progress import progress
from conceptshare.io.sizes import FEATURE_ROWS, RESAMPLES
from conceptshare.metrics import resamples

Array = NDArray[np.float64]
Float16 = NDArray[np.float16]

# A smaller variance in a resample, as a fraction of the mean square, is the rounding error of a constant.
_VARIES = 1e-5


@full_float32()
def resampled(
    a: Encoder, b: Encoder, match_ab: NDArray[np.int32], match_ba: NDArray[np.int32], memory_bytes: int, what: str
) -> tuple[tuple[Float16, Float16], tuple[Float16, Float16]]:
    """Correlations of features with their matches, and S, in `RESAMPLES` bootstrap resamples.

    Resamples depend on the number of samples alone, so that all pairs of a study have the same ones.

    Args:
        a: one layer of an encoder.
        b: one layer of another encoder.
        match_ab: ``[F_a]`` the match in B of each feature of A; -1 means none.
        match_ba: ``[F_b]`` the match in A of each feature of B.
        memory_bytes: limit of the working memory.
        what: name of the step in the progress report.

    Returns:
        From A to B and from B to A: correlations ``[R, F]``, 0 for a feature that is constant in a resample or has no
        match, and S divided by that of all samples ``[R, F]``, 0 if that is 0.
    """
    device = default_device()
    N, sizes = a.layers[0].shape[0], [each.layers[0].shape[1] for each in (a, b)]
    counts = torch.from_numpy(np.stack([*resamples(N, RESAMPLES)]).astype(np.float32)).to(device)
    matches = [torch.from_numpy(match).clamp(min=0).to(device) for match in (match_ab, match_ba)]
    # Sums over each resample: of the features, standardised values, their squares, and products with the matches.
    sums = [torch.zeros(4, RESAMPLES, F, dtype=torch.float64, device=device) for F in sizes]
    rows = max(1, min(FEATURE_ROWS, memory_bytes // (4 * 6 * sum(sizes))))
    for start in progress(range(0, N, rows), -(-N // rows), what, "blocks"):
        block = slice(start, start + rows)
        both = [_values(each, block, device) for each in (a, b)]
        for into, match, (f, z), (_, other) in zip(sums, matches, both, both[::-1], strict=True):
            for n, values in enumerate((f, z, z**2, z * other[:, match])):
                into[n] += counts[:, block] @ values
    of_a, of_b = (each.cpu().numpy() / N for each in sums)
    return (
        (_correlations(of_a, of_b, match_ab), _ratios(of_a, a.strength / N)),
        (_correlations(of_b, of_a, match_ba), _ratios(of_b, b.strength / N)),
    )


def _values(encoder: Encoder, block: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features of a block of samples ``[n, F]`` float32, and the same standardised over all samples."""
    offset, mean, scale = (
        torch.from_numpy(values.astype(np.float32)).to(device)
        for values in (encoder.offset, encoder.mean, inverse(encoder.deviation))
    )
    x = as_tensor(encoder.layers[0][block, :], device).float()
    return x + offset, (x - mean) * scale


def _correlations(ours: Array, theirs: Array, match: NDArray[np.int32]) -> Float16:
    """``[R, F]`` from the means ``[4, R, F]`` of `resampled` over each resample."""
    _, mean, square, product = ours
    _, mean_b, square_b, _ = theirs[..., match]
    variance, variance_b = (
        np.where(s - m**2 > _VARIES * s, s - m**2, 0) for m, s in ((mean, square), (mean_b, square_b))
    )
    r = (product - mean * mean_b) * inverse(np.sqrt(variance * variance_b))
    return np.where(match < 0, 0, r.clip(-1, 1)).astype(np.float16)


def _ratios(ours: Array, mean: Array) -> Float16:
    """``[R, F]`` S of each resample divided by that of all samples."""
    ratios: Float16 = (ours[0] * inverse(mean)).astype(np.float16)
    return ratios
