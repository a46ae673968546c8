"""What a driver of VT-d sees, step by step: the same recipes on stock QEMU and on ``guestd-system-x86_64``.

The modes and granularities are those of QEMU's own tests of its ``intel-iommu``. Where QEMU differs from the Intel
Virtualization Technology for Directed I/O specification, guestd follows the specification, unless ``quirks=qemu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from tests.interop.pc import PcQemu
from tests.interop.vtd.campaign import guestd_binary
from tests.interop.vtd.operations import Operation, bring_up, device_test, edu_dma
from tests.interop.vtd.places import EDU_SLOT, OUTSIDE, TESTDEV_SLOT, UNIT

ROOT, CONTEXT, DIRECTORY, PASIDS, QUEUE, STATUS = 0x10_0000, 0x10_1000, 0x10_4000, 0x10_5000, 0x10_6000, 0x11_0000
L4, L3, L2, L1 = 0x20_0000, 0x20_1000, 0x20_2000, 0x20_3000
DATA, OTHER = 0x100_0000, 0x100_1000
IOVA: Final = 0x5000
EDU, TESTDEV = EDU_SLOT << 3, TESTDEV_SLOT << 3
DID: Final = 5
TE, SRTP, QIE = 1 << 31, 1 << 30, 1 << 26
WRITE_FAULT = 0x8000_0005_0000_0000
FIRST_STAGE: Final = 7
"""Present, writable, user."""


class Driver:
    """As much of a driver as the recipes need: everything is in the tables above, by hand."""

    def __init__(self, pc: PcQemu) -> None:
        self.pc = pc
        self.run(bring_up())
        pc.qtest.ask(f"memset {ROOT:#x} 0x200000 0x0")

    def run(self, operation: Operation) -> list[int]:
        """What its commands answer."""
        return [int(said, 0) if said else 0 for said in map(self.pc.qtest.ask, operation.commands)]

    def reg(self, offset: int, size: int = 4) -> int:
        """A register."""
        return self.pc.load(UNIT + offset, size)

    def set(self, offset: int, value: int, size: int = 4) -> None:
        """A register."""
        self.pc.store(UNIT + offset, size, value)

    def put(self, gpa: int, *words: int) -> None:
        """Entries."""
        for n, word in enumerate(words):
            self.pc.store(gpa + 8 * n, 8, word)

    def table(self, *, flags: int = 3) -> None:
        """Four levels for low addresses, no leaf."""
        for at, below in ((L4, L3), (L3, L2), (L2, L1)):
            self.put(at, below | flags)

    def leaf(self, value: int, iova: int = IOVA) -> None:
        """A leaf of 4 KiB."""
        self.put(L1 + (iova >> 12) * 8, value)

    def legacy(self, *, tt: int = 0, levels: int = 4, table: int = L4) -> None:
        """Both devices in one domain."""
        self.put(ROOT, CONTEXT | 1, 0)
        for devfn in (EDU, TESTDEV):
            self.put(CONTEXT + devfn * 16, table | 1 | tt << 2, DID << 8 | levels - 2)

    def scalable(self, *, pgtt: int, flags: int = 0) -> None:
        """Both devices have the entry of PASID 0 for requests without one."""
        self.put(ROOT, CONTEXT | 1, (CONTEXT + 0x1000) | 1)
        for devfn in (EDU, TESTDEV):
            self.put(CONTEXT + devfn * 32, DIRECTORY | 1, 0, 0, 0)
        self.put(DIRECTORY, PASIDS | 1)
        first, second = (L4, 0) if pgtt == 1 else (0, L4)
        self.put(PASIDS, second | pgtt << 6 | 2 << 2 | 1, DID, first | flags)

    def enable(self, *, scalable: bool = False) -> None:
        """Set the root table, forget everything, translate."""
        self.set(0x20, ROOT | scalable << 10, 8)
        self.set(0x18, SRTP)
        assert self.reg(0x1C) & SRTP
        self.forget()
        self.set(0x18, TE)
        assert self.reg(0x1C) & TE

    def forget(self) -> None:
        """Contexts and translations, by registers."""
        self.set(0x28, 1 << 63 | 1 << 61, 8)
        self.set(0xF8, 1 << 63 | 1 << 60, 8)

    def forget_page(self, iova: int = IOVA, did: int = DID) -> None:
        """One page, by registers."""
        self.set(0xF0, iova, 8)
        self.set(0xF8, 1 << 63 | 3 << 60 | did << 32, 8)

    def queue(self, *, wide: bool = False) -> None:
        """Of 128-bit descriptors, or of ``wide`` ones with 256 bits."""
        self.set(0x88, 0)
        self.set(0x90, QUEUE | wide << 11, 8)
        self.set(0x18, TE | QIE)
        assert self.reg(0x1C) & QIE
        self.tail, self.wide = 0, wide

    def push(self, *descriptors: tuple[int, int]) -> None:
        """At the tail."""
        for low, high in descriptors:
            self.put(QUEUE + (self.tail << 4 + self.wide), low, high, *(0, 0) * self.wide)
            self.tail += 1
        self.set(0x88, self.tail << 4 + self.wide)

    def write(self, iova: int = IOVA, length: int = 64) -> bool:
        """edu fills ``iova``: whether it got there without a fault. The fault stays."""
        self.run(edu_dma(iova, length, to_ram=True))
        return not self.fault

    def read(self, iova: int = IOVA, length: int = 64) -> bool:
        """edu reads."""
        self.run(edu_dma(iova, length, to_ram=False))
        return not self.fault

    def check(self, gpa: int, iova: int = IOVA) -> int:
        """The result of iommu-testdev."""
        return self.run(device_test(iova, gpa, 8))[-1]

    @property
    def fault(self) -> int:
        """The upper half of the fault record, 0 without one."""
        record = self.reg(0x228, 8)
        return record if record >> 63 else 0

    def clear_fault(self) -> int:
        """The fault record; it is free again."""
        record, low = self.reg(0x228, 8), self.reg(0x220, 8)
        self.set(0x228, 1 << 63, 8)
        self.set(0x34, 0x11)
        assert not self.reg(0x34) & 3
        return record | low >> 12 << 64


@contextmanager
def machine(kind: str, properties: str = "") -> Iterator[Driver]:
    """QEMU, guestd, or guestd with QEMU's quirks."""
    unit = "intel-iommu" + (f",{properties}" if properties else "") + (",quirks=qemu" if kind == "quirks" else "")
    devices = ["-device", unit, "-device", f"edu,addr={EDU_SLOT:02x}.0,dma_mask={(1 << 64) - 1:#x}"]
    devices += ["-device", f"iommu-testdev,addr={TESTDEV_SLOT:02x}.0"]
    with PcQemu(devices, binary=None if kind == "qemu" else guestd_binary()) as pc:
        yield Driver(pc)


