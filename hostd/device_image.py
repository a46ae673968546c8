"""A device's described state as a stream that may begin while the device runs.

The state's bytes (the *image*) are sent whole once, then, round by round, those blocks of it that differ from what was
sent; the last round is of a device that stands, and ends in a mark. A round is what there is to read at one time: it
ends with a read that gets less than it asked for.

::

    stream: 0x00, then records of  offset (u64)  length (u32)  bytes…    big-endian; length 0: the image has ``offset``
                                                                         bytes, and there is no more

An image that is not sent so begins with the length of a name, which is never 0.
"""

from __future__ import annotations

import struct
from typing import Final

from vfio_model.errors import VMStateError

STREAM: Final = b"\0"
"""The first byte of a stream of records."""
BLOCK: Final = 4096
"""Bytes of an image that are compared, and sent, together."""
_RECORD: Final = struct.Struct(">QI")


def _blocks(old: bytes, new: bytes) -> bytes:
    """Records of what of ``new`` differs from ``old``."""
    found = bytearray()
    before, after = memoryview(old), memoryview(new)
    for at in range(0, len(new), BLOCK):
        if before[at : at + BLOCK] != (block := after[at : at + BLOCK]):
            found += _RECORD.pack(at, len(block)) + block
    return bytes(found)


class ImageWriter:
    """The stream of one migration."""

    def __init__(self) -> None:
        self._image: bytes | None = None
        self._waiting = b""
        self._read_to = 0
        self._in_round = self._first_read = False

    def _add(self, image: bytes) -> None:
        head = STREAM if self._image is None else b""
        rest = self._waiting[self._read_to :]
        self._waiting, self._read_to = rest + head + _blocks(self._image or b"", image), 0
        self._image = image

    def begin_round(self, image: bytes) -> None:
        """The device runs, and is ``image`` at present; nothing happens in the middle of a round."""
        if not self._in_round:
            self._in_round = True
            self._add(image)

    @property
    def in_round(self) -> bool:
        """Whether there is more to be read of what was begun."""
        return self._in_round

    def finish(self, image: bytes) -> None:
        """The device stands, and is ``image``."""
        self._in_round = True
        self._add(image)
        self._waiting += _RECORD.pack(len(image), 0)

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; fewer when the round ends."""
        part = self._waiting[self._read_to : self._read_to + size]
        self._read_to += len(part)
        if len(part) < size:
            self._in_round, self._first_read = False, True
        return part

    def estimate(self, image: bytes) -> tuple[int, int]:
        """(bytes of the first round, bytes of what changed since) that wait for a reader, were the device ``image``."""
        waiting, changed = len(self._waiting) - self._read_to, len(_blocks(self._image or b"", image))
        if self._image is None:
            return len(STREAM) + changed, 0
        return (0, waiting + changed) if self._first_read else (waiting, changed)


class ImageReader:
    """What a stream builds, of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending, self._image = bytearray(), bytearray()
        self._complete = False
        self._wrong = ""

    def feed(self, data: bytes) -> None:
        """More of the stream, after its first byte; whether it is one says :meth:`image`.

        :raise OverflowError: the image gets longer than it may be.
        """
        if not self._wrong:
            self._pending += data
        while len(self._pending) >= _RECORD.size:
            offset, length = _RECORD.unpack_from(self._pending)
            if self._complete or offset > len(self._image):
                self._wrong = f"{length} bytes at {offset} of {len(self._image)}"
                self._pending.clear()
                return
            if offset + length > self._limit:
                raise OverflowError(f"{offset + length} bytes of state")
            end = _RECORD.size + length
            if len(self._pending) < end:
                return
            if length:
                self._image[offset : offset + length] = self._pending[_RECORD.size : end]
            else:
                del self._image[offset:]
                self._complete = True
            del self._pending[:end]

    def image(self) -> bytes:
        """What was built. :raise VMStateError: the stream is none, or has no end."""
        if self._wrong or not self._complete or self._pending:
            raise VMStateError(self._wrong or "the stream ends before the state does", where="device state")
        return bytes(self._image)
