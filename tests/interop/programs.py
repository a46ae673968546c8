"""Random programs: mostly good calls, with every kind of bad argument among them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from tests.interop.operations import (
    Call,
    DeviceTest,
    Edu,
    Fill,
    Indirect,
    Operation,
    Program,
    QtestRtas,
    Register,
    Reset,
    Rtas,
    Switched,
)
from tests.interop.places import PAGES, TESTDEV_BAR, bar_gpa
from tests.interop.shadow import MAX_ENTRIES, Bridge, Shadow, Window
from tests.interop.variants import EDU_SLOT, RAM_SIZE, TESTDEV_SLOT, Variant
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.iommu_testdev import regs as testdev
from vfio_model.iommu.spapr.regs import (
    MSI_WINDOW,
    PCI_BASE,
    RTAS_TOKENS,
    HCall,
    RtasToken,
    config_addr,
    pci_liobn,
    phb_buid,
)
from vfio_model.ranges import U32_MAX, U64_MAX

PAGE_SHIFTS = (12, 16, 21, 24)
UNKNOWN_TOKENS = (0, 0x1FFF, 0x2100, 0xFFFF)
"""Tokens that nobody answers. Others that are not here may stop the guest or the machine."""
EEH_TOKENS = tuple(token for token in RtasToken if "EEH" in token.name or "SLOT" in token.name)
_BEHIND_CAPABILITIES = 0x50
"""From here on the configuration space of both devices holds no register."""
COUNTS = (0, 1, 2, 3, 4, 5, 6, 7, 12, 17, 40)

_NAMES = {int(token): name for name, token in RTAS_TOKENS.items()}


class Generator:
    """Programs for ``variant`` out of ``rng``; the shadow follows what it makes."""

    def __init__(self, variant: Variant, rng: random.Random) -> None:
        self.variant, self.rng = variant, rng
        self.shadow = Shadow(variant)
        self.left_out: Counter[str] = Counter()
        """Operations that were thrown away as hazards, by quirk."""
        self._kinds: list[tuple[int, Callable[[], Operation]]] = [
            (22, self._put),
            (14, self._get),
            (8, self._stuff),
            (8, self._indirect),
            (4, self._bad_call),
            (14, self._edu),
            (5, self._testdev),
            (4, self._register),
            (4, self._fill),
            (7, self._ddw),
            (4, self._bad_ddw),
            (6, self._config),
            (2, self._other_rtas),
            (2, self._qtest_rtas),
            (1, self._switched),
            (2, self._messages),
            (3 if variant.vio else 0, self._bypass),
        ]

    def program(self, length: int) -> Program:
        """``length`` operations without a hazard, after a reset."""
        made: list[Operation] = [Reset()]
        self.shadow.apply(made[0])
        weights = [weight for weight, _ in self._kinds]
        while len(made) < length:
            (_, make), *_ = self.rng.choices(self._kinds, weights)
            operation = make() if self.rng.random() > 0.002 else Reset()
            hazard = self.shadow.apply(operation).hazard
            if hazard:
                self.left_out[hazard] += 1
            else:
                made.append(operation)
        return tuple(made)

    # -- hypercalls ----------------------------------------------------------------------------------------------

    def _bridge(self) -> Bridge:
        return self.rng.choice(self.shadow.bridges)

    def _window(self) -> tuple[Bridge, Window, int]:
        """An open window and its LIOBN; of a bridge without one, what was its default."""
        bridge = self._bridge()
        if self.variant.vio and self.rng.random() < 0.3:
            unit = self.rng.choice(self.variant.vio)
            return bridge, self.shadow.vio[unit], unit
        if not bridge.windows:
            return bridge, Window(12, 0, 1 << 10), pci_liobn(bridge.index, 0)
        slot = self.rng.choice(list(bridge.windows))
        return bridge, bridge.windows[slot], pci_liobn(bridge.index, slot)

    def _index(self, window: Window, count: int = 1) -> int:
        """An entry from which ``count`` mostly fit: low ones, the last ones, any, or one that was set."""
        kind = self.rng.random()
        if kind < 0.4:
            return self.rng.randrange(min(64, window.entries))
        if kind < 0.7 and window.tces:
            return self.rng.choice(list(window.tces))
        if kind < 0.8:
            return max(window.entries - count - self.rng.randrange(3), 0)
        return self.rng.randrange(max(window.entries - count, 1))

    def _ioba(self, window: Window, count: int = 1) -> int:
        low = self.rng.randrange(1 << window.shift) if self.rng.random() < 0.1 else 0
        return window.bus + (self._index(window, count) << window.shift) + low & U64_MAX

    def _tce(self, window: Window) -> int:
        shifts = [shift for shift in PAGE_SHIFTS if shift >= window.shift] or [24]
        page = self.rng.choice(PAGES[self.rng.choice(shifts)])
        perm = self.rng.choice((3, 3, 3, 3, 1, 2, 0))
        if self.rng.random() < 0.08:  # low bits that are masked, or what is not RAM
            page = self.rng.choice((page | self.rng.randrange(4096) & ~3, RAM_SIZE + page, 1 << 60 | page, page + 4096))
            if page < RAM_SIZE and page & -(1 << window.shift) < PAGES[12][0]:
                page = PAGES[24][0]
        return page | perm

    def _put(self) -> Operation:
        _, window, liobn = self._window()
        return Call(HCall.H_PUT_TCE, (liobn, self._ioba(window), self._tce(window)))

    def _get(self) -> Operation:
        _, window, liobn = self._window()
        return Call(HCall.H_GET_TCE, (liobn, self._ioba(window)))

    def _count(self, window: Window) -> int:
        most = max(min(window.entries, 600), 2)
        return self.rng.choice((1, self.rng.randrange(1, 9), self.rng.randrange(1, min(65, most)), 512, 513, 3000))

    def _stuff(self) -> Operation:
        _, window, liobn = self._window()
        count = self._count(window)
        value = self._tce(window) if self.rng.random() < 0.6 else self.rng.choice((0, 0, 4, 0xFF8))
        return Call(HCall.H_STUFF_TCE, (liobn, self._ioba(window, count), value, count))

    def _indirect(self) -> Operation:
        _, window, liobn = self._window()
        count = min(self._count(window), 512)
        tces = tuple(self._tce(window) for _ in range(count))
        return Indirect(liobn, self._ioba(window, count), tces, count)

    def _bad_call(self) -> Operation:
        _, window, liobn = self._window()
        beyond = window.bus + (window.entries << window.shift)
        ioba = self._ioba(window)
        tces = tuple(self._tce(window) for _ in range(8))
        other = self.rng.choice((liobn | 1 << 32, liobn + 2, 0, 0x71000000, pci_liobn(7, 0), U64_MAX))
        away = self.rng.choice((beyond, beyond + 4096, window.bus - 1, U64_MAX, 1 << 62)) & U64_MAX
        near = beyond - (3 << window.shift) & U64_MAX
        get, put, stuff = HCall.H_GET_TCE, HCall.H_PUT_TCE, HCall.H_STUFF_TCE
        return self.rng.choice(
            (
                Call(self.rng.choice((0x1D, 0x21, 0x13A, 0x13F, 0xF0000, 0xE000)), (liobn, ioba, 3, 1)),
                Call(self.rng.choice((0x22, 0x1E, 0x13D, 0x1FFE, 0xEFFF)), (liobn, ioba, 3, 1)),
                Call(HCall.H_RTAS, (RAM_SIZE + ioba & 0xFFFF_FFFF_F000,)),
                Call(HCall.H_PUT_TCE_INDIRECT, (liobn, ioba, RAM_SIZE + 0x7000, self.rng.randrange(1, 5))),
                Call(HCall.H_PUT_TCE_INDIRECT, (liobn, ioba, bar_gpa(0, TESTDEV_BAR), self.rng.randrange(1, 9))),
                Call(get, (other, ioba)),
                Call(get, (liobn, away)),
                Call(put, (other, ioba, 3)),
                Call(put, (liobn, away, tces[0])),
                Call(stuff, (other, ioba, 0, 1)),
                Call(stuff, (liobn, near, tces[0], 8)),
                Call(stuff, (liobn, ioba, tces[0], 0)),
                Call(stuff, (liobn, ioba, tces[0], self.rng.choice((window.entries + 1, U64_MAX, 1 << 32)))),
                Indirect(other, ioba, tces, 8),
                Indirect(liobn, near, tces, 8),
                Indirect(liobn, away, tces, 8),
                Indirect(liobn, ioba, tces, 0),
                Indirect(liobn, ioba, tces, self.rng.choice((513, 1 << 32, U64_MAX))),
                Indirect(liobn, ioba, tces, 8, skew=self.rng.choice((1, 8, 2048))),
            )
        )

    # -- RTAS ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _pe(bridge: Bridge, slot: int = EDU_SLOT) -> tuple[int, int, int]:
        buid = phb_buid(bridge.index)
        return config_addr(0, slot << 3), buid >> 32, buid & U32_MAX

    def _ddw(self) -> Operation:
        bridge = self._bridge()
        pe = self._pe(bridge)
        free = len(bridge.windows) < 2
        kind = self.rng.random()
        if kind < 0.3:
            return Rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, pe, self.rng.choice((5, 6)))
        if kind < 0.75 and (free or self.rng.random() < 0.4):
            sizes = [shift for shift in PAGE_SHIFTS if bridge.options.pgsz >> shift & 1]
            shift = self.rng.choice(sizes)
            bits = self.rng.choice((0, 1, 4, 8, 10, 12, 14, 14, 18, 18, 20, 21))
            bits = MAX_ENTRIES.bit_length() - 1 if self.rng.random() < 0.01 else bits
            return Rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, (*pe, shift, shift + bits), 4)
        if kind < 0.92:
            slot = self.rng.choice([*bridge.windows, 1])
            return Rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, (pci_liobn(bridge.index, slot),), 1)
        return Rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, pe, 1)

    def _bad_ddw(self) -> Operation:
        pe = self._pe(self._bridge())
        lost = (pe[0], pe[1], pe[2] + 9)
        shift, bits = self.rng.choice(PAGE_SHIFTS), self.rng.randrange(12)
        query, create = RtasToken.IBM_QUERY_PE_DMA_WINDOW, RtasToken.IBM_CREATE_PE_DMA_WINDOW
        remove, reset = RtasToken.IBM_REMOVE_PE_DMA_WINDOW, RtasToken.IBM_RESET_PE_DMA_WINDOW
        some = self._cells(self.rng.choice(COUNTS))
        return self.rng.choice(
            (
                Rtas(query, lost, 5),
                Rtas(create, (*lost, shift, shift + bits), 4),
                Rtas(create, (*pe, self.rng.choice((0, 11, 13, 20, 34, 63, 64, U32_MAX)), 34), 4),
                Rtas(create, (*pe, shift, shift - 1), 4),
                Rtas(remove, (self.rng.choice((0, pci_liobn(7, 0), pci_liobn(0, 2), 0x71000000)),), 1),
                Rtas(reset, lost, 1),
                Rtas(query, pe, self.rng.choice((0, 1, 4, 7))),
                Rtas(create, (*pe, shift, shift + bits), self.rng.choice((0, 1, 3, 5))),
                Rtas(remove, (pci_liobn(0, 0),), self.rng.choice((0, 2))),
                Rtas(reset, pe, self.rng.choice((0, 2))),
                Rtas(query, (*pe, *some, 0), 5),
                Rtas(reset, pe[:2], 1),
            )
        )

    def _cells(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.choice((0, 1, 0x20, U32_MAX, self.rng.randrange(1 << 32))) for _ in range(count))

    def _config(self) -> Operation:
        """Configuration space: identity, what can be written without harm, and what is not there."""
        bridge = self._bridge()
        slot = self.rng.choice((EDU_SLOT, TESTDEV_SLOT))
        _, hi, lo = self._pe(bridge)
        size = self.rng.choice((1, 2, 4))
        offset = self.rng.randrange(0, 256, size)
        place = config_addr(0, slot << 3, offset)
        if self.rng.random() < 0.45:
            return Rtas(RtasToken.IBM_READ_PCI_CONFIG, (place, hi, lo, size), 2)
        if self.rng.random() < 0.6:
            scratch = self.rng.randrange(_BEHIND_CAPABILITIES, 256, 2)
            offset, value = self.rng.choice(
                (
                    (scratch, self.rng.randrange(1 << 16)),
                    (scratch, self.rng.randrange(1 << 16)),
                    (0x0D, self.rng.randrange(256)),
                    (0x0C, self.rng.randrange(256)),
                    (0x3C, self.rng.randrange(256)),
                    (0x06, self.rng.randrange(1 << 16)),
                    (0x14, U32_MAX),
                    (0x24, self.rng.randrange(1 << 32)),
                    (0x2C, U32_MAX),
                    (0x00, 0),
                    (0x30, U32_MAX),
                    (0x04, self.rng.randrange(1 << 16) | 0x6),
                )
            )
            wide = 4 if offset in (0x14, 0x24, 0x2C, 0x00, 0x30) else 2 if offset in (4, 6, scratch) else 1
            place = config_addr(0, slot << 3, offset)
            return Rtas(RtasToken.IBM_WRITE_PCI_CONFIG, (place, hi, lo, wide, value & (1 << wide * 8) - 1), 1)
        if self.rng.random() < 0.3:
            return Rtas(RtasToken.READ_PCI_CONFIG, (place, size), 2)
        bad_place = self.rng.choice(
            (
                config_addr(0, 9 << 3),
                config_addr(1, slot << 3),
                config_addr(0, slot << 3 | 1),
                config_addr(0, slot << 3, 0x101),
                config_addr(0, slot << 3, 0x100),
                config_addr(0, slot << 3, 0x202),
            )
        )
        read, write = RtasToken.IBM_READ_PCI_CONFIG, RtasToken.IBM_WRITE_PCI_CONFIG
        return self.rng.choice(
            (
                Rtas(read, (bad_place, hi, lo, 1), 2),
                Rtas(read, (place, hi, lo, self.rng.choice((0, 3, 5, 8))), 2),
                Rtas(read, (place, hi, lo + 9, size), 2),
                Rtas(read, (place | 1, hi, lo, 4), 2),
                Rtas(read, (place, hi, lo, size), self.rng.choice((0, 1, 3))),
                Rtas(read, (place, hi, lo), 2),
                Rtas(write, (bad_place, hi, lo, 1, 0), 1),
                Rtas(write, (place, hi, lo, 3, 0), 1),
                Rtas(write, (place, hi, lo, 4), 1),
            )
        )

    def _other_rtas(self) -> Operation:
        pe = self._pe(self._bridge())
        unit = self.rng.choice((0x71000005, 0x71000000, pci_liobn(0, 0), 0, U32_MAX, *self.variant.vio * 3))
        return self.rng.choice(
            (
                Rtas(RtasToken.SET_TCE_BYPASS, (unit, self.rng.randrange(2)), 1),
                Rtas(RtasToken.SET_TCE_BYPASS, (unit,), 1),
                Rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, pe, 5, above=self.rng.randrange(16)),
                Rtas(self.rng.choice(EEH_TOKENS), (*pe, *self._cells(self.rng.randrange(6))), self.rng.choice(COUNTS)),
                Rtas(self.rng.choice(UNKNOWN_TOKENS), self._cells(self.rng.randrange(6)), self.rng.randrange(1, 5)),
                Rtas(RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER, (*pe, self.rng.randrange(2)), 3),
            )
        )

    def _messages(self) -> Operation:
        """Asking for message interrupts, and for their numbers."""
        bridge = self._bridge()
        pe = self._pe(bridge, self.rng.choice((EDU_SLOT, EDU_SLOT, EDU_SLOT, TESTDEV_SLOT, 9)))
        change, query = RtasToken.IBM_CHANGE_MSI, RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER
        odd = self.rng.random() < 0.3
        nargs = self.rng.randrange(10) if odd else None
        if self.rng.random() < 0.5:
            nret = self.rng.choice(COUNTS) if odd else 3
            return Rtas(query, (*pe, self.rng.choice((0, 0, 0, 1))), nret, nargs=nargs)
        function, requested = self.rng.choice((1, 3, 3, 3, 2, 4)), self.rng.choice((0, 1, 1, 1, 2))
        nret = self.rng.choice(COUNTS if odd else (3, 4))
        return Rtas(change, (*pe, function, requested, self.rng.randrange(4)), nret, nargs=nargs)

    def _bypass(self) -> Operation:
        return Rtas(RtasToken.SET_TCE_BYPASS, (self.rng.choice(self.variant.vio), self.rng.randrange(2)), 1)

    def _qtest_rtas(self) -> Operation:
        made = self._ddw() if self.rng.random() < 0.6 else self._bad_ddw()
        assert isinstance(made, Rtas), "DDW calls are RTAS calls"
        below = self.rng.randrange(1, 24) if self.rng.random() < 0.2 else 0
        return QtestRtas(_NAMES[made.token], made.args, made.nret, below)

    def _switched(self) -> Operation:
        bridge = self._bridge()
        return Switched(bridge.index, self.rng.choice((0x0, 0x2, 0x4, 0x402)), self._iova(bridge, 128))

    # -- devices and RAM -----------------------------------------------------------------------------------------

    def _iova(self, bridge: Bridge, length: int) -> int:
        """Where a DMA mostly finds something."""
        chance = self.rng.random()
        windows = list(bridge.windows.values())
        mapped = [(window, index) for window in windows for index in window.tces if window.tces[index] & 3]
        if mapped and chance < 0.85:
            window, index = self.rng.choice(mapped)
            size = 1 << window.shift
            inside = self.rng.randrange(max(size - length, 1)) if self.rng.random() < 0.8 else size - length // 2 - 1
            return window.bus + (index << window.shift) + inside & U64_MAX
        if windows and chance < 0.95:
            window = self.rng.choice(windows)
            return window.bus + self.rng.randrange(window.entries << window.shift) & U64_MAX
        return self.rng.choice((1 << 50, 1 << 60, 0x7FFF_F000, MSI_WINDOW - 0x10000, PCI_BASE))

    def _edu(self) -> Operation:
        bridge = self._bridge()
        length = self.rng.choice((1, 4, 8, 64, 100, 1514, 4095, 4096, self.rng.randrange(1, 4097)))
        offset = self.rng.randrange(edu.BUFFER_SIZE - length + 1)
        if self.rng.random() < 0.02:  # out of the buffer
            offset = self.rng.choice((edu.BUFFER_SIZE - length + 1, edu.BUFFER_SIZE, edu.BUFFER_SIZE + 1, 1 << 40))
        to_ram, interrupt = self.rng.random() < 0.6, self.rng.random() < 0.1
        return Edu(bridge.index, to_ram, self._iova(bridge, length), length, offset, interrupt)

    def _testdev(self) -> Operation:
        bridge = self._bridge()
        length = self.rng.choice((4, 4, 4, 64, 64, 4096, 0x1234, 7, 7, 0 if self.rng.random() < 0.2 else 4))
        attributes = self.rng.randrange(16) if self.rng.random() < 0.1 else 0
        armed = self.rng.random() < 0.97
        iova = self._iova(bridge, length)
        found = bridge.tce(iova)
        gpa = found[1] if found is not None and self.rng.random() < 0.9 else PAGES[12][0]
        return DeviceTest(bridge.index, iova, length, gpa, attributes, armed)

    def _register(self) -> Operation:
        bridge = self._bridge()
        if self.rng.random() < 0.25:
            size = self.rng.choice((4, 4, 4, 1, 2, 8))
            offset = self.rng.choice([*list(testdev.BY_OFFSET)[1:], 0x24, 0x80, 0xFF8])
            return Register(bridge.index, "testdev", max(offset & -size, 8), size)
        if self.rng.random() < 0.1:
            size = self.rng.choice((1, 2, 8))
            return Register(bridge.index, "edu", self.rng.randrange(0, 0xC0, size), size)
        offset = self.rng.choice((*edu.BY_OFFSET, 0x0C, 0x28, 0x7C, 0xA0, 0xFFFF8))
        size = 8 if offset >= edu.WIDE_FROM and self.rng.random() < 0.6 else 4
        writable = (
            *(edu.INVERSION, edu.FACTORIAL, edu.DMA_SRC, edu.DMA_DST, edu.DMA_COUNT, edu.IDENTIFICATION),
            *(edu.IRQ_RAISE, edu.IRQ_ACK, edu.STATUS),
        )
        if offset in writable and self.rng.random() < 0.5:
            value = self.rng.randrange(20) if offset == edu.FACTORIAL else self.rng.randrange(1 << size * 8)
            return Register(bridge.index, "edu", offset, size, value)
        return Register(bridge.index, "edu", offset, size)

    def _fill(self) -> Operation:
        page = self.rng.choice(PAGES[self.rng.choice(PAGE_SHIFTS)])
        data = self.rng.randbytes(self.rng.choice((1, 8, 16)))
        gpa = page + self.rng.randrange(0, 4096)
        return Fill(gpa, data, self.rng.choice((1, 16, 256)))
