"""Which latents each activation selects, by NumPy, and the gradients through them, by dense autograd in float64."""

import json

import numpy as np
import pytest
import torch

from conceptshare.config.settings import SAESettings
from conceptshare.sae import (
    SAE,
    Active,
    BatchTopK,
    JumpReLU,
    ReLU,
    TopK,
    _activations,
    evaluate,
    load_sae,
    train,
    train_sae,
)
from conceptshare.sae._checkpoints import Checkpoints
from conceptshare.sae._trainer import Trainer
from tests.sae.test_sae import equations, is_kept, planted, reader
from tests.sae.test_sae import stored as stored  # a fixture

D, F, K, T = 8, 24, 4, 50


def some_sae(activation):
    generator = torch.Generator().manual_seed(0)
    sae = SAE(D, F, activation, generator)
    sae.b_enc.requires_grad_(True)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    return sae


def tokens(dtype=torch.float32):
    """Of varying length, so that their numbers of active latents vary."""
    generator = torch.Generator().manual_seed(1)
    lengths = 3 * torch.rand(T, 1, generator=generator, dtype=dtype)
    return lengths * torch.randn(T, D, generator=generator, dtype=dtype)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", "relu"])
def test_gradients_of_nested_losses_equal_dense_autograd_in_float64(name):
    thresholds = torch.linspace(-1, 5, F)
    activation = {"topk": TopK(K), "batchtopk": BatchTopK(K), "jumprelu": JumpReLU(thresholds), "relu": ReLU()}[name]
    sae, x, sizes = some_sae(activation).double(), tokens(torch.float64).requires_grad_(), [1, 7, 20]
    active = sae.active(x)
    nested = sae.decode_nested(active, sizes)
    nested.sub(x).square().sum(0).mean().backward()
    y, (W_enc, W_dec, b_dec, b_enc) = x.detach().clone().requires_grad_(), equations(sae)
    f = torch.relu((y - b_dec) @ W_enc + b_enc)
    f = f * (f > {"jumprelu": thresholds.double(), "relu": 0}[name] if "relu" in name else is_kept(f, K, name))
    if name != "topk":
        assert len({*(f > 0).sum(1).tolist()}) > 5
    expected = torch.stack([f[:, :size] @ W_dec[:size] + b_dec for size in (*sizes, F)])
    expected.sub(y).square().sum(0).mean().backward()
    torch.testing.assert_close(active.dense(F), f)
    torch.testing.assert_close(nested, expected)
    torch.testing.assert_close(sae.decode(active), expected[-1])
    torch.testing.assert_close(x.grad, y.grad)
    gradients = {"W_enc_T": W_enc.grad.T, "W_dec": W_dec.grad, "b_dec": b_dec.grad, "b_enc": b_enc.grad}
    for parameter, own in sae.named_parameters():
        assert gradients[parameter].abs().max() > 1e-3
        torch.testing.assert_close(own.grad, gradients[parameter], msg=parameter)


def largest_found_elsewhere(n):
    """Values whose sample misleads: those that it takes are the largest."""
    values = torch.rand(n, generator=torch.Generator().manual_seed(0))
    values[:: _activations._SAMPLE_EVERY] += 1
    return values


@pytest.mark.parametrize("count", [1, 5000, 40_000, 2**20])
@pytest.mark.parametrize("misleading", [False, True])
def test_the_largest_of_many_values_are_those_of_a_sort(count, misleading):
    n = 2**20 + 77
    values = largest_found_elsewhere(n) if misleading else torch.randn(n, generator=torch.Generator().manual_seed(0))
    expected = np.sort(np.argsort(-values.numpy(), kind="stable")[:count])
    np.testing.assert_array_equal(_activations._largest(values, count), expected)


def test_batch_top_k_takes_no_latents_of_0():
    """A batch may have fewer than k T above 0, and a token none."""
    pre = torch.tensor([[-1.0, -2, 0], [3, 0, 1]])
    active = BatchTopK(2)(pre)
    assert (active.values.tolist(), active.indices.tolist(), active.starts.tolist()) == ([3, 1], [0, 2], [0, 0])
    assert active.dense(3).tolist() == [[0, 0, 0], [3, 0, 1]]
    assert active.tokens().tolist() == [1, 1]
    nothing = BatchTopK(2)(torch.full((2, 3), -1.0))
    assert nothing.dense(3).tolist() == [[0, 0, 0]] * 2
    activation = BatchTopK(2)
    activation.track(nothing)
    assert activation.for_inference(3).threshold.tolist() == [0, 0, 0]


