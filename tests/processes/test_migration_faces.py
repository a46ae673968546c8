"""How a migration is asked for and what is told of it: QEMU's names on both sides."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest

from deploy.link import CommandFailed
from protocols.control import messages as control
from tests.processes.conftest import HostProcess, control_call
from tests.processes.migration_rig import EDU, NIC, OWN, pair, topology
from tests.processes.rig import until

pytestmark = pytest.mark.machine

GPA, IOVA = 0x100_0000, 0x10_0000


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

    def ask(self, name: str, arguments: dict[str, object], passed: IO[str] | socket.socket | None = None) -> Any:
        """The answer to a command with which a descriptor is passed; events before it are dropped."""
        line = msgspec.json.encode({"execute": name, "arguments": arguments}) + b"\n"
        socket.send_fds(self._sock, [line], [] if passed is None else [passed.fileno()])
        while "event" in (message := msgspec.json.decode(self._lines.readline())):
            pass
        return message

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
        assert {"status", "total-time", "setup-time", "downtime", "ram", "vfio"} == set(info)
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


def test_over_descriptors_that_monitors_pass(start_host: Callable[..., HostProcess]) -> None:
    host = start_host(topology=topology("spapr-v2"))
    paths = [host.directory / f"{n}.qmp" for n in range(2)]
    with pair(host, monitors=[{"path": str(paths[0]), "server": True}]) as both:
        source = both.source
        target = both.make_target("defer", monitors=[{"path": str(paths[1]), "server": True}])
        source.bring_up(NIC, EDU)
        source.ram.write(0x100_0000, b"comes along")
        clients, ends = [Qmp(path) for path in paths], socket.socketpair()
        with pytest.raises(CommandFailed, match="named 'stream' not found"):
            source.ask("migrate", uri="fd:stream")
        for client, end in zip(clients, ends, strict=True):
            assert "No file descriptor supplied" in client.ask("getfd", {"fdname": "stream"})["error"]["desc"]
            assert "starting with a digit" in client.ask("getfd", {"fdname": "1"}, end)["error"]["desc"]
            for _ in range(2):
                assert client.ask("getfd", {"fdname": "stream"}, end) == {"return": {}}
            assert client.ask("closefd", {"fdname": "stream"}) == {"return": {}}
            assert client.ask("getfd", {"fdname": "stream"}, end) == {"return": {}}
            end.close()
        with (host.directory / "file").open("w") as file:
            clients[0].ask("getfd", {"fdname": "file"}, file)
            assert "is no socket" in clients[0].ask("migrate", {"uri": "fd:file"})["error"]["desc"]
        assert "exec: is not supported" in clients[0].ask("migrate", {"uri": "exec:cat"})["error"]["desc"]
        target.ask("migrate-incoming", uri="fd:stream")
        clients[0].ask("migrate", {"channels": [{"channel-type": "main", "addr": FD_CHANNEL}]})
        info = source.migrated("completed", "failed")
        assert info["status"] == "completed", info
        until("it runs there", lambda: target.state == "running")
        assert target.ram.read(0x100_0000, 11) == b"comes along"
        for client in clients:
            client.close()


FD_CHANNEL = {"transport": "socket", "type": "fd", "str": "stream"}


def qtest(path: Path, line: str) -> str:
    """The answer to one qtest command."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(line.encode() + b"\n")
        return client.makefile("r").readline().strip()


def test_qtest_reads_what_is_left_and_does_nothing_where_the_machine_is_not(
    start_host: Callable[..., HostProcess],
) -> None:
    host = start_host(topology=topology("spapr-v2"))
    paths = [host.directory / f"{n}.qtest" for n in range(2)]
    with pair(host, qtest={"path": str(paths[0]), "server": True}) as both:
        source = both.source
        target = both.make_target(qtest={"path": str(paths[1]), "server": True})
        source.bring_up(NIC, EDU)
        source.put(IOVA, GPA | 3)
        source.burst().start(IOVA, 64, 1, pattern=1)
        source.cpu.flush()
        until("the burst", lambda: qtest(paths[0], f"readb {GPA:#x}") == "OK 0x0000000000000001")
        assert qtest(paths[1], f"writeb {GPA:#x} 5") == "FAIL the machine is not here: inmigrate"
        source.ask("migrate", uri=f"unix:{both.path}")
        assert source.migrated("completed", "failed")["status"] == "completed"
        until("it runs there", lambda: target.state == "running")
        tables = [host_maps(host, number) for number in range(2)]
        assert tables[0] and tables[1]
        command = source.bars[NIC] + 0x40
        for line in (f"writeb {GPA:#x} 5", f"writeq {command:#x} 0x3", "clock_step 1000", "hcall 0x20 0x80000000 0 0"):
            assert qtest(paths[0], line) == "FAIL the machine is not here: postmigrate"
        assert qtest(paths[0], f"readb {GPA:#x}") == "OK 0x0000000000000001"
        assert qtest(paths[1], f"writeb {GPA:#x} 5") == "OK"
        assert qtest(paths[1], f"readb {GPA:#x}") == "OK 0x0000000000000005"
        assert source.ram.read(GPA, 1) == b"\1" and host_maps(host, 1) == tables[1]
        source.ask("quit")
        assert source.popen.wait(20) == 0
        assert not host_maps(host, 0) and host_maps(host, 1), "what the source had open it has given back"


def host_maps(host: HostProcess, number: int) -> bool:
    """Whether the host's table of guest ``number``'s dma-burst has a page at IOVA."""
    answer = control_call(host.directory, "hostd", control.Explain(f"0000:01:{2 * number:02x}.0", IOVA))
    if isinstance(answer, control.Failed):
        return False
    assert isinstance(answer, control.Document)
    document: dict[str, object] = msgspec.json.decode(answer.json)
    return document["result"] is not None
