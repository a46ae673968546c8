"""Why a DMA of a device failed, for the person who runs its server: a trace record for each, log lines at a rate.

A driver that programs a wrong address does so thousands of times. The log has the first few failures of a second and
then how many there were; the trace has them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from hostd.log import log
from vfio_model.trace import Trace

LINES_A_SECOND: Final = 5


class DmaFailures:
    """Of the device called ``name``."""

    def __init__(self, name: str, trace: Trace, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._name, self._trace, self._monotonic = name, trace, monotonic
        self._since, self._lines, self._left_out = 0.0, 0, 0

    def note(self, iova: int, length: int, is_write: bool, why: str) -> None:
        """An access failed (``vfio_model.memory.mapped_dma.Refused``)."""
        self._trace("remote_dma_failed", iova=iova, length=length, is_write=is_write, reason=why)
        self.say(f"DMA {'write' if is_write else 'read'} of {length} bytes at {iova:#x} failed: {why}")

    def say(self, text: str) -> None:
        """A line in the log, unless there were too many in this second."""
        now = self._monotonic()
        if now - self._since >= 1:
            if self._left_out:
                log(self._name, f"{self._left_out} more lines of this kind were left out")
            self._since, self._lines, self._left_out = now, 0, 0
        if self._lines < LINES_A_SECOND:
            self._lines += 1
            log(self._name, text)
        else:
            self._left_out += 1
