"""Sizes that stages work with and `conceptshare plan` counts with, in one place that imports nothing."""

SHARD_BYTES = 2**25
"""Of tokens. Larger shards are fewer files; each layer keeps up to one in memory."""
CHUNK_BYTES = 2**18
"""Of activations: small enough to read a single sample of a large encoder cheaply, large enough to read all quickly."""
IN_MEMORY_BYTES = 2**30
"""Layers up to this size are read at once; of larger ones, each sample is read when its turn comes."""

EVALUATED_SAMPLES = 4096
"""An SAE's metrics are computed on at most this many samples: enough for three digits of FVU."""

FEATURE_ROWS = 1024
"""Rows of the chunks of a feature store."""
FEATURE_COLUMNS = 512
"""Columns of the chunks of a feature store. A panel or block of whole chunks reads none twice."""
TOP_SAMPLES = 100
"""Strongest samples that a feature store has of each feature."""

FLOOR_FEATURES = 512
"""Features of each layer, the first ones, whose best matches among shuffled samples are computed: all of a wMPPC's
floor is within a few percent of theirs, since a feature's index means nothing, and they are one column of chunks."""

CKA_SAMPLES = 10_000
"""Largest number of samples of linear CKA. Their float32 activations of all layers of one encoder are in memory."""
NEIGHBOUR_SAMPLES = 4096
"""Largest number of samples among which neighbours are searched."""

SHOWN_SAMPLES = 9
"""Strongest samples of a feature that are shown, as in the paper's Figure 2."""
QUANTILES = (0.9, 0.5, 0.1)
"""Quantiles of a feature's activations above zero around which weaker samples are shown."""
NEAR = 4
"""Samples around each quantile."""
HISTOGRAM_BINS = 20
"""Of the histogram of a feature's activations, from 0 to the largest."""
