"""SAEs trained by SAELens and by us, from the same weights on the same batches: quality, and tokens per second."""

import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from benchmarks.__main__ import TOKENS, D, F, K, seconds
from conceptshare.config.settings import SAESettings
from conceptshare.sae import SAE, Quality, evaluate, load_sae
from conceptshare.sae._trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "TopK": {},
    "BatchTopK": {"activation": "batchtopk"},
    "Matryoshka": {"activation": "batchtopk", "matryoshka": [1 / 16, 1 / 8, 1 / 4, 1 / 2]},
}
RATE, STEPS = 1e-3, 400


def main() -> None:
    """Print a line per kind of SAE."""
    for kind in KINDS:
        loss, (ours, theirs) = quality(kind)
        ratios, rates = speed(kind)
        print(
            f"{kind} trained by us and by SAELens: loss ratio {loss:.4f} after {STEPS} steps, "
            f"FVU {ours.fvu:.4f} and {theirs.fvu:.4f}, L0 {ours.l0:.1f} and {theirs.l0:.1f}; "
            f"tokens/s {rates[0]:,.0f} and {rates[1]:,.0f}, ratio {statistics.median(ratios):.2f} "
            f"(from {ratios[0]:.2f} to {ratios[-1]:.2f}), D {D}, F {F}, k {K}",
            flush=True,
        )


def quality(kind: str) -> tuple[float, list[Quality]]:
    """Ratio of the losses of the last 20 steps on sums of 64 of 4,096 directions, and held-out quality of both."""
    width, batches = 256, sums_of_directions(256)
    ours = our_trainer(kind, width, 8 * width)
    theirs = sae_lens_trainer(kind, ours.sae)
    losses = []
    for x in itertools.islice(batches, STEPS):
        ours.train_on(x)
        losses.append(theirs.step(x).losses["mse_loss"].item() / width)
    held_out = list(itertools.islice(batches, 4))
    found = [evaluate(sae, held_out).quality for sae in (ours.finish(), for_inference(theirs.sae))]
    return float(ours.losses[-20:].mean()) / statistics.mean(losses[-20:]), found


def speed(kind: str) -> tuple[list[float], list[float]]:
    """Ratios of tokens per second of alternate steps, sorted, and their medians."""
    x = torch.randn(TOKENS * 16, D, generator=torch.Generator().manual_seed(0))
    ours = our_trainer(kind, D, F)
    theirs = sae_lens_trainer(kind, ours.sae)
    steps = [lambda: ours.train_on(x), lambda: theirs.step(x)]
    for step in steps:
        step()
    times = [[seconds(step) for step in steps] for _ in range(7)]
    medians = [len(x) / statistics.median(column) for column in zip(*times, strict=True)]
    return sorted(b / a for a, b in times), medians


def our_trainer(kind: str, width: int, latents: int) -> Trainer:
    """As SAELens trains: with an encoder bias, and gradients clipped to a norm of 1 of its loss, a sum over D."""
    options = dict(KINDS[kind])
    if "matryoshka" in options:
        options["matryoshka"] = [int(share * latents) for share in options["matryoshka"]]
    settings = SAESettings(
        expansion=latents // width, k=K, learning_rate=RATE, encoder_bias=True, clip_norm=1 / width, **options
    )
    return Trainer(width, settings, 0, STEPS, torch.device("cpu"))


def sae_lens_trainer(kind: str, start: SAE) -> Any:
    """SAELens's trainer of the same SAE, from the same weights; with latents as they are, not rescaled."""
    # Reports to a website and the placing of a training, which a step does not use.
    for name in ("wandb", "accelerate", "accelerate.utils"):
        sys.modules.setdefault(name, MagicMock())
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"Matryoshka": "MatryoshkaBatchTopK"}.get(kind, kind)
    F, D = start.W_dec.shape
    sizes = {"matryoshka_widths": [int(share * F) for share in (*KINDS[kind].get("matryoshka", ()), 1)]}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=False, **(sizes if kind == "Matryoshka" else {})
    )
    model = getattr(sae_lens, f"{name}TrainingSAE")(config)
    weights = {name: getattr(start, name).detach().clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    model.load_state_dict(weights, strict=False)
    tokens = TOKENS * 16
    return SAETrainer(SAETrainerConfig(STEPS * tokens, tokens, lr=RATE, lr_end=RATE), model, iter([]))


def for_inference(model: Any) -> SAE:
    """SAELens's SAE as it saves it for inference, loaded by us."""
    with TemporaryDirectory() as folder:
        model.save_inference_model(folder)
        return load_sae(Path(folder))


def sums_of_directions(width: int) -> Iterator[Tensor]:
    """Batches of ``[4096, D]`` tokens: sums of 64 of 4,096 directions, with amounts up to 1."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4096, width, generator=generator))
    while True:
        chosen = torch.randint(4096, (4096, 64), generator=generator)
        amounts = torch.rand(4096, 64, generator=generator)
        yield torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=amounts, mode="sum")


if __name__ == "__main__":
    main()
