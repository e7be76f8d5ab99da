"""Gradients and training against dense autograd, metrics against their definitions, and damaged folders."""

import csv
import itertools
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conceptshare.activations.extraction import TokenReader
from conceptshare.config.settings import SAESettings
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.store import new_store, save_array
from conceptshare.sae import (
    SAE,
    TopK,
    _checkpoints,
    _order,
    _train,
    _trainer,
    evaluate,
    load_sae,
    save_sae,
    train,
    train_sae,
)
from conceptshare.sae._checkpoints import PREEMPTED
from conceptshare.sae._metrics import density_histogram
from tests.helpers.forks import run_forked
from tests.helpers.samples import contents

# Steps between checks for dead latents, small enough that some are found.
LOOKS = 5


def dense_reconstruction(x, W_enc, W_dec, b_dec, k, b_enc=0):
    """x_hat as in the equations, with all latents: dropped ones are zeros."""
    f = torch.relu((x - b_dec) @ W_enc + b_enc)
    return (f * is_kept(f, k)) @ W_dec + b_dec


def is_kept(f, k, activation="topk"):
    """``[T, F]`` bool: the k largest of each row, or k per row on average over the batch."""
    if activation == "batchtopk":
        return f >= f.flatten().sort(descending=True).values[k * len(f) - 1]
    return torch.zeros_like(f, dtype=torch.bool).scatter(1, f.topk(k, dim=1).indices, True)


def some_sae(d_in=8, d_sae=24, k=4, seed=0):
    """An SAE far from initialisation: non-zero biases, and encoder and decoder not aligned."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, TopK(k), generator)
    sae.b_enc.requires_grad_(True)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    return sae


def equations(sae):
    """Copies of the SAE's parameters as leaf tensors, in the shapes of the equations."""
    return [p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_dec, sae.b_enc)]


# In the last case most tokens have fewer than k latents above zero.
@pytest.mark.parametrize(("d_in", "d_sae", "k", "tokens"), [(8, 24, 4, 50), (3, 3, 1, 1), (16, 16, 16, 40)])
def test_gradients_equal_dense_autograd(d_in, d_sae, k, tokens):
    sae = some_sae(d_in, d_sae, k)
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (sae(x) - x).square().mean().backward()
    y = x.detach().clone().requires_grad_()
    W_enc, W_dec, b_dec, b_enc = equations(sae)
    (dense_reconstruction(y, W_enc, W_dec, b_dec, k, b_enc) - y).square().mean().backward()
    expected = {"W_enc_T": W_enc.grad.T, "W_dec": W_dec.grad, "b_dec": b_dec.grad, "b_enc": b_enc.grad}
    for name, parameter in sae.named_parameters():
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_kept_between_steps():
    trainer = _trainer.Trainer(8, SAESettings(expansion=2, k=4), 0, 1, torch.device("cpu"))
    before = trainer.sae.W_enc_T.detach().clone()
    trainer.train_on(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(trainer.sae.W_enc_T, before)
    assert all(parameter.grad is None for parameter in trainer.sae.parameters())


def test_gradients_equal_finite_differences():
    sae = some_sae(d_in=5, d_sae=11, k=3).double()
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss():
        return (sae(x) - x).square().mean()

    loss().backward()
    step = 1e-6
    for name, parameter in sae.named_parameters():
        flat, differences = parameter.data.view(-1), []
        for i in range(len(flat)):
            kept = flat[i].item()
            flat[i] = kept + step
            above = loss().item()
            flat[i] = kept - step
            differences.append((above - loss().item()) / (2 * step))
            flat[i] = kept
        expected = torch.tensor(differences, dtype=torch.float64).view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-8, msg=name)


def test_reconstruction_keeps_only_the_k_largest_latents():
    sae = some_sae()
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    expected = dense_reconstruction(x, sae.W_enc, sae.W_dec, sae.b_dec, 4, sae.b_enc)
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5)
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae.active(x).values, f.sort(dim=1, descending=True).values[:, :4])


def test_initial_weights():
    D, F = 48, 2000
    sae = SAE(D, F, TopK(4), torch.Generator().manual_seed(0))
    assert sae.W_enc.shape == (D, F)
    assert sae.W_dec.shape == (F, D)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    directions = sae.W_enc.T / sae.W_enc.norm(dim=0)[:, None]
    torch.testing.assert_close(sae.W_dec, directions)
    assert (sae.b_dec == 0).all()
    # Kaiming-uniform by torch of a [D, F] array: evenly spread up to sqrt(6 / F), of variance 2 / F
    bound = math.sqrt(6 / F)
    assert 0.999 * bound < sae.W_enc.max() <= bound
    assert -bound <= sae.W_enc.min() < -0.999 * bound
    assert sae.W_enc.var().item() == pytest.approx(2 / F, rel=0.02)
    assert sae.W_enc.mean().item() == pytest.approx(0, abs=0.01 * bound)


def test_refuses_k_larger_than_the_number_of_latents():
    with pytest.raises(NumericsError, match=r"k = 9 is more than the 8 latents"):
        SAE(4, 8, TopK(9))
    with pytest.raises(NumericsError, match=r"k = 33"):
        train(reader(planted()), SAESettings(expansion=2, k=33), seed=0)


def planted(samples=400, tokens_each=3, d_in=16, atoms=32, seed=0):
    """Tokens of each sample: a mean of 0.5 plus positive combinations of three of 32 unit vectors."""
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((atoms, d_in))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = np.zeros((samples * tokens_each, atoms))
    for code in codes:
        code[rng.choice(atoms, 3, replace=False)] = rng.uniform(0.5, 2, 3)
    return list((codes @ dictionary + 0.5).astype(np.float16).reshape(samples, tokens_each, d_in))


def reader(tokens):
    return TokenReader(
        np.concatenate(tokens),
        np.cumsum([0, *(len(sample) for sample in tokens)]),
        np.cumsum([0, *(len(sample) for sample in tokens[:-1])]),
    )


def order_of_pass(samples, block, number):
    """In order for the first pass; later passes shuffle blocks, seeded by the number of the pass."""
    blocks = [list(range(start, min(start + block, samples))) for start in range(0, samples, block)]
    if number:
        blocks = [blocks[i] for i in np.random.default_rng(number).permutation(len(blocks))]
    return list(itertools.chain(*blocks))


