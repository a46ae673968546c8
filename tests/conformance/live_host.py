"""``hostd container`` as a process, and clients of it over guestd's port.

One process serves all tests of a worker. Between tests nothing of a client may be left in it: no open file, no mm, no
locked page. Nothing here sleeps: the host's status is asked until it says so, and each question is a round trip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from guestd.port import UNLIMITED, WirePort
from guestd.remote import VfioUserDevice
from protocols.control import messages as control
from protocols.port import files
from protocols.transport.channel import DealerChannel
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.shm import MappedMemory, create_memory
from protocols.transport.zmq import DealerClient
from tests.conformance.framing import client_of
from vfio_model.host.topology import HostTopology
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva

SECONDS = 20.0
QUESTIONS = 20_000


class LiveHost:
    """A host of ``topology`` in a process of its own, with a runtime directory below ``base``."""

    def __init__(self, base: Path, topology: HostTopology) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vm-", dir=base))
        path, self._log = self.directory / "topology.json", self.directory / "hostd.log"
        path.write_bytes(msgspec.json.encode(topology))
        command = [sys.executable, "-m", "hostd", "container", "--die-with-parent"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--dir", str(self.directory), "--topology", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.loop = Loop()
        self._control: DealerChannel[control.FromRole, control.ToRole] = DealerChannel(
            DealerClient(self.directory / "hostd.ctl"), control.RESPONSES, control.REQUESTS
        )
        self._answers: list[control.Answer | control.BatchDone] = []
        self.loop.register(self._control, self._answered, served=True)
        self._ask(control.Hello())

    def _answered(self) -> None:
        answer = self._control.receive()
        if isinstance(answer, control.Response):
            self._answers.append(answer.answer)

    def _ask(self, command: control.Command) -> control.Answer | control.BatchDone:
        self._control.send(control.Request(1, 0, command))
        self.loop.serve_until(lambda: bool(self._answers), SECONDS, "hostd", type(command).__name__)
        return self._answers.pop()

    def until(self, condition: Callable[[dict[str, object]], bool]) -> dict[str, object]:
        """Its status, as soon as ``condition`` holds."""
        for _ in range(QUESTIONS):
            answer = self._ask(control.Status())
            assert isinstance(answer, control.Document)
            status: dict[str, object] = msgspec.json.decode(answer.json)
            if condition(status):
                return status
        raise AssertionError(f"hostd does not come to rest: {status}\n{self._log.read_text()}")

    def until_empty(self) -> None:
        """Return when it has nothing of any client."""
        status = self.until(lambda status: not (status["connections"] or status["mms"] or status["devices"]))
        assert status["locked_vm"] == 0 and not status["files"]

    def close(self) -> None:
        """End it in order."""
        self.loop.unregister(self._control)
        self._control.close()
        self.loop.close()
        self._process.terminate()
        assert self._process.wait(SECONDS) == 0, self._log.read_text()
        shutil.rmtree(self.directory)


class WireClient:
    """One client: guestd's port, with memory in memfds."""

    def __init__(self, host: LiveHost, memlock: int | None, name: str) -> None:
        self._host, self._name = host, name
        self._memory: list[tuple[MappedMemory, RAMBlock]] = []
        limit = UNLIMITED if memlock is None else memlock
        self.port = WirePort(host.directory, host.loop, self._device, name=name, memlock=limit)

    def _device(self, message: files.DeviceFd, stream: int, process: Pidfd) -> VfioUserDevice:
        return client_of(stream, self._host.loop, message.name, process, lives_for_us=True)

    def memory(self, name: str, size: int, hva: int, page_size: int = 0x1_0000) -> RAMBlock:
        memory = create_memory(name, size)
        block = RAMBlock(name, memory.view, page_size=page_size, hva=Hva(hva), fd=memory.fd)
        self._memory.append((memory, block))
        self.port.declare_memory(block)
        return block

    def locked_vm(self) -> int:
        """As the host's status says."""
        mms = self._host.until(lambda _: True)["mms"]
        assert isinstance(mms, list)
        return int(next(mm["locked_vm"] for mm in mms if mm["name"] == self._name))

    def settle(self) -> None:
        """What a device rang before it answered can be read by now."""
        for _ in range(3):
            self._host.loop.run_once(0.0)

    def close(self) -> None:
        """As at the end of a process: everything at once."""
        self.port.close_all()
        for memory, block in self._memory:
            block.view.release()
            memory.close()


class WireHost:
    """``host`` as one test sees it."""

    def __init__(self, host: LiveHost) -> None:
        self._host = host
        self._clients: list[WireClient] = []

    def client(self, memlock: int | None = None) -> WireClient:
        client = WireClient(self._host, memlock, f"{os.getpid()}-{len(self._clients)}")
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._host.until_empty()


class LiveHosts:
    """The host processes of this worker: one for each topology, started when it is first needed."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._hosts: dict[bytes, LiveHost] = {}

    def get(self, topology: HostTopology) -> LiveHost:
        """The process for ``topology``."""
        key = msgspec.json.encode(topology)
        if key not in self._hosts:
            self._hosts[key] = LiveHost(self._base, topology)
        return self._hosts[key]

    @contextmanager
    def running(self, topology: HostTopology) -> Iterator[WireHost]:
        """An adapter: a hostd in a process of its own, reached as guestd reaches it."""
        running = WireHost(self.get(topology))
        try:
            yield running
        finally:
            running.close()

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()
