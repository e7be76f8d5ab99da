"""Which samples an SAE learns from, step by step, and which it is measured on.

Samples were shuffled where the data set was made. So the first pass takes them as they come, and the last ones, which
are held out, are as good a draw as any.
"""

import numpy as np
from numpy.typing import NDArray

from conceptshare.config.settings import SAESettings
from conceptshare.io.sizes import EVALUATED_SAMPLES

_EVALUATED_AT_ONCE = 32


def steps(samples: int, batch_samples: int, block: int, settings: SAESettings) -> list[NDArray[np.int64]]:
    """The samples of each step, the same for all layers and seeds.

    Args:
        samples: N.
        batch_samples: samples a step; the last step of a pass may have fewer.
        block: samples that the encoder reads at once. Each pass after the first takes these blocks in another order,
            so that an encoder can read them again as it did before.
        settings: how many passes, and the share that is held out.
    """
    trained = samples - settings.held_out_samples(samples)
    blocks = [np.arange(start, min(start + block, trained)) for start in range(0, trained, block)]
    passes = [np.concatenate([blocks[i] for i in _block_order(len(blocks), n)]) for n in range(settings.epochs)]
    return [order[start : start + batch_samples] for order in passes for start in range(0, trained, batch_samples)]


def measured(samples: int, settings: SAESettings) -> list[NDArray[np.int64]]:
    """The samples that metrics are taken over, in batches: the last ones, held out where some are."""
    known = settings.held_out_samples(samples) or samples
    first = samples - min(known, EVALUATED_SAMPLES)
    starts = range(first, samples, _EVALUATED_AT_ONCE)
    return [np.arange(start, min(start + _EVALUATED_AT_ONCE, samples)) for start in starts]


def _block_order(blocks: int, number: int) -> NDArray[np.int64]:
    """The order of blocks in a pass, counted from 0."""
    return np.random.default_rng(number).permutation(blocks) if number else np.arange(blocks)
