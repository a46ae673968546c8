"""vfio-user's messages: header, commands, payloads.

Source: QEMU ``docs/interop/vfio-user.rst``. Everything is host-endian. A payload is a fixed structure and, for some, a
tail of bytes; each class declares its layout once and its size is checked when the class is made. Numbers from 0x8000
are our extensions; they are used only when both sides name them under the capability ``x-vfio-model``.

:data:`COMMANDS` is the specification as data: who may send a command, what goes in it and in its reply, how many
descriptors.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum, IntFlag
from typing import Annotated, ClassVar, Self

import msgspec
from msgspec import Meta, Struct

from protocols.vfio_user.iommu_messages import (
    AtsAnswer,
    AtsQuery,
    IommuSetup,
    PageAnswer,
    PageQuery,
    PasidControl,
    TranslatedAccess,
)
from protocols.vfio_user.iommu_messages import TranslateReply as TranslateReply
from protocols.vfio_user.iommu_messages import TranslateRequest as TranslateRequest
from protocols.vfio_user.iommu_messages import TranslationEntry as TranslationEntry
from protocols.vfio_user.payload import Payload as Payload
from protocols.vfio_user.payload import layout
from vfio_model.errors import LocalProtocolError, RemoteProtocolError

HEADER = struct.Struct("=HHIII")
HEADER_SIZE = 16
DEFAULT_MAX_DATA = 1 << 20
"""``max_data_xfer_size`` of a peer that does not say."""
MAX_VERSION_DATA = 64 << 10
"""Bytes of JSON in VERSION."""
MAX_PATH = 4096
MAX_FEATURE = 1 << 20
"""``argsz`` of a DEVICE_FEATURE whose answer may be of any length."""


class Command(IntEnum):
    """Command numbers; those not here are answered with ENOTSUP."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18
    X_TRANSLATE = 0x8000
    X_CLOCK = 0x8001
    X_NOTIFIER = 0x8002
    X_IOMMU = 0x8003
    X_PASID = 0x8004
    X_ATS = 0x8005
    X_TRANSLATED = 0x8006
    X_PAGE_REQUEST = 0x8007
    X_PAGE_RESPONSE = 0x8008


class HeaderFlags(IntFlag):
    """The header's flags; bits 0 to 3 are the type: 0 command, 1 reply."""

    REPLY = 1
    TYPE_MASK = 0xF
    NO_REPLY = 0x10
    ERROR = 0x20


class Role(Enum):
    """The client has the guest and its memory; the server is the device."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def other(self) -> Role:
        """The peer's role."""
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


class Header(Struct, frozen=True, array_like=True):
    """The 16 bytes before every payload. ``size`` counts them too; ``errno`` is valid with
    :attr:`HeaderFlags.ERROR`."""

    id: int
    command: int
    size: int
    flags: int
    errno: int

    def pack(self) -> bytes:
        """As on the wire."""
        return HEADER.pack(self.id, self.command, self.size, self.flags, self.errno)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """From exactly 16 bytes."""
        return cls(*HEADER.unpack(data))


assert HEADER.size == HEADER_SIZE


@layout("", 0)
class Empty(Payload, frozen=True):
    """No payload."""


class Extensions(Struct, frozen=True, omit_defaults=True):
    """Ours, under ``x-vfio-model``. Missing: not offered."""

    ats: bool = False
    clock: bool = False
    notifier: bool = False
    iommu: bool = False

    def both(self, other: Extensions) -> Extensions:
        """What two sides have in common."""
        return Extensions(
            self.ats and other.ats,
            self.clock and other.clock,
            self.notifier and other.notifier,
            self.iommu and other.iommu,
        )


Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
DEFAULT_MAX_BITMAP = 256 << 20
"""``max_bitmap_size`` of a peer that does not say."""


class MigrationCapability(Struct, frozen=True):
    """``migration``: the pages of dirty bitmaps in bytes, and the longest bitmap in bytes."""

    pgsize: Positive = 4096
    max_bitmap_size: Positive = DEFAULT_MAX_BITMAP


class TwinSocket(Struct, frozen=True, omit_defaults=True):
    """``twin_socket``; in a server's answer ``fd_index`` says which descriptor is the second socket."""

    supported: bool = False
    fd_index: Count | None = None


