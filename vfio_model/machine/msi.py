"""Message interrupts: which numbers exist, and which function of a bridge has which.

A function gets a block of consecutive numbers, the first a multiple of a power of two that is not smaller than the
block, because a function makes its messages by replacing low bits. A reset of the bridge takes every block back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vfio_model.iommu.spapr.regs import MSI_BASE, MSI_NUMBERS


class MsiBlock(NamedTuple):
    """``num`` numbers from ``first`` on."""

    first: int
    num: int


class MsiNumbers:
    """The numbers of one machine."""

    def __init__(self) -> None:
        self._used: set[int] = set()

    def allocate(self, count: int) -> MsiBlock | None:
        """The lowest free block of ``count`` (at least 1) numbers, or None."""
        step = 1 << (count - 1).bit_length()
        for first in range(MSI_BASE, MSI_BASE + MSI_NUMBERS - count + 1, step):
            if self._used.isdisjoint(range(first, first + count)):
                return self.take(MsiBlock(first, count))
        return None

    def take(self, block: MsiBlock) -> MsiBlock:
        """Mark ``block`` as given."""
        self._used.update(range(block.first, block.first + block.num))
        return block

    def free(self, block: MsiBlock) -> None:
        """Take ``block`` back."""
        self._used.difference_update(range(block.first, block.first + block.num))


class PhbMsi:
    """What the functions of one bridge have, by their ``config_addr``."""

    def __init__(self, numbers: MsiNumbers) -> None:
        self._numbers = numbers
        self.given: dict[int, MsiBlock] = {}

    def give(self, config_addr: int, count: int) -> MsiBlock | None:
        """A new block in place of the function's old one; None, and no change, when there are not so many numbers."""
        block = self._numbers.allocate(count)
        if block is not None:
            self.release(config_addr)
            self.given[config_addr] = block
        return block

    def release(self, config_addr: int) -> bool:
        """Take the function's block back; whether it had one."""
        block = self.given.pop(config_addr, None)
        if block is not None:
            self._numbers.free(block)
        return block is not None

    def reset(self) -> None:
        """Take every block back."""
        for config_addr in list(self.given):
            self.release(config_addr)

    def restore(self, blocks: Iterable[tuple[int, int, int]]) -> None:
        """After a reset: ``(config_addr, first, count)`` of every function that has a block."""
        for config_addr, first, count in blocks:
            self.given[config_addr] = self._numbers.take(MsiBlock(first, count))