def test_the_threshold_is_the_average_of_the_smallest_latents_with_more_weight_on_later_ones():
    activation, smallest = BatchTopK(1), np.random.default_rng(0).uniform(1, 2, 30)
    for value in smallest:
        activation.track(Active(torch.tensor([value, 5.0, 0.0]), torch.arange(3), torch.tensor([0])))
    weights = 0.99 ** np.arange(30)[::-1]
    expected = torch.full((4,), np.average(smallest, weights=weights), dtype=torch.float32)
    torch.testing.assert_close(activation.for_inference(4).threshold, expected, rtol=1e-6, atol=0)


def test_batch_top_k_by_rounded_products_has_values_in_float32():
    sae = some_sae(BatchTopK(K))
    with torch.no_grad():
        found, f = sae.active(tokens(), "bfloat16"), sae.encode(tokens())
    torch.testing.assert_close(found.values, f[found.tokens(), found.indices], rtol=1e-5, atol=1e-5)
    exact = is_kept(f, K, "batchtopk")
    assert 0.95 < exact[found.tokens(), found.indices].float().mean() <= 1
    (sae.decode(sae.active(tokens(), "bfloat16")) - tokens()).square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in sae.parameters())


SETTINGS = SAESettings(
    expansion=4, k=3, learning_rate=1e-2, activation="batchtopk", matryoshka=[8, 32], batch_samples=8
)


def test_a_training_resumed_from_a_checkpoint_has_the_same_bytes(tmp_path):
    batches = torch.from_numpy(np.stack(planted(samples=40 * 8))).float().flatten(0, 1).split(24)
    whole, halted, resumed = (Trainer(16, SETTINGS, 0, len(batches), torch.device("cpu")) for _ in range(3))
    for batch in batches:
        whole.train_on(batch)
    for batch in batches[:15]:
        halted.train_on(batch)
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    checkpoints.save({"one": halted})
    assert checkpoints.restore({"one": resumed}) == 15
    for batch in batches[15:]:
        resumed.train_on(batch)
    expected = whole.state()
    assert expected["sae.activation.average"] > 0
    assert {name: tensor.numpy().tobytes() for name, tensor in resumed.state().items()} == {
        name: tensor.numpy().tobytes() for name, tensor in expected.items()
    }


def test_quality_is_that_of_the_saved_threshold(stored, tmp_path):
    train_sae(stored, 3, SETTINGS, 0, tmp_path / "sae")
    metrics = json.loads((tmp_path / "sae/metrics.json").read_text())
    sae, everything = load_sae(tmp_path / "sae"), torch.from_numpy(np.concatenate(planted(samples=60)))
    assert isinstance(sae.activation, JumpReLU)
    assert metrics["all_tokens"]["l0"] == evaluate(sae, [everything]).quality.l0
    f = sae.encode(everything.float())
    assert metrics["all_tokens"]["l0"] == pytest.approx((f > sae.activation.threshold).sum().item() / len(f))
    assert {"activation": "batchtopk", "matryoshka": [8, 32]}.items() <= metrics["settings"].items()


def test_batch_top_k_keeps_k_on_average_after_training():
    data = reader(planted(samples=3000))
    sae, _ = train(data, SETTINGS.model_copy(update={"epochs": 2}), seed=0)
    assert evaluate(sae, [data.read(np.arange(3000))]).quality.l0 == pytest.approx(3, rel=0.15)


def test_defaults_are_left_out_of_records_so_that_earlier_ones_stay_equal():
    assert not {"activation", "matryoshka"} & SAESettings().of_training().keys()
    assert SAESettings(matryoshka=[4]).of_training()["matryoshka"] == [4]
    assert SAESettings(activation="batchtopk").of_training()["activation"] == "batchtopk"
