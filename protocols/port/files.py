"""The open files of the port: SEQPACKET ``hostd.sock``, descriptors by SCM_RIGHTS.

One connection is one open file, as one descriptor of /dev/vfio is: its first message opens it, its end is
``release()``. Requests on a connection are answered in order. The first request is :class:`OpenMm`, :class:`OpenFile`,
:class:`CreateSpaprTce` or :class:`AttachDevice`; on an mm's connection :class:`DeclareMemory` and
:class:`UndeclareMemory` follow. On a group's connection the host sends :class:`DeviceFd` by itself, before the Return
of the ioctl that caused it.

:data:`FDS` says how many descriptors go with a message; any other number is a protocol error.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from protocols.codec import Codec
from protocols.fields import U64, Errno, Message, Name, Path, Pid, Text


class OpenMm(Message, tag="open-mm", frozen=True):
    """This client is an mm with ``memlock`` bytes of RLIMIT_MEMLOCK (declared; all ones: unlimited)."""

    memlock: U64
    name: Name


class OpenFile(Message, tag="open-file", frozen=True):
    """Open ``/dev/vfio/vfio``, ``/dev/vfio/<group>`` or ``/dev/kvm`` (a new virtual machine) on behalf of the mm whose
    handle is ``mm``."""

    path: Path
    mm: U64


class DeclareMemory(Message, tag="declare-memory", frozen=True):
    """A VMA of this mm: ``length`` bytes at ``hva`` are ``segment`` from ``offset``, backed by pages of ``page_size``.

    With it goes the segment's memfd, sealed against growing and shrinking.
    """

    hva: U64
    length: U64
    segment: Name
    offset: U64
    page_size: U64


class UndeclareMemory(Message, tag="undeclare-memory", frozen=True):
    """The VMA at ``hva`` is gone (munmap)."""

    hva: U64
    length: U64


class AttachDevice(Message, tag="attach-device", frozen=True):
    """A device server that somebody else started is offered as host device ``name``.

    With it go the server's control socket (:mod:`protocols.port.device`) and its pidfd.
    """

    name: Name


class CreateSpaprTce(Message, tag="create-spapr-tce", frozen=True):
    """``KVM_CREATE_SPAPR_TCE_64`` on virtual machine ``vm`` of mm ``mm``: this connection becomes the table's file.

    ``arg`` is the structure of the uapi.
    """

    mm: U64
    vm: U64
    arg: Annotated[bytes, Meta(max_length=64)]


class OpenedTable(Message, tag="opened-table", frozen=True):
    """The connection is the file of a TCE table; with it goes the memfd that holds its entries."""

    handle: U64


class Opened(Message, tag="opened", frozen=True):
    """The connection is open; ZeroMQ requests quote ``handle`` (random, never used again)."""

    handle: U64


class OpenError(Message, tag="open-error", frozen=True):
    """The request failed with ``errno``; ``reason`` says why to a person."""

    errno: Errno
    reason: Text


class Done(Message, tag="done", frozen=True):
    """The request (DeclareMemory, UndeclareMemory, AttachDevice) is carried out."""


class DeviceFd(Message, tag="device-fd", frozen=True):
    """What GROUP_GET_DEVICE_FD hands out: the device's vfio-user stream and the pidfd of its process.

    ``token`` is the one in the ioctl's result, ``handle`` the device file's own handle.
    """

    token: U64
    handle: U64
    name: Name
    pid: Pid


Request = OpenMm | OpenFile | DeclareMemory | UndeclareMemory | AttachDevice | CreateSpaprTce
Response = Opened | OpenedTable | OpenError | Done | DeviceFd

REQUESTS: Codec[Request] = Codec(Request, "file request", max_bytes=16 << 10)
RESPONSES: Codec[Response] = Codec(Response, "file response", max_bytes=24 << 10)

FDS: dict[type[Message], int] = {DeclareMemory: 1, AttachDevice: 2, DeviceFd: 2, OpenedTable: 1}
"""Descriptors that go with a message; 0 when not listed."""


def fd_count(message: Request | Response) -> int:
    """How many descriptors go with ``message``."""
    return FDS.get(type(message), 0)
