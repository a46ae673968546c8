"""What an 82540EM counts (manual 13.7 "Statistics Registers").

Counters stick at their largest value; lengths include the frame check sequence.
"""

from __future__ import annotations

from typing import Final

from vfio_model.devices.e1000 import regs
from vfio_model.devices.register_file import RegisterFile
from vfio_model.ranges import U32_MAX, U64_MAX

FCS: Final = 4
"""Bytes of the frame check sequence, which frames here do not carry."""
BROADCAST: Final = b"\xff" * 6
_BUCKETS = (64, 127, 255, 511, 1023)
"""The longest frame that the first, the second, … size counter counts; the sixth counts what is longer."""


class Statistics:
    """The counters in ``registers``."""

    def __init__(self, registers: RegisterFile) -> None:
        self._registers = registers

    def count(self, offset: int) -> None:
        """One more."""
        value = self._registers[offset]
        if value < U32_MAX:
            self._registers[offset] = value + 1

    def _add(self, offset: int, octets: int) -> None:
        registers = self._registers
        value = min(U64_MAX, (registers[offset + 4] << 32 | registers[offset]) + octets)
        registers[offset], registers[offset + 4] = value & U32_MAX, value >> 32

    def _size(self, first: int, length: int) -> None:
        self.count(first + 4 * sum(length > longest for longest in _BUCKETS))

    def transmitted(self, frame: bytes) -> None:
        """``frame`` went out."""
        length = len(frame) + FCS
        self.count(regs.TPT)
        self._add(regs.TOTL, length)
        if length < 64:
            return
        self.count(regs.GPTC)
        self._add(regs.GOTCL, length)
        self._size(regs.PTC64, length)
        if frame[:6] == BROADCAST:
            self.count(regs.BPTC)
        elif frame[0] & 1:
            self.count(regs.MPTC)

    def seen(self, length: int) -> None:
        """A frame of ``length`` bytes came in, whatever becomes of it."""
        self.count(regs.TPR)
        self._add(regs.TORL, length + FCS)

    def received(self, frame: bytes) -> None:
        """``frame`` passed the filters and was good."""
        length = len(frame) + FCS
        self.count(regs.GPRC)
        self._add(regs.GORCL, length)
        self._size(regs.PRC64, length)
        if frame[:6] == BROADCAST:
            self.count(regs.BPRC)
        elif frame[0] & 1:
            self.count(regs.MPRC)
