"""Accesses that span a page which is blocked."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.rig import Rig
from vfio_model.memory.types import MemTxResult


def rig_with_a_hole(*quirks: str) -> Rig:
    """0x4000 is at 0x8000, 0x5000 nowhere, 0x6000 at 0x2000."""
    rig = Rig(quirks=frozenset(quirks))
    table = rig.legacy()
    rig.tables_for(table, 4, 0x4000, 0x8003)
    rig.tables_for(table, 4, 0x6000, 0x2003)
    rig.enable()
    return rig


@pytest.mark.parametrize(("quirks", "moved"), [((), bytes(8)), (("goes-on-after-fault",), b"behind..")])
def test_what_is_behind_a_blocked_page_moves_by_quirk(quirks: tuple[str, ...], moved: bytes) -> None:
    rig = rig_with_a_hole(*quirks)
    space = rig.space().address_space
    assert space.write(0x4FF8, b"before.." + bytes(0x1000) + b"behind..") is MemTxResult.DECODE_ERROR
    assert rig.low[0x8FF8:0x9000] == b"before.." and rig.low[0x2000:0x2008] == moved
    assert [fault[0] for fault in rig.faults.take()] == [5]
    rig.low[0x2000:0x2008] = b"behind.."
    out = bytearray(b"?" * 0x1010)
    assert space.read(0x4FF8, out) is MemTxResult.DECODE_ERROR
    assert out == b"before.." + bytes(0x1000) + moved
    assert [fault[0] for fault in rig.faults.take()] == [6]


@pytest.mark.parametrize(("quirks", "faults"), [((), [0x5000]), (("goes-on-after-fault",), [0x5000, 0x7000])])
def test_each_blocked_page_has_its_fault_by_quirk(quirks: tuple[str, ...], faults: list[int]) -> None:
    rig = rig_with_a_hole(*quirks)
    assert rig.space().address_space.read(0x5800, bytearray(0x2000)) is MemTxResult.DECODE_ERROR
    assert [fault[2] & ~0xFFF for fault in rig.faults.take()] == faults
