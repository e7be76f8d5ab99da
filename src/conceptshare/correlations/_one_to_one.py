"""One-to-one matches between the features of two encoders, from the best matches in both directions."""

import numpy as np
from numpy.typing import NDArray

from conceptshare.io.readers import MaxCorrelations

# Weight of leaving a feature without a partner. SciPy takes 0 for no edge.
_UNMATCHED = 1e-6


def one_to_one(found: MaxCorrelations) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Correlations of features with their partners, if every feature has at most one, of A and of B.

    These are the partners with the largest sum of correlations among candidates: every feature's best match in each
    layer of the other encoder, in both directions, if their correlation is positive.

    Returns:
        ``[2, F_A]`` and ``[2, F_B]``: with partners in all layers; and for features of the last layer, else 0, with
        partners in the last layer. 0 without a partner.
    """
    F_A, F_B = found.rho_ab.shape[1], found.rho_ba.shape[1]
    starts_a, starts_b = (np.cumsum(sizes) - sizes for sizes in (found.sizes_a, found.sizes_b))
    a = np.concatenate([np.tile(np.arange(F_A), len(starts_b)), (starts_a[:, None] + found.match_ba).ravel()])
    b = np.concatenate([(starts_b[:, None] + found.match_ab).ravel(), np.tile(np.arange(F_B), len(starts_a))])
    rho = np.concatenate([found.rho_ab.ravel(), found.rho_ba.ravel()])
    positive = rho > _UNMATCHED
    last = positive & (a >= starts_a[-1]) & (b >= starts_b[-1])
    of_a, of_b = np.zeros((2, F_A), np.float32), np.zeros((2, F_B), np.float32)
    for row, candidates in enumerate((positive, last)):
        chosen = np.flatnonzero(candidates)
        chosen = chosen[_assigned(a[chosen], b[chosen], rho[chosen], F_A, F_B)]
        of_a[row, a[chosen]], of_b[row, b[chosen]] = rho[chosen], rho[chosen]
    return of_a, of_b


def _assigned(
    a: NDArray[np.int64], b: NDArray[np.int64], weights: NDArray[np.float32], F_A: int, F_B: int
) -> NDArray[np.int64]:
    """Indices of the edges between nodes ``a`` and ``b`` that have the largest sum of weights and share no node."""
    from scipy.sparse import csr_array  # slow to import
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    # A pair can be the best match in both directions.
    edges, first = np.unique(a * F_B + b, return_index=True)
    # SciPy matches every node of A, so each has a node of its own for having no partner.
    values = np.concatenate([weights[first].astype(np.float64), np.full(F_A, _UNMATCHED)])
    columns = np.concatenate([b[first], F_B + np.arange(F_A)])
    graph = csr_array((values, (np.concatenate([a[first], np.arange(F_A)]), columns)), shape=(F_A, F_B + F_A))
    rows, partners = min_weight_full_bipartite_matching(graph, maximize=True)
    partnered = partners < F_B
    indices: NDArray[np.int64] = first[np.searchsorted(edges, rows[partnered] * F_B + partners[partnered])]
    return indices
