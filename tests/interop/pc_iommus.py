"""What a driver does to the IOMMUs of a PC, by qtest: one domain of three levels of 4 KiB pages for one function.

Sources: Intel Virtualization Technology for Directed I/O, "Register Descriptions" (11.4), "Root Entry", "Context Entry"
and "Second-Stage Paging Entries" (9); AMD I/O Virtualization Technology (IOMMU), "Data Structures" (2.2), "Commands"
(2.4), "IOMMU MMIO Registers" (3.4).
"""

from __future__ import annotations

import struct
from typing import Protocol

from tests.interop.pc import PcQemu

TABLES = 0x100_0000
"""Where tables are made."""
PAGE = 4096
READ, WRITE = 1, 2


class Iommu(Protocol):
    """One of them."""

    options: tuple[str, ...]
    """For QEMU's command line."""

    def enable(self) -> None:
        """Translate from now on."""

    def map(self, iova: int, gpa: int, perm: int) -> None:
        """One page; it was not mapped."""

    def unmap(self, iova: int) -> None:
        """One page."""


class _Tables:
    """Three levels, entries of 8 bytes; ``next_`` and ``leaf`` make them."""

    def __init__(self, pc: PcQemu) -> None:
        self._pc = pc
        self._free = TABLES
        self._known: dict[tuple[int, int], int] = {}
        self.root = self.page()

    def page(self, count: int = 1) -> int:
        """``count`` zeroed pages."""
        at, self._free = self._free, self._free + count * PAGE
        self._pc.qtest.ask(f"memset {at:#x} {count * PAGE:#x} 0x0")
        return at

    def slot(self, iova: int, flags: tuple[int, int]) -> int:
        """Where the leaf entry for ``iova`` is; ``flags`` of the entries on the way, from the top."""
        table = self.root
        for shift, flag in ((30, flags[0]), (21, flags[1])):
            entry = table + (iova >> shift & 0x1FF) * 8
            key = (table, entry)
            if key not in self._known:
                self._known[key] = self.page()
                self._pc.store(entry, 8, self._known[key] | flag)
            table = self._known[key]
        return table + (iova >> 12 & 0x1FF) * 8


class Vtd:
    """``intel-iommu`` in legacy mode, invalidated by registers."""

    options = ("-device", "intel-iommu,caching-mode=on")
    base = 0xFED9_0000
    _DOMAIN = 5

    def __init__(self, pc: PcQemu, devfn: int) -> None:
        self._pc, self._tables = pc, _Tables(pc)
        root, context = self._tables.page(), self._tables.page()
        pc.store(root, 8, context | 1)
        pc.store(context + devfn * 16, 8, self._tables.root | 1)
        pc.store(context + devfn * 16 + 8, 8, self._DOMAIN << 8 | 1)  # 39 bits: three levels
        self._root = root

    def _command(self, bit: int) -> None:
        pc = self._pc
        pc.store(self.base + 0x18, 4, (pc.load(self.base + 0x1C) & 0x96FF_FFFF) | 1 << bit)
        pc.wait("global command", lambda: bool(pc.load(self.base + 0x1C) >> bit & 1))

    def enable(self) -> None:
        """See :class:`Iommu`."""
        self._pc.store(self.base + 0x20, 8, self._root)
        self._command(30)
        self.invalidate_contexts()
        self._invalidate(1 << 63 | 1 << 60)
        self._command(31)

    def invalidate_contexts(self) -> None:
        """All of them: what is mapped is looked up anew."""
        self._pc.store(self.base + 0x28, 8, 1 << 63 | 1 << 61)
        self._pc.wait("context invalidation", lambda: not self._pc.load(self.base + 0x28, 8) >> 63)

    def _invalidate(self, command: int) -> None:
        self._pc.store(self.base + 0xF8, 8, command)
        self._pc.wait("invalidation", lambda: not self._pc.load(self.base + 0xF8, 8) >> 63)

    def _flush_page(self, iova: int) -> None:
        self._pc.store(self.base + 0xF0, 8, iova)
        self._invalidate(1 << 63 | 3 << 60 | self._DOMAIN << 32)

    def map(self, iova: int, gpa: int, perm: int) -> None:
        """See :class:`Iommu`. In caching mode a new mapping is invalidated, too."""
        self._pc.store(self._tables.slot(iova, (3, 3)), 8, gpa | perm)
        self._flush_page(iova)

    def unmap(self, iova: int) -> None:
        """See :class:`Iommu`."""
        self._pc.store(self._tables.slot(iova, (3, 3)), 8, 0)
        self._flush_page(iova)


class AmdVi:
    """``amd-iommu``, invalidated by its command buffer."""

    options = ("-device", "amd-iommu,dma-remap=on")
    base = 0xFED8_0000
    _DOMAIN = 5
    _IR, _IW = 1 << 61, 1 << 62

    def __init__(self, pc: PcQemu, devfn: int) -> None:
        self._pc, self._tables = pc, _Tables(pc)
        self._devices, self._commands, self._devfn = self._tables.page(16), self._tables.page(), devfn
        self._tail = 0
        entry = struct.pack("<QQQQ", self._tables.root | 3 << 9 | 3 | self._IR | self._IW, self._DOMAIN, 0, 0)
        pc.write(self._devices + devfn * 32, entry)

    def enable(self) -> None:
        """See :class:`Iommu`."""
        self._pc.store(self.base + 0x00, 8, self._devices | 15)
        self._pc.store(self.base + 0x08, 8, self._commands | 8 << 56)
        self._pc.store(self.base + 0x18, 8, 1 | 1 << 12)
        self._issue(2 << 60 | self._devfn, 0)  # INVALIDATE_DEVTAB_ENTRY

    def _issue(self, first: int, second: int) -> None:
        pc = self._pc
        pc.write(self._commands + self._tail, struct.pack("<QQ", first, second))
        self._tail = (self._tail + 16) % PAGE
        pc.store(self.base + 0x2008, 8, self._tail)
        pc.wait("command", lambda: pc.load(self.base + 0x2000, 8) == self._tail)

    def _flush_page(self, iova: int) -> None:
        self._issue(3 << 60 | self._DOMAIN << 32, iova)  # INVALIDATE_IOMMU_PAGES

    def _slot(self, iova: int) -> int:
        both = self._IR | self._IW | 1
        return self._tables.slot(iova, (both | 2 << 9, both | 1 << 9))

    def map(self, iova: int, gpa: int, perm: int) -> None:
        """See :class:`Iommu`."""
        bits = (self._IR if perm & READ else 0) | (self._IW if perm & WRITE else 0) | 1
        self._pc.store(self._slot(iova), 8, gpa | bits)
        self._flush_page(iova)

    def unmap(self, iova: int) -> None:
        """See :class:`Iommu`."""
        self._pc.store(self._slot(iova), 8, 0)
        self._flush_page(iova)