def dense_training(tokens, settings, seed):
    """An independent implementation: dense autograd, Adam from its paper, batches from one generator."""
    D = tokens[0].shape[1]
    F = settings.expansion * D
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(6 / F)
    W_enc = torch.empty(D, F).uniform_(-bound, bound, generator=generator)
    W_dec = (W_enc / W_enc.norm(dim=0)).T
    parameters = [p.clone().requires_grad_() for p in (W_enc, W_dec, torch.zeros(D), torch.zeros(F))]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    orders = [order_of_pass(len(tokens), 1, number) for number in range(settings.epochs)]
    size, losses = settings.batch_samples, []
    batches = [order[start : start + size] for order in orders for start in range(0, len(order), size)]
    scale, last_active, seen, threshold = 1.0, torch.zeros(F), 0, 0.0
    for step, batch in enumerate(batches):
        x = torch.from_numpy(np.concatenate([tokens[i] for i in batch]).astype(np.float32))
        weights = torch.cat([torch.tensor([settings.global_weight, *[1.0] * (len(tokens[i]) - 1)]) for i in batch])
        if settings.max_norm:
            lengths = x.square().sum(1).sqrt()
            median = lengths.sort().values[(len(x) - 1) // 2]
            firsts = np.cumsum([0, *(len(tokens[i]) for i in batch[:-1])])
            kept = [n in firsts or bool(length <= settings.max_norm * median) for n, length in enumerate(lengths)]
            x, weights = x[kept], weights[kept]
        weights = weights[:, None] / weights.sum() / D
        W_enc, W_dec, b_dec, b_enc = parameters
        if step == 0:
            scale = (math.sqrt(D) / x.norm(dim=1).mean()).item() if settings.scale_inputs else 1.0
            if settings.initial_b_dec == "mean":
                b_dec.data = (x * scale).mean(0)
        x = x * scale
        f = torch.relu((x - b_dec) @ W_enc + b_enc)
        kept = is_kept(f, settings.k, settings.activation) & (f > 0)
        reconstruction = (f * kept) @ W_dec + b_dec
        loss = (weights * (reconstruction - x).square()).sum()
        losses.append(loss.item() / scale**2)
        for size in settings.matryoshka:
            nested = (f * kept)[:, :size] @ W_dec[:size] + b_dec
            loss = loss + (weights * (nested - x).square()).sum()
        threshold = 0.99 * threshold + 0.01 * f[kept].min().item()
        seen += len(x)
        last_active[kept.any(0)] = seen
        if settings.auxk and step % LOOKS == 0:
            some_dead = bool((seen - last_active > settings.dead_after).any())
        if settings.auxk and some_dead:
            dead = f * (seen - last_active > settings.dead_after)
            values, indices = dead.topk(min(settings.auxk_latents, F), dim=1)
            revived = torch.zeros_like(f).scatter(1, indices, values) @ W_dec
            loss = loss + settings.auxk * (weights * (revived - (x - reconstruction).detach()).square()).sum()
        gradients = list(torch.autograd.grad(loss, parameters))
        if not settings.encoder_bias:
            gradients[3] = torch.zeros(F)
        with torch.no_grad():
            if settings.unit_norm_decoder:
                gradients[1] -= torch.einsum("fd,fd->f", gradients[1], W_dec)[:, None] * W_dec
            if settings.clip_norm:
                length = torch.cat([g.flatten() for g in gradients]).norm().item()
                gradients = [g * min(1, settings.clip_norm / length) for g in gradients]
            rate = settings.rate(F)
            if settings.warmup_steps:
                rate *= min(1, (step + 1) / settings.warmup_steps)
            if settings.decay_share:
                rate *= min(1, (len(batches) - step) / (settings.decay_share * len(batches)))
            t = step + 1
            for p, (m, v), g in zip(parameters, moments, gradients, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            if settings.unit_norm_decoder:
                W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc, W_dec, b_dec, b_enc = (p.detach() for p in parameters)
    return (W_enc * scale, W_dec / scale, b_dec / scale, b_enc), losses, threshold / (1 - 0.99 ** len(batches))


OPTIONS = [
    {"encoder_bias": True},
    {"initial_b_dec": "mean"},
    {"unit_norm_decoder": True},
    {"scale_inputs": True},
    {"scale_inputs": True, "initial_b_dec": "mean", "encoder_bias": True},
    {"clip_norm": 0.02},
    {"warmup_steps": 20, "decay_share": 0.5},
    {"auxk": 0.5, "auxk_latents": 8, "dead_after": 60},
    {"auxk": 0.5, "auxk_latents": 500, "dead_after": 60, "encoder_bias": True},
    {"preset": "gao", "dead_after": 60, "auxk_latents": 8},
    {"global_weight": 5},
    {"global_weight": 5, "auxk": 0.5, "auxk_latents": 8, "dead_after": 60, "scale_inputs": True, "clip_norm": 0.02},
    {"max_norm": 1.2, "initial_b_dec": "mean", "scale_inputs": True},
    {"max_norm": 1.2, "global_weight": 5, "auxk": 0.5, "auxk_latents": 500, "dead_after": 60},
    {"activation": "batchtopk"},
    {"matryoshka": [5, 20]},
    {
        "activation": "batchtopk",
        "matryoshka": [1, 24, 50],
        "auxk": 0.5,
        "auxk_latents": 8,
        "dead_after": 60,
        "global_weight": 5,
        "max_norm": 1.2,
        "scale_inputs": True,
        "encoder_bias": True,
        "unit_norm_decoder": True,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_each_option_trains_like_dense_autograd_and_has_an_effect(options, monkeypatch):
    monkeypatch.setattr(_trainer, "_STEPS_BETWEEN_CHECKS", LOOKS)
    tokens = planted(samples=200)
    plain = {"expansion": 4, "k": 2, "batch_samples": 4} | ({} if "preset" in options else {"learning_rate": 3e-3})
    settings = SAESettings(**plain, **options)
    sae, losses = train(reader(tokens), settings, seed=7)
    expected, expected_losses, threshold = dense_training(tokens, settings, seed=7)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    if settings.activation == "batchtopk":
        torch.testing.assert_close(sae.activation.threshold, torch.full((64,), threshold), rtol=1e-4, atol=0)
    for own, other in zip((sae.W_enc, sae.W_dec, sae.b_dec, sae.b_enc), expected, strict=True):
        torch.testing.assert_close(own.detach().cpu(), other, rtol=0, atol=2e-5)
    without, _ = train(reader(tokens), SAESettings(**{"learning_rate": settings.rate(64)} | plain), seed=7)
    assert (sae.W_dec - without.W_dec).abs().max() > 1e-3


def test_gradients_of_weighted_losses_equal_dense_autograd_in_float64():
    settings = SAESettings(expansion=3, k=4, auxk=0.3, auxk_latents=5, dead_after=1)
    trainer = _trainer.Trainer(8, settings, 0, 1, torch.device("cpu"))
    trainer.sae = some_sae().double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 8, dtype=torch.float64, generator=generator)
    weights = torch.rand(30, dtype=torch.float64, generator=generator) ** 4
    weights /= weights.sum()
    trainer._seen = 100
    trainer._last_active[::2] = 100
    reconstruction = trainer.sae(x)
    loss = _trainer.mean_square(reconstruction - x, weights)
    (loss + settings.auxk * trainer._auxiliary_loss(x, reconstruction, weights)).backward()
    W_enc, W_dec, b_dec, b_enc = equations(trainer.sae)
    reconstruction = dense_reconstruction(x, W_enc, W_dec, b_dec, 4, b_enc)
    f = torch.relu((x - b_dec) @ W_enc + b_enc)
    values, indices = f[:, 1::2].topk(5, dim=1)
    revived = torch.zeros_like(f[:, 1::2]).scatter(1, indices, values) @ W_dec[1::2]
    expected = sum(
        weight * share * (error**2).sum() / 8
        for share, errors in ((1, reconstruction - x), (0.3, revived - (x - reconstruction).detach()))
        for weight, error in zip(weights, errors, strict=True)
    )
    expected.backward()
    gradients = {"W_enc_T": W_enc.grad.T, "W_dec": W_dec.grad, "b_dec": b_dec.grad, "b_enc": b_enc.grad}
    for name, parameter in trainer.sae.named_parameters():
        assert gradients[name].abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12, msg=name)


def middle_is_global(tokens):
    """A reader of samples whose second token is global."""
    starts = np.cumsum([0, *(len(sample) for sample in tokens)])
    return TokenReader(np.concatenate(tokens), starts, starts[:-1] + 1)


@pytest.mark.parametrize(
    ("options", "of_five"),
    [
        ({"encoder_bias": True, "unit_norm_decoder": True}, {}),
        ({"auxk": 0.5, "auxk_latents": 8, "dead_after": 60}, {"dead_after": 100}),
    ],
    ids=lambda options: "-".join(options),
)
def test_a_weight_of_3_equals_3_copies_of_the_global_token_in_every_batch(options, of_five, monkeypatch):
    """Samples of 3 tokens have 5 with the copies, so as many steps are 5/3 as many tokens."""
    monkeypatch.setattr(_trainer, "_STEPS_BETWEEN_CHECKS", LOOKS)
    tokens = planted(samples=200)
    copied = [sample[[0, 1, 1, 1, 2]] for sample in tokens]
    plain = {"expansion": 4, "k": 2, "batch_samples": 4, "learning_rate": 3e-3} | options
    sae, losses = train(middle_is_global(tokens), SAESettings(**plain, global_weight=3), seed=7)
    expected, expected_losses = train(middle_is_global(copied), SAESettings(**plain | of_five), seed=7)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    for name, own in sae.named_parameters():
        torch.testing.assert_close(own, getattr(expected, name), rtol=0, atol=2e-5, msg=name)
    without, _ = train(middle_is_global(tokens), SAESettings(**plain), seed=7)
    assert (sae.W_dec - without.W_dec).abs().max() > 1e-2


def test_tokens_of_outlying_norm_are_left_out_unless_they_are_global(tmp_path, write_tokens):
    """Each sample's last token is 40 times as long, and so are some global ones, which are its first."""
    usual = planted(samples=70)
    for sample in usual[::9]:
        sample[0] *= 40
    longer = [np.concatenate([sample, 40 * sample[-1:]]) for sample in usual]
    settings = SETTINGS.model_copy(update={"max_norm": 8, "held_out": 0.2, "epochs": 3, "standardise": True})
    train_sae(write_tokens(tmp_path / "of_4" / "vit.zarr", {3: longer}), 3, settings, 0, tmp_path / "without")
    store = write_tokens(tmp_path / "of_3" / "vit.zarr", {3: usual})
    train_sae(store, 3, settings.model_copy(update={"max_norm": None}), 0, tmp_path / "alone")
    one, other = contents(tmp_path / "without"), contents(tmp_path / "alone")
    for name in ("sae_weights.safetensors", "loss.csv"):
        assert one[name] == other[name]
    metrics, of_all = json.loads(one["metrics.json"]), json.loads(other["metrics.json"])
    assert (metrics["outlying"], of_all["outlying"]) == (0.25, 0)
    assert metrics["all_tokens"]["tokens"] == 14 * 4  # measured on all
    # Kept in full, and so across a resumed training.
    killed = run_training(tmp_path / "of_4" / "vit.zarr", tmp_path / "killed", last=8, settings=settings)
    assert killed.returncode == -signal.SIGKILL
    finished = run_training(tmp_path / "of_4" / "vit.zarr", tmp_path / "killed", settings=settings)
    assert "resuming at step 7 of 12" in finished.stderr
    assert contents(tmp_path / "killed") == one


@pytest.mark.parametrize("option", [{"global_weight": 2}, {"max_norm": 8}], ids=str)
def test_refuses_options_of_other_tokens_when_trained_on_global_ones(option):
    (key,) = option
    with pytest.raises(ValueError, match=f"{key}: train_on: global has no other tokens than global ones"):
        SAESettings(preset="global", **option)
    assert SAESettings(preset="global", global_weight=1, max_norm=None).train_on == "global"


def test_auxk_only_updates_dead_latents():
    settings = SAESettings(expansion=4, k=2, auxk=1.0, auxk_latents=64, dead_after=1)
    trainer = _trainer.Trainer(16, settings, 0, 1, torch.device("cpu"))
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[3, 40]] = True
    trainer._seen = 100
    trainer._last_active[~dead] = 100
    x = torch.from_numpy(np.concatenate(planted(samples=20)).astype(np.float32))
    with torch.no_grad():
        reconstruction = trainer.sae(x)
    trainer._auxiliary_loss(x, reconstruction).backward()
    for gradient in (trainer.sae.W_enc_T.grad, trainer.sae.W_dec.grad):
        assert (gradient[~dead] == 0).all()
        assert (gradient[dead] != 0).any(dim=1).all()


def test_auxk_revives_dead_latents():
    tokens = reader([sample + np.float16(1) for sample in planted(samples=1000)])
    found = {}
    for auxk in (0.0, 1.0):
        options = {"auxk": auxk, "auxk_latents": 16, "dead_after": 300}
        sae, _ = train(tokens, SAESettings(expansion=4, k=3, learning_rate=1e-2, epochs=4, **options), seed=0)
        found[auxk] = evaluate(sae, [tokens.read(np.arange(len(tokens)))]).quality
    assert found[1.0].dead < 0.6 * found[0.0].dead
    assert found[1.0].fvu < found[0.0].fvu


def test_the_gao_preset_follows_its_paper():
    settings = SAESettings(preset="gao")
    assert (settings.auxk, settings.initial_b_dec, settings.unit_norm_decoder) == (1 / 32, "mean", True)
    assert settings.rate(2**14) == pytest.approx(2e-4)
    assert settings.rate(2**16) == pytest.approx(1e-4)
    assert SAESettings(preset="gao", auxk=0.1).auxk == 0.1


def test_the_global_preset_explains_held_out_global_tokens(stored_globals, tmp_path):
    settings = SAESettings(preset="global", expansion=4, k=3, held_out=0.2)
    train_sae(stored_globals, 3, settings, 0, tmp_path / "sae")
    metrics = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    assert metrics["steps"] == 20  # 64 samples in batches of 64
    assert metrics["global_tokens"]["fvu"] < 0.9
    assert (settings.train_on, settings.standardise, SAESettings(preset="global", epochs=3).epochs) == (
        "global",
        True,
        3,
    )


def test_a_number_of_latents_trains_the_same_sae_as_the_expansion_that_gives_it():
    tokens = reader(planted())
    own = {"k": 3, "learning_rate": 1e-2, "encoder_bias": True}
    saes = [
        train(tokens, SAESettings(**own, **size), 0)[0] for size in ({"expansion": 3}, {"features": 3 * tokens.width})
    ]
    one, other = (sae.state_dict() for sae in saes)
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_held_out_samples_are_used_only_for_metrics(stored, tmp_path):
    settings = SETTINGS.model_copy(update={"held_out": 0.25})
    held_out = np.arange(45, 60)
    train_sae(stored, 3, settings, seed=0, out=tmp_path / "sae")
    metrics = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    assert metrics["measured_on"] == "held-out samples"
    own = TokenReader.open(stored, 3).read(held_out)
    assert metrics["all_tokens"]["tokens"] == len(own)
    assert metrics["all_tokens"]["fvu"] == pytest.approx(evaluate(load_sae(tmp_path / "sae"), [own]).quality.fvu)


def test_200_steps_of_training_equal_dense_autograd():
    tokens = [sample[: 1 + i % 3] for i, sample in enumerate(planted(samples=398))]  # ragged, and a short last batch
    settings = SAESettings(expansion=4, k=4, learning_rate=3e-3, epochs=2, batch_samples=4)
    sae, losses = train(reader(tokens), settings, seed=7)
    (W_enc, W_dec, b_dec, _), expected, _ = dense_training(tokens, settings, seed=7)
    assert len(losses) == 200
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    sae = sae.cpu()
    torch.testing.assert_close(sae.W_enc, W_enc, rtol=0, atol=1e-5)
    torch.testing.assert_close(sae.W_dec, W_dec, rtol=0, atol=1e-5)
    torch.testing.assert_close(sae.b_dec, b_dec, rtol=0, atol=1e-5)
    # The weights moved far from initialisation, so only the same training comes this close.
    start = SAE(16, 64, TopK(4), torch.Generator().manual_seed(7))
    assert (sae.W_enc - start.W_enc).abs().max() > 0.1


def test_training_learns_planted_features():
    tokens = reader(planted(samples=2000))
    settings = SAESettings(expansion=4, k=3, learning_rate=1e-2, epochs=4)
    everything = [tokens.read(np.arange(len(tokens)))]
    sae, losses = train(tokens, settings, seed=0)
    before = evaluate(SAE(16, 64, TopK(3), torch.Generator().manual_seed(0)), everything).quality
    after = evaluate(sae, everything).quality
    assert losses[-20:].mean() < 0.25 * losses[:5].mean()
    assert after.fvu < 0.25 * before.fvu
    assert after.fvu < 0.25
    assert after.l0 <= 3


def test_defaults_are_the_papers_settings():
    settings = SAESettings()
    assert (settings.expansion, settings.k, settings.learning_rate) == (8, 32, 5e-5)
    assert (settings.epochs, settings.batch_samples) == (1, 16)


def test_predicting_the_mean_has_fvu_1():
    x = 100 + torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    sae = some_sae()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x.mean(0))
    assert evaluate(sae, x.split(64)).quality.fvu == pytest.approx(1, abs=1e-4)


