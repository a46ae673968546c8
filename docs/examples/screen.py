"""A screen: two frames that the guest maps and paints, and registers that are never mapped.

::

    BAR 0   0x0000  registers: FRAME (which one is shown), SUM (of its bytes)
            0x1000  cursor, 4 KiB     mmap
            0x2000  (nothing)
            0x4000  frame 0, 16 KiB   mmap
            0x8000  frame 1, 16 KiB   mmap

What the guest writes to a mapped area reaches no method of the device: it is there when the device looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.device_api import (
    BAR_MEMORY_STATE,
    PARENT,
    BarSpec,
    DeviceHost,
    Field,
    MemTxResult,
    PCIDevice,
    State,
    VMStateDescription,
    VMStateError,
)

FRAME, SUM, CURSOR_SUM = 0x00, 0x04, 0x08
CURSOR, CURSOR_SIZE = 0x1000, 0x1000
FRAMES, FRAME_SIZE, FRAME_COUNT = 0x4000, 0x4000, 2


class Screen(PCIDevice):
    """Shows one of two frames."""

    VENDOR_ID, DEVICE_ID, CLASS_ID = 0x1234, 0x5C4E, 0x0380
    BARS = (BarSpec(0, 0x10000, access=(4, 4), mmap=((CURSOR, CURSOR_SIZE), (FRAMES, FRAME_SIZE * FRAME_COUNT))),)
    VMSTATE = VMStateDescription("screen", 1, (PARENT, BAR_MEMORY_STATE, Field("frame")))

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.frame = 0

    def shown(self) -> memoryview:
        """The bytes of the frame that is shown."""
        at = FRAMES + self.frame * FRAME_SIZE
        return self.bar_memory(0)[at : at + FRAME_SIZE]

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """FRAME, and the sums, computed when they are read."""
        if offset == FRAME:
            return self.frame
        if offset == SUM:
            return sum(self.shown())
        if offset == CURSOR_SUM:
            return sum(self.bar_memory(0)[CURSOR : CURSOR + CURSOR_SIZE])
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """FRAME."""
        if offset == FRAME:
            self.frame = value % FRAME_COUNT
        return MemTxResult.OK

    def reset_hold(self) -> None:
        """Frame 0, and black: what is mapped survives a reset unless the device clears it."""
        super().reset_hold()
        self.frame = 0
        memory = self.bar_memory(0)
        for offset, size in self.bar_spec(0).mmap:
            memory[offset : offset + size] = bytes(size)

    def export_state(self) -> State:
        """The base class brings the frames."""
        return {**super().export_state(), "frame": self.frame}

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """There are two."""
        super().check_state(state, where=where)
        if state["frame"] >= FRAME_COUNT:
            raise VMStateError(f"frame {state['frame']} of {FRAME_COUNT}", where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same."""
        self.frame = state["frame"]
        super().import_state(state)
