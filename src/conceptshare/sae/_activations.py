"""Activations of SAEs: which latents of a token reach the decoder."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# BatchTopK's threshold: the weight of a batch in the moving average, as in SAELens.
_AVERAGED = 0.01
# On CPUs, the largest of so many values are sought among those above a bound, estimated from a sample of them.
_SAMPLED_FROM = 2**20
_SAMPLE_EVERY = 61


class Active(NamedTuple):
    """The latents that reach the decoder: k per token, or flat if their number varies."""

    values: Tensor
    """``[T, k]``, or flat ``[n]`` in the order of tokens; float32, at least 0."""
    indices: Tensor
    """The latents, of the same shape; int64."""
    starts: Tensor | None = None
    """If flat, the place of each token's first one, ``[T]``."""

    def count_tokens(self) -> int:
        """T."""
        return len(self.values if self.starts is None else self.starts)

    def tokens(self) -> Tensor:
        """``[n]`` token of each flat value."""
        if self.starts is None:
            return torch.arange(len(self.values), device=self.values.device).repeat_interleave(self.values.shape[1])
        counts = torch.diff(self.starts, append=self.starts.new_tensor([len(self.values)]))
        return torch.repeat_interleave(counts)

    def dense(self, d_sae: int) -> Tensor:
        """``[T, F]`` latents, 0 for those that do not reach the decoder."""
        if self.starts is None:
            return self.values.new_zeros(len(self.values), d_sae).scatter_(1, self.indices, self.values)
        return self.values.new_zeros(len(self.starts), d_sae).index_put_((self.tokens(), self.indices), self.values)


class Activation(nn.Module):
    """Selects the latents that reach the decoder by their pre-activations.

    Tensors that it needs besides the weights are its buffers, named as in SAELens's `sae_weights.safetensors`.
    """

    architecture: str
    """Its name in SAELens's `cfg.json`."""

    def forward(self, pre: Tensor) -> Active:
        """Select among pre-activations ``pre [T, F]``, of which those below 0 count as 0."""
        raise NotImplementedError

    def track(self, active: Active) -> None:
        """Learn from a training batch's active latents, if it has anything to learn."""

    def for_inference(self, d_sae: int) -> "Activation":
        """The activation in its place after training, which treats each token by itself."""
        return self

    def config(self) -> dict[str, Any]:
        """Its own keys in SAELens's `cfg.json`."""
        return {}


class TopK(Activation):
    """The k largest latents of each token."""

    architecture = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Active:
        """Select the k largest of each row of ``pre [T, F]``."""
        values, indices = pre.topk(self.k, dim=1)
        return Active(torch.relu(values), indices)

    def config(self) -> dict[str, Any]:
        """``k``, and that latents are not rescaled."""
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}


class BatchTopK(TopK):
    """The k T largest latents of a batch of T tokens; after training, all above their average smallest one.

    Bussmann et al. (2024), BatchTopK Sparse Autoencoders.
    """

    average: Tensor
    """Sum of the smallest active latent of each batch, float64, weighted with 0.01 and then 0.99 per later batch."""
    batches: Tensor
    """Number of these batches, int64."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, pre: Tensor) -> Active:
        """Select the k T largest of ``pre [T, F]``, of those above 0."""
        values = pre.flatten()
        places = _largest(values, self.k * len(pre))
        return _flat(pre, places[values[places] > 0])

    @torch.no_grad()
    def track(self, active: Active) -> None:
        """Average the smallest active latent."""
        positive = active.values[active.values > 0]
        if len(positive):
            self.average.mul_(1 - _AVERAGED).add_(_AVERAGED * positive.min())
            self.batches += 1

    def for_inference(self, d_sae: int) -> Activation:
        """JumpReLU with the average, divided by the sum of its weights, as the threshold of all latents."""
        weights = 1 - (1 - _AVERAGED) ** max(int(self.batches), 1)
        return JumpReLU((self.average / weights).float().expand(d_sae).clone())


class ReLU(Activation):
    """All latents above 0."""

    architecture = "standard"

    def forward(self, pre: Tensor) -> Active:
        """Select all above 0 of ``pre [T, F]``."""
        return _where(pre, pre > 0)


class JumpReLU(Activation):
    """Latents above their ``threshold [F]``, float32, and above 0."""

    architecture = "jumprelu"

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, pre: Tensor) -> Active:
        """Select those of ``pre [T, F]`` that are above ``threshold`` and 0."""
        return _where(pre, pre > self.threshold.clamp(min=0))


def saved_activation(config: dict[str, Any]) -> Activation:
    """The activation of an SAE by its `cfg.json`, whose tensors are still to be loaded."""
    architecture = config["architecture"]
    if architecture == TopK.architecture:
        return TopK(config["k"])
    return ReLU() if architecture == ReLU.architecture else JumpReLU(torch.zeros(config["d_sae"]))


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest of ``values [n]``, ascending."""
    if not values.is_cuda and len(values) >= _SAMPLED_FROM:
        sample = values[::_SAMPLE_EVERY]
        bound = sample.topk(min(count * 5 // 4 // _SAMPLE_EVERY + 100, len(sample))).values[-1]
        above = torch.from_numpy(np.flatnonzero((values > bound).numpy()))  # many times as fast as nonzero
        if len(above) >= count:
            return above[values[above].topk(count, sorted=False).indices].sort().values
    return values.topk(count, sorted=False).indices.sort().values


def _where(pre: Tensor, selected: Tensor) -> Active:
    return _flat(pre, selected.flatten().nonzero().flatten())


def _flat(pre: Tensor, places: Tensor) -> Active:
    """The latents at ascending places of ``pre [T, F]``, flattened."""
    T, F = pre.shape
    starts = torch.searchsorted(places, torch.arange(T, device=pre.device) * F)
    return Active(pre.flatten()[places], places % F, starts)
