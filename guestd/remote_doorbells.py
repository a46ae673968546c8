"""Writes to a vfio-user device's regions that are signals: an eventfd is rung, and no message sent.

A server lists them (``VFIO_USER_DEVICE_GET_REGION_IO_FDS``); it is not believed: what is no eventfd, no ioeventfd, or
does not lie in the region is not used, and goes by message. The specification has no shadow, which keeps the value.

Order: a ring overtakes messages. So one is rung only when the device has taken everything that was posted to it;
otherwise the write goes by message, in its turn, and the answer says when rings may follow. Messages behind a ring may
overtake it in turn, unless the server looks at its doorbells before it carries out a message, as those of this project
do; a register for which that matters is none that a server lists.

Source: QEMU ``docs/interop/vfio-user.rst`` ("VFIO_USER_DEVICE_GET_REGION_IO_FDS"); KVM_IOEVENTFD of Linux's
``Documentation/virt/kvm/api.rst``.
"""

from __future__ import annotations

import select
from collections.abc import Iterator, Sequence
from typing import Final

from protocols.transport.kernel import EventFd, is_eventfd
from protocols.transport.unix import close_fds
from protocols.vfio_user.messages import IOEVENTFD_DATAMATCH, IoFd, IoFdType, RegionIoFds
from vfio_model.errors import RemoteProtocolError
from vfio_model.trace import Trace

_SIZES: Final = (0, 1, 2, 4, 8)
"""Bytes of a write that can be one; 0: any."""


class _Bell:
    """A write of ``area`` rings ``event``."""

    def __init__(self, area: IoFd, event: EventFd) -> None:
        self.event = event
        self._size = area.size
        self._data = None
        if area.flags & IOEVENTFD_DATAMATCH:
            self._data = (area.datamatch & (1 << 8 * area.size) - 1).to_bytes(area.size, "little")
        self._room = select.poll()
        self._room.register(event, select.POLLOUT)

    def matches(self, data: bytes) -> bool:
        """Whether a write of ``data`` is one."""
        return self._size in (0, len(data)) and self._data in (None, data)

    def ring(self) -> bool:
        """Whether it was rung; when its counter is full, a blocking descriptor would keep us."""
        if not self._room.poll(0):
            return False
        self.event.ring()
        return True


class RemoteDoorbells:
    """Of the device ``name``."""

    def __init__(self, name: str, trace: Trace) -> None:
        self._name, self._trace = name, trace
        self._bells: dict[tuple[int, int], list[_Bell]] = {}
        self._events: list[EventFd] = []

    def add(self, info: RegionIoFds, size: int, fds: Sequence[int]) -> None:
        """Use what ``info`` offers of a region of ``size`` bytes. The descriptors are taken over."""
        events = [EventFd(fd) if is_eventfd(fd) else None for fd in fds]
        close_fds([fd for fd, event in zip(fds, events, strict=True) if event is None])
        self._events += [event for event in events if event is not None]
        try:
            for area in _areas(info):
                event = events[area.fd_index] if area.fd_index < len(events) else None
                if event is None or not _usable(area, size):
                    raise RemoteProtocolError(f"a doorbell at {area.offset:#x} that is none")
                self._bells.setdefault((info.index, area.offset), []).append(_Bell(area, event))
        except RemoteProtocolError as error:
            self._trace("vfio_user_doorbell_by_message", name=self._name, region=info.index, reason=str(error))

    def are_rung(self, index: int, offset: int, data: bytes) -> bool:
        """Whether a write of ``data`` is a signal."""
        bells = self._bells.get((index, offset))
        return bells is not None and any(bell.matches(data) for bell in bells)

    def ring(self, index: int, offset: int, data: bytes) -> bool:
        """Do it; False: it has to be written."""
        return any(bell.matches(data) and bell.ring() for bell in self._bells.get((index, offset), ()))

    def close(self) -> None:
        """Harmless twice."""
        self._bells.clear()
        while self._events:
            self._events.pop().close()


def _usable(area: IoFd, size: int) -> bool:
    known = area.type == IoFdType.IOEVENTFD and not area.flags & ~IOEVENTFD_DATAMATCH and area.size in _SIZES
    return known and area.offset + max(area.size, 1) <= size and (area.size or not area.flags) != 0


def _areas(info: RegionIoFds) -> Iterator[IoFd]:
    """:raise RemoteProtocolError: they are not as many as it says."""
    stride, rest = divmod(len(info.areas), info.count) if info.count else (0, len(info.areas))
    if rest or (info.count and stride < IoFd.FORMAT.size):
        raise RemoteProtocolError(f"{info.count} doorbells in {len(info.areas)} bytes")
    for at in range(0, len(info.areas), max(stride, 1)):
        yield from IoFd.unpack_all(info.areas[at : at + IoFd.FORMAT.size])