class Capabilities(Struct, frozen=True):
    """``capabilities`` of VERSION; defaults are what an absent key means. Unknown keys are skipped."""

    max_msg_fds: Count = 1
    max_data_xfer_size: Positive = DEFAULT_MAX_DATA
    max_dma_maps: Positive = 65535
    pgsizes: Positive = 4096
    write_multiple: bool = False
    migration: MigrationCapability | None = None
    twin_socket: TwinSocket | None = None
    extensions: Extensions = msgspec.field(default=Extensions(), name="x-vfio-model")

    @property
    def twin(self) -> bool:
        """Whether a second socket for the server's commands is offered or taken."""
        return self.twin_socket is not None and self.twin_socket.supported

    def common(self, proposed: Capabilities) -> Capabilities:
        """What a server with these answers to a client that proposed ``proposed``: each side's own limits on what it
        takes stay its own, the rest is what both have.
        """
        migration = None
        if self.migration is not None and proposed.migration is not None:
            bitmap = min(self.migration.max_bitmap_size, proposed.migration.max_bitmap_size)
            migration = MigrationCapability(self.migration.pgsize, bitmap)
        return msgspec.structs.replace(
            self,
            max_dma_maps=min(self.max_dma_maps, proposed.max_dma_maps),
            pgsizes=self.pgsizes & proposed.pgsizes or self.pgsizes,
            write_multiple=self.write_multiple and proposed.write_multiple,
            migration=migration,
            twin_socket=TwinSocket(True, 0) if self.twin and proposed.twin else None,
            extensions=self.extensions.both(proposed.extensions),
        )


_KEYS = frozenset(field.encode_name for field in msgspec.structs.fields(Capabilities))
_VERSION = struct.Struct("=HH")


class _VersionData(Struct, frozen=True):
    capabilities: dict[str, msgspec.Raw] = {}


_VERSION_DECODER = msgspec.json.Decoder(_VersionData)


class Version(Payload, frozen=True):
    """VERSION and its reply: numbers, then JSON that ends in NUL (or nothing at all).

    ``named`` is which keys of the capabilities are said; a server says none that the client did not.
    """

    major: int = 0
    minor: int = 0
    capabilities: Capabilities = Capabilities()
    named: frozenset[str] = _KEYS

    def pack(self) -> bytes:
        """As on the wire."""
        said = msgspec.to_builtins(self.capabilities)
        said = {key: value for key, value in said.items() if key in self.named and value is not None and value != {}}
        return _VERSION.pack(self.major, self.minor) + msgspec.json.encode({"capabilities": said}) + b"\0"

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From a whole body.

        :raise RemoteProtocolError: when it is too short, too long, or not such JSON.
        """
        if not _VERSION.size <= len(body) <= MAX_VERSION_DATA:
            raise RemoteProtocolError(f"VERSION of {len(body)} bytes")
        major, minor = _VERSION.unpack_from(body)
        text = body[_VERSION.size :].removesuffix(b"\0")
        if not text:
            return cls(major, minor, Capabilities(), frozenset())
        try:
            raw = _VERSION_DECODER.decode(text).capabilities
            known = {key: value for key, value in raw.items() if key in _KEYS}
            capabilities = msgspec.json.decode(msgspec.json.encode(known), type=Capabilities)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"VERSION: {error}") from error
        return cls(major, minor, capabilities, frozenset(known))


@layout("IIQQQ", 32)
class DmaMap(Payload, frozen=True):
    """``size`` bytes at DMA address ``address`` are the descriptor's from ``offset``; without a descriptor, by message.

    ``flags``: 1 readable, 2 writeable by the device.
    """

    argsz: int = 32
    flags: int = 0
    offset: int = 0
    address: int = 0
    size: int = 0


@layout("IIQQ", 24)
class DmaUnmap(Payload, frozen=True):
    """``size`` bytes at ``address`` are no longer available. QEMU sends ranges that cover many maps, or none."""

    argsz: int = 24
    flags: int = 0
    address: int = 0
    size: int = 0


@layout("IIII", 16)
class DeviceInfo(Payload, frozen=True):
    """DEVICE_GET_INFO and its reply. ``flags``: 1 reset, 2 PCI."""

    argsz: int = 16
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0


@layout("IIIIQQ", 32, tail=True)
class RegionInfo(Payload, frozen=True):
    """DEVICE_GET_REGION_INFO and its reply, with the capability chain as ``caps``."""

    argsz: int = 32
    flags: int = 0
    index: int = 0
    cap_offset: int = 0
    size: int = 0
    offset: int = 0
    caps: bytes = b""


@layout("IIII", 16, tail=True)
class RegionIoFds(Payload, frozen=True):
    """DEVICE_GET_REGION_IO_FDS and its reply, with ``count`` sub-regions of 40 bytes (:class:`IoFd`) as ``areas``."""

    argsz: int = 16
    flags: int = 0
    index: int = 0
    count: int = 0
    areas: bytes = b""


class IoFdType(IntEnum):
    """How a sub-region's descriptor is to be used: ``VFIO_USER_IO_FD_TYPE_``."""

    IOEVENTFD = 0
    IOREGIONFD = 1


