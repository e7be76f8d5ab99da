"""The TopK SAE model, and reading and writing of its folder, which SAELens can read too."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.seals import seal
from conceptshare.sae.folder import ELSEWHERE, other_meaning, sae_file

# The version of SAELens that this layout was tested with.
_SAE_LENS_VERSION = "6.54.12"


class TopK(NamedTuple):
    """The latents that reach the decoder."""

    values: Tensor
    """``[T, k]`` float32, at least 0."""
    indices: Tensor
    """``[T, k]`` int64."""


class TopKSAE(nn.Module):
    """A TopK sparse autoencoder.

    Args:
        d_in: D, the width of the residual stream.
        d_sae: F, the number of latents.
        k: latents kept per token.
        generator: random generator for the initial weights; without one they are left uninitialised.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if k > d_sae:
            raise NumericsError(f"k = {k} is more than the {d_sae} latents there are; lower k or raise expansion")
        self.k = k
        # One row per latent, as in the decoder, so that an active latent's weights are contiguous.
        self.W_enc_T = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae), requires_grad=False)
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if generator is not None:
            with torch.no_grad():
                # Initialised as [D, F], whose fan-in is F for torch: bounds are sqrt(6 / F), as in the paper's code.
                self.W_enc_T.copy_(nn.init.kaiming_uniform_(torch.empty(d_in, d_sae), generator=generator).T)
                self.W_dec.copy_(self.W_enc_T / self.W_enc_T.norm(dim=1, keepdim=True))

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 - the equation's name
        """``[D, F]`` encoder weights."""
        return self.W_enc_T.T

    def encode(self, x: Tensor) -> Tensor:
        """``[T, F]`` latents of ``x [T, D]``, before TopK and after ReLU."""
        return torch.relu(torch.addmm(self.b_enc, x - self.b_dec, self.W_enc))

    def top_k(self, x: Tensor, precision: str = "float32", k: int | None = None, among: Tensor | None = None) -> TopK:
        """Compute the k largest latents of each row of ``x [T, D]``.

        Args:
            x: tokens.
            precision: with bfloat16 or tf32, x and W_enc are rounded for the product that selects the latents; the
                selected values are computed in float32.
            k: number of latents; defaults to the model's k.
            among: ``[F]`` bool, the latents to choose from; values of other latents are 0. Defaults to all.
        """
        values, indices = _TopLatents.apply(x - self.b_dec, self.W_enc_T, self.b_enc, k or self.k, precision, among)
        return TopK(values, indices)

    def decode(self, latents: TopK) -> Tensor:
        """``[T, D]`` reconstruction."""
        return _weighted_sum(latents.indices, self.W_dec, latents.values) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` reconstruction of ``x [T, D]``."""
        return self.decode(self.top_k(x))


class _TopLatents(torch.autograd.Function):
    """TopK(ReLU(x W_enc + b_enc)) with gradients that only touch the kept latents."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int, precision: str, among: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rounded = precision != "float32"
        if precision == "bfloat16":
            products = torch.addmm(b_enc.bfloat16(), x.bfloat16(), W_enc_T.bfloat16().T)
        elif precision == "tf32":
            with _tf32():
                products = torch.addmm(b_enc, x, W_enc_T.T)
        else:
            products = torch.addmm(b_enc, x, W_enc_T.T)
        if among is not None:
            products = products.masked_fill(~among, -torch.inf)
        values, indices = products.topk(k, dim=1)
        if rounded:
            values = torch.where(values.isneginf(), -torch.inf, _dots(indices, W_enc_T, x) + b_enc[indices])
        values = torch.relu(values)
        ctx.save_for_backward(x, W_enc_T, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc_T, values, indices = ctx.saved_tensors
        latent_gradients = gradients[0] * (values > 0)
        with torch.enable_grad():
            weights = W_enc_T.detach().requires_grad_()
            x_gradient = _weighted_sum(indices, weights, latent_gradients)
        # The vector-Jacobian product of sum_j g_j W_j with x, for W, is the sum over tokens of g_j x: the encoder's
        # gradient.
        (W_gradient,) = torch.autograd.grad(x_gradient, weights, grad_outputs=x)
        b_gradient = None
        if ctx.needs_input_grad[2]:
            b_gradient = _sum_by_index(indices.flatten(), latent_gradients.flatten(), len(W_enc_T))
        return x_gradient.detach(), W_gradient, b_gradient, None, None, None


def _sum_by_index(indices: Tensor, values: Tensor, count: int) -> Tensor:
    """``[count]`` sums of the values per index, deterministic."""
    total = values.new_zeros(count)
    if values.is_cuda:  # on GPUs index_add_ is not deterministic, while index_put_ sorts
        return total.index_put_((indices,), values, accumulate=True)
    return total.index_add_(0, indices, values)


@contextmanager
def _tf32() -> Iterator[None]:
    """Let GPUs use TF32 (ten bits of mantissa) in products, in all threads of the process."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _weighted_sum(indices: Tensor, W: Tensor, weights: Tensor) -> Tensor:
    """``[T, D]`` sums of the rows ``indices [T, k]`` of ``W [F, D]`` with ``weights [T, k]``, without a gather."""
    return embedding_bag(indices, W, per_sample_weights=weights, mode="sum")


def _dots(indices: Tensor, W: Tensor, x: Tensor) -> Tensor:
    """``[T, k]`` dot products of ``x [T, D]`` with the rows ``indices [T, k]`` of ``W``, without gathering rows.

    Computed as the gradient of a weighted sum of these rows with respect to the weights, for the output gradient x.
    """
    T, k = indices.shape
    tokens = torch.arange(T, device=x.device)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, W, indices.flatten(), tokens * k, tokens.repeat_interleave(k), mode=0
    )
    return products.view_as(indices)


def save_sae(sae: TopKSAE, folder: Path, model_name: str, hook_name: str, spec: dict[str, Any] | None = None) -> None:
    """Write `sae_weights.safetensors` and `cfg.json` in the layout of SAELens, and seal the folder in `manifest.json`.

    Args:
        sae: the model.
        folder: the folder to write; other files in it are sealed too.
        model_name: name of the encoder, for other libraries.
        hook_name: name of the layer, for other libraries.
        spec: layer, seed, settings and inputs of the SAE, see `folder.sae_of`.
    """
    d_sae, d_in = sae.W_dec.shape
    tensors = {
        "W_enc": sae.W_enc.detach().contiguous(),
        "W_dec": sae.W_dec.detach(),
        "b_enc": sae.b_enc.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": _SAE_LENS_VERSION,
            "model_name": model_name,
            "hook_name": hook_name,
            "token_position": (spec or {}).get("settings", {}).get("train_on", "all"),
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    seal(folder, {"kind": "sae", "version": 1, "spec": spec or {}})


def load_sae(folder: Path | str, record: dict[str, Any] | None = None) -> TopKSAE:
    """Load an SAE that `save_sae` wrote, or one of SAELens that computes the same.

    Args:
        folder: the SAE's folder.
        record: record to check its files against; defaults to the folder's own `manifest.json`, if it has one.

    Raises:
        StoreError: if the folder holds no SAE, its files are damaged or do not match, or its weights have another
            meaning.
    """
    folder = Path(folder)
    try:
        config = json.loads(sae_file(folder, "cfg.json", record).read_text(encoding="utf-8"))
        if other := other_meaning(config):
            settings = ", ".join(f"{key} = {value!r}" for key, value in other.items())
            raise StoreError(
                f"{folder}: cfg.json has {settings}, so its weights have another meaning than ours; convert it with "
                f"`conceptshare sae import {folder} --out FOLDER`"
            )
        tensors = load_file(sae_file(folder, "sae_weights.safetensors", record))
        sae = TopKSAE(config["d_in"], config["d_sae"], config["k"])
        # Strict in names and shapes: the meaning of additional tensors is unknown.
        sae.load_state_dict({"W_enc_T": tensors.pop("W_enc").T, **tensors})
    except StoreError:
        raise
    except Exception as error:  # damaged files raise many types
        message = " ".join(str(error).split())
        raise StoreError(f"{folder}: no readable SAE there ({message}); {ELSEWHERE}") from error
    return sae
