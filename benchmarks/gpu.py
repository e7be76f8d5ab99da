"""A short look at a GPU: what it computes, how fast, and in how much memory (``make bench-gpu``).

Each part runs in a process of its own, which is ended at its deadline. Results are lines of JSON in `gpu.jsonl`,
printed as each part ends; what the libraries log is in `gpu.log`.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, get_args
from unittest.mock import MagicMock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from conceptshare.device import DEVICE, find_driver, full_float32, why_no_gpu

TOTAL_SECONDS = 480
"""All parts together; a part gets what is left if that is less than its deadline."""
SMALL = False
"""Whether sizes are tiny and there are no deadlines, for a rehearsal."""


def main() -> None:
    """Run all parts, or those that are named."""
    global SMALL
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for gpu.jsonl and gpu.log")
    parser.add_argument("--small", action="store_true", help="tiny sizes and no deadlines, to rehearse")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to a part's own process
    given = parser.parse_args()
    SMALL = given.small
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        sys.exit(f"no GPU: {why_no_gpu()}")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.folder:
        work(given.parts[0], given.folder, given.out)
        return
    os.environ[DEVICE] = "cuda"
    (given.out / "gpu.jsonl").unlink(missing_ok=True)
    deadline = time.monotonic() + TOTAL_SECONDS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and with it the part that runs
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts or PARTS:
            seconds = 3600 if SMALL else min(PARTS[part][1], deadline - time.monotonic())
            command = [sys.executable, "-m", "benchmarks.gpu", part, "--folder", folder, "--out", str(given.out)]
            for line in run_part(part, [*command, *["--small"] * SMALL], seconds, given.out):
                print(line, flush=True)


def run_part(part: str, command: Sequence[str], seconds: float, out: Path) -> list[str]:
    """Run a part in a process of its own and return its lines, the last of which says how it ended if it failed."""
    lines, log = out / "gpu.jsonl", out / "gpu.log"
    lines.touch()
    before = lines.stat().st_size
    with log.open("w" if before == 0 else "a") as file:
        # A process group of its own, so that what it starts ends with it.
        process = subprocess.Popen(command, stdout=file, stderr=file, process_group=0)
        try:
            status: int | None = process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status is None:
        emit(out, part, error=f"ended at its deadline of {seconds:.0f} s")
    elif status:
        message = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        emit(out, part, error=message[0] if message else f"exit status {status}", log=str(log))
    with lines.open() as file:
        file.seek(before)
        return file.read().splitlines()


Emit = Callable[..., None]
"""Adds a line of results, with the values it is called with."""


def emit(out: Path, part: str, **values: Any) -> None:
    """Append a line of results of a part."""
    rounded = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in values.items()}
    with (out / "gpu.jsonl").open("a") as file:
        file.write(json.dumps({"part": part, **rounded}) + "\n")


def work(part: str, folder: Path, out: Path) -> None:
    """Run a part in this process, with its peaks of memory in its last line."""
    started = time.perf_counter()
    PARTS[part][0](folder, partial(emit, out, part))
    peaks = {
        "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "gpu_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    emit(out, part, finished_after=time.perf_counter() - started, **peaks)


def median_seconds(work: Callable[[], object], times: int = 1) -> float:
    """Median time of one of ``times`` calls in a row, after a first call that is not timed."""
    work()
    rounds, times = (1, 1) if SMALL else (5, times)
    measured = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        measured.append((time.perf_counter() - start) / times)
    return statistics.median(measured)


# Versions and the card's own rates

PACKAGES = ("torch", "transformers", "timm", "open_clip_torch", "zarr", "numpy", "sae-lens", "eai-sparsify")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rates(_folder: Path, emit: Emit) -> None:
    """Versions, and the rates of products and copies that everything else is bound by."""
    card = torch.cuda.get_device_properties(0)
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    emit(
        card=card.name,
        memory_gb=card.total_memory / 1e9,
        driver=str(find_driver()),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        python=platform.python_version(),
        cpus=os.cpu_count(),
        **versions,
    )
    size = 64 if SMALL else 8192
    for name in DTYPES:
        for what, n in {"aligned": size, "odd": size - 1}.items():
            emit(what=f"product, {what}", precision=name, n=n, tflops=product_rate(name, n, n))
    values = torch.zeros(2**20 if SMALL else 2**29, dtype=torch.float16)
    on_card = values.to("cuda")
    for kind, host in (("pageable", values), ("pinned", values.pin_memory())):
        for what, target, source in (("to the card", on_card, host), ("from the card", host, on_card)):
            seconds = median_seconds(partial(target.copy_, source, non_blocking=True))
            emit(what=f"copy {what}, {kind}", gb_per_s=values.nbytes / seconds / 1e9)
    seconds = median_seconds(on_card.clone, 10)
    emit(what="copy on the card, bytes read and written", gb_per_s=2 * values.nbytes / seconds / 1e9)


def product_rate(precision: str, rows: int, columns: int) -> float:
    """TFLOP/s of x^T y, with x and y [rows, columns] and a float32 result, as correlations multiply."""
    x, y = (torch.randn(rows, columns, device="cuda").to(DTYPES[precision]) for _ in range(2))
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if x.dtype == torch.float32:
        seconds = median_seconds(lambda: torch.mm(x.T, y), 5)
    else:
        seconds = median_seconds(lambda: torch.mm(x.T, y, out_dtype=torch.float32), 5)
    torch.set_float32_matmul_precision("highest")
    return 2 * rows * columns**2 / seconds / 1e12


# Parity with the CPU


def parity(_folder: Path, emit: Emit) -> None:
    """The tests that need a GPU, which compare all stages, encoders and options with the CPU; each is in gpu.log."""
    import pytest  # not above: only this part needs it

    outcomes: Counter[str] = Counter()

    class Results:
        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] += 1
            if report.outcome == "failed":
                error = str(report.longrepr).splitlines()
                first = next((line for line in error if line.startswith("E ")), error[-1])
                emit(test=report.nodeid, error=first[1:300].strip())

    # By default the tests of one file run in one process.
    processes = ["-n", str(min(6, os.cpu_count() or 1)), "--dist", "load"]
    options = ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-v", "-m", "gpu", *processes]
    status = pytest.main([*options, "tests/test_gpu.py"], plugins=[Results()])
    emit(status=int(status), **outcomes)


# A step of an SAE


def sae(_folder: Path, emit: Emit) -> None:
    """A training step, and the same by dense autograd in float32, by sparsify and by SAELens if they are installed."""
    from benchmarks.__main__ import TOKENS, K, sae_steps
    from conceptshare.config.settings import SAESettings

    width = 16 if SMALL else 1024
    for precision in get_args(SAESettings.model_fields["precision"].annotation):
        with full_float32():
            ours, dense = sae_steps(precision, width)
            emit(what="SAE step", precision=precision, seconds=median_seconds(ours, 10))
    with full_float32():
        emit(what="SAE step, dense", precision="float32", seconds=median_seconds(dense, 5))
    torch.set_float32_matmul_precision("high")
    emit(what="SAE step, dense", precision="tf32", seconds=median_seconds(dense, 5))
    torch.set_float32_matmul_precision("highest")
    x = torch.randn(TOKENS * 16, width, device="cuda")
    for make in (sparsify_loss, sae_lens_loss):
        library = make.__name__.removesuffix("_loss")
        try:
            model, loss = make(width, 8 * width, K)
            adam = torch.optim.Adam(model.parameters(), lr=5e-5, fused=True)

            def step(loss: Callable[[Tensor], Tensor] = loss, adam: torch.optim.Optimizer = adam) -> None:
                adam.zero_grad()
                torch.autograd.backward(loss(x))
                adam.step()

            emit(what=f"SAE step of {library}", seconds=median_seconds(step, 5))
        except Exception as error:  # not installed, or not for this machine
            emit(what=f"SAE step of {library}", not_measured=f"{type(error).__name__}: {error}"[:300])


def sparsify_loss(width: int, latents: int, k: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """In bfloat16 by autocast, as it always runs."""
    # Reports to a website and the placing of a training, which a step does not use.
    for name in ("wandb", "accelerate", "accelerate.utils", "schedulefree"):
        with contextlib.suppress(ImportError):
            __import__(name)
        sys.modules.setdefault(name, MagicMock())
    from sparsify import SparseCoder, SparseCoderConfig

    model = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=k), device="cuda")
    return model, lambda x: model(x).fvu


def sae_lens_loss(width: int, latents: int, k: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """In float32, its default."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=latents, k=k, device="cuda"))
    return model, lambda x: model.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss


