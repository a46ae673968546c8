"""What a device calls for DMA (``include/sysemu/dma.h`` in QEMU): read, write, map, loads and stores, fills.

A :class:`DMASpace` is handed to the device once; what stands behind it is bound when the device is attached and bound
anew when bus mastering, bypass or a window root changes. Its attributes *are* the implementation's bound methods: no
bus walk and no ``if`` per access. For a device without an IOMMU ``dma.read is system_as.read``.

Addresses wrap at 2**64. A piecewise operation stops at its first failure: bytes before it have moved, the rest of a
read is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from vfio_model.memory.mapping import DMAMapping, MappingTable
from vfio_model.memory.types import DMADirection, MemTxResult, ReadBuffer, WriteBuffer
from vfio_model.ranges import U64_MAX, wrap64

Iovas = Sequence[int] | Any
"""Addresses of equal-sized pieces: a sequence of ints or a numpy uint64 array."""
OnInvalidate = Callable[[DMAMapping], None]

FILL_CHUNK = 65536
"""Bytes per write of :func:`memory_set`."""


class DMAImpl(Protocol):
    """One way a DMA travels. Buffers are contiguous with item size 1; iovas are u64."""

    @property
    def read(self) -> Callable[[int, WriteBuffer], MemTxResult]:
        """``read(iova, out)``: fill ``out``; on failure the remainder is zero."""

    @property
    def write(self) -> Callable[[int, ReadBuffer], MemTxResult]:
        """``write(iova, data)``: stops at the first failing piece."""

    def read_many(self, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        """Pieces of ``size`` bytes, one after another into ``out``; stops at the first failure, the remainder is
        zero.
        """

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        """Pieces of ``size`` bytes from ``data``, in order; stops at the first failure."""

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """Map up to ``length`` bytes; None when nothing decodes there or the bounce budget is empty."""


@runtime_checkable
class Rebinding(Protocol):
    """An implementation whose methods are replaced now and then (an address space at a commit) and which then renews
    them in every :class:`DMASpace` that is bound to it."""

    def attach(self, dma: DMASpace) -> None:
        """``dma`` is bound to this."""

    def detach(self, dma: DMASpace) -> None:
        """``dma`` is bound to something else now."""


class DMASpace:
    """A device's view of memory; one per device, or several. Starts blocked."""

    __slots__ = ("__weakref__", "_impl", "mappings", "read", "read_many", "write", "write_many")

    read: Callable[[int, WriteBuffer], MemTxResult]
    write: Callable[[int, ReadBuffer], MemTxResult]
    read_many: Callable[[Iovas, int, WriteBuffer], MemTxResult]
    write_many: Callable[[Iovas, int, ReadBuffer], MemTxResult]

    def __init__(self, impl: DMAImpl | None = None) -> None:
        self.mappings = MappingTable()
        """What the device has mapped and not yet unmapped."""
        self._impl: DMAImpl = BLOCKED
        self.refresh()
        if impl is not None:
            self.bind(impl)

    @property
    def impl(self) -> DMAImpl:
        """What this is bound to."""
        return self._impl

    def bind(self, impl: DMAImpl) -> None:
        """From now on DMA goes through ``impl``. Mappings made through another implementation are invalidated."""
        old = self._impl
        if impl is not old:
            if isinstance(old, Rebinding):
                old.detach(self)
            if isinstance(impl, Rebinding):
                impl.attach(self)
        self._impl = impl
        self.refresh()
        if impl is not old:
            self.mappings.invalidate(0, U64_MAX)

    def refresh(self) -> None:
        """Copy the implementation's methods anew; called by an implementation that replaced them."""
        impl = self._impl
        self.read, self.write = impl.read, impl.write
        self.read_many, self.write_many = impl.read_many, impl.write_many

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """Map up to ``length`` bytes at ``iova`` for longer than one operation; see :class:`DMAImpl`."""
        mapping = self._impl.map(iova, length, direction, on_invalidate)
        if mapping is not None:
            self.mappings.add(mapping)
        return mapping

    def unmap(self, mapping: DMAMapping, access_len: int) -> None:
        """Give ``mapping`` back, whatever it was made through; the first ``access_len`` bytes were accessed."""
        self.mappings.remove(mapping)
        mapping.unmap(access_len)


