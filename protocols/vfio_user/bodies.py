"""What the bodies of vfio-user's messages must hold beyond their layouts, and what peers are forgiven.

Source: QEMU ``docs/interop/vfio-user.rst``; where peers differ from it, what they were seen to send.
"""

from __future__ import annotations

import struct

from protocols.vfio_user.iommu_messages import MAX_TRANSLATIONS, AtsAnswer, TranslatedAccess
from protocols.vfio_user.messages import (
    MAX_PATH,
    MULTI_WRITE_SIZE,
    Command,
    DeviceFeature,
    DeviceInfo,
    DmaAccess,
    DmaMap,
    DmaUnmap,
    Empty,
    IrqInfo,
    MigData,
    NotifierSetup,
    Payload,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    RegionWriteMulti,
    RegionWriteMultiReply,
    SetIrqs,
    TranslateReply,
    command_name,
)
from vfio_model.errors import LocalProtocolError, RemoteProtocolError

MAX_CAPS = 64 << 10
"""Bytes of a region's capability chain."""
_GROWING = (DmaMap, DmaUnmap, DeviceInfo, RegionInfo, RegionIoFds, IrqInfo)
"""Structures of <linux/vfio.h> that begin with their own size, and may be followed by what is not known here."""
_SHORT_COUNT = struct.Struct("=QI")


def known_part(kind: type[Payload], body: bytes) -> bytes:
    """``body`` without what follows the fixed structure. Clients send the buffer that they want the answer in (SPDK for
    DEVICE_GET_REGION_INFO), or a later form of a structure.
    """
    return body[: kind.SIZE] if kind in _GROWING and len(body) > kind.SIZE else body


def unpack_reply(kind: type[Payload], body: bytes) -> Payload:
    """The payload of a reply. DMA_WRITE's has a 4-byte count in the document and an 8-byte one from the peers that were
    seen: both pass, as does something where nothing is expected.

    :raise RemoteProtocolError: when the body has not its size.
    """
    if kind is Empty:
        return Empty()
    if kind is DmaAccess and len(body) == _SHORT_COUNT.size:
        return DmaAccess(*_SHORT_COUNT.unpack(body))
    payload = kind.unpack(body if kind.TAIL else known_part(kind, body))
    if kind is MigData and isinstance(payload, MigData) and len(payload.data) > payload.size:
        return MigData(payload.argsz, payload.size, payload.data[: payload.size])  # padded to what was asked for
    return payload


Wrong = type[LocalProtocolError | RemoteProtocolError]
_ACCESSES = (RegionAccess, DmaAccess)
_WRITES = (Command.REGION_WRITE, Command.DMA_WRITE)


CHECKED_REQUESTS = frozenset((
    RegionAccess, DmaAccess, NotifierSetup, SetIrqs, MigData, DeviceFeature, RegionInfo, RegionIoFds, RegionWriteMulti,
    TranslatedAccess,
))  # fmt: skip
CHECKED_REPLIES = frozenset((
    RegionAccess, DmaAccess, MigData, DeviceFeature, TranslateReply, RegionInfo, RegionIoFds, RegionWriteMultiReply,
    AtsAnswer, TranslatedAccess,
))  # fmt: skip
"""The others need no more than their layout: asking each of these whether it is one takes longer."""


def check_request(command: int, payload: Payload, max_data: int, error: Wrong) -> None:
    """Sizes that the layouts cannot say. :raise error: ``payload`` is not what may go in ``command``."""
    if type(payload) not in CHECKED_REQUESTS:
        return
    if isinstance(payload, _ACCESSES):
        expected = payload.count if command in _WRITES else 0
        if payload.count > max_data or len(payload.data) != expected:
            raise error(f"{command_name(command)} of {payload.count} bytes with {len(payload.data)} bytes of data")
    elif isinstance(payload, NotifierSetup) and not 0 < len(payload.path) <= MAX_PATH:
        raise error(f"a socket path of {len(payload.path)} bytes")
    elif isinstance(payload, SetIrqs) and len(payload.data) > 4096:
        raise error(f"{command_name(command)} with {len(payload.data)} bytes of data")
    elif isinstance(payload, MigData):
        expected = payload.size if command == Command.MIG_DATA_WRITE else 0
        if payload.size > max_data or len(payload.data) != expected:
            raise error(f"{command_name(command)} of {payload.size} bytes with {len(payload.data)} bytes of data")
    elif isinstance(payload, DeviceFeature) and len(payload.data) > max_data:
        raise error(f"{command_name(command)} with {len(payload.data)} bytes of data")
    elif isinstance(payload, RegionInfo) and payload.caps:
        raise error(f"{command_name(command)} with capabilities in the request")
    elif isinstance(payload, RegionIoFds) and payload.areas:
        raise error(f"{command_name(command)} with sub-regions in the request")
    elif isinstance(payload, RegionWriteMulti):
        if len(payload.wrs) != MULTI_WRITE_SIZE * payload.wr_cnt or len(payload.wrs) > max_data:
            raise error(f"{command_name(command)}: {payload.wr_cnt} writes in {len(payload.wrs)} bytes")
        payload.writes()
    elif isinstance(payload, TranslatedAccess) and (reason := payload.excess(max_data)):
        raise error(reason)


def check_reply(request: Payload, reply: Payload, error: Wrong) -> None:
    """What an answer must have in common with its question. :raise error: it has not."""
    if type(reply) not in CHECKED_REPLIES:
        return
    if isinstance(reply, RegionAccess) and isinstance(request, RegionAccess):
        wanted = 0 if request.data else reply.count
        if reply.count > request.count or len(reply.data) != wanted:
            raise error(f"{len(reply.data)} bytes of data answer a region access of {request.count}")
    elif isinstance(reply, DmaAccess) and isinstance(request, DmaAccess):
        wanted = 0 if request.data else reply.count
        if reply.count > request.count or len(reply.data) != wanted:
            raise error(f"{len(reply.data)} bytes of data answer a DMA access of {request.count}")
    elif isinstance(reply, MigData) and isinstance(request, MigData):
        if reply.size > request.size or len(reply.data) not in (reply.size, request.size):
            raise error(f"{len(reply.data)} bytes of data answer a request for {request.size}")
    elif isinstance(reply, DeviceFeature) and isinstance(request, DeviceFeature) and reply.flags != request.flags:
        raise error(f"feature {reply.flags:#x} answers {request.flags:#x}")
    elif isinstance(reply, TranslateReply) and (len(reply.data) != 32 * reply.count or reply.count > MAX_TRANSLATIONS):
        raise error(f"{reply.count} translations in {len(reply.data)} bytes")
    elif isinstance(reply, RegionInfo) and len(reply.caps) > MAX_CAPS:
        raise error(f"{len(reply.caps)} bytes of region capabilities")
    elif isinstance(reply, RegionIoFds) and len(reply.areas) > MAX_CAPS:
        raise error(f"{len(reply.areas)} bytes of sub-regions")
    elif isinstance(reply, AtsAnswer | TranslatedAccess) and (reason := reply.wrong(request)):
        raise error(reason)
    elif (
        isinstance(reply, RegionWriteMultiReply)
        and isinstance(request, RegionWriteMulti)
        and reply.wr_cnt > request.wr_cnt
    ):
        raise error(f"{reply.wr_cnt} writes of {request.wr_cnt} are done")
