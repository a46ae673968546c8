"""Shared-memory layouts of the host side, as data: the PE block, the window record and the TCE.

hostd writes these words and device processes read them, so each has one writer and is stored by one aligned 8-byte
store. Indices count 8-byte words from the start of the area; the first eight words of each area are the header of
:mod:`vfio_model.memory.layout`.

What must not be broken: a window record never changes after its offset was stored into a PE block, and its offset is
never used for another record as long as the domain lives. A reader may therefore keep what it decoded from a record
under the value of the root word alone, provided that it loads the root word anew in every DMA section.

Source for the TCE: LoPAPR, "Translation Control Entry (TCE)": address of the page and two permission bits.
"""

from __future__ import annotations

from vfio_model.memory.layout import magic

PE_MAGIC = magic("vmPEBLK1")
PE_STATE = 8
"""0 normal, 1 frozen."""
PE_BUS_MASTER = 9
"""1 while the device may master the bus, 0 otherwise."""
PE_WINDOW0 = 10
"""First of :data:`PE_WINDOWS` root words: 0, or the byte offset of a window record in the domain's memory."""
PE_WINDOWS = 2
PE_GENERATION = 12
"""Counts the changes of the words above; for observers and caches of a whole table, not for the DMA path."""
PE_DIRTY = 13
"""1 while every write is to be noted in the dirty map of whoever made it."""
PE_WORDS = 16

PE_NORMAL = 0
PE_FROZEN = 1

DOMAIN_MAGIC = magic("vmTCEDM1")

WINDOW_START = 0
"""First bus address of the window."""
WINDOW_LAST = 1
"""Last bus address, inclusive."""
WINDOW_PAGE_SHIFT = 2
WINDOW_LEVELS = 3
WINDOW_LEVEL_SHIFT = 4
"""log2 of the entries of one table of one level."""
WINDOW_ROOT = 5
"""Byte offset of the topmost table in the domain's memory."""
WINDOW_SLOT = 6
WINDOW_ID = 7
"""Counts the records of the domain, from 1."""
WINDOW_WORDS = 8

TCE_READ = 1
"""The device may read the page."""
TCE_WRITE = 2
"""The device may write the page."""
TCE_PERM = 3
"""Both bits. In a non-leaf entry both are set and the rest is the byte offset of the next table; 0 means nothing
there.
"""
TCE_LEAF = 4
"""In an entry above the last level: it maps a page as large as the table that would be there covers. Permissions and
address are as in the last level, the address aligned to that size.
"""

FIRST_HPA = 1 << 32
"""No memory lies below."""
DIRTY_SHIFT = 12
"""log2 of the bytes of memory that one byte of a dirty map stands for."""
DIRTY_BYTES = 1 << 32
"""Bytes of a dirty map. Byte ``n`` stands for the page at ``FIRST_HPA + (n << DIRTY_SHIFT)``: a writer sets it to 1
after it has written there, while :data:`PE_DIRTY` is set and before its lane is even again. The map is sparse. What
lies beyond its end counts as written, always.
"""
