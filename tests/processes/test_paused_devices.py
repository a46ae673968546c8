"""``stop`` stops the devices of other processes too, in the midst of what they do, and ``cont`` lets them go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import EDU, NIC, REMOTE, GuestProcess, Mute, Pair, pair, topology
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.devices.edu import regs as edu

pytestmark = pytest.mark.machine

PAGE, MIB = 4096, 1 << 20
GPA, IOVA = 0x100_0000, 0x10_0000
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
PLACES = {NIC: 0, REMOTE: MIB}
"""Where each burst writes, behind GPA and IOVA."""
MARK = b"left alone"


@pytest.fixture(params=["spapr-v2", "spapr-v1", "type1v2", "type1"])
def both(request: pytest.FixtureRequest, start_host: Callable[..., HostProcess]) -> Iterator[Pair]:
    with pair(start_host(topology=topology(request.param)), remote="dma-burst", container=request.param) as made:
        yield made


def begin(source: GuestProcess) -> None:
    """Both bursts run for ever, over one page each; an edu is in the midst of a transfer."""
    source.bring_up(NIC, EDU, REMOTE)
    for name, offset in PLACES.items():
        source.put(IOVA + offset, GPA + offset | 3)
        source.burst(name).start(IOVA + offset, 64, 64, stride=64, pattern=1, command=FOREVER)
    source.put(IOVA + 2 * MIB, GPA + 2 * MIB | 3)
    source.edu().start_dma(edu.BUFFER_ADDRESS, IOVA + 2 * MIB, 256, to_ram=True)
    source.cpu.flush()
    writes(source)


def mark(source: GuestProcess) -> None:
    for offset in PLACES.values():
        source.ram.write(GPA + offset, MARK)


def writes(source: GuestProcess) -> None:
    """What is marked is written over by both."""
    mark(source)
    for name, offset in PLACES.items():
        until(f"{name} writes", lambda offset=offset: source.ram.read(GPA + offset, len(MARK)) != MARK)  # type: ignore[misc]


def rests(source: GuestProcess) -> None:
    """Nothing is written: each question takes longer than a round of a burst."""
    mark(source)
    for _ in range(50):
        source.ask("query-status")
    for name, offset in PLACES.items():
        assert source.ram.read(GPA + offset, len(MARK)) == MARK, f"{name} has written"


def test_a_device_in_the_midst_of_a_burst_rests_while_the_machine_is_stopped(both: Pair) -> None:
    source = both.source
    begin(source)
    for _ in range(3):
        source.ask("stop")
        assert source.state == "paused"
        rests(source)
        before = {name: source.burst(name).result() for name in PLACES}
        assert before == {name: source.burst(name).result() for name in PLACES}
        source.step(200_000_000)
        assert source.ram.read(GPA + 2 * MIB, 256) == bytes(256), "an edu's timer rests with the clock"
        source.ask("stop")
        source.ask("cont")
        writes(source)
        assert all(source.burst(name).result().failed == 0 for name in PLACES)


def test_a_failed_migration_of_a_stopped_machine_leaves_it_stopped(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("spapr-v2")), remote="dma-burst") as both:
        source, mute = both.source, Mute(both.path, 1 << 40)
        begin(source)
        source.ask("stop")
        source.ask("migrate", uri=f"unix:{both.path}")
        until("it waits for the end", lambda: source.ask("query-migrate").get("x-idle-time", 0) > 10)
        source.ask("migrate_cancel")
        mute.close()
        assert source.state == "paused"
        rests(source)
        source.ask("cont")
        writes(source)


def test_a_stopped_machine_arrives_stopped_with_its_devices(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("spapr-v2")), remote="dma-burst") as both:
        source, target = both.source, both.make_target()
        begin(source)
        source.ask("stop")
        rests(source)
        source.ask("migrate", uri=f"unix:{both.path}")
        assert source.migrated("completed", "failed")["status"] == "completed"
        assert until("it is there", lambda: target.state != "inmigrate" and target.state) == "paused"
        target.bars = source.bars
        rests(target)
        target.ask("cont")
        writes(target)
        rests(source)


def test_a_device_that_has_died_does_not_keep_a_machine_from_stopping(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("spapr-v2")), remote="dma-burst") as both:
        source = both.source
        begin(source)
        nic = next(
            int(each["pid"])
            for each in both.host.status()["devices"]  # type: ignore[attr-defined]
            if each["name"] == "0000:01:00.0"
        )
        os.kill(nic, signal.SIGKILL)
        until("it is gone", lambda: not psutil.pid_exists(nic))
        source.ask("stop")
        rests(source)
        source.ask("cont")
        assert source.state == "running"
        before = source.burst(REMOTE).result().completed
        until("the other goes on", lambda: source.burst(REMOTE).result().completed > before)