IOEVENTFD_DATAMATCH = 1
"""``KVM_IOEVENTFD_FLAG_DATAMATCH``."""


class IoFd(Struct, frozen=True, array_like=True):
    """A sub-region whose writes signal descriptor ``fd_index`` of the reply. ``size`` 0: of any size."""

    offset: int
    size: int
    fd_index: int
    type: int = int(IoFdType.IOEVENTFD)
    flags: int = 0
    datamatch: int = 0

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=QQIII4xQ")

    def pack(self) -> bytes:
        """As on the wire."""
        return self.FORMAT.pack(*msgspec.structs.astuple(self))

    @classmethod
    def unpack_all(cls, areas: bytes) -> list[IoFd]:
        """Those of a reply. :raise RemoteProtocolError: for a broken array."""
        try:
            return [cls(*values) for values in cls.FORMAT.iter_unpack(areas)]
        except struct.error as error:
            raise RemoteProtocolError(f"sub-regions: {error}") from error


assert IoFd.FORMAT.size == 40


@layout("IIII", 16)
class IrqInfo(Payload, frozen=True):
    """DEVICE_GET_IRQ_INFO and its reply."""

    argsz: int = 16
    flags: int = 0
    index: int = 0
    count: int = 0


@layout("IIIII", 20, tail=True)
class SetIrqs(Payload, frozen=True):
    """DEVICE_SET_IRQS; eventfds travel as descriptors, booleans as ``data``."""

    argsz: int = 20
    flags: int = 0
    index: int = 0
    start: int = 0
    count: int = 0
    data: bytes = b""


@layout("QII", 16, tail=True)
class RegionAccess(Payload, frozen=True):
    """REGION_READ, REGION_WRITE and their replies; ``data`` has ``count`` bytes or is empty, as the direction
    demands."""

    offset: int = 0
    region: int = 0
    count: int = 0
    data: bytes = b""


_WRITE_ENTRY = struct.Struct("=QII")
MULTI_WRITE_SIZE = _WRITE_ENTRY.size + 8
"""Bytes of one write in REGION_WRITE_MULTI: 8 bytes of data follow."""
assert MULTI_WRITE_SIZE == 24


@layout("Q", 8, tail=True)
class RegionWriteMulti(Payload, frozen=True):
    """REGION_WRITE_MULTI: ``wr_cnt`` writes of up to 8 bytes each."""

    wr_cnt: int = 0
    wrs: bytes = b""

    @classmethod
    def of(cls, writes: list[RegionAccess]) -> RegionWriteMulti:
        """The request that carries ``writes``.

        :raise LocalProtocolError: when one is longer than 8 bytes.
        """
        if any(len(write.data) > 8 for write in writes):
            raise LocalProtocolError("REGION_WRITE_MULTI with a write of more than 8 bytes")
        packed = (
            _WRITE_ENTRY.pack(write.offset, write.region, len(write.data)) + write.data.ljust(8, b"\0")
            for write in writes
        )
        return cls(len(writes), b"".join(packed))

    def writes(self) -> list[RegionAccess]:
        """What :meth:`of` was given.

        :raise RemoteProtocolError: when one says more than 8 bytes.
        """
        found = []
        for at in range(0, len(self.wrs), MULTI_WRITE_SIZE):
            offset, region, count = _WRITE_ENTRY.unpack_from(self.wrs, at)
            if count > 8:
                raise RemoteProtocolError(f"REGION_WRITE_MULTI with a write of {count} bytes")
            data = self.wrs[at + _WRITE_ENTRY.size : at + _WRITE_ENTRY.size + count]
            found.append(RegionAccess(offset, region, count, data))
        return found


@layout("Q", 8)
class RegionWriteMultiReply(Payload, frozen=True):
    """How many writes were done: those before the first that failed."""

    wr_cnt: int = 0


@layout("QQ", 16, tail=True)
class DmaAccess(Payload, frozen=True):
    """DMA_READ, DMA_WRITE and their replies, as :class:`RegionAccess`."""

    address: int = 0
    count: int = 0
    data: bytes = b""


@layout("II", 8, tail=True)
class DeviceFeature(Payload, frozen=True):
    """DEVICE_FEATURE and its reply: the feature's number with GET, SET or PROBE, and its data."""

    argsz: int = 8
    flags: int = 0
    data: bytes = b""


@layout("II", 8, tail=True)
class MigData(Payload, frozen=True):
    """MIG_DATA_READ, its reply, and MIG_DATA_WRITE: ``size`` bytes, which are ``data`` as the direction demands.

    A reply may be padded to the size that was asked for.
    """

    argsz: int = 8
    size: int = 0
    data: bytes = b""


