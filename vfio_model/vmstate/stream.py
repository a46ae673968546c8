"""Frames of a migration stream.

::

    HEADER  [ RAM_BLOCKS  (RAM_DATA | RAM_ZERO | EARLY)… RAM_PASS … ]  SECTION…  END

A frame is its kind (u8), the payload's length (u32), the payload and a CRC-32 (u32), all big-endian. The checksum
goes on from the frame before it, so that a frame which was altered, lost, doubled or moved is noticed there. The header
names the format and the machine, END holds the number of sections: a stream without it was cut.

:class:`FrameWriter` makes bytes, :class:`FrameReader` takes them in whatever pieces they come. A reader that raised
is of no more use.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from vfio_model.errors import VMStateError

MAGIC: Final = b"vfio-model migration"
FORMAT_VERSION: Final = 2
OLDEST_VERSION: Final = 1
"""Without EARLY."""
MAX_PAYLOAD: Final = (1 << 32) - 1
MAX_SECTION_HEAD: Final = 512
"""More than a section's name, instance and version take of its frame's payload."""
_HEAD, _CRC = struct.Struct(">BI"), struct.Struct(">I")
_SECTION = struct.Struct(">II")


class FrameKind(IntEnum):
    """The first byte of a frame."""

    HEADER = 1
    RAM_BLOCKS = 2
    RAM_DATA = 3
    RAM_ZERO = 4
    RAM_PASS = 5
    SECTION = 6
    END = 7
    EARLY = 8
    """As a section: a part of what is said of an object while the machine runs."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; ``offset`` is where it began in the stream, in bytes."""

    kind: FrameKind
    payload: bytes
    offset: int

    @property
    def where(self) -> str:
        """For error messages."""
        return f"{self.kind.name} frame at byte {self.offset}"


@dataclass(frozen=True, slots=True)
class Section:
    """The payload of a SECTION frame: whose state, in which version, and its bytes."""

    name: str
    instance: int
    version: int
    data: bytes

    def pack(self) -> bytes:
        """As payload."""
        name = self.name.encode("ascii")
        return bytes((len(name),)) + name + _SECTION.pack(self.instance, self.version) + self.data

    @classmethod
    def unpack(cls, frame: Frame) -> Section:
        """:raise VMStateError: for a payload that is too short."""
        payload = frame.payload
        length = payload[0] if payload else 0
        at = 1 + length
        if not length or len(payload) < at + _SECTION.size:
            raise VMStateError("too short for a section", where=frame.where)
        instance, version = _SECTION.unpack_from(payload, at)
        name = payload[1:at].decode("ascii", "backslashreplace")
        return cls(name, instance, version, payload[at + _SECTION.size :])

    @property
    def where(self) -> str:
        """For error messages."""
        return f"section {self.name}, instance {self.instance:#x}"


class FrameWriter:
    """Makes the frames of one stream, in order."""

    def __init__(self) -> None:
        self._crc = 0
        self._sections = 0

    def frame(self, kind: FrameKind, *pieces: bytes | memoryview) -> bytes:
        """A frame whose payload is ``pieces`` one after another, at most 4 GiB."""
        length = sum(len(piece) for piece in pieces)
        assert length <= MAX_PAYLOAD, "a frame holds less than 4 GiB"
        parts = [_HEAD.pack(kind, length), *pieces]
        for part in parts:
            self._crc = zlib.crc32(part, self._crc)
        return b"".join((*parts, _CRC.pack(self._crc)))

    def header(self, machine: str) -> bytes:
        """The first frame; ``machine`` is its type."""
        return self.frame(FrameKind.HEADER, MAGIC, struct.pack(">I", FORMAT_VERSION), machine.encode("ascii"))

    def section(self, section: Section) -> bytes:
        """One section."""
        self._sections += 1
        return self.frame(FrameKind.SECTION, section.pack())

    def early(self, section: Section) -> bytes:
        """A part of what belongs before ``section``'s like; not counted."""
        return self.frame(FrameKind.EARLY, section.pack())

    def end(self) -> bytes:
        """The last frame."""
        return self.frame(FrameKind.END, struct.pack(">I", self._sections))