def sae_of_both_signs(D):
    """x = relu(x) - relu(-x): a perfect reconstruction with D active latents of 2D."""
    sae = SAE(D, 2 * D, TopK(D))
    with torch.no_grad():
        both = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.W_enc_T.copy_(both)
        sae.W_dec.copy_(both)
    return sae


def test_perfect_reconstruction_has_fvu_0():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    quality = evaluate(sae_of_both_signs(8), x.split(64)).quality
    assert quality.fvu == pytest.approx(0, abs=1e-10)
    assert (quality.tokens, quality.l0, quality.dead) == (500, 8, 0)


def test_l0_counts_positive_latents_and_dead_latents_are_never_positive():
    x = torch.tensor([[1.0, -2, 0], [3, 0, 0], [0, 0, 0]])  # of the latents +1 +2 +3 -1 -2 -3, +1 and -2 are active
    quality = evaluate(sae_of_both_signs(3), [x[:1], x[1:]]).quality
    assert quality.l0 == pytest.approx(3 / 3)
    assert quality.dead == pytest.approx(4 / 6)


def test_a_latent_that_top_k_always_drops_is_dead():
    sae = SAE(2, 2, TopK(1))
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[2.0, 0], [1.0, 0]]))
        sae.W_dec.zero_()
    quality = evaluate(sae, [torch.rand(10, 2) + 0.1]).quality
    assert (quality.l0, quality.dead) == (1, 0.5)