@pytest.fixture(params=("qemu", "guestd", "quirks"))
def kind(request: pytest.FixtureRequest) -> str:
    """Which machine."""
    return str(request.param)


def test_the_registers_at_reset(kind: str) -> None:
    with machine(kind) as one:
        assert one.reg(0x00) == 0x10
        assert (one.reg(0x08, 8), one.reg(0x10, 8)) == (0x80D2_008C_222F_0606, 0xF0_0F4A)
        assert (one.reg(0x38), one.reg(0xA0), one.reg(0x34), one.reg(0x1C)) == (1 << 31, 1 << 31, 0, 0)


def test_a_reset_restores_every_register(kind: str) -> None:
    with machine(kind, "scalable-mode=on,fsts=on") as one:
        assert one.reg(0x08, 8) >> 8 & 0x1F == 6
        assert one.reg(0x08, 8) >> 16 & 0x3F == 47
        assert one.reg(0x10, 8) >> 43 & 1 and one.reg(0x10, 8) >> 47 & 1
        before = [one.reg(offset) for offset in range(0, 0x230, 4)]
        one.scalable(pgtt=4)
        one.enable(scalable=True)
        one.queue()
        one.pc.qmp.ask("system_reset", until="RESET")
        assert [one.reg(offset) for offset in range(0, 0x230, 4)] == before


