"""The model, and the folder that holds one, which SAELens reads too."""

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

# The layout that this file writes was tried with this version of SAELens.
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
        k: latents kept for a token.
        generator: source of the initial weights; without one they are left unset, to be loaded.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if k > d_sae:
            raise NumericsError(f"k = {k} is more than the {d_sae} latents there are; lower k or raise expansion")
        self.k = k
        # One row a latent, as in the decoder: an active latent's weights lie together.
        self.W_enc_T = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae), requires_grad=False)
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if generator is not None:
            with torch.no_grad():
                # Of a [D, F] array, whose fan-in torch takes to be F: bounds are sqrt(6 / F), as in the paper's code.
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
        """The k largest latents of each row of ``x [T, D]``.

        Args:
            x: tokens.
            precision: with bfloat16 or tf32, x and W_enc are rounded to it for the product that chooses the latents;
                their values are computed in float32 all the same.
            k: how many; the model's own k without it.
            among: ``[F]`` bool, the latents to choose from. Of others, values are 0. Without it, all.
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
    """TopK(ReLU(x W_enc + b_enc)), whose gradients touch only the latents that were kept."""

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
        # d/dW of sum_j g_j W_j, fed with x, is the sum over tokens of g_j x: the encoder's gradient.
        (W_gradient,) = torch.autograd.grad(x_gradient, weights, grad_outputs=x)
        b_gradient = None
        if ctx.needs_input_grad[2]:
            b_gradient = _added_up(indices.flatten(), latent_gradients.flatten(), len(W_enc_T))
        return x_gradient.detach(), W_gradient, b_gradient, None, None, None


def _added_up(indices: Tensor, values: Tensor, count: int) -> Tensor:
    """``[count]`` sums of the values of each index, the same bits each time."""
    total = values.new_zeros(count)
    if values.is_cuda:  # where index_add_ adds in any order, and index_put_ sorts
        return total.index_put_((indices,), values, accumulate=True)
    return total.index_add_(0, indices, values)


@contextmanager
def _tf32() -> Iterator[None]:
    """Let GPUs keep ten bits of each factor of a product, in all threads of the process."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _weighted_sum(indices: Tensor, W: Tensor, weights: Tensor) -> Tensor:
    """``[T, D]`` sums of the rows ``indices [T, k]`` of ``W [F, D]`` by ``weights [T, k]``, without gathering them."""
    return embedding_bag(indices, W, per_sample_weights=weights, mode="sum")


def _dots(indices: Tensor, W: Tensor, x: Tensor) -> Tensor:
    """``[T, k]`` products of ``x [T, D]`` with the rows ``indices [T, k]`` of ``W``, without gathering them.

    They are the gradients of a weighted sum of those rows, fed with x, for its weights.
    """
    with torch.enable_grad():
        weights = torch.zeros(indices.shape, device=x.device, requires_grad=True)
        total = _weighted_sum(indices, W.detach(), weights)
    (products,) = torch.autograd.grad(total, weights, grad_outputs=x)
    return products


def save_sae(sae: TopKSAE, folder: Path, model_name: str, hook_name: str, spec: dict[str, Any] | None = None) -> None:
    """Write `sae_weights.safetensors` and `cfg.json` in the layout of SAELens, and seal the folder in `manifest.json`.

    Args:
        sae: the model.
        folder: where to write. What else is there is sealed, too.
        model_name: of the encoder, for other libraries.
        hook_name: of the layer, for other libraries.
        spec: what it is and was made from, as `sae_folder.sae_record` has it.
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
            "token_position": "all",
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    seal(folder, {"kind": "sae", "version": 1, "spec": spec or {}})


def load_sae(folder: Path | str, record: dict[str, Any] | None = None) -> TopKSAE:
    """Load an SAE that `save_sae` wrote, or one of SAELens's that computes the same.

    Args:
        folder: where it is.
        record: what its files are compared with; without it, the folder's own `manifest.json`, if it has one.

    Raises:
        StoreError: where the folder holds none, its files are damaged or do not fit one another, or its weights mean
            something else.
    """
    folder = Path(folder)
    try:
        config = json.loads(sae_file(folder, "cfg.json", record).read_text(encoding="utf-8"))
        if other := other_meaning(config):
            said = ", ".join(f"{key} = {value!r}" for key, value in other.items())
            raise StoreError(
                f"{folder}: cfg.json says {said}, so that its weights mean something else here; convert it with "
                f"`conceptshare sae import {folder} --out FOLDER`"
            )
        tensors = load_file(sae_file(folder, "sae_weights.safetensors", record))
        sae = TopKSAE(config["d_in"], config["d_sae"], config["k"])
        # Strict in names and shapes: a tensor of another library's would have a meaning that is not known here.
        sae.load_state_dict({"W_enc_T": tensors.pop("W_enc").T, **tensors})
    except StoreError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        said = " ".join(str(error).split())
        raise StoreError(f"{folder}: no readable SAE there ({said}); {ELSEWHERE}") from error
    return sae
