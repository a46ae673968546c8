"""The DMA path of a device in another process than its vIOMMU: an address translation cache over mapped guest RAM.

A hit costs no message: the device enters its lane, compares the head of the invalidation ring with what it has seen,
looks the page up, copies, leaves. A miss asks (ATS) outside of any section. This module is the device's half of the
promise that an Invalidate Completion makes on PCIe; the other half is the writer's ring and revoke
(:mod:`vfio_model.memory.ring`).

Answers and invalidations cross; which orders there are, and what becomes of each, is in
:mod:`vfio_model.memory.atc_cache`.

What must not be broken: the head is compared inside the section, before anything cached is used; nothing is cached
before the device is *armed*, that is before the ring's writer knows its lane; a failed translation is never cached.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial

from vfio_model.memory.atc_cache import TranslationCache
from vfio_model.memory.atc_entries import PAGE_SHIFT, GuestRam
from vfio_model.memory.atc_path import Path
from vfio_model.memory.dma import BLOCKED, DMAImpl, DMASpace, Iovas, OnInvalidate
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.lane import SECTION_BYTES, Lane
from vfio_model.memory.mapping import BounceBudget, DMAMapping
from vfio_model.memory.ring import HEAD, RingReader
from vfio_model.memory.types import (
    PCI_NO_PASID,
    DMADirection,
    IOMMUAccessFlags,
    MemTxResult,
    ReadBuffer,
    WriteBuffer,
)
from vfio_model.ranges import wrap64

Ask = Callable[[int, int, bool], IOMMUTLBEntry | None]
"""``ask(iova, length, is_write)``: the translation around ``iova``, perm NONE for a fault; None when nobody answers."""

Read = Callable[[int, WriteBuffer], MemTxResult]
Write = Callable[[int, ReadBuffer], MemTxResult]

MAX_ASKS = 64
"""How often one access asks again because an invalidation came between; then it is a bus error."""

_NOT_CACHEABLE = IOMMUAccessFlags.UNTRANSLATED_ONLY


class _Fill(Enum):
    """What became of a miss."""

    CACHED = 0
    DIRECT = 1
    """Not for the cache: this page goes by message."""
    FAULT = 2
    NO_ANSWER = 3


class CachedImpl:
    """DMA through an ATC. ``fallback`` takes what cannot be cached: everything before :meth:`arm`, what is not RAM, and
    pages marked untranslated-only; it is the message path, or blocks. ``compiled`` False keeps to Python even where the
    compiled variant was built."""

    def __init__(
        self,
        ask: Ask,
        ring: RingReader,
        lane: Lane,
        ram: GuestRam,
        *,
        as_id: int,
        pasid: int = PCI_NO_PASID,
        fallback: DMAImpl = BLOCKED,
        bounce: BounceBudget | None = None,
        compiled: bool = True,
    ) -> None:
        self.armed = False
        self.bounce = bounce or BounceBudget()
        self._cache = TranslationCache(ring, lane, as_id=as_id, pasid=pasid, compiled=compiled)
        self.entries = self._cache.entries
        self._ask, self._ring, self._lane, self._ram, self._fallback = ask, ring, lane, ram, fallback
        self._path: Path[None] | None = None
        """Serves hits while armed, where the compiled variant is there."""
        if self._cache.compiled:
            self._path = Path(self._read_slow, self._write_slow, None, MemTxResult.OK, None)
            self.read: Read = self._path.read
            self.write: Write = self._path.write
        else:
            self.read, self.write = self._reader(), self._writer()

    # -- life ----------------------------------------------------------------------------------------------------

    def arm(self) -> None:
        """The ring's writer knows the lane: from now on translations may be cached."""
        self.armed = True
        if self._path is not None:
            self._cache.show(self._path)

    def disarm(self) -> None:
        """The subscription is gone: nothing cached is used any more."""
        self.armed = False
        self.flush()
        if self._path is not None:
            self._path.forget()

    def attach(self, dma: DMASpace) -> None:
        """``dma`` is bound to this (see :class:`~vfio_model.memory.dma.Rebinding`)."""

    def detach(self, dma: DMASpace) -> None:
        """``dma`` is bound elsewhere: bus mastering was taken away, or a reset began. A device that waits for a
        translation has our methods in hand and goes on with them; nothing that was cached serves it any more, and what
        it asks is refused."""
        self.flush()

    def retarget(self, as_id: int, pasid: int = PCI_NO_PASID) -> None:
        """The device belongs to another address space now."""
        self._cache.as_id, self._cache.pasid = as_id, pasid
        self.flush()

    def flush(self) -> None:
        """Forget everything, also answers that are on their way."""
        self._cache.flush()

    def invalidate(self, iova: int, last: int) -> None:
        """Forget ``iova``..``last`` (inclusive), for an invalidation that came as a message."""
        self._cache.drop(iova, last)

    # -- hits ----------------------------------------------------------------------------------------------------

    def _reader(self) -> Callable[[int, WriteBuffer], MemTxResult]:
        words, slot, ring, head = self._lane.words, self._lane.slot, self._ring, self._ring.words
        get, slow, ok = self.entries.readable.get, self._read_slow, MemTxResult.OK

        def read(iova: int, out: WriteBuffer) -> MemTxResult:
            words[slot] += 1
            try:
                if head[HEAD] == ring.seen:
                    hit = get(iova >> PAGE_SHIFT)
                    size = len(out)
                    if hit is not None and iova + size <= hit[1] and size <= SECTION_BYTES:
                        at = iova - hit[0]
                        out[:] = hit[2][at : at + size]
                        return ok
            finally:
                words[slot] += 1
            return slow(iova, out)

        return read

    def _writer(self) -> Callable[[int, ReadBuffer], MemTxResult]:
        words, slot, ring, head = self._lane.words, self._lane.slot, self._ring, self._ring.words
        get, slow, ok = self.entries.writable.get, self._write_slow, MemTxResult.OK

        def write(iova: int, data: ReadBuffer) -> MemTxResult:
            words[slot] += 1
            try:
                if head[HEAD] == ring.seen:
                    hit = get(iova >> PAGE_SHIFT)
                    size = len(data)
                    if hit is not None and iova + size <= hit[1] and size <= SECTION_BYTES:
                        at = iova - hit[0]
                        hit[2][at : at + size] = data
                        return ok
            finally:
                words[slot] += 1
            return slow(iova, data)

        return write

    # -- pieces and misses ---------------------------------------------------------------------------------------

    def _read_slow(self, iova: int, out: WriteBuffer) -> MemTxResult:
        if not self.armed:
            return self._fallback.read(iova, out)
        view = memoryview(out)
        done, result = self._transfer(iova, view, False)
        if result:
            view[done:] = bytes(len(view) - done)
        return result

    def _write_slow(self, iova: int, data: ReadBuffer) -> MemTxResult:
        if not self.armed:
            return self._fallback.write(iova, data)
        return self._transfer(iova, memoryview(data), True)[1]

    def _transfer(self, iova: int, view: memoryview, is_write: bool) -> tuple[int, MemTxResult]:
        """Move ``view`` piece by piece; (bytes moved, result)."""
        done, total = 0, len(view)
        while done < total:
            at = wrap64(iova + done)
            moved = self._cache.move(at, view[done:], is_write)[0]
            if not moved:
                fill = self._fill(at, total - done, is_write)
                if fill is _Fill.FAULT:
                    return done, MemTxResult.DECODE_ERROR
                if fill is _Fill.NO_ANSWER:
                    return done, MemTxResult.ERROR
                if fill is _Fill.DIRECT:
                    moved = min(total - done, (1 << PAGE_SHIFT) - (at & (1 << PAGE_SHIFT) - 1))
                    part = view[done : done + moved]
                    result = self._fallback.write(at, part) if is_write else self._fallback.read(at, part)
                    if result:
                        return done, result
            done += moved
        return done, MemTxResult.OK

    def _fill(self, iova: int, length: int, is_write: bool) -> _Fill:
        """Ask for the page of ``iova`` until an answer arrives that nothing overtook."""
        wanted = IOMMUAccessFlags.WO if is_write else IOMMUAccessFlags.RO
        cache = self._cache
        for _ in range(MAX_ASKS):
            since = cache.sample()
            try:
                entry = self._ask(iova, length, is_write)
                if entry is None:
                    return _Fill.NO_ANSWER
                if not entry.perm & wanted:
                    return _Fill.FAULT
                start = entry.iova & ~entry.addr_mask
                kept = cache.complete(since, ((start, start + entry.addr_mask),), partial(self._keep, iova, entry))
            finally:
                cache.forget_request(since)
            if kept is not None:
                return _Fill.CACHED if kept else _Fill.DIRECT
        return _Fill.NO_ANSWER

    def _keep(self, iova: int, entry: IOMMUTLBEntry) -> bool:
        return self.armed and not entry.perm & _NOT_CACHEABLE and self.entries.insert(iova, entry, self._ram)

    # -- many at once --------------------------------------------------------------------------------------------

    def read_many(self, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        """Pieces of ``size`` bytes into ``out``; stops at the first failure, the remainder is zero."""
        view = memoryview(out)
        done, result = self._many(iovas, size, view, False)
        if result:
            view[done * size :] = bytes(len(view) - done * size)
        return result

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        """Pieces of ``size`` bytes from ``data``; stops at the first failure."""
        return self._many(iovas, size, memoryview(data), True)[1]

    def _many(self, iovas: Iovas, size: int, view: memoryview, is_write: bool) -> tuple[int, MemTxResult]:
        """(pieces done, result). Hits go many to a section, a miss goes alone."""
        addresses: list[int] = iovas.tolist() if hasattr(iovas, "tolist") else list(iovas)
        single: Callable[[int, memoryview], MemTxResult] = self.write if is_write else self.read
        done, count = 0, len(addresses)
        while done < count:
            done = self._hits(addresses, done, size, view, is_write)
            if done < count:
                result = single(addresses[done], view[done * size : (done + 1) * size])
                if result:
                    return done, result
                done += 1
        return done, MemTxResult.OK

    def _hits(self, iovas: list[int], first: int, size: int, view: memoryview, is_write: bool) -> int:
        """One section of pieces that hit; the index of the first that is not done."""
        get, find = (self.entries.writable if is_write else self.entries.readable).get, self.entries.find
        lane = self._lane
        stop = min(len(iovas), first + SECTION_BYTES // (size or 1))
        lane.enter()
        try:
            self._cache.catch_up()
            for index in range(first, stop):
                iova = iovas[index]
                hit = get(iova >> PAGE_SHIFT) or find(iova, is_write)
                if hit is None or iova + size > hit[1]:
                    return index
                part, at = view[index * size : (index + 1) * size], iova - hit[0]
                if is_write:
                    hit[2][at : at + size] = part
                else:
                    part[:] = hit[2][at : at + size]
            return stop
        finally:
            lane.leave()

    # -- maps ----------------------------------------------------------------------------------------------------

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """A bounce buffer of up to ``length`` bytes: filled now, or written back at unmap, each in sections of its own.

        It outlives its translation without harm: what is written back is translated again. None when nothing
        decodes at ``iova`` or the bounce budget is empty.
        """

        def begin(buffer: bytearray) -> object:
            return self.read(iova, buffer) if direction is DMADirection.TO_DEVICE else not self._decodes(iova)

        return self.bounce.map(iova, length, direction, on_invalidate, begin, self.write)

    def _decodes(self, iova: int) -> bool:
        """Whether ``iova`` may be written, as far as that is known before it is: a message finds out when it goes."""
        if not self.armed:
            return True
        lane = self._lane
        lane.enter()
        try:
            self._cache.catch_up()
            known = self.entries.find(iova, True) is not None
        finally:
            lane.leave()
        return known or self._fill(iova, 1, True) in (_Fill.CACHED, _Fill.DIRECT)
