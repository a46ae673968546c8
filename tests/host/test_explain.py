"""``explain`` names the entry at which a DMA fails."""

from __future__ import annotations

from tests.host.rig import MIB, Rig
from vfio_model.host.explain import Step


def last(rig: Rig, iova: int, is_write: bool | None = None) -> Step:
    steps = rig.host.explain(rig.device, iova, is_write)
    assert all(step.verdict == "ok" for step in steps[:-1]), "only the last step fails"
    assert [step.verdict for step in rig.impl().explain(iova, is_write)] == [step.verdict for step in steps]
    return steps[-1]


def test_every_way_to_fail() -> None:
    rig = Rig()
    rig.map(0x1000, 0x5000, flags=1)
    good = last(rig, 0x1234)
    assert (good.verdict, good.meaning) == ("ok", "segment guest.ram0 + 0x5234")
    refused = last(rig, 0x1234, True)
    assert (refused.what, refused.verdict) == ("permission", "fault")
    assert "gives read" in refused.meaning
    missing = last(rig, 0x2000)
    assert (missing.what, missing.value, missing.verdict) == ("TCE 0x2", 0, "fault")
    table = rig.domain()[rig.device.pe.words[10] // 8 + 5]
    assert missing.where == f"domain+{table + 16:#x}"
    assert last(rig, 64 * MIB).what == "windows"
    rig.port.run(rig.host.freeze(rig.host.groups[26]))
    assert last(rig, 0x1234).what == "PE state"
    rig.host.unfreeze(rig.host.groups[26])
    rig.port.run(rig.host.set_bus_master(rig.device, False))
    assert last(rig, 0x1234).what == "bus master"


def test_levels_are_shown() -> None:
    rig = Rig(levels=2)
    rig.map(0, 0)
    assert [step.what for step in rig.host.explain(rig.device, 0)][3:] == [
        "level 1 entry 0x0",
        "TCE 0x0",
        "permission",
        "memory",
    ]
    assert last(rig, 32 * MIB).what == "level 1 entry 0x1"


def test_without_a_container() -> None:
    rig = Rig()
    rig.port.device_closed(rig.token)
    rig.group.unset_container()
    assert rig.host.explain(rig.device, 0)[0].what == "container"
