"""Prefetching: jobs are started ahead of time, such as reading the next batches while one is being computed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_order(jobs: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Yield the results of jobs in order.

    Args:
        jobs: yields, for each job, a function that waits for its result. Taking the next item starts the job, as in
            ``(pool.submit(read, name).result for name in names)``.
        ahead: number of jobs to start ahead of time; no more results are held in memory.
    """
    started: deque[Callable[[], T]] = deque()
    for job in jobs:
        started.append(job)
        if len(started) > ahead:
            yield started.popleft()()
    while started:
        yield started.popleft()()
