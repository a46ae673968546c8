"""The file of a QEMU trace, plain or gzip: its lines, and what is wrong with it when it does not end well."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from vfio_model.errors import ConfigError, VfioModelError
from vfio_model.guest_drivers.trace_events import Malformed, TraceEvent, parse_line

MAX_LINE = 1 << 16
_CHUNK = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b"


class Unreadable(VfioModelError):
    """Reading stopped here; the text says why, for a person."""


def recorded_events(path: Path) -> list[tuple[int, TraceEvent]]:
    """Line numbers and sPAPR IOMMU events of a good recording, in order.

    :raise ConfigError: when the file cannot be read whole, or a line of it not understood.
    """
    events: list[tuple[int, TraceEvent]] = []
    try:
        for number, text in enumerate(trace_lines(path), 1):
            parsed = parse_line(text)
            if isinstance(parsed, Malformed):
                raise ConfigError(parsed.reason, where=f"{path}:{number}")
            if isinstance(parsed, TraceEvent):
                events.append((number, parsed))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except Unreadable as error:
        raise ConfigError(str(error), where=str(path)) from error
    return events


def trace_lines(path: Path) -> Iterator[str]:
    """The complete lines of the file.

    :raise Unreadable: where the text ends before the file does.
    """
    rest = b""
    for data in _bytes(path):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield _text(line)
        if len(rest) > MAX_LINE:
            raise Unreadable("no line end in sight: this is not a text file")
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    if b"\0" in line:
        raise Unreadable("this is not a text file")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise Unreadable("this is not a text file") from None


def _bytes(path: Path) -> Iterator[bytes]:
    """The contents, unpacked if gzip.

    :raise Unreadable: when the compressed data is damaged; what came before was yielded.
    """
    with path.open("rb") as file:
        head = file.read(_CHUNK)
        if not head:
            raise Unreadable("the file is empty")
        if not head.startswith(_GZIP_MAGIC):
            yield head
            while data := file.read(_CHUNK):
                yield data
            return
        unpack = zlib.decompressobj(wbits=31)
        while head:
            try:
                data = unpack.decompress(head)
            except zlib.error as error:
                raise Unreadable(f"the gzip data is damaged: {error}") from None
            if data:
                yield data
            if unpack.eof and (unpack.unused_data or file.peek(1)):
                head, unpack = unpack.unused_data, zlib.decompressobj(wbits=31)
                head = head or file.read(_CHUNK)
            else:
                head = file.read(_CHUNK)
        if not unpack.eof:
            raise Unreadable("the gzip data is cut off")