@layout("Q", 8)
class ClockSetup(Payload, frozen=True):
    """X_CLOCK: the virtual clock, ``now_ns`` at present. Descriptors: clock memfd, tick memfd, step eventfd, done
    eventfd."""

    now_ns: int = 0


@layout("Q", 8, tail=True)
class NotifierSetup(Payload, frozen=True):
    """X_NOTIFIER: subscribe to address space ``as_id`` at the notifier's socket ``path`` (UTF-8)."""

    as_id: int = 0
    path: bytes = b""


class CommandSpec(Struct, frozen=True):
    """One command: ``sender`` may send it; payload classes; the most descriptors with it and with its reply.

    A peer may send more with a command, which are closed unseen (SPDK sends the memory's with DMA_UNMAP, too). In a
    reply to DEVICE_GET_REGION_INFO there may be the same one for each area (libvfio-user).
    """

    sender: Role
    request: type[Payload]
    reply: type[Payload]
    fds: int = 0
    reply_fds: int = 0
    extension: str = ""
    """The field of :class:`Extensions` that must be negotiated; empty: part of the standard."""


COMMANDS: dict[int, CommandSpec] = {
    Command.VERSION: CommandSpec(Role.CLIENT, Version, Version, reply_fds=1),
    Command.DMA_MAP: CommandSpec(Role.CLIENT, DmaMap, Empty, fds=1),
    Command.DMA_UNMAP: CommandSpec(Role.CLIENT, DmaUnmap, DmaUnmap),
    Command.DEVICE_GET_INFO: CommandSpec(Role.CLIENT, DeviceInfo, DeviceInfo),
    Command.DEVICE_GET_REGION_INFO: CommandSpec(Role.CLIENT, RegionInfo, RegionInfo, reply_fds=253),
    Command.DEVICE_GET_REGION_IO_FDS: CommandSpec(Role.CLIENT, RegionIoFds, RegionIoFds, reply_fds=253),
    Command.DEVICE_GET_IRQ_INFO: CommandSpec(Role.CLIENT, IrqInfo, IrqInfo),
    Command.DEVICE_SET_IRQS: CommandSpec(Role.CLIENT, SetIrqs, Empty, fds=253),
    Command.REGION_READ: CommandSpec(Role.CLIENT, RegionAccess, RegionAccess),
    Command.REGION_WRITE: CommandSpec(Role.CLIENT, RegionAccess, RegionAccess),
    Command.DMA_READ: CommandSpec(Role.SERVER, DmaAccess, DmaAccess),
    Command.DMA_WRITE: CommandSpec(Role.SERVER, DmaAccess, DmaAccess),
    Command.DEVICE_RESET: CommandSpec(Role.CLIENT, Empty, Empty),
    Command.REGION_WRITE_MULTI: CommandSpec(Role.CLIENT, RegionWriteMulti, RegionWriteMultiReply),
    Command.DEVICE_FEATURE: CommandSpec(Role.CLIENT, DeviceFeature, DeviceFeature),
    Command.MIG_DATA_READ: CommandSpec(Role.CLIENT, MigData, MigData),
    Command.MIG_DATA_WRITE: CommandSpec(Role.CLIENT, MigData, Empty),
    Command.X_TRANSLATE: CommandSpec(Role.SERVER, TranslateRequest, TranslateReply, extension="ats"),
    Command.X_CLOCK: CommandSpec(Role.CLIENT, ClockSetup, Empty, fds=4, extension="clock"),
    Command.X_NOTIFIER: CommandSpec(Role.CLIENT, NotifierSetup, Empty, extension="notifier"),
    Command.X_IOMMU: CommandSpec(Role.CLIENT, IommuSetup, Empty, fds=1, extension="iommu"),
    Command.X_PASID: CommandSpec(Role.SERVER, PasidControl, Empty, extension="iommu"),
    Command.X_ATS: CommandSpec(Role.SERVER, AtsQuery, AtsAnswer, extension="iommu"),
    Command.X_TRANSLATED: CommandSpec(Role.SERVER, TranslatedAccess, TranslatedAccess, extension="iommu"),
    Command.X_PAGE_REQUEST: CommandSpec(Role.SERVER, PageQuery, Empty, extension="iommu"),
    Command.X_PAGE_RESPONSE: CommandSpec(Role.CLIENT, PageAnswer, Empty, extension="iommu"),
}


def command_name(command: int) -> str:
    """The name of a command number."""
    try:
        return f"VFIO_USER_{Command(command).name}"
    except ValueError:
        return f"VFIO_USER command {command:#x}"
