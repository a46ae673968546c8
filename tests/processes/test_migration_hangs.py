"""A destination that stops reading, dies, or says nonsense: the guest goes on at once when the operator says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deploy.link import CommandFailed, Link
from deploy.live import ControlCpu
from protocols.transport.loop import DEADLINE_SCALE_VARIABLE
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import GuestProcess, Mute, Pair, pair, topology
from tests.processes.rig import until
from tests.processes.test_migration_faces import Qmp
from tests.processes.test_migration_failures import FOREVER, GPA, IOVA, MIB, busy, still_works
from vfio_model.iommu.spapr import regs

pytestmark = pytest.mark.machine

EVERYTHING = 1 << 40
CANCELS: list[Callable[[GuestProcess], object]] = [
    lambda source: source.ask("migrate_cancel"),
    lambda source: source.ask("human-monitor-command", command_line="migrate_cancel"),
]


@pytest.fixture
def both(start_host: Callable[..., HostProcess]) -> Iterator[Pair]:
    with pair(start_host(topology=topology("spapr-v2"))) as made:
        busy(made)
        yield made


def info(source: GuestProcess) -> Any:
    return source.ask("query-migrate")


def hangs(source: GuestProcess) -> Any:
    """``query-migrate``, once it says that the destination has taken nothing for a while."""
    return until("it hangs", lambda: (found := info(source)).get("x-idle-time", 0) > 200 and found)


@pytest.mark.parametrize("cancel", CANCELS, ids=["qmp", "hmp"])
def test_a_destination_that_reads_nothing_is_seen_and_left_at_once(both: Pair, cancel: Callable[..., object]) -> None:
    source, mute = both.source, Mute(both.path)
    source.ask("migrate", uri=f"unix:{both.path}")
    first = hangs(source)
    assert first["status"] == "active" and first["ram"]["remaining"] > 0 and source.state == "running"
    before = source.burst().result().completed
    until("the device goes on", lambda: source.burst().result().completed > before)
    later = until("it still hangs", lambda: info(source)["x-idle-time"] > first["x-idle-time"] and info(source))
    assert later["ram"]["transferred"] == first["ram"]["transferred"]
    cancel(source)
    assert info(source)["status"] == "cancelled"
    still_works(source)
    mute.close()


@pytest.mark.parametrize("cancel", CANCELS, ids=["qmp", "hmp"])
def test_who_never_says_that_it_has_loaded_is_left_at_once(both: Pair, cancel: Callable[..., object]) -> None:
    source, mute = both.source, Mute(both.path, EVERYTHING)
    before = source.burst().result()
    source.ask("migrate", uri=f"unix:{both.path}")
    assert hangs(source)["status"] == "device" and source.state == "finish-migrate"
    for command in ("cont", "system_reset"):
        with pytest.raises(CommandFailed, match="Migration is not finalized yet"):
            source.ask(command)
    kept = source.ram.read(GPA, 64)
    source.ram.write(GPA, b"left alone")
    for _ in range(20):
        assert info(source)["status"] == "device"
    assert source.ram.read(GPA, 10) == b"left alone"
    source.ram.write(GPA, kept)
    with meanwhile(source) as cpu:
        done: list[int] = []
        call = threading.Thread(
            target=lambda: done.append(cpu.hcall(regs.HCall.H_PUT_TCE, regs.pci_liobn(0, 0), IOVA + 20 * 4096, 0)[0])
        )
        call.start()
        for _ in range(20):
            assert info(source)["status"] == "device" and not done, "a CPU waits"
        cancel(source)
        call.join(20)
        assert done == [0], "and goes on where the machine is"
    assert info(source)["status"] == "cancelled" and source.burst().result().completed >= before.completed
    still_works(source)
    mute.close()


class meanwhile:
    """Another CPU's link to the guest."""

    def __init__(self, guest: GuestProcess) -> None:
        self._link = Link(guest.directory, "guestd", seconds=30.0)

    def __enter__(self) -> ControlCpu:
        return ControlCpu(self._link)

    def __exit__(self, *_: object) -> None:
        self._link.close()


def test_a_machine_that_stands_does_not_wait_for_ever(
    start_host: Callable[..., HostProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEADLINE_SCALE_VARIABLE, "0.1")
    with pair(start_host(topology=topology("type1v2"))) as both:
        busy(both)
        mute = Mute(both.path, EVERYTHING)
        both.source.ask("migrate", uri=f"unix:{both.path}")
        ended = both.source.migrated("failed", "completed")
        assert ended["status"] == "failed" and "did not answer its state within 3 s" in ended["error-desc"]
        still_works(both.source)
        mute.close()


@pytest.mark.parametrize("limit", [100_000, EVERYTHING], ids=["early", "at the end"])
def test_a_destination_that_dies_is_noticed(both: Pair, limit: int) -> None:
    mute = Mute(both.path, limit)
    both.source.ask("migrate", uri=f"unix:{both.path}")
    hangs(both.source)
    mute.close()
    ended = both.source.migrated("failed", "completed")
    assert ended["status"] == "failed" and "destination is gone" in ended["error-desc"]
    still_works(both.source)


@pytest.mark.parametrize(
    ("says", "limit", "why"),
    [
        (b"\xff" * 100_000, 0, "does not speak this protocol"),
        (b"loaded\n", 0, "answers what it has not been given"),
        (b"loaded\nloaded\n", EVERYTHING, "protocol|not been given"),
        (b"failed: no room\n", 0, "the destination refused: no room"),
    ],
    ids=["garbage", "too early", "twice", "refusal"],
)
def test_a_destination_that_says_nonsense_gets_no_machine(both: Pair, says: bytes, limit: int, why: str) -> None:
    mute = Mute(both.path, limit, says)
    both.source.ask("migrate-set-parameters", max_bandwidth=4 * MIB)
    both.source.ask("migrate", uri=f"unix:{both.path}")
    ended = both.source.migrated("failed", "completed")
    assert ended["status"] == "failed"
    assert any(each in ended["error-desc"] for each in why.split("|"))
    still_works(both.source)
    mute.close()


def test_a_cancelled_migration_is_told_in_two_steps(start_host: Callable[..., HostProcess]) -> None:
    host = start_host(topology=topology("spapr-v2"))
    path = host.directory / "source.qmp"
    with pair(host, monitors=[{"path": str(path), "server": True}]) as both:
        busy(both)
        client, mute = Qmp(path), Mute(both.path)
        both.source.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        both.source.ask("migrate", uri=f"unix:{both.path}")
        client.until("MIGRATION", status="active")
        both.source.ask("migrate_cancel")
        told = client.until("MIGRATION", status="cancelled")
        assert told == [("MIGRATION", {"status": status}) for status in ("cancelling", "cancelled")]
        both.source.burst().start(IOVA, 64, 16, stride=4096, pattern=1, command=FOREVER)
        client.close()
        mute.close()
