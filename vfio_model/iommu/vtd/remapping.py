"""Interrupt remapping of a VT-d unit: a device's message selects an entry of a table, which says the interrupt.

Source: Intel VT-d specification, "Interrupt Requests in Remappable Format" and "Interrupt Requests in Intel 64
Compatibility Format" (5.1.2), "Interrupt Remapping Table Entry" (9.9), "Interrupt Remapping Fault Conditions" (7.1).
Entries are read from memory each time, so there is no interrupt entry cache to invalidate.
"""

from __future__ import annotations

import struct

from vfio_model.iommu.vtd import quirks, regs
from vfio_model.iommu.vtd.faults import FaultRecording
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import Message
from vfio_model.iommu.vtd.register_file import RegisterFile
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U32_MAX
from vfio_model.trace import Trace

_ENTRY = struct.Struct("<2Q")
_HEAD, _REMAPPABLE, _SHV = 0xFEE, regs.bit(4), regs.bit(3)
_HEAD_BITS, _INDEX_LOW = regs.Bits(31, 20), regs.Bits(19, 5)
_INDEX_HIGH_BIT, _INDEX_HIGH_SHIFT = regs.bit(2), 13
_INDEX_MASK, _DATA_RESERVED = 0xFFFF, 0xFFFF_0000
_SQ_MASKS = (0xFFFF, 0xFFFB, 0xFFF9, 0xFFF8)
_SVT_NONE, _SVT_SID, _SVT_BUS = 0, 1, 2
_REDIRECTION_HINT, _LOGICAL = regs.bit(3), regs.bit(2)
"""Of a message's address."""
_ASSERT, _LEVEL = regs.bit(14), regs.bit(15)
"""Of its data."""
_NO_SOURCE = 0xFFFF
_QUALIFIED = frozenset(
    (
        regs.FaultReason.IR_ENTRY_NOT_PRESENT,
        regs.FaultReason.IR_ENTRY_RESERVED,
        regs.FaultReason.IR_SID_MISMATCH,
    )
)
"""Faults that an entry's FPD keeps from being recorded."""


