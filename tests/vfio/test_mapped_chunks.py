"""What was never mapped is not unmapped at the host; what may be mapped always is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.vfio.guest_iommu import _MappedChunks

pytestmark = pytest.mark.machine

PAGE = 4096
CHUNK = 1 << 21
_SPAN = 6 * CHUNK // PAGE

Operation = tuple[bool, int, int]
operations = st.lists(st.tuples(st.booleans(), st.integers(0, _SPAN - 1), st.integers(1, 2 * CHUNK // PAGE)))


def test_a_table_that_was_never_used_is_cleared_without_a_word() -> None:
    chunks = _MappedChunks(PAGE)
    assert not any(chunks.unmapped(start, 512 * PAGE) for start in range(0, 1 << 30, 512 * PAGE))


def test_a_page_that_was_mapped_is_unmapped_and_its_chunk_forgotten_only_as_a_whole() -> None:
    chunks = _MappedChunks(PAGE)
    chunks.mapped(5 * PAGE, PAGE)
    assert chunks.unmapped(5 * PAGE, PAGE)
    assert chunks.unmapped(0, CHUNK)
    assert not chunks.unmapped(0, CHUNK)


def test_pages_larger_than_a_chunk_are_one_chunk_each() -> None:
    chunks = _MappedChunks(1 << 24)
    chunks.mapped(1 << 59, 1 << 24)
    assert chunks.unmapped(1 << 59, 1 << 24)
    assert not chunks.unmapped(1 << 59, 1 << 24)


@given(operations)
def test_nothing_that_is_mapped_is_ever_passed_over(script: list[Operation]) -> None:
    chunks, mapped = _MappedChunks(PAGE), set[int]()
    for is_map, page, count in script:
        pages = set(range(page, page + count))
        if is_map:
            chunks.mapped(page * PAGE, count * PAGE)
            mapped |= pages
        else:
            told = chunks.unmapped(page * PAGE, count * PAGE)
            assert told or not mapped & pages
            mapped -= pages
