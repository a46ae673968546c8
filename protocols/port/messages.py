"""VFIO ioctls as messages: guestd (DEALER) to hostd (ROUTER, ``hostd.zmq``), one frame each.

``arg`` is the raw structure of ``include/uapi/linux/vfio.h``, native-endian, so that argsz, flags, ENOTTY and number
collisions mean what ioctl(2) means. An ioctl whose real argument is an int or a string is packed: SET_IOMMU and
CHECK_EXTENSION take 4 bytes, GROUP_SET_CONTAINER the 8-byte handle of the container, GROUP_GET_DEVICE_FD a name that
ends in NUL (its result is the 8-byte token of a :class:`protocols.port.files.DeviceFd`). Integer results are 4 bytes.

A :class:`Hcall` goes the same way: what a virtual machine asks the host before its own process.

Handles come from the SEQPACKET side (:mod:`protocols.port.files`) and die with their connection.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from protocols.codec import Codec
from protocols.fields import U32, U64, Errno, Message, Text

MAX_COUNT = 16384
"""Structures in one :class:`Ioctl`."""
MAX_ARG = 1 << 20
"""Bytes of ``arg``, all structures together."""

Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
HcallArgs = Annotated[list[U64], Meta(min_length=4, max_length=4)]
Arg = Annotated[bytes, Meta(max_length=MAX_ARG)]


class Ioctl(Message, tag="ioctl", frozen=True):
    """``count`` structures of one ``cmd`` back to back in ``arg``, executed in order up to the first failure."""

    seq: U64
    cause: U64
    mm: U64
    """Handle of the client's mm; its VMAs are where a ``vaddr`` is looked up."""
    handle: U64
    cmd: U32
    count: Count
    arg: Arg


class Hcall(Message, tag="hcall", frozen=True):
    """A hypercall of the guest's that the host may answer by itself: H_PUT_TCE, H_STUFF_TCE, H_PUT_TCE_INDIRECT.

    ``handle`` is a virtual machine's, ``links`` how many followers of the table the client expects the host to serve.
    Its
    :class:`Return` carries the return code, signed, as 8 bytes; H_TOO_HARD when the client has to do it.
    """

    seq: U64
    cause: U64
    mm: U64
    handle: U64
    nr: U32
    args: HcallArgs
    links: U32


class Return(Message, tag="return", frozen=True):
    """The end of :class:`Ioctl` or :class:`Hcall` ``seq``: ``done`` structures succeeded; ``errno`` is that of the next
    one, or 0.
    """

    seq: U64
    errno: Errno
    done: U32
    arg: Arg


class Ping(Message, tag="ping", frozen=True):
    """Is the main loop alive? (libzmq's own heartbeat is answered by a thread even when it hangs.)"""

    seq: U64


class Pong(Message, tag="pong", frozen=True):
    """Answer to :class:`Ping`."""

    seq: U64


class Refused(Message, tag="refused", frozen=True):
    """Sent once to a peer that broke the protocol; whatever it sends afterwards is ignored."""

    reason: Text


Request = Ioctl | Hcall | Ping
Response = Return | Pong | Refused

REQUESTS: Codec[Request] = Codec(Request, "port request", max_bytes=MAX_ARG + 256)
RESPONSES: Codec[Response] = Codec(Response, "port response", max_bytes=MAX_ARG + 4 * 4096 + 256)