def fvu(x, reconstructed):
    x, reconstructed = np.asarray(x, np.float64), np.asarray(reconstructed, np.float64)
    return ((x - reconstructed) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_evaluation_does_not_depend_on_batches_and_keeps_precision_far_from_zero(batch):
    x = 1000 + torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    sae = some_sae()
    with torch.no_grad():
        sae.b_dec.fill_(1000)
        expected = fvu(x, dense_reconstruction(x, sae.W_enc, sae.W_dec, sae.b_dec, 4, sae.b_enc))
    assert evaluate(sae, x.split(batch)).quality.fvu == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tokens", [4, 7, 900])
def test_fvu_of_constant_tokens_is_nan(tokens, rng):
    """Also if the sums of squares are rounded."""
    token = torch.from_numpy(rng.standard_normal(8).astype(np.float32))
    assert math.isnan(evaluate(some_sae(), [token.expand(tokens, 8)]).quality.fvu)
    varied = token + 1e-3 * torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0))
    assert math.isfinite(evaluate(some_sae(), [varied]).quality.fvu)


SETTINGS = SAESettings(expansion=2, k=4, learning_rate=1e-3)


@pytest.fixture
def stored(tmp_path, write_tokens):
    tokens = planted(samples=60)
    return write_tokens(tmp_path / "tokens" / "vit.zarr", {0: tokens, 3: tokens})


