"""A migration that fails: the machine goes on where it was, with its devices, and can be migrated again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.link import CommandFailed
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import EDU, NIC, GuestProcess, Pair, Proxy, pair, topology
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst

pytestmark = [pytest.mark.machine, pytest.mark.long]

PAGE, MIB = 4096, 1 << 20
GPA, IOVA = 0x100_0000, 0x10_0000
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
Change = Callable[[int, bytes], bytes]


def busy(both: Pair) -> None:
    """The source's device writes without pause."""
    source = both.source
    source.bring_up(NIC, EDU)
    for page in range(16):
        source.put(IOVA + page * PAGE, GPA + page * PAGE | 3)
    source.burst().start(IOVA, 64, 16, stride=PAGE, pattern=1, command=FOREVER)
    source.cpu.flush()
    source.ram.write(GPA + MIB, bytes(range(256)) * (4 * MIB // 256))


def still_works(source: GuestProcess) -> None:
    """The machine runs here: its time passes, its device writes, mappings come and go, and everybody is told."""
    assert source.state == "running"
    before = source.burst().result()
    until("the device writes", lambda: source.burst().result().completed > before.completed)
    assert not before.failed
    source.put(IOVA + 3 * PAGE, 0)
    source.ram.write(GPA + 3 * PAGE, b"left alone")
    until("it goes on", lambda: source.burst().result().failed > 0)
    assert source.ram.read(GPA + 3 * PAGE, 10) == b"left alone"
    source.put(IOVA + 3 * PAGE, GPA + 3 * PAGE | 3)
    until("it writes there again", lambda: source.ram.read(GPA + 3 * PAGE, 10) != b"left alone")
    now = source.link.status()["clock_ns"]
    source.step(1000)
    assert source.link.status()["clock_ns"] == now + 1000
    source.burst().start(IOVA, 64, 16, stride=PAGE, pattern=1, command=FOREVER)
    source.burst().stop()
    source.burst().start(IOVA, 64, 16, stride=PAGE, pattern=1, command=FOREVER)
    source.cpu.flush()


def through(both: Pair, change: Change, end: int | None = None) -> tuple[Any, Proxy]:
    """Migrate through a proxy; how it ended at the source."""
    both.make_target()
    path = both.host.directory / "proxy.sock"
    path.unlink(missing_ok=True)
    proxy = Proxy(path, both.path, change, end)
    both.source.ask("migrate", uri=f"unix:{path}")
    info = both.source.migrated("completed", "failed")
    proxy.close()
    return info, proxy


def nothing(_sent: int, data: bytes) -> bytes:
    return data


def cut(at: int) -> tuple[Change, int | None]:
    """Nothing behind byte ``at`` arrives, and then the connection ends."""
    return nothing, at


def flip(at: int) -> tuple[Change, int | None]:
    """One bit of byte ``at`` is another."""

    def change(sent: int, data: bytes) -> bytes:
        if not sent <= at < sent + len(data):
            return data
        return data[: at - sent] + bytes([data[at - sent] ^ 0x10]) + data[at - sent + 1 :]

    return change, None


def test_an_altered_or_cut_stream_is_refused_and_the_source_goes_on(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("spapr-v2"))) as both:
        busy(both)
        length = 4 * MIB
        for change in (cut(10), flip(40), flip(length // 2), cut(length // 2), flip(length), cut(length)):
            info, proxy = through(both, *change)
            assert info["status"] == "failed" and "destination" in info["error-desc"], (info, proxy.sent)
            assert both.target.popen.wait(20) == 1
            assert "load of migration failed" in both.target.log.read_text()
            still_works(both.source)
        info, proxy = through(both, nothing)
        assert info["status"] == "completed" and proxy.sent > length
        both.target.bars = both.source.bars
        until("it goes on there", lambda: both.target.state == "running")
        still_works(both.target)


def test_sections_that_are_cut_or_altered_stop_nothing_for_good(start_host: Callable[..., HostProcess]) -> None:
    """The machine stands already when these bytes go."""
    with pair(start_host(topology=topology("type1v2"))) as both:
        busy(both)
        both.source.ask("stop")
        both.source.burst().stop()
        both.make_target(paused=True)
        whole = len(_recorded(both))
        both.source.ask("cont")
        for back, alter in ((1, flip), (2000, flip), (9000, cut), (5, cut), (100_000, flip)):
            both.source.ask("stop")
            info, _ = through(both, *alter(whole - back))
            assert info["status"] == "failed" and both.source.state == "paused"
            assert both.target.popen.wait(20) == 1
            both.source.ask("cont")
            both.source.burst().start(IOVA, 64, 16, stride=PAGE, pattern=1, command=FOREVER)
            still_works(both.source)
            both.source.burst().stop()


def _recorded(both: Pair) -> bytes:
    """The stream of a machine that stands, by a migration that the recorder refuses at its end."""
    recorded = bytearray()

    def change(_sent: int, data: bytes) -> bytes:
        recorded.extend(data)
        return b""

    path = both.host.directory / "recorder.sock"
    proxy = Proxy(path, both.path, change)
    both.source.ask("migrate", uri=f"unix:{path}")
    sizes: list[int] = []

    def quiet() -> bool:
        sizes.append(len(recorded))
        return len(sizes) > 200 and sizes[-1] == sizes[-200]

    until("everything is there", quiet)
    both.target.popen.kill()
    assert both.source.migrated("failed")["status"] == "failed"
    proxy.close()
    both.path.unlink(missing_ok=True)
    return bytes(recorded)


@pytest.mark.parametrize("kind", ["spapr-v2", "type1v2"])
def test_a_destination_that_dies_or_is_not_there(start_host: Callable[..., HostProcess], kind: str) -> None:
    with pair(start_host(topology=topology(kind))) as both:
        busy(both)
        both.source.ask("migrate", uri=f"unix:{both.path}")
        info = both.source.migrated("failed")
        assert "Failed to connect to" in info["error-desc"]
        still_works(both.source)
        for number in (signal.SIGKILL, signal.SIGTERM):
            target = both.make_target()
            both.source.ask("migrate-set-parameters", max_bandwidth=2 * MIB, downtime_limit=0)
            both.source.ask("migrate", uri=f"unix:{both.path}")
            until("it is under way", lambda: both.source.ask("query-migrate").get("ram", {}).get("transferred", 0))
            target.popen.send_signal(number)
            assert both.source.migrated("failed", "completed")["status"] == "failed"
            still_works(both.source)
            target.popen.wait(20)
            Path(both.path).unlink(missing_ok=True)
        assert both.host.until(lambda status: len(status["mms"]) == 1)  # type: ignore[arg-type]


def test_a_migration_can_be_cancelled_and_begun_again(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("type1v2"))) as both:
        busy(both)
        source, target = both.source, both.make_target()
        source.ask("migrate-set-parameters", max_bandwidth=2 * MIB, downtime_limit=0)
        source.ask("migrate", uri=f"unix:{both.path}")
        until("it is under way", lambda: source.ask("query-migrate").get("ram", {}).get("transferred", 0))
        for command in ("migrate", "device_del"):
            with pytest.raises(CommandFailed, match=r"in progress|while migrating"):
                source.ask(command, **({"id": NIC} if command == "device_del" else {"uri": "unix:/x"}))
        assert source.ask("migrate_cancel") == {}
        assert source.ask("query-migrate")["status"] == "cancelled"
        assert target.popen.wait(20) == 1
        still_works(both.source)
        source.ask("migrate-set-parameters", max_bandwidth=0, downtime_limit=300)
        both.make_target()
        source.ask("migrate", uri=f"unix:{both.path}")
        assert source.migrated("completed", "failed")["status"] == "completed"
        with pytest.raises(CommandFailed, match="paused due to previous migration"):
            source.ask("migrate", uri=f"unix:{both.path}")
