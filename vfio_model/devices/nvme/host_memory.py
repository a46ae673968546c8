"""nvme: data of commands to and from host memory, by PRPs.

Few calls move it: pages that follow each other are one DMA, and many that do not are one batch. It goes through a
bounce buffer, which stays in the processor's cache: up to transfers of 512 KiB that is no slower than to map host
memory for each command. The buffer belongs to the controller and is used by one command at a time, since commands are
carried out one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vfio_model.devices.nvme import prp
from vfio_model.devices.nvme.regs import Command, Status
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.types import MemTxResult, ReadBuffer

KEPT_BUFFER = 1 << 20
"""Bytes of bounce buffer that are kept between commands; a larger one is made for its command."""
BATCH_MIN = 64
"""Pages apart from each other from which they go as a batch."""

_One = Callable[[int, memoryview], MemTxResult]
_Many = Callable[[Sequence[int], int, memoryview], MemTxResult]


class HostMemory:
    """What commands move through ``dma``, in pages of the size that the host chose."""

    def __init__(self, dma: DMASpace) -> None:
        self._dma = dma
        self.page_size = 4096
        self.moved = 0
        """Bytes so far, of all commands: the measure of how long they took."""
        self._kept = memoryview(bytearray(KEPT_BUFFER))

    def buffer(self, length: int) -> memoryview:
        """``length`` bytes with any content, for the command in progress."""
        return self._kept[:length] if length <= KEPT_BUFFER else memoryview(bytearray(length))

    def to_host(self, command: Command, data: ReadBuffer) -> int:
        """Store ``data`` where ``command`` wants it; a status."""
        return self._move(self._dma.write, self._dma.write_many, command, memoryview(data))

    def from_host(self, command: Command, out: memoryview) -> int:
        """Fill ``out`` from where ``command`` says; a status."""
        return self._move(self._dma.read, self._dma.read_many, command, out)

    def _move(self, one: _One, many: _Many, command: Command, data: memoryview) -> int:
        length, page_size, prp1 = len(data), self.page_size, command.prp1
        self.moved += length
        if length <= page_size - (prp1 & page_size - 1) and not prp1 & 3:
            return Status.DATA_TRANSFER_ERROR if one(prp1, data) else 0
        pages = prp.walk(self._dma, page_size, prp1, command.prp2, length)
        if isinstance(pages, Status):
            return pages
        runs = prp.runs(pages, page_size, length)
        at = 0
        if len(runs) > BATCH_MIN and len(runs) == len(pages.rest) + 1:
            at = length - runs[-1][1]
            first, middle = pages.first_length, pages.rest[:-1]
            if one(pages.first, data[:first]) or many(middle, page_size, data[first:at]):
                return Status.DATA_TRANSFER_ERROR
            runs = runs[-1:]
        for iova, size in runs:
            if one(iova, data[at : at + size]):
                return Status.DATA_TRANSFER_ERROR
            at += size
        return 0
