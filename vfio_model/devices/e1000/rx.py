"""Reception (manual 3.2 "Packet Reception").

A frame that passes the filters goes into as many buffers as it needs: data first, then the descriptors from the last to
the first with DD, then the interrupt. Without enough descriptors the frame stays where it is, in
the back end's queue, which takes the place of the receive FIFO; :meth:`Receiver.offer` then says False.

Checksums are really computed: what is reported as checked is so.
"""

from __future__ import annotations

import zlib
from typing import Final

from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.descriptors import (
    RECEIVE_WRITE_BACK,
    RECEIVE_WRITE_BACK_AT,
    RxError,
    RxStatus,
)
from vfio_model.devices.e1000.interrupts import Delay, Interrupts
from vfio_model.devices.e1000.receive_filter import Match, ReceiveFilter
from vfio_model.devices.e1000.regs import RCTL, RXCSUM, Ctrl, Interrupt, Rctl, Rxcsum
from vfio_model.devices.e1000.ring import Ring
from vfio_model.devices.e1000.statistics import FCS, Statistics
from vfio_model.devices.ethernet.checksum import ETHERNET_HEADER, check, ones_sum
from vfio_model.devices.register_file import RegisterFile
from vfio_model.memory.dma import DMASpace
from vfio_model.trace import Trace

SHORTEST: Final = 60
"""Bytes of the shortest frame on the wire without its check sequence; what is shorter was padded."""
LONGEST: Final = 1522
"""Bytes of the longest frame with its check sequence, unless RCTL.LPE is set (13.7.15 "Receive Length Error Count")."""
LONGEST_LPE: Final = 16384
NULLS: Final = 64
"""Descriptors without a buffer that one frame may pass."""
_BUFFERS: Final = ((2048, 1024, 512, 256), (2048, 16384, 8192, 4096))
"""Buffer sizes by RCTL.BSEX and RCTL.BSIZE; the reserved combination counts as 2048."""


