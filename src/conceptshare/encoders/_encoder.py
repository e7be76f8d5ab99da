"""Common interface of encoders from all libraries."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from conceptshare.config.catalog import EncoderSpec
from conceptshare.device import full_float32
from conceptshare.io.errors import EncoderError
from conceptshare.io.progress import warn

Samples = Sequence[Image.Image] | Sequence[str]

# Number of words in the longest caption that a loaded encoder is tested on.
_TEST_WORDS = 520

# Names of class token parameters in the libraries.
_CLASS_TOKEN = re.compile(r"(^|[._])(cls|class)_?(token|emb)")

_LOW_PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class UnlikeImagesError(EncoderError):
    """An image processor keeps the aspect ratio, and images of different sizes cannot be batched."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(
            f"{spec.model}: its image processor keeps the aspect ratio, and images of different sizes cannot share "
            f"a batch; set batch_size: 1"
        )


@dataclass(frozen=True)
class Batch:
    """Prepared inputs of a forward pass."""

    inputs: dict[str, Tensor]
    mask: Tensor | None = None
    """``[B, T]`` bool, true for unpadded tokens; None if there is no padding."""
    image_tokens: Tensor | None = None
    """``[B, T]`` bool, true for the tokens of an image in a prompt; None if the inputs are not prompts with images."""

    def __len__(self) -> int:
        return len(self._first)

    @property
    def pixels(self) -> Tensor:
        """``[B, 3, H, W]`` pixels of images, as passed to the model."""
        return self.inputs.get("pixel_values", self._first)

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
    """``[B, T]`` bool: the positions SAEs train on, which are the unpadded tokens and the global token. ``[B, 0]`` if
    layers have several widths and numbers of tokens."""
    position: Tensor | None
    """``[B]`` position of the global token; None if it is the mean or maximum of the unpadded tokens."""
    grids: frozenset[int] = frozenset()
    """If layers have several widths, those whose tokens are a square grid, row by row."""


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder that records the output of each block during a forward pass."""

    spec: EncoderSpec
    device: torch.device
    blocks: Sequence[nn.Module]
    """The modules whose outputs are the residual stream."""
    prepare: Callable[[Samples], Batch]
    """Converts images or captions to inputs."""
    forward: Callable[[dict[str, Tensor]], object]
    """Runs the model on inputs that are on its device."""
    batch_first: bool = True
    """Whether blocks return ``[B, T, D]`` instead of ``[T, B, D]``."""
    words: Callable[[list[int]], list[str]] | None = None
    """Converts token ids to texts, for a text encoder."""
    attends_to_padding: bool = False
    """Whether the model was trained on padded texts, so that the last position represents a text even if it is
    padding."""
    class_token: bool = True
    """Whether an image model may have a class token, according to its parameters' names."""
    fingerprint: str = ""
    """Digest of the files it was loaded from; empty if they were not recorded."""

    def activations(self, samples: Samples) -> Activations:
        """Compute the residual stream after each recorded layer in one forward pass.

        Args:
            samples: RGB images for an image encoder, captions for a text encoder.

        Raises:
            EncoderError: if the blocks' outputs are not one residual stream of the width in the catalog.
        """
        return self.read(self.prepare(samples))

    @torch.inference_mode()
    @full_float32()
    def read(self, batch: Batch) -> Activations:
        """Like `activations`, for prepared inputs."""
        outputs = self._observe({name: value.to(self.device) for name, value in batch.inputs.items()})
        tokens = {layer: self.residual(layer, outputs[layer], len(batch)) for layer in self.spec.layer_numbers()}
        self._check_sizes(tokens)
        if isinstance(self.spec.width, list):
            whole = {layer: torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) for layer, x in tokens.items()}
            none = torch.ones(len(batch), 0, dtype=torch.bool, device=self.device)
            grids = frozenset(layer for layer in tokens if outputs[layer].ndim == 4)
            return Activations(tokens, {n: self._pooled(x, whole[n]) for n, x in tokens.items()}, none, None, grids)
        some = next(iter(tokens.values()))
        mask = torch.ones(some.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
        mask = mask.to(self.device)
        if mask.shape != some.shape[:2]:
            raise EncoderError(
                f"{self.spec.model}: its blocks return {some.shape[1]} positions, but its tokenizer made "
                f"{mask.shape[1]}; such a model cannot be read token by token, use another encoder"
            )
        training, position = self._chosen(mask)
        if position is None:
            global_token = {layer: self._pooled(x, mask) for layer, x in tokens.items()}
            return Activations(tokens, global_token, training, position)
        rows = torch.arange(len(batch), device=self.device)
        return Activations(tokens, {layer: x[rows, position] for layer, x in tokens.items()}, training, position)

    def outline(self, batch: Batch) -> Activations:
        """Like `read` for captions, but without any layer: only uses the tokenizer's output, the model is not run."""
        assert batch.mask is not None
        return Activations({}, {}, *self._chosen(batch.mask.to(self.device)))

    def _chosen(self, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[B, T]`` mask of the positions SAEs train on, and ``[B]`` positions of the global tokens."""
        position = self._global_position(mask)
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
                        f"{self.spec.model}, layer {layer}: its block runs more than once per forward pass, so its "
                        f"layers cannot be distinguished; set blocks to modules that run once, or, if its layers share "
                        f"one block as in ALBERT, use another encoder"
                    )
                first = output
                while isinstance(first, tuple | list) and first:
                    first = first[0]
                # Modules after a convolution often work in place, so copy. Copying all blocks would cost time.
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
            raise EncoderError(f"{self.spec.model}: the GPU is out of memory; lower batch_size") from error
        except Exception as error:  # model code raises many types
            # Some models fill a 16-bit tensor with the smallest float32 number.
            first = "" if low is None else "set precision: float32; if that fails too, "
            raise EncoderError(
                f"{self.spec.model}: its forward pass fails ({type(error).__name__}: {in_one_line(error)}); "
                f"{first}check its modality, image_size and context_length, and that its tokenizer is its own"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        idle = [layer for layer in self.spec.layer_numbers() if layer not in outputs]
        if idle:
            raise EncoderError(
                f"{self.spec.model}, layer {idle[0]}: its block is not called in the forward pass; set blocks to the "
                f"module list that is, or use another encoder if there is none"
            )
        return outputs

    def residual(self, layer: int, output: Any, samples: int) -> Tensor:
        """Convert a block's output to tokens ``[B, T, D]`` in float32."""
        x: Tensor = output
        if isinstance(x, Tensor) and x.ndim == 4:
            # A grid of tokens. The width is the second axis (convolutions) or the last: the one that is not a side.
            _, a, b, c = x.shape
            if (a == b) == (b == c):
                raise EncoderError(
                    f"{self.spec.model}, layer {layer}: width and sides of its grid {list(x.shape)} cannot be "
                    f"distinguished; set image_size to another value, for a square grid"
                )
            if is_position(self.spec):
                raise EncoderError(
                    f"{self.spec.model}, layer {layer}: its block returns a grid of patches without a token for the "
                    f"whole image; set global_token: mean"
                )
            x = x.flatten(2).transpose(1, 2) if b == c else x.flatten(1, 2)
        elif isinstance(x, Tensor) and x.ndim == 3:
            x = x if self.batch_first else x.transpose(0, 1)
        else:
            raise EncoderError(f"{self.spec.model}, layer {layer}: no residual stream [B, T, D]; set blocks")
        if x.shape[0] != samples:
            joined = x.shape[0] == 1  # as in Pixtral, which joins the images of a batch into one sequence
            raise EncoderError(
                f"{self.spec.model}, layer {layer}: {x.shape[0]} rows for {samples} samples; set "
                f"{'batch_size: 1' if joined else 'blocks'}"
            )
        return x.float()

    def _check_sizes(self, tokens: dict[int, Tensor]) -> None:
        """Raise an EncoderError if layers differ in size, or their width is not that in the catalog."""
        sizes = {layer: (x.shape[1], x.shape[2]) for layer, x in tokens.items()}
        widths = [sizes[n][1] if n in sizes else self.spec.width_of(n) for n in range(self.spec.layers)]
        if isinstance(self.spec.width, list):
            if widths != self.spec.width:
                raise EncoderError(
                    f"{self.spec.model}: its layers have other widths than its entry; set width: {widths}"
                )
            return
        last, (length, width) = next(reversed(sizes.items()))
        other = next((layer for layer, size in sizes.items() if size != (length, width)), None)
        if other is not None:
            raise EncoderError(
                f"{self.spec.model}: layer {other} has {sizes[other][0]} tokens of width {sizes[other][1]}, layer "
                f"{last} {length} of width {width}: not one residual stream; record layers of the same size, such as "
                f"the last: use_layers: last, width: {width}; or compare their mean tokens: global_token: mean, width: "
                f"{widths}"
            )
        if width != self.spec.width:
            raise EncoderError(
                f"{self.spec.model}, layer {min(sizes)}: width {width}, but its entry has {self.spec.width}; set "
                f"width: {width}"
            )

    def _pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, D]`` mean or maximum of the unpadded tokens of ``x [B, T, D]`` in each dimension."""
        if self.spec.global_token == "max":
            return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
        return torch.einsum("bt,btd->bd", mask / mask.sum(1, keepdim=True), x)

    def _global_position(self, mask: Tensor) -> Tensor | None:
        """``[B]`` positions of the global tokens; None if the global token is computed from all tokens."""
        final = mask.shape[1] - 1
        match self.spec.global_token:
            case "first":
                return mask.int().argmax(1)  # some tokenizers pad on the left
            case "reference":
                return torch.zeros(len(mask), dtype=torch.long, device=self.device)
            case "last_token":
                return final - mask.flip(1).int().argmax(1)
            case "last_position":
                if not (self.attends_to_padding or mask[:, -1].all()):
                    raise EncoderError(
                        f"{self.spec.model}: its last position is padding, which it does not read; set global_token: "
                        f"last_token"
                    )
                return torch.full((len(mask),), final, device=self.device)
            case "mean" | "max" | "given":
                return None


def is_position(spec: EncoderSpec) -> bool:
    """Whether the global token is one that the model itself uses for a whole sample."""
    return spec.global_token in {"first", "last_token", "last_position"}


def preparing_images(transform: Callable[[Any], Tensor], spec: EncoderSpec) -> Callable[[Samples], Batch]:
    """Return a ``prepare`` for `Encoder` with a transform to ``[3, H, W]`` pixels; it rejects pixels of other sizes."""

    def prepare(samples: Samples) -> Batch:
        images = [transform(sample) for sample in samples]
        if len({image.shape for image in images}) > 1:
            raise UnlikeImagesError(spec)
        return Batch({"pixel_values": torch.stack(images)})

    return prepare


def in_one_line(error: BaseException) -> str:
    """The message of a library's error on one line, truncated to a readable length."""
    message = " ".join(str(error).split())
    return message if len(message) <= 600 else f"{message[:600]} ..."


def ensure_pad_token(tokenizer: Any, vocabulary: int | None = None) -> None:
    """Set a padding token if the tokenizer has none, as in most language models: the end of text or any other token.

    A padding token that is not among the model's ``vocabulary`` first ids is replaced too. Padding follows the text and
    is masked, so the choice of token has no effect.
    """

    def usable(token: str | None) -> bool:
        return token is not None and (vocabulary is None or tokenizer.convert_tokens_to_ids(token) < vocabulary)

    if not usable(tokenizer.pad_token):
        others = [tokenizer.eos_token, *tokenizer.all_special_tokens, tokenizer.convert_ids_to_tokens(0)]
        tokenizer.pad_token = next(filter(usable, others))


def check_reading(encoder: Encoder) -> None:
    """Test an encoder on two samples, separately and in one batch, and check that the results agree.

    Raises:
        EncoderError: if its blocks are not one residual stream of the width in its entry, a sample's residual stream
            depends on the others in its batch, or the model does not run in its precision.
    """
    spec = encoder.spec
    exact = replace(encoder, spec=spec.model_copy(update={"precision": "float32"}))
    samples = samples_for_tests(spec)
    apart = [exact.activations(samples[n : n + 1]) for n in range(len(samples))]
    if spec.precision != "float32":
        encoder.activations(samples[:1])
    if spec.modality == "text":
        exact.activations([" ".join(["dog"] * _TEST_WORDS)])  # fails if the model has fewer positions than configured
    # The last token of a prompt reads the image before it.
    if spec.modality == "image" and is_position(spec) and not (spec.template and spec.global_token != "first"):
        _check_class_token(exact)
    if spec.batch_size == 1:
        return
    try:
        together = exact.activations(samples)
    except UnlikeImagesError as error:
        warn(f"{error}, unless all images of the data set are of one size")
        return
    if spec.global_token == "reference":  # like the paper's code, which also reads padding
        mask = exact.prepare(samples).mask
        if mask is not None and not mask[:, 0].all():
            warn(f"{spec.model}: its tokenizer pads on the left, so global_token: reference reads padding")
        return
    for n, single in enumerate(apart):
        for layer in together.tokens:
            own = torch.cat([_trained(single, layer, 0), single.global_token[layer]])
            shared = torch.cat([_trained(together, layer, n), together.global_token[layer][n : n + 1]])
            # Rounding changes a token by 1e-5; shifted positions or attended padding change it by several percent.
            if own.shape != shared.shape or ((own - shared).norm(dim=1) > 0.01 * own.norm(dim=1)).any():
                raise EncoderError(
                    f"{spec.model}, layer {layer}: a sample's residual stream depends on the padding of its batch; set "
                    f"batch_size: 1 to avoid padding"
                )

    if all((x[0] - x[1]).norm() <= 1e-5 * x[0].norm() for x in together.global_token.values()):
        other = "last_token" if spec.modality == "text" else "mean"
        warn(f"{spec.model}: its global token is the same for two samples; unless intended, set global_token: {other}")


def _trained(activations: Activations, layer: int, sample: int) -> Tensor:
    """``[n, D]`` tokens of a sample that SAEs train on, except for a global token that is none of them."""
    of_sample = activations.training[sample]
    return activations.tokens[layer][sample, : len(of_sample)][of_sample]


def has_class_token(tower: nn.Module) -> bool:
    """Whether an image tower has a class token among its parameters."""
    return any(_CLASS_TOKEN.search(name) for name, _ in tower.named_parameters())


@torch.inference_mode()
def _check_class_token(encoder: Encoder) -> None:
    """Raise an EncoderError if the global token of an image encoder is a patch or register.

    Unlike patches, a class token is the same for all images when it enters the blocks.
    """
    entering: list[list[Tensor]] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
        if x is not None and x.ndim == 3:
            entering[-1].append(x.clone() if encoder.batch_first else x.transpose(0, 1).clone())

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in encoder.blocks]
    rng = np.random.default_rng(0)
    try:
        for _ in range(2):
            entering.append([])
            image = Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8))
            result = encoder.activations([image])
    finally:
        for hook in hooks:
            hook.remove()
    assert result.position is not None
    position, shape = int(result.position[0]), next(iter(result.tokens.values())).shape[:2]
    pairs = [(a[0, position], b[0, position]) for a, b in zip(*entering, strict=True) if a.shape[:2] == shape]
    patch = pairs and not any(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    if patch or not encoder.class_token:
        which = "first token" if encoder.spec.global_token == "first" else encoder.spec.global_token.replace("_", " ")
        raise EncoderError(
            f"{encoder.spec.model}: its {which} is none for the whole image, such as a class token; set global_token: "
            f"{'last_token' if encoder.spec.template else 'mean'}"
        )


def samples_for_tests(spec: EncoderSpec) -> Samples:
    """Two captions of different lengths, or two images of different aspect ratios."""
    if spec.modality == "text":
        return ["a dog", "a cat and a dog on a mat"]
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy())]


