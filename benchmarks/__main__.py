"""Compare each fast way with the straightforward one, on this machine, in one run.

These machines are noisy, so the two alternate, and the median ratio is reported.
"""

import io
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import zarr
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from conceptshare.activations import extraction as activations
from conceptshare.activations.extraction import extract_activations, prepared
from conceptshare.config.catalog import DatasetSpec, EncoderSpec
from conceptshare.config.settings import SAESettings
from conceptshare.correlations import Precision, max_correlations
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.device import default_device, log_device
from conceptshare.encoders import load_encoder
from conceptshare.io.layout import layer_name
from conceptshare.io.store import RowWriter, new_array, new_store, save_array
from conceptshare.sae import SAE, TopK, _order, evaluate, train_sae
from conceptshare.sae._trainer import Trainer

TURNS = 7

# Two encoders, whose features are correlated.
LAYERS, FEATURES, SAMPLES = 4, 2048, 8192
# An SAE of a ViT-B, and the tokens of one image.
D, F, K, TOKENS = 768, 6144, 32, 257


def main() -> None:
    """Print one line per comparison."""
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    log_device()
    with TemporaryDirectory() as folder:
        compare(
            "extraction of 12 layers of a ViT-S, 500 images; baseline: the forward pass alone",
            *extraction(Path(folder)),
            3,
        )
    for precision in ("float32", "bfloat16"):
        compare(f"SAE training step in {precision}, D 768, F 6144, k 32, 4112 tokens", *sae_steps(precision))
    quality_of_bfloat16()
    with TemporaryDirectory() as folder:
        compare(
            "SAE training of 60 such batches, from store to files; baseline: the steps alone",
            *whole_job(Path(folder)),
            3,
        )
    with TemporaryDirectory() as folder:
        best_matches(Path(folder))
        reading_features(Path(folder))
    start_times()
    # By a process that is small itself: the peak memory that the system tells of a process is at least its parent's.
    for part in ("next_to_sae_lens", "planted", "largest_study", "site"):
        subprocess.run([sys.executable, "-m", f"benchmarks.{part}"], check=True)


def compare(what: str, ours: Callable[[], object], baseline: Callable[[], object], turns: int = TURNS) -> None:
    """Time two implementations alternately and print the speed-up of ours."""
    ours(), baseline()
    times = [(seconds(ours), seconds(baseline)) for _ in range(turns)]
    ratios = sorted(b / a for a, b in times)
    ours_s, baseline_s = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{what}: speed-up {statistics.median(ratios):.2f} over the baseline "
        f"(from {ratios[0]:.2f} to {ratios[-1]:.2f}; {ours_s:.3f} s and {baseline_s:.3f} s)"
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, with what it left a GPU to do."""
    start = time.perf_counter()
    work()
    if default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extraction(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Recording every layer, and a bare forward pass, over the same images prepared in the same way."""
    noise_data(folder, 500)
    size = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    ViTModel(ViTConfig(**size)).save_pretrained(folder / "model")
    ViTImageProcessor().save_pretrained(folder / "model")
    entry = {"library": "transformers", "modality": "image", "kind": "vision", "global_token": "first"}
    encoder = load_encoder(EncoderSpec(model=str(folder / "model"), layers=12, width=384, **entry))
    data, threads = Data(folder / "data"), torch.get_num_threads()
    starts = range(0, len(data), encoder.spec.batch_size)

    @torch.inference_mode()
    def bare() -> None:
        for _, batch in prepared(encoder, data, starts, threads):
            encoder.forward({name: value.to(encoder.device) for name, value in batch.inputs.items()})

    places = (folder / f"{n}" for n in itertools.count())

    def ours() -> None:
        place = next(places)
        quiet(lambda: extract_activations(encoder, data, place / "vit.zarr", place / "tokens.zarr", threads))

    return ours, bare


