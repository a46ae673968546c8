"""The same words to stock QEMU and to ``guestd-system-x86_64``: command line, QMP and qtest of a PC."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.guestd.q35_options import LAST_DEVICE_REFUSED, REFUSED
from tests.interop.bridge_config import ECAM, fill, read
from tests.interop.pc import CONFIG_ADDRESS, CONFIG_DATA, Function, PcQemu
from tests.interop.qmp import QmpError
from tests.interop.qtest import QTestError
from tests.interop.served import qemu_folder
from tests.interop.vtd.campaign import guestd_binary
from vfio_model.pci.config_space import EXTENDED_CONFIG_SIZE
from vfio_model.pci.express import DEVCTL_FLR

TREE = (
    "-device intel-iommu,id=unit -device pcie-root-port,id=rp1,chassis=1 -device pcie-root-port,id=rp2,chassis=2 "
    "-device pcie-pci-bridge,id=pb -device i82801b11-bridge,id=dmi -device edu,id=e0,bus=rp1 -device edu,id=e1,bus=pb "
    "-device pci-bridge,id=pbr,chassis_nr=3,bus=dmi,addr=1 -device edu,id=e2,bus=pbr -device edu,id=e4 "
    "-device pxb-pcie,id=px,bus_nr=32,bypass_iommu=on -device pcie-root-port,id=rpx,bus=px,chassis=9"
)
BRIDGES = {"rp1": (0x08, 1, 1), "rp2": (0x10, 2, 2), "pb": (0x18, 3, 3), "dmi": (0x20, 4, 5)}
"""devfn on bus 0, secondary and subordinate number."""
PATHS = ("/machine/peripheral/rp1", "/machine/peripheral/unit", "/machine/peripheral/px", "/machine/q35", "/machine")
PROPERTIES = ("type", "addr", "aw-bits", "intremap", "eim", "chassis", "bus_nr", "parent_bus", "pcie.0", "rp1")
NVME = "-device nvme,serial=1,addr=4 -device pcie-root-port,id=r,addr=5,chassis=1 -device nvme,serial=2,bus=r"
EDU_BAR, RAM = 0xE000_0000, 0x10_0000
ONES = 0xFFFF_FFFF
NVME_POWER_CONTROL, NVME_DEVICE_CONTROL = 0x64, 0x88

Answers = list[tuple[str, str]]


class Asked:
    """What a machine answered, in order."""

    def __init__(self, pc: PcQemu) -> None:
        self.pc = pc
        self.answers: Answers = []

    def note(self, what: str, answer: object) -> None:
        self.answers.append((what, json.dumps(answer, sort_keys=True)))

    def qmp(self, name: str, **arguments: object) -> None:
        try:
            answer = self.pc.qmp.ask(name, **arguments)
        except QmpError as error:
            answer = str(error)
        self.note(f"{name} {arguments}", answer)

    def human(self, line: str) -> None:
        self.qmp("human-monitor-command", **{"command-line": line})

    def qtest(self, command: str) -> str:
        try:
            answer = self.pc.qtest.ask(command)
        except QTestError as error:
            answer = str(error)
        self.note(command, answer)
        return answer

    def config(self, bus: int, devfn: int, offset: int, value: int | None = None, size: int = 4) -> int:
        """By the ports."""
        letter = {1: "b", 2: "w", 4: "l"}[size]
        self.qtest(f"outl 0xcf8 {1 << 31 | bus << 16 | devfn << 8 | offset & 0xFC:#x}")
        if value is None:
            return int(self.qtest(f"in{letter} {0xCFC | offset & 3:#x}"), 0)
        self.qtest(f"out{letter} {0xCFC | offset & 3:#x} {value:#x}")
        return value


def enumerate_buses(asked: Asked) -> None:
    for devfn in range(256):
        if asked.config(0, devfn, 0) != ONES:
            for offset in range(4, 256, 4):
                asked.config(0, devfn, offset)
    for devfn, secondary, subordinate in BRIDGES.values():
        asked.config(0, devfn, 0x18, subordinate << 16 | secondary << 8)
    asked.config(4, 8, 0x18, 5 << 16 | 5 << 8 | 4)
    for bus in range(1, 7):
        for devfn in (0, 8, 16):
            asked.config(bus, devfn, 0)
    for what in ("query-pci", "query-target"):
        asked.qmp(what)
    asked.human("info pci")


def a_bar_and_dma(asked: Asked) -> None:
    """edu on bus 0, which reads RAM and writes it, with no translation."""
    devfn = 0x28
    assert asked.config(0, devfn, 0) == 0x11E8_1234
    asked.config(0, devfn, 0x10, ONES)
    asked.config(0, devfn, 0x10)
    asked.config(0, devfn, 0x10, EDU_BAR)
    asked.config(0, devfn, 4, 7, size=2)
    for command in (f"readl {EDU_BAR:#x}", f"readq {EDU_BAR + 8:#x}", f"readb {EDU_BAR:#x}", f"readw {EDU_BAR + 2:#x}"):
        asked.qtest(command)
    asked.qtest(f"write {RAM:#x} 0x8 0x0123456789abcdef")
    for source, target, way in ((RAM, 0x40000, 1), (0x40000, RAM + 0x100, 3)):
        for offset, value in ((0x80, source), (0x88, target), (0x90, 8), (0x98, way)):
            asked.qtest(f"writeq {EDU_BAR + offset:#x} {value:#x}")
        asked.pc.qtest.ask("clock_step 200000000")
        asked.qtest(f"readq {EDU_BAR + 0x98:#x}")
    assert asked.qtest(f"read {RAM + 0x100:#x} 8") == "0x0123456789abcdef"


def interrupts(asked: Asked) -> None:
    for command in (
        "irq_intercept_in nonsense",
        "irq_intercept_out e4",
        "irq_intercept_in ioapic",
        "irq_intercept_in /machine/q35/ioapic",
        "irq_intercept_in q35",
    ):
        asked.qtest(command)
    for value in (1, 0):
        asked.qtest(f"writel {EDU_BAR + (0x60 if value else 0x64):#x} 0x1")
        asked.note("lines", asked.pc.qtest.irqs)


def plugging(asked: Asked) -> None:
    for bus in ("pcie.0", "rp1", "nope", "px"):
        asked.qmp("device_add", driver="edu", id="x", bus=bus)
    asked.qmp("device_add", driver="edu", id="x")
    for driver in ("intel-iommu", "pcie-root-port"):
        asked.qmp("device_add", driver=driver, id="z")
    asked.qmp("device_add", driver="edu", id="x", bus="rp1", addr="0")
    asked.qmp("device_add", driver="edu", id="y", bus="dmi", addr="2")
    asked.qmp("device_add", driver="edu", id="x", bus="rp2")
    asked.qmp("device_add", driver="edu", id="x", bus="rp2")
    for name in ("e4", "rp1", "unit", "nope"):
        asked.qmp("device_del", id=name)
    asked.qmp("query-pci")


def the_rest(asked: Asked) -> None:
    for path in PATHS:
        for name in PROPERTIES:
            asked.qmp("qom-get", path=path, property=name)
    for command in ("endianness", "inb 0x70", "inl 0xcf8", "inw 0x1000", "inl 0xfffe", "readl 0xfed90000", "hcall 1"):
        asked.qtest(command)


def script(pc: PcQemu) -> Answers:
    asked = Asked(pc)
    enumerate_buses(asked)
    a_bar_and_dma(asked)
    interrupts(asked)
    the_rest(asked)
    plugging(asked)
    return asked.answers


def test_both_answer_alike() -> None:
    words = TREE.split()
    with PcQemu(words) as pc:
        theirs = script(pc)
    with PcQemu(words, binary=guestd_binary()) as pc:
        ours = script(pc)
    assert len(theirs) > 1000
    for (what, one), (also, other) in zip(theirs, ours, strict=True):
        assert (what, one) == (also, other)


def nvme_configuration(pc: PcQemu) -> list[list[int]]:
    """On the root bus and behind a port: after power-on, after zeros were written everywhere, and after ones."""
    for at, value in ((0x8000_0060, ECAM | 1), (0x8000_2818, 0x0001_0100)):
        pc.outl(CONFIG_ADDRESS, at)
        pc.outl(CONFIG_DATA, value)
    seen = []
    for bus in 0, 1:
        seen.append(read(pc, bus, EXTENDED_CONFIG_SIZE))
        for value in 0, ONES:
            fill(pc, bus, EXTENDED_CONFIG_SIZE, value, {NVME_DEVICE_CONTROL: DEVCTL_FLR})
            seen.append(read(pc, bus, EXTENDED_CONFIG_SIZE))
    return seen


def test_nvme_has_the_same_configuration_space() -> None:
    with PcQemu(NVME.split()) as pc:
        theirs = nvme_configuration(pc)
    with PcQemu(NVME.split(), binary=guestd_binary()) as pc:
        ours = nvme_configuration(pc)
    assert theirs[0][0] == theirs[3][0] == 0x0010_1B36 and theirs[0] != theirs[2]
    assert ours == theirs


def nvme_power(pc: PcQemu) -> list[int]:
    """Its version register and its power management state, in each state that is asked for."""
    function = Function(pc, 4)
    function.bring_up()
    seen = []
    for state in (0, 1, 2, 3, 1, 2, 0, 3):
        function.write(NVME_POWER_CONTROL, state, 2)
        seen += [function.read(NVME_POWER_CONTROL), function.load(8)]
    function.write(NVME_DEVICE_CONTROL, DEVCTL_FLR, 2)
    seen += [function.read(offset) for offset in (4, 0x10, NVME_POWER_CONTROL, NVME_DEVICE_CONTROL)]
    function.bring_up()
    return [*seen, function.load(8)]


def test_nvme_is_switched_off_and_reset_alike() -> None:
    with PcQemu(NVME.split()) as pc:
        theirs = nvme_power(pc)
    with PcQemu(NVME.split(), binary=guestd_binary()) as pc:
        ours = nvme_power(pc)
    assert ours == theirs and {8, 0xB} < set(theirs)


@pytest.mark.parametrize(("text", "message"), LAST_DEVICE_REFUSED + REFUSED)
def test_the_refusals_are_qemus(text: str, message: str) -> None:
    said = _refusal(qemu_folder() / "bin/qemu-system-x86_64", text)
    assert said.endswith(message), said


def _refusal(binary: Path, text: str) -> str:
    machine = [] if text.startswith("-machine") else ["-machine", "q35"]
    command = [str(binary), *machine, "-accel", "qtest", "-display", "none", "-nodefaults", *text.split()]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    return done.stderr.strip()
