"""How a migration is asked for and what is told of it: QEMU's names on both sides."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from deploy.link import CommandFailed
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import EDU, NIC, OWN, pair, topology
from tests.processes.rig import until


class Qmp:
    """A QMP client of ``path``: the events that came."""

    def __init__(self, path: Path) -> None:
        until("it listens", path.exists)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        assert b"QMP" in self._lines.readline()
        self._sock.sendall(b'{"execute": "qmp_capabilities"}\n')
        assert b"return" in self._lines.readline()

    def until(self, name: str, **data: object) -> list[tuple[str, object]]:
        """Names and data of the events up to that one."""
        found: list[tuple[str, object]] = []
        while not found or found[-1] != (name, data):
            message = msgspec.json.decode(self._lines.readline())
            if "event" in message:
                found.append((message["event"], message.get("data", {})))
        return found

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_over_tcp_with_events_to_a_machine_that_runs_at_once(start_host: Callable[..., HostProcess]) -> None:
    host = start_host(topology=topology("spapr-v2"))
    monitors = [[{"path": str(host.directory / f"{n}.qmp"), "server": True}] for n in range(2)]
    with pair(host, monitors=monitors[0]) as both:
        uri = f"tcp:127.0.0.1:{_free_port()}"
        source, target = both.source, both.make_target(uri, monitors=monitors[1])
        source.bring_up(NIC, EDU, OWN)
        clients = [Qmp(host.directory / f"{n}.qmp") for n in range(2)]
        for guest in (source, target):
            guest.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        assert target.ask("query-status") == {"status": "inmigrate", "running": False}
        channel = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": uri.rpartition(":")[2]}
        source.ask("migrate", channels=[{"channel-type": "main", "addr": channel}])
        told = clients[0].until("MIGRATION", status="completed")
        names = [data["status"] if name == "MIGRATION" else name for name, data in told]  # type: ignore[index]
        assert [name for name in names if name != "MIGRATION_PASS"] == [
            "setup",
            "active",
            "STOP",
            "device",
            "completed",
        ]
        told = clients[1].until("RESUME")
        assert told == [("MIGRATION", {"status": "active"}), ("MIGRATION", {"status": "completed"}), ("RESUME", {})]
        assert target.state == "running" and source.state == "postmigrate"
        info = source.ask("query-migrate")
        assert {"status", "total-time", "setup-time", "downtime", "ram"} == set(info)
        ram = info["ram"]
        assert ram["total"] == 64 << 20 and 0 < ram["transferred"] < 8 << 20 and ram["remaining"] == 0
        assert "completed" in str(source.ask("human-monitor-command", command_line="info migrate"))
        with pytest.raises(CommandFailed, match="not here"):
            source.put(0, 0)
        source.ask("cont")
        assert source.state == "running", "QEMU lets it, too"
        for client in clients:
            client.close()


def test_a_deferred_destination_is_told_where(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("type1v2"))) as both:
        source, target = both.source, both.make_target("defer")
        source.bring_up(NIC, EDU)
        for guest, text in ((source, "'-incoming' was not specified"), (target, "not a valid migration URI")):
            with pytest.raises(CommandFailed, match=text):
                guest.ask("migrate-incoming", uri="nowhere")
        with pytest.raises(CommandFailed, match="waiting for an incoming migration"):
            target.ask("migrate", uri=f"unix:{both.path}")
        target.ask("stop")
        target.ask("migrate-incoming", uri=f"unix:{both.path}", exit_on_error=False)
        with pytest.raises(CommandFailed, match="already been started"):
            target.ask("migrate-incoming", uri=f"unix:{both.path}")
        assert target.ask("query-migrate") == {"status": "setup"}
        with pytest.raises(CommandFailed, match="not here"):
            target.step(1000)
        source.ask("migrate", uri=f"unix:{both.path}")
        assert source.migrated("completed", "failed")["status"] == "completed"
        until("it is there", lambda: target.state == "paused")


def test_who_wants_to_look_at_a_destination_that_failed_may(start_host: Callable[..., HostProcess]) -> None:
    with pair(start_host(topology=topology("spapr-v2"))) as both:
        target = both.make_target("defer")
        target.ask("migrate-incoming", uri=f"unix:{both.path}", exit_on_error=False)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(both.path))
            client.sendall(b"\1\0\0\0\4abcdabcd")
            assert client.makefile("rb").readline().startswith(b"failed: ")
        info = target.migrated("failed")
        assert "checksum" in info["error-desc"] and target.state == "inmigrate"
        target.ask("quit")
        assert target.popen.wait(20) == 0
