"""A machine moves between two processes while its devices do DMA, or does not, and goes on where it was."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from deploy.link import CommandFailed
from protocols.control import messages as control
from tests.processes.conftest import HostProcess, control_call
from tests.processes.migration_rig import ADDRESSES, EDU, NIC, OWN, RAM, GuestProcess, Pair, pair, topology
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.devices.edu import regs as edu
from vfio_model.iommu.spapr import regs

pytestmark = pytest.mark.machine

PAGE, MIB = 4096, 1 << 20
GPA, LIST = 0x100_0000, 0x8_0000
IOVA, EDU_IOVA, OWN_IOVA = 0x10_0000, 0x20_0000, 0x21_0000
DMA64 = 1 << 59
LIOBN64 = regs.pci_liobn(0, 1)
PATTERN = 0x1122_3344_5566_7788
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
PAGES = 64
TRACKINGS = [("spapr-v2", True), ("spapr-v2", False), ("spapr-v1", True), ("type1v2", True), ("type1v2", False)]
"""The devices note what they write, or the container does (type1v2), or nobody: then everything counts."""


def prepared(both: Pair) -> GuestProcess:
    """The source with a running burst, edu transfers under way and a second window."""
    source = both.source
    source.bring_up(NIC, EDU, OWN)
    for page in range(PAGES):
        source.put(IOVA + page * PAGE, GPA + page * PAGE | 3)
    source.put(EDU_IOVA, GPA + MIB | 3)
    source.put(OWN_IOVA, GPA + MIB + PAGE | 3)
    source.ram.write(GPA + 2 * MIB, random.Random(1).randbytes(8 * MIB))
    buid = regs.phb_buid(0)
    pe = [ADDRESSES[NIC] << 8, buid >> 32, buid & 0xFFFF_FFFF]
    status = source.cpu.rtas(regs.RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*pe, 16, 25], 4)
    if not status[0]:
        source.put(DMA64 + 0x1_0000, GPA + 4 * MIB | 3, LIOBN64)
    nic = source.burst()
    nic.start(IOVA, 64, 32, stride=PAGE, span=PAGES, pattern=PATTERN, command=FOREVER)
    until("the burst has written every page", lambda: nic.result().completed > PAGES)
    for name in (EDU, OWN):
        source.edu(name).load(IOVA + 5 * PAGE, 512)
    for name, at in ((EDU, EDU_IOVA), (OWN, OWN_IOVA)):
        source.edu(name).start_dma(edu.BUFFER_ADDRESS, at, 256, to_ram=True, irq=True)
    source.step(30_000_000)
    return source


def host_map(host: HostProcess, number: int, iovas: list[int]) -> list[tuple[bool, str, int]]:
    """For each bus address what the host's table of guest ``number``'s container grants."""
    found = []
    for iova in iovas:
        answer = control_call(host.directory, "hostd", control.Explain(f"0000:01:{2 * number:02x}.0", iova))
        assert isinstance(answer, control.Document)
        document: Any = msgspec.json.decode(answer.json)
        found.append((document["result"] is not None, document["perm"], document["page_size"]))
    return found


def same_machine(both: Pair) -> None:
    """The target, which stands still, is what the source was when it stopped."""
    source, target, host = both.source, both.target, both.host
    assert target.ram.map[:] == source.ram.map[:]
    assert target.windows() == source.windows()
    iovas = [IOVA + n * PAGE for n in range(-2, PAGES + 2)] + [EDU_IOVA, OWN_IOVA, DMA64 + 0x1_0000, DMA64]
    assert host_map(host, 1, iovas) == host_map(host, 0, iovas)
    assert sum(mapped for mapped, _, _ in host_map(host, 1, iovas)) >= PAGES + 2
    statuses = [guest.link.status() for guest in (source, target)]
    assert statuses[0]["clock_ns"] == statuses[1]["clock_ns"]


def goes_on(both: Pair) -> None:
    """The target runs where the source stopped; its transfers end when they would have ended there."""
    source, target = both.source, both.target
    target.bars = source.bars
    assert target.tces(IOVA - PAGE, PAGES + 2, 12) == source.tces(IOVA - PAGE, PAGES + 2, 12)
    before = target.burst().result().completed
    until("the burst goes on", lambda: target.burst().result().completed > before)
    for name in (EDU, OWN):
        assert target.ram.read(GPA + MIB + PAGE * (name == OWN), 256) == bytes(256)
    target.step(60_000_000)
    assert target.ram.read(GPA + MIB, 256) == bytes(256), "30 and 60 ms are not 100"
    target.step(20_000_000)
    for name in (EDU, OWN):
        found = target.ram.read(GPA + MIB + PAGE * (name == OWN), 256)
        assert found == struct.pack("<Q", PATTERN) * 8 + bytes(192), name
        assert target.edu(name).interrupts() == edu.IRQ_CAUSE_DMA
    result = target.burst().stop()
    assert not result.failed
    target.put(IOVA, 0)
    target.burst().store(IOVA, 8)
    assert target.burst().result().failed == 1, "the host has unmapped it"


@pytest.mark.parametrize(("kind", "devices"), TRACKINGS)
def test_a_machine_moves_while_its_devices_write(
    start_host: Callable[..., HostProcess], kind: str, devices: bool
) -> None:
    with pair(start_host(topology=topology(kind)), dirty_tracking=devices, container=kind) as both:
        before = both.host.status()["locked_vm"]
        source, target = prepared(both), both.make_paused()
        assert target.state == "inmigrate"
        assert source.ask("migrate", uri=f"unix:{both.path}") == {}
        info = source.migrated("completed", "failed")
        assert info["status"] == "completed", info
        assert source.state == "postmigrate" and target.migrated("completed", "failed")["status"] == "completed"
        assert target.state == "paused" and info["ram"]["dirty-sync-count"] >= 2
        assert info["ram"]["remaining"] == 0 and info["downtime"] <= info["total-time"]
        same_machine(both)
        target.ask("cont")
        goes_on(both)
        source.ask("quit")
        assert source.popen.wait(20) == 0
        target.ask("quit")
        assert target.popen.wait(20) == 0
        assert both.host.until(lambda status: not status["mms"])["locked_vm"] == 0 <= before  # type: ignore[operator]


def churn(both: Pair, seed: int) -> int:
    """Until the source has left: mappings come, go and are overwritten under a device that writes all the time, CPUs
    write, its own device and a remote one do. The number of operations.
    """
    source, rng, done = both.source, random.Random(seed), 0
    with contextlib.suppress(CommandFailed):
        while True:
            index, page = rng.randrange(PAGES), rng.randrange(4 * PAGES)
            choice = rng.randrange(6)
            if choice < 2:
                source.put(IOVA + index * PAGE, GPA + page * PAGE | 3)
            elif choice == 2:
                source.put(IOVA + index * PAGE, 0)
            elif choice == 3:
                source.cpu.hcall(regs.HCall.H_STUFF_TCE, regs.pci_liobn(0, 0), IOVA + index * PAGE, 0, 4)
            elif choice == 4:
                source.cpu.write_memory(GPA + 8 * MIB + rng.randrange(2 * MIB), rng.randbytes(100))
            else:
                name = rng.choice([EDU, OWN, *source.remote])
                source.put(OWN_IOVA + PAGE, GPA + 12 * MIB + page * PAGE | 3)
                source.edu(name).start_dma(edu.BUFFER_ADDRESS, OWN_IOVA + PAGE, 512, to_ram=True)
                source.step(100_000_000)
            done += 1
            source.cpu.flush()
    return done


@pytest.mark.parametrize(("kind", "devices", "kvm"), [*((k, d, False) for k, d in TRACKINGS), ("spapr-v2", True, True)])
def test_no_page_is_lost_while_mappings_come_and_go(
    start_host: Callable[..., HostProcess], kind: str, devices: bool, kvm: bool
) -> None:
    host = start_host(topology=topology(kind))
    with pair(host, dirty_tracking=devices, container=kind, kvm=kvm, remote=True) as both:
        source, target = both.source, both.make_paused()
        source.bring_up(NIC, EDU, OWN, *source.remote)
        source.put(IOVA + 70 * PAGE, GPA + 16 * MIB | 3)
        for number, name in enumerate((EDU, OWN, *source.remote)):
            source.cpu.write_memory(GPA + 16 * MIB, bytes([number + 1]) * 512)
            source.edu(name).load(IOVA + 70 * PAGE, 512)
        source.burst().start(IOVA, 64, 1 << 40, stride=PAGE, span=PAGES, pattern=PATTERN, command=FOREVER)
        source.cpu.flush()
        source.ram.write(GPA + 20 * MIB, random.Random(1).randbytes(4 * MIB))
        source.ask("migrate-set-parameters", max_bandwidth=20 << 20, downtime_limit=0)
        source.ask("migrate", uri=f"unix:{both.path}")
        done = churn(both, len(kind))
        info = source.migrated("completed", "failed")
        assert info["status"] == "completed", info
        assert target.migrated("completed", "failed")["status"] == "completed"
        assert done > 50 and info["ram"]["dirty-sync-count"] > 5
        different = [
            hex(at) for at in range(0, RAM, PAGE) if target.ram.map[at : at + PAGE] != source.ram.map[at : at + PAGE]
        ]
        assert not different
        assert target.tces(IOVA, PAGES, 12) == source.tces(IOVA, PAGES, 12)
        target.ask("cont")
        target.bars = source.bars
        for number, name in enumerate((EDU, OWN, *target.remote)):
            target.put(OWN_IOVA + PAGE, GPA + 17 * MIB + number * PAGE | 3)
            target.edu(name).store(OWN_IOVA + PAGE, 512)
            assert target.ram.read(GPA + 17 * MIB + number * PAGE, 512) == bytes([number + 1]) * 512
