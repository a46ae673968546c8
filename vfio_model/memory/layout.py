"""The header that every shared memory area starts with.

Lanes, invalidation rings, host tables and PE blocks are areas of native-endian 64-bit words that several processes map.
Each begins with :data:`HEADER_WORDS` words, so that a process which maps the wrong thing, or another version of it, is
refused before it reads one word too many::

    word 0  magic              eight ASCII characters, see :func:`magic`
    word 1  version            of the layout that follows; changed by every incompatible change
    word 2  byte order mark    reads as BYTE_ORDER_MARK on a machine of the same byte order
    word 3  size               bytes of the whole area, header included
    words 4-7                  zero, reserved

What must not be broken: words are read and written through ``memoryview.cast("Q")`` (or numpy), which compile to one
8-byte access each; ``struct.pack_into`` writes byte by byte and tears. Every word has one writer. The magic is stored
last: an area that is still being prepared is refused.
"""

from __future__ import annotations

from vfio_model.errors import RemoteProtocolError

HEADER_WORDS = 8
HEADER_SIZE = HEADER_WORDS * 8
"""Bytes of the header: one cache line, so that the words behind it start a line of their own."""

LAYOUT_VERSION = 1
BYTE_ORDER_MARK = 0x0102030405060708

_MAGIC, _VERSION, _BYTE_ORDER, _SIZE = range(4)


def magic(name: str) -> int:
    """The magic word of a kind of area: exactly eight ASCII characters, the first in the lowest byte."""
    code = name.encode("ascii")
    assert len(code) == 8, "a magic is eight characters"
    return int.from_bytes(code, "little")


def write_header(words: memoryview, area_magic: int, version: int = LAYOUT_VERSION, size: int = 0) -> None:
    """Write the header of an area of ``size`` bytes (0: all of ``words``), the magic last."""
    assert words.format == "Q", "shared areas are written in whole words"
    words[_VERSION] = version
    words[_BYTE_ORDER] = BYTE_ORDER_MARK
    words[_SIZE] = size or len(words) * 8
    for index in range(_SIZE + 1, HEADER_WORDS):
        words[index] = 0
    words[_MAGIC] = area_magic


def check_header(
    words: memoryview, area_magic: int, version: int = LAYOUT_VERSION, *, what: str = "shared area"
) -> int:
    """Bytes of the area that ``words`` maps, after checking that it is of this kind, version and byte order.

    ``words`` may be longer than the area (mappings are whole pages), never shorter.

    :raise RemoteProtocolError: when a field of the header does not fit; the text says which.
    """
    if len(words) < HEADER_WORDS:
        raise RemoteProtocolError(f"{what}: {len(words) * 8} bytes are too short for a header")
    if words[_BYTE_ORDER] != BYTE_ORDER_MARK:
        raise RemoteProtocolError(f"{what}: byte order mark is {words[_BYTE_ORDER]:#x}, expected {BYTE_ORDER_MARK:#x}")
    if words[_MAGIC] != area_magic:
        raise RemoteProtocolError(f"{what}: magic is {_text(words[_MAGIC])}, expected {_text(area_magic)}")
    if words[_VERSION] != version:
        raise RemoteProtocolError(f"{what}: layout version is {words[_VERSION]}, expected {version}")
    size = words[_SIZE]
    if not HEADER_SIZE <= size <= len(words) * 8:
        raise RemoteProtocolError(f"{what}: says {size} bytes, {len(words) * 8} are mapped")
    return size


def _text(word: int) -> str:
    return repr(word.to_bytes(8, "little"))[1:]