# -- modes -----------------------------------------------------------------------------------------------------------


def test_without_translation_addresses_are_the_machines(kind: str) -> None:
    with machine(kind) as one:
        assert one.check(DATA, DATA) == 0


@pytest.mark.parametrize("levels", [3, 4])
def test_legacy_second_stage(kind: str, levels: int) -> None:
    with machine(kind) as one:
        one.table()
        one.leaf(DATA | 3)
        one.legacy(levels=levels, table=L4 if levels == 4 else L3)
        one.enable()
        assert one.check(DATA) == 0
        assert one.check(DATA, IOVA + 0x1000) == 0xDEAD_0002
        assert one.clear_fault() & ~0xFFFF == (WRITE_FAULT | 6 << 64) & ~0xFFFF


def test_legacy_pass_through(kind: str) -> None:
    with machine(kind) as one:
        one.legacy(tt=2)
        one.enable()
        assert one.check(OTHER, OTHER) == 0
        assert not one.fault


def test_scalable_second_stage(kind: str) -> None:
    with machine(kind, "scalable-mode=on") as one:
        one.table()
        one.leaf(DATA | 3)
        one.scalable(pgtt=2)
        one.enable(scalable=True)
        assert one.check(DATA) == 0


def test_scalable_first_stage_sets_accessed_and_dirty(kind: str) -> None:
    with machine(kind, "scalable-mode=on,fsts=on") as one:
        one.table(flags=FIRST_STAGE)
        one.leaf(DATA | FIRST_STAGE)
        one.scalable(pgtt=1)
        one.enable(scalable=True)
        assert one.check(DATA) == 0
        assert one.pc.load(L1 + 5 * 8, 8) == DATA | FIRST_STAGE | 0x60
        assert one.pc.load(L4, 8) & 0x60 == 0x20


@pytest.mark.parametrize("properties", ["scalable-mode=on", "scalable-mode=on,fsts=on"])
def test_scalable_pass_through(kind: str, properties: str) -> None:
    with machine(kind, properties) as one:
        one.scalable(pgtt=4)
        one.enable(scalable=True)
        assert one.check(OTHER, OTHER) == 0


@pytest.mark.parametrize(("at", "leaf"), [(L2 + 8, 0x200_0000 | 0x83), (L3 + 16, 0x83)])
def test_large_pages(kind: str, at: int, leaf: int) -> None:
    iova, gpa = (0x20_0000 + 0x4000, 0x200_4000) if at == L2 + 8 else (0x8000_0000 + DATA, DATA)
    with machine(kind) as one:
        one.table()
        one.put(at, leaf)
        one.legacy()
        one.enable()
        assert one.check(gpa, iova) == 0


# -- invalidation ----------------------------------------------------------------------------------------------------


def _stale(one: Driver) -> None:
    """A page that is cached, and not in its table any more."""
    one.table()
    one.leaf(DATA | 3)
    one.legacy()
    one.enable()
    assert one.check(DATA) == 0
    one.leaf(OTHER | 3)
    assert one.check(DATA) == 0


@pytest.mark.parametrize(
    ("granularity", "answer"),
    [(1, 0x1200_0000), (2, 0x2400_0000 | DID), (3, 0x3600_0000 | DID)],
)
def test_registers_invalidate_by_every_granularity(kind: str, granularity: int, answer: int) -> None:
    with machine(kind) as one:
        _stale(one)
        one.set(0xF0, IOVA, 8)
        one.set(0xF8, 1 << 63 | granularity << 60 | (DID if granularity > 1 else 0) << 32, 8)
        assert one.reg(0xF8, 8) >> 32 == answer
        assert one.check(OTHER) == 0


