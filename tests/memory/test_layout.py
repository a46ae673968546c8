"""The header of shared areas: what is refused, and in which words."""

from __future__ import annotations

import pytest

from vfio_model.errors import RemoteProtocolError
from vfio_model.memory.layout import BYTE_ORDER_MARK, HEADER_SIZE, HEADER_WORDS, check_header, magic, write_header

MAGIC = magic("vmTEST01")


def area(size: int = 256) -> memoryview:
    return memoryview(bytearray(size)).cast("Q")


def written() -> memoryview:
    words = area()
    write_header(words, MAGIC)
    return words


def test_a_header_is_one_cache_line_and_reads_back() -> None:
    assert HEADER_SIZE == 64 and HEADER_WORDS == 8
    assert check_header(written(), MAGIC) == 256


def test_the_mapping_may_be_longer_than_the_area() -> None:
    words = area()
    write_header(words, MAGIC, size=128)
    assert check_header(words, MAGIC) == 128


def test_an_area_longer_than_its_mapping_is_refused() -> None:
    words = area()
    write_header(words, MAGIC, size=512)
    with pytest.raises(RemoteProtocolError, match="512 bytes, 256 are mapped"):
        check_header(words, MAGIC)


def test_another_kind_of_area_is_refused_and_named() -> None:
    with pytest.raises(RemoteProtocolError, match=r"vmTEST01.*vmLANES1"):
        check_header(written(), magic("vmLANES1"), what="lanes of edu0")


def test_another_version_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="version is 1, expected 2"):
        check_header(written(), MAGIC, 2)


def test_another_byte_order_is_refused() -> None:
    words = written()
    words[2] = int.from_bytes(BYTE_ORDER_MARK.to_bytes(8, "little"), "big")
    with pytest.raises(RemoteProtocolError, match="byte order"):
        check_header(words, MAGIC)


@pytest.mark.parametrize("size", [0, 32])
def test_an_empty_or_unprepared_area_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        check_header(area(size) if size else area(), MAGIC)
