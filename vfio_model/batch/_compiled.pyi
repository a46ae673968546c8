"""What ``_compiled.c`` offers. Tables, iovas and ``out`` of translations are contiguous buffers of native u64 words.

Every function raises BufferError for a buffer that is not contiguous or, where it is written, not writable;
TypeError for what is no buffer or no int; OverflowError for an int beyond u64; ValueError for words that are not u64,
buffers that are too short, and a ``page_shift`` outside 2..63. Nothing has been moved or stored then.
"""

from typing import Any

def translate(table: Any, start: int, page_shift: int, iovas: Any, out: Any, /) -> tuple[bool, int]:
    """As :func:`vfio_model.batch.tables.translate_reference`, addresses into ``out`` (rubbish if one is outside)."""

def translate_each(table: Any, start: int, page_shift: int, iovas: Any, out: Any, perms: Any, /) -> None:
    """As :func:`vfio_model.batch.tables.translate_each_reference`, into ``out`` (words) and ``perms`` (bytes)."""

def gather(
    table: Any,
    start: int,
    page_shift: int,
    base: int,
    ram: Any,
    iovas: Any,
    size: int,
    out: Any,
    first: int,
    stop: int,
    /,
) -> int:
    """Read pieces ``first``..``stop`` - 1, each of ``size`` bytes inside one page, from ``ram`` into their places in
    ``out``; byte 0 of ``ram`` has the translated address ``base``. Returns how many went; see
    :func:`vfio_model.batch.tables.move_reference`.
    """

def scatter(
    table: Any,
    start: int,
    page_shift: int,
    base: int,
    ram: Any,
    iovas: Any,
    size: int,
    data: Any,
    first: int,
    stop: int,
    /,
) -> int:
    """As :func:`gather`, from ``data`` to ``ram``, where the table allows writing; in order, so that the last wins."""
