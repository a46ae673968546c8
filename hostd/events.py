"""What happens to the host's service, and what it wants done: the only words between it and its shell.

:class:`hostd.service.ContainerService` turns an event into effects and does no I/O; :mod:`hostd.container` makes
events out of sockets, timers and dead processes, and carries the effects out in order. A recorded list of events can
therefore be replayed in a test, reordered or cut off at any point.

Descriptors are opaque (:class:`Descriptor`). An event hands them to the service, an effect hands them back to the
shell, which closes those of a message after sending it; what the service drops it closes itself. So each is closed
exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from protocols.port import device as device_port
from protocols.port import files, messages
from vfio_model.memory.revoke import LaneSet


class Mapped(Protocol):
    """A mapped memfd."""

    @property
    def view(self) -> memoryview:
        """Its bytes."""

    def close(self) -> None:
        """Unmap it. :raise BufferError: somebody still holds a part of the view; the memory goes with that."""


class Descriptor(Protocol):
    """An open descriptor that somebody owns."""

    def close(self) -> None:
        """Close it. Harmless twice."""

    def duplicate(self) -> Descriptor:
        """A second one for the same thing, owned by the caller."""

    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for two descriptors of one memfd."""

    def sealed_size(self) -> int:
        """Bytes of the sealed memfd behind it.

        :raise RemoteProtocolError: when it is none.
        """

    def map(self) -> Mapped:
        """The sealed memfd behind it, mapped to be read. :raise RemoteProtocolError: when that cannot be."""


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """Somebody connected to ``hostd.sock``; ``pid`` by SO_PEERCRED."""

    connection: int
    pid: int


@dataclass(frozen=True, slots=True)
class FileMessage:
    """A request on connection ``connection``, with its descriptors."""

    connection: int
    message: files.Request
    fds: tuple[Descriptor, ...] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """EOF of a connection, or its peer broke the protocol: ``release()``."""

    connection: int


class PortMessage(NamedTuple):
    """An ioctl or hypercall of ZeroMQ peer ``peer``."""

    peer: bytes
    message: messages.Ioctl | messages.Hcall


@dataclass(frozen=True, slots=True)
class DeviceReady:
    """The device server of StartDevice ``key`` serves: its vfio-user stream for the client, pidfd, pid and lanes, and
    the bytes of its dirty map.
    """

    key: int
    stream: Descriptor
    pidfd: Descriptor
    pid: int
    lanes: LaneSet
    dirty: memoryview | None = None


@dataclass(frozen=True, slots=True)
class DeviceFailed:
    """The device server of ``key`` could not be started; DeviceDied may follow or not, and changes nothing."""

    key: int
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceQuiet:
    """Device ``key`` answered Quiesce ``seq`` from outside every DMA section."""

    key: int
    seq: int


@dataclass(frozen=True, slots=True)
class DeviceDied:
    """The process of device ``key`` is dead and reaped."""

    key: int
    how: str = ""


@dataclass(frozen=True, slots=True)
class ServerDied:
    """A device server that waited to be used (AttachDevice) is dead."""

    name: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Look at what is pending. ``now`` is CLOCK_MONOTONIC in seconds."""

    now: float


@dataclass(frozen=True, slots=True)
class NextSlice:
    """Everybody was served meanwhile: go on with long work. Wanted while :attr:`ContainerService.working`."""


Event = (
    Connected
    | FileMessage
    | Closed
    | PortMessage
    | NextSlice
    | DeviceReady
    | DeviceFailed
    | DeviceQuiet
    | DeviceDied
    | ServerDied
    | Tick
)


# -- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendFile:
    """Send ``message`` on a connection; the shell closes ``fds`` after that."""

    connection: int
    message: files.Response
    fds: tuple[Descriptor, ...] = ()


@dataclass(frozen=True, slots=True)
class SendTable:
    """Send ``message`` on a connection, with a descriptor of the memory behind ``words``."""

    connection: int
    message: files.OpenedTable
    words: memoryview


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close a connection, if it still is one. The service has forgotten it: no Closed is expected for it. A reason is
    given where the client did not ask for it.
    """

    connection: int
    reason: str = ""


class SendReturn(NamedTuple):
    """Answer an ioctl."""

    peer: bytes
    message: messages.Return


@dataclass(frozen=True, slots=True)
class StartDevice:
    """Start the device server of host device ``name`` (or use ``attached``: control socket and pidfd, now the
    shell's) and set it up. Answered by DeviceReady or DeviceFailed; exactly one DeviceDied follows in the end.
    ``fds`` are the segments' memfds, ``group`` the number of the group."""

    key: int
    name: str
    group: int
    segments: tuple[device_port.SegmentMap, ...]
    fds: tuple[Descriptor, ...]
    attached: tuple[Descriptor, Descriptor] | None = None


@dataclass(frozen=True, slots=True)
class OfferServer:
    """Watch an attached device server until it is used: ServerDied when it dies before."""

    name: str
    pidfd: Descriptor


@dataclass(frozen=True, slots=True)
class SendDevice:
    """Send ``message`` to device ``key``; the shell closes ``fds`` after that."""

    key: int
    message: device_port.ToDevice
    fds: tuple[Descriptor, ...] = ()


@dataclass(frozen=True, slots=True)
class StopDevice:
    """Make device ``key`` end: ask first, kill soon after. DeviceDied follows."""

    key: int
    reason: str


@dataclass(frozen=True, slots=True)
class Late:
    """Device ``key`` has been inside one DMA section for ``seconds`` while ``request`` waits for it, or owes an answer
    for so long: ``meanwhile`` says which. ``client`` is the pid of who asked."""

    key: int
    name: str
    request: str
    seconds: float
    client: int
    meanwhile: str


@dataclass(frozen=True, slots=True)
class DomainsChanged:
    """A container may have lost its tables: table memory that nobody uses can be unmapped."""


@dataclass(frozen=True, slots=True)
class Note:
    """A trace event."""

    event: str
    fields: dict[str, object]
    cause: int = 0


Effect = (
    SendFile
    | SendTable
    | Disconnect
    | SendReturn
    | StartDevice
    | OfferServer
    | SendDevice
    | StopDevice
    | Late
    | DomainsChanged
    | Note
)
