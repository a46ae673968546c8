"""What of a VT-d unit migrates, and what the target makes of it."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.unit_rig import SCALABLE, STATUS, TABLE, Rig
from vfio_model.errors import VMStateError
from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import Fault
from vfio_model.iommu.vtd.vmstate import INTEL_IOMMU, check, export_unit, import_unit
from vfio_model.vmstate.fields import State, decode, encode


def moved(source: Rig, target: Rig) -> State:
    """Over the wire."""
    data = encode(INTEL_IOMMU, export_unit(source.unit))
    state = decode(INTEL_IOMMU, INTEL_IOMMU.version, data, export_unit(target.unit), where="iommu-intel")
    check(target.unit, state, where="iommu-intel")
    assert import_unit(target.unit, state) is None
    return state


def busy() -> Rig:
    """Something everywhere."""
    rig = Rig(SCALABLE)
    rig.start_queue(wide=True)
    rig.put(regs.RTADDR, 0x10_0400, 8)
    rig.put(regs.IRTA, TABLE | 3, 8)
    rig.put(regs.GCMD, regs.GCMD_TE | regs.GCMD_SRTP | regs.GCMD_QIE | regs.GCMD_SIRTP | regs.GCMD_IRE)
    rig.unit.faults.report(Fault(5, 0x18, 0x1000, True))
    rig.submit((0x12,), (0x2_0000_0025, STATUS))
    rig.put(regs.PQA, TABLE, 8)
    return rig


def test_the_target_is_as_the_source() -> None:
    source, target = busy(), Rig(SCALABLE)
    moved(source, target)
    assert export_unit(target.unit) == export_unit(source.unit)
    assert [source.get(offset) for offset in range(0, regs.SIZE, 4)] == [
        target.get(offset) for offset in range(0, regs.SIZE, 4)
    ]
    assert target.unit.queue.wide
    assert target.translator.take() == [("reset",), ("root", 0x10_0000, True), ("enabled", True)]


def test_the_target_goes_on() -> None:
    source, target = busy(), Rig(SCALABLE)
    moved(source, target)
    target.tail = source.tail
    target.submit((0x12,), (0x7_0000_0025, STATUS))
    assert (target.head, target.load(STATUS, 4)) == (4, 7)


def test_a_queue_that_rests_on_a_wait_goes_on_in_the_target() -> None:
    options = VtdOptions(invalidation="async")
    source, target = Rig(options), Rig(options)
    source.start_queue()
    source.submit((0x12,), (0x2_0000_0025, STATUS))
    target.start_queue()
    target.fill(1, 0x2_0000_0025, STATUS)
    said: list[int] = []
    target.unit.queue.on_pending = lambda: said.append(1)
    moved(source, target)
    assert said == [1]
    target.unit.queue.step()
    assert (target.head, target.load(STATUS, 4)) == (2, 2)


def test_an_idle_unit_translates_nothing() -> None:
    source, target = Rig(), busy_legacy()
    moved(source, target)
    assert target.translator.take()[-1] == ("reset",)
    assert target.get(regs.GSTS) == 0


def busy_legacy() -> Rig:
    rig = Rig()
    rig.put(regs.GCMD, regs.GCMD_TE)
    return rig


def test_other_capabilities_are_refused() -> None:
    state = export_unit(Rig(VtdOptions(aw_bits=39)).unit)
    with pytest.raises(VMStateError, match="CAP"):
        check(Rig().unit, state, where="iommu-intel")


@pytest.mark.parametrize("change", [{"iq_head": 256}, {"next_frcd_reg": 1}])
def test_what_cannot_be_is_refused(change: State) -> None:
    rig = Rig()
    rig.start_queue()
    with pytest.raises(VMStateError):
        check(rig.unit, export_unit(rig.unit) | change, where="iommu-intel")
