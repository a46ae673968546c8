"""DMA through one page, with proof: the memory, not the device, says whether it went through.

A device like edu reports no refusal; a read that the IOMMU refused delivers zeros and a refused write leaves memory
alone. So a probe writes a pattern into the guest's memory by the CPU, lets the device load it, writes another
pattern, lets the device store, and looks. For a page that should be out of reach the store must leave memory as it
was; the refused load is proved through any page that is still mapped, by storing the buffer there and finding zeros.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from deploy.system import DmaDriver
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.trace import Trace

LENGTH = 64
"""Bytes of one probe."""


@dataclass
class ProbeCounts:
    """DMA tried by probes: each transfer counts once. ``wrong`` says in words what was not as expected."""

    moved: int = 0
    refused: int = 0
    bytes_moved: int = 0
    pages: int = 0
    wrong: list[str] = field(default_factory=list)


class Prober:
    """Probes pages by one device. ``iova`` are bus addresses, ``gpa`` guest-physical ones."""

    def __init__(self, device: str, driver: DmaDriver, cpu: Cpu, trace: Trace, length: int = LENGTH) -> None:
        self.device, self.counts = device, ProbeCounts()
        self._driver, self._cpu, self._trace = driver, cpu, trace
        self._length = min(length, driver.max_length)
        self._round = 0
        self.first_moved_ns: int | None = None
        """CLOCK_MONOTONIC when the first DMA had gone through."""

    def _pattern(self) -> bytes:
        """Bytes that no earlier probe used, none of them zero."""
        self._round += 1
        word = (0x8100_0000 + self._round * 0x9E37 & 0x7FFF_FFFF | 0x8101_0101).to_bytes(4, "big")
        tag = (self._round % 0xFFFF + 1).to_bytes(4, "big").replace(b"\0", b"\x5a")
        return ((word + tag) * (self._length // 8 + 1))[: self._length]

    def fill(self, iova: int, gpa: int) -> bool:
        """Fill the device's buffer with a new pattern through a page that it can read; False when it has died."""
        self._cpu.write_memory(gpa, self._pattern())
        return self._driver.load(iova, self._length)

    def load(self, iova: int, gpa: int) -> bytes:
        """Put a pattern at ``gpa`` and let the device load from ``iova``; the pattern."""
        pattern = self._pattern()
        self._cpu.write_memory(gpa, pattern)
        self._driver.load(iova, self._length)
        return pattern

    def store(self, iova: int, gpa: int) -> tuple[bytes, bytes]:
        """Put a new pattern at ``gpa`` and let the device store to ``iova``; that pattern, and what memory holds
        then.
        """
        pattern = self._pattern()
        self._cpu.write_memory(gpa, pattern)
        self._driver.store(iova, self._length)
        return pattern, self._cpu.read_memory(gpa, self._length)

    def allowed(self, iova: int, gpa: int) -> bool:
        """Load and store through a page that must be within reach."""
        loaded = self.load(iova, gpa)
        _, seen = self.store(iova, gpa)
        self._note("read", iova, seen == loaded)
        return self._note("write", iova, seen == loaded, expected=True)

    def refused_store(self, iova: int, gpa: int) -> bool:
        """Store to an address that must be out of reach; ``gpa`` is what it reached before, or would."""
        before, seen = self.store(iova, gpa)
        return self._note("write", iova, seen != before, expected=False)

    def allowed_store(self, iova: int, gpa: int) -> bool:
        """Store to an address that must be within reach, what the buffer holds."""
        before, seen = self.store(iova, gpa)
        return self._note("write", iova, seen != before, expected=True)

    def store_moves(self, iova: int, gpa: int) -> bool:
        """Whether a store reaches memory; expects nothing."""
        before, seen = self.store(iova, gpa)
        return self._note("write", iova, seen != before)

    def load_moves(self, iova: int, gpa: int, stage_iova: int, stage_gpa: int) -> bool:
        """Whether a load from ``iova`` brings the memory at ``gpa``, shown through a page that the device can write."""
        loaded = self.load(iova, gpa)
        _, seen = self.store(stage_iova, stage_gpa)
        return self._note("read", iova, seen == loaded)

    def allowed_load(self, iova: int, gpa: int, stage_iova: int, stage_gpa: int) -> bool:
        """Load from an address that must be within reach."""
        loaded = self.load(iova, gpa)
        _, seen = self.store(stage_iova, stage_gpa)
        return self._note("read", iova, seen == loaded, expected=True)

    def refused_load(self, iova: int, gpa: int, stage_iova: int, stage_gpa: int) -> bool:
        """Load from an address that must be out of reach: the buffer is zeros then."""
        loaded = self.load(iova, gpa)
        _, seen = self.store(stage_iova, stage_gpa)
        if seen not in (loaded, bytes(self._length)):
            self.counts.wrong.append(f"{self.device}: the page at {stage_iova:#x} did not take what the device stored")
        return self._note("read", iova, seen == loaded, expected=False)

    def _note(self, direction: str, iova: int, moved: bool, *, expected: bool | None = None) -> bool:
        if moved:
            self.first_moved_ns = self.first_moved_ns or time.monotonic_ns()
            self.counts.moved += 1
            self.counts.bytes_moved += self._length
        else:
            self.counts.refused += 1
        self._trace(
            "dma",
            device=self.device,
            direction=direction,
            iova=iova,
            length=self._length,
            moved=moved,
            expected=expected,
        )
        if expected is not None and moved != expected:
            how = "was refused, and the page is mapped" if expected else "went through, and nothing is mapped there"
            self.counts.wrong.append(f"{self.device}: a {direction} at {iova:#x} {how}")
        return moved if expected is None else moved == expected
