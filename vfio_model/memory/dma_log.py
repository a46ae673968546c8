"""A device's own log of what it writes: ``VFIO_DEVICE_FEATURE_DMA_LOGGING_START`` as hardware has it.

:class:`LoggedDma` stands between a device and the way its DMA travels, while the log runs; it belongs to the device's
one thread, so that whoever asks the device finds every write that has ended. An access that fails may have moved its
first bytes: it counts as a write to all of its pages. Only pages that lie in a logged range are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfio_model.memory.dma import DMAImpl, DMASpace, Iovas, OnInvalidate, Rebinding
from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.types import DMADirection, MemTxResult, ReadBuffer
from vfio_model.ranges import U64_MAX, Range


class DmaLog:
    """The pages of ``page_size`` bytes (a power of two) in ``ranges`` that were written."""

    def __init__(self, page_size: int, ranges: Sequence[Range]) -> None:
        self.page_size = page_size
        self._shift = page_size.bit_length() - 1
        self._pages: set[int] = set()
        self._ranges = [(each.start >> self._shift, each.last >> self._shift) for each in ranges]

    def note(self, iova: int, size: int) -> None:
        """``size`` bytes from ``iova`` were written; addresses wrap."""
        iova &= U64_MAX
        first, last = iova >> self._shift, (iova + size - 1) >> self._shift
        if size and first == last:
            self._pages.add(first)
        elif size:
            mask = U64_MAX >> self._shift
            self._pages.update(page & mask for page in range(first, last + 1))

    def take(self, iova: int, size: int) -> list[int]:
        """Numbers of the written pages among the ``size`` bytes from ``iova``, counted from there; they are clean
        now.
        """
        first, count = iova >> self._shift, size >> self._shift
        if count < len(self._pages):
            found = [page for page in range(first, first + count) if page in self._pages]
        else:
            found = sorted(page for page in self._pages if first <= page < first + count)
        self._pages.difference_update(found)
        return [page - first for page in found if any(low <= page <= high for low, high in self._ranges)]


class LoggedDma:
    """``impl``, whose writes ``log`` hears of once they have ended (a :class:`~vfio_model.memory.dma.DMAImpl`)."""

    def __init__(self, impl: DMAImpl, log: DmaLog) -> None:
        self.inner, self.log = impl, log
        self.read, self.read_many = impl.read, impl.read_many

    def write(self, iova: int, data: ReadBuffer) -> MemTxResult:
        """Write, and note it."""
        try:
            return self.inner.write(iova, data)
        finally:
            self.log.note(iova, len(data))

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        """Write, and note each piece."""
        try:
            return self.inner.write_many(iovas, size, data)
        finally:
            note = self.log.note
            for iova in iovas:
                note(int(iova), size)

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """Map; what was written is noted when the mapping is given back."""
        mapping = self.inner.map(iova, length, direction, on_invalidate)
        if mapping is None or direction is DMADirection.TO_DEVICE:
            return mapping
        then = mapping.release

        def release(mapping: DMAMapping, access_len: int) -> None:
            if then is not None:
                then(mapping, access_len)
            self.log.note(iova, access_len)

        mapping.release = release
        return mapping

    def attach(self, dma: DMASpace) -> None:
        """See :class:`~vfio_model.memory.dma.Rebinding`."""
        if isinstance(self.inner, Rebinding):
            self.inner.attach(dma)

    def detach(self, dma: DMASpace) -> None:
        """See :class:`~vfio_model.memory.dma.Rebinding`."""
        if isinstance(self.inner, Rebinding):
            self.inner.detach(dma)
