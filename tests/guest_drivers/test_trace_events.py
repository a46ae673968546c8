"""QEMU's trace lines: every form that is understood, and what becomes of the others."""

from __future__ import annotations

import pytest

from vfio_model.guest_drivers.trace_events import (
    DdwCreate,
    DdwQuery,
    DdwRemove,
    DdwReset,
    GetTce,
    Malformed,
    NewTable,
    PassedOver,
    PutTce,
    PutTceIndirect,
    StuffTce,
    Xlate,
    parse_line,
)

LINES = {
    "spapr_iommu_new_table liobn=0x80000000 table=0x0 fd=-1": NewTable(0x8000_0000, -1),
    "spapr_iommu_new_table liobn=0x80000000 table=0x7f00deadb000 fd=23": NewTable(0x8000_0000, 23),
    "spapr_iommu_pci_put liobn=0x80000000 ioba=0x1000 tce=0x3e373003 ret=0": PutTce(
        0x8000_0000, 0x1000, 0x3E37_3003, 0
    ),
    "spapr_iommu_put liobn=0x71000003 ioba=0x1000 tce=0x0 ret=-4": PutTce(0x7100_0003, 0x1000, 0, -4),
    "spapr_iommu_pci_get liobn=0x80000000 ioba=0x1000 ret=0 tce=0x3e373003": GetTce(
        0x8000_0000, 0x1000, 0, 0x3E37_3003
    ),
    "spapr_iommu_pci_stuff liobn=0x80000000 ioba=0x200000 tcevalue=0x0 npages=512 ret=0": StuffTce(
        0x8000_0000, 0x20_0000, 0, 512, 0
    ),
    "spapr_iommu_pci_indirect liobn=0x80000001 ioba=0x800000000000000 tcelist=0x4488000 iobaN=0x3f tceN=0x3f000003 "
    "ret=0": PutTceIndirect(0x8000_0001, 1 << 59, 0x448_8000, 0x3F, 0x3F00_0003, 0),
    "spapr_iommu_xlate liobn=0x80000001 0x4496000 -> 0x4000000 perm=3 mask=0xffffff": Xlate(
        0x8000_0001, 0x449_6000, 0x400_0000, 3, 0xFF_FFFF
    ),
    "spapr_iommu_xlate liobn=0x80000001 0x4496000 -> 0x4000000 perm=3 mask=ffffff": Xlate(
        0x8000_0001, 0x449_6000, 0x400_0000, 3, 0xFF_FFFF
    ),
    "spapr_iommu_ddw_query buid=0x800000020000000 addr=0x800, 1 windows available, max window size=0x80000000, "
    "mask=0x107": DdwQuery(0, 0x0800_0000_2000_0000, 0x800, 1, 0x8000_0000, 0x107),
    "spapr_iommu_ddw_create buid=0x800000020000000 addr=0x800, page size=0x1000000, requested=0x40000000, "
    "start addr=0x800000000000000, liobn=0x80000001": DdwCreate(
        0x8000_0001, 0x0800_0000_2000_0000, 0x800, 1 << 24, 1 << 30, 1 << 59
    ),
    "spapr_iommu_ddw_remove liobn=0x80000000": DdwRemove(0x8000_0000),
    "spapr_iommu_ddw_reset buid=0x800000020000000 addr=0x0": DdwReset(0, 0x0800_0000_2000_0000, 0),
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_every_event_is_read_with_and_without_a_prefix(line: str) -> None:
    assert parse_line(line) == LINES[line]
    assert parse_line(f"12345@1700000000.123456:{line}\r\n") == LINES[line]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_a_line_cut_anywhere_is_never_taken_for_another_event(line: str) -> None:
    name = line.split()[0]
    whole = line.rindex(" ") if "=" in line else len(line)
    for length in range(len(name), whole):
        parsed = parse_line(line[:length])
        assert isinstance(parsed, Malformed | DdwReset), line[:length]


@pytest.mark.parametrize(
    "line", ["spapr_pci_msi Releasing wrong config (cfg=0x800)", "vfio_get_device", "4@5.6:nvme_irq_pin pulsing"]
)
def test_other_events_are_passed_over(line: str) -> None:
    assert isinstance(parse_line(line), PassedOver)


@pytest.mark.parametrize(
    "line",
    [
        "[    0.000000] Linux version",
        "spapr_iommu_pci_put liobn=0x80000000 ioba=0x1000",
        "spapr_iommu_pci_put liobn=0x80000000 ioba=0x1000 tce=0xg ret=0",
        f"spapr_iommu_pci_put liobn=0x80000000 ioba=0x{'f' * 17} tce=0x0 ret=0",
        "spapr_iommu_xlate liobn=0x80000000 0x4000 -> 0x3e370000 perm=3 mask=0xfff trailing",
    ],
)
def test_damaged_lines_are_malformed(line: str) -> None:
    assert isinstance(parse_line(line), Malformed)


def test_empty_lines_say_nothing() -> None:
    assert parse_line("") is parse_line(" \r\n") is None
