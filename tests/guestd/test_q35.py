"""A q35 in guestd: buses, address spaces and monitors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestd.cmdline import parse
from guestd.explain import explain
from guestd.qtest import QtestMachine
from protocols.qtest.state import QtestState
from protocols.transport.loop import Loop
from tests.guestd.monitor_rig import Machine
from tests.guestd.qtest_client import running
from vfio_model.memory.types import MemTxResult

TREE = (
    "-m 16M -device intel-iommu,id=unit,caching-mode=on -device pcie-root-port,id=rp1,chassis=1 "
    "-device pcie-root-port,id=rp2,chassis=2 -device pcie-pci-bridge,id=pb -device edu,id=e0,bus=rp1 "
    "-device edu,id=e1,bus=pb -device edu,id=e2,bus=pb -device edu,id=e3,addr=9 "
    "-device pxb-pcie,id=px,bus_nr=32,bypass_iommu=on -device pcie-root-port,id=rpx,bus=px,chassis=9 "
    "-device edu,id=ex,bus=rpx"
)
PROGRAM = (sys.executable, "-c", "import sys; from guestd.system import run; sys.exit(run('x-x86_64', sys.argv[1:]))")
VTD = 0xFED9_0000
NUMBERS = {"rp1": 1, "rp2": 2, "pb": 3}

Rig = Callable[[str], Machine]


@pytest.fixture
def make(runtime_dir: Path, loop: Loop) -> Iterator[Rig]:
    made: list[Machine] = []

    def build(text: str) -> Machine:
        config = parse(text.split(), "x86_64").config
        machine = Machine(runtime_dir, loop, config.machine, config.devices)
        made.append(machine)
        return machine

    yield build
    for machine in made:
        machine.monitors.close()
        machine.guest.close()


@pytest.fixture
def tree(make: Rig) -> Machine:
    return make(TREE)


def functions(machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(devices: list[Any]) -> None:
        for device in devices:
            found[device["qdev_id"] or f"{device['slot']:x}.{device['function']}"] = device
            walk(device.get("pci_bridge", {}).get("devices", []))

    for bus in machine.ask("query-pci"):
        walk(bus["devices"])
    return found


def number(machine: Machine) -> None:
    """What firmware does: bus numbers."""
    places = machine.guest.board.bridges
    for name, bus in NUMBERS.items():
        places[name].config_write(0x18, 4, bus << 16 | bus << 8)


def qtest_of(machine: Machine) -> Callable[[str], str]:
    state = QtestState(QtestMachine(machine.operations))
    return lambda text: state.receive(text.encode() + b"\n").decode().rstrip("\n")


def test_buses_by_qemus_names(tree: Machine) -> None:
    assert list(tree.guest.board.buses) == ["pcie.0", "rp1", "rp2", "pb", "px", "rpx"]
    assert [bus["bus"] for bus in tree.ask("query-pci")] == [32, 0]
    assert tree.ask("query-target") == {"arch": "x86_64"} and tree.ask("query-kvm")["enabled"] is False


def test_functions_are_seen_once_their_bus_has_a_number(tree: Machine) -> None:
    assert functions(tree).keys() == {"0.0", "rp1", "rp2", "pb", "e3", "px", "rpx", "1f.0", "1f.2", "1f.3"}
    number(tree)
    found = functions(tree)
    assert {name: found[name]["bus"] for name in ("e0", "e1", "e2", "e3", "rpx")} == {
        "e0": 1, "e1": 3, "e2": 3, "e3": 0, "rpx": 32,
    }  # fmt: skip
    assert found["rp1"]["pci_bridge"]["bus"] == {
        "number": 0,
        "secondary": 1,
        "subordinate": 1,
        "io_range": {"base": 0xF000, "limit": 0xFFF},
        "memory_range": {"base": 0xFFF0_0000, "limit": 0xF_FFFF},
        "prefetchable_range": {"base": 0xFFF0_0000, "limit": 0xF_FFFF},
    }
    assert found["rp1"]["id"] == {"vendor": 0x1B36, "device": 0xC}, "a bridge has no subsystem"
    assert found["1f.2"]["class_info"] == {"class": 0x106, "desc": "SATA controller"}
    text = tree.human("info pci")
    assert "    PCI bridge: PCI device 1b36:000c\n      IRQ 0, pin A\n      BUS 0.\n      secondary bus 1.\n" in text
    assert "  Bus  3, device   1, function 0:\n    Class 0255: PCI device 1234:11e8\n" in text


def test_an_address_follows_the_guests_numbers(tree: Machine) -> None:
    assert str(tree.guest.board.address_of(tree.guest.devices["e1"][0])) == "0000:00:00.0"
    number(tree)
    assert str(tree.guest.board.address_of(tree.guest.devices["e1"][0])) == "0000:03:00.0"
    assert tree.guest.device_status("e2")["address"] == "0000:03:01.0"
    assert explain(tree.guest, "03:01.0", 0)["steps"][0]["value"].startswith("e2, ")


def test_every_device_has_the_space_of_its_requester(tree: Machine) -> None:
    number(tree)
    board, devices = tree.guest.board, tree.guest.devices
    space = {name: board.device_space(devices[name][0]) for name in ("e0", "e1", "e2", "e3", "ex")}
    assert space["ex"].address_space is board.machine.system, "an expander that bypasses the IOMMU"
    assert space["e1"] == space["e2"] != space["e0"], "behind a PCI Express to PCI bridge all are one requester"
    assert len({each.as_id for each in space.values()}) == 4
    spaces = board.address_spaces()
    assert [each.name for each in spaces[:2]] == ["memory", "I/O"] and len(set(spaces)) == len(spaces)
    assert {each.address_space for each in space.values()} <= set(spaces)


@pytest.mark.parametrize(
    ("machine", "off", "on"),
    [("", MemTxResult.OK, MemTxResult.OK), (",x-bridges-gate-dma=on", MemTxResult.DECODE_ERROR, MemTxResult.OK)],
)
def test_a_bridge_that_is_no_bus_master_gates_dma_if_asked_to(
    make: Rig, machine: str, off: MemTxResult, on: MemTxResult
) -> None:
    made = make(f"-machine q35{machine} -m 16M -device pcie-root-port,id=rp -device edu,id=e,bus=rp")
    device = made.guest.devices["e"][1]
    device.config_write(4, 2, 6)
    assert device.dma.write(0x5000, b"abcd") is off
    made.guest.board.bridges["rp"].config_write(4, 2, 6)
    assert device.dma.write(0x5000, b"abcd") is on


def test_dma_and_explain_past_the_iommu_and_through_it(make: Rig) -> None:
    machine = make("-m 16M -device intel-iommu -device edu,id=e,addr=2")
    device = machine.guest.devices["e"][1]
    device.config_write(4, 2, 6)
    machine.guest.machine.write_memory(0x5000, b"abcd")
    data = bytearray(4)
    assert device.dma.read(0x5000, data) is MemTxResult.OK and data == b"abcd"
    steps = explain(machine.guest, "e", 0x5000)
    assert steps["result"] == 0x5000
    for offset, value in ((0x20, 0x10_0000), (0x18, 1 << 30), (0x18, 1 << 31)):  # an empty root table, enabled
        machine.guest.machine.mmio_write(VTD + offset, 8 if offset == 0x20 else 4, value)
    assert device.dma.read(0x5000, data) is not MemTxResult.OK
    steps = explain(machine.guest, "e", 0x5000)
    reason = "legacy mode, bus 00, at 0x100000: 0x0: root not present (fault reason 0x1)"
    assert steps["result"] is None and steps["steps"][-1] == {"what": "root entry", "value": reason, "ok": False}
    assert machine.human("info iommu").startswith("intel-iommu: legacy mode, 48 bits\n")


def test_devices_come_and_go_below_ports(tree: Machine) -> None:
    assert tree.refusal("device_add", driver="edu", id="x", bus="pcie.0")[1] == (
        "Bus 'pcie.0' does not support hotplugging"
    )
    assert tree.refusal("device_add", driver="edu", id="x")[1] == "Bus 'px' does not support hotplugging"
    occupied = "PCI: slot 0 function 0 already occupied by edu, new func edu cannot be exposed to guest."
    assert tree.refusal("device_add", driver="edu", id="x", bus="rp1")[1] == occupied
    tree.ask("device_add", driver="edu", id="x", bus="rp2")
    number(tree)
    assert functions(tree)["x"]["bus"] == 2
    for name in ("x", "e0", "ex"):
        tree.ask("device_del", id=name)
    assert tree.told() == ["DEVICE_DELETED"] * 3
    assert functions(tree).keys() & {"x", "e0", "ex"} == set()


def test_what_comes_with_the_machine_stays(tree: Machine) -> None:
    root, unit = "Bus 'pcie.0' does not support hotplugging", "Device 'intel-iommu' does not support hotplugging"
    assert [tree.refusal("device_del", id=name)[1] for name in ("e3", "rp1", "unit")] == [root, root, unit]
    assert tree.refusal("device_del", id="nope") == ("DeviceNotFound", "Device 'nope' not found")
    assert tree.refusal("device_add", driver="intel-iommu", id="z")[1] == unit
    assert tree.refusal("device_add", driver="pcie-root-port", id="z", bus="pcie.0")[1] == root


def test_what_comes_without_an_id_is_known_by_its_path(make: Rig) -> None:
    machine = make("-m 16M -device intel-iommu -device pcie-root-port")
    said = [machine.refusal("device_del", id=f"/machine/peripheral-anon/device[{n}]")[1] for n in range(2)]
    assert said == ["Device 'intel-iommu' does not support hotplugging", "Bus 'pcie.0' does not support hotplugging"]
    assert machine.refusal("device_del", id="device[0]")[0] == "DeviceNotFound"


def test_objects_have_qemus_paths(tree: Machine) -> None:
    def get(path: str, name: str) -> object:
        path = path if "/" in path else f"/machine/peripheral/{path}"
        return tree.ask("qom-get", path=path, property=name)

    assert get("/machine", "type") == "pc-q35-11.1-machine" and get("/machine", "default-bus-bypass-iommu") is False
    assert get("/machine/q35", "pcie.0") == "/machine/q35/pcie.0"
    assert get("rp1", "rp1") == "/machine/peripheral/rp1/rp1"
    assert get("e0", "parent_bus") == "/machine/peripheral/rp1/rp1"
    assert get("rpx", "parent_bus") == "/machine/peripheral/px/px" and get("px", "bypass_iommu") is True
    assert [get("unit", name) for name in ("caching-mode", "aw-bits", "intremap", "eim")] == [True, 48, "on", "off"]
    assert get("/machine/unattached/device[2]", "type") == "ICH9-LPC" and get("q35/ioapic", "type") == "ioapic"
    assert tree.refusal("qom-list", path="rp1") == ("GenericError", "Path 'rp1' is ambiguous"), "a port and its bus"
    assert tree.refusal("qom-get", path="rp1", property="chassis") == ("DeviceNotFound", "Device 'rp1' not found")
    assert tree.refusal("qom-list", path="") == ("GenericError", "Path '' is ambiguous")
    types = {each["name"] for each in tree.ask("qom-list-types", implements="pci-device")}
    assert types >= {"pcie-root-port", "pxb-pcie", "edu", "ICH9-LPC"}
    lines = tree.human("info qtree").splitlines()
    hosts = [line.split(",")[0].strip() for line in lines if line.startswith("  dev: ")]
    assert hosts == ["dev: pxb-host", "dev: intel-iommu", "dev: q35-pcihost"]
    inside = lines[lines.index('      dev: pcie-pci-bridge, id "pb"') :]
    assert inside.index("        bus: pb") < inside.index('          dev: edu, id "e1"')


def test_ports_are_little_endian(tree: Machine) -> None:
    qtest = qtest_of(tree)
    assert qtest("endianness") == "OK little"
    assert qtest("outl 0xcf8 0x80000000") == "OK" and qtest("inl 0xcfc") == "OK 0x29c08086"
    assert qtest("inw 0xcfe") == "OK 0x29c0" and qtest("inb 0xcfd") == "OK 0x0080"
    assert qtest("outl 0xcf8 0x80000804") == "OK" and qtest("outb 0xcfc 0x6") == "OK"
    assert qtest("inw 0xcfc") == "OK 0x0006", "root port rp1"
    assert qtest("writel 0x1000 0x11223344") == "OK" and qtest("read 0x1000 4") == "OK 0x44332211"
    assert qtest("readl 0xfed90000") == "OK 0x0000000000000010", "the unit's version"
    for command in ("rtas x 0 0 0 0", "hcall 1"):
        assert qtest(command) == f"FAIL Unknown command '{command.split()[0]}'"


def test_interrupt_lines_are_the_io_apics(tree: Machine) -> None:
    qtest = qtest_of(tree)
    assert qtest("irq_intercept_in nonsense") == "FAIL Unknown device"
    assert qtest("irq_intercept_out e3") == "FAIL No intercepts installed"
    assert qtest("irq_intercept_in ioapic") == qtest("irq_intercept_in /machine/q35/ioapic") == "OK"
    assert qtest("irq_intercept_in q35") == "FAIL IRQ intercept already enabled"


def test_the_guest_resets_the_machine(tree: Machine) -> None:
    number(tree)
    qtest = qtest_of(tree)
    assert qtest("outb 0xcf9 6") == "OK"
    assert tree.told() == ["RESET"] and tree.events[-1][1] == {"guest": True, "reason": "guest-reset"}
    assert "e0" not in functions(tree), "numbers are gone"


def test_the_process(runtime_dir: Path) -> None:
    argv = (*PROGRAM, "-machine", "q35", "-accel", "qtest", "-nodefaults", "-display", "none")
    with running([*argv, "-device", "intel-iommu", "-device", "edu,id=e,addr=2"], runtime_dir, qmp=True) as qtest:
        assert qtest("irq_intercept_in ioapic") == "OK"
        qtest("outl 0xcf8 0x80001010"), qtest("outl 0xcfc 0xe0000000")
        qtest("outl 0xcf8 0x80001004"), qtest("outw 0xcfc 0x6")
        assert qtest.value("readl 0xe0000000") == 0x0100_00ED
        qtest.socket.sendall(b"writel 0xe0000060 0x1\n")
        assert qtest.line().startswith("IRQ raise ") and qtest.line() == "OK"


@pytest.mark.parametrize(("when", "at_once"), [("sync", True), ("async", False)])
def test_a_wait_descriptor_completes_at_once_or_when_the_loop_turns(
    make: Rig, loop: Loop, when: str, at_once: bool
) -> None:
    ask = qtest_of(make(f"-m 16M -device intel-iommu,invalidation={when}"))
    queue, status = 0x10_0000, 0x10_1000
    commands = (
        *(f"writel {VTD + 0x88:#x} 0", f"writeq {VTD + 0x90:#x} {queue:#x}", f"writel {VTD + 0x18:#x} {1 << 26:#x}"),
        *(
            f"writeq {queue:#x} 0x12",
            f"writeq {queue + 16:#x} {7 << 32 | 0x25:#x}",
            f"writeq {queue + 24:#x} {status:#x}",
        ),
    )
    assert all(ask(command) == "OK" for command in (*commands, f"writel {VTD + 0x88:#x} 0x20"))
    done = "OK 0x0000000000000007"
    assert (ask(f"readl {status:#x}") == done) is at_once
    loop.call_soon(lambda: loop.call_soon(loop.stop))
    loop.run()
    assert ask(f"readl {status:#x}") == done
    assert ask(f"readl {VTD + 0x80:#x}") == "OK 0x0000000000000020"
