"""Open files: connections that open an mm, a container or a group, declare memory, offer a device server, and end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from errno import EBADF, EBUSY, EEXIST, EINVAL, ENFILE, ENODEV, ENOENT, ENOSPC

from hostd.clients import Client, Connection, OpenFile
from hostd.device_table import DeviceState
from hostd.events import (
    Descriptor,
    Disconnect,
    DomainsChanged,
    OfferServer,
    SendDevice,
    SendFile,
    SendTable,
    StopDevice,
)
from hostd.ioctls import queue_key, segment_map
from hostd.jobs import Job, Steps, Until
from hostd.state import Offer, ServiceState
from protocols.port import files
from protocols.port.device import MAX_SEGMENTS, AddSegment, RemoveSegment
from vfio_model.errors import RemoteProtocolError
from vfio_model.host.hpa import Segment
from vfio_model.host.mm import Vma

UNLIMITED = (1 << 64) - 1
"""OpenMm.memlock of a client with CAP_IPC_LOCK."""
PROCESSES = 4
"""One process has at most the share of so many: it cannot shut the others out."""
TABLE_PATH = "anon_inode:kvm-spapr-tce"
"""What the kernel calls the file of a TCE table."""


class FileService:
    """What happens on the connections of ``hostd.sock``."""

    def __init__(self, state: ServiceState, max_connections: int, max_segments: int) -> None:
        self._state = state
        self._max_connections, self._max_segments = max_connections, max_segments
        self._segments = itertools.count()

    def connected(self, connection: int, pid: int) -> None:
        """A new connection; it says what it is for with its first message."""
        state = self._state
        if len(state.clients.connections) >= self._max_connections:
            state.emit(Disconnect(connection, "too many connections"))
            return
        mine = sum(other.pid == pid for other in state.clients.connections.values())
        if mine >= max(1, self._max_connections // PROCESSES):
            state.emit(Disconnect(connection, "too many connections of one process"))
            return
        state.clients.connections[connection] = Connection(connection, pid)

    def message(self, connection_id: int, message: files.Request, fds: tuple[Descriptor, ...]) -> None:
        """A request. What is out of turn costs the connection; what cannot be done is an OpenError."""
        connection = self._state.clients.connections.get(connection_id)
        if connection is None:
            _close_all(fds)
            return
        try:
            self._dispatch(connection, message, fds)
        except OSError as error:
            _close_all(fds)
            self._refuse(connection, error)
        except RemoteProtocolError as error:
            _close_all(fds)
            self._state.emit(Disconnect(connection_id, str(error)))
            self.closed(connection_id)

    def _refuse(self, connection: Connection, error: OSError) -> None:
        reason = error.strerror or ""
        self._state.note("hostd_refused", connection=connection.id, errno=error.errno, reason=reason)
        self._state.emit(SendFile(connection.id, files.OpenError(error.errno or EINVAL, reason)))

    def _dispatch(self, connection: Connection, message: files.Request, fds: tuple[Descriptor, ...]) -> None:
        opened = connection.opened
        if isinstance(message, files.DeclareMemory | files.UndeclareMemory):
            if not isinstance(opened, Client):
                raise RemoteProtocolError(f"{type(message).__name__} on a connection that is no mm")
            if isinstance(message, files.DeclareMemory):
                self._declare(opened, message, fds[0])
            else:
                self._undeclare(opened, message)
            self._state.emit(SendFile(connection.id, files.Done()))
            return
        if opened is not None or connection.busy:
            raise RemoteProtocolError(f"{type(message).__name__} on a connection that is open")
        if isinstance(message, files.OpenMm):
            self._open_mm(connection, message)
        elif isinstance(message, files.OpenFile):
            self._open_file(connection, message)
        elif isinstance(message, files.CreateSpaprTce):
            self._create_table(connection, message)
        else:
            self._attach_server(connection, message, fds)

    # -- opening -----------------------------------------------------------------------------------------------------

    def _open_mm(self, connection: Connection, message: files.OpenMm) -> None:
        state = self._state
        memlock = None if message.memlock >= UNLIMITED else message.memlock
        mm = state.host.create_mm(memlock, message.name)
        client = Client(state.clients.handle(), connection.id, connection.pid, message.name, mm)
        state.host.share_memory(mm, client.view)
        connection.opened = state.clients.mms[client.handle] = client
        state.note("hostd_open_mm", name=message.name, pid=connection.pid, memlock=memlock)
        state.emit(SendFile(connection.id, files.Opened(client.handle)))

    def _open_file(self, connection: Connection, message: files.OpenFile) -> None:
        client = self._state.clients.mms.get(message.mm)
        if client is None or client.pid != connection.pid or client.leaving:
            raise OSError(EBADF, "no such mm of this process")
        connection.busy = True
        job = Job(f"open {message.path}", self._open_steps(connection, message.path, client), client.pid)
        self._state.jobs.submit(("path", message.path), job)

    def _create_table(self, connection: Connection, message: files.CreateSpaprTce) -> None:
        state, clients = self._state, self._state.clients
        client, vm = clients.mms.get(message.mm), clients.file_for(message.mm, message.vm)
        if client is None or client.pid != connection.pid or vm is None:
            raise OSError(EBADF, "no such virtual machine of this process")
        handle, words = state.host.create_spapr_tce(client.mm, vm.handle, message.arg)
        file = OpenFile(handle, connection.id, TABLE_PATH, client)
        connection.opened = clients.files[handle] = file
        state.note("hostd_open", path=TABLE_PATH, pid=client.pid)
        state.emit(SendTable(connection.id, files.OpenedTable(handle), words))

    def _open_steps(self, connection: Connection, path: str, client: Client) -> Steps:
        """A file that is being released is waited for: on a real host close(2) would not have returned yet."""
        state, clients = self._state, self._state.clients
        yield Until(
            f"the release of {path}",
            lambda: not any(file.closing and file.is_group for file in clients.by_path(path)),
        )
        if clients.connections.get(connection.id) is not connection or client.leaving:
            return
        connection.busy = False
        try:
            handle = state.host.open(path, client.mm)
        except OSError as error:
            self._refuse(connection, error)
            return
        file = OpenFile(handle, connection.id, path, client)
        connection.opened = clients.files[file.handle] = file
        state.note("hostd_open", path=path, pid=client.pid)
        state.emit(SendFile(connection.id, files.Opened(file.handle)))

    def _attach_server(self, connection: Connection, message: files.AttachDevice, fds: Sequence[Descriptor]) -> None:
        state = self._state
        if not any(message.name in group.devices for group in state.host.groups.values()):
            raise OSError(ENODEV, f"the host has no device {message.name}")
        if message.name in state.offers:
            raise OSError(EBUSY, f"a server is attached as {message.name} already")
        control, pidfd = fds
        state.offers[message.name] = Offer(message.name, connection.id, control, pidfd)
        connection.opened = message.name
        state.note("hostd_attach_device", name=message.name, pid=connection.pid)
        state.emit(OfferServer(message.name, pidfd.duplicate()))
        state.emit(SendFile(connection.id, files.Done()))

    def server_died(self, name: str) -> None:
        """An attached server ended before it was used."""
        offer = self._state.offers.pop(name, None)
        if offer is not None:
            offer.close()

    # -- memory ------------------------------------------------------------------------------------------------------

    def _declare(self, client: Client, message: files.DeclareMemory, fd: Descriptor) -> None:
        size = fd.sealed_size()
        if not 0 < message.length <= size or message.offset > size - message.length:
            raise OSError(EINVAL, f"{message.segment}: the memfd has {size} bytes")
        known = client.segments.get(message.segment)
        if known is None:
            segment = self._place(client, message, size)
        elif client.memory[known.id][1].identity() != fd.identity():
            raise OSError(EEXIST, f"{message.segment} is another memfd")
        else:
            segment = known
        try:
            client.mm.declare(Vma(message.hva, message.length, segment, message.offset, message.page_size))
        except OSError:
            if known is None:
                self._state.host.forget_segment(segment.id)
            raise
        client.vmas[message.hva] = segment
        if known is not None:
            fd.close()
            return
        client.segments[message.segment] = segment
        client.memory[segment.id] = (segment, fd)
        for device in self._state.devices.of_mm(client.handle):
            if device.state is not DeviceState.STOPPING:
                self._state.emit(SendDevice(device.key, AddSegment(segment_map(segment)), (fd.duplicate(),)))

    def _place(self, client: Client, message: files.DeclareMemory, size: int) -> Segment:
        if len(client.memory) >= MAX_SEGMENTS:
            raise OSError(ENOSPC, f"one mm has at most {MAX_SEGMENTS} segments")
        if sum(len(other.memory) for other in self._state.clients.mms.values()) >= self._max_segments:
            raise OSError(ENFILE, f"{self._max_segments} segments of all clients")
        number = next(self._segments)
        return self._state.host.place_segment(f"{message.segment[:200]}#{number}", size, message.page_size)

    def _undeclare(self, client: Client, message: files.UndeclareMemory) -> None:
        vma = client.mm.find(message.hva)
        if vma is None or (vma.hva, vma.length) != (message.hva, message.length):
            raise OSError(ENOENT, f"no mapping of {message.length:#x} bytes begins at {message.hva:#x}")
        segment = client.mm.undeclare(message.hva).segment
        del client.vmas[message.hva]
        if client.uses(segment):
            return
        self._state.host.forget_segment(segment.id)
        client.forget(segment)
        client.segments = {name: kept for name, kept in client.segments.items() if kept is not segment}
        for device in self._state.devices.of_mm(client.handle):
            self._state.emit(SendDevice(device.key, RemoveSegment(segment.id)))

    # -- the end -----------------------------------------------------------------------------------------------------

    def closed(self, connection_id: int) -> None:
        """EOF: release what the connection had opened; our end of it is closed when that is over."""
        state = self._state
        connection = state.clients.connections.pop(connection_id, None)
        if connection is None:
            return
        opened = connection.opened
        if isinstance(opened, Client):
            self._exit_mm(opened)
        elif isinstance(opened, OpenFile):
            self._release(opened)
        else:
            if opened is not None and opened in state.offers and state.offers[opened].connection == connection_id:
                state.offers.pop(opened).close()
            state.emit(Disconnect(connection_id))

    def _exit_mm(self, client: Client) -> None:
        state = self._state
        client.leaving = True
        for file in state.clients.files_of(client):
            if not file.closing:
                state.clients.connections.pop(file.connection, None)
                state.emit(Disconnect(file.connection, "its mm is gone"))
                self._release(file)
        state.jobs.submit(("mm", client.handle), Job("exit of the mm", self._exit_steps(client), client.pid))

    def _exit_steps(self, client: Client) -> Steps:
        state = self._state
        yield Until(
            "the release of its files", lambda: not state.clients.files_of(client) and not state.jobs.works_for(client)
        )
        yield from state.settle(state.host.mm_gone(client.mm), client)
        for segment, _ in client.memory.values():
            state.host.forget_segment(segment.id)
        client.close_memory()
        del state.clients.mms[client.handle]
        state.emit(Disconnect(client.connection))
        state.note("hostd_exit_mm", name=client.name, pid=client.pid, locked_vm=client.mm.locked_vm)

    def _release(self, file: OpenFile) -> None:
        file.closing = True
        for device in self._state.devices.of_group(file.handle):
            stop_device(self._state, device.key, "its group was released")
        job = Job(f"release of {file.path}", self._release_steps(file), file.client.pid)
        self._state.jobs.submit(queue_key(self._state, file), job)

    def _release_steps(self, file: OpenFile) -> Steps:
        state = self._state
        yield Until(f"the end of the devices of {file.path}", lambda: not state.devices.of_group(file.handle))
        yield from state.settle(state.host.close(file.handle), file.client)
        del state.clients.files[file.handle]
        state.emit(Disconnect(file.connection))
        state.note("hostd_release", path=file.path, pid=file.client.pid)
        state.emit(DomainsChanged())


def stop_device(state: ServiceState, key: int, reason: str) -> None:
    """Make a device's process end; its entry goes when it is dead."""
    device = state.devices.get(key)
    if device is not None and device.state is not DeviceState.STOPPING:
        device.state = DeviceState.STOPPING
        device.error = device.error or reason
        state.emit(StopDevice(key, reason))


def _close_all(fds: Sequence[Descriptor]) -> None:
    for fd in fds:
        fd.close()
