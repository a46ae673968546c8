"""A sampler: each of four channels writes a sample into a ring in guest memory, at its own pace, with its own message.

A channel's registers, 32 bytes each from 0 on: RING (where), SLOTS (samples of 16 bytes), PERIOD (in ns; writing it
starts the channel, 0 stops it), HEAD (samples taken). A sample is its number and the device's time, two little-endian
words of 64 bits. The last page of the BAR has the MSI-X table.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from struct import Struct
from typing import Any

from vfio_model.device_api import (
    MSIX_STATE,
    PARENT,
    BarSpec,
    DeviceHost,
    Field,
    MemTxResult,
    MsixSpec,
    PCIDevice,
    State,
    Type,
    VMStateDescription,
)

CHANNELS = 4
RING, SLOTS, PERIOD, HEAD = NAMES = range(0, 0x20, 8)
STRIDE = 0x20
SHORTEST_NS = 1000
"""A guest cannot ask for more samples than this lets it."""
SAMPLE = Struct("<QQ")
WORDS = CHANNELS * len(NAMES)
MASK = (1 << 64) - 1


class Sampler(PCIDevice):
    """Writes what it measures: the time."""

    VENDOR_ID, DEVICE_ID, CLASS_ID = 0x1234, 0x5A4D, 0x1180
    BARS = (BarSpec(0, 0x2000, access=(4, 8)),)
    MSIX = MsixSpec(CHANNELS, bar=0, table_offset=0x1000, pba_offset=0x1800)
    VMSTATE = VMStateDescription(
        "sampler",
        1,
        (PARENT, MSIX_STATE, Field("words", Type.U64, array=WORDS), Field("remaining_ns", Type.U64, array=CHANNELS)),
    )

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.words = [0] * WORDS
        self.timers = [host.clock.timer(partial(self._sample, channel)) for channel in range(CHANNELS)]

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A word, or its low half."""
        index, rest = divmod(offset, 8)
        return self.words[index] & (1 << size * 8) - 1 if index < WORDS and not rest else 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """A word; a write of 4 bytes sets the whole of it."""
        index, rest = divmod(offset, 8)
        if index < WORDS and not rest and offset % STRIDE != HEAD:
            self.words[index] = value
            if offset % STRIDE == PERIOD:
                self._start(offset // STRIDE)
        return MemTxResult.OK

    def _word(self, channel: int, name: int) -> int:
        return self.words[(channel * STRIDE + name) // 8]

    def _start(self, channel: int) -> None:
        period = self._word(channel, PERIOD)
        if period:
            self.timers[channel].mod(self.host.clock.now_ns + max(period, SHORTEST_NS))
        else:
            self.timers[channel].cancel()

    def _sample(self, channel: int) -> None:
        words, head = self.words, self._word(channel, HEAD)
        slot = head % max(self._word(channel, SLOTS), 1)
        iova = self._word(channel, RING) + slot * SAMPLE.size & MASK
        result = self.dma.write(iova, SAMPLE.pack(head, self.host.clock.now_ns))
        if self.words is not words:
            return  # it was reset while it waited for memory
        if not result:
            self.words[(channel * STRIDE + HEAD) // 8] = head + 1 & MASK
            self.raise_irq(channel)
        self._start(channel)

    def reset_enter(self) -> None:
        """Every channel stops."""
        self.unrealize()
        super().reset_enter()

    def reset_hold(self) -> None:
        """And forgets."""
        super().reset_hold()
        self.words = [0] * WORDS

    def unrealize(self) -> None:
        """No timer fires any more."""
        for timer in self.timers:
            timer.cancel()

    def export_state(self) -> State:
        """Words, and how long each channel still waits."""
        remaining = [timer.remaining_ns or 0 for timer in self.timers]
        return {**super().export_state(), "words": list(self.words), "remaining_ns": remaining}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same."""
        self.words = list(state["words"])
        super().import_state(state)
        for channel, timer in enumerate(self.timers):
            if self._word(channel, PERIOD):
                timer.mod(self.host.clock.now_ns + state["remaining_ns"][channel])
