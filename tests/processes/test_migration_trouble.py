"""A migration meets what else happens to machines: messages, resets, hosts and sources that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from deploy.link import CommandFailed
from protocols.control import messages as control
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import ADDRESSES, EDU, NIC, Pair, pair, topology
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.devices.edu import regs as edu
from vfio_model.guest_drivers.pci import RtasConfig, enable_msi
from vfio_model.iommu.spapr import regs

pytestmark = pytest.mark.machine

PAGE, MIB = 4096, 1 << 20
GPA, IOVA = 0x100_0000, 0x10_0000
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER


def slowly(both: Pair, uri: str = "") -> None:
    """Begin a migration that takes long."""
    source = both.source
    source.ram.write(GPA + MIB, os.urandom(8 * MIB))
    source.ask("migrate-set-parameters", max_bandwidth=2 * MIB, downtime_limit=0)
    source.ask("migrate", uri=uri or f"unix:{both.path}")
    until("it is under way", lambda: source.ask("query-migrate").get("ram", {}).get("transferred", 0) > MIB)


def irqs(both: Pair, name: str) -> int:
    """Interrupts of a device that the target has seen."""
    answer = both.target.link.document(control.DeviceList())
    return int(next(each["irqs"] for each in answer["devices"] if each["id"] == name))  # type: ignore[index,union-attr]


@pytest.mark.parametrize("kind", ["spapr-v2", "type1v2"])
def test_messages_arrive_where_the_machine_is(start_host: Callable[..., HostProcess], kind: str) -> None:
    with pair(start_host(topology=topology(kind))) as both:
        source, target = both.source, both.make_target()
        source.bring_up(NIC, EDU)
        buid = regs.phb_buid(0)
        asked = [ADDRESSES[EDU] << 8, buid >> 32, buid & 0xFFFF_FFFF, 3, 1, 1]
        assert source.cpu.rtas(regs.RtasToken.IBM_CHANGE_MSI, asked, 4)[:2] == [0, 1]
        enable_msi(RtasConfig(source.cpu, buid), ADDRESSES[EDU], regs.MSI_WINDOW, regs.MSI_BASE)
        source.put(IOVA, GPA | 3)
        source.edu().start_dma(edu.BUFFER_ADDRESS, IOVA, 8, to_ram=True, irq=True)
        source.cpu.flush()
        source.ask("migrate", uri=f"unix:{both.path}")
        assert source.migrated("completed", "failed")["status"] == "completed"
        until("it runs there", lambda: target.state == "running")
        target.bars = source.bars
        assert irqs(both, EDU) == 0
        target.step(120_000_000)
        assert until("the message is seen", lambda: irqs(both, EDU)) == 1
        assert target.edu().interrupts() == edu.IRQ_CAUSE_DMA
        assert target.link.status()["irqs"] == {str(regs.MSI_BASE): 1}


@pytest.mark.parametrize("kind", ["spapr-v2", "type1v2"])
def test_a_machine_that_is_reset_on_its_way_arrives_reset(start_host: Callable[..., HostProcess], kind: str) -> None:
    with pair(start_host(topology=topology(kind))) as both:
        source, target = both.source, both.make_paused()
        source.bring_up(NIC, EDU)
        for page in range(16):
            source.put(IOVA + page * PAGE, GPA + page * PAGE | 3)
        source.burst().start(IOVA, 64, 16, stride=PAGE, pattern=7, command=FOREVER)
        source.cpu.flush()
        slowly(both)
        source.ask("system_reset")
        source.bring_up(NIC, EDU)
        source.put(IOVA, GPA + 12 * MIB | 3)
        source.burst().start(IOVA, 64, 1, pattern=9, command=FOREVER)
        source.cpu.flush()
        source.ask("migrate-set-parameters", max_bandwidth=0, downtime_limit=300)
        assert source.migrated("completed", "failed")["status"] == "completed"
        assert target.ram.map[:] == source.ram.map[:]
        assert target.tces(IOVA, 16, 12) == source.tces(IOVA, 16, 12)
        target.bars = source.bars
        target.ask("cont")
        assert target.ram.read(GPA + 12 * MIB, 8) == (9).to_bytes(8, "little")
        before = target.burst().result().completed
        until("it goes on", lambda: target.burst().result().completed > before)


def test_a_host_that_dies_ends_the_migration_and_not_the_guest(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("spapr-v2"))) as both:
        source, target = both.source, both.make_target()
        source.bring_up(NIC, EDU)
        source.put(IOVA, GPA | 3)
        slowly(both)
        both.host.end(signal.SIGKILL)
        source.ask("migrate-set-parameters", max_bandwidth=0)
        info = source.migrated("failed", "completed")
        assert info["status"] == "failed" and info["error-desc"]
        assert source.state == "running" and target.popen.wait(20) == 1
        source.put(IOVA + PAGE, GPA | 3)
        with pytest.raises(CommandFailed, match="gone"):
            source.ask("migrate", uri=f"unix:{both.path}")


def test_a_source_that_dies_leaves_no_half_machine(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("type1v2"))) as both:
        source, target = both.source, both.make_target()
        source.bring_up(NIC, EDU)
        slowly(both)
        source.popen.kill()
        assert target.popen.wait(20) == 1
        assert "the source has ended the stream" in target.log.read_text()
        assert both.host.until(lambda status: not status["mms"])["locked_vm"] == 0
