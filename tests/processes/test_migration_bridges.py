"""A machine with two host bridges moves: default and dynamic windows in both, a device that does DMA behind each, other
kinds of container where it comes to.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from deploy.link import Link
from protocols.control import messages as control
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import ADDRESSES, FAR, NIC, GuestProcess, Pair, pair, topology
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.iommu.spapr import regs

pytestmark = pytest.mark.machine

PAGE, MIB = 4096, 1 << 20
DEVICES = (NIC, FAR)
"""One behind each bridge."""
PAGES, BIG = 32, 16
IOVA, DMA64 = 0x10_0000, 1 << 59
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER


def gpa(index: int, *, dynamic: bool) -> int:
    """Where a window of bridge ``index`` leads."""
    return (16 + 8 * index + 4 * dynamic) * MIB


def prepared(source: GuestProcess, *, dynamic: bool) -> None:
    """Every window has pages, both devices write without end, through the dynamic windows if there are some."""
    for index, name in enumerate(DEVICES):
        source.bring_up(name)
        for page in range(PAGES):
            source.put(IOVA + page * PAGE, gpa(index, dynamic=False) + page * PAGE | 3, regs.pci_liobn(index, 0))
        iova, stride = IOVA, PAGE
        if dynamic:
            buid = regs.phb_buid(index)
            pe = [ADDRESSES[name] << 8, buid >> 32, buid & 0xFFFF_FFFF]
            assert source.cpu.rtas(regs.RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*pe, BIG, 26], 4)[0] == 0
            iova, stride = DMA64, 1 << BIG
            for page in range(PAGES):
                source.put(
                    DMA64 + (page << BIG), gpa(index, dynamic=True) + (page << BIG) | 3, regs.pci_liobn(index, 1)
                )
        nic = source.burst(name)
        nic.start(iova, 64, PAGES, stride=stride, span=PAGES, pattern=index + 1, command=FOREVER)
    until("both have begun", lambda: all(source.burst(name).result().completed > PAGES for name in DEVICES))
    source.ram.write(40 * MIB, random.Random(1).randbytes(8 * MIB))


def iovas(*, dynamic: bool) -> list[int]:
    """What is mapped, and a little around."""
    default = [IOVA + page * PAGE for page in range(-1, PAGES + 1)]
    return default + [DMA64 + (page << BIG) for page in range(PAGES + 1)] * dynamic


def host_maps(host: HostProcess, number: int, *, dynamic: bool) -> list[list[bool]]:
    """What the host's tables of guest ``number`` grant, for each bridge."""
    link, found = Link(host.directory, "hostd", seconds=30.0), []
    for index in range(len(DEVICES)):
        device = f"0000:01:{2 * number + index:02x}.0"
        answers = [link.document(control.Explain(device, iova)) for iova in iovas(dynamic=dynamic)]
        found.append([answer["result"] is not None for answer in answers])
    link.close()
    return found


def the_same(both: Pair, *, dynamic: bool) -> None:
    """The target, which stands, is what the source was."""
    source, target = both.source, both.target
    assert target.ram.map[:] == source.ram.map[:]
    assert target.windows() == source.windows() and len(source.windows()) == 2 + 2 * dynamic
    maps = host_maps(both.host, 1, dynamic=dynamic)
    assert maps == host_maps(both.host, 0, dynamic=dynamic)
    assert [sum(each) for each in maps] == [PAGES * (1 + dynamic)] * 2
    for index in range(len(DEVICES)):
        tables = [guest.tces(IOVA, PAGES, 12, regs.pci_liobn(index, 0)) for guest in (source, target)]
        assert tables[0] == tables[1]


def goes_on(target: GuestProcess, *, dynamic: bool) -> None:
    """Both devices write where they wrote, until their mapping goes."""
    for index, name in enumerate(DEVICES):
        nic, where = target.burst(name), gpa(index, dynamic=dynamic)
        assert nic.result().failed == 0
        target.ram.write(where, b"left alone")
        until(f"{name} goes on", lambda: target.ram.read(where, 10) != b"left alone")  # noqa: B023
        assert target.ram.read(where, 8) == (index + 1).to_bytes(8, "little")
        target.put(DMA64 if dynamic else IOVA, 0, regs.pci_liobn(index, int(dynamic)))
        until("the host has unmapped it", lambda: nic.result().failed > 0)  # noqa: B023


@pytest.mark.parametrize(
    ("kind", "to", "kvm"),
    [
        ("spapr-v2", "spapr-v2", False),
        ("spapr-v2", "spapr-v2", True),
        ("spapr-v2", "type1v2", True),
        ("type1v2", "spapr-v2", True),
        ("spapr-v2", "spapr-v1", False),
        ("spapr-v1", "spapr-v2", True),
        ("type1", "spapr-v1", True),
        ("spapr-v1", "type1", False),
        ("type1", "type1v2", False),
    ],
)
def test_two_bridges_move_to_another_kind_of_container(
    start_host: Callable[..., HostProcess], kind: str, to: str, kvm: bool
) -> None:
    dynamic = "spapr-v1" not in (kind, to)
    host = start_host(topology=topology(kind, to, second="dma-burst"))
    with pair(host, bridges=2, container=kind, kvm=kvm) as both:
        source, target = both.source, both.make_target(container=to, paused=True)
        prepared(source, dynamic=dynamic)
        source.ask("migrate", uri=f"unix:{both.path}")
        info = source.migrated("completed", "failed")
        assert info["status"] == "completed", info
        assert target.migrated("completed", "failed")["status"] == "completed"
        assert [guest.link.status()["host"]["containers"] for guest in (source, target)] == [[kind] * 2, [to] * 2]  # type: ignore[index]
        the_same(both, dynamic=dynamic)
        target.bars = source.bars
        target.ask("cont")
        goes_on(target, dynamic=dynamic)
        for guest in (source, target):
            guest.ask("quit")
            assert guest.popen.wait(20) == 0
        assert host.until(lambda status: not status["mms"])["locked_vm"] == 0


@pytest.mark.parametrize("kvm", [False, True], ids=["user", "kvm"])
def test_a_window_that_the_destination_cannot_make_keeps_the_machine_where_it_is(
    start_host: Callable[..., HostProcess], kvm: bool
) -> None:
    host = start_host(topology=topology("spapr-v2", "spapr-v1", second="dma-burst"))
    with pair(host, bridges=2, container="spapr-v2", kvm=kvm) as both:
        source, target = both.source, both.make_target(container="spapr-v1")
        prepared(source, dynamic=True)
        before = host_maps(host, 0, dynamic=True)
        source.ask("migrate", uri=f"unix:{both.path}")
        info = source.migrated("completed", "failed")
        assert info["status"] == "failed" and "destination" in info["error-desc"], info
        assert target.popen.wait(20) == 1 and "load of migration failed" in target.log.read_text()
        assert source.state == "running" and host_maps(host, 0, dynamic=True) == before
        goes_on(source, dynamic=True)