def test_the_same_seed_gives_the_same_bytes(stored, tmp_path):
    for name in ("one", "two"):
        train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {
        "sae_weights.safetensors",
        "cfg.json",
        "metrics.json",
        "loss.csv",
        "density.csv",
        "manifest.json",
    }


def test_an_sae_replaces_all_files_of_an_older_one(stored, tmp_path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text('{"d_sae": 4}')
    (tmp_path / "sae" / "loss.csv").touch()
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "sae")
    assert set(contents(tmp_path / "sae")) == {
        "sae_weights.safetensors",
        "cfg.json",
        "metrics.json",
        "loss.csv",
        "density.csv",
        "manifest.json",
    }
    assert load_sae(tmp_path / "sae").activation.k == SETTINGS.k


def test_another_seed_layer_or_encoder_gives_other_initial_weights(stored, tmp_path, write_tokens):
    """With equal initial weights, features of two SAEs would align by index."""
    other = write_tokens(tmp_path / "tokens" / "bert.zarr", {3: planted(samples=60)})
    runs = {"a": (stored, 3, 0), "b": (stored, 3, 1), "c": (stored, 0, 0), "d": (other, 3, 0)}
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-12})
    for name, (store, layer, seed) in runs.items():
        train_sae(store, layer, settings, seed, tmp_path / name)
    weights = [load_sae(tmp_path / name).W_dec for name in runs]
    for i, one in enumerate(weights):
        for other_weights in weights[:i]:
            assert (one @ other_weights.T).diagonal().abs().mean() < 0.5


def test_records_metrics_of_all_tokens_and_of_global_ones(stored, tmp_path):
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "sae")
    metrics = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    tokens = np.concatenate(planted(samples=60)).astype(np.float32)
    for name, x in (("all_tokens", tokens), ("global_tokens", tokens[::3])):
        expected = dense_reconstruction(
            torch.from_numpy(x), tensors["W_enc"], tensors["W_dec"], tensors["b_dec"], SETTINGS.k
        )
        assert metrics[name]["fvu"] == pytest.approx(fvu(x, expected), rel=1e-5)
        assert metrics[name]["tokens"] == len(x)
        assert 0 < metrics[name]["l0"] <= SETTINGS.k
        assert 0 <= metrics[name]["dead"] < 1
    assert metrics["steps"] == 4  # 60 samples in batches of 16
    assert metrics["settings"]["learning_rate"] == 1e-3


def test_recorded_losses_fall(stored, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 20})
    train_sae(stored, 0, settings, seed=0, out=tmp_path / "sae")
    with (tmp_path / "sae" / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(80))
    losses = [float(row["loss"]) for row in rows]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def test_a_saved_sae_survives_a_round_trip(tmp_path):
    sae = some_sae()
    save_sae(sae, tmp_path, "vit", "layer 3")
    loaded = load_sae(tmp_path)
    assert loaded.activation.k == sae.activation.k
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, dict(loaded.named_parameters())[name])
    assert load_sae(str(tmp_path)).W_enc.shape == (8, 24)


