"""What ``_compiled.c``, ``_compiled_maps.c`` and ``_compiled_walks.c`` offer. Tables, TCEs, pages, iovas and ``out`` of
translations are contiguous buffers of native u64 words.

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

def split_tces(tces: Any, page_shift: int, pages: Any, /) -> tuple[int, int]:
    """The page address of each of ``tces`` into ``pages`` (as many words); their permissions or-ed together, and
    and-ed (3 when there are none).
    """

def page_bounds(pages: Any, /) -> tuple[int, int]:
    """As :func:`vfio_model.batch.dma_map.page_bounds`, of words; ValueError when there are none."""

def consecutive(pages: Any, step: int, /) -> bool:
    """As :func:`vfio_model.batch.dma_map.consecutive`, of words."""

def pack_dma_maps(pages: Any, to_vaddr: int, first_iova: int, page_shift: int, head: int, /) -> bytes:
    """As :func:`vfio_model.batch.dma_map.pack_dma_maps`, of words; ``head`` is argsz and flags of each structure."""

def look_at_dma_maps(maps: Any, count: int, /) -> tuple[int, int, int, int, int, int] | None:
    """As :func:`vfio_model.batch.dma_map.look_at_dma_maps`, the fields in its order; None also for no structures."""

def maps_to_tces(
    maps: Any,
    first: int,
    count: int,
    to_offset: int,
    perm: int,
    base: int,
    shift: int,
    bits: int,
    multiplier: int,
    addend: int,
    tces: Any,
    /,
) -> None:
    """The TCEs of structures ``first``..``first`` + ``count`` - 1 into the first words of ``tces`` (aligned).

    ``to_offset`` plus a vaddr (modulo 2**64) is the byte of a segment that lies where ``base`` to ``addend`` say, see
    :class:`vfio_model.host.hpa.HpaMap`; ``shift`` and ``bits`` are at most 63.
    """

def store_run(
    words: Any,
    first: int,
    count: int,
    offset: int,
    page_shift: int,
    perm: int,
    base: int,
    shift: int,
    bits: int,
    multiplier: int,
    addend: int,
    /,
) -> None:
    """Store the TCEs of ``count`` pages, one after another in a segment from byte ``offset`` on, into ``words``
    (aligned) from number ``first`` on. Where the segment lies is as for :func:`maps_to_tces`.
    """

def claim(owners: Any, first: int, count: int, owner: int, /) -> int | None:
    """Put ``owner`` in place of ``count`` of the ``owners`` (a buffer of aligned u32) from number ``first`` on, if all
    of these are equal: then what they were (0 for none), else None and nothing has changed.
    """

def walk(ram: Any, base: int, iovas: Any, out: Any, perms: Any, spec: Any, /) -> None:
    """As :func:`vfio_model.batch.walks.walk_reference`, into ``out`` (words) and ``perms`` (bytes). ``ram`` holds
    aligned words; ``spec`` are the words of a :class:`vfio_model.batch.walks.WalkSpec`.
    """
