"""Sizes shared by the stages and `conceptshare plan`, in a module that imports nothing."""

SHARD_BYTES = 2**25
"""Shard size of tokens. Larger shards are fewer files, but each layer keeps up to one shard in memory."""
CHUNK_BYTES = 2**18
"""Chunk size of activations: small enough to read a single sample of a large encoder cheaply, large enough to read all
samples quickly."""
IN_MEMORY_BYTES = 2**30
"""Layers up to this size are loaded into memory; larger ones are read sample by sample."""

EVALUATED_SAMPLES = 4096
"""Maximum number of samples for an SAE's metrics: enough for three digits of FVU."""

FEATURE_ROWS = 1024
"""Rows of the chunks of a feature store."""
FEATURE_COLUMNS = 512
"""Columns of the chunks of a feature store. Panels and blocks consist of whole chunks, so no chunk is read twice."""
TOP_SAMPLES = 100
"""Number of strongest samples per feature in a feature store."""
SLAB_BYTES = 2**31
"""Features that were not kept are recomputed for this many bytes of columns at a time, and more on a large GPU."""

FLOOR_FEATURES = 512
"""Number of features per layer, the first ones, that are matched with shuffled samples: one column of chunks. A
feature's index is arbitrary, so the floor from these is within a few percent of the floor from all features."""

REPAIRINGS = 20
"""Number of random orders of the samples for the null of a wMPPC: enough for a p-value below 0.05."""
NULL_FEATURES = 64
"""Number of features per layer and re-pairing that the null is estimated from."""

FEATURE_REPAIRINGS = 10
"""Number of random orders of the samples for the null of each feature of a last layer."""
RESAMPLES = 200
"""Number of bootstrap resamples in which the features of a last layer are ranked by Comparative Sharedness."""

CKA_SAMPLES = 10_000
"""Maximum number of samples for linear CKA. Their float32 activations in all layers of one encoder are in memory."""
NEIGHBOUR_SAMPLES = 4096
"""Maximum number of samples for mutual nearest neighbours."""

FIT_SAMPLES = 1000
"""Number of samples that the fit of each is measured against."""

MEASURED_SAMPLES = 2**17
"""Names are evaluated on the held-out samples among this many first samples, whose values fit in memory."""
SHOWN_SAMPLES = 9
"""Number of strongest samples shown per feature, as in the paper's Figure 2."""
QUANTILES = (0.9, 0.5, 0.1)
"""Quantiles of a feature's positive activations, around which weaker samples are shown."""
NEAR = 4
"""Number of samples around each quantile."""
HISTOGRAM_BINS = 20
"""Number of bins of the histogram of a feature's activations, from 0 to the largest."""
