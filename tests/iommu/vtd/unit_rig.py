"""A VT-d unit in front of a little RAM, with a translation half that only takes notes."""

from __future__ import annotations

import errno
from typing import Any

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import Granularity
from vfio_model.iommu.vtd.registers import VtdParts, VtdRegisters
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import IORegion, MemoryRegion, RAMRegion
from vfio_model.ranges import Hva

RAM_SIZE = 4 << 20
QUEUE = 0x10_0000
STATUS = 0x20_0000
"""Where wait descriptors write."""
TABLE = 0x30_0000
"""Interrupt remapping table, or page request queue."""
SCALABLE = VtdOptions(scalable_mode=True, fsts=True, pasid_bits=20, device_iotlb=True, svm=True)
"""Everything."""


class NotedTranslator:
    """Implements :class:`vfio_model.iommu.vtd.ports.Translator`: ``calls`` is what was asked, in order.

    ``answers`` are what the next flushes return; without one a flush succeeds.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[OSError | None] = []

    def take(self) -> list[tuple[Any, ...]]:
        """What was asked since the last time, flushes aside."""
        calls, self.calls = self.calls, []
        return [call for call in calls if call != ("flush",)]

    def reset(self) -> None:
        self.calls.append(("reset",))

    def set_root(self, root: int, scalable: bool) -> None:
        self.calls.append(("root", root, scalable))

    def set_enabled(self, on: bool) -> None:
        self.calls.append(("enabled", on))

    def invalidate_contexts(self, granularity: Granularity, did: int = 0, sid: int = 0, mask: int = 0) -> None:
        self.calls.append(("contexts", granularity, did, sid, mask))

    def invalidate_iotlb(self, granularity: Granularity, did: int = 0, addr: int = 0, am: int = 0) -> None:
        self.calls.append(("iotlb", granularity, did, addr, am))

    def invalidate_pasid_iotlb(self, did: int, pasid: int, addr: int | None = None, am: int = 0) -> None:
        self.calls.append(("pasid iotlb", did, pasid, addr, am))

    def invalidate_pasid_cache(self, granularity: Granularity, did: int = 0, pasid: int = 0) -> None:
        self.calls.append(("pasid cache", granularity, did, pasid))

    def invalidate_device_tlb(self, sid: int, pasid: int | None, first: int, last: int) -> None:
        self.calls.append(("device tlb", sid, pasid, first, last))

    def page_response(self, sid: int, pasid: int, prgi: int, code: int) -> None:
        self.calls.append(("response", sid, pasid, prgi, code))

    def flush(self) -> OSError | None:
        self.calls.append(("flush",))
        return self.answers.pop(0) if self.answers else None


def timed_out() -> OSError:
    """What a flush returns when a device does not follow."""
    return OSError(errno.ETIMEDOUT, "a device did not follow")


class Log:
    """A trace that remembers."""

    enabled = True
    cause = 0

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        """Of the events, in order."""
        return [name for name, _ in self.events]


class Rig:
    """The unit as a guest and its devices reach it."""

    def __init__(self, options: VtdOptions = VtdOptions()) -> None:
        root = MemoryRegion("system", 1 << 64)
        self.system = AddressSpace("system", root)
        block = RAMBlock("ram", bytearray(RAM_SIZE), page_size=4096, hva=Hva(0x7F00_0000_0000))
        root.add_subregion(0, RAMRegion("ram", block))
        self.messages: list[tuple[int, int]] = []
        self.log = Log()
        self.translator = NotedTranslator()
        parts = VtdParts(options, self.system, self._message, self.log)
        self.unit = VtdRegisters(parts, self.translator)
        root.add_subregion(regs.BASE, IORegion("vtd", regs.SIZE, self.unit))
        self.tail = 0

    def _message(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    # -- memory and registers

    def load(self, addr: int, size: int) -> int:
        """RAM."""
        data = bytearray(size)
        self.system.read(addr, data)
        return int.from_bytes(data, "little")

    def store(self, addr: int, *quads: int) -> None:
        """RAM, quadwords."""
        self.system.write(addr, b"".join(quad.to_bytes(8, "little") for quad in quads))

    def get(self, register: int, size: int = 4) -> int:
        """A register."""
        return self.load(regs.BASE + register, size)

    def put(self, register: int, value: int, size: int = 4) -> None:
        """A register."""
        self.system.write(regs.BASE + register, value.to_bytes(size, "little"))

    @property
    def status(self) -> int:
        """FSTS."""
        return self.get(regs.FSTS)

    # -- the queue

    @property
    def wide(self) -> bool:
        """Whether descriptors have 256 bits."""
        return bool(self.get(regs.IQA, 8) & regs.IQA_DW)

    def start_queue(self, *, wide: bool = False, size: int = 0) -> None:
        """Put it at :data:`QUEUE` and switch it on."""
        self.put(regs.IQA, QUEUE | (regs.IQA_DW if wide else 0) | size, 8)
        self.put(regs.GCMD, regs.GCMD_QIE)
        self.translator.take()

    def fill(self, index: int, low: int, high: int = 0, *above: int) -> None:
        """Put a descriptor at ``index``."""
        quads = (low, high, *above, 0, 0)[:4] if self.wide else (low, high)
        self.store(QUEUE + index * len(quads) * 8, *quads)

    def submit(self, *descriptors: tuple[int, ...]) -> None:
        """Put them behind the tail and move it."""
        for each in descriptors:
            self.fill(self.tail, *each)
            self.tail += 1
        self.put(regs.IQT, self.tail * (32 if self.wide else 16), 8)

    @property
    def head(self) -> int:
        """The index."""
        return self.get(regs.IQH, 8) // (32 if self.wide else 16)
