"""The invalidation ring: order, publication, overrun."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.errors import RemoteProtocolError
from vfio_model.memory.ring import (
    EVERY_AS,
    HEAD,
    RECORDS,
    RecordFlags,
    RingReader,
    RingWriter,
    batch_limit,
    init_ring,
    pasid_flags,
    ring_size,
)
from vfio_model.memory.types import PCI_NO_PASID
from vfio_model.ranges import U64_MAX

CAPACITY = 16


def ring(capacity: int = CAPACITY) -> memoryview:
    words = memoryview(bytearray(ring_size(capacity))).cast("Q")
    init_ring(words, capacity)
    return words


def drained(reader: RingReader) -> list[tuple[int, int, int, int]] | None:
    """The records, or None after an overrun."""
    records: list[tuple[int, int, int, int]] = []
    return records if reader.drain(lambda *record: records.append(record)) else None


def test_records_come_out_in_order_with_inclusive_last() -> None:
    words = ring()
    writer, reader = RingWriter(words), RingReader(words)
    writer.append(7, 0x1000, 0x1FFF)
    writer.append(7, 0, U64_MAX, pasid_flags(5, RecordFlags.PRIV))
    assert writer.publish()
    assert drained(reader) == [
        (7, 0x1000, 0x1FFF, PCI_NO_PASID << 32),
        (7, 0, U64_MAX, 5 << 32 | RecordFlags.PRIV),
    ]
    assert drained(reader) == []


def test_nothing_is_visible_before_publish() -> None:
    words = ring()
    writer, reader = RingWriter(words), RingReader(words)
    writer.append(1, 0, 0xFFF)
    assert writer.pending == 1 and reader.head == 0 and drained(reader) == []


def test_publishing_nothing_says_so() -> None:
    assert not RingWriter(ring()).publish()


def test_the_records_are_there_before_the_head_moves_with_a_fence_between() -> None:
    words = ring()
    seen: list[tuple[int, int]] = []

    class Fence:
        def barrier(self) -> None:
            seen.append((words[RECORDS + 1], words[HEAD]))

    writer = RingWriter(words, Fence())
    writer.append(1, 0x5000, 0x5FFF)
    writer.publish()
    assert seen == [(0x5000, 0)] and words[HEAD] == 1


def test_a_new_reader_starts_at_the_present_head() -> None:
    words = ring()
    writer = RingWriter(words)
    writer.append(1, 0, 0xFFF)
    writer.publish()
    assert drained(RingReader(words)) == []


def test_a_reader_further_behind_than_the_ring_less_a_batch_flushes_all() -> None:
    words = ring()
    writer, reader, on_the_edge = RingWriter(words), RingReader(words), RingReader(words)
    for page in range(CAPACITY - batch_limit(CAPACITY)):
        writer.append(1, page, page)
        writer.publish()
    assert len(drained(on_the_edge) or []) == CAPACITY - batch_limit(CAPACITY)
    writer.append(1, 99, 99)
    writer.publish()
    assert drained(reader) is None
    assert drained(reader) == [], "after the overrun it is level again"


def test_a_batch_being_written_never_meets_a_record_that_is_read() -> None:
    words = ring()
    writer, reader = RingWriter(words), RingReader(words)
    for page in range(CAPACITY - batch_limit(CAPACITY)):
        writer.append(1, page, page)
        writer.publish()
    first = [words[RECORDS + 4 * at + 1] for at in range(CAPACITY - batch_limit(CAPACITY))]
    for _ in range(batch_limit(CAPACITY)):
        writer.append(1, 0xBAD, 0xBAD)

    class Fence:
        def barrier(self) -> None:  # the records are written, the head has not moved
            assert [record[1] for record in drained(reader) or []] == first

    writer._fence = Fence()
    writer.publish()


def test_a_batch_that_is_too_long_becomes_flush_all() -> None:
    words = ring()
    writer, reader = RingWriter(words), RingReader(words)
    for page in range(batch_limit(CAPACITY) + 1):
        writer.append(1, page, page)
    writer.publish()
    assert drained(reader) == [(EVERY_AS, 0, U64_MAX, PCI_NO_PASID << 32 | RecordFlags.ANY_PASID)]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=60))
def test_against_a_list(steps: list[tuple[bool, int]]) -> None:
    """A reader that drains now and then sees every record in order, or is told that it did not."""
    words = ring()
    writer, reader = RingWriter(words), RingReader(words)
    written: list[int] = []
    behind: list[int] = []
    for drain, count in steps:
        if drain:
            got = drained(reader)
            if len(behind) <= CAPACITY - batch_limit(CAPACITY):
                assert got is not None and [record[1] for record in got] == behind
            else:
                assert got is None
            behind.clear()
        elif count <= batch_limit(CAPACITY):
            numbers = range(len(written), len(written) + count)
            for number in numbers:
                writer.append(1, number, number)
            writer.publish()
            written.extend(numbers)
            behind.extend(numbers)
    assert reader.head == len(written)


def test_what_is_not_a_ring_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="ring"):
        RingReader(memoryview(bytearray(ring_size(CAPACITY))).cast("Q"))
