"""Equal-sized pieces in one call: ``read_many`` and ``write_many`` of an address space.

Few pieces go one by one. From :data:`VECTOR_MIN` pieces on the addresses are translated as arrays, straight to the
dominant RAM range or through IOMMUs that offer ``translate_many``, and the bytes are gathered or scattered at once.
The result is the same byte for byte: pieces in order, stop at the first failure, the remainder of a read zero. The
first piece that the arrays cannot serve goes the ordinary way, so that faults are raised exactly as for single
accesses; so does everything behind a piece that is unusual yet good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vfio_model.memory.access import zero
from vfio_model.memory.dma import Iovas
from vfio_model.memory.space import Space
from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer

VECTOR_MIN = 64
"""Pieces from which arrays pay."""


def read_many(space: Space, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
    """See :meth:`AddressSpace.read_many`."""
    count = len(iovas)
    assert len(out) == count * size, "the buffer holds exactly the pieces"
    done = 0
    if count >= VECTOR_MIN and size:
        from vfio_model.memory import vector_pieces  # noqa: PLC0415  numpy is imported at first use

        done = vector_pieces.gather(space, iovas, size, out)
    if done == count:
        return MemTxResult.OK
    read, view, at = space.read, memoryview(out), done * size
    for iova in _ints(iovas, done):
        result = read(iova, view[at : at + size])
        at += size
        if result:
            zero(view, at)
            return result
    return MemTxResult.OK


def write_many(space: Space, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
    """See :meth:`AddressSpace.write_many`."""
    count = len(iovas)
    assert len(data) == count * size, "the buffer holds exactly the pieces"
    done = 0
    if count >= VECTOR_MIN and size:
        from vfio_model.memory import vector_pieces  # noqa: PLC0415  numpy is imported at first use

        done = vector_pieces.scatter(space, iovas, size, data)
    if done == count:
        return MemTxResult.OK
    write, view, at = space.write, memoryview(data), done * size
    for iova in _ints(iovas, done):
        result = write(iova, view[at : at + size])
        at += size
        if result:
            return result
    return MemTxResult.OK


def _ints(iovas: Iovas, done: int) -> Sequence[int]:
    rest: Any = iovas[done:] if done else iovas
    values: Sequence[int] = rest.tolist() if hasattr(rest, "tolist") else rest
    return values