def test_the_files_have_saelens_format(tmp_path):
    sae = some_sae(d_in=8, d_sae=24, k=4)
    save_sae(sae, tmp_path, "vit", "layer 3")
    config = json.loads((tmp_path / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "topk",
        "d_in": 8,
        "d_sae": 24,
        "k": 4,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    assert {"sae_lens_version", "model_name", "hook_name", "token_position"} <= set(metadata)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (8, 24),
        "W_dec": (24, 8),
        "b_enc": (24,),
        "b_dec": (8,),
    }
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert torch.equal(tensors["b_enc"], sae.b_enc)
    assert torch.equal(tensors["W_enc"], sae.W_enc)


def test_non_finite_tokens_are_an_error_and_leave_nothing(tmp_path, write_tokens):
    tokens = planted(samples=60)
    tokens[37][1, 2] = np.nan
    store = write_tokens(tmp_path / "vit.zarr", {0: tokens})
    with pytest.raises(NumericsError, match=r"vit layer 0 seed 5: the loss is not finite from step [0-3] on"):
        train_sae(store, 0, SETTINGS, seed=5, out=tmp_path / "saes" / "sae")
    assert not (tmp_path / "saes").exists() or not list((tmp_path / "saes").iterdir())


def test_a_non_finite_batch_keeps_the_previous_checkpoint(tmp_path, write_tokens, monkeypatch):
    tokens = planted(samples=60)
    tokens[37][1, 2] = np.nan  # in the third step of four
    store = write_tokens(tmp_path / "vit.zarr", {0: tokens})
    monkeypatch.setattr(_train, "_SECONDS_BETWEEN_CHECKPOINTS", 0)
    with pytest.raises(NumericsError, match=r"the loss is not finite from step 2 on; lower learning_rate"):
        train_sae(store, 0, SETTINGS, seed=5, out=tmp_path / "saes" / "sae")
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["sae.checkpoints"]
    (newest,) = (tmp_path / "saes" / "sae.checkpoints" / "000000002").iterdir()
    assert all(tensor.isfinite().all() for tensor in load_file(newest).values())


def test_refuses_an_empty_store(tmp_path):
    store = tmp_path / "vit.zarr"
    with new_store(store, "tokens", {"encoder": {"modality": "image"}, "batch_size": 8}) as group:
        save_array(group, "layer-00/tokens", np.zeros((0, 8), np.float16))
        save_array(group, "offsets", np.zeros(1, np.int64))
        save_array(group, "global_rows", np.zeros(0, np.int64))
    with pytest.raises(StoreError, match=r"vit.zarr: no samples in it; run the activations stage again"):
        train_sae(store, 0, SETTINGS, seed=0, out=tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_refuses_a_missing_layer(stored, tmp_path):
    with pytest.raises(StoreError, match="no layer 2; it has layer-00, layer-03"):
        train_sae(stored, 2, SETTINGS, seed=0, out=tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def break_missing_folder(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def break_missing_weights(folder):
    (folder / "sae_weights.safetensors").unlink()


def break_missing_config(folder):
    (folder / "cfg.json").unlink()


def break_truncated_weights(folder):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_truncated_config(folder):
    path = folder / "cfg.json"
    path.write_text(path.read_text()[:-20])


def break_other_width(folder):
    path = folder / "cfg.json"
    path.write_text(path.read_text().replace('"d_in": 8', '"d_in": 7'))


@pytest.mark.parametrize(
    "break_it",
    [
        break_missing_folder,
        break_missing_weights,
        break_missing_config,
        break_truncated_weights,
        break_truncated_config,
        break_other_width,
    ],
)
def test_refuses_a_damaged_sae(tmp_path, break_it):
    folder = tmp_path / "seed-0"
    folder.mkdir()
    save_sae(some_sae(), folder, "vit", "layer 3")
    load_sae(folder)
    break_it(folder)
    with pytest.raises(StoreError, match=r"seed-0: .* the sae stage"):
        load_sae(folder)


def metrics_of(x, reconstructed):
    """Cosine and length ratio by definition."""
    x, reconstructed = np.asarray(x, np.float64), np.asarray(reconstructed, np.float64)
    lengths, own = np.linalg.norm(x, axis=1), np.linalg.norm(reconstructed, axis=1)
    return ((x * reconstructed).sum(1) / lengths / own).mean(), (own / lengths).mean()


def test_cosine_length_ratio_and_density_follow_their_definitions():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + 1
    sae = some_sae()
    found = evaluate(sae, x.split(64))
    with torch.no_grad():
        cosine, ratio = metrics_of(x, sae(x))
        latents = sae.active(x)
    assert found.quality.cosine == pytest.approx(cosine, rel=1e-6)
    assert found.quality.l2_ratio == pytest.approx(ratio, rel=1e-6)
    assert found.quality.explained_variance == pytest.approx(1 - found.quality.fvu)
    counts = [((latents.indices == latent) & (latents.values > 0)).sum().item() for latent in range(24)]
    np.testing.assert_allclose(found.density, np.array(counts) / 200)


def test_a_zero_token_has_cosine_0_and_not_nan():
    quality = evaluate(sae_of_both_signs(3), [torch.tensor([[0.0, 0, 0], [1, 2, 3]])]).quality
    assert quality.cosine == pytest.approx(0.5)
    assert quality.l2_ratio == pytest.approx(0.5)


def test_density_histogram_counts_every_latent_once():
    density = np.array([0, 0, 1e-9, 1e-6, 2e-3, 0.5, 1.0])
    rows = density_histogram(density)
    assert rows[0] == ("never", float("-inf"), 2)
    assert sum(count for _, _, count in rows) == len(density)
    by_edge = {edge: count for _, edge, count in rows[1:]}
    assert by_edge[-6.0] == 2  # including the one below the first edge
    assert by_edge[-2.75] == 1
    assert by_edge[-0.5] == 1
    assert by_edge[-0.25] == 1


def test_the_first_epoch_is_in_data_set_order_and_later_ones_shuffle_blocks():
    order = _order.steps(100, 16, block=8, settings=SAESettings(epochs=3))
    assert [len(batch) for batch in order] == ([16] * 6 + [4]) * 3
    for number in range(3):
        of_pass = np.concatenate(order[7 * number : 7 * number + 7]).tolist()
        assert of_pass == order_of_pass(100, 8, number)
        assert sorted(of_pass) == list(range(100))
    assert order_of_pass(100, 8, 1) != order_of_pass(100, 8, 2) != list(range(100))


def test_holds_out_the_last_samples():
    settings = SAESettings(held_out=0.25, epochs=2)
    trained = np.concatenate(_order.steps(102, 16, block=8, settings=settings))
    assert sorted(trained) == sorted([*range(77), *range(77)])
    assert np.concatenate(_order.evaluated(102, settings)).tolist() == list(range(77, 102))
    assert settings.held_out_samples(102) == 25
    assert np.concatenate(_order.evaluated(102, SAESettings())).tolist() == list(range(102))
    assert np.concatenate(_order.evaluated(9000, SAESettings())).tolist() == list(range(9000 - 4096, 9000))
    assert len(np.concatenate(_order.steps(2, 16, 8, SAESettings(held_out=0.99)))) == 1  # some are used for training


@pytest.mark.parametrize(("modality", "steps"), [("image", 4), ("text", 2)])
def test_batch_sizes_are_in_images_or_captions(tmp_path, write_tokens, modality, steps):
    tokens = planted(samples=60)
    store = write_tokens(tmp_path / "one.zarr", {0: tokens}, modality=modality)
    train_sae(store, 0, SAESettings(expansion=2, k=4, batch_samples=16, batch_captions=32), 0, tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "metrics.json").read_text())["steps"] == steps


def test_bfloat16_selects_latents_by_rounded_products_and_recomputes_them_in_float32():
    sae = some_sae(d_in=64, d_sae=256, k=8)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = sae.active(x, "bfloat16")
        f = sae.encode(x)
        torch.testing.assert_close(found.values, f.gather(1, found.indices), rtol=1e-5, atol=1e-5)
        exact = sae.active(x)
    same = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found.indices, exact.indices, strict=True)]
    assert 7 < np.mean(same) < 8
    x.requires_grad_()
    (sae.decode(sae.active(x, "bfloat16")) - x).square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in sae.parameters())


def test_tf32_selects_latents_by_tf32_products_and_recomputes_them_in_float32(monkeypatch):
    sae, asked = some_sae(d_in=64, d_sae=256, k=8), []
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, f = sae.active(x), sae.encode(x)
        addmm = torch.addmm
        monkeypatch.setattr(
            torch, "addmm", lambda *xs: asked.append(torch.backends.cuda.matmul.allow_tf32) or addmm(*xs)
        )
        found = sae.active(x, "tf32")
    assert asked == [True]
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.equal(found.indices, exact.indices)  # CPUs have no such products
    torch.testing.assert_close(found.values, f.gather(1, found.indices), rtol=1e-5, atol=1e-5)


def test_bfloat16_trains_equally_well():
    tokens = reader(planted(samples=3000, d_in=64, atoms=160))
    everything = [tokens.read(np.arange(len(tokens)))]
    found = {}
    for precision in ("float32", "bfloat16"):
        settings = SAESettings(expansion=4, k=3, learning_rate=5e-3, epochs=4, decay_share=0.5, precision=precision)
        sae, _ = train(tokens, settings, seed=0)
        found[precision] = evaluate(sae, everything).quality.fvu
    # Such small SAEs differ by a few percent between seeds.
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)
    assert found["bfloat16"] != found["float32"]


