"""Ioctls: from the message to the Return, whatever has to be waited for in between."""

from __future__ import annotations

import struct
from collections.abc import Generator, Hashable
from errno import EBADF, EIO, ENOMEM

from hostd.clients import OpenFile
from hostd.device_table import DeviceState, OpenDevice
from hostd.events import Descriptor, DomainsChanged, SendFile, SendReturn, StartDevice
from hostd.jobs import DmaWait, Job, Steps, Until, Wait
from hostd.state import ServiceState
from protocols.port.device import SegmentMap
from protocols.port.files import DeviceFd
from protocols.port.messages import Ioctl as IoctlMessage
from protocols.port.messages import Return
from vfio_model.host.hpa import Segment
from vfio_model.host.mm import Mm
from vfio_model.host.pending import Batch, Pending
from vfio_model.uapi.vfio import Ioctl

_HANDLE = struct.Struct("=Q")
_SET_IOMMU = int(Ioctl.VFIO_SET_IOMMU)
_SET_CONTAINER, _UNSET_CONTAINER, _GET_DEVICE_FD = (
    int(Ioctl.VFIO_GROUP_SET_CONTAINER),
    int(Ioctl.VFIO_GROUP_UNSET_CONTAINER),
    int(Ioctl.VFIO_GROUP_GET_DEVICE_FD),
)
MAX_BEHIND = 256
"""Ioctls that may wait behind a pending one: each holds its argument, up to a megabyte."""
Begun = bytes | Batch | Pending[bytes | Batch]
"""What the host says when an ioctl begins."""


def segment_map(segment: Segment) -> SegmentMap:
    """``segment`` as a device process is told of it."""
    place = segment.hpa
    return SegmentMap(
        segment.id, segment.length, segment.page_size, place.base, place.page_shift, place.pages, place.bits,
        place.multiplier, place.addend,
    )  # fmt: skip


