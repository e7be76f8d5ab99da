"""Stage `correlations`: for every pair of layers of two encoders, each feature's best match in the other.

`results/{dataset}/correlations/{sae}/{a}__{b}.zarr` holds both directions. The features of all layers of an encoder
are concatenated; ``sizes_a [L_A]`` and ``sizes_b [L_B]`` are the numbers of features per layer:

- ``rho_ab [L_B, F_A]`` float32: the largest Pearson correlation of a feature of A with any feature of a layer of B, and
  ``match_ab [L_B, F_A]`` int32: that feature's index in its layer;
- ``floor_ab [L_B, f_A]`` float32: the same rho for the first ``floor_sizes_a [L_A]`` features of each layer of A, with
  B's samples shuffled;
- ``null_ab [R, L_A, L_B + 1]`` float32: the wMPPC from each layer of A to each of B, and last to all layers of B, with
  A's samples in R random orders, and ``null_error_ab [L_A, L_B + 1]`` float32, the standard error of their means;
- ``influence_ab [3, N]`` float32: each sample's influence on the wMPPC from A to B, by reading;
- ``iou_ab [2, F_A]`` float32: the intersection over union of the samples on which a feature of A and its best match are
  active, for matches in all layers, and for features of the last layer, else 0, in the last layer;
- ``one_to_one_ab [2, F_A]`` float32: the correlation with its partner if every feature has at most one, likewise;
- ``cross_fitted_layers_ab [L_A, L_B + 1]`` and ``cross_fitted_readings_ab [3]`` float64: the wMPPC corrected for the
  choice of the best of many matches, by layer and by reading, and ``cross_fitted_influence_ab [3, N]`` float32, each
  sample's influence on the square of the latter, which has its sign;
- ``null_features_ab [f]`` float32: for each of the f features of A's last layer, the mean of its best correlation with
  B's last layer with the samples re-paired at random; ``resampled_rho_ab [R, f]`` float16, its correlation with its
  best match there in R bootstrap resamples, and ``resampled_strength_ab [R, f]`` float16, S in these divided by S;
- ``rho_ba [L_A, F_B]`` and so on: the same from B to A;
- ``full/layer-NN__layer-MM [F_a, F_b]`` float32: the full correlation matrix of two layers, if requested.

Layers that the spec lists in ``left_out_a`` and ``left_out_b`` take no part where layers are combined: in the best of
all layers, and in the first two readings. Values of a pair of layers, and of the last layers, include them.

Both directions are the row and column maxima of one matrix, so one product serves both. Only a tile of the matrix is in
memory: features are standardised and multiplied in panels, as wide as the memory budget allows.
"""

from typing import TYPE_CHECKING

from conceptshare._on_demand import on_demand

if TYPE_CHECKING:
    from conceptshare.correlations._engine import max_correlations
    from conceptshare.correlations._store import FeatureStore, check_pair, correlate_stores, judged, last_layers
    from conceptshare.correlations.blocks import Precision
    from conceptshare.io.readers import MaxCorrelations

__all__ = [
    "FeatureStore",
    "MaxCorrelations",
    "Precision",
    "check_pair",
    "correlate_stores",
    "judged",
    "last_layers",
    "max_correlations",
]

__getattr__ = on_demand(
    __name__,
    blocks=["Precision"],
    _engine=["max_correlations"],
    _store=["FeatureStore", "check_pair", "correlate_stores", "judged", "last_layers", "MaxCorrelations"],
)