def test_warns_about_many_dead_latents_with_a_remedy(stored, tmp_path, capsys):
    train_sae(stored, 3, SETTINGS.model_copy(update={"max_dead": 0.0}), seed=0, out=tmp_path / "some")
    assert "of the latents are dead, more than max_dead = 0; train longer (epochs)" in capsys.readouterr().err
    train_sae(stored, 3, SETTINGS.model_copy(update={"max_dead": 1.0}), seed=0, out=tmp_path / "all")
    assert "latents are dead" not in capsys.readouterr().err


@pytest.mark.parametrize(("bound", "worse"), [({}, True), ({"max_fvu_global": 100}, False)])
def test_unexplained_global_tokens_are_a_warning(stored, tmp_path, capsys, bound, worse):
    train_sae(stored, 3, SETTINGS.model_copy(update=bound), seed=0, out=tmp_path / "sae")
    fvu = json.loads((tmp_path / "sae/metrics.json").read_text())["global_tokens"]["fvu"]
    assert 0.9 < fvu < 100
    warning = f"vit layer 3 seed 0: FVU {fvu:.2f} of the global tokens, more than max_fvu_global = 0.9, so its features"
    assert (warning in capsys.readouterr().err) is worse


def in_float64(tokens):
    """Mean and standard deviation of each dimension."""
    x = np.concatenate(tokens).astype(np.float64)
    return x.mean(0), x.std(0)


@pytest.fixture
def uneven():
    """Tokens whose dimensions differ in scale by 10^4."""
    scales = np.logspace(-2, 2, 16)
    return [((sample - 1) * scales).astype(np.float16) for sample in planted(samples=80)]


@pytest.mark.parametrize(
    "options",
    [{}, {"encoder_bias": True, "initial_b_dec": "mean", "unit_norm_decoder": True, "global_weight": 3}],
    ids=lambda options: "-".join(options),
)
def test_standardising_equals_training_on_standardised_tokens(uneven, options):
    """In float64, from the first batch: the losses and the folded weights."""
    plain = {"expansion": 4, "k": 3, "batch_samples": 4, "learning_rate": 3e-3} | options
    mean, deviation = in_float64(uneven[:4])
    standardised = [((sample - mean) / deviation).astype(np.float32) for sample in uneven]
    (W_enc, W_dec, b_dec, b_enc), _, _ = dense_training(standardised, SAESettings(**plain), seed=7)
    sae, losses = train(reader(uneven), SAESettings(**plain, standardise=True), seed=7)
    W_enc, W_dec, b_dec, b_enc = (p.double().numpy() for p in (W_enc, W_dec, b_dec, b_enc))
    x = np.concatenate(uneven).astype(np.float64)
    expected = mean + deviation * reconstruct((x - mean) / deviation, W_enc, W_dec, b_dec, b_enc, 3)
    found = sae(torch.from_numpy(x).float()).detach().double().numpy()
    worst = np.abs((found - expected) / deviation).max(axis=1)
    assert np.quantile(worst, 0.95) < 2e-3  # a token whose k-th latents are nearly equal may keep another
    assert np.abs((x - expected) / deviation).mean() > 0.05  # the reconstruction is far from perfect
    np.testing.assert_allclose(sae.W_enc.detach().numpy(), W_enc / deviation[:, None], atol=1e-3 / deviation.min())
    assert evaluate(sae, [torch.from_numpy(x)]).quality.fvu == pytest.approx(fvu(x, expected), rel=1e-3)
    first = np.concatenate(standardised[:4])
    start = SAE(16, 64, TopK(3), torch.Generator().manual_seed(7))
    if options:
        start.b_dec.data = torch.from_numpy(first.mean(0))
    error = deviation * (start(torch.from_numpy(first)).detach().numpy() - first)
    weights = [options.get("global_weight", 1), 1, 1] * 4
    expected = np.average((error**2).mean(1), weights=weights)
    assert losses[0] == pytest.approx(expected, rel=1e-4)  # in the units of the tokens


def test_a_dimension_that_does_not_vary_is_reconstructed_by_its_mean_and_ignored(uneven):
    """Its standard deviation is 0, and any error there would be large in comparison."""
    for sample in uneven:
        sample[:, 5] = 1234
    sae, losses = train(reader(uneven), SETTINGS.model_copy(update={"standardise": True, "epochs": 3}), seed=0)
    x = torch.from_numpy(np.concatenate(uneven)).float()
    one, other = sae(x), sae(x + 100 * torch.eye(16)[5])
    assert torch.equal(one, other)
    assert (one[:, 5] == 1234).all()
    assert (sae.W_enc[5] == 0).all()
    assert np.isfinite(losses).all()


def reconstruct(x, W_enc, W_dec, b_dec, b_enc, k):
    f = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
    f[f < np.sort(f, axis=1)[:, -k, None]] = 0
    return f @ W_dec + b_dec


GLOBAL = SETTINGS.model_copy(update={"train_on": "global", "epochs": 3, "held_out": 0.2})


@pytest.fixture
def stored_globals(tmp_path, write_activations, uneven):
    return write_activations(tmp_path / "activations" / "vit.zarr", {3: uneven})


def test_training_on_global_tokens_equals_training_on_one_token_per_sample(
    stored_globals, uneven, tmp_path, write_tokens
):
    single = write_tokens(tmp_path / "single" / "vit.zarr", {3: [sample[:1] for sample in uneven]})
    train_sae(stored_globals, 3, GLOBAL, 0, tmp_path / "global")
    train_sae(single, 3, GLOBAL.model_copy(update={"train_on": "all"}), 0, tmp_path / "all")
    one, other = contents(tmp_path / "global"), contents(tmp_path / "all")
    for name in ("sae_weights.safetensors", "loss.csv", "density.csv"):
        assert one[name] == other[name]
    metrics = json.loads(one["metrics.json"])
    assert metrics["all_tokens"] == metrics["global_tokens"] == json.loads(other["metrics.json"])["all_tokens"]
    assert metrics["all_tokens"]["tokens"] == 16
    assert json.loads(one["cfg.json"])["metadata"]["token_position"] == "global"


