"""Many equal pieces of DMA at once: the batched half of the assigned path.

Each section does for its pieces, at most 256 KiB of them, what a single access does: load state and root, load the
TCEs, check, copy. With the compiled variant of :mod:`vfio_model.batch.variant` that is one call. With numpy it is
vectors: the addresses become table indices once, before any section, which is arithmetic on the device's own numbers
and on a window record, which never changes; a section in which anything is unusual moves nothing.

A piece at which a batch stops goes by itself, so that faults are found exactly and another window or segment is learnt.
So do pieces of a table with several levels, and pieces that are noted in a dirty map, in sections of their own.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vfio_model.batch import variant
from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.hpa import HpaMap
from vfio_model.host.layout import PE_BUS_MASTER, PE_DIRTY, PE_STATE, TCE_PERM, TCE_READ, TCE_WRITE
from vfio_model.host.walk import Window, load_tces
from vfio_model.memory.lane import SECTION_BYTES, Lane
from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer

Iovas = Sequence[int] | Any
PathMany = Callable[[Any, int, memoryview, int, bool], int]
"""See ``_path.pyi``."""
Many = Callable[[Iovas, int, Any], MemTxResult]

_U64_MASK = (1 << 64) - 1
_LEAST = 16
"""Fewer pieces are faster one by one than with numpy."""
_LEAST_COMPILED = 3


class NearView(Protocol):
    """What :class:`vfio_model.host.dma._Near` offers."""

    root_word: int
    record: int
    first: int
    shift: int
    low: int
    tces: memoryview
    base: int
    place: HpaMap
    fast: bool
    ram: memoryview
    entries: int
    window: Window | None


def make_many(
    read: Callable[[int, WriteBuffer], MemTxResult],
    write: Callable[[int, ReadBuffer], MemTxResult],
    near: Callable[[], NearView] | None,
    pe: memoryview,
    domain: memoryview,
    lane: Lane,
    many: PathMany | None = None,
) -> tuple[Callable[[Iovas, int, WriteBuffer], MemTxResult], Callable[[Iovas, int, ReadBuffer], MemTxResult]]:
    """``read_many`` and ``write_many`` over the single forms; without ``near`` all pieces go one by one. ``many`` is
    the compiled single form for many pieces.
    """
    batch = None if near is None else _batch(near, pe, domain, lane, many)

    def read_many(iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        view, total, done = _pieces(iovas, size, out), len(iovas), 0
        places = batch.places(iovas) if batch else None
        while done < total:
            at = done * size
            result = read(int(iovas[done]), view[at : at + size])
            done += 1
            if result:
                view[at + size :] = bytes(len(view) - at - size)
                return result
            if batch and places is not None:
                done += batch.run(places, size, view, done, False)
        return MemTxResult.OK

    def write_many(iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        view, total, done = _pieces(iovas, size, data), len(iovas), 0
        places = batch.places(iovas) if batch else None
        while done < total:
            result = write(int(iovas[done]), view[done * size : (done + 1) * size])
            done += 1
            if result:
                return result
            if batch and places is not None:
                done += batch.run(places, size, view, done, True)
        return MemTxResult.OK

    return read_many, write_many


def _batch(
    near: Callable[[], NearView], pe: memoryview, domain: memoryview, lane: Lane, many: PathMany | None
) -> _Batch | None:
    if variant.chosen == "reference":
        return None
    kernel = variant.kernel()
    return _CompiledBatch(kernel, near, pe, domain, lane, many) if kernel else _Batch(near, pe, domain, lane)


def _pieces(iovas: Iovas, size: int, buffer: ReadBuffer) -> memoryview:
    view = memoryview(buffer)
    if size < 1 or len(iovas) * size != len(view):
        raise ValueError(f"{len(iovas)} pieces of {size} bytes do not make {len(view)}")
    return view


class _Batch:
    """By numpy. Array views of the shared areas, made once; RAM once for each piece size."""

    def __init__(self, near: Callable[[], NearView], pe: memoryview, domain: memoryview, lane: Lane) -> None:
        self.near, self.pe, self.domain, self.lane = near, pe, domain, lane
        self._tces: tuple[memoryview | None, Any] = (None, None)
        self._rows: tuple[memoryview | None, int, Any] = (None, 0, None)

    def places(self, iovas: Iovas) -> Any:
        """``iovas`` as :meth:`run` wants them; None when they go one by one."""
        return iovas if len(iovas) >= _LEAST else None

    def run(self, iovas: Any, size: int, view: memoryview, first: int, to_ram: bool) -> int:
        """Move the pieces from ``first`` on; returns how many went before anything unusual came.

        Only the first run of a call is tried: to set another one up costs more than a few pieces.
        """
        near = self.near()
        if first != 1 or near.record == -1 or size > min(near.low + 1, SECTION_BYTES):
            return 0
        if size & (size - 1) or near.base & near.low:
            return 0
        np = lazy_numpy()
        try:
            addresses = np.asarray(iovas, dtype="u8")[1:]
        except OverflowError:  # no bus address; found when its turn comes
            return 0
        within = addresses & near.low
        where = addresses >> near.shift ^ near.first
        if where.max() >= near.entries or (within & size - 1).any():
            return 0
        where = where.view("i8")
        if self._tces[0] is not near.tces:
            self._tces = (near.tces, np.frombuffer(near.tces, dtype="u8"))
        pieces = np.frombuffer(view, dtype="u1").reshape(-1, size)[1:]
        rows = self._ram(near.ram, size)
        move = self._to_ram if to_ram else self._from_ram
        per, total, done = max(1, SECTION_BYTES // size), len(where), 0
        flat = not within.any()
        while done < total:
            end = min(total, done + per)
            if not move(near, rows, size, where[done:end], None if flat else within[done:end], pieces[done:end]):
                break
            done = end
        return done

    def _ram(self, ram: memoryview, size: int) -> Any:
        if self._rows[0] is not ram or self._rows[1] != size:
            whole = lazy_numpy().frombuffer(ram, dtype="u1")[: len(ram) // size * size]
            self._rows = (ram, size, whole.reshape(-1, size))
        return self._rows[2]

    def _to_ram(self, near: NearView, rows: Any, size: int, where: Any, within: Any, pieces: Any) -> bool:
        lane, slot = self.lane.words, self.lane.slot
        lane[slot] += 1
        try:
            at = self._translate(near, len(rows), size, where, within, TCE_WRITE)
            if at is None:
                return False
            rows[at] = pieces
            return True
        finally:
            lane[slot] += 1

    def _from_ram(self, near: NearView, rows: Any, size: int, where: Any, within: Any, pieces: Any) -> bool:
        lane, slot = self.lane.words, self.lane.slot
        lane[slot] += 1
        try:
            at = self._translate(near, len(rows), size, where, within, TCE_READ)
            if at is None:
                return False
            rows.take(at, 0, out=pieces, mode="clip")
            return True
        finally:
            lane[slot] += 1

    def _translate(self, near: NearView, rows: int, size: int, where: Any, within: Any, need: int) -> Any:
        """Row numbers of the pieces, or None when one of them may not or cannot be moved here; inside a section."""
        pe, np, window = self.pe, lazy_numpy(), near.window
        if pe[near.root_word] != near.record or pe[PE_STATE] or not pe[PE_BUS_MASTER] or window is None:
            return None
        if need == TCE_WRITE and pe[PE_DIRTY]:
            return None
        tces = self._tces[1][where] if window.levels == 1 else load_tces(self._tces[1], window, where)
        if not np.bitwise_and.reduce(tces) & need:
            return None
        if within is None and near.fast and size > TCE_PERM:
            at = (tces - near.base) >> (size.bit_length() - 1)  # the permission bits fall out with the rest of the row
        else:
            relative = near.place.to_offset_many(tces & (_U64_MASK ^ near.low))
            at = (relative if within is None else relative + within) >> (size.bit_length() - 1)
        return None if at.max() >= rows else at.view("i8")


class _CompiledBatch(_Batch):
    """By the compiled library, where the segment's memory is one run."""

    def __init__(
        self,
        kernel: Any,
        near: Callable[[], NearView],
        pe: memoryview,
        domain: memoryview,
        lane: Lane,
        many: PathMany | None,
    ) -> None:
        super().__init__(near, pe, domain, lane)
        self._many = many
        self._gather, self._scatter = kernel.gather, kernel.scatter

    def places(self, iovas: Iovas) -> Any:
        """``iovas`` as contiguous u64 words; None when they go one by one."""
        if len(iovas) < _LEAST_COMPILED:
            return None
        try:
            words = memoryview(iovas)  # type: ignore[arg-type]  # whatever has a buffer
            if words.format in ("Q", "L") and words.itemsize == 8 and words.c_contiguous:
                return words
        except TypeError:  # a list
            pass
        try:
            return array("Q", iovas)
        except OverflowError:  # no bus address; found when its turn comes
            return None

    def run(self, iovas: Any, size: int, view: memoryview, first: int, to_ram: bool) -> int:
        """Move the pieces from ``first`` on; returns how many went before anything unusual came."""
        near, lane, slot, pe = self.near(), self.lane.words, self.lane.slot, self.pe
        noted = to_ram and pe[PE_DIRTY]
        if near.fast and near.window is not None and (near.window.levels > 1 or noted) and self._many is not None:
            return self._many(iovas, size, view, first, to_ram)
        if not near.fast or near.window is None or near.window.levels > 1:
            return super().run(iovas, size, view, first, to_ram)
        if size > SECTION_BYTES:
            return 0
        move = self._scatter if to_ram else self._gather
        window = (near.tces, near.first << near.shift, near.shift, near.base, near.ram)
        root_word, record, per, total, done = near.root_word, near.record, SECTION_BYTES // size, len(iovas), first
        while done < total:
            end, moved = min(total, done + per), 0
            lane[slot] += 1
            try:
                noted = to_ram and pe[PE_DIRTY]
                if pe[root_word] == record and not pe[PE_STATE] and pe[PE_BUS_MASTER] and not noted:
                    moved = move(*window, iovas, size, view, done, end)
            finally:
                lane[slot] += 1
            done += moved
            if done < end:
                break
        return done - first
