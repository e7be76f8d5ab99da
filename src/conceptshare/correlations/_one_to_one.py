"""One-to-one matches between the features of two encoders, from the best matches in both directions."""

import numpy as np
from numpy.typing import NDArray

from conceptshare.io.readers import MaxCorrelations

# Smallest increase of a price, in units of correlation.
_STEP = 1e-4


def one_to_one(
    found: MaxCorrelations, kept_a: NDArray[np.bool_], kept_b: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Correlations of features with their partners, if every feature has at most one, of A and of B.

    Their sum of correlations is at most 0.0001 per pair below the largest among candidates: every feature's best match
    in each layer of the other encoder, in both directions, if their correlation is positive.

    Args:
        found: the best matches.
        kept_a: ``[L_A]`` the layers of A that take part in the matching of all layers.
        kept_b: ``[L_B]`` those of B.

    Returns:
        ``[2, F_A]`` and ``[2, F_B]``: with partners in all kept layers; and for features of the last layer, else 0,
        with partners in the last layer. 0 without a partner.
    """
    F_A, F_B = found.rho_ab.shape[1], found.rho_ba.shape[1]
    starts_a, starts_b = (np.cumsum(sizes) - sizes for sizes in (found.sizes_a, found.sizes_b))
    a = np.concatenate([np.tile(np.arange(F_A), len(starts_b)), (starts_a[:, None] + found.match_ba).ravel()])
    b = np.concatenate([(starts_b[:, None] + found.match_ab).ravel(), np.tile(np.arange(F_B), len(starts_a))])
    rho = np.concatenate([found.rho_ab.ravel(), found.rho_ba.ravel()])
    positive = rho > 0
    kept = positive & np.repeat(kept_a, found.sizes_a)[a] & np.repeat(kept_b, found.sizes_b)[b]
    last = positive & (a >= starts_a[-1]) & (b >= starts_b[-1])
    of_a, of_b = np.zeros((2, F_A), np.float32), np.zeros((2, F_B), np.float32)
    for row, candidates in enumerate((kept, last)):
        chosen = np.flatnonzero(candidates)
        chosen = chosen[_assigned(a[chosen], b[chosen], rho[chosen], F_A, F_B)]
        of_a[row, a[chosen]], of_b[row, b[chosen]] = rho[chosen], rho[chosen]
    return of_a, of_b


def _assigned(
    a: NDArray[np.int64], b: NDArray[np.int64], weights: NDArray[np.float32], F_A: int, F_B: int
) -> NDArray[np.int64]:
    """Indices of edges between nodes ``a`` and ``b`` that share no node, with about the largest sum of weights.

    The auction algorithm (Bertsekas, 1988): each node of A bids for the node of B that is worth most to it, its weight
    minus its price, and raises the price until the second best, or none, would be worth more by `_STEP`. An owner that
    is outbid bids again. So the sum is at most `_STEP` per edge below the largest. The exact assignment of SciPy, whose
    time is quadratic, takes minutes for 200,000 features.
    """
    # Sorted by node of A. A pair can be the best match in both directions.
    edges, first = np.unique(a * F_B + b, return_index=True)
    b, worth = b[first], weights[first].astype(np.float64)
    starts = np.searchsorted(edges, np.arange(F_A + 1) * F_B)
    price, owner, chosen = np.zeros(F_B), np.full(F_B, -1), np.full(F_A, -1)
    bidders = np.flatnonzero(np.diff(starts))
    while len(bidders):
        counts = starts[bidders + 1] - starts[bidders]
        ends = np.cumsum(counts)
        firsts = ends - counts
        places = np.arange(ends[-1]) + np.repeat(starts[bidders] - firsts, counts)
        value = worth[places] - price[b[places]]
        order = np.lexsort((-value, np.repeat(np.arange(len(bidders)), counts)))
        best, second = value[order[firsts]], value[order[np.minimum(firsts + 1, ends - 1)]]
        gain = best - np.where(counts > 1, second, 0).clip(min=0)
        bidding = best > 0  # the others stay without a partner, as prices only rise
        bidders, wanted = bidders[bidding], places[order[firsts]][bidding]
        bids = price[b[wanted]] + gain[bidding] + _STEP
        highest = np.argsort(-bids, kind="stable")
        objects, index = np.unique(b[wanted[highest]], return_index=True)
        winners = highest[index]
        outbid = owner[objects][owner[objects] >= 0]
        chosen[outbid] = -1
        owner[objects], price[objects], chosen[bidders[winners]] = bidders[winners], bids[winners], wanted[winners]
        bidders = np.concatenate([np.delete(bidders, winners), outbid])
    indices: NDArray[np.int64] = first[chosen[chosen >= 0]]
    return indices
