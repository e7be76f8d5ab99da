"""Progress of long steps: a bar on a terminal, a plain line every half minute in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0


def progress(items: Iterable[Item], total: int | None, what: str, unit: str) -> Iterator[Item]:
    """Yield ``items``, reporting the count, the rate and the time left on standard error.

    Args:
        items: what to go through.
        total: how many there are, where that is known.
        what: the step's name, such as ``"activations of minilm"``.
        unit: the plural of one item, such as ``"batches"``.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit=f" {unit}")
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            rate = done / (now - start)
            left = f" of {total:,} {unit}, {(total - done) / rate:.0f} s left" if total else f" {unit}"
            say(f"{what}: {done:,}{left} ({rate:.3g}/s)")
            last = now
    seconds = time.monotonic() - start
    say(f"{what}: {done:,} {unit} in {seconds:.1f} s ({done / max(seconds, 1e-9):.3g}/s)")


def say(message: str) -> None:
    """Write one line to standard error at once, so that a log can be followed."""
    print(message, file=sys.stderr, flush=True)