@pytest.mark.parametrize(
    "command", [1 << 63 | 3 << 60 | 6 << 32, 1 << 63 | 2 << 60 | 6 << 32, 1 << 63 | 3 << 60 | DID << 32]
)
def test_another_domain_or_page_keeps_what_is_cached(kind: str, command: int) -> None:
    with machine(kind) as one:
        _stale(one)
        one.set(0xF0, IOVA + 0x1000, 8)
        one.set(0xF8, command, 8)
        assert one.check(DATA) == 0


@pytest.mark.parametrize(
    "descriptor", [(0x12, 0), (DID << 16 | 0x22, 0), (DID << 16 | 0x32, IOVA), (DID << 16 | 0x32, 9)]
)
def test_the_queue_invalidates_by_every_granularity(kind: str, descriptor: tuple[int, int]) -> None:
    with machine(kind) as one:
        _stale(one)
        one.queue()
        one.push(descriptor, (2 << 32 | 0x25, STATUS))
        assert (one.reg(0x80), one.pc.load(STATUS, 4)) == (0x20, 2)
        assert one.check(OTHER) == 0


@pytest.mark.parametrize(
    ("descriptor", "forgotten"),
    [
        ((DID << 16 | 0x26, 0), True),
        ((DID << 16 | 0x36, IOVA), True),
        ((DID << 16 | 0x36, IOVA | 2), True),
        ((DID << 16 | 0x36, IOVA + 0x1000), False),
        ((DID << 16 | 1 << 32 | 0x26, 0), False),
        ((DID + 1 << 16 | 0x26, 0), False),
        ((DID << 16 | 0x32, IOVA + 0x1000), True),
        ((0x37, 0), False),
        ((DID << 16 | 0x07, 0), False),
        ((DID << 16 | 0x17, 0), False),
    ],
)
def test_first_stage_translations_are_invalidated_by_pasid(
    kind: str, descriptor: tuple[int, int], forgotten: bool
) -> None:
    with machine(kind, "scalable-mode=on,fsts=on") as one:
        one.table(flags=FIRST_STAGE)
        one.leaf(DATA | FIRST_STAGE)
        one.scalable(pgtt=1)
        one.enable(scalable=True)
        assert one.check(DATA) == 0
        one.leaf(OTHER | FIRST_STAGE)
        one.queue(wide=True)
        one.push(descriptor, (2 << 32 | 0x25, STATUS))
        assert (one.reg(0x80), one.reg(0x34), one.pc.load(STATUS, 4)) == (0x40, 0, 2)
        assert one.check(OTHER if forgotten else DATA) == 0


def test_an_unknown_descriptor_stops_the_queue(kind: str) -> None:
    with machine(kind) as one:
        one.queue()
        one.push((0x12, 0), (0xD, 0), (2 << 32 | 0x25, STATUS))
        assert (one.reg(0x34), one.reg(0x80), one.pc.load(STATUS, 4)) == (0x10, 0x10, 0)
        one.put(QUEUE + 16, 1 << 32 | 0x25, STATUS + 8)
        one.set(0x34, 0x10)
        one.set(0x88, 0x30)
        assert (one.reg(0x34), one.reg(0x80)) == (0, 0x30)
        assert (one.pc.load(STATUS, 4), one.pc.load(STATUS + 8, 4)) == (2, 1)


def test_registers_do_not_invalidate_while_the_queue_is_on(kind: str) -> None:
    with machine(kind) as one:
        _stale(one)
        one.queue()
        one.set(0xF8, 1 << 63 | 1 << 60, 8)
        assert one.reg(0xF8, 8) >> 63 == 1
        assert one.check(DATA) == 0


