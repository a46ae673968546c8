"""How a remote device's DMA travels by message, and how its translations are asked for."""

from __future__ import annotations

import errno
from collections.abc import Callable

from protocols.vfio_user.messages import Command, DmaAccess, Payload, TranslateReply, TranslateRequest
from vfio_model.memory.dma import Iovas, OnInvalidate
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.mapping import BounceBudget, DMAMapping
from vfio_model.memory.types import DMADirection, IOMMUAccessFlags, MemTxResult, ReadBuffer, WriteBuffer

MAX_DMA_MESSAGE = 128 << 10
"""Bytes of one DMA message: larger ones break peers in spite of what was negotiated."""
_NO_WRITE = 1

_PAGE = 4096

Call = Callable[[Command, Payload], Payload | None]
"""Ask the client and wait, serving it meanwhile; None when it refuses, does not answer, or is gone."""
Ask = Callable[[Command, Payload], Payload]
"""The same, with ``OSError`` instead: ENODEV when it does not answer or is gone, else what it refuses with."""


def asking(call: Call) -> Ask:
    """``call``, of a client that is there: None is EFAULT."""

    def ask(command: Command, payload: Payload) -> Payload:
        answer = call(command, payload)
        if answer is None:
            raise OSError(errno.EFAULT, "refused")
        return answer

    return ask


class PiecewiseDma:
    """The vectorised and mapped forms, by means of single accesses. Maps are bounce buffers."""

    def __init__(self, budget: BounceBudget | None = None) -> None:
        self._budget = budget or BounceBudget()

    def read(self, iova: int, out: WriteBuffer) -> MemTxResult:
        """See ``DMAImpl``."""
        raise NotImplementedError

    def write(self, iova: int, data: ReadBuffer) -> MemTxResult:
        """See ``DMAImpl``."""
        raise NotImplementedError

    def read_many(self, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        """See ``DMAImpl``."""
        view = memoryview(out)
        for number, iova in enumerate(iovas):
            result = self.read(int(iova), view[number * size : (number + 1) * size])
            if result:
                view[(number + 1) * size :] = bytes(len(view) - (number + 1) * size)
                return result
        return MemTxResult.OK

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        """See ``DMAImpl``."""
        view = memoryview(data)
        for number, iova in enumerate(iovas):
            result = self.write(int(iova), view[number * size : (number + 1) * size])
            if result:
                return result
        return MemTxResult.OK

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """A bounce buffer; see ``DMAImpl``."""

        def begin(buffer: bytearray) -> object:
            return direction is DMADirection.TO_DEVICE and self.read(iova, buffer)

        return self._budget.map(iova, length, direction, on_invalidate, begin, self.write)


class MessageDma(PiecewiseDma):
    """Every access asks the client, which translates, checks and moves. Nothing is kept here.

    A refusal says nothing about where the access failed. A read that was refused is asked for again page by page, up to
    the one that fails: what lies before it is delivered, as by every other way to memory. A write is not, because the
    client has written up to there.
    """

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self._ask = ask
        self.limit = MAX_DMA_MESSAGE
        """Bytes of one message; a client may take fewer."""

    def read(self, iova: int, out: WriteBuffer) -> MemTxResult:
        """DMA_READ messages."""
        view, done, by_page = memoryview(out), 0, False
        while done < len(view):
            here = iova + done & _U64
            room = _PAGE - here % _PAGE
            count = min(len(view) - done, self.limit, room if by_page else self.limit)
            try:
                view[done : done + count] = self._read(here, count)
            except OSError as error:
                if by_page or count <= room or error.errno == errno.ENODEV:
                    view[done:] = bytes(len(view) - done)
                    return MemTxResult.DECODE_ERROR
                by_page = True
                continue
            done += count
        return MemTxResult.OK

    def _read(self, iova: int, count: int) -> bytes:
        answer = self._ask(Command.DMA_READ, DmaAccess(iova, count))
        if not isinstance(answer, DmaAccess) or len(answer.data) != count:
            raise OSError(errno.EIO, f"not the {count} bytes that were asked for")
        return answer.data

    def write(self, iova: int, data: ReadBuffer) -> MemTxResult:
        """DMA_WRITE messages."""
        view, done = memoryview(data), 0
        while done < len(view):
            part = bytes(view[done : done + self.limit])
            try:
                answer = self._ask(Command.DMA_WRITE, DmaAccess(iova + done & _U64, len(part), part))
            except OSError:
                return MemTxResult.DECODE_ERROR
            if not isinstance(answer, DmaAccess) or answer.count != len(part):
                return MemTxResult.DECODE_ERROR
            done += len(part)
        return MemTxResult.OK


_U64 = (1 << 64) - 1


def translator(call: Call) -> Callable[[int, int, bool], IOMMUTLBEntry | None]:
    """``ask(iova, length, is_write)`` of an ATC by X_TRANSLATE. No entry for ``iova`` is a fault; no answer is None."""

    def ask(iova: int, length: int, is_write: bool) -> IOMMUTLBEntry | None:
        answer = call(Command.X_TRANSLATE, TranslateRequest(iova, 1, 0 if is_write else _NO_WRITE))
        if not isinstance(answer, TranslateReply):
            return None
        for entry in answer.entries():
            if entry.iova <= iova <= entry.iova + entry.mask:
                perm = IOMMUAccessFlags(entry.perm & 0x3F)
                return IOMMUTLBEntry(None, entry.iova, entry.translated, entry.mask, perm)
        return IOMMUTLBEntry(None, iova & ~0xFFF, 0, 0xFFF, IOMMUAccessFlags.NONE)

    return ask
