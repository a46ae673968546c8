"""RAM in a migration stream: blocks, then passes over them.

The first frame lists the blocks, which must be the receiver's own, in the same order. A pass sends runs of bytes of a
block, those that are all zero without their data, and ends with a mark; the first pass sends everything, later ones
what was written meanwhile, the last one is *final*: it was made while nobody wrote, and sections follow it. A byte
counts as it came last.

The receiver stores data as it comes. A stream that fails leaves it with a mixture, so it must not run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vfio_model.errors import VMStateError
from vfio_model.vmstate.stream import Frame, FrameKind, FrameWriter

CHUNK: Final = 1 << 20
"""Bytes of RAM in one frame, at most."""
MAX_RAM_PAYLOAD: Final = CHUNK + 64
_BLOCK, _DATA, _ZERO, _PASS = struct.Struct(">QQ"), struct.Struct(">HQ"), struct.Struct(">HQQ"), struct.Struct(">I?")


@dataclass(frozen=True, slots=True)
class RamView:
    """A block: its name, its bytes (format ``B``), the page size in bytes that backs it."""

    name: str
    view: memoryview
    page_size: int

    def pack(self) -> bytes:
        """As an entry of the list."""
        name = self.name.encode("ascii")
        return bytes((len(name),)) + name + _BLOCK.pack(len(self.view), self.page_size)


class RamSender:
    """The frames of ``blocks``, through ``writer``."""

    def __init__(self, writer: FrameWriter, blocks: Sequence[RamView]) -> None:
        self._writer, self._blocks = writer, blocks
        self._passes = 0
        self.sent = 0
        """Bytes of RAM that were sent as data."""

    def blocks(self) -> bytes:
        """The list; before anything else of the RAM."""
        entries = b"".join(block.pack() for block in self._blocks)
        return self._writer.frame(FrameKind.RAM_BLOCKS, struct.pack(">H", len(self._blocks)), entries)

    def run(self, block: int, offset: int, size: int) -> Iterator[bytes]:
        """``size`` bytes at ``offset`` of block number ``block``, in frames of at most :data:`CHUNK`."""
        view = self._blocks[block].view
        for at in range(offset, offset + size, CHUNK):
            part = view[at : min(at + CHUNK, offset + size)]
            data = bytes(part)
            if data.count(0) == len(data):
                yield self._writer.frame(FrameKind.RAM_ZERO, _ZERO.pack(block, at, len(data)))
            else:
                self.sent += len(data)
                yield self._writer.frame(FrameKind.RAM_DATA, _DATA.pack(block, at), data)

    def everything(self) -> Iterator[bytes]:
        """The first pass, without its mark."""
        for number, block in enumerate(self._blocks):
            yield from self.run(number, 0, len(block.view))

    def end_pass(self, *, final: bool) -> bytes:
        """The mark at the end of a pass."""
        self._passes += 1
        return self._writer.frame(FrameKind.RAM_PASS, _PASS.pack(self._passes, final))


class RamReceiver:
    """Stores what comes into ``blocks``."""

    def __init__(self, blocks: Sequence[RamView]) -> None:
        self._blocks = blocks
        self._listed = False
        self.passes = 0
        self.final = False
        """Whether the final pass has ended."""

    def take(self, frame: Frame) -> None:
        """One frame of a RAM kind.

        :raise VMStateError: other blocks than here, bytes outside a block, anything after the final pass.
        """
        if self.final:
            raise VMStateError("RAM after the final pass", where=frame.where)
        if frame.kind is FrameKind.RAM_BLOCKS:
            self._take_list(frame)
        elif not self._listed:
            raise VMStateError("RAM before the list of its blocks", where=frame.where)
        elif frame.kind is FrameKind.RAM_DATA:
            number, offset = self._unpacked(_DATA, frame, exact=False)
            data = frame.payload[_DATA.size :]
            self._room(frame, number, offset, len(data))[:] = data
        elif frame.kind is FrameKind.RAM_ZERO:
            number, offset, size = self._unpacked(_ZERO, frame)
            room = self._room(frame, number, offset, size)
            room[:] = bytes(len(room))
        else:
            assert frame.kind is FrameKind.RAM_PASS, "the reader hands over RAM"
            number, final = self._unpacked(_PASS, frame)
            self.passes, self.final = self.passes + 1, bool(final)
            if number != self.passes:
                raise VMStateError(f"pass {number} where {self.passes} ends", where=frame.where)

    def _take_list(self, frame: Frame) -> None:
        mine = struct.pack(">H", len(self._blocks)) + b"".join(block.pack() for block in self._blocks)
        if self._listed or frame.payload != mine:
            here = ", ".join(f"{block.name} {len(block.view):#x}/{block.page_size:#x}" for block in self._blocks)
            raise VMStateError(f"the RAM is not this machine's: {here}", where=frame.where)
        self._listed = True

    @staticmethod
    def _unpacked(shape: struct.Struct, frame: Frame, *, exact: bool = True) -> tuple[int, ...]:
        if len(frame.payload) < shape.size or (exact and len(frame.payload) != shape.size):
            raise VMStateError(f"{len(frame.payload)} bytes of payload", where=frame.where)
        return shape.unpack_from(frame.payload)

    def _room(self, frame: Frame, number: int, offset: int, size: int) -> memoryview:
        if number >= len(self._blocks) or size > CHUNK or offset + size > len(self._blocks[number].view):
            raise VMStateError(f"{size} bytes at {offset:#x} of block {number} are not there", where=frame.where)
        return self._blocks[number].view[offset : offset + size]


def runs(pages: Iterable[int], page_size: int) -> Iterator[tuple[int, int]]:
    """(offset, size) in bytes of the stretches that ``pages`` (numbers, ascending, each once) make."""
    start = past = -1
    for page in pages:
        if page != past:
            if past > start:
                yield start * page_size, (past - start) * page_size
            start = page
        past = page + 1
    if past > start:
        yield start * page_size, (past - start) * page_size