def test_global_tokens_are_standardised_over_all_training_samples(uneven):
    globals_, settings = [sample[:1] for sample in uneven], GLOBAL.model_copy(update={"standardise": True})
    trainer = _trainer.Trainer(16, settings, 0, 1, torch.device("cpu"))
    trainer.standardise(torch.from_numpy(np.concatenate(globals_[start : start + 7])) for start in range(0, 64, 7))
    sae, _ = train(reader(globals_), settings.model_copy(update={"learning_rate": 1e-12}), seed=0)
    mean, deviation = in_float64(globals_[:70])
    np.testing.assert_allclose(trainer._shift, mean, rtol=1e-6)
    np.testing.assert_allclose(trainer._scale, 1 / deviation, rtol=1e-6)
    mean, deviation = in_float64(globals_[:64])  # the others are held out
    np.testing.assert_allclose(sae.b_dec.detach(), mean, rtol=1e-5)
    expected = SAE(16, 32, TopK(4), torch.Generator().manual_seed(0)).W_dec.detach().numpy() * deviation
    np.testing.assert_allclose(sae.W_dec.detach(), expected, rtol=1e-5)


def test_a_killed_training_on_standardised_tokens_resumes_with_the_same_bytes(stored_globals, tmp_path):
    settings = GLOBAL.model_copy(update={"standardise": True})
    train_sae(stored_globals, 3, settings, seed=0, out=tmp_path / "whole")
    assert run_training(stored_globals, tmp_path / "killed", last=5, settings=settings).returncode == -signal.SIGKILL
    finished = run_training(stored_globals, tmp_path / "killed", settings=settings)
    assert "resuming at step 4 of 12" in finished.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_training_on_global_tokens_refuses_a_store_of_all_tokens(stored, tmp_path):
    with pytest.raises(StoreError, match="a store of 'tokens', but one of 'activations' is needed"):
        train_sae(stored, 3, GLOBAL, seed=0, out=tmp_path / "sae")


def test_refuses_to_scale_standardised_inputs():
    with pytest.raises(ValueError, match="scale_inputs: standardised tokens have that length already; leave it out"):
        SAESettings(standardise=True, scale_inputs=True)


TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
from conceptshare.sae import _train
from conceptshare.config.settings import SAESettings

torch.set_num_threads(1)
store, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), SAESettings.model_validate_json(sys.argv[3])
with_signal, last = signal.Signals(int(sys.argv[4])), int(sys.argv[5])
_train._SECONDS_BETWEEN_CHECKPOINTS = 0
step = _train.Trainer.train_on

def counted(self, *batch):
    step(self, *batch)
    if self.step == last:
        os.kill(os.getpid(), with_signal)

_train.Trainer.train_on = counted
_train.train_sae(store, 3, settings, 0, out)
"""


def run_training(store, out, with_signal=signal.SIGKILL, last=0, settings=None):
    """Train in a separate process, which sends itself a signal after a step."""
    arguments = [store, out, (settings or SETTINGS).model_dump_json(), int(with_signal), last]
    return run_forked(TRAIN, *arguments)


def test_a_killed_training_resumes_with_the_same_bytes(stored, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 5})
    train_sae(stored, 3, settings, seed=0, out=tmp_path / "whole")
    for last in (3, 11):
        killed = run_training(stored, tmp_path / "killed", last=last, settings=settings)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "killed").exists()
    finished = run_training(stored, tmp_path / "killed", settings=settings)
    assert "resuming at step 10 of 20" in finished.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.checkpoints").exists()


def test_a_training_saves_on_sigterm_and_exits_with_its_own_code(stored, tmp_path):
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "whole")
    stopped = run_training(stored, tmp_path / "stopped", signal.SIGTERM, last=2)
    assert stopped.returncode == PREEMPTED == 75
    assert "stopped by SIGTERM at step 2 of 4; run again to resume" in stopped.stderr
    assert not (tmp_path / "stopped").exists()
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_truncated_checkpoint_is_skipped_for_the_previous_one(stored, tmp_path, capsys, damage):
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "whole")
    assert run_training(stored, tmp_path / "torn", last=4).returncode == -signal.SIGKILL
    (newest,) = (tmp_path / "torn.checkpoints" / "000000003").glob("*.safetensors")
    content = newest.read_bytes()
    newest.write_bytes(content[:-100] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "torn")
    log = capsys.readouterr().err
    assert f"{newest.parent}: damaged; using the checkpoint before it" in log
    assert "resuming at step 2 of 4" in log
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def cut_all(folder):
    for file in folder.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])


def garble_their_key(folder):
    (folder / "of.json").write_bytes(b"\xff\xfe" * 99)


def replace_a_step_with_a_file(folder):
    newest = max(folder.glob("0*"))
    shutil.rmtree(newest)
    newest.write_text("no folder")


@pytest.mark.parametrize("damage", [cut_all, garble_their_key, replace_a_step_with_a_file])
def test_ignores_damaged_checkpoints_and_writes_new_ones(stored, tmp_path, damage):
    settings = SETTINGS.model_copy(update={"epochs": 5})
    train_sae(stored, 3, settings, seed=0, out=tmp_path / "whole")
    out = tmp_path / "damaged"
    assert run_training(stored, out, last=9, settings=settings).returncode == -signal.SIGKILL
    damage(tmp_path / "damaged.checkpoints")
    stopped = run_training(stored, out, signal.SIGTERM, last=3, settings=settings)
    if damage is replace_a_step_with_a_file:  # the previous checkpoint is intact, and training is past step 3
        assert "resuming at step 7" in stopped.stderr
    else:
        assert stopped.returncode == PREEMPTED, stopped.stderr
        assert "resuming at step 3" in run_training(stored, out, settings=settings).stderr
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "damaged.checkpoints").exists()


def test_divergence_in_the_last_step_is_an_error(stored, tmp_path):
    settings = SETTINGS.model_copy(update={"learning_rate": 1e38, "batch_samples": 1000})
    with pytest.raises(NumericsError, match=r"the loss is not finite from step 1 on"):
        train_sae(stored, 3, settings, seed=0, out=tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_does_not_resume_another_training(stored, tmp_path, capsys):
    other = SETTINGS.model_copy(update={"learning_rate": 2e-3})
    assert run_training(stored, tmp_path / "sae", last=3, settings=other).returncode == -signal.SIGKILL
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "sae")
    assert "resuming" not in capsys.readouterr().err
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "fresh")
    assert contents(tmp_path / "sae") == contents(tmp_path / "fresh")


def test_does_not_resume_checkpoints_of_another_version(stored, tmp_path, capsys, monkeypatch):
    assert run_training(stored, tmp_path / "sae", last=3).returncode == -signal.SIGKILL
    monkeypatch.setattr(_checkpoints, "version", lambda _: "another")
    train_sae(stored, 3, SETTINGS, seed=0, out=tmp_path / "sae")
    assert "resuming" not in capsys.readouterr().err
