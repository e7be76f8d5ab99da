"""The SAE model, and reading and writing of its folder, which SAELens can read too."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from conceptshare.config.pretrained import other_meaning
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.seals import seal
from conceptshare.sae._activations import Activation, Active, TopK, saved_activation
from conceptshare.sae.folder import ELSEWHERE, sae_file

# The version of SAELens that this layout was tested with.
_SAE_LENS_VERSION = "6.54.12"


class SAE(nn.Module):
    """A sparse autoencoder.

    Args:
        d_in: D, the width of the residual stream.
        d_sae: F, the number of latents.
        activation: selects the latents that reach the decoder.
        generator: random generator for the initial weights; without one they are left uninitialised.
    """

    def __init__(self, d_in: int, d_sae: int, activation: Activation, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if isinstance(activation, TopK) and activation.k > d_sae:
            raise NumericsError(
                f"k = {activation.k} is more than the {d_sae} latents there are; lower k, or raise expansion or "
                f"features"
            )
        self.activation = activation
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
        """``[T, F]`` latents of ``x [T, D]``, after ReLU and before the activation drops any."""
        return torch.relu(torch.addmm(self.b_enc, x - self.b_dec, self.W_enc))

    def active(
        self,
        x: Tensor,
        precision: str = "float32",
        activation: Activation | None = None,
        among: Tensor | None = None,
    ) -> Active:
        """Compute the latents of ``x [T, D]`` that reach the decoder.

        Args:
            x: tokens.
            precision: with bfloat16 or tf32, x and W_enc are rounded for the product that selects the latents; the
                selected values are computed in float32.
            activation: selects the latents; defaults to the model's.
            among: ``[F]`` bool, the latents to choose from; values of other latents are 0. Defaults to all.
        """
        chosen = activation or self.activation
        return Active(*_ActiveLatents.apply(x - self.b_dec, self.W_enc_T, self.b_enc, chosen, precision, among))

    def decode(self, active: Active) -> Tensor:
        """``[T, D]`` reconstruction."""
        return _weighted_sum(active.indices, self.W_dec, active.values, active.starts) + self.b_dec

    def decode_nested(self, active: Active, sizes: Sequence[int]) -> Tensor:
        """``[L + 1, T, D]`` reconstructions by the first ``sizes [L]`` latents each, ascending, and by all of them.

        Each active latent is decoded once: the sums of levels are those of the levels below, and their own latents.
        """
        indices, T, levels = active.indices.flatten(), active.count_tokens(), len(sizes) + 1
        bags = torch.bucketize(indices, indices.new_tensor(sizes), right=True) * T + active.tokens()
        order = bags.argsort(stable=True)
        starts = torch.searchsorted(bags[order], torch.arange(levels * T, device=bags.device))
        parts = _weighted_sum(indices[order], self.W_dec, active.values.flatten()[order], starts)
        of_levels = parts.view(levels, T, -1)
        # On GPUs, torch does not promise that cumsum is deterministic; on CPUs, it sums in float64.
        sums = torch.stack([*accumulate(of_levels)]) if parts.is_cuda else of_levels.cumsum(0)
        return sums + self.b_dec

    def load_saved(self, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors of SAELens's `sae_weights.safetensors`.

        Raises:
            RuntimeError: if names or shapes differ: the meaning of additional tensors is unknown.
        """
        own = self.activation.state_dict()
        named = {f"activation.{name}" if name in own else name: tensor for name, tensor in tensors.items()}
        self.load_state_dict({"W_enc_T": named.pop("W_enc").T, **named})

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` reconstruction of ``x [T, D]``."""
        return self.decode(self.active(x))


class _ActiveLatents(torch.autograd.Function):
    """Active latents of x W_enc + b_enc, with gradients that only touch these."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc_T: Tensor,
        b_enc: Tensor,
        activation: Activation,
        precision: str,
        among: Tensor | None,
    ) -> Active:
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
        active: Active = activation(products)
        if rounded:
            exact = _dots(active, W_enc_T, x) + b_enc[active.indices]
            if among is not None:
                exact = exact.where(among[active.indices], 0)
            active = active._replace(values=torch.relu(exact))
        ctx.save_for_backward(x, W_enc_T, *active)
        ctx.mark_non_differentiable(*(places for places in active[1:] if places is not None))
        return active

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc_T, values, indices, starts = ctx.saved_tensors
        latent_gradients = gradients[0] * (values > 0)
        with torch.enable_grad():
            weights = W_enc_T.detach().requires_grad_()
            x_gradient = _weighted_sum(indices, weights, latent_gradients, starts)
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


def _weighted_sum(indices: Tensor, W: Tensor, weights: Tensor, starts: Tensor | None) -> Tensor:
    """``[T, D]`` sums of each token's rows ``indices`` of ``W [F, D]`` with ``weights``, as in `Active`.

    No row is gathered.
    """
    return embedding_bag(indices, W, starts, per_sample_weights=weights, mode="sum")


def _dots(active: Active, W: Tensor, x: Tensor) -> Tensor:
    """Dot products of ``x [T, D]`` with the active latents' rows of ``W``, in their shape, without gathering rows.

    Computed as the gradient of a weighted sum of these rows with respect to the weights, for the output gradient x.
    """
    indices, starts = active.indices, active.starts
    if starts is None:
        starts = torch.arange(len(x), device=x.device) * indices.shape[1]
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, W, indices.flatten(), starts, active.tokens(), mode=0
    )
    return products.view_as(indices)


def save_sae(sae: SAE, folder: Path, model_name: str, hook_name: str, spec: dict[str, Any] | None = None) -> None:
    """Write `sae_weights.safetensors` and `cfg.json` in the layout of SAELens, and seal the folder in `manifest.json`.

    Args:
        sae: the model.
        folder: the folder to write; other files in it are sealed too.
        model_name: name of the encoder, for other libraries.
        hook_name: name of the layer, for other libraries.
        spec: layer, seed, settings and inputs of the SAE, see `folder.sae_of`.
    """
    d_sae, d_in = sae.W_dec.shape
    activation = sae.activation.for_inference(d_sae)
    tensors = {
        "W_enc": sae.W_enc.detach().contiguous(),
        "W_dec": sae.W_dec.detach(),
        "b_enc": sae.b_enc.detach(),
        "b_dec": sae.b_dec.detach(),
        **activation.state_dict(),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    # Keys in SAELens's order; None for those of other activations, which are left out.
    config = {
        "architecture": activation.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "k": None,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": None,
        "metadata": {
            "sae_lens_version": _SAE_LENS_VERSION,
            "model_name": model_name,
            "hook_name": hook_name,
            "token_position": (spec or {}).get("settings", {}).get("train_on", "all"),
        },
    }
    config = {key: value for key, value in (config | activation.config()).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    seal(folder, {"kind": "sae", "version": 1, "spec": spec or {}})


def load_sae(folder: Path | str, record: dict[str, Any] | None = None) -> SAE:
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
        sae = SAE(config["d_in"], config["d_sae"], saved_activation(config))
        sae.load_saved(tensors)
    except StoreError:
        raise
    except Exception as error:  # damaged files raise many types
        message = " ".join(str(error).split())
        raise StoreError(f"{folder}: no readable SAE there ({message}); {ELSEWHERE}") from error
    return sae