class InterruptRemapping:
    """Takes the messages of devices and sends on what they mean. ``root`` is the table, ``size`` its entries,
    ``eime`` whether destinations have 32 bits: all as latched by SIRTP.
    """

    def __init__(
        self,
        options: VtdOptions,
        registers: RegisterFile,
        faults: FaultRecording,
        system: AddressSpace,
        message: Message,
        trace: Trace,
    ) -> None:
        self._options, self._registers, self._faults = options, registers, faults
        self._no_sources = options.has(quirks.PLATFORM_WITHOUT_SOURCE)
        self._system, self._message, self._trace = system, message, trace
        self.reset()

    def reset(self) -> None:
        """Messages pass."""
        self.root = self.size = 0
        self.eime = self.enabled = False

    # -- registers

    def latch_root(self) -> None:
        """SIRTP was written: what IRTA says takes effect."""
        irta = self._registers.get_quad(regs.IRTA)
        self.root = irta & self._options.address_mask
        self.size = 2 << regs.IRTA_S.of(irta)
        self.eime = bool(irta & regs.IRTA_EIME)
        if self._trace.enabled:
            self._trace("vtd_reg_ir_root", addr=self.root, size=self.size)
        self._registers.change(regs.GSTS, set_=regs.GCMD_SIRTP)

    def set_enabled(self, on: bool) -> None:
        """IRE was changed."""
        if self._trace.enabled:
            self._trace("vtd_ir_enable", enable=int(on))
        self.enabled = on
        self._registers.change(regs.GSTS, regs.GCMD_IRE, regs.GCMD_IRE if on else 0)

    # -- messages

    def request(self, sid: int, address: int, data: int) -> MemTxResult:
        """Function ``sid`` wrote 4 bytes ``data`` to ``address``, which is somewhere in
        :data:`.regs.INTERRUPT_FIRST` to :data:`.regs.INTERRUPT_LAST`. ERROR: blocked, with a fault recorded unless the
        table's entry says no.
        """
        if self._trace.enabled:
            self._trace("vtd_ir_remap_msi_req", addr=address, data=data)
        remapped = self._remapped(sid, address, data)
        if remapped is None:
            return MemTxResult.ERROR
        if self._trace.enabled:
            self._trace(
                "vtd_ir_remap_msi", addr=address, data=data, remapped_addr=remapped[0], remapped_data=remapped[1]
            )
        self._message(*remapped)
        return MemTxResult.OK

    def platform_request(self, sid: int, address: int, data: int) -> MemTxResult:
        """The same of what is no PCI function: the I/O APIC."""
        return self.request(_NO_SOURCE if self._no_sources else sid, address, data)

    def _remapped(self, sid: int, address: int, data: int) -> tuple[int, int] | None:
        if not self.enabled:
            return address, data
        if address > U32_MAX or _HEAD_BITS.of(address) != _HEAD:
            self._faults.report_interrupt(regs.FaultReason.IR_REQUEST_RESERVED, sid, 0)
            return None
        if not address & _REMAPPABLE:
            if not self._compatibility_blocked():
                return address, data
            self._faults.report_interrupt(regs.FaultReason.IR_COMPATIBILITY_BLOCKED, sid, 0)
            return None
        index = _INDEX_LOW.of(address) | (address & _INDEX_HIGH_BIT) << _INDEX_HIGH_SHIFT
        if address & _SHV:
            index = index + data & _INDEX_MASK
        reason, low = self._entry(sid, index)
        if not reason and address & _SHV and data & _DATA_RESERVED:
            reason, index = regs.FaultReason.IR_REQUEST_RESERVED, 0
        if not reason:
            return self._interrupt(low, index)
        if reason not in _QUALIFIED or not low & regs.IRTE_FPD:
            self._faults.report_interrupt(reason, sid, index)
        return None

    def _compatibility_blocked(self) -> bool:
        if self._options.has(quirks.COMPATIBILITY_FORMAT):
            return False
        return self.eime or not self._registers.get(regs.GSTS) & regs.GCMD_CFI

    def _entry(self, sid: int, index: int) -> tuple[int, int]:
        """Why ``sid`` cannot use the entry, 0 when it can, and the entry's lower half as far as it was read."""
        if index >= self.size:
            return regs.FaultReason.IR_INDEX_TOO_BIG, 0
        raw = bytearray(regs.IRTE_SIZE)
        if self._system.read(self.root + index * regs.IRTE_SIZE, raw) != MemTxResult.OK:
            return regs.FaultReason.IR_TABLE_UNREADABLE, 0
        low, high = _ENTRY.unpack(raw)
        if self._trace.enabled:
            self._trace("vtd_ir_irte_get", index=index, low=low, high=high)
        if not low & regs.IRTE_P:
            return regs.FaultReason.IR_ENTRY_NOT_PRESENT, low
        if low & regs.IRTE_RESERVED or high & regs.IRTE_HIGH_RESERVED:
            return regs.FaultReason.IR_ENTRY_RESERVED, low
        return (0 if self._allowed(sid, high) else regs.FaultReason.IR_SID_MISMATCH), low

    def _allowed(self, sid: int, high: int) -> bool:
        """Whether the entry is for ``sid``: any, one function (of its function number the bits that SQ names do not
        matter), or the functions of some buses."""
        if self._no_sources and sid == _NO_SOURCE:
            return True
        kind, wanted = regs.IRTE_SVT.of(high), regs.IRTE_SID.of(high)
        if kind == _SVT_SID:
            return not (sid ^ wanted) & _SQ_MASKS[regs.IRTE_SQ.of(high)]
        if kind == _SVT_BUS:
            first, last = wanted >> 8, wanted & 0xFF
            if self._options.has(quirks.SVT_BUS_SWAPPED):
                first, last = last, first
            return first <= sid >> 8 <= last
        return kind == _SVT_NONE

    def _interrupt(self, low: int, index: int) -> tuple[int, int]:
        """The message in compatibility format; what of a 32-bit destination does not fit goes above address bit 31."""
        destination = regs.IRTE_DEST.of(low) if self.eime else regs.IRTE_XAPIC_DEST.of(low)
        vector, mode = regs.IRTE_VECTOR.of(low), regs.IRTE_DLM.of(low)
        logical, level = bool(low & regs.IRTE_DM), bool(low & regs.IRTE_TM)
        if self._trace.enabled:
            self._trace(
                "vtd_ir_remap",
                index=index,
                trigger=int(level),
                vector=vector,
                deliver=mode,
                dest=destination,
                mode=int(logical),
            )
        target = _HEAD << 20 | (destination & 0xFF) << 12 | (destination & ~0xFF) << 32
        target |= (_REDIRECTION_HINT if low & regs.IRTE_RH else 0) | (_LOGICAL if logical else 0)
        return target, vector | mode << 8 | _ASSERT | (_LEVEL if level else 0)
