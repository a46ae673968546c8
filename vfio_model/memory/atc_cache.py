"""One cache of translations that follows the invalidation ring: sections, and answers that cross invalidations.

Under it lies an :class:`~vfio_model.memory.atc_entries.EntryTable`; above it the DMA path of untranslated requests
(:mod:`vfio_model.memory.atc`) and the ATC that a device with ATS manages itself (:mod:`vfio_model.pci.atc`).

An answer and an invalidation can cross. The rule: the ring head is *sampled when the request goes out*
(``inval_seq``); when the answer is there, everything that was invalidated since is looked at, and an answer that
overlaps any of it is dropped and asked again. R request, T translation made, I invalidation published, C completion,
U use (a section)::

    I R T C U   nothing happens since the request: cached and used
    R I T C U   the answer may be older or newer, nobody can tell: dropped, asked again
    R T I C U   the answer is stale: dropped, asked again
    R T C I U   cached, then dropped by the head compare of the section: asked again
    R T C U+I   the section began before: it may finish, the revoke waits for its lane
    R T C U I   over before: the next section compares the head

What must not be broken: the head is compared inside the section, before anything cached is used; nothing is cached
before the ring's writer knows the lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from vfio_model.memory import atc_path
from vfio_model.memory.atc_entries import CachedEntry, EntryTable
from vfio_model.memory.lane import SECTION_BYTES, Lane
from vfio_model.memory.ring import EVERY_AS, HEAD, RecordFlags, RingReader, RingWriter, init_ring, ring_size
from vfio_model.memory.types import PCI_NO_PASID, IOMMUAccessFlags
from vfio_model.ranges import U64_MAX

T = TypeVar("T")
Since = list[tuple[int, int]]
"""What was invalidated since a request went out."""

OPEN: Final = memoryview(b"\1")
"""The gate of requests that nobody can take away."""
_PRIVATE_CAPACITY: Final = 16


class PrivateRing:
    """An invalidation ring in memory of its own, for a cache in the process of its IOMMU: what is appended is
    published at once.
    """

    def __init__(self) -> None:
        words = memoryview(bytearray(ring_size(_PRIVATE_CAPACITY))).cast("Q")
        init_ring(words, _PRIVATE_CAPACITY)
        self._writer = RingWriter(words)
        self.reader = RingReader(words)

    def invalidate(self, as_id: int, iova: int, last: int, flags: int) -> None:
        """``iova``..``last`` (inclusive) is no longer true."""
        self._writer.append(as_id, iova, last, flags)
        self._writer.publish()


class TranslationCache:
    """What is cached of ``pasid`` in address space ``as_id``. Everything is done in sections of ``lane``.

    ``kind`` is :attr:`RecordFlags.ATS` for translations that the device asked for by ATS: it alone decides when it
    gives those back, and follows the records about them. ``required`` are permissions that every use needs. ``gate``
    says, in its first item, whether anything may be used at all. ``compiled`` False keeps to Python even where the
    compiled variant was built.
    """

    def __init__(
        self,
        ring: RingReader,
        lane: Lane,
        *,
        as_id: int,
        pasid: int = PCI_NO_PASID,
        kind: RecordFlags = RecordFlags.NONE,
        required: IOMMUAccessFlags = IOMMUAccessFlags.NONE,
        gate: memoryview = OPEN,
        compiled: bool = True,
    ) -> None:
        self.as_id, self.pasid = as_id, pasid
        self.ring, self.lane = ring, lane
        self._fronts = (atc_path.Front(False), atc_path.Front(True)) if compiled and atc_path.available() else None
        self.entries = EntryTable(required, self._fronts)
        self._seen = memoryview(bytearray(8)).cast("Q")
        """How far the ring is dealt with, for the compiled variant."""
        self._seen[0] = ring.seen
        self._kind, self.gate = int(kind), gate
        self._since: dict[int, Since] = {}
        """Per request that is out (by the identity of its list)."""

    # -- a DMA section -------------------------------------------------------------------------------------------

    @property
    def compiled(self) -> bool:
        """Whether hits can be served by a :class:`~vfio_model.memory.atc_path.Path`."""
        return self._fronts is not None

    def show(self, path: atc_path.Path[T]) -> None:
        """Let ``path`` serve hits, by views of its own: whoever mapped the memory can release his."""
        assert self._fronts is not None, "compiled"
        ring, lanes = memoryview(self.ring.words), memoryview(self.lane.words)
        path.know(ring, lanes, self.lane.slot, self._seen, self.gate, *self._fronts)

    def move(self, iova: int, view: memoryview, is_write: bool) -> tuple[int, CachedEntry | None]:
        """One DMA section: catch up with the ring, look up, copy. Bytes moved; when none, what is cached of ``iova``.

        That may be an entry without the permission, or one whose bytes are not here; its address is valid no longer
        than the caller's next look at the cache.
        """
        lane = self.lane
        lane.enter()
        try:
            self.catch_up()
            hit = self.entries.find(iova, is_write) if self.gate[0] else None
            if hit is None:
                return 0, self.entries.lookup(iova)
            at = iova - hit[0]
            size = min(len(view), hit[1] - iova, SECTION_BYTES)
            if is_write:
                hit[2][at : at + size] = view[:size]
            else:
                view[:size] = hit[2][at : at + size]
            return size, None
        finally:
            lane.leave()

    # -- requests ------------------------------------------------------------------------------------------------

    def sample(self) -> Since:
        """A request goes out: what is invalidated from here on is noted in the answer, until :meth:`forget_request`."""
        since: Since = []
        lane = self.lane
        lane.enter()
        try:
            self.catch_up()
            self._since[id(since)] = since
        finally:
            lane.leave()
        return since

    def complete(self, since: Since, spans: Iterable[tuple[int, int]], keep: Callable[[], bool]) -> bool | None:
        """The answer about ``spans`` (first, last) came: ``keep()`` puts it into :attr:`entries`, what it says is
        returned. None: an invalidation since the request overlaps it, nothing is kept.
        """
        lane = self.lane
        lane.enter()
        try:
            self.catch_up()
            if any(first <= stop and start <= last for start, stop in spans for first, last in since):
                return None
            return keep()
        finally:
            lane.leave()

    def forget_request(self, since: Since) -> None:
        """The request is over."""
        del self._since[id(since)]

    # -- invalidations -------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Deal with every record since the last time; inside a section."""
        if self.ring.words[HEAD] != self.ring.seen:
            if not self.ring.drain(self._record):
                self.flush()
            self._seen[0] = self.ring.seen

    def _record(self, as_id: int, iova: int, last: int, flags: int) -> None:
        if as_id == EVERY_AS:
            self.flush()
        elif (
            as_id == self.as_id
            and flags & RecordFlags.ATS == self._kind
            and (flags & RecordFlags.ANY_PASID or flags >> 32 == self.pasid)
        ):
            self.drop(iova, last)

    def flush(self) -> None:
        """Forget everything, also answers that are on their way."""
        self.drop(0, U64_MAX)

    def drop(self, iova: int, last: int) -> None:
        """Forget what shares a byte with ``iova``..``last`` (inclusive), also in answers that are on their way."""
        for since in self._since.values():
            since.append((iova, last))
        if iova == 0 and last == U64_MAX:
            self.entries.clear()
        else:
            self.entries.drop(iova, last)
