"""The VFIO port over the wire: open files are SEQPACKET connections to hostd, ioctls are ZeroMQ messages.

One request is outstanding at a time, as a system call blocks its caller; while it is awaited, everything that is
*served* (interrupts, translation requests, DMA messages, doorbells of all devices) is served, so that hostd may
wait for a device that waits for us.

A host that is gone is noticed by the EOF of any of its connections; one that hangs by a deadline, after which it
is asked whether it lives: a request that hostd holds back on purpose (it waits for a device) may take longer than
one that got lost. Either way the port is *lost*, and what was asked raises :class:`PeerLost`, but not before every
device process that was handed out over it is dead: their tables can no longer be revoked, and an unmap that
returned earlier would be a lie. A hanging host's devices are killed here for that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from guestd.polling import poll_until
from protocols.port import files, messages
from protocols.transport.channel import FdChannel
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.shm import MappedMemory, map_memory
from protocols.transport.unix import SeqpacketConnection, close_fds
from protocols.transport.zmq import DealerClient, Sent
from vfio_model.errors import DeadlineExceeded, InternalGuestError, PeerLost, RemoteProtocolError
from vfio_model.memory.ram import RAMBlock
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.hvcall import hcall_name
from vfio_model.uapi.kvm import ioctl_name
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl, IommuType
from vfio_model.vfio.ioctl import BatchError
from vfio_model.vfio.region import DeviceConnection

IOCTL_SECONDS: Final = 5.0
"""After this long a host is asked whether it lives."""
SHORT_WAIT_MS: Final = 1
"""An answer that takes longer is waited for in the loop."""
PATIENCE: Final = 4
"""A host that lives gets its deadline this often."""
FENCE_SECONDS: Final = 2.0
"""How long device processes of a dead host may take to end by themselves."""
UNLIMITED: Final = (1 << 64) - 1
_RET = struct.Struct("=q")

FileChannel = FdChannel[files.Response, files.Request]
DeviceFactory = Callable[[files.DeviceFd, int, Pidfd], DeviceConnection]
"""Makes a connection out of (message, stream descriptor, pidfd), all of which it owns then."""


class _File:
    """One open file of ours at the host."""

    def __init__(self, channel: FileChannel) -> None:
        self.channel = channel
        self.handle = 0
        self.inbox: deque[tuple[files.Response, list[int]]] = deque()
        self.closing = self.released = False


class WirePort:
    """:class:`~vfio_model.vfio.ioctl.VfioPort` to the hostd in a runtime directory; connected when it is made.

    :raise PeerLost: when no hostd answers there.
    """

    def __init__(
        self,
        directory: Path,
        loop: Loop,
        make_device: DeviceFactory,
        *,
        name: str = "guestd",
        memlock: int = UNLIMITED,
        port_path: Path | None = None,
        seconds: float = IOCTL_SECONDS,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self._socket_path = directory / "hostd.sock"
        self._loop, self._make_device, self._trace, self._seconds = loop, make_device, trace, seconds
        self._files: dict[int, _File] = {}
        self._devices: dict[int, tuple[files.DeviceFd, list[int]]] = {}
        self._pidfds: list[Pidfd] = []
        self._tables: dict[int, MappedMemory] = {}
        self.lost: PeerLost | None = None
        self.on_lost: Callable[[PeerLost], None] = lambda _error: None
        """Called once, from wherever the loss was noticed; must not wait."""
        self._eof: PeerLost | None = None
        self._type1: set[int] = set()
        """Containers of a type 1."""
        self._seq = 0
        self._answer: messages.Return | None = None
        self._pong = 0
        self._client = DealerClient(port_path or directory / "hostd.zmq")
        self._zmq_socket = self._client.zmq_socket
        loop.register(self._client, self._zmq_readable, served=True)
        try:
            self._mm = self._open_file(files.OpenMm(memlock, name))
        except (PeerLost, OSError):
            self.close_all()
            raise

    # -- open files ----------------------------------------------------------------------------------------------

    def open(self, path: str) -> int:
        """open(2) of ``/dev/vfio/vfio`` or ``/dev/vfio/<group>``: a new connection."""
        return self._open_file(files.OpenFile(path, self._mm.handle)).handle

    def _open_file(self, request: files.OpenMm | files.OpenFile) -> _File:
        file, _ = self._connect(request, files.Opened)
        return file

    def _connect(
        self, request: files.Request, wanted: type[files.Opened] | type[files.OpenedTable]
    ) -> tuple[_File, list[int]]:
        """A new connection whose first request is answered as ``wanted``; with the descriptors of the answer, which the
        caller owns.
        """
        self._check()
        connection = SeqpacketConnection.connect(self._socket_path, "hostd")
        channel: FileChannel = FdChannel(connection, files.RESPONSES, files.REQUESTS, files.fd_count)
        file = _File(channel)
        self._loop.register(channel, lambda: self._file_readable(file), served=True)
        try:
            answer, received = self._ask_for(file, request)
        except (PeerLost, OSError):
            self._close_file(file)
            raise
        if not isinstance(answer, wanted):
            close_fds(received)
            self._close_file(file)
            raise self._broken(f"{type(answer).__name__} in answer to {type(request).__name__}")
        file.handle = answer.handle
        self._files[file.handle] = file
        return file, received

    def close(self, handle: int) -> None:
        """close(2): what is asked next finds the file released. Harmless when the host is gone.

        :raise OSError: EBADF for a handle that is not open.
        """
        file = self._files.pop(handle, None)
        if file is None:
            if self.lost is None and self._eof is None:
                raise OSError(errno.EBADF, f"handle {handle:#x} is not open")
            return
        file.closing = True
        file.channel.connection.end_sending()
        try:
            self._wait(lambda: file.released, "close")
        except PeerLost as error:
            self._trace("port_close_lost", reason=str(error))
        finally:
            self._close_file(file)

    def _close_file(self, file: _File) -> None:
        self._loop.unregister(file.channel)
        file.channel.close()
        while file.inbox:
            close_fds(file.inbox.popleft()[1])

    def declare_memory(self, block: RAMBlock) -> None:
        """Tell the host of a RAM block, with its memfd."""
        message = files.DeclareMemory(block.hva, block.size, block.name, block.fd_offset, block.page_size)
        self._ask(self._mm, message, (block.fd,))

    def undeclare_memory(self, block: RAMBlock) -> None:
        """The block is no longer mapped."""
        self._ask(self._mm, files.UndeclareMemory(block.hva, block.size))

    def take_device(self, token: int) -> DeviceConnection:
        """The device whose descriptors go with ``token``."""
        self._wait(lambda: token in self._devices, "the descriptors of a device")  # they come on another socket
        message, (stream, pidfd) = self._devices.pop(token)
        process = Pidfd(pidfd, message.pid)
        for dead in [known for known in self._pidfds if not known.alive()]:
            self._pidfds.remove(dead)
            dead.close()
        self._pidfds.append(Pidfd(os.dup(pidfd), message.pid))
        return self._make_device(message, stream, process)

    def _ask(self, file: _File, request: files.Request, fds: tuple[int, ...] = ()) -> files.Response:
        answer, received = self._ask_for(file, request, fds)
        close_fds(received)
        return answer

    def _ask_for(
        self, file: _File, request: files.Request, fds: tuple[int, ...] = ()
    ) -> tuple[files.Response, list[int]]:
        self._check()
        name = type(request).__name__
        try:
            file.channel.send(request, fds)
        except PeerLost as error:
            raise self._lose(error.doing) from error
        self._wait(lambda: bool(file.inbox), name)
        answer, received = file.inbox.popleft()
        if isinstance(answer, files.OpenError):
            close_fds(received)
            raise OSError(answer.errno, answer.reason)
        return answer, received

    def _file_readable(self, file: _File) -> None:
        try:
            while (received := file.channel.receive()) is not None:
                message, fds = received
                if isinstance(message, files.DeviceFd):
                    self._devices[message.token] = (message, fds)
                else:
                    file.inbox.append(received)
        except (PeerLost, RemoteProtocolError) as error:
            self._noticed(file, error)

    def _noticed(self, file: _File, error: PeerLost | RemoteProtocolError) -> None:
        """EOF: dealt with by whoever waits, else at the top level; here nobody may wait. That of a file which is
        being closed is its answer.
        """
        self._loop.unregister(file.channel)
        if file.closing:
            file.released = True
            return
        if self._eof is None:
            self._eof = PeerLost("hostd", error.doing if isinstance(error, PeerLost) else f"speaking: {error}")
            self._loop.call_soon(self._dismiss)

    def _dismiss(self) -> None:
        if self._eof is not None and self.lost is None:
            self._lose(self._eof.doing)

    # -- virtual machines ----------------------------------------------------------------------------------------

    def create_spapr_tce(self, vm: int, arg: bytes) -> tuple[int, memoryview]:
        """``KVM_CREATE_SPAPR_TCE_64``: a new connection is the table's file; its memory stays mapped when the host
        goes.

        :raise OSError: the host refuses. :raise PeerLost: it is gone.
        """
        file, received = self._connect(files.CreateSpaprTce(self._mm.handle, vm, arg), files.OpenedTable)
        try:
            memory = map_memory(received[0], writable=True, what="TCE table")
        except RemoteProtocolError as error:
            raise self._broken(str(error)) from error
        self._tables[file.handle] = memory
        return file.handle, memory.words

    def unmap_spapr_tce(self, handle: int) -> None:
        """Unmap a table's memory; it goes when nobody shows it any more."""
        memory = self._tables.pop(handle, None)
        if memory is not None:
            with contextlib.suppress(BufferError):
                memory.close()

    def hcall(self, vm: int, nr: int, args: Sequence[int], links: int) -> int:
        """A hypercall that the host may answer: its return code, H_TOO_HARD included.

        :raise OSError: it failed on its way. :raise PeerLost: the host is gone.
        """
        self._check()
        self._seq = seq = self._seq + 1
        trace = self._trace
        if trace.enabled:
            trace("port_send", seq=seq, hcall=hcall_name(nr), count=1, iova=args[1])
        message = messages.Hcall(seq, trace.cause, self._mm.handle, vm, nr, list(args), links)
        answer = self._exchange(message, hcall_name(nr))
        if answer.errno or len(answer.arg) != _RET.size:
            raise OSError(answer.errno or errno.EIO, f"{hcall_name(nr)}: {os.strerror(answer.errno or errno.EIO)}")
        ret: int = _RET.unpack(answer.arg)[0]
        return ret

    # -- ioctls --------------------------------------------------------------------------------------------------

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        """ioctl(2). :raise OSError: with the host's errno. :raise PeerLost: the host is gone, and so are its
        devices.
        """
        answer = self._call(handle, cmd, arg, 1)
        if answer.errno:
            raise OSError(answer.errno, f"{self._name(handle, cmd)}: {os.strerror(answer.errno)}")
        if cmd == _SET_IOMMU and int.from_bytes(arg, sys.byteorder) in _TYPE1:
            self._type1.add(handle)
        return answer.arg

    def _name(self, handle: int, cmd: int) -> str:
        """The type of a container decides between two meanings of a number."""
        return ioctl_name(cmd, spapr=handle not in self._type1)

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        """``count`` structures of one command in as few messages as fit. :raise BatchError: at the first failure."""
        if count <= messages.MAX_COUNT and len(args) <= messages.MAX_ARG:
            return self._batch(handle, cmd, args, count, 0)
        size = len(args) // count
        step = min(messages.MAX_COUNT, messages.MAX_ARG // size)
        with memoryview(args) as view:
            for first in range(0, count, step):
                some = min(step, count - first)
                self._batch(handle, cmd, view[first * size : (first + some) * size], some, first)
        return count

    def _batch(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int, before: int) -> int:
        answer = self._call(handle, cmd, args, count)
        if answer.errno:
            raise BatchError(
                answer.errno, f"{self._name(handle, cmd)}: {os.strerror(answer.errno)}", before + answer.done
            )
        return count

    def _call(self, handle: int, cmd: int, arg: bytes | bytearray | memoryview, count: int) -> messages.Return:
        if self.lost is not None or self._eof is not None:
            self._check()
        self._seq = seq = self._seq + 1
        trace = self._trace
        if trace.enabled:
            trace("port_send", seq=seq, ioctl=self._name(handle, cmd), count=count, **_first(cmd, arg))
        message = messages.Ioctl(seq, trace.cause, self._mm.handle, handle, cmd, count, arg)  # type: ignore[arg-type]
        return self._exchange(message, cmd)

    def _exchange(self, message: messages.Ioctl | messages.Hcall, request: str | int) -> messages.Return:
        assert self._answer is None, "one request is outstanding at a time"
        trace, seq = self._trace, message.seq
        if self._client.send(messages.REQUESTS.encode(message)) is not Sent.OK:
            raise self._lose("sending: it takes no more requests")
        # The usual case, without a turn of the loop: the answer is the next thing that happens.
        if self._loop.wakes(self._zmq_socket, SHORT_WAIT_MS) and (data := self._client.receive()) is not None:
            self._take(data)
        if self._answer is None:
            self._wait(self._answered, request)
        answer, self._answer = self._answer, None
        assert answer is not None, "the wait ends with an answer or an error"
        if trace.enabled:
            trace("port_return", seq=seq, errno=answer.errno, done=answer.done)
        return answer

    def _take(self, data: bytes) -> None:
        try:
            message = messages.RESPONSES.decode(data)
            if isinstance(message, messages.Return):
                if message.seq == self._seq:  # an earlier one is a duplicate, or came after its deadline
                    self._answer = message
            elif isinstance(message, messages.Pong):
                self._pong = message.seq
            else:
                raise RemoteProtocolError(f"hostd refused us: {message.reason}")
        except RemoteProtocolError as error:
            self._eof = self._eof or PeerLost("hostd", f"speaking: {error}")
            self._loop.call_soon(self._dismiss)

    def _answered(self) -> bool:
        return self._answer is not None

    def _zmq_readable(self) -> None:
        data = self._client.receive()  # one: the loop asks again whether there is more
        if data is not None:
            self._take(data)

    # -- waiting, and the end ------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.lost is None and self._eof is not None:
            self._lose(self._eof.doing)
        if self.lost is not None:
            raise PeerLost("hostd", self.lost.doing)

    def _wait(self, done: Callable[[], bool], request: str | int) -> None:
        """Until ``done()``, or the host is lost (raised). ``request`` is for people: a name, or an ioctl's number."""
        for _ in range(PATIENCE):
            try:
                self._loop.serve_until(lambda: done() or self._eof is not None, self._seconds, "hostd", "a request")
                break
            except DeadlineExceeded as late:
                error = DeadlineExceeded("hostd", _named(request), late.seconds)
                self._trace("port_late", reason=str(error))
                if not self._lives():
                    raise self._lose(f"waiting: {error}", hanging=True) from error
        else:
            raise self._lose(f"waiting: {_named(request)} is not answered, though it lives", hanging=True)
        if not done():
            assert self._eof is not None, "a wait ends with what was awaited or with EOF"
            raise self._lose(self._eof.doing)

    def _lives(self) -> bool:
        self._seq += 1
        wanted = self._seq
        self._seq -= 1
        if self._client.send(messages.REQUESTS.encode(messages.Ping(wanted))) is not Sent.OK:
            return False
        try:
            self._loop.serve_until(
                lambda: self._pong == wanted or self._eof is not None, self._seconds / PATIENCE, "hostd", "ping"
            )
        except DeadlineExceeded:
            return False
        return True

    def _broken(self, what: str) -> PeerLost:
        return self._lose(f"speaking: it broke the protocol: {what}", hanging=True)

    def _lose(self, reason: str, *, hanging: bool = False) -> PeerLost:
        """The host is gone: once, end its devices, close everything, tell the owner."""
        if self.lost is None:
            self.lost = PeerLost("hostd", reason)
            self._trace("port_lost", reason=reason)
            self._fence(kill=hanging)
            self.close_all()
            self.on_lost(self.lost)
        return self.lost

    def _fence(self, *, kill: bool) -> None:
        """Return when every device process of the host is dead."""

        def dead() -> bool:
            return not any(process.alive() for process in self._pidfds)

        try:
            poll_until(self._loop, dead, 0.0 if kill else FENCE_SECONDS, "device processes", "end")
        except DeadlineExceeded:
            for process in self._pidfds:
                process.send_signal(signal.SIGKILL)
        try:
            poll_until(self._loop, dead, FENCE_SECONDS, "device processes", "end")
        except DeadlineExceeded as error:
            left = [process.pid for process in self._pidfds if process.alive()]
            raise InternalGuestError(f"device processes {left} of a host that is gone cannot be killed") from error

    def close_all(self) -> None:
        """Close every descriptor: the host releases what this client had. Harmless twice."""
        for file in list(self._files.values()):
            self._close_file(file)
        self._files.clear()
        for _, fds in self._devices.values():
            close_fds(fds)
        self._devices.clear()
        for process in self._pidfds:
            process.close()
        self._pidfds.clear()
        if not self._client.closed:
            self._loop.unregister(self._client)
            self._client.close()


def _named(request: str | int) -> str:
    return ioctl_name(request) if isinstance(request, int) else request


_MAP, _UNMAP = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)
_SET_IOMMU = int(Ioctl.VFIO_SET_IOMMU)
_TYPE1 = IommuType.VFIO_TYPE1_IOMMU, IommuType.VFIO_TYPE1v2_IOMMU


def _first(cmd: int, arg: bytes | bytearray | memoryview) -> dict[str, object]:
    """What the first structure is about, for the log."""
    if cmd == _MAP and len(arg) >= DmaMap.SIZE:
        _, _, vaddr, iova, size = DmaMap.FORMAT.unpack_from(arg)
        return {"iova": iova, "size": size, "vaddr": vaddr}
    if cmd == _UNMAP and len(arg) >= DmaUnmap.SIZE:
        _, _, iova, size = DmaUnmap.FORMAT.unpack_from(arg)
        return {"iova": iova, "size": size}
    return {}