# An encoder of the size of a ViT-L, and a stream of its layers


def vit_l(folder: Path) -> Any:
    """The entry of a ViT-L with random weights, written once."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    from conceptshare.config.catalog import EncoderSpec

    layers, width, side = (3, 32, 28) if SMALL else (24, 1024, 224)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    if not folder.exists():
        config = ViTConfig(**sizes, num_attention_heads=max(2, width // 64), image_size=side, patch_size=14)
        with torch.device("cuda"):  # whose random numbers are faster
            ViTModel(config).save_pretrained(folder)
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    entry: dict[str, Any] = {"library": "transformers", "modality": "image", "kind": "vision", "global_token": "first"}
    return EncoderSpec(model=str(folder), layers=layers, width=width, batch_size=4 if SMALL else 32, **entry)


def encoder(folder: Path, emit: Emit) -> None:
    """Reading all layers in each precision, and bare forward passes."""
    from conceptshare.encoders import load_encoder

    spec = vit_l(folder / "vit-l")
    pixels = np.random.default_rng(0).integers(0, 256, (spec.batch_size, 480, 640, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    T, D = 257, spec.width
    operations = len(images) * spec.layers * (24 * T * D**2 + 4 * T**2 * D)  # of the blocks' products

    def report(what: str, precision: str, seconds: float) -> None:
        rates = {"images_per_s": len(images) / seconds, "tflops": operations / seconds / 1e12}
        emit(what=what, precision=precision, seconds=seconds, **rates)

    for precision in reversed(get_args(type(spec).model_fields["precision"].annotation)):
        loaded = load_encoder(spec.model_copy(update={"precision": precision}))
        batch = loaded.prepare(images)
        report("reading all layers", precision, median_seconds(partial(loaded.read, batch), 2))
    start = time.perf_counter()
    loaded.prepare(images)
    emit(what="preparing a batch", images_per_s=len(images) / (time.perf_counter() - start))
    assert loaded.spec.precision == "float32"
    inputs = {name: value.to(loaded.device) for name, value in batch.inputs.items()}

    @torch.inference_mode()
    def bare() -> None:
        loaded.forward(inputs)

    for precision in DTYPES:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        low = DTYPES[precision]
        with torch.autocast("cuda", low, enabled=low != torch.float32):
            report("bare forward pass", precision, median_seconds(bare, 2))


def stream(folder: Path, emit: Emit) -> None:
    """Training SAEs on all layers during the encoder's passes: twice, so that the difference is the steps alone."""
    from benchmarks.__main__ import noise_data, quiet
    from conceptshare.config.settings import SAESettings
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_encoder
    from conceptshare.sae import train_stream

    loaded, settings, took = load_encoder(vit_l(folder / "vit-l")), SAESettings(), {}
    for samples in (32, 64) if SMALL else (128, 640):
        place = folder / f"stream-{samples}"
        place.mkdir()
        noise_data(place, samples)
        start = time.perf_counter()
        data, workers = Data(place / "data"), os.cpu_count() or 1
        quiet(partial(train_stream, loaded, data, settings, [0], place / "vit", place / "vit.zarr", workers))
        took[samples] = time.perf_counter() - start
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        emit(what="stream, from images to files", images=samples, seconds=took[samples], gb=size / 1e9)
    (few, short), (many, long) = took.items()
    steps = (many - few) / settings.batch_samples
    each = {"seconds_per_step": (long - short) / steps, "images_per_s": (many - few) / (long - short)}
    emit(what="stream, steps alone", layers=loaded.spec.layers, **each)


