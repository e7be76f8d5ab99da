"""Progress of long steps: a bar on a terminal, one line every half minute in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0
_SUBJECT: ContextVar[str] = ContextVar("subject", default="")


def progress(items: Iterable[Item], total: int | None, what: str, unit: str) -> Iterator[Item]:
    """Yield ``items`` and report the count, the rate and the remaining time on standard error.

    Args:
        items: the items to iterate over.
        total: number of items, if known.
        what: name of the step, such as ``"activations of minilm"``.
        unit: plural noun for the items, such as ``"batches"``.
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
            info(f"{what}: {done:,}{left} ({rate:.3g}/s)")
            last = now
    seconds = time.monotonic() - start
    info(f"{what}: {done:,} {unit} in {seconds:.1f} s ({done / max(seconds, 1e-9):.3g}/s)")


def info(message: str) -> None:
    """Write one line to standard error and flush it, so that a log can be followed."""
    print(f"{_SUBJECT.get()}{message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Like `info`, for a line that the workflow repeats on the terminal, because it says what may be wrong."""
    print(f"warning: {_SUBJECT.get()}{message}", file=sys.stderr, flush=True)


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Begin the lines of `info` and `warn` with a subject."""
    token = _SUBJECT.set(f"{subject}: ")
    try:
        yield
    finally:
        _SUBJECT.reset(token)
