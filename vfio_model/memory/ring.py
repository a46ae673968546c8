"""The invalidation ring: how every cache of translations learns what is no longer true, without a message.

One process (guestd, which holds the vIOMMU) writes it; device processes map it read-only::

    words 0-7    header (:mod:`vfio_model.memory.layout`), magic ``vmINVAL1``
    word 8       head: how many records were ever written, never decreasing
    word 9       capacity in records, a power of two
    words 10-15  zero
    words 16..   the records; number n is at 16 + 4 * (n mod capacity): {as_id, iova, last (inclusive), flags}

``as_id`` is the vIOMMU's number of the address space (a guest may give one to several devices, and move them), never
a requester id. The low half of ``flags`` holds :class:`RecordFlags`, the high half the PASID.

The writer collects a batch, publishes it (records first, then the head in one store) and *then runs a revoke*
(:mod:`vfio_model.memory.revoke`) over the readers' lanes. A reader compares the head with the one it last saw, one
load, **inside** its DMA section and before it uses anything it cached; if they differ it drains. After the revoke
every section that could have used the old translation is over, and every later one sees the new head.

Why a reader never takes a half-written record for a whole one: it drains inside a section. The writer starts a batch
only after the revoke of the previous one, so at most one batch of at most :func:`batch_limit` records is being
written while a section is open, and a reader that is further behind than the rest of the ring does not look at the
records at all: it flushes everything (overrun). A batch that is too long is written as "flush all".

On machines that do not keep stores in order (anything but x86) the writer needs a fence between records and head.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag

from vfio_model.memory.layout import HEADER_WORDS, check_header, magic, write_header
from vfio_model.memory.revoke import Fence, NoFence
from vfio_model.memory.types import PCI_NO_PASID
from vfio_model.ranges import U64_MAX

MAGIC_RING = magic("vmINVAL1")
HEAD = HEADER_WORDS
"""The word that holds the head; hot code compares it itself."""
_CAPACITY = HEADER_WORDS + 1
RECORDS = HEADER_WORDS + 8
RECORD_WORDS = 4
CAPACITY = 1024
"""Records of a ring unless said otherwise."""

EVERY_AS = U64_MAX
"""The ``as_id`` that means all of them."""

OnRecord = Callable[[int, int, int, int], None]
"""``fn(as_id, iova, last, flags)``; ``last`` is inclusive."""


class RecordFlags(IntFlag):
    """The low half of a record's flags."""

    NONE = 0
    PRIV = 1
    """Concerns the privileged translations of the PASID."""
    ANY_PASID = 2
    """Concerns every PASID of the address space."""
    ATS = 4
    """Concerns what devices asked for by ATS; else what is cached of untranslated requests."""


def ring_size(capacity: int = CAPACITY) -> int:
    """Bytes of a ring of ``capacity`` records."""
    return (RECORDS + capacity * RECORD_WORDS) * 8


def init_ring(words: memoryview, capacity: int = CAPACITY) -> None:
    """Prepare an empty ring."""
    assert capacity >= 4 and capacity & (capacity - 1) == 0, "a ring's capacity is a power of two"
    words[HEAD] = 0
    words[_CAPACITY] = capacity
    write_header(words, MAGIC_RING, size=ring_size(capacity))


def batch_limit(capacity: int) -> int:
    """The most records that are ever written between two revokes."""
    return capacity // 4


def pasid_flags(pasid: int, flags: RecordFlags = RecordFlags.NONE) -> int:
    """The flags word of a record about ``pasid`` (:data:`PCI_NO_PASID`: requests without one)."""
    return pasid << 32 | flags


class RingWriter:
    """The one writer of a ring. Call :meth:`publish` once per hypercall or queue step, then run a revoke."""

    def __init__(self, words: memoryview, fence: Fence | None = None) -> None:
        """``fence`` stands between records and head; None where the machine keeps stores in order.

        :raise RemoteProtocolError: when ``words`` is not a ring.
        """
        check_header(words, MAGIC_RING, what="invalidation ring")
        self._words = words
        self._fence = fence or NoFence()
        self.capacity = words[_CAPACITY]
        self._batch: list[tuple[int, int, int, int]] = []

    @property
    def head(self) -> int:
        """Count of records published."""
        return self._words[HEAD]

    @property
    def pending(self) -> int:
        """Records that :meth:`publish` would write."""
        return len(self._batch)

    def append(self, as_id: int, iova: int, last: int, flags: int = pasid_flags(PCI_NO_PASID)) -> None:
        """Collect one invalidation of ``iova``..``last`` (inclusive); nothing is visible yet."""
        self._batch.append((as_id, iova, last, flags))

    def append_flush_all(self) -> None:
        """Collect "everything of everybody"."""
        self._batch = [(EVERY_AS, 0, U64_MAX, pasid_flags(PCI_NO_PASID, RecordFlags.ANY_PASID))]

    def publish(self) -> bool:
        """Write the batch, then move the head in one store. False when there was nothing: then no revoke is needed."""
        if not self._batch:
            return False
        if len(self._batch) > batch_limit(self.capacity):
            self.append_flush_all()
        words, head = self._words, self._words[HEAD]
        for number, record in enumerate(self._batch, head):
            at = RECORDS + (number & self.capacity - 1) * RECORD_WORDS
            words[at], words[at + 1], words[at + 2], words[at + 3] = record
        self._fence.barrier()
        words[HEAD] = head + len(self._batch)
        self._batch.clear()
        return True


class RingReader:
    """One reader: how far it has come. It starts at the present head, with an empty cache."""

    def __init__(self, words: memoryview) -> None:
        """:raise RemoteProtocolError: when ``words`` is not a ring."""
        check_header(words, MAGIC_RING, what="invalidation ring")
        self.words = words
        self.capacity = words[_CAPACITY]
        self._safe = self.capacity - batch_limit(self.capacity)
        self.seen = words[HEAD]
        """Count of records that this reader has dealt with."""

    @property
    def head(self) -> int:
        """Count of records published."""
        return self.words[HEAD]

    def drain(self, fn: OnRecord) -> bool:
        """Call ``fn(as_id, iova, last, flags)`` for every record since the last drain, oldest first.

        To be called inside a DMA section; ``fn`` only works on the reader's own memory.

        :return: False after an overrun: records were lost, ``fn`` was not called, the caller flushes everything.
        """
        words, seen = self.words, self.seen
        head = words[HEAD]
        self.seen = head
        if head - seen > self._safe:
            return False
        for number in range(seen, head):
            at = RECORDS + (number & self.capacity - 1) * RECORD_WORDS
            fn(words[at], words[at + 1], words[at + 2], words[at + 3])
        return True