def noise_data(folder: Path, count: int) -> None:
    """Write a data set of so many images of noise, 640 x 480, into `folder/data`."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)
    files = []
    for pixels in noise:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append({"image": file.getvalue(), "caption": "noise"})
    pd.DataFrame(files).to_parquet(folder / "noise.parquet")
    quiet(lambda: make_dataset(DatasetSpec(source=str(folder / "noise.parquet")), folder / "data"))


def sae_steps(precision: str, width: int = D) -> tuple[Callable[[], None], Callable[[], None]]:
    """One training step: touching active latents alone, and by dense autograd in float32, both with fused Adam."""
    device = default_device()
    x = torch.randn(TOKENS * 16, width, generator=torch.Generator().manual_seed(0)).to(device)
    trainer = Trainer(width, SAESettings(precision=precision), 0, 1000, device)
    sae = SAE(width, 8 * width, TopK(K), torch.Generator().manual_seed(0)).to(device)
    adam = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=5e-5, fused=True)

    def dense() -> None:
        values, indices = sae.encode(x).topk(K, dim=1)
        latents = torch.zeros(len(x), 8 * width, device=device).scatter(1, indices, values)
        loss = (latents @ sae.W_dec + sae.b_dec - x).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    return lambda: trainer.train_on(x), dense


def whole_job(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Training from a store that is read from disk as it goes to the SAE's files, and its steps alone."""
    samples, settings = 16 * 60, SAESettings(held_out=0.04)
    steps = len(_order.steps(samples, settings.batch_samples, 32, settings))
    generator = torch.Generator().manual_seed(0)
    spec = {"encoder": {"modality": "image"}, "batch_size": 32}
    with new_store(folder / "vit.zarr", activations.TOKENS, spec) as store:
        group = store.create_group(layer_name(0))
        tokens = RowWriter(group, "tokens", D, np.float16, 2**25)
        for _ in range(samples):
            tokens.append(torch.randn(TOKENS, D, generator=generator).half().numpy())
        tokens.flush()
        save_array(store, "offsets", np.arange(samples + 1) * TOKENS)
        save_array(store, "global_rows", np.arange(samples) * TOKENS)
    batch = torch.randn(TOKENS * 16, D, generator=generator).to(default_device())
    outs = (folder / f"sae-{n}" for n in itertools.count())

    def ours() -> None:
        with patch.object(activations, "IN_MEMORY_BYTES", 0):  # as if the layer were larger than memory
            quiet(lambda: train_sae(folder / "vit.zarr", 0, settings, 0, next(outs)))

    def bare() -> None:
        trainer = Trainer(D, settings, 0, steps, default_device())
        for _ in range(steps):
            trainer.train_on(batch)

    return ours, bare


def quality_of_bfloat16() -> None:
    """FVU after the same training with a bfloat16 product and without, on sums of 64 directions of 4,096."""
    generator = torch.Generator().manual_seed(0)
    width, tokens, steps = 256, 4096, 400
    directions = torch.nn.functional.normalize(torch.randn(4096, width, generator=generator))

    def batch() -> Tensor:
        chosen = torch.randint(4096, (tokens, 64), generator=generator)
        amounts = torch.rand(tokens, 64, generator=generator)
        return torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=amounts, mode="sum").to(
            default_device()
        )

    batches, held_out, found = [batch() for _ in range(steps)], [batch() for _ in range(4)], {}
    for precision in ("float32", "bfloat16"):
        settings = SAESettings(learning_rate=1e-3, decay_share=0.2, precision=precision)
        trainer = Trainer(width, settings, 0, steps, default_device())
        for x in batches:
            trainer.train_on(x)
        found[precision] = evaluate(trainer.finish(), held_out).quality.fvu
    print(
        f"FVU after {steps} steps with a bfloat16 product: {found['bfloat16'] / found['float32']:.4f} times that of "
        f"float32, which is {found['float32']:.4f}"
    )


