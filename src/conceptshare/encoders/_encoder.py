"""What an encoder is, whichever library it comes from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from conceptshare.catalog import EncoderSpec
from conceptshare.device import full_float32
from conceptshare.errors import EncoderError

Samples = Sequence[Image.Image] | Sequence[str]

_LOW_PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Batch:
    """Prepared inputs of a forward pass."""

    inputs: dict[str, Tensor]
    mask: Tensor | None
    """``[B, T]`` bool, true for unpadded tokens; none where there is no padding."""
    eot: Tensor | None
    """``[B]`` position of each end-of-text token, for text."""

    def __len__(self) -> int:
        return len(self._first)

    @property
    def pixels(self) -> Tensor:
        """``[B, 3, H, W]`` of pictures, as the model takes them."""
        return self._first

    @property
    def ids(self) -> Tensor:
        """``[B, T]`` token ids of captions."""
        return self.inputs.get("input_ids", self._first)

    @property
    def _first(self) -> Tensor:
        return next(iter(self.inputs.values()))


@dataclass(frozen=True)
class Activations:
    """The residual stream of a batch: for each recorded layer, all positions and the global token."""

    tokens: dict[int, Tensor]
    """``[B, T, D]`` float32 by layer, padding included."""
    global_token: dict[int, Tensor]
    """``[B, D]`` float32 by layer."""
    training: Tensor
    """``[B, T]`` bool: the positions SAEs train on, which are the unpadded tokens and the global token."""
    position: Tensor | None
    """``[B]`` position of the global token; none where it is the mean of the unpadded tokens."""


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder, whose forward pass is observed block by block."""

    spec: EncoderSpec
    device: torch.device
    blocks: Sequence[nn.Module]
    """The modules whose outputs are the residual stream."""
    prepare: Callable[[Samples], Batch]
    """Turns pictures or captions into inputs."""
    forward: Callable[[dict[str, Tensor]], object]
    """Runs the model on inputs that are on its device."""
    batch_first: bool = True
    """Whether blocks give ``[B, T, D]`` and not ``[T, B, D]``."""
    words: Callable[[list[int]], list[str]] | None = None
    """The texts of token ids, for a text encoder."""
    fingerprint: str = ""
    """Digest of the files it was loaded from; empty where they were not recorded."""

    def activations(self, samples: Samples) -> Activations:
        """The residual stream after each recorded layer, from one forward pass.

        Args:
            samples: RGB pictures for an image encoder, captions for a text encoder.

        Raises:
            EncoderError: where a block's output is not a residual stream of the width the catalog says.
        """
        return self.read(self.prepare(samples))

    @torch.inference_mode()
    @full_float32()
    def read(self, batch: Batch) -> Activations:
        """The same of prepared inputs."""
        outputs = self._observe({name: value.to(self.device) for name, value in batch.inputs.items()})
        tokens = {layer: self._residual(layer, outputs[layer], len(batch)) for layer in self.spec.layer_numbers()}
        some = next(iter(tokens.values()))
        mask = torch.ones(some.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
        mask = mask.to(self.device)
        if mask.shape != some.shape[:2]:
            raise EncoderError(
                f"{self.spec.model}: its blocks give {some.shape[1]} positions, where its tokenizer made "
                f"{mask.shape[1]}; such a model cannot be read token by token"
            )
        training, position = self._chosen(mask, batch.eot)
        if position is None:
            weights = mask / mask.sum(1, keepdim=True)
            global_token = {layer: torch.einsum("bt,btd->bd", weights, x) for layer, x in tokens.items()}
            return Activations(tokens, global_token, training, position)
        rows = torch.arange(len(batch), device=self.device)
        return Activations(tokens, {layer: x[rows, position] for layer, x in tokens.items()}, training, position)

    def outline(self, batch: Batch) -> Activations:
        """The same of captions but without any layer, from their tokens alone: the model reads nothing."""
        assert batch.mask is not None
        return Activations({}, {}, *self._chosen(batch.mask.to(self.device), batch.eot))

    def _chosen(self, mask: Tensor, eot: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``[B, T]`` the positions SAEs train on, and ``[B]`` those of the global tokens."""
        position = self._global_position(mask, eot)
        if position is None:
            return mask, None
        training = torch.ones_like(mask) if self.spec.global_token == "reference" else mask.clone()
        training[torch.arange(len(mask), device=self.device), position] = True
        return training, position

    def _observe(self, inputs: dict[str, Tensor]) -> dict[int, Any]:
        outputs: dict[int, Any] = {}

        def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
                if layer in outputs:
                    raise EncoderError(
                        f"{self.spec.model}, layer {layer}: its block runs more than once in a pass, and its layers "
                        f"cannot be told apart; set blocks to modules that run once"
                    )
                first = output[0] if isinstance(output, tuple) and output else output
                # What follows a convolution often works in place. Copying every transformer's blocks would cost time.
                outputs[layer] = first.clone() if isinstance(first, Tensor) and first.ndim == 4 else first

            return hook

        hooks = [self.blocks[n].register_forward_hook(keep(n)) for n in self.spec.layer_numbers()]
        low = _LOW_PRECISION.get(self.spec.precision)
        try:
            with torch.autocast(self.device.type, low, enabled=low is not None):
                self.forward(inputs)
        except EncoderError:
            raise
        except torch.OutOfMemoryError as error:
            raise EncoderError(f"{self.spec.model}: the GPU's memory is too small; lower batch_size") from error
        except Exception as error:  # model code raises whatever it meets
            raise EncoderError(
                f"{self.spec.model}: its forward pass fails ({type(error).__name__}: {str(error).strip()}); check its "
                f"modality, image_size and context_length, and that its tokenizer is its own"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        idle = [layer for layer in self.spec.layer_numbers() if layer not in outputs]
        if idle:
            raise EncoderError(
                f"{self.spec.model}, layer {idle[0]}: its block takes no part in the forward pass; set blocks to the "
                f"module list that does"
            )
        return outputs

    def _residual(self, layer: int, output: Any, samples: int) -> Tensor:
        x: Tensor = output
        if isinstance(x, Tensor) and x.ndim == 4:
            # A grid of tokens, with the width behind the samples (convolutions) or last.
            if x.shape[1] == x.shape[3] == self.spec.width:
                raise EncoderError(
                    f"{self.spec.model}, layer {layer}: width and sides of its grid {list(x.shape)} cannot be told "
                    f"apart; set image_size to another"
                )
            x = x.flatten(2).transpose(1, 2) if x.shape[1] == self.spec.width else x.flatten(1, 2)
        elif isinstance(x, Tensor) and x.ndim == 3:
            x = x if self.batch_first else x.transpose(0, 1)
        else:
            raise EncoderError(f"{self.spec.model}, layer {layer}: no residual stream [B, T, D]; set blocks")
        if x.shape[2] != self.spec.width:
            raise EncoderError(
                f"{self.spec.model}, layer {layer}: width {x.shape[2]}, where its entry says {self.spec.width}; "
                f"set width: {x.shape[2]}"
            )
        if x.shape[0] != samples:
            raise EncoderError(f"{self.spec.model}, layer {layer}: {x.shape[0]} rows for {samples} samples")
        return x.float()

    def _global_position(self, mask: Tensor, eot: Tensor | None) -> Tensor | None:
        """``[B]`` positions of the global tokens; none where it is the mean of all."""
        match self.spec.global_token:
            case "first":
                return mask.int().argmax(1)  # some tokenizers pad on the left
            case "reference":
                return torch.zeros(len(mask), dtype=torch.long, device=self.device)
            case "last":
                return torch.full((len(mask),), mask.shape[1] - 1, device=self.device)
            case "eot":
                if eot is None:
                    raise EncoderError(f"{self.spec.model}: images have no end of text; set global_token")
                return eot.to(self.device)
            case "mean":
                return None


def find_blocks(tower: nn.Module, spec: EncoderSpec) -> list[nn.Module]:
    """The encoder's blocks: the module list at ``spec.blocks``, or the longest run of modules of one class.

    Raises:
        EncoderError: where there are not as many as the catalog says, or none at that path.
    """
    lists = {
        name: list(module.children())
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    if spec.blocks is not None:
        place = spec.blocks
        try:
            blocks = list(tower.get_submodule(place).children())
        except AttributeError:
            known = ", ".join(name for name, run in lists.items() if len(run) > 1)
            raise EncoderError(f"{spec.model}: no module at blocks: {place}; lists are at: {known}") from None
    else:
        alike = {name: run for name, run in lists.items() if len({type(block) for block in run}) == 1}
        place, blocks = max(alike.items(), key=lambda named: len(named[1]), default=("", []))
    if len(blocks) != spec.layers:
        raise EncoderError(
            f"{spec.model}: {len(blocks)} blocks found{f' at {place}' if place else ''}, where its entry says layers: "
            f"{spec.layers}; set layers: {len(blocks)} if those are its blocks, or blocks to the path of the right "
            f"module list"
        )
    return blocks
