"""Stage `activations`: the residual stream of every sample after each of an encoder's blocks."""
