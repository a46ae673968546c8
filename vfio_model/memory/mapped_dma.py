"""DMA through the maps of a device's user (:mod:`vfio_model.memory.iova_maps`): scalar, in place, and many at once.

An access is made of pieces, one for each map that it touches. A map without bytes goes by message: the *rest* is asked.
The first piece that fails ends the access; what it was, where, and which map is nearest is told to ``refused``.

A mapping is shown in place when it lies in one map and the device wants to hear of its end (``on_invalidate``): who
cannot be told gets a bounce buffer, because its memory may be taken away at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final, Protocol

from vfio_model.batch import pages
from vfio_model.batch.lazy import lazy_numpy
from vfio_model.memory.dma import DMAImpl, Iovas, OnInvalidate
from vfio_model.memory.iova_maps import PAGE_BITS, READ, WRITE, IovaMap, IovaMaps, permission
from vfio_model.memory.mapping import BounceBudget, DMAMapping, MappingTable
from vfio_model.memory.types import DMADirection, MemTxResult, ReadBuffer, WriteBuffer
from vfio_model.ranges import U64_MAX

VECTOR_MIN: Final = 64
"""Pieces from which arrays pay."""
BOUNCE_BYTES: Final = 1 << 20
"""Of all bounce buffers of one device."""

Refused = Callable[[int, int, bool, str], None]
"""``refused(iova, length, is_write, why)``: an access failed."""


class Backed(Protocol):
    """What a map's bytes are part of."""

    @property
    def view(self) -> memoryview:
        """All of it; a map's ``offset`` counts from its start."""


