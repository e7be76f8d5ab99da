"""Step-by-step training of one SAE."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.config.settings import SAESettings
from conceptshare.sae._activations import Active, BatchTopK, TopK
from conceptshare.sae._model import SAE

_STEPS_BETWEEN_CHECKS = 50
_ACTIVATIONS = {"topk": TopK, "batchtopk": BatchTopK}


class Trainer:
    """Trains one SAE batch by batch, and holds all training state.

    Args:
        width: D.
        settings: size and optimisation.
        seed: seed of the initial weights.
        steps: total number of steps.
        device: device to train on.
    """

    def __init__(self, width: int, settings: SAESettings, seed: int, steps: int, device: torch.device) -> None:
        self._settings = settings
        generator = torch.Generator().manual_seed(seed)
        activation = _ACTIVATIONS[settings.activation](settings.k)
        self.sae = SAE(width, settings.latents(width), activation, generator).to(device)
        self.sae.b_enc.requires_grad_(settings.encoder_bias)
        trained = [parameter for parameter in self.sae.parameters() if parameter.requires_grad]
        self._rate = settings.rate(len(self.sae.W_dec))
        self._adam = torch.optim.Adam(trained, lr=self._rate, fused=True)
        self.losses = torch.zeros(steps, device=device)
        """``[steps]`` mean squared error of each step so far; 0 for steps to come."""
        self.step = 0
        """Number of finished steps."""
        # Trained on (x - shift) * scale.
        self._shift = torch.zeros(width, device=device)
        self._scale = torch.ones(width if settings.standardise else (), device=device)
        # Numbers of tokens that were trained on, and left out.
        self._seen = 0
        self._outlying = torch.zeros((), dtype=torch.int64, device=device)
        # The token count at which each latent was last active, and whether any latent was dead at the last check.
        self._last_active = torch.zeros(len(self.sae.W_dec), dtype=torch.int64, device=device)
        self._some_dead = False

    @property
    def outlying(self) -> float:
        """Fraction of the tokens so far that `max_norm` left out."""
        left_out = int(self._outlying)
        return left_out / max(left_out + self._seen, 1)

    def train_on(self, x: Tensor, global_rows: NDArray[np.int64] | None = None) -> None:
        """Train for one step on the tokens ``x [T, D]``, of any floating-point type and on any device.

        ``global_rows [n]`` are the rows of global tokens, which only ``global_weight`` and ``max_norm`` need.
        """
        x, weights = self._chosen(x.to(self.losses.device).float(), global_rows)
        self._seen += len(x)
        if self.step == 0:
            self._initialize(x)
        if self._settings.scale_inputs or self._settings.standardise:
            x = (x - self._shift) * self._scale
        active = self.sae.active(x, self._settings.precision)
        self.sae.activation.track(active)
        *inner, reconstruction = self._reconstructions(active)
        error = reconstruction - x
        loss = mean_square(error, weights)
        unscaled = mean_square(error / self._scale, weights) if self._settings.standardise else loss / self._scale**2
        self.losses[self.step] = unscaled.detach()
        for nested in inner:
            loss = loss + mean_square(nested - x, weights)
        if self._settings.auxk:
            self._track_activity(active)
            if self._some_dead:
                loss = loss + self._settings.auxk * self._auxiliary_loss(x, reconstruction, weights)
        torch.autograd.backward(loss)
        self._update()
        self._adam.zero_grad()
        self.step += 1

    def _reconstructions(self, active: Active) -> list[Tensor]:
        """``[T, D]`` reconstructions by nested numbers of latents (Matryoshka), and last by all."""
        sizes = [size for size in self._settings.matryoshka if size < len(self.sae.W_dec)]
        return [*self.sae.decode_nested(active, sizes)] if sizes else [self.sae.decode(active)]

    def finish(self) -> SAE:
        """Return the SAE with its activation for inference, and for tokens as they are.

        Scaling and standardising are folded into its weights:
        ((x - shift) * scale - b_dec) W_enc = (x - (b_dec / scale + shift)) (scale * W_enc), so b_enc stays the same.
        """
        with torch.no_grad():
            self.sae.W_enc_T.mul_(self._scale)
            self.sae.W_dec.div_(self._scale)
            self.sae.b_dec.div_(self._scale).add_(self._shift)
            self._scale.fill_(1)
            self._shift.zero_()
        self.sae.activation = self.sae.activation.for_inference(len(self.sae.W_dec))
        return self.sae

    @torch.no_grad()
    def standardise(self, tokens: Iterable[Tensor]) -> None:
        """Standardise each dimension by its mean and standard deviation over ``tokens [rows, D]``, in float64.

        Dimensions that do not vary get no weights, and keep none: the SAE ignores them, and reconstructs their mean.
        """
        rows, (first, total, squares) = 0, self._shift.new_zeros(3, len(self._shift), dtype=torch.float64)
        for batch in tokens:
            x = batch.to(first.device).double()
            if not rows:
                first.copy_(x[0])
            # Differences from the first token are exactly 0 in dimensions that do not vary.
            differences = x - first
            rows += len(x)
            total += differences.sum(0)
            squares += differences.square().sum(0)
        deviation = (squares / rows - (total / rows) ** 2).clamp(min=0).sqrt()
        self._shift.copy_(first + total / rows)
        self._scale.copy_(torch.where(deviation > 0, 1 / deviation, 1))
        for weights in (self.sae.W_enc_T, self.sae.W_dec):
            weights.mul_(deviation > 0)

    def _chosen(self, x: Tensor, global_rows: NDArray[np.int64] | None) -> tuple[Tensor, Tensor | None]:
        """Rows of ``x [T, D]`` to train on, and their weights in the loss, which sum to 1; None if all are equal."""
        weight, bound = self._settings.global_weight, self._settings.max_norm
        if weight == 1 and bound is None:
            return x, None
        is_global = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        is_global[torch.as_tensor(global_rows, device=x.device)] = True
        if bound is not None:
            norms = x.norm(dim=1)
            outlying = (norms > bound * norms.median()) & ~is_global
            self._outlying += outlying.sum()
            x, is_global = x[~outlying], is_global[~outlying]
        if weight == 1:
            return x, None
        weights = torch.where(is_global, weight, 1.0)
        return x, weights / weights.sum()

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if self._settings.standardise and self._settings.train_on == "all":
            self.standardise([x])
        if self._settings.scale_inputs:
            self._scale.copy_(x.shape[1] ** 0.5 / x.norm(dim=1).mean())
        if self._settings.initial_b_dec == "mean":
            self.sae.b_dec.copy_((x.mean(0) - self._shift) * self._scale)

    @torch.no_grad()
    def _update(self) -> None:
        if self._settings.unit_norm_decoder:
            # Remove the gradient component along each row, which would only change its norm, from Adam's moments.
            W, gradient = self.sae.W_dec, self.sae.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * W).sum(1, keepdim=True) * W
        if self._settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self._settings.clip_norm, foreach=True)
        for group in self._adam.param_groups:
            group["lr"] = self._rate * rate_share(self.step, len(self.losses), self._settings)
        self._adam.step()
        if self._settings.unit_norm_decoder:
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def _track_activity(self, active: Active) -> None:
        now = torch.where(active.values > 0, self._seen, 0)
        self._last_active.scatter_reduce_(0, active.indices.flatten(), now.flatten(), "amax")
        if self.step % _STEPS_BETWEEN_CHECKS == 0:  # the check synchronizes with the GPU
            self._some_dead = bool(self._dead().any())

    def _dead(self) -> Tensor:
        return self._seen - self._last_active > self._settings.dead_after

    def _auxiliary_loss(self, x: Tensor, reconstruction: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean squared error of the residual's reconstruction by dead latents, without b_dec (AuxK)."""
        k = min(self._settings.auxk_latents, len(self.sae.W_dec))
        active = self.sae.active(x, self._settings.precision, TopK(k), among=self._dead())
        residual = (x - reconstruction).detach()
        return mean_square(self.sae.decode(active) - self.sae.b_dec - residual, weights)

    def state(self) -> dict[str, Tensor]:
        """Return the training state, on the CPU."""
        state = {f"sae.{name}": x for name, x in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state |= {f"adam.{name}.{key}": x for key, x in self._adam.state.get(parameter, {}).items()}
        state |= {"losses": self.losses, "shift": self._shift, "scale": self._scale, "last_active": self._last_active}
        state |= {"outlying": self._outlying}
        counts = {"step": self.step, "seen": self._seen, "some_dead": self._some_dead}
        state |= {name: torch.tensor(int(count)) for name, count in counts.items()}
        return {name: x.detach().cpu().contiguous() for name, x in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Resume from a state."""
        weights = {name.removeprefix("sae."): x for name, x in state.items() if name.startswith("sae.")}
        self.sae.load_state_dict(weights)
        for name, parameter in self.sae.named_parameters():
            start = f"adam.{name}."
            own = {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}
            if own:
                self._adam.state[parameter] = {
                    key: x if key == "step" and parameter.device.type == "cpu" else x.to(parameter.device)
                    for key, x in own.items()
                }
        self.losses.copy_(state["losses"])
        self._shift.copy_(state["shift"])
        self._scale.copy_(state["scale"])
        self._last_active.copy_(state["last_active"])
        self._outlying.copy_(state["outlying"])
        self.step, self._seen, self._some_dead = int(state["step"]), int(state["seen"]), bool(state["some_dead"])


def mean_square(error: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean square of ``error [T, D]``: with ``weights [T]`` that sum to 1, sum_t w_t |error_t|^2 / D."""
    return error.square().mean() if weights is None else (weights * error.square().mean(1)).sum()


def rate_share(step: int, steps: int, settings: SAESettings) -> float:
    """Factor on the learning rate at a step, counted from 0: linear warmup, then constant, then linear decay."""
    rising = (step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0
    falling = (steps - step) / (settings.decay_share * steps) if settings.decay_share else 1.0
    return min(rising, falling, 1.0)
