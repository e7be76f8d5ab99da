"""Compare each fast way with the straightforward one, on this machine, in one run.

These machines are noisy, so the two take turns, and the median ratio is what counts.
"""

import io
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from conceptshare.activations import extract_activations, prepared
from conceptshare.catalog import DatasetSpec, EncoderSpec
from conceptshare.correlations import max_correlations
from conceptshare.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.sae import TopKSAE

TURNS = 7


def main() -> None:
    """Print one line a comparison."""
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with TemporaryDirectory() as folder:
        compare(
            "extraction of 12 layers of a ViT-S, 500 pictures; plain is the forward pass alone",
            *extraction(Path(folder)),
            3,
        )
    for precision in ("float32", "bfloat16"):
        compare(f"SAE training step in {precision}, D 768, F 6144, k 32, 4112 tokens", *sae_steps(precision))
    compare("correlations, 2 x 2048 features with 2 x 2048, N 4096, both directions", *correlations())
    start_times()


def compare(what: str, ours: Callable[[], object], plain: Callable[[], object], turns: int = TURNS) -> None:
    """Time two ways in turns and print how many times faster ours is."""
    ours(), plain()
    times = [(seconds(ours), seconds(plain)) for _ in range(turns)]
    ratios = sorted(b / a for a, b in times)
    ours_s, plain_s = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{what}: {statistics.median(ratios):.2f} times the plain way "
        f"(from {ratios[0]:.2f} to {ratios[-1]:.2f}; {ours_s:.3f} s and {plain_s:.3f} s)"
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def extraction(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Recording every layer, and a bare forward pass, over the same pictures prepared in the same way."""
    noise = np.random.default_rng(0).integers(0, 256, (500, 24, 32, 3), dtype=np.uint8)
    files = []
    for pixels in noise:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append({"image": file.getvalue(), "caption": "noise"})
    pd.DataFrame(files).to_parquet(folder / "noise.parquet")
    quiet(lambda: make_dataset(DatasetSpec(source=str(folder / "noise.parquet")), folder / "data"))
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

    stores = (folder / f"vit-{n}.zarr" for n in itertools.count())

    def ours() -> None:
        quiet(lambda: extract_activations(encoder, data, next(stores), threads))

    return ours, bare


def sae_steps(precision: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Loss and gradients of one batch: touching active latents alone, and by dense autograd in float32."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(768, 6144, 32, generator)
    x = torch.randn(4112, 768, generator=generator)

    def sparse(x: Tensor) -> Tensor:
        return sae.decode(sae.top_k(x, precision))

    def dense(x: Tensor) -> Tensor:
        values, indices = sae.encode(x).topk(sae.k, dim=1)
        latents = torch.zeros(len(x), len(sae.W_dec)).scatter(1, indices, values)
        return latents @ sae.W_dec + sae.b_dec

    def step(reconstruct: Callable[[Tensor], Tensor]) -> None:
        sae.zero_grad()
        (reconstruct(x) - x).square().mean().backward()

    return lambda: step(sparse), lambda: step(dense)


def correlations() -> tuple[Callable[[], None], Callable[[], None]]:
    """Best matches of two encoders with two layers each: from one product a pair, and from one a direction."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(4096, 2048, generator=generator) for _ in range(4)]
    a, b = layers[:2], layers[2:]

    def standardised(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return x / x.norm(dim=0)

    def plain() -> None:
        for source, target in [(a, b), (b, a)]:
            for x in source:
                for y in target:
                    (standardised(x).T @ standardised(y)).max(dim=1)

    return lambda: quiet(lambda: max_correlations(a, b)), plain


def quiet(work: Callable[[], object]) -> None:
    """Run without the progress report."""
    stderr, sys.stderr = sys.stderr, open("/dev/null", "w", encoding="utf-8")  # noqa: PTH123, SIM115
    try:
        work()
    finally:
        sys.stderr.close()
        sys.stderr = stderr


def start_times() -> None:
    """Time what each cluster job does first, and a plan of the default study."""
    snakemake = str(Path(sys.executable).parent / "snakemake")
    for what, command in {
        "reading a study, without torch": [sys.executable, "-m", "conceptshare", "check"],
        "planning the default study": [snakemake, "-n", "--quiet", "all"],
    }.items():
        times = [seconds(lambda c=command: subprocess.run(c, capture_output=True, check=True)) for _ in range(3)]
        print(f"{what}: {statistics.median(times):.2f} s")


if __name__ == "__main__":
    main()