class MappedDma:
    """A :class:`~vfio_model.memory.dma.DMAImpl` over ``maps``. ``rest`` carries what has no bytes here.

    With ``ask_always`` the user answers for addresses that it did not map, too.
    """

    def __init__(
        self,
        maps: IovaMaps[Any],
        rest: DMAImpl,
        refused: Refused = lambda iova, length, is_write, why: None,
        *,
        ask_always: bool = False,
    ) -> None:
        self.maps, self._rest, self._refused, self._ask_always = maps, rest, refused, ask_always
        self.read: Callable[[int, WriteBuffer], MemTxResult] = self._reader()
        """See ``DMAImpl``."""
        self.write: Callable[[int, ReadBuffer], MemTxResult] = self._writer()
        """See ``DMAImpl``."""
        self.mappings = MappingTable()
        """Mappings in place, by their addresses."""
        self.bounce = BounceBudget(BOUNCE_BYTES)

    # -- one ---------------------------------------------------------------------------------------------------------

    def _reader(self) -> Callable[[int, WriteBuffer], MemTxResult]:
        get, slow, ok = self.maps.near.get, self._in_pieces, MemTxResult.OK
        last: IovaMap[Any] = IovaMap(0, 0, 0, None, None)

        def read(iova: int, out: WriteBuffer) -> MemTxResult:
            nonlocal last
            at, size = iova - last.iova, len(out)
            if 0 <= at <= last.size - size and (view := last.readable) is not None:
                out[:] = view[at : at + size]
                return ok
            known = get(iova >> PAGE_BITS)
            if known is not None and known is not last:
                last = known
                return read(iova, out)
            return slow(iova, memoryview(out), is_write=False)

        return read

    def _writer(self) -> Callable[[int, ReadBuffer], MemTxResult]:
        get, slow, ok = self.maps.near.get, self._in_pieces, MemTxResult.OK
        last: IovaMap[Any] = IovaMap(0, 0, 0, None, None)

        def write(iova: int, data: ReadBuffer) -> MemTxResult:
            nonlocal last
            at, size = iova - last.iova, len(data)
            if 0 <= at <= last.size - size and (view := last.writable) is not None:
                view[at : at + size] = data
                return ok
            known = get(iova >> PAGE_BITS)
            if known is not None and known is not last:
                last = known
                return write(iova, data)
            return slow(iova, memoryview(data), is_write=True)

        return write

    def _in_pieces(self, iova: int, buffer: memoryview, *, is_write: bool) -> MemTxResult:
        done = 0
        while done < len(buffer):
            here = (iova + done) & U64_MAX
            known = self.maps.find(here)
            count = len(buffer) - done if known is None else min(len(buffer) - done, known.last - here + 1)
            result = self._piece(known, here, buffer[done : done + count], is_write=is_write)
            if result:
                if not is_write:
                    buffer[done + count :] = bytes(len(buffer) - done - count)
                return result
            done += count
        return MemTxResult.OK

    def _piece(self, known: IovaMap[Any] | None, iova: int, buffer: memoryview, *, is_write: bool) -> MemTxResult:
        """A read that fails leaves zeroes behind what it delivered."""
        if known is None and not self._ask_always:
            return self._refuse(iova, buffer, is_write, "not mapped", MemTxResult.DECODE_ERROR)
        wanted = WRITE if is_write else READ
        if known is not None and not known.perm & wanted:
            why = f"the map {known!r} does not permit it ({permission(known.perm)})"
            return self._refuse(iova, buffer, is_write, why, MemTxResult.ACCESS_ERROR)
        view = None if known is None else known.writable if is_write else known.readable
        if view is None or known is None:
            result = self._rest.write(iova, buffer) if is_write else self._rest.read(iova, buffer)
            if result:
                self._tell(iova, len(buffer), is_write, "by message, and its user refused or did not answer")
            return result
        at = iova - known.iova
        if is_write:
            view[at : at + len(buffer)] = buffer
        else:
            buffer[:] = view[at : at + len(buffer)]
        return MemTxResult.OK

    def _refuse(self, iova: int, buffer: memoryview, is_write: bool, why: str, result: MemTxResult) -> MemTxResult:
        if not is_write:
            buffer[:] = bytes(len(buffer))
        self._tell(iova, len(buffer), is_write, why)
        return result

    def _tell(self, iova: int, length: int, is_write: bool, why: str) -> None:
        if why == "not mapped":
            near = self.maps.nearest(iova)
            why += "; nothing is" if near is None else f"; the nearest map is {near!r}"
        self._refused(iova, length, is_write, why)

    # -- many --------------------------------------------------------------------------------------------------------

    def read_many(self, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        """See ``DMAImpl``."""
        view, count, done = memoryview(out), len(iovas), 0
        assert len(view) == count * size, "the buffer holds exactly the pieces"
        if count >= VECTOR_MIN and size:
            done = self._vectors(iovas, size, view, READ)
        for number in range(done, count):
            result = self.read(int(iovas[number]), view[number * size : (number + 1) * size])
            if result:
                view[(number + 1) * size :] = bytes(len(view) - (number + 1) * size)
                return result
        return MemTxResult.OK

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        """See ``DMAImpl``."""
        view, count, done = memoryview(data), len(iovas), 0
        assert len(view) == count * size, "the buffer holds exactly the pieces"
        if count >= VECTOR_MIN and size:
            done = self._vectors(iovas, size, view, WRITE)
        for number in range(done, count):
            result = self.write(int(iovas[number]), view[number * size : (number + 1) * size])
            if result:
                return result
        return MemTxResult.OK

    def _vectors(self, iovas: Iovas, size: int, buffer: memoryview, wanted: int) -> int:
        """Move as many leading pieces as arrays can; returns how many."""
        if not self.maps:
            return 0
        np = lazy_numpy()
        try:
            addresses = np.asarray(iovas, dtype=np.uint64)
        except OverflowError:  # an address that has still to wrap
            return 0
        starts, sizes, perms = self.maps.arrays()
        places = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        good = places >= 0
        places[~good] = 0
        offsets = addresses - starts[places]
        room = sizes[places]
        good &= (perms[places] & wanted).astype(bool) & (room >= size)
        good &= offsets <= np.where(good, room - np.uint64(size), np.uint64(0))
        count = len(good) if good.all() else int(good.argmin())
        return self._runs(places[:count], offsets[:count], size, buffer, wanted)

    def _runs(self, places: Any, offsets: Any, size: int, buffer: memoryview, wanted: int) -> int:
        """Move pieces that lie in maps, as far as these have bytes: one go for each run in the same memory."""
        np = lazy_numpy()
        begins, owners = self.maps.sources()
        in_memory, owner = offsets + begins[places], owners[places]
        edges = [0, *(np.flatnonzero(owner[1:] != owner[:-1]) + 1).tolist(), len(places)] if len(places) else [0]
        for first, stop in itertools.pairwise(edges):
            memory: Backed = self.maps.at(int(places[first])).memory
            part = buffer[first * size : stop * size]
            if wanted == READ:
                pages.gather(memory.view, in_memory[first:stop], size, part)
            else:
                pages.scatter(memory.view, in_memory[first:stop], size, part)
        return len(places)

    # -- mappings ----------------------------------------------------------------------------------------------------

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """In place as far as one map goes, or a bounce buffer; see the module's head. None when nothing decodes there,
        the direction is not permitted, or the budget for bounce buffers is empty.
        """
        wanted = WRITE if direction is DMADirection.FROM_DEVICE else READ
        length = min(length, U64_MAX - iova + 1)
        known = self.maps.find(iova)
        view = None if known is None else known.writable if wanted == WRITE else known.readable
        if known is not None and view is not None and on_invalidate is not None:
            at = iova - known.iova
            mapping = DMAMapping(iova, view[at : at + length], direction, on_invalidate)
            mapping.release = lambda mapping, access_len: self.mappings.remove(mapping)
            self.mappings.add(mapping)
            return mapping
        if (known is None and not self._ask_always) or (known is not None and not known.perm & wanted):
            why = "not mapped" if known is None else f"the map {known!r} does not permit it"
            self._tell(iova, length, wanted == WRITE, why)
            return None
        room = length if known is None else min(length, known.last - iova + 1)

        def begin(buffer: bytearray) -> object:
            return direction is DMADirection.TO_DEVICE and self.read(iova, buffer)

        return self.bounce.map(iova, room, direction, on_invalidate, begin, self.write)
