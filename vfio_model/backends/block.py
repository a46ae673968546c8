"""Block back ends: the bytes of a disk.

Offsets and lengths are bytes and lie inside the disk: the device model has checked them. An I/O error is an
``OSError``, which the model turns into a status of its own.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from typing import Final, Protocol

from vfio_model.errors import ConfigError
from vfio_model.memory.types import ReadBuffer, WriteBuffer

DEFAULT_SIZE: Final = 64 << 20
"""Bytes of a disk in memory, when nobody says."""
CHUNK: Final = 64 << 10
"""A disk in memory keeps pieces of this size that were written, and no others."""
_SIZE: Final = re.compile(r"([0-9]+)([kKmMgGtT]?)")
_UNITS: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


class BlockBackend(Protocol):
    """A disk."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool:
        """Whether writing is EROFS."""

    def read(self, offset: int, out: WriteBuffer) -> None:
        """Fill ``out``. :raise OSError: an I/O error."""

    def write(self, offset: int, data: ReadBuffer) -> None:
        """All of ``data``. :raise OSError: an I/O error; any part of it may have been written."""

    def flush(self) -> None:
        """Return when what was written is on stable storage. :raise OSError: an I/O error."""

    def discard(self, offset: int, length: int) -> None:
        """The bytes are no longer wanted; they read as zero or as before. :raise OSError: an I/O error."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the bytes zero. :raise OSError: an I/O error."""

    def close(self) -> None:
        """Give it back. Harmless twice."""


class MemoryDisk:
    """``size`` bytes in memory, of which those that were never written cost nothing."""

    def __init__(self, size: int = DEFAULT_SIZE, *, read_only: bool = False) -> None:
        self.size, self.read_only = size, read_only
        self._chunks: dict[int, bytearray] = {}

    def read(self, offset: int, out: WriteBuffer) -> None:
        """See :class:`BlockBackend`."""
        view, done = memoryview(out), 0
        while done < len(view):
            number, at = divmod(offset + done, CHUNK)
            count = min(len(view) - done, CHUNK - at)
            chunk = self._chunks.get(number)
            view[done : done + count] = bytes(count) if chunk is None else memoryview(chunk)[at : at + count]
            done += count

    def write(self, offset: int, data: ReadBuffer) -> None:
        """See :class:`BlockBackend`."""
        self._check_writable()
        view, done = memoryview(data), 0
        while done < len(view):
            number, at = divmod(offset + done, CHUNK)
            count = min(len(view) - done, CHUNK - at)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = bytearray(CHUNK)
            memoryview(chunk)[at : at + count] = view[done : done + count]
            done += count

    def flush(self) -> None:
        """Nothing is more stable than this."""

    def discard(self, offset: int, length: int) -> None:
        """Drops whole pieces and zeroes the rest."""
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """See :class:`BlockBackend`."""
        self._check_writable()
        end = offset + length
        first, last = offset // CHUNK, (end - 1) // CHUNK
        inside = [number for number in self._chunks if first <= number <= last]
        for number in inside:
            start, stop = max(offset - number * CHUNK, 0), min(end - number * CHUNK, CHUNK)
            if stop - start == CHUNK:
                del self._chunks[number]
            else:
                self._chunks[number][start:stop] = bytes(stop - start)

    def export_chunks(self) -> list[tuple[int, bytes]]:
        """What is not zero, by pieces of :data:`CHUNK` bytes: each one's number and content."""
        zero = bytes(CHUNK)
        return [(number, bytes(chunk)) for number, chunk in sorted(self._chunks.items()) if chunk != zero]

    def import_chunks(self, chunks: Iterable[tuple[int, bytes]]) -> None:
        """Hold what another disk of this size has exported, and nothing else."""
        self._chunks = {number: bytearray(chunk) for number, chunk in chunks}

    def close(self) -> None:
        """Nothing to give back."""

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the disk is read-only")


def parse_size(text: str, *, where: str) -> int:
    """Bytes of ``64M`` and the like (k, M, G, T are powers of 1024).

    :raise ConfigError: when it is no such size, or 0.
    """
    match = _SIZE.fullmatch(text)
    size = int(match[1]) << _UNITS[match[2].lower()] if match else 0
    if not 0 < size < 1 << 63:
        raise ConfigError(f"{text!r} is no size", where=where, hint="for example 64M")
    return size


def open_memory(text: str) -> MemoryDisk | None:
    """The disk in memory that ``text`` asks for: nothing, or ``mem:SIZE``; None when it names something else.

    :raise ConfigError: for a broken size.
    """
    if not text:
        return MemoryDisk()
    return MemoryDisk(parse_size(text.removeprefix("mem:"), where="drive")) if text.startswith("mem:") else None