class IoctlService:
    """Runs ioctls of ZeroMQ peers against the host."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state

    def submit(self, peer: bytes, message: IoctlMessage) -> None:
        """Begin ``message``; its Return comes as an effect, now or later."""
        state = self._state
        state.cause = message.cause
        file = state.clients.file_for(message.mm, message.handle)
        if file is None:
            state.emit(SendReturn(peer, Return(message.seq, EBADF, 0, b"")))
            return
        key = self._key(file, message)
        if file.is_container and state.jobs.idle(key):
            self._at_once(key, peer, message, file)
            return
        if state.jobs.depth(key) > MAX_BEHIND:
            self._failed(peer, message, OSError(ENOMEM, f"{MAX_BEHIND} requests of this container wait already"))
            return
        state.jobs.submit(key, Job(self._name(message), self._steps(peer, message, file), file.client.pid))

    def _key(self, file: OpenFile, message: IoctlMessage) -> Hashable:
        """The container that the ioctl concerns, else the group by itself."""
        if message.cmd == _SET_CONTAINER and len(message.arg) >= _HANDLE.size:
            container = self._state.clients.file_for(message.mm, _HANDLE.unpack_from(message.arg)[0])
            if container is not None:
                return container.handle
        return queue_key(self._state, file)

    def _at_once(self, key: Hashable, peer: bytes, message: IoctlMessage, file: OpenFile) -> None:
        """An ioctl that nobody is in front of: most are over here, and only the others become a job."""
        state = self._state
        try:
            result = self._begin(message, file)
            if isinstance(result, Pending):
                wait = None if result.long else state.begin_revoke(result.lane_devices)
                if wait is not None or result.long:
                    steps = self._rest_steps(peer, message, file, wait, result)
                    state.jobs.submit(key, Job(self._name(message), steps, file.client.pid))
                    return
                result = result.finish()
        except OSError as error:
            if message.cmd == _SET_IOMMU:
                state.emit(DomainsChanged())  # the tables of a type that did not fit
            self._failed(peer, message, error)
            return
        self._answer(peer, message, result)

    def _rest_steps(
        self,
        peer: bytes,
        message: IoctlMessage,
        file: OpenFile,
        wait: DmaWait | None,
        pending: Pending[bytes | Batch],
    ) -> Steps:
        """What :meth:`_at_once` has left: the wait alone, or work and then perhaps a wait."""
        try:
            if wait is None:
                result: bytes | Batch = yield from self._settled(pending, message, file)
            else:
                yield wait
                result = pending.finish()
        except OSError as error:
            self._failed(peer, message, error)
            return
        self._answer(peer, message, result)

    def _steps(self, peer: bytes, message: IoctlMessage, file: OpenFile) -> Steps:
        state = self._state
        state.cause = message.cause
        try:
            if file.closing:
                raise OSError(EBADF, "the file was closed while the ioctl waited")
            if message.cmd == _GET_DEVICE_FD and message.count == 1 and not file.is_container:
                result: bytes | Batch = yield from self._open_device(message, file)
            else:
                result = yield from self._settled(self._begin(message, file), message, file)
        except OSError as error:
            if message.cmd == _SET_IOMMU:
                state.emit(DomainsChanged())
            self._failed(peer, message, error)
            return
        if message.cmd == _UNSET_CONTAINER:
            state.emit(DomainsChanged())
        self._answer(peer, message, result)

    def _settled(self, result: Begun, message: IoctlMessage, file: OpenFile) -> Generator[Wait, None, bytes | Batch]:
        if not isinstance(result, Pending):
            return result
        client = self._state.clients.mms[message.mm]
        return (yield from self._state.carry_out(result, client, lambda: not file.closing and not client.leaving))

    def _begin(self, message: IoctlMessage, file: OpenFile) -> Begun:
        """:raise OSError: with the errno of the uapi."""
        host, mm = self._state.host, self._mm(message)
        if message.count > 1:
            return host.ioctl_many(mm, file.handle, message.cmd, message.arg, message.count)
        if message.cmd == _SET_CONTAINER:
            self._check_container(message)
        return host.ioctl(mm, file.handle, message.cmd, message.arg)

    def _mm(self, message: IoctlMessage) -> Mm:
        """The mm that ``message`` quotes, which may have gone while the ioctl waited. :raise OSError: EBADF."""
        client = self._state.clients.mms.get(message.mm)
        if client is None or client.leaving:
            raise OSError(EBADF, "the mm is gone")
        return client.mm

    def _name(self, message: IoctlMessage) -> str:
        return self._state.host.ioctl_name(message.handle, message.cmd)

    def _answer(self, peer: bytes, message: IoctlMessage, result: bytes | Batch) -> None:
        if isinstance(result, Batch):
            if result.errno:
                self._note_failure(message, result.errno, result.reason)
            answer = Return(message.seq, result.errno, result.done, b"")
        else:
            answer = Return(message.seq, 0, 1, result)
        self._state.emit(SendReturn(peer, answer))

    def _failed(self, peer: bytes, message: IoctlMessage, error: OSError) -> None:
        number = error.errno or EIO
        self._note_failure(message, number, error.strerror or "")
        self._state.emit(SendReturn(peer, Return(message.seq, number, 0, b"")))

    def _note_failure(self, message: IoctlMessage, number: int, reason: str) -> None:
        self._state.cause = message.cause
        self._state.note("vfio_ioctl_failed", ioctl=self._name(message), errno=number, reason=reason)

    def _check_container(self, message: IoctlMessage) -> None:
        """The handle in the argument is one of this client's too."""
        handle = _HANDLE.unpack_from(message.arg)[0] if len(message.arg) >= _HANDLE.size else None
        if handle is not None and self._state.clients.file_for(message.mm, handle) is None:
            raise OSError(EBADF, "no such container")

    # -- devices -----------------------------------------------------------------------------------------------------

    def _open_device(self, message: IoctlMessage, file: OpenFile) -> Generator[Wait, None, bytes]:
        """GROUP_GET_DEVICE_FD: start the device's process, wait until it serves, hand its stream to the client."""
        state = self._state
        name = message.arg.split(b"\0", 1)[0].decode("utf-8", "replace")
        old = state.devices.named(name)
        if old is not None and (old.state is DeviceState.STOPPING or not old.alive):
            yield Until(f"the end of {name}'s last process", lambda: state.devices.get(old.key) is None)
        token = yield from state.settle(
            state.host.ioctl(self._mm(message), file.handle, message.cmd, message.arg), file.client
        )
        try:
            device = self._start(name, file, _HANDLE.unpack(token)[0])
        except OSError:
            yield from state.settle(state.host.device_closed(_HANDLE.unpack(token)[0]), None)
            raise
        yield Until(f"the start of {name}", lambda: device.state is not DeviceState.STARTING)
        if device.state is DeviceState.STOPPING or device.stream is None or device.pidfd is None:
            raise OSError(EIO, device.error or f"{name} died while it started")
        fds = (device.stream, device.pidfd)
        device.stream = device.pidfd = None
        message_ = DeviceFd(device.token, state.clients.handle(), name, device.pid)
        state.emit(SendFile(file.connection, message_, fds))
        return token

    def _start(self, name: str, file: OpenFile, token: int) -> OpenDevice:
        """:raise OSError: out of descriptors; nothing was started."""
        state = self._state
        memory = list(file.client.memory.values())
        maps = tuple(segment_map(segment) for segment, _ in memory)
        fds = _duplicates([fd for _, fd in memory])
        device = state.devices.open(name, file.handle, file.client.handle, token)
        offer = state.offers.pop(name, None)
        attached = None if offer is None else (offer.control, offer.pidfd)
        state.emit(StartDevice(device.key, name, file.group, maps, fds, attached))
        state.note("hostd_device_start", name=name, key=device.key, attached=offer is not None)
        return device


def _duplicates(descriptors: list[Descriptor]) -> tuple[Descriptor, ...]:
    """One of each, or none. :raise OSError: out of descriptors."""
    made: list[Descriptor] = []
    try:
        for fd in descriptors:
            made.append(fd.duplicate())
    except OSError:
        for fd in made:
            fd.close()
        raise
    return tuple(made)


def queue_key(state: ServiceState, file: OpenFile) -> Hashable:
    """Operations with the same key run one after the other: those of one container and its groups, and what a group is
    asked while it is still being taken out.
    """
    if not file.is_group:
        return file.handle
    container = state.host.groups[file.group].container
    if container is None:
        return file.handle if state.jobs.idle(file.left) else file.left
    file.left = container.handle
    return file.left
