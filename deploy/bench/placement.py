"""Where processes run while they are compared: who asks on one processor, who answers on another.

Left to the scheduler, a pair of processes that speak in turn settles on one processor or on two, each pair for itself,
and a round trip on two takes twice to four times as long. A comparison would then be one of placements.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def opposite(asking: Iterable[int], answering: Iterable[int]) -> Iterator[None]:
    """Keep all threads that the processes ``asking`` (pids) have now on one processor and those of ``answering`` on
    another; threads that they start inherit it. Afterwards those that still run may run where this one may. No change
    where there is but one processor.
    """
    allowed = os.sched_getaffinity(0)
    one, *others = sorted(allowed)
    sides = [(list(asking), {one}), (list(answering), {others[-1]})] if others else []
    try:
        for pids, processors in sides:
            _keep(pids, processors)
        yield
    finally:
        for pids, _ in sides:
            _keep(pids, allowed)


def _keep(pids: Iterable[int], processors: set[int]) -> None:
    for pid in pids:
        try:
            threads = psutil.Process(pid).threads()
        except psutil.NoSuchProcess:
            continue
        for thread in threads:
            try:
                os.sched_setaffinity(thread.id, processors)
            except ProcessLookupError:
                continue