def test_a_context_is_cached_until_it_is_invalidated(kind: str) -> None:
    with machine(kind) as one:
        _stale(one)
        one.put(CONTEXT + TESTDEV * 16, 0, 0)
        one.forget_page()
        assert one.check(OTHER) == 0
        one.forget()
        assert one.check(OTHER) == 0xDEAD_0002
        assert one.clear_fault() & (1 << 64) - 1 == 0x8000_0002_0000_0000 | TESTDEV


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("root absent", 1), ("root reserved", 0xA), ("context absent", 2), ("bad width", 3), ("table outside RAM", 3),
        ("beyond the width", 4), ("write", 5), ("read", 6), ("reserved bit of a leaf", 0xC), ("no table below", 7),
    ],
)  # fmt: skip
def test_the_reasons_of_faults(kind: str, name: str, reason: int) -> None:
    with machine(kind) as one:
        one.table()
        one.leaf(DATA | 3)
        one.legacy()
        iova, write = IOVA, True
        match name:
            case "root absent":
                one.put(ROOT, 0)
            case "root reserved":
                one.put(ROOT, CONTEXT | 3)
            case "context absent":
                one.put(CONTEXT + EDU * 16, 0, 0)
            case "bad width":
                one.put(CONTEXT + EDU * 16 + 8, DID << 8 | 4)
            case "table outside RAM":
                one.put(CONTEXT + EDU * 16, OUTSIDE | 1)
            case "beyond the width":
                iova = 1 << 48 | IOVA
            case "write":
                one.leaf(DATA | 1)
            case "read":
                one.leaf(DATA | 2)
                write = False
            case "reserved bit of a leaf":
                one.leaf(DATA | 3 | 1 << 51)
            case "no table below":
                one.put(L2, OUTSIDE | 3)
        one.enable()
        assert not (one.write(iova) if write else one.read(iova))
        assert one.reg(0x34) == 2
        assert one.clear_fault() == (reason << 32 | EDU | 1 << 63 | (0 if write else 1 << 62) | iova >> 12 << 64)


def test_a_second_fault_collapses_and_one_of_another_function_overflows(kind: str) -> None:
    with machine(kind) as one:
        one.table()
        one.legacy()
        one.enable()
        one.write()
        one.write(IOVA + 0x1000)
        assert one.reg(0x34) == 2
        one.check(DATA)
        assert one.reg(0x34) == 3
        assert one.reg(0x220, 8) == IOVA


def test_a_masked_fault_event_stays_pending(kind: str) -> None:
    with machine(kind) as one:
        one.table()
        one.legacy()
        one.enable()
        one.write()
        assert one.reg(0x38) == 3 << 30
        one.clear_fault()
        assert one.reg(0x38) == 1 << 31


def test_a_denied_read_delivers_zeroes(kind: str) -> None:
    with machine(kind) as one:
        one.table()
        one.leaf(DATA | 3)
        one.legacy()
        one.pc.write(DATA, bytes(range(64)))
        one.enable()
        assert one.read()
        assert not one.read(IOVA + 0x1000)
        one.clear_fault()
        assert one.write()
        assert one.pc.read(DATA, 64) == bytes(64)


# -- where QEMU differs from the specification -------------------------------------------------------------------------


def test_a_cached_entry_that_forbids_is_a_fault_by_the_specification(kind: str) -> None:
    with machine(kind) as one:
        one.table()
        one.leaf(DATA | 1)
        one.legacy()
        one.enable()
        assert one.read()
        allowed = one.write()
        assert one.pc.read(DATA, 64) == bytes(64)
        assert allowed == (kind != "guestd")


def test_a_new_context_has_its_own_translations_by_the_specification(kind: str) -> None:
    """The domain changes, the context cache is invalidated, the IOTLB is not: its entries are of the old domain."""
    with machine(kind) as one:
        one.table()
        one.leaf(DATA | 3)
        one.legacy()
        one.enable()
        assert one.check(DATA) == 0
        second = 0x20_8000
        for at, below in ((second, second + 0x1000), (second + 0x1000, second + 0x2000)):
            one.put(at, below | 3)
        one.put(second + 0x2000, (second + 0x3000) | 3)
        one.put(second + 0x3000 + 5 * 8, OTHER | 3)
        one.put(CONTEXT + TESTDEV * 16, second | 1, (DID + 1) << 8 | 2)
        one.set(0x28, 1 << 63 | 1 << 61, 8)
        assert one.check(OTHER if kind == "guestd" else DATA) == 0