# Correlations of one large pair


def correlations(_folder: Path, emit: Emit) -> None:
    """Two layers with two: errors against float64, seconds, share of the product's peak, and memory in a budget."""
    from benchmarks.__main__ import quiet
    from conceptshare.correlations import Precision, max_correlations

    N, F = (400, 128) if SMALL else (118_287, 8192)
    a, b = ([features(N, F, 2 * side + layer) for layer in range(2)] for side in range(2))
    b[0][:, : F // 4] = a[0][:, : F // 4]
    b[0][:, F // 8 : F // 4 : 2] += b[1][:, F // 8 : F // 4 : 2]  # half alike
    operations = 2 * N * F**2 * len(a) * len(b)
    a_on_card, b_on_card = ([torch.from_numpy(layer).to("cuda") for layer in side] for side in (a, b))

    def run(x: Any, y: Any, precision: Any, budget: int | None = None, full: Any = None) -> float:
        torch.cuda.empty_cache()  # the default budget is a share of the free memory
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        quiet(lambda: max_correlations(x, y, budget, precision, full))
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for precision in get_args(Precision):
        peak = product_rate(precision, -(-N // 64) * 64, F)
        emit(what="the product alone", precision=precision, tflops=peak)
        whole = np.zeros((F, F), np.float32)
        run(a_on_card, b_on_card, precision, full={(0, 0): whole})
        emit(what="errors", precision=precision, **errors(a_on_card, b_on_card, whole))
        for where, (x, y) in {"on the card": (a_on_card, b_on_card), "in host memory": (a, b)}.items():
            seconds = min(run(x, y, precision) for _ in range(2))
            rate = operations / seconds / 1e12
            values = {"seconds": seconds, "tflops": rate, "share_of_peak": rate / peak}
            emit(what=f"features {where}", precision=precision, **values)
    del a_on_card, b_on_card, x, y
    torch.cuda.empty_cache()
    budgets = {card: 2**24 if SMALL else card * 10**9 * 4 // 5 for card in (24, 40, 80)}
    free = torch.cuda.mem_get_info()[0]
    for card, budget in ((card, budget) for card, budget in budgets.items() if budget < free):
        for precision in get_args(Precision):
            seconds, used = run(a, b, precision, budget), torch.cuda.max_memory_allocated()
            values = {"seconds": seconds, "tflops": operations / seconds / 1e12, "share_of_budget": used / budget}
            emit(what=f"budget of a card of {card} GB", precision=precision, **values)


def features(N: int, F: int, seed: int) -> NDArray[np.float16]:
    """``[N, F]`` features of which some are active on a third of the samples, and some on a few."""
    generator = torch.Generator("cuda").manual_seed(seed)
    density = 10 ** (-0.5 - 4 * torch.rand(F, device="cuda", generator=generator))
    made = np.empty((N, F), np.float16)
    for start in range(0, N, 8192):
        x = torch.rand(min(8192, N - start), F, device="cuda", generator=generator)
        made[start : start + len(x)] = torch.where(x < density, x / density, 0).half().cpu().numpy()
    return made


def errors(a: list[Tensor], b: list[Tensor], whole: NDArray[np.float32]) -> dict[str, Any]:
    """The largest errors of the first layers' correlations, of every 16th feature, of all and of rare ones."""
    x, y = a[0][:, ::16].double(), b[0][:, ::16].double()
    found = torch.from_numpy(whole[::16, ::16]).to("cuda").double()
    rare = ((x > 0).sum(0) < 20)[:, None] | ((y > 0).sum(0) < 20)
    for side in (x, y):
        side -= side.mean(0)
        side /= side.norm(dim=0)
    error = (x.T @ y).nan_to_num() - found  # the correlation of a constant feature is 0
    return {
        "largest": error.abs().max().item(),
        "largest_of_rare": error[rare].abs().max().item(),
        "rare": int(rare.sum()),
    }


PARTS: dict[str, tuple[Callable[[Path, Emit], None], float]] = {
    "rates": (rates, 40),
    "parity": (parity, 150),
    "sae": (sae, 50),
    "encoder": (encoder, 70),
    "correlations": (correlations, 120),
    "stream": (stream, 100),
}
"""Each part, and its deadline in seconds."""


if __name__ == "__main__":
    main()
