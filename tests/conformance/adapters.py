"""The implementations of the uapi seam that the conformance tests run over.

An adapter is a context: inside it a host of a given topology runs and gives clients, one or more; at its end every
client closes what it has, and the host has unpinned every page. Adding an adapter here is all it takes to run every
test over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import msgspec
import numpy as np

from deploy.inline.host import UNLIMITED, InlineHost, InlinePort
from deploy.inline.log import InlineLog
from tests.conformance.live_host import LiveHosts
from vfio_model.host.mm import Mm
from vfio_model.host.topology import HostTopology
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import VfioPort


class Client(Protocol):
    """One process that uses a host."""

    @property
    def port(self) -> VfioPort:
        """Its connection to the host."""

    def memory(self, name: str, size: int, hva: int, page_size: int = 0x1_0000) -> RAMBlock:
        """Declare new memory to the host."""

    def locked_vm(self) -> int:
        """Pages that the host counts as locked for this client."""

    def settle(self) -> None:
        """Hear every interrupt of which the device was done before it last answered."""


class Running(Protocol):
    """A host that runs."""

    def client(self, memlock: int | None = None) -> Client:
        """A new client with a memlock limit in bytes."""


Adapter = Callable[[HostTopology], AbstractContextManager[Running]]


class NearClient:
    """A client in the process of its host."""

    def __init__(self, port: DirectPort) -> None:
        self.port = port

    def memory(self, name: str, size: int, hva: int, page_size: int = 0x1_0000) -> RAMBlock:
        block = RAMBlock(name, np.zeros(size, "u1").data, page_size=page_size, hva=Hva(hva))
        self.port.declare_memory(block)
        return block

    def locked_vm(self) -> int:
        return self.port.mm.locked_vm

    def settle(self) -> None:
        """A handler is called by the register write that leads to it."""


class NearHost:
    """A host in this process; ``connect(memlock)`` makes a port of a new client."""

    def __init__(self, connect: Callable[[int | None], DirectPort]) -> None:
        self._connect = connect
        self._clients: list[NearClient] = []

    def client(self, memlock: int | None = None) -> NearClient:
        client = NearClient(self._connect(memlock))
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.port.exit()
            assert client.locked_vm() == 0, "a client that is gone has nothing locked"


def _near(topology: HostTopology, connect: Callable[[InlineHost, InlineLog, Mm], DirectPort]) -> Iterator[Running]:
    log = InlineLog()
    owner = InlineHost(msgspec.to_builtins(topology), UNLIMITED, "nobody", log, lambda later: later())

    def client(memlock: int | None) -> DirectPort:
        port = connect(owner, log, owner.host.create_mm(memlock, "guest"))
        port.segments = owner.port.segments
        return port

    running = NearHost(client)
    yield running
    running.close()
    owner.close()


@contextmanager
def direct(topology: HostTopology) -> Iterator[Running]:
    """Everything in this process."""
    yield from _near(
        topology, lambda owner, _, mm: DirectPort(owner.host, mm, lanes=owner.lanes, devices=owner.take_device)
    )


@contextmanager
def inline(topology: HostTopology) -> Iterator[Running]:
    """In this process, by the messages that there would be between processes."""
    yield from _near(topology, lambda owner, log, mm: InlinePort(owner, mm, log))


def adapters(hosts: LiveHosts) -> dict[str, Adapter]:
    """Every adapter; ``hosts`` are the host processes of this worker."""
    return {"direct": direct, "inline": inline, "wire": hosts.running}


EXPECTED = ("direct", "inline", "wire")
"""Every test of this folder that asks for an ``adapter`` runs over each of these."""
