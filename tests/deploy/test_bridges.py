"""Several host bridges in one guest: each has its own bus, windows and container; and what a machine may be told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from deploy import assemble, yaml_lines
from deploy.inline.system import InlineSystem, StartRefused
from deploy.runner import Runner
from deploy.scenario import Scenario
from guestd.config import GuestConfig
from tests import acceleration
from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.quirks import OVERLAPPING_WINDOWS, selected
from vfio_model.iommu.spapr.regs import HCall, RtasToken
from vfio_model.ranges import U32_MAX

pytestmark = pytest.mark.machine

HEAD = """
name: bridges
machine:
  ram: 64MiB
  phbs:
    - {index: 0}
    - {index: 2, ddw: false, dma_win_size: 16MiB}
    - {index: 5, id: third, pgsz: [4K, 64K]}
devices:
"""
KINDS = ("assigned", "remote", "emulated")
BUSES = {"pci.0": 0, "phb2.0": 2, "third.0": 5}
DEVICES = "".join(
    f"  - {{id: {kind}{index}, model: edu, attach: {kind}, bus: {bus}, addr: {place + 2:02x}.0,"
    " props: {dma_mask: 0xffffffffffffffff}}\n"
    for bus, index in BUSES.items()
    for place, kind in enumerate(KINDS)
)


def parsed(steps: str = "", head: str = HEAD, devices: str = DEVICES) -> Scenario:
    scenario = yaml_lines.parse(head + devices + (f"steps:\n{steps}" if steps else ""), "mine.yaml", Scenario)
    scenario.machine.kvm = acceleration.kvm()
    return scenario


@contextmanager
def started(steps: str = "") -> Iterator[tuple[InlineSystem, str]]:
    """A system after its steps, and what went wrong in them."""
    scenario = parsed(steps)
    with closing(InlineSystem(scenario)) as system:
        system.bring_up()
        yield system, Runner(scenario, system, Path()).run()


@pytest.mark.parametrize("index", BUSES.values())
def test_a_mapping_reaches_the_devices_of_its_bridge_alone(index: int) -> None:
    iova, liobn = 0x3000, regs.pci_liobn(index, 0)
    steps = f"  - map: {{iova: {iova}, gpa: 0x200000, liobn: {liobn}}}\n"
    for other in BUSES.values():
        outcome = "ok" if other == index else "refused"
        for kind in KINDS:
            steps += f"  - dma: {{device: {kind}{other}, iova: {iova}, gpa: 0x200000, expect: {outcome}}}\n"
    steps += f"  - unmap: {{iova: {iova}, liobn: {liobn}}}\n"
    for kind in KINDS:
        steps += f"  - dma: {{device: {kind}{index}, iova: {iova}, gpa: 0x200000, expect: refused}}\n"
    with started(steps) as (system, reason):
        assert reason == ""
        explanation = system.explain(f"assigned{index}", iova)
        assert explanation.fails == "stage-1"


def test_each_bridge_has_a_container_with_its_windows() -> None:
    steps = "".join(
        f"  - linux_ddw: {{device: emulated{index}, expect: {'refused' if index == 2 else 'window'}}}\n"
        for index in BUSES.values()
    )
    with started(steps) as (system, reason):
        assert reason == ""
        host = system.status("guestd")["host"]
        assert isinstance(host, dict)
        found = sorted(window["start"] for window in host["windows"])
        assert found == [0, 0, 0, 1 << 59, 1 << 59]
        assert host["connected"] is True
        guest = system.guest
        assert len(guest.host.containers) == 3
        for name in [name for name in guest.devices if name.endswith("2")]:
            guest.remove_device(name)
        assert len(guest.host.containers) == 3, "in one process a container stays with its bridge"


def test_the_device_tree_is_in_the_status() -> None:
    with started() as (system, _):
        tree = system.status("guestd")["device_tree"]
        assert isinstance(tree, dict)
        nodes = [f"/pci@{regs.phb_buid(index):x}" for index in BUSES.values()]
        assert list(tree) == nodes
        assert tree[nodes[1]]["ibm,dma-window"] == [0x8000_0200, 0, 0, 0, 16 << 20]
        assert "ibm,ddw-applicable" in tree[nodes[0]]
        assert "ibm,ddw-applicable" not in tree[nodes[1]]


def test_addresses_have_the_bridge_as_their_domain() -> None:
    with started() as (system, _):
        found = {device.id: device.address for device in system.devices()}
        assert found["emulated0"] == "0000:00:04.0"
        assert found["emulated5"] == "0005:00:04.0"


def test_eeh_is_there_while_one_group_is_plugged() -> None:
    with started() as (system, _):
        machine, buid = system.guest.machine, regs.phb_buid(2)
        state = (2 << 11, buid >> 32, buid & U32_MAX)
        token = RtasToken.IBM_READ_SLOT_RESET_STATE2
        assert machine.rtas(token, state, 4) == [0, 0, 1, 1000]
        assert machine.rtas(token, (state[0], state[1], regs.phb_buid(1) & U32_MAX), 4) == [-3 & U32_MAX]
    alone = "  - {id: local, model: edu, addr: 02.0}\n"
    with closing(InlineSystem(parsed(devices=alone))) as system:
        assert system.guest.machine.rtas(token, state, 4) == [-3 & U32_MAX]


# -- what a machine may be told --------------------------------------------------------------------------------------


def guest_config(text: str) -> GuestConfig:
    scenario = parsed(head=f"name: mine\nmachine: {text}\n", devices="")
    return msgspec.convert(assemble.guest_config(scenario, Path()), GuestConfig)


def test_what_a_bridge_leaves_out_is_the_machines() -> None:
    machine = guest_config(
        "{ddw: false, pgsz: [4K], dma_win_size: 2MiB, dma64_win_addr: 0x400000000000000, quirks: [qemu],"
        " phbs: [{index: 1, ddw: true}, {index: 3, dma_win_size: 1MiB}]}"
    ).machine
    first, second = (machine.dma_options(phb) for phb in machine.phbs)
    assert (first.ddw, first.dma_win_size, first.pgsz) == (True, 2 << 20, 4096)
    assert (second.ddw, second.dma_win_size, second.dma64_win_addr) == (False, 1 << 20, 1 << 58)
    assert first.quirks == selected(["qemu"]) and OVERLAPPING_WINDOWS in first.quirks
    assert [machine.phb_on(bus) for bus in ("", "phb1.0", "phb3.0")] == [1, 1, 3]


def test_a_default_window_elsewhere() -> None:
    head = "name: mine\nmachine: {ram: 64MiB, dma_win_addr: 0x10000000, dma_win_size: 1MiB}\ndevices:\n"
    devices = DEVICES.splitlines()[2].replace("bus: pci.0, ", "") + "\n"
    steps = (
        "  - map: {iova: 0x10003000, gpa: 0x200000}\n  - dma: {device: emulated0, iova: 0x10003000, gpa: 0x200000}\n"
    )
    steps += "  - map: {iova: 0x3000, gpa: 0x200000, expect: H_PARAMETER}\n"
    scenario = parsed(steps, head, devices)
    with closing(InlineSystem(scenario)) as system:
        system.bring_up()
        assert Runner(scenario, system, Path()).run() == ""
    elsewhere = parsed("", head, devices.replace("attach: emulated", "attach: assigned"))
    with pytest.raises(StartRefused, match="the guest needs it at 0x10000000"):
        InlineSystem(elsewhere)


def test_vio_devices_have_windows() -> None:
    vio = "[{kind: vty}, {kind: llan}, {kind: vscsi, reg: 0x2000}]"
    steps = "  - map: {iova: 0x1000, gpa: 0x200000, liobn: 0x71000001}\n"
    steps += "  - hcall: {name: H_PUT_TCE, args: [0x71000000, 0, 3], expect: H_PARAMETER}\n"
    steps += "  - rtas: {name: 0x2010, args: [0x2000, 1], expect: 0}\n"
    steps += "  - rtas: {name: 0x2010, args: [0x71000000, 1], expect: -3}\n"
    scenario = parsed(steps, f"name: mine\nmachine: {{ram: 64MiB, vio: {vio}}}\n", "")
    with closing(InlineSystem(scenario)) as system:
        reason = Runner(scenario, system, Path()).run()
        assert reason == ""
        assert list(system.guest.machine.device_tree())[1:] == [
            "/vdevice/vty@71000000",
            "/vdevice/l-lan@71000001",
            "/vdevice/v-scsi@2000",
        ]


def test_without_multi_tce_the_calls_for_many_are_missing() -> None:
    head = "name: mine\nmachine: {ram: 64MiB, multitce: false}\n"
    with closing(InlineSystem(parsed(head=head, devices=""))) as system:
        answers = [system.cpu.hcall(call, regs.pci_liobn(0, 0), 0, 0, 1)[0] for call in HCall if call != HCall.H_RTAS]
        assert sorted(answers) == [regs.HReturn.H_FUNCTION] * 2 + [0, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{phbs: [{index: 1}, {index: 1}]}", "the same index"),
        ("{phbs: [{index: 1, id: a}, {index: 2, id: a}]}", "the same bus"),
        ("{phbs: [{index: 31}]}", "index"),
        ("{quirks: [none-such]}", "no quirk 'none-such'"),
        ("{dma_win_addr: 6K}", "multiples of 4096"),
        ("{dma_win_size: 2K}", "not less"),
        ("{dma_win_addr: 0xfffffffffffff000, dma_win_size: 8K}", "within 64 bits"),
    ],
)
def test_what_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises((ConfigError, msgspec.ValidationError), match=says):
        guest_config(text)


def test_a_bus_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"there is no bus pci\.7"):
        parsed(devices="  - {id: a, model: edu, addr: 02.0, bus: pci.7}\n")
    same = "  - {id: a, model: edu, addr: 02.0, bus: third.0}\n  - {id: b, model: edu, addr: 02.0, bus: third.0}\n"
    with pytest.raises(ConfigError, match=r"02\.0 of PHB 5"):
        parsed(devices=same)
