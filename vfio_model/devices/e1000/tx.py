"""Transmission (manual 3.3 "Packet Transmission", 3.4 "Transmit Descriptor Ring Structure").

::

            data descriptor            EOP, no TSE: out it goes
    empty ─────────────────► gathering ────────────────────────► empty
                                 │ EOP, TSE                        ▲
                                 └────────► segmenting ────────────┘ last segment

A tail write does at most :data:`BUDGET` descriptors and frames at once, the rest when nothing else is to be done. DD
is written back for what asked for it (RS), in one DMA for all that was done at once; it says that the data has been
fetched. The two contexts, one for segmentation and one for checksums alone, stay until the guest gives others.

While a buffer is fetched the guest goes on: a tail that it writes then is found when the slice goes on, a transmitter
that it disables stops there, and a reset forgets what is in flight.

Frames here have no check sequence, so IFCS changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.descriptors import (
    DTYP_CONTEXT,
    DTYP_DATA,
    TRANSMIT_DD,
    TRANSMIT_STATUS_AT,
    ContextCommand,
    ContextDescriptor,
    TxCommand,
    decode_context,
    decode_data,
    decode_legacy,
)
from vfio_model.devices.e1000.interrupts import Delay, Interrupts
from vfio_model.devices.e1000.regs import Ctrl, Interrupt, Tctl
from vfio_model.devices.e1000.ring import Ring
from vfio_model.devices.e1000.segmentation import insert_checksum, offload, segment, segment_count
from vfio_model.devices.e1000.statistics import Statistics
from vfio_model.devices.ethernet.checksum import ETHERNET_HEADER
from vfio_model.devices.register_file import RegisterFile
from vfio_model.memory.dma import DMASpace
from vfio_model.trace import Trace

BUDGET: Final = 256
"""Descriptors and frames that are done at once; 4 KiB of data count as one more."""
SHORTEST: Final = 60
"""What TCTL.PSP pads to, without the check sequence."""
LARGEST: Final = 16288
"""Bytes of a packet that is not segmented (3.3.3 "Legacy Transmit Descriptor Format")."""
LARGEST_SEGMENTED: Final = 0xFF + 0xFFFFF
"""HDRLEN and PAYLEN at their largest."""
_NO_CONTEXT = ContextDescriptor()


class Transmitter:
    """The transmit unit: frames go to ``output``, ``delayed`` holds back TXDW, ``when_idle`` is called for the rest."""

    def __init__(
        self,
        registers: RegisterFile,
        ring: Ring,
        dma: DMASpace,
        interrupts: Interrupts,
        delayed: Delay,
        statistics: Statistics,
        trace: Trace,
        output: Callable[[bytes], None],
        when_idle: Callable[[Callable[[], bool]], None],
    ) -> None:
        self._registers, self.ring, self._dma = registers, ring, dma
        self._interrupts, self._delayed, self._statistics, self._trace = interrupts, delayed, statistics, trace
        self._output, self._when_idle = output, when_idle
        self._scheduled = self._working = False
        self._epoch = 0
        self._written_back: list[int] = []
        self._causes = 0
        self._may_wait = False
        self._clear()

    def _clear(self) -> None:
        self.checksum_context = self.segmentation_context = _NO_CONTEXT
        self._empty()

    def _empty(self) -> None:
        """No packet: ``spoiled`` is one that cannot be sent, ``tag`` what goes into its frames as an 802.1q tag."""
        self.packet = bytearray()
        self.gathering = self.segmenting = self.spoiled = False
        self.tse = False
        self.options = 0
        self.tag: int | None = None
        self.next_segment = 0

    def reset(self) -> None:
        """Nothing is in flight, no context is known."""
        self._clear()
        self.ring.forget()
        self._epoch += 1
        self._written_back, self._causes, self._may_wait = [], 0, False

    # -- work ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """There may be something to send. Harmless while something is sent: that goes on with what was added."""
        if not self._scheduled and not self._working and self._advance():
            self._scheduled = True
            self._when_idle(self._slice)

    def _slice(self) -> bool:
        self._scheduled = self._working or self._advance()
        return self._scheduled

    @property
    def _enabled(self) -> bool:
        return bool(self._registers[regs.TCTL] & Tctl.EN)

    def _advance(self) -> bool:
        """Do a slice; whether something is left."""
        before = self.ring.owned
        if not self._enabled or not (before or self.segmenting):
            return False
        self._working = True
        try:
            stuck = self._do_slice()
            self._finish(before)
        finally:
            self._working = False
        return self._enabled and not stuck and bool(self.segmenting or self.ring.owned)

    def _do_slice(self) -> bool:
        """Whether a descriptor could not be fetched."""
        budget = BUDGET
        while budget > 0 and self._enabled:
            if self.segmenting:
                budget -= self._send_segments(budget)
            elif self.ring.owned:
                epoch, raw = self.ring.epoch, self.ring.peek()
                if raw is None and self.ring.epoch == epoch:
                    self._failed("descriptor", self.ring.head)
                    return True
                budget -= 1 if raw is None else self._descriptor(raw)
            else:
                break
        return False

    def _finish(self, before: int) -> None:
        if self._written_back:
            status = bytes((TRANSMIT_DD,)) * len(self._written_back)
            if self._dma.write_many(self._written_back, 1, status):
                self._failed("status", self._written_back[0])
            self._written_back = []
        left = self.ring.owned
        if before and not left:
            self._causes |= Interrupt.TXQE
        low = (self._registers[regs.TXDCTL] >> regs.TXDCTL_LWTHRESH_SHIFT) * 8
        if left <= low < before:
            self._causes |= Interrupt.TXD_LOW
        if self._causes & Interrupt.TXDW:
            self._delayed.cancel()
        elif self._may_wait:
            self._delayed.add()
        self._may_wait = False
        if self._causes:
            causes, self._causes = self._causes, 0
            self._interrupts.cause(causes)

    def _descriptor(self, raw: memoryview) -> int:
        """One descriptor; what it counts against the budget."""
        command, moved, epoch = raw[11], 0, self.ring.epoch
        if not command & TxCommand.DEXT:
            moved = self._legacy(raw)
        elif raw[10] >> 4 == DTYP_CONTEXT:
            self._context(decode_context(raw))
        elif raw[10] >> 4 == DTYP_DATA:
            moved = self._data(raw)
        if not self.ring.holds(epoch):
            if self.ring.epoch != epoch:
                self._written_back = []
            return 1
        index = self.ring.advance()
        if command & TxCommand.RS:
            self._written_back.append(self.ring.address(index) + TRANSMIT_STATUS_AT)
            if command & TxCommand.IDE:
                self._may_wait = True
            else:
                self._causes |= Interrupt.TXDW
        return 1 + (moved >> 12)

    def _failed(self, what: str, where: int) -> int:
        self._trace("e1000_dma_error", what=f"transmit {what}", iova=where)
        return 1

    def _context(self, context: ContextDescriptor) -> None:
        if context.tucmd & ContextCommand.TSE:
            self.segmentation_context = context
        else:
            self.checksum_context = context

    # -- a packet ------------------------------------------------------------------------------------------------

    def _legacy(self, raw: memoryview) -> int:
        descriptor = decode_legacy(raw)
        if not self.gathering:
            self._begin(tse=False, options=0, tag=None)
        if self._gather(descriptor.address, descriptor.length) and descriptor.command & TxCommand.EOP:
            if descriptor.command & TxCommand.IC:
                insert_checksum(self.packet, descriptor.checksum_start, 0, descriptor.checksum_offset)
            self._send_whole(self._tag_of(descriptor.command, descriptor.special))
        return descriptor.length

    def _data(self, raw: memoryview) -> int:
        descriptor = decode_data(raw)
        tag = self._tag_of(descriptor.command, descriptor.special)
        if not self.gathering:
            self._begin(tse=bool(descriptor.command & TxCommand.TSE), options=descriptor.options, tag=tag)
        if self._gather(descriptor.address, descriptor.length) and descriptor.command & TxCommand.EOP:
            if self.tse:
                self._begin_segments()
            else:
                offload(self.packet, self.checksum_context, self.options)
                self._send_whole(tag)
        return descriptor.length

    def _begin(self, *, tse: bool, options: int, tag: int | None) -> None:
        self.gathering, self.tse, self.options, self.tag = True, tse, options, tag

    def _tag_of(self, command: int, special: int) -> int | None:
        return special if command & TxCommand.VLE and self._registers[regs.CTRL] & Ctrl.VME else None

    def _gather(self, address: int, length: int) -> bool:
        """False when a reset has come meanwhile: there is no packet any more."""
        if self.spoiled or len(self.packet) + length > (LARGEST_SEGMENTED if self.tse else LARGEST):
            self.spoiled = True
            return True
        part, epoch = bytearray(length), self._epoch
        failed = self._dma.read(address, part)
        if self._epoch != epoch:
            return False
        if failed:
            self._failed("buffer", address)
            self.spoiled = True
        if self.packet:
            self.packet += part
        else:
            self.packet = part
        return True

    def _send_whole(self, tag: int | None) -> None:
        if not self.spoiled:
            self._send(self.packet, tag)
        self._empty()

    def _begin_segments(self) -> None:
        context = self.segmentation_context
        failed = self.spoiled or not segment_count(len(self.packet), context)
        if failed or len(self.packet) != context.hdrlen + context.paylen:
            self._statistics.count(regs.TSCTFC)
        if failed:
            self._empty()
            return
        self._statistics.count(regs.TSCTC)
        self.segmenting = True

    def _send_segments(self, most: int) -> int:
        context, epoch = self.segmentation_context, self._epoch
        count = segment_count(len(self.packet), context)
        stop = min(count, self.next_segment + most)
        sent = stop - self.next_segment
        for index in range(self.next_segment, stop):
            self._send(segment(self.packet, context, self.options, index), self.tag)
            if self._epoch != epoch:
                return 1
        self.next_segment = stop
        if stop >= count:
            self._empty()
        return max(sent, 1)

    def _send(self, frame: bytearray, tag: int | None) -> None:
        if len(frame) < ETHERNET_HEADER:
            return
        if tag is not None:
            frame[12:12] = self._registers[regs.VET].to_bytes(2, "big") + tag.to_bytes(2, "big")
        if len(frame) < SHORTEST and self._registers[regs.TCTL] & Tctl.PSP:
            frame += bytes(SHORTEST - len(frame))
        out = bytes(frame)
        self._statistics.transmitted(out)
        self._output(out)

    # -- migration -----------------------------------------------------------------------------------------------

    def export_state(self) -> dict[str, Any]:
        """What is in flight, and the contexts."""
        return {
            "checksum_context": list(self.checksum_context),
            "segmentation_context": list(self.segmentation_context),
            "packet_size": len(self.packet),
            "packet": bytes(self.packet),
            **{name: getattr(self, name) for name in ("gathering", "segmenting", "spoiled", "tse", "options")},
            "tagged": self.tag is not None,
            "tag": self.tag or 0,
            "next_segment": self.next_segment,
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same; :meth:`run` goes on with it."""
        self.reset()
        self.checksum_context = ContextDescriptor(*state["checksum_context"])
        self.segmentation_context = ContextDescriptor(*state["segmentation_context"])
        self.packet = bytearray(state["packet"])
        for name in ("gathering", "segmenting", "spoiled", "tse", "options", "next_segment"):
            setattr(self, name, state[name])
        self.tag = state["tag"] if state["tagged"] else None
