"""Many equal pieces of DMA at once: the vectorised half of the assigned path.

The addresses become table indices once, before any section: that is arithmetic on the device's own numbers and on a
window record, which never changes. Each section then does for its pieces, at most 256 KiB of them, what a single access
does: load state and root, load the TCEs, check, copy. A section in which anything is unusual moves nothing; from there
on the pieces go one by one, so that the first failing piece is found exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vfio_model.host.hpa import HpaMap
from vfio_model.host.layout import PE_BUS_MASTER, PE_STATE, TCE_PERM
from vfio_model.memory.lane import SECTION_BYTES, Lane
from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer

Iovas = Sequence[int] | Any
Many = Callable[[Iovas, int, Any], MemTxResult]

_U64_MASK = (1 << 64) - 1
_LEAST = 16
"""Fewer pieces are faster one by one."""


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


@functools.cache
def _numpy() -> Any:
    import numpy  # noqa: PLC0415 - 200 ms of import that a device without batches never pays

    return numpy


def make_many(
    read: Callable[[int, WriteBuffer], MemTxResult],
    write: Callable[[int, ReadBuffer], MemTxResult],
    near: Callable[[], NearView] | None,
    pe: memoryview,
    domain: memoryview,
    lane: Lane,
) -> tuple[Callable[[Iovas, int, WriteBuffer], MemTxResult], Callable[[Iovas, int, ReadBuffer], MemTxResult]]:
    """``read_many`` and ``write_many`` over the single forms; without ``near`` all pieces go one by one."""
    batch = None if near is None else _Batch(near, pe, domain, lane)

    def read_many(iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        view = _pieces(iovas, size, out)
        done = _warm(lambda: read(int(iovas[0]), view[:size])) if batch and len(iovas) >= _LEAST else 0
        if batch and done:
            done += batch.run(iovas, size, view, False)
        for index in range(done, len(iovas)):
            result = read(int(iovas[index]), view[index * size : (index + 1) * size])
            if result:
                view[(index + 1) * size :] = bytes(len(view) - (index + 1) * size)
                return result
        return MemTxResult.OK

    def write_many(iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        view = _pieces(iovas, size, data)
        done = _warm(lambda: write(int(iovas[0]), view[:size])) if batch and len(iovas) >= _LEAST else 0
        if batch and done:
            done += batch.run(iovas, size, view, True)
        for index in range(done, len(iovas)):
            result = write(int(iovas[index]), view[index * size : (index + 1) * size])
            if result:
                return result
        return MemTxResult.OK

    return read_many, write_many


def _warm(first: Callable[[], MemTxResult]) -> int:
    """The first piece goes alone, so that window and segment are known; 1 when it went well."""
    return 0 if first() else 1


def _pieces(iovas: Iovas, size: int, buffer: ReadBuffer) -> memoryview:
    view = memoryview(buffer)
    if size < 1 or len(iovas) * size != len(view):
        raise ValueError(f"{len(iovas)} pieces of {size} bytes do not make {len(view)}")
    return view


class _Batch:
    """Array views of the shared areas, made once; RAM once for each piece size."""

    def __init__(self, near: Callable[[], NearView], pe: memoryview, domain: memoryview, lane: Lane) -> None:
        self.near, self.pe, self.domain, self.lane = near, pe, domain, lane
        self._tces: tuple[memoryview | None, Any] = (None, None)
        self._rows: tuple[memoryview | None, int, Any] = (None, 0, None)

    def run(self, iovas: Iovas, size: int, view: memoryview, to_ram: bool) -> int:
        """Move the pieces after the first; returns how many went before anything unusual came."""
        np, near = _numpy(), self.near()
        if near.record == -1 or size > near.low + 1 or size & (size - 1) or near.base & near.low:
            return 0
        addresses = np.asarray(iovas, dtype="u8")[1:]
        within = addresses & near.low
        where = addresses >> near.shift ^ near.first
        if where.max() >= len(near.tces) or (within & size - 1).any():
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
            whole = _numpy().frombuffer(ram, dtype="u1")[: len(ram) // size * size]
            self._rows = (ram, size, whole.reshape(-1, size))
        return self._rows[2]

    def _to_ram(self, near: NearView, rows: Any, size: int, where: Any, within: Any, pieces: Any) -> bool:
        lane, slot = self.lane.words, self.lane.slot
        lane[slot] += 1
        try:
            at = self._translate(near, len(rows), size, where, within, 2)
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
            at = self._translate(near, len(rows), size, where, within, 1)
            if at is None:
                return False
            rows.take(at, 0, out=pieces, mode="clip")
            return True
        finally:
            lane[slot] += 1

    def _translate(self, near: NearView, rows: int, size: int, where: Any, within: Any, need: int) -> Any:
        """Row numbers of the pieces, or None when one of them may not or cannot be moved here; inside a section."""
        pe, np = self.pe, _numpy()
        if pe[near.root_word] != near.record or pe[PE_STATE] or not pe[PE_BUS_MASTER]:
            return None
        tces = self._tces[1][where]
        if not np.bitwise_and.reduce(tces) & need:
            return None
        if within is None and near.fast and size > TCE_PERM:
            at = (tces - near.base) >> (size.bit_length() - 1)  # the permission bits fall out with the rest of the row
        else:
            relative = near.place.to_offset_many(tces & (_U64_MASK ^ near.low))
            at = (relative if within is None else relative + within) >> (size.bit_length() - 1)
        return None if at.max() >= rows else at.view("i8")
