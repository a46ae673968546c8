"""Assigned devices of a PC behind VT-d: host, guest and devices are processes of their own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from deploy.explain import choose_device, devices, explain
from deploy.link import Link
from protocols.control import messages as control
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import EDU, NIC, topology
from tests.processes.q35_rig import DATA, MIB, PAGE, Q35Guest, host_pages
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_tables import READ

IOVA = 0x1_0000_0000
LARGE = 2 * MIB
PATTERN = 0x1122_3344_5566_7788
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
HOST_NAMES = {NIC: "0000:01:00.0", EDU: "0000:01:01.0"}


class Pc:
    """A guest on ``host`` with its unit's driver, and each assigned device in a domain."""

    def __init__(self, host: HostProcess) -> None:
        self.host = host
        self.guest = Q35Guest(host, "guest", 0)
        self.guest.bring_up(NIC, EDU)

    def start(self) -> tuple[VtdDriver, Domain, Domain]:
        """Both have their own."""
        self.driver = self.guest.start_iommu()
        domains = [self.driver.domain(), self.driver.domain()]
        for domain, name in zip(domains, (NIC, EDU), strict=True):
            self.driver.attach(domain, Q35Guest.SIDS[name])
        self.guest.cpu.flush()
        return self.driver, domains[0], domains[1]

    def same(self, domain: Domain, name: str, *more: int) -> int:
        """The host's table is the guest's, at every page that is mapped, or was, ``more``; their number."""
        wanted = self.guest.pages(domain)
        found = host_pages(self.host, HOST_NAMES[name], sorted({*wanted, *more}))
        assert {iova: perm for iova, (_, perm) in found.items()} == {iova: perm for iova, (_, perm) in wanted.items()}
        places = {found[iova][0] - wanted[iova][0] for iova in wanted}
        assert len(places) <= 1, "the guest's RAM is in one place"
        return len(wanted)

    def stores(self, iova: int, gpa: int | None) -> None:
        """A write of the burst arrives at ``gpa``; None: it is refused."""
        nic = self.guest.burst()
        before = self.guest.ram.read(gpa, 8) if gpa is not None else b""
        pattern = PATTERN ^ iova
        nic.store(iova, 8, pattern=pattern)
        assert nic.result().failed == (gpa is None)
        if gpa is not None:
            assert self.guest.ram.read(gpa, 8) == pattern.to_bytes(8, "little") != before

    @property
    def locked(self) -> int:
        """Pages, of all clients."""
        value = self.host.status()["locked_vm"]
        assert isinstance(value, int)
        return value


@pytest.fixture
def pc(start_host: Callable[..., HostProcess]) -> Iterator[Pc]:
    made = Pc(start_host(topology=topology("type1v2")))
    yield made
    made.guest.close()


def test_each_device_reaches_its_own_domain(pc: Pc) -> None:
    at_start = pc.locked
    driver, first, second = pc.start()
    assert pc.locked == 0
    driver.map(first, IOVA, DATA, 4 * PAGE)
    driver.map(first, 1 << 40, DATA + LARGE, LARGE, level=2)
    driver.map(second, IOVA, DATA + MIB, PAGE, READ)
    pc.guest.cpu.flush()
    assert pc.same(first, NIC, IOVA - PAGE, IOVA + 4 * PAGE) == 516 and pc.same(second, EDU) == 1
    assert pc.locked == 4 + 512 + 1
    pc.stores(IOVA + 8, DATA + 8)
    pc.stores((1 << 40) + 5 * PAGE, DATA + LARGE + 5 * PAGE)
    driver.unmap(first, IOVA, PAGE)
    pc.stores(IOVA + 8, None)
    driver.detach(first, Q35Guest.SIDS[NIC])
    pc.stores(IOVA + PAGE, None)
    driver.attach(second, Q35Guest.SIDS[NIC])
    assert pc.same(second, NIC, IOVA + PAGE) == 1
    driver.stop()
    pc.stores(DATA, DATA)
    assert pc.locked == at_start


