"""The implementations of the seam to a device that :mod:`tests.conformance.test_device_connection` runs over.

An implementation is a context that opens a device of a given model: each test has a device of its own, fresh.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.inline.device import InlineConnection, InlineDevice
from guestd.remote import VfioUserDevice
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.unix import StreamConnection
from tests.conformance.framing import client_of
from tests.conformance.live_host import LiveHosts
from vfio_model.devices import DEVICES
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.dma import BLOCKED
from vfio_model.trace import NULL_TRACE
from vfio_model.uapi.vfio import IommuType
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup
from vfio_model.vfio.region import DeviceConnection

SECONDS = 20.0


@dataclass
class Opened:
    """A connection. After :attr:`settle` everything written has been taken, and every signal has been heard."""

    connection: DeviceConnection
    settle: Callable[[], None]


Open = Callable[[str], AbstractContextManager[Opened]]


def _settle(connection: VfioUserDevice, loop: Loop) -> None:
    """What is answered after a write was posted comes after the write, and after the signals that it led to."""
    if connection.lost is None:
        connection.get_info()
    for _ in range(3):
        loop.run_once(0.0)


# -- a device object in this process ---------------------------------------------------------------------------------


@contextmanager
def inline(model: str) -> Iterator[Opened]:
    """The device is beside its user."""
    unit = InlineDevice("device", model, {}, NULL_TRACE, 0)
    later: deque[Callable[[], None]] = deque()
    unit.start(BLOCKED)
    connection = InlineConnection(unit, later.append, unit.stop)

    def settle() -> None:
        while later:
            later.popleft()()

    yield Opened(connection, settle)
    connection.close()
    assert not unit.running, "the device stops with its file"


# -- remote: a device server of its own ------------------------------------------------------------------------------


class DeviceServer:
    """``hostd device``: one device, which each client resets."""

    def __init__(self, base: Path, model: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vm-", dir=base))
        self.path = self.directory / "d.sock"
        command = [sys.executable, "-m", "hostd", "device", "--die-with-parent"]
        self._process = subprocess.Popen(
            [*command, "--model", model, "--socket", str(self.path), "--announce", "json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline())["device"] == model

    def close(self) -> None:
        """End it in order."""
        self._process.terminate()
        assert self._process.wait(SECONDS) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self.directory)


class DeviceServers:
    """The device servers of this worker, by model, started when they are first needed."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._servers: dict[str, DeviceServer] = {}

    @contextmanager
    def remote(self, model: str) -> Iterator[Opened]:
        """The device is behind a socket that its server listens at."""
        if model not in self._servers:
            self._servers[model] = DeviceServer(self._base, model)
        server, loop = self._servers[model], Loop()
        stream = StreamConnection.connect(server.path, model)
        connection = client_of(os.dup(stream.fileno()), loop, model, Pidfd.open(server.pid))
        stream.close()
        connection.reset()
        yield Opened(connection, lambda: _settle(connection, loop))
        connection.close()
        loop.close()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


# -- assigned: a device process of the host --------------------------------------------------------------------------

MODELS = tuple(sorted(DEVICES))
TOPOLOGY = HostTopology(
    groups=tuple(
        GroupSpec(26 + number, (DeviceSpec(f"0000:{number + 1:02x}:00.0", model),))
        for number, model in enumerate(MODELS)
    )
)


@contextmanager
def assigned(hosts: LiveHosts, model: str) -> Iterator[Opened]:
    """The device is a process of the host, opened through a group of an attached container."""
    spec = next(group for group in TOPOLOGY.groups if group.devices[0].model == model)
    host = hosts.get(TOPOLOGY)
    with hosts.running(TOPOLOGY) as running:
        port = running.client().port
        container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
        group = VfioGroup(port, port.open(f"/dev/vfio/{spec.id}"))
        group.set_container(container.handle)
        container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)
        connection = port.take_device(group.get_device_fd(spec.devices[0].name))
        assert isinstance(connection, VfioUserDevice), "what the client's port makes"
        yield Opened(connection, lambda: _settle(connection, host.loop))
        connection.close()


def implementations(hosts: LiveHosts, servers: DeviceServers) -> dict[str, Open]:
    """Every implementation by name; ``hosts`` and ``servers`` are the processes of this worker."""
    return {"inline": inline, "remote": servers.remote, "assigned": lambda model: assigned(hosts, model)}


EXPECTED = ("inline", "remote", "assigned")
"""Every test that asks for an ``opened`` device runs over each of these."""