class Receiver:
    """The receive unit; ``t0`` holds back RXT0."""

    def __init__(
        self,
        registers: RegisterFile,
        ring: Ring,
        dma: DMASpace,
        interrupts: Interrupts,
        t0: Delay,
        statistics: Statistics,
        trace: Trace,
    ) -> None:
        self._registers, self.ring, self._dma = registers, ring, dma
        self._interrupts, self._t0, self._statistics, self._trace = interrupts, t0, statistics, trace
        self._filter = ReceiveFilter(registers)
        self._working = False

    @property
    def enabled(self) -> bool:
        """Whether the receiver runs."""
        return bool(self._registers[RCTL] & Rctl.EN)

    @property
    def buffer_size(self) -> int:
        """Bytes of every receive buffer."""
        control = self._registers[RCTL]
        return _BUFFERS[bool(control & Rctl.BSEX)][control >> regs.RCTL_BSIZE_SHIFT & 3]

    def offer(self, frame: bytes) -> bool:
        """``frame`` has come; False when it must wait for descriptors, or for the frame before it."""
        if not self.enabled or len(frame) < ETHERNET_HEADER:
            return True
        if self._working:
            return False
        self._working = True
        try:
            return self._take(frame)
        finally:
            self._working = False

    def _take(self, frame: bytes) -> bool:
        frame = frame.ljust(SHORTEST, b"\0")
        match = self._filter.match(frame)
        if match is Match.NONE or self._oversized(frame):
            self._statistics.seen(len(frame))
            return True
        return self._store(frame, RxStatus.PIF if match is Match.INEXACT else 0)

    def _oversized(self, frame: bytes) -> bool:
        control = self._registers[RCTL]
        length = len(frame) + FCS
        if length <= (LONGEST_LPE if control & Rctl.LPE else LONGEST):
            return False
        self._statistics.count(regs.ROC)
        self._statistics.count(regs.RLEC)
        return not control & Rctl.SBP or length > LONGEST_LPE

    # -- into memory ---------------------------------------------------------------------------------------------

    def _store(self, frame: bytes, status: int) -> bool:
        special, body = 0, frame
        if self._registers[regs.CTRL] & Ctrl.VME and self._filter.is_tagged(frame):
            special, body = int.from_bytes(frame[14:16], "big"), frame[:12] + frame[16:]
            status |= RxStatus.VP
        strip = self._registers[RCTL] & Rctl.SECRC
        data = body if strip else body + zlib.crc32(frame).to_bytes(FCS, "little")
        epoch = self.ring.epoch
        used = self._place(data)
        if used is None:
            return self._no_buffers(len(data))
        self._statistics.seen(len(frame))
        if used and self._write_back(used, body, status, special, epoch):
            self._statistics.received(frame)
            self._signal(len(frame) + FCS, len(used))
        else:
            self._statistics.count(regs.MPC)
        return True

    def _place(self, data: bytes) -> list[tuple[int, int]] | None:
        """Put ``data`` into buffers: (index, bytes) of each descriptor that was used, which the head has passed.

        None when there are too few descriptors, nothing when memory or the guest's ring cannot take it, or the ring is
        another one before the end.
        """
        size, ring = self.buffer_size, self.ring
        owned, needed, start, epoch = ring.owned, -(-len(data) // size), ring.head, ring.epoch
        if owned < needed:
            return None
        view, used = memoryview(data), []
        for _ in range(min(owned, needed + NULLS)):
            descriptor = ring.peek()
            if ring.epoch != epoch:
                return []
            if descriptor is None:
                self._failed("receive descriptor", ring.address(ring.head))
                break
            address = int.from_bytes(descriptor[:8], "little")
            part = view[: size if address else 0]
            if part and self._dma.write(address, part):
                self._failed("receive buffer", address)
            if not ring.holds(epoch):
                return []
            used.append((ring.advance(), len(part)))
            view = view[len(part) :]
            if not view:
                return used
        self._registers[regs.RDH] = start
        ring.forget()
        return []

    def _failed(self, what: str, iova: int) -> None:
        self._trace("e1000_dma_error", what=what, iova=iova)

    def _no_buffers(self, length: int) -> bool:
        """A frame waits, unless the whole ring would be too small for it."""
        self._statistics.count(regs.RNBC)
        self._interrupts.cause(Interrupt.RXO)
        if -(-length // self.buffer_size) <= max(self.ring.count - 1, 1):
            return False
        self._statistics.count(regs.MPC)
        return True

    def _write_back(self, used: list[tuple[int, int]], body: bytes, status: int, special: int, epoch: int) -> bool:
        """Whether all of it went into the ring of ``epoch``."""
        checked, errors = self._checks(body)
        total = ones_sum(body[self._registers[RXCSUM] & regs.RXCSUM_PCSS :])
        status |= checked | RxStatus.DD | RxStatus.EOP
        fields = (total, status, errors, special)
        for index, size in reversed(used):
            where = self.ring.address(index) + RECEIVE_WRITE_BACK_AT
            if self._dma.write(where, RECEIVE_WRITE_BACK.pack(size, *fields)):
                self._failed("receive descriptor", where)
            if self.ring.epoch != epoch:
                return False
            fields = (0, RxStatus.DD, 0, 0)
        return True

    def _checks(self, body: bytes) -> tuple[int, int]:
        """3.2.9 "Receive Packet Checksum Offloading"."""
        control = self._registers[RXCSUM]
        if not control & (Rxcsum.IPOFLD | Rxcsum.TUOFLD):
            return RxStatus.IXSM, 0
        tagged = self._filter.is_tagged(body)
        verdict = check(body, ETHERNET_HEADER + 4 if tagged else ETHERNET_HEADER)
        status = errors = 0
        if control & Rxcsum.IPOFLD and verdict.ip is not None:
            status |= RxStatus.IPCS
            errors |= 0 if verdict.ip else RxError.IPE
        if control & Rxcsum.TUOFLD and verdict.transport is not None:
            status |= RxStatus.TCPCS
            errors |= 0 if verdict.transport else RxError.TCPE
        return status or RxStatus.IXSM, errors

    # -- interrupts ----------------------------------------------------------------------------------------------

    def _signal(self, length: int, used: int) -> None:
        registers, ring = self._registers, self.ring
        threshold = ring.count >> 1 + (registers[RCTL] >> regs.RCTL_RDMTS_SHIFT & 3)
        left = ring.owned
        causes = 0
        if left <= threshold < left + used:
            causes |= Interrupt.RXDMT0
        if length <= registers[regs.RSRPD]:
            causes |= Interrupt.SRPD
        if causes:
            self._interrupts.cause(causes)
        self._t0.add()
