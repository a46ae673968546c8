"""The shared-memory area of an in-kernel TCE table (KVM_CREATE_SPAPR_TCE_64): a header, and the entries behind it.

The entries are native-endian u64s, one for each page of the window. The host stores them while it carries out a
hypercall of the guest; the guest's process reads them at any time and stores them when no such call is under way.
"""

from __future__ import annotations

from vfio_model.errors import RemoteProtocolError
from vfio_model.memory.layout import HEADER_SIZE, HEADER_WORDS, check_header, magic, write_header

TCE_AREA_MAGIC = magic("vmKVMTCE")


def tce_area_size(entries: int) -> int:
    """Bytes of the area of a table of ``entries``."""
    return HEADER_SIZE + entries * 8


def init_tce_area(words: memoryview, entries: int) -> memoryview:
    """Prepare ``words``, which are zero; returns the entries."""
    write_header(words, TCE_AREA_MAGIC, size=tce_area_size(entries))
    return words[HEADER_WORDS : HEADER_WORDS + entries]


def tce_area_entries(words: memoryview, entries: int) -> memoryview:
    """The entries of an area that somebody else prepared. :raise RemoteProtocolError: when it is no such area."""
    size = check_header(words, TCE_AREA_MAGIC, what="TCE table")
    if size != tce_area_size(entries):
        raise RemoteProtocolError(f"TCE table: {size} bytes, {tce_area_size(entries)} are expected")
    return words[HEADER_WORDS : HEADER_WORDS + entries]
