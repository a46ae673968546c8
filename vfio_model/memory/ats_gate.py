"""One word in shared memory that says whether translated requests of a function are let through.

The guest machine writes it, the function's process maps it read-only and looks at it inside each DMA section, before it
uses what its ATC holds::

    words 0-7   header (:mod:`vfio_model.memory.layout`), magic ``vmATSGT1``
    word 8      1: the IOMMU lets them through and the function is a bus master; 0: they go to the guest machine by
                message, where the IOMMU refuses them and reports why

Who closes it runs a revoke (:mod:`vfio_model.memory.revoke`) over the lanes of the process before the guest hears that
the right is gone.
"""

from __future__ import annotations

from vfio_model.memory.layout import HEADER_SIZE, HEADER_WORDS, check_header, magic, write_header

MAGIC_GATE = magic("vmATSGT1")
AREA_SIZE = HEADER_SIZE + 8
"""Bytes."""


def init_gate(words: memoryview) -> None:
    """Prepare an area; closed."""
    words[HEADER_WORDS] = 0
    write_header(words, MAGIC_GATE, size=AREA_SIZE)


def set_gate(words: memoryview, open_: bool) -> None:
    """By the one writer of the area."""
    words[HEADER_WORDS] = int(open_)


def gate_of(words: memoryview) -> memoryview:
    """The word itself, as a view of one item.

    :raise RemoteProtocolError: when ``words`` is not such an area.
    """
    check_header(words, MAGIC_GATE, what="gate of translated requests")
    return words[HEADER_WORDS : HEADER_WORDS + 1]
