"""Work that is started before its turn, such as reading the next batches while one is computed on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_order(jobs: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """The results of jobs in their order.

    Args:
        jobs: gives for each job a function that waits for its result; a job is started by being taken from it, as in
            ``(pool.submit(read, name).result for name in names)``.
        ahead: how many jobs are started before their turn; no more are held in memory.
    """
    started: deque[Callable[[], T]] = deque()
    for job in jobs:
        started.append(job)
        if len(started) > ahead:
            yield started.popleft()()
    while started:
        yield started.popleft()()
