"""The memory of one domain: pages for TCE tables and immutable window records, out of one shared area.

The area is given at its full size (hostd backs it by a sparse memfd); pages come from a free list of its own, because
the memfd cannot be punched once it is sealed. Tables are handed out zeroed: whoever frees one has zeroed it before.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from errno import ENOMEM

from vfio_model.host.layout import DOMAIN_MAGIC, WINDOW_WORDS
from vfio_model.memory.layout import HEADER_SIZE, write_header
from vfio_model.ranges import align_up


class TableMemory:
    """``words`` is the whole area as a ``memoryview`` of format ``Q``; offsets and sizes are bytes."""

    def __init__(self, words: memoryview, host_page_size: int) -> None:
        self.words = words
        self.page = host_page_size
        self.size = words.nbytes
        self._free: list[tuple[int, int]] = [(host_page_size, self.size - host_page_size)]
        self._record, self._record_end = HEADER_SIZE, host_page_size
        self._records = 0
        write_header(words, DOMAIN_MAGIC)

    @property
    def free_bytes(self) -> int:
        """Bytes that tables could still have, in whatever pieces."""
        return sum(size for _, size in self._free)

    def alloc(self, size: int) -> int:
        """Offset of ``size`` zeroed bytes, rounded up to host pages. :raise OSError: ENOMEM when no piece is that
        long.
        """
        need = align_up(size, self.page)
        for at, (offset, length) in enumerate(self._free):
            if length >= need:
                if length == need:
                    del self._free[at]
                else:
                    self._free[at] = (offset + need, length - need)
                return offset
        raise OSError(ENOMEM, f"no {need:#x} bytes of table memory left in this domain")

    def free(self, offset: int, size: int) -> None:
        """Give back what :meth:`alloc` gave for ``size``; every word of it is zero again."""
        length = align_up(size, self.page)
        at = bisect_left(self._free, (offset, 0))
        if at < len(self._free) and self._free[at][0] == offset + length:
            length += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            offset, before = self._free.pop(at - 1)
            length += before
        insort(self._free, (offset, length))

    def publish_record(self, fields: tuple[int, int, int, int, int, int, int]) -> int:
        """Write a window record (all but its id) and return its byte offset; the offset is never used again."""
        if self._record + WINDOW_WORDS * 8 > self._record_end:
            self._record = self.alloc(self.page)
            self._record_end = self._record + self.page
        self._records += 1
        offset = self._record
        self._record += WINDOW_WORDS * 8
        for index, value in enumerate((*fields, self._records)):
            self.words[offset // 8 + index] = value
        return offset
