"""The invalidation queue of a VT-d unit: a ring of descriptors in guest RAM, as a state machine that can rest.

Source: Intel VT-d specification, "Queued Invalidation Interface" and "Queued Invalidation Errors" (6.5.2, 6.5.2.12).

::

    disabled ──QIE──▶ idle ──tail written──▶ running ──head = tail──▶ idle
                       ▲                       │ │ └─bad descriptor──▶ IQE ──FSTS.IQE cleared──▶ idle (a tail write
                       │                       │ │                                                 runs it again)
                       └──QIE off, drained     │ └─flush timed out──▶ ITE ──FSTS.ITE cleared──▶ running
                                               └─wait, async──▶ pending ──step()──▶ running

In every state but *idle* the head is on the descriptor in question, so that resuming is fetching it anew. That is also
why no more than head, tail and the registers migrate. With ``invalidation=sync`` a wait descriptor flushes at once and
*pending* is never seen.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.descriptors import Descriptors, Quads, type_of
from vfio_model.iommu.vtd.faults import FaultRecording
from vfio_model.iommu.vtd.invalidation import Invalidations
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.register_file import RegisterFile
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.types import MemTxResult
from vfio_model.trace import Trace

_NARROW, _WIDE = struct.Struct("<2Q"), struct.Struct("<4Q")
_STOPPED = regs.FSTS_IQE | regs.FSTS_ITE
_RESERVED_TAIL_BIT = 1 << 4


class InvalidationQueue:
    """``base`` is where it lies, ``size`` its number of descriptors, ``head`` and ``tail`` are indices into it."""

    def __init__(
        self,
        options: VtdOptions,
        registers: RegisterFile,
        faults: FaultRecording,
        descriptors: Descriptors,
        invalidations: Invalidations,
        system: AddressSpace,
        trace: Trace,
    ) -> None:
        self._options, self._registers, self._faults = options, registers, faults
        self._descriptors, self._invalidations = descriptors, invalidations
        self._system, self._trace = system, trace
        self.on_pending: Callable[[], None] = lambda: None
        """Called when the queue begins to rest on a wait descriptor; :meth:`step` goes on."""
        self._running = False
        self.reset()

    def reset(self) -> None:
        """Disabled and empty."""
        self.base = self.size = self.head = self.tail = self.last_type = 0
        self.enabled = self.wide = self.pending = self._incomplete = False

    # -- registers

    def address_written(self) -> None:
        """IQA was: how wide descriptors are takes effect at once."""
        iqa = self._registers.get_quad(regs.IQA)
        self.wide = self._options.scalable_mode and bool(iqa & regs.IQA_DW)

    def read_address(self) -> int:
        """IQA as it reads: the base in use, with the width and size that were written."""
        return self.base | self._registers.get_quad(regs.IQA) & (regs.IQA_DW | regs.IQA_QS.mask)

    def enable(self) -> None:
        """QIE was set. A tail that is not zero already is processed at once."""
        self._trace_enable()
        iqa = self._registers.get_quad(regs.IQA)
        self.base = iqa & self._options.address_mask
        self.size = 1 << regs.IQA_QS.of(iqa) + (7 if self.wide else 8)
        self.enabled = True
        if self._trace.enabled:
            self._trace("vtd_inv_qi_setup", addr=self.base, size=self.size)
        self._registers.change(regs.GSTS, set_=regs.GCMD_QIE)
        if self.tail:
            self._fetch()

    def disable(self) -> None:
        """QIE was cleared; refused unless every descriptor was executed and the last was a wait."""
        self._trace_enable(0)
        if self.tail != self.head or self.last_type != regs.DescriptorType.WAIT:
            return
        self.head, self.enabled = 0, False
        self._registers.put_quad(regs.IQH, 0)
        self._registers.change(regs.GSTS, clear=regs.GCMD_QIE)

    def _trace_enable(self, enabled: int = 1) -> None:
        if self._trace.enabled:
            self._trace("vtd_inv_qi_enable", enabled=enabled)

    def tail_written(self) -> None:
        """IQT was."""
        value = self._registers.get_quad(regs.IQT)
        if self.wide and value & _RESERVED_TAIL_BIT:
            self._faults.queue_failed(regs.FSTS_IQE)
            return
        self.tail = value >> (5 if self.wide else 4)
        if self._trace.enabled:
            self._trace("vtd_inv_qi_tail", tail=self.tail)
        if self.enabled:
            self._fetch()

    def timeout_cleared(self) -> None:
        """FSTS.ITE was: go on where the time-out was."""
        if self.enabled and self.head != self.tail:
            self._fetch()

    # -- the machine

    def step(self) -> None:
        """Go on from *pending*: complete what was invalidated, then execute the wait and what follows it."""
        if self.pending:
            self.pending = False
            if self._flush():
                self._run()

    def _fetch(self) -> None:
        if self._running or self.pending or self._faults.status & _STOPPED:
            return
        if self._trace.enabled:
            self._trace("vtd_inv_qi_fetch")
        self._run()

    def _run(self) -> None:
        """Until head and tail meet or something stops it. What happens meanwhile may move the tail, or be a reset."""
        self._running = True
        try:
            while self.head != self.tail and self._next():
                self._registers.put_quad(regs.IQH, self.head << (5 if self.wide else 4))
            if self.head == self.tail:
                self._completed()
        finally:
            self._running = False

    def _next(self) -> bool:
        """Whether the descriptor at the head was executed and the head is behind it."""
        if self.tail >= self.size:
            if self._trace.enabled:
                self._trace("vtd_warn_invalid_qi_tail", tail=self.tail)
            return self._failed()
        descriptor = self._read()
        if descriptor is None or not self._descriptors.acceptable(descriptor):
            return self._failed()
        is_wait = self.last_type == regs.DescriptorType.WAIT
        if is_wait and not self._completed():
            return False
        if not self._descriptors.execute(descriptor):
            return self._failed()
        if not self.enabled:
            return False
        self._incomplete = self._incomplete or not is_wait
        self.head = (self.head + 1) % self.size
        return True

    def _failed(self) -> bool:
        self._faults.queue_failed(regs.FSTS_IQE)
        return False

    def _read(self) -> Quads | None:
        layout = _WIDE if self.wide else _NARROW
        if self._trace.enabled:
            self._trace("vtd_inv_qi_head", head=self.head)
        raw = bytearray(layout.size)
        if self._system.read(self.base + self.head * layout.size, raw) != MemTxResult.OK:
            self.last_type = 0
            return None
        descriptor: Quads = layout.unpack(raw)
        self.last_type = type_of(descriptor)
        return descriptor

    def _completed(self) -> bool:
        """Whether nobody uses any more what was invalidated; sees to it."""
        if not self._incomplete:
            return True
        if self._options.invalidation == "async":
            self.pending = True
            self.on_pending()
            return False
        return self._flush()

    def _flush(self) -> bool:
        error = self._invalidations.flush()
        if error is not None and error.errno == errno.ETIMEDOUT:
            self._faults.queue_failed(regs.FSTS_ITE)
            return False
        self._incomplete = False
        return self.enabled

    # -- migration

    def resume(self) -> None:
        """After the state was loaded: what was invalidated counts as incomplete, and the rest of the queue waits for
        :meth:`step`."""
        self._incomplete = self.enabled
        self.pending = self.enabled and self.head != self.tail and not self._faults.status & _STOPPED
        if self.pending:
            self.on_pending()
