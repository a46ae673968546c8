"""The short way of what a client asks most, without objects for message, payload and event.

At the server: header and body in, answer out. A frame goes this way when nothing about it is unusual: a client's
REGION_READ, DMA_MAP with at most one descriptor or DMA_UNMAP that wants its reply, or a REGION_WRITE that wants none,
of exactly the size that the specification gives. It is carried out and answered at once, so the state need not remember
it. Whatever else comes takes the ordinary way (:mod:`protocols.vfio_user.state`), which says what is wrong with it.

At the client: a REGION_READ out, and the data of its answer in, when it is no error and as long as it was asked for.
"""

from __future__ import annotations

import struct

from protocols.vfio_user.messages import HEADER, HEADER_SIZE, Command, DmaMap, DmaUnmap, HeaderFlags, RegionAccess

# As plain numbers: members of an enumeration cost 0.2 us each time that they are looked up in their class.
_REPLY, _NO_REPLY, _ERROR = int(HeaderFlags.REPLY), int(HeaderFlags.NO_REPLY), int(HeaderFlags.ERROR)
_REGION_READ, _REGION_WRITE = int(Command.REGION_READ), int(Command.REGION_WRITE)
_DMA_MAP = int(Command.DMA_MAP)
_FORMS = {
    _REGION_READ: RegionAccess.FORMAT,
    _REGION_WRITE: RegionAccess.FORMAT,
    _DMA_MAP: DmaMap.FORMAT,
    int(Command.DMA_UNMAP): DmaUnmap.FORMAT,
}

_ACCESS = struct.Struct(f"{HEADER.format}{RegionAccess.FORMAT.format.removeprefix('=')}")
"""Header and fixed structure of a region access."""
_ACCESS_SIZE = HEADER_SIZE + RegionAccess.SIZE
assert _ACCESS.size == _ACCESS_SIZE

PlainRequest = tuple[int, int, tuple[int, ...]]
"""id, command, the fields of its fixed structure in their order."""


def plain_request(header: bytes, body: bytes, fds: int, max_data: int) -> PlainRequest | None:
    """The request in a frame of a client that came with ``fds`` descriptors and may move ``max_data`` bytes; None: it
    goes the ordinary way.
    """
    number, command, _, flags, _ = HEADER.unpack(header)
    form = _FORMS.get(command)
    if form is None or len(body) < form.size or fds > (command == _DMA_MAP):
        return None
    values = form.unpack_from(body)
    data = 0
    if command == _REGION_WRITE:
        data, flags = values[2], flags ^ _NO_REPLY
    elif command == _REGION_READ and values[2] > max_data:
        return None
    if flags or data > max_data or len(body) != form.size + data:
        return None
    return number, command, values


def plain_answer(request: PlainRequest, body: bytes) -> bytes:
    """The answer with ``body``."""
    return HEADER.pack(request[0], request[1], HEADER_SIZE + len(body), _REPLY, 0) + body


def plain_refusal(request: PlainRequest, number: int) -> bytes:
    """The answer with errno ``number``."""
    return HEADER.pack(request[0], request[1], HEADER_SIZE, _REPLY | _ERROR, number)


def plain_read(number: int, region: int, offset: int, count: int) -> bytes:
    """A client's REGION_READ with id ``number``."""
    return _ACCESS.pack(number, _REGION_READ, _ACCESS_SIZE, 0, 0, offset, region, count)


def plain_data(number: int, count: int, header: bytes, body: bytes) -> bytes | None:
    """The ``count`` bytes in the answer to :func:`plain_read`; None: the frame goes the ordinary way."""
    answer, command, _, flags, _ = HEADER.unpack(header)
    if answer != number or command != _REGION_READ or flags != _REPLY or len(body) != RegionAccess.SIZE + count:
        return None
    return body[RegionAccess.SIZE :] if RegionAccess.FORMAT.unpack_from(body)[2] == count else None
