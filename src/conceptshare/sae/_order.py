"""Order of the training samples, and choice of the samples for evaluation.

Samples were shuffled when the data set was made. The first epoch therefore takes them in order, and the last samples,
which are held out, are a random draw.
"""

import numpy as np
from numpy.typing import NDArray

from conceptshare.config.settings import SAESettings
from conceptshare.io.sizes import EVALUATED_SAMPLES

_EVALUATION_BATCH = 32


def steps(samples: int, batch_samples: int, block: int, settings: SAESettings) -> list[NDArray[np.int64]]:
    """The samples of each step, the same for all layers and seeds.

    Args:
        samples: N.
        batch_samples: samples per step; the last step of an epoch may have fewer.
        block: the encoder's batch size. Every epoch after the first shuffles whole blocks of this size, so that the
            encoder's batches stay the same.
        settings: number of epochs and held-out fraction.
    """
    trained = samples - settings.held_out_samples(samples)
    blocks = [np.arange(start, min(start + block, trained)) for start in range(0, trained, block)]
    passes = [np.concatenate([blocks[i] for i in _block_order(len(blocks), n)]) for n in range(settings.epochs)]
    return [order[start : start + batch_samples] for order in passes for start in range(0, trained, batch_samples)]


def evaluated(samples: int, settings: SAESettings) -> list[NDArray[np.int64]]:
    """The samples for metrics, in batches: the last ones, from the held-out samples if there are any."""
    available = settings.held_out_samples(samples) or samples
    first = samples - min(available, EVALUATED_SAMPLES)
    starts = range(first, samples, _EVALUATION_BATCH)
    return [np.arange(start, min(start + _EVALUATION_BATCH, samples)) for start in starts]


def _block_order(blocks: int, number: int) -> NDArray[np.int64]:
    """The order of blocks in an epoch, counted from 0."""
    return np.random.default_rng(number).permutation(blocks) if number else np.arange(blocks)
