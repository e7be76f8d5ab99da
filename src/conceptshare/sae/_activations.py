"""Activations of SAEs: which latents of a token reach the decoder."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Active(NamedTuple):
    """The latents that reach the decoder: k per token, or flat if their number varies."""

    values: Tensor
    """``[T, k]``, or flat ``[n]`` in the order of tokens; float32, at least 0."""
    indices: Tensor
    """The latents, of the same shape; int64."""
    starts: Tensor | None = None
    """If flat, the place of each token's first one, ``[T]``."""

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


class ReLU(Activation):
    """All latents above 0."""

    architecture = "standard"

    def forward(self, pre: Tensor) -> Active:
        """Select all above 0 of ``pre [T, F]``."""
        return _where(pre, pre > 0)


class JumpReLU(Activation):
    """Latents above their thresholds, and above 0.

    Args:
        d_sae: F.
    """

    architecture = "jumprelu"

    threshold: Tensor
    """``[F]`` float32."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(d_sae))

    def forward(self, pre: Tensor) -> Active:
        """Select those of ``pre [T, F]`` that are above ``threshold`` and 0."""
        return _where(pre, pre > self.threshold.clamp(min=0))


def saved_activation(config: dict[str, Any]) -> Activation:
    """The activation of an SAE by its `cfg.json`, whose tensors are still to be loaded."""
    architecture = config["architecture"]
    if architecture == TopK.architecture:
        return TopK(config["k"])
    return ReLU() if architecture == ReLU.architecture else JumpReLU(config["d_sae"])


def _where(pre: Tensor, selected: Tensor) -> Active:
    return _flat(pre, selected.flatten().nonzero().flatten())


def _flat(pre: Tensor, places: Tensor) -> Active:
    """The latents at ascending places of ``pre [T, F]``, flattened."""
    T, F = pre.shape
    starts = torch.searchsorted(places, torch.arange(T, device=pre.device) * F)
    return Active(pre.flatten()[places], places % F, starts)