def best_matches(folder: Path) -> None:
    """Best matches of two encoders: beside the bare products, and beside one product a direction."""
    generator = torch.Generator().manual_seed(0)
    stored = zarr.open_group(folder / "features.zarr", mode="w")
    for n in range(2 * LAYERS):
        features = torch.randn(SAMPLES, FEATURES, generator=generator).relu().half().numpy()
        array = new_array(stored, layer_name(n), features.shape, np.float16, (1024, 512), (1024, FEATURES))
        array[...] = features
    in_memory = [stored[layer_name(n)][:] for n in range(2 * LAYERS)]
    on_disk = [stored[layer_name(n)] for n in range(2 * LAYERS)]
    device = default_device()
    operands = [standardised(torch.from_numpy(layer).to(device).float()) for layer in (in_memory[0], in_memory[-1])]
    # A CPU takes float32 for bfloat16, and has nothing to compare.
    precisions: tuple[Precision, ...] = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)

    def matches(layers: list[Any], precision: Precision) -> None:
        quiet(lambda: max_correlations(layers[:LAYERS], layers[LAYERS:], 2**31, precision))

    def products(x: Tensor, y: Tensor, precision: Precision) -> None:
        for _ in range(LAYERS**2):
            if precision == "float32":
                torch.mm(x.T, y)
            else:
                torch.mm(x.bfloat16().T, y.bfloat16(), out_dtype=torch.float32)

    def straightforward() -> None:
        layers = [torch.from_numpy(layer).to(device) for layer in in_memory]
        for source, target in ((layers[:LAYERS], layers[LAYERS:]), (layers[LAYERS:], layers[:LAYERS])):
            for x in source:
                for y in target:
                    (standardised(x.float()).T @ standardised(y.float())).max(dim=1).values.cpu()

    size = f"{LAYERS} x {FEATURES} features with {LAYERS} x {FEATURES}, N {SAMPLES}"
    for precision in precisions:
        bare = partial(products, *operands, precision)
        ours: Any = partial(matches, in_memory, precision)
        compare(f"best matches in {precision}, {size}; baseline: the {LAYERS**2} products alone", ours, bare, 5)
    for precision in precisions:
        ours = partial(matches, on_disk, precision)
        compare(
            f"best matches in {precision}, from disk; baseline: one product per direction", ours, straightforward, 3
        )


def reading_features(folder: Path) -> None:
    """What a layer's features cost to read, and to compute again from the global tokens."""
    stored = zarr.open_group(folder / "features.zarr", mode="r")[layer_name(0)]
    generator = torch.Generator().manual_seed(0)
    for width in (512, 1024):
        sae = SAE(width, FEATURES, TopK(K), generator).to(default_device())
        x = torch.randn(SAMPLES, width, generator=generator)
        with torch.no_grad():
            compare(
                f"reading a layer's features, D {width}; baseline: recomputing them from global tokens",
                lambda: stored[:],  # type: ignore[index]
                lambda sae=sae, x=x: sae.encode(x.to(default_device())).half().cpu().numpy(),  # type: ignore[misc]
            )


def standardised(x: Tensor) -> Tensor:
    """Columns of mean 0 and length 1."""
    x = x - x.mean(0)
    return x / x.norm(dim=0)


def quiet(work: Callable[[], object]) -> None:
    """Run without the progress report."""
    with redirect_stderr(io.StringIO()):
        work()


def start_times() -> None:
    """Time what each cluster job does first, and a plan of the default study."""
    snakemake = str(Path(sys.executable).parent / "snakemake")
    for what, command in {
        "reading a study, without torch": [sys.executable, "-m", "conceptshare", "check"],
        "starting a table": [sys.executable, "-c", "import conceptshare.cli, conceptshare.analysis.tables"],
        "starting a figure": [sys.executable, "-c", "import conceptshare.cli, conceptshare.figures"],
        "planning the default study": [snakemake, "-n", "--quiet", "all"],
    }.items():
        times = [seconds(lambda c=command: subprocess.run(c, capture_output=True, check=True)) for _ in range(3)]
        print(f"{what}: {statistics.median(times):.2f} s")


if __name__ == "__main__":
    main()
