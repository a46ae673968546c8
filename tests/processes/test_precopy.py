"""Machines that migrate while devices of other processes say what they know of themselves, and go on working."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing

import pytest

from deploy.link import CommandFailed
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import EDU, NIC, OWN, REMOTE, Pair, pair, topology
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.devices.edu import regs as edu

pytestmark = pytest.mark.machine

GPA, IOVA = 4 << 20, 0x10_0000
MIB = 1 << 20
PAGES = 64
"""Always dirty: with 1 MiB/s the migration does not end by itself."""
MARK = b"kept in a device"
ATTEMPTS = 5


def prepared(both: Pair) -> None:
    """Each edu has something in its buffer."""
    source = both.source
    source.bring_up(NIC, EDU, OWN, REMOTE)
    source.put(IOVA, GPA | 3)
    source.ram.write(GPA, MARK)
    for name in (EDU, REMOTE):
        source.edu(name).start_dma(IOVA, edu.BUFFER_ADDRESS, len(MARK), to_ram=False)
    source.step(200_000_000)


def arrived(both: Pair) -> None:
    """The target's devices give it back."""
    target = both.target
    target.bars = both.source.bars
    for number, name in enumerate((EDU, REMOTE)):
        target.edu(name).start_dma(edu.BUFFER_ADDRESS, IOVA + 0x100 * (number + 1), len(MARK), to_ram=True)
        target.step(200_000_000)
        at = GPA + 0x100 * (number + 1)
        assert until("it is there", lambda at=at: target.ram.read(at, len(MARK)) == MARK and MARK) == MARK


def test_assigned_and_remote_devices_send_their_state_while_they_run(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("spapr-v2")), container="spapr-v2", remote=True) as both:
        prepared(both)
        both.make_target()
        both.source.ask("migrate", uri=f"unix:{both.path}")
        info = both.source.migrated("completed", "failed")
        assert info["status"] == "completed", info
        assert info["vfio"]["transferred"] > 2 * edu.BUFFER_SIZE, "two buffers of edu devices, and what a burst has"
        assert both.target.migrated("completed", "failed")["status"] == "completed"
        until("it runs", lambda: both.target.state == "running")
        arrived(both)


@pytest.mark.parametrize("what", ["stopped", "reset"])
def test_pre_copy_that_ends_in_between(start_host: Callable[..., HostProcess], what: str) -> None:
    """A machine that writes too seldom has moved before it could be interrupted: then another tries."""
    assert any(interrupted(start_host, what) for _ in range(ATTEMPTS))


def interrupted(start_host: Callable[..., HostProcess], what: str) -> bool:
    """Whether it was; then everything arrived."""
    host = start_host(topology=topology("spapr-v2"))
    for used in (path for path in host.directory.iterdir() if path.is_dir()):
        shutil.rmtree(used)
    with closing(host), pair(host, container="spapr-v2", remote=True) as both:
        prepared(both)
        source = both.source
        source.ask("migrate-set-parameters", max_bandwidth=1 << 20, downtime_limit=0)
        for page in range(PAGES):
            source.put(IOVA + (page + 1 << 12), GPA + MIB + (page << 12) | 3)
        forever = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
        source.burst().start(IOVA + (1 << 12), 64, 32, stride=1 << 12, span=PAGES, pattern=1, command=forever)
        both.make_target()
        source.ask("migrate", uri=f"unix:{both.path}")
        until("it is under way", lambda: source.ask("query-migrate")["status"] == "active")
        until("devices have spoken", lambda: "vfio" in source.ask("query-migrate"))
        try:
            source.ask("migrate-set-parameters", max_bandwidth=1 << 14)  # who stands still is not there at once
            if what == "stopped":
                source.ask("stop")
                source.ask("cont")
            else:
                source.ask("system_reset")
        except CommandFailed as error:
            assert "not finalized" in str(error)
            assert source.migrated("completed", "failed")["status"] == "completed"
            return False
        source.ask("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=300)
        info = source.migrated("completed", "failed")
        assert info["status"] == "completed", info
        until("it runs", lambda: both.target.state == "running")
        if what == "reset":  # after which an edu has its buffer, and nobody its mappings
            both.target.bring_up(NIC, EDU, OWN, REMOTE)
            both.target.put(IOVA, GPA | 3)
        arrived(both)
        return True