def test_the_host_dies_and_comes_back(pc: Pc, start_host: Callable[..., HostProcess]) -> None:
    driver, first, second = pc.start()
    driver.map(first, IOVA, DATA, 20 * PAGE)
    driver.map(first, 1 << 40, DATA + LARGE, LARGE, level=2)
    driver.map(second, IOVA, DATA, PAGE)
    pc.guest.cpu.flush()
    pc.host.end(signal.SIGKILL)
    until("the guest knows", lambda: pc.guest.link.status()["host"]["lost"])
    driver.unmap(first, IOVA, 10 * PAGE)
    driver.map(second, IOVA + PAGE, DATA, PAGE)
    pc.guest.cpu.flush()
    pc.host = start_host(topology=topology("type1v2"))
    until("it is back", lambda: pc.guest.link.status()["host"]["connected"])
    assert pc.same(first, NIC, IOVA) == 10 + 512 and pc.same(second, EDU) == 2
    pc.guest.bring_up(NIC, EDU)
    pc.stores(IOVA + 10 * PAGE, DATA + 10 * PAGE)
    pc.stores(IOVA, None)


def test_a_device_is_unplugged_while_it_writes(pc: Pc) -> None:
    driver, first, second = pc.start()
    driver.map(first, IOVA, DATA, 16 * PAGE)
    driver.map(second, IOVA, DATA, PAGE)
    pc.guest.burst().start(IOVA, 64, 16, stride=PAGE, span=16, pattern=PATTERN, command=FOREVER)
    until("it writes", lambda: pc.guest.burst().result().completed > 16)
    devices: Any = pc.guest.link.document(control.DeviceList())
    assert [device["state"] for device in devices["devices"]].count("running") == 3
    pc.guest.link.ask(control.DeviceDel(NIC))
    assert pc.locked == 1
    driver.map(first, IOVA + 32 * PAGE, DATA, PAGE)
    driver.unmap(first, IOVA, 8 * PAGE)
    pc.guest.cpu.flush()
    pc.guest.link.ask(control.DeviceAdd(msgspec.json.encode(pc.guest.assigned(0, 1)[0])))
    assert pc.same(first, NIC, IOVA) == 9
    pc.guest.bring_up(NIC)
    pc.stores(IOVA + 32 * PAGE, DATA)
    pc.stores(IOVA, None)


def test_a_reset_gives_memory_back_as_it_is(pc: Pc) -> None:
    at_start = pc.locked
    driver, first, _ = pc.start()
    driver.map(first, IOVA, DATA, 16 * PAGE)
    pc.guest.cpu.flush()
    pc.guest.link.ask(control.Reset())
    assert pc.locked == at_start
    pc.guest.bring_up(NIC)
    pc.stores(DATA + PAGE, DATA + PAGE)
    pc.stores(IOVA, None)


def test_explain_tells_both_stages(pc: Pc) -> None:
    driver, first, _ = pc.start()
    driver.map(first, IOVA, DATA, PAGE)
    pc.guest.cpu.flush()
    host = Link(pc.host.directory, "hostd")
    try:
        nic = choose_device(devices(pc.guest.link), "01:00.0")
        found = explain(pc.guest.link, host, nic, IOVA + 5)
        assert (found.fails, found.disagreement, found.guest.result) == ("none", "", DATA + 5)
        steps = [step.what for step in found.guest.steps]
        assert steps[-8:-2] == ["domain", *(f"level {level} entry" for level in (4, 3, 2, 1)), "page"]
        assert found.host is not None and found.host.page_size == found.guest.page_size == PAGE
        pc.guest.cpu.mmio_write(first.table.slot(IOVA), 8, 0)  # the guest has not said so yet
        pc.guest.cpu.flush()
        found = explain(pc.guest.link, host, nic, IOVA)
        assert found.fails == "stage-1" and "the host still has one" in found.disagreement
        driver.flush(first, IOVA, PAGE)
        pc.guest.cpu.flush()
        found = explain(pc.guest.link, host, nic, IOVA)
        assert found.fails == "stage-1" and not found.disagreement
    finally:
        host.close()