def find_blocks(tower: nn.Module, spec: EncoderSpec) -> list[nn.Module]:
    """Find the encoder's blocks: the module list at ``spec.blocks``, or the longest list of modules of one class.

    Raises:
        EncoderError: if their number is not that in the catalog, or there are none at that path.
    """
    lists = {
        name: list(module.children())
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    if isinstance(spec.blocks, list):
        return _blocks_at(spec.blocks, tower, spec)
    if spec.blocks is not None:
        place = spec.blocks
        known = ", ".join(name for name, run in lists.items() if len(run) > 1)
        try:
            module = tower.get_submodule(place)
        except AttributeError:
            raise EncoderError(f"{spec.model}: no module at blocks: {place}; lists are at: {known}") from None
        blocks = list(module.children())
        if blocks and not _is_list(module, blocks):
            raise EncoderError(f"{spec.model}: blocks: {place} is not a list of blocks; lists are at: {known}")
    else:
        kinds = {name: {type(block) for block in run} for name, run in lists.items()}
        # A list of lists is not run itself.
        alike = {name: run for name, run in lists.items() if len(kinds[name]) == 1 and nn.ModuleList not in kinds[name]}
        place, blocks = max(alike.items(), key=lambda named: len(named[1]), default=("", []))
        stages = [name for name, run in alike.items() if blocks and type(run[0]) is type(blocks[0])]
        if len(stages) > 1:
            # The list that contains the stages, if it holds modules that run.
            around = [n for n in lists if nn.ModuleList not in kinds[n] and all(s.startswith(f"{n}.") for s in stages)]
            last = max(around, key=len, default=stages[-1])
            shown = ", ".join(stages[:4]) + (", ..." if len(stages) > 4 else "")
            raise EncoderError(
                f"{spec.model}: its blocks are in {len(stages)} stages ({shown}), which differ in width "
                f"or number of tokens, so it has no single residual stream; record the ends of stages, by a list of "
                f"them as blocks and a list of their widths as width, or only the last stage: blocks: {last}, layers: "
                f"{len(lists[last])}, use_layers: last; or use an encoder with one stack of blocks, such as a ViT"
            )
    if not blocks:
        raise EncoderError(
            f"{spec.model}: no blocks found{f' at {place}' if place else ''}; correct the number of layers in the "
            f"model's config.json, or set blocks to the path of its module list"
        )
    if len(blocks) != spec.layers:
        raise EncoderError(
            f"{spec.model}: {len(blocks)} blocks found{f' at {place}' if place else ''}, but its entry has layers: "
            f"{spec.layers}; set layers: {len(blocks)} if those are its blocks, or blocks to the path of the right "
            f"module list"
        )
    return blocks


def _blocks_at(places: list[str], tower: nn.Module, spec: EncoderSpec) -> list[nn.Module]:
    """The modules at the paths of blocks."""
    known = dict(tower.named_modules())
    missing = next((place for place in places if place not in known), None)
    if missing is not None:
        parts = ", ".join(name for name, _ in tower.named_children())
        raise EncoderError(f"{spec.model}: no module at blocks: {missing}; its parts are: {parts}")
    if len(places) != spec.layers:
        raise EncoderError(
            f"{spec.model}: blocks has {len(places)} paths, but its entry has layers: {spec.layers}; set layers: "
            f"{len(places)}"
        )
    return [known[place] for place in places]


def _is_list(module: nn.Module, parts: list[nn.Module]) -> bool:
    """Whether a module's children run in sequence: it is a list, or all children are of one class, as in stages."""
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return True
    return len({type(part) for part in parts}) == 1 and any(parts[0].children())
