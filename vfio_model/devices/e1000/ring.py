"""A descriptor ring (manual 3.2.6 "Receive Descriptor Queue Structure", 3.4 "Transmit Descriptor Ring Structure").

The device owns the descriptors from head to tail, the tail excluded. They are fetched ahead, a run in one DMA: the
guest may not touch what the device owns, so a copy stays good until the head has passed it or the ring is set up anew.
A ring without length, or with head or tail outside it, has nothing to work on.

A DMA may take its time, and what the guest writes meanwhile is obeyed: the ring may be another one, or none, when a
descriptor that was read from it has been carried out.
"""

from __future__ import annotations

from typing import NamedTuple

from vfio_model.devices.e1000.regs import DESCRIPTOR_SIZE
from vfio_model.devices.register_file import RegisterFile
from vfio_model.memory.dma import DMASpace
from vfio_model.ranges import wrap64

FETCH = 64
"""Descriptors that are fetched at once, at most."""


class RingRegisters(NamedTuple):
    """Offsets of a ring's registers."""

    base_low: int
    base_high: int
    length: int
    head: int
    tail: int


class Ring:
    """The ring that ``where`` names in ``registers``."""

    def __init__(self, registers: RegisterFile, where: RingRegisters, dma: DMASpace) -> None:
        self._registers, self._where, self._dma = registers, where, dma
        self._fetched = memoryview(b"")
        self._at = 0
        self.epoch = 0
        """Changes when the ring is set up anew."""
        for offset in (where.base_low, where.base_high, where.length, where.head):
            registers.on_write(offset, self._set_up)

    def _set_up(self, _offset: int, _value: int) -> None:
        self.forget()

    def forget(self) -> None:
        """Fetch anew: the ring was set up, or its memory may have changed."""
        self._fetched, self._at = memoryview(b""), 0
        self.epoch += 1

    def tail_written(self) -> None:
        """What was fetched beyond the tail that the guest has set is not the device's any more."""
        self._fetched = self._fetched[: self._at + self.owned * DESCRIPTOR_SIZE]

    @property
    def count(self) -> int:
        """Descriptors in the ring."""
        return self._registers[self._where.length] // DESCRIPTOR_SIZE

    @property
    def head(self) -> int:
        """Index of the next descriptor."""
        return self._registers[self._where.head]

    @property
    def owned(self) -> int:
        """How many descriptors are the device's."""
        head, tail, count = self._registers[self._where.head], self._registers[self._where.tail], self.count
        return (tail - head) % count if head < count and tail < count else 0

    def address(self, index: int) -> int:
        """Where descriptor ``index`` is."""
        where = self._where
        return wrap64(
            (self._registers[where.base_high] << 32 | self._registers[where.base_low]) + index * DESCRIPTOR_SIZE
        )

    def peek(self) -> memoryview | None:
        """The descriptor at the head, which the device owns; None when memory does not answer, or the ring has changed
        meanwhile."""
        if self._at >= len(self._fetched) and not self._fetch():
            return None
        return self._fetched[self._at : self._at + DESCRIPTOR_SIZE]

    def _fetch(self) -> bool:
        head, epoch = self.head, self.epoch
        run = min(self.owned, self.count - head, FETCH)
        buffer = bytearray(run * DESCRIPTOR_SIZE)
        failed = self._dma.read(self.address(head), buffer)
        if failed or self.epoch != epoch:
            self._fetched, self._at = memoryview(b""), 0
            return False
        self._fetched, self._at = memoryview(buffer), 0
        return run > 0

    def holds(self, epoch: int) -> bool:
        """Whether the descriptor at the head is the device's, in the ring of ``epoch``."""
        return self.epoch == epoch and self.owned > 0

    def advance(self) -> int:
        """Pass the descriptor at the head, which the device owns still (:meth:`holds`); its index."""
        head = self.head
        self._registers[self._where.head] = (head + 1) % self.count
        self._at += DESCRIPTOR_SIZE
        return head