class BlockedImpl:
    """Nothing decodes: bus mastering is off, or no address space is attached."""

    def read(self, iova: int, out: WriteBuffer) -> MemTxResult:
        """Zero-fills."""
        out[:] = bytes(len(out))
        return MemTxResult.DECODE_ERROR if len(out) else MemTxResult.OK

    def write(self, iova: int, data: ReadBuffer) -> MemTxResult:
        """Drops ``data``."""
        return MemTxResult.DECODE_ERROR if len(data) else MemTxResult.OK

    def read_many(self, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        """Zero-fills."""
        return self.read(0, out)

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        """Drops ``data``."""
        return self.write(0, data)

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """Nothing to map."""
        return None


BLOCKED = BlockedImpl()


def memory_valid(dma: DMASpace, iova: int, length: int, direction: DMADirection) -> bool:
    """Whether every byte of the range translates for ``direction``; moves nothing. Length 0 is valid."""
    if length == 0:
        return True
    impl = dma.impl
    return impl.valid(iova, length, direction) if isinstance(impl, Validating) else False


@runtime_checkable
class Validating(Protocol):
    """An implementation that can tell without moving data."""

    def valid(self, iova: int, length: int, direction: DMADirection) -> bool:
        """Whether all of ``length`` bytes from ``iova`` translate."""


def memory_set(dma: DMASpace, iova: int, byte: int, length: int) -> MemTxResult:
    """Fill ``length`` bytes, all of them, with ``byte``; stops at the first failure."""
    chunk = bytes([byte]) * min(length, FILL_CHUNK)
    done = 0
    while done < length:
        step = min(length - done, FILL_CHUNK)
        result = dma.write(wrap64(iova + done), chunk if step == len(chunk) else chunk[:step])
        if result:
            return result
        done += step
    return MemTxResult.OK


def _load(dma: DMASpace, iova: int, size: int, big: bool) -> tuple[MemTxResult, int]:
    data = bytearray(size)
    result = dma.read(iova, data)
    return result, 0 if result else int.from_bytes(data, "big" if big else "little")


def _store(dma: DMASpace, iova: int, size: int, value: int, big: bool) -> MemTxResult:
    masked = value & ((1 << 8 * size) - 1)
    return dma.write(iova, masked.to_bytes(size, "big" if big else "little"))


def ldub(dma: DMASpace, iova: int) -> tuple[MemTxResult, int]:
    """Load a byte. As every load: (result, value); after a failure the value is 0."""
    return _load(dma, iova, 1, False)


def ldw_le(dma: DMASpace, iova: int) -> tuple[MemTxResult, int]:
    """Load 16 bits, little-endian."""
    return _load(dma, iova, 2, False)


def ldw_be(dma: DMASpace, iova: int) -> tuple[MemTxResult, int]:
    """Load 16 bits, big-endian."""
    return _load(dma, iova, 2, True)


def ldl_le(dma: DMASpace, iova: int) -> tuple[MemTxResult, int]:
    """Load 32 bits, little-endian."""
    return _load(dma, iova, 4, False)


def ldl_be(dma: DMASpace, iova: int) -> tuple[MemTxResult, int]:
    """Load 32 bits, big-endian."""
    return _load(dma, iova, 4, True)


def ldq_le(dma: DMASpace, iova: int) -> tuple[MemTxResult, int]:
    """Load 64 bits, little-endian."""
    return _load(dma, iova, 8, False)


def ldq_be(dma: DMASpace, iova: int) -> tuple[MemTxResult, int]:
    """Load 64 bits, big-endian."""
    return _load(dma, iova, 8, True)


def stb(dma: DMASpace, iova: int, value: int) -> MemTxResult:
    """Store a byte. As every store: the value is cut to its width."""
    return _store(dma, iova, 1, value, False)


def stw_le(dma: DMASpace, iova: int, value: int) -> MemTxResult:
    """Store 16 bits, little-endian."""
    return _store(dma, iova, 2, value, False)


def stw_be(dma: DMASpace, iova: int, value: int) -> MemTxResult:
    """Store 16 bits, big-endian."""
    return _store(dma, iova, 2, value, True)


def stl_le(dma: DMASpace, iova: int, value: int) -> MemTxResult:
    """Store 32 bits, little-endian."""
    return _store(dma, iova, 4, value, False)


def stl_be(dma: DMASpace, iova: int, value: int) -> MemTxResult:
    """Store 32 bits, big-endian."""
    return _store(dma, iova, 4, value, True)


def stq_le(dma: DMASpace, iova: int, value: int) -> MemTxResult:
    """Store 64 bits, little-endian."""
    return _store(dma, iova, 8, value, False)


def stq_be(dma: DMASpace, iova: int, value: int) -> MemTxResult:
    """Store 64 bits, big-endian."""
    return _store(dma, iova, 8, value, True)
