"""The PE block: what a group's devices may do at all, and where their translations begin.

A partitionable endpoint is POWER's unit of isolation, and here an IOMMU group is one. Each device of it has a block in
shared memory: hostd writes it, the device process looks at it in every DMA section. Only this class stores into it.
"""

from __future__ import annotations

from enum import IntFlag

from vfio_model.host.layout import (
    PE_BUS_MASTER,
    PE_DIRTY,
    PE_FROZEN,
    PE_GENERATION,
    PE_MAGIC,
    PE_NORMAL,
    PE_STATE,
    PE_WINDOW0,
    PE_WINDOWS,
    PE_WORDS,
)
from vfio_model.memory.layout import write_header

PE_SIZE = PE_WORDS * 8
"""Bytes of a PE block."""


class Stop(IntFlag):
    """What of a PE is stopped. A reset that is active stops everything, whatever else is lifted meanwhile."""

    NOTHING = 0
    IO = 1
    """Loads and stores to its devices: told to who asks for the state; nothing here stands between them."""
    DMA = 2
    BOTH = 3
    RESET = 4


class PeBlock:
    """The writer's side. Every change bumps the generation; whether it is a revocation is the caller's to know."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        for index in range(PE_STATE, PE_WORDS):
            words[index] = 0
        write_header(words, PE_MAGIC, size=PE_SIZE)

    @property
    def frozen(self) -> bool:
        """Whether all DMA of the PE is refused (:attr:`Stop.DMA` or :attr:`Stop.RESET`)."""
        return self.words[PE_STATE] != PE_NORMAL

    def set_frozen(self, frozen: bool) -> None:
        """Refuse all DMA of the PE, or no longer."""
        self._store(PE_STATE, PE_FROZEN if frozen else PE_NORMAL)

    def set_bus_master(self, enabled: bool) -> None:
        """Let the device master the bus, or not."""
        self._store(PE_BUS_MASTER, int(enabled))

    def set_dirty(self, on: bool) -> None:
        """Let the device note what it writes, or not."""
        self._store(PE_DIRTY, int(on))

    def set_window(self, slot: int, record: int) -> None:
        """Publish the window record at byte offset ``record``; 0 takes the window away."""
        assert 0 <= slot < PE_WINDOWS, "a PE has two window slots"
        self._store(PE_WINDOW0 + slot, record)

    def _store(self, index: int, value: int) -> None:
        self.words[index] = value
        self.words[PE_GENERATION] += 1