class FrameReader:
    """Takes a stream in pieces. :attr:`ended` once END has come; what follows it is an error.

    The order of kinds is checked: the header first and for this ``machine``, sections after the RAM.
    """

    def __init__(self, machine: str, *, max_payload: int = MAX_PAYLOAD) -> None:
        self._machine, self._max_payload = machine, max_payload
        self._pending = bytearray()
        self._offset = self._crc = self._sections = 0
        self._last: FrameKind | None = None

    @property
    def ended(self) -> bool:
        """Whether the whole stream has come."""
        return self._last is FrameKind.END

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """The frames that are complete with ``data``, each as soon as it is asked for.

        :raise VMStateError: at the first frame that is altered, unknown or out of order, and for bytes behind the end.
        """
        self._pending += data
        while (frame := self._next()) is not None:
            self._check(frame)
            yield frame
        if self.ended and self._pending:
            raise VMStateError(f"{len(self._pending)} bytes behind the end", where=f"byte {self._offset}")

    def close(self) -> None:
        """There is no more.

        :raise VMStateError: the stream was cut.
        """
        if not self.ended:
            rest = f", {len(self._pending)} bytes into a frame" if self._pending else ""
            raise VMStateError(f"the stream ends without its end{rest}", where=f"byte {self._offset}")

    def _next(self) -> Frame | None:
        if self.ended or len(self._pending) < _HEAD.size:
            return None
        kind, length = _HEAD.unpack_from(self._pending)
        where = f"frame at byte {self._offset}"
        if kind not in FrameKind.__members__.values():
            raise VMStateError(f"kind {kind:#x} is not known", where=where)
        if length > self._max_payload:
            raise VMStateError(f"{length} bytes of payload; {self._max_payload} are the most", where=where)
        past = _HEAD.size + length
        if len(self._pending) < past + _CRC.size:
            return None
        with memoryview(self._pending) as view:
            crc = zlib.crc32(view[:past], self._crc)
            payload = bytes(view[_HEAD.size : past])
        if crc != _CRC.unpack_from(self._pending, past)[0]:
            raise VMStateError("the checksum is wrong: altered, or not the frame that belongs here", where=where)
        frame = Frame(FrameKind(kind), payload, self._offset)
        del self._pending[: past + _CRC.size]
        self._crc, self._offset = crc, self._offset + past + _CRC.size
        return frame

    def _check(self, frame: Frame) -> None:
        first, last = self._last is None, self._last
        if first != (frame.kind is FrameKind.HEADER):
            raise VMStateError("a stream begins with one header", where=frame.where)
        if first:
            self._check_header(frame)
        elif last is FrameKind.SECTION and frame.kind not in (FrameKind.SECTION, FrameKind.END):
            raise VMStateError("RAM comes before the sections", where=frame.where)
        if frame.kind is FrameKind.SECTION:
            self._sections += 1
        elif frame.kind is FrameKind.END and frame.payload != struct.pack(">I", self._sections):
            raise VMStateError(f"{self._sections} sections came, others were sent", where=frame.where)
        self._last = frame.kind

    def _check_header(self, frame: Frame) -> None:
        payload, at = frame.payload, len(MAGIC)
        if payload[:at] != MAGIC or len(payload) < at + 4:
            raise VMStateError("not a migration stream of this project", where=frame.where)
        version = int.from_bytes(payload[at : at + 4], "big")
        if not OLDEST_VERSION <= version <= FORMAT_VERSION:
            known = f"{OLDEST_VERSION} to {FORMAT_VERSION}"
            raise VMStateError(f"format {version}; {known} can be read", where=frame.where)
        machine = payload[at + 4 :].decode("ascii", "backslashreplace")
        if machine != self._machine:
            raise VMStateError(f"a {machine} machine's; this is a {self._machine}", where=frame.where)
