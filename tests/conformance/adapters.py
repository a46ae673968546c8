"""The implementations of the uapi seam that the conformance tests run over.

An adapter starts a host of a given topology and gives one or more clients of it. Adding an adapter here is all it takes
to run every test over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from vfio_model.host.host import Host
from vfio_model.host.topology import HostTopology
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import VfioPort


class Client(Protocol):
    """One process that uses a host."""

    port: VfioPort

    def memory(self, name: str, size: int, hva: int, page_size: int = 0x1_0000) -> RAMBlock:
        """Declare new memory to the host."""

    def locked_vm(self) -> int:
        """Pages that the host counts as locked for this client."""


class Running(Protocol):
    """A host that runs."""

    def client(self, memlock: int | None = None) -> Client:
        """A new client with a memlock limit in bytes."""


Adapter = Callable[[HostTopology], AbstractContextManager[Running]]


class DirectClient:
    def __init__(self, host: Host, memlock: int | None) -> None:
        self.mm = host.create_mm(memlock)
        self.port: VfioPort = DirectPort(host, self.mm)

    def memory(self, name: str, size: int, hva: int, page_size: int = 0x1_0000) -> RAMBlock:
        block = RAMBlock(name, bytearray(size), page_size=page_size, hva=Hva(hva))
        self.port.declare_memory(block)
        return block

    def locked_vm(self) -> int:
        return self.mm.locked_vm


class DirectHost:
    def __init__(self, topology: HostTopology) -> None:
        self.host = Host(topology)

    def client(self, memlock: int | None = None) -> Client:
        return DirectClient(self.host, memlock)


@contextmanager
def direct(topology: HostTopology) -> Iterator[Running]:
    """Everything in this process."""
    yield DirectHost(topology)


ADAPTERS: dict[str, Adapter] = {"direct": direct}
EXPECTED = frozenset({"direct"})
"""What must be among the adapters: one that silently drops out of the collection would otherwise not be missed."""
