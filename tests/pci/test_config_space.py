"""Configuration space: masks, sizing, capabilities, and what an access outside of everything gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.errors import ConfigError
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.config_space import COMMAND_WRITABLE, ConfigSpace, Field, type0_header
from vfio_model.pci.msi import MsiCapability
from vfio_model.ranges import Range


def header() -> ConfigSpace:
    return ConfigSpace(type0_header({"vendor_id": 0x1234, "device_id": 0x11E8, "class_device": 0xFF}))


def test_identity_is_read_only() -> None:
    config = header()
    config.write(0, 4, 0xFFFFFFFF)
    assert config.read(0, 4) == 0x11E81234
    assert config.read(0, 2) == 0x1234 and config.read(2, 2) == 0x11E8 and config.read(1, 1) == 0x12


@pytest.mark.parametrize("offset", [0x08, 0x0C, 0x28, 0x34, 0x3C])
def test_header_registers_that_are_not_implemented_ignore_writes(offset: int) -> None:
    config = header()
    before = config.read(offset + 1, 1)
    config.write(offset + 1, 1, 0xFF)
    assert config.read(offset + 1, 1) == before


def test_behind_the_header_all_but_capabilities_is_scratch_until_it_is_forgotten() -> None:
    config = header()
    MsiCapability(config, 1)
    for offset in range(0x40, 0x100, 4):
        config.write(offset, 4, 0xFFFFFFFF)
    config.reset()
    assert config.read(0x4C, 2) == 0 and config.read(0x50, 4) == 0xFFFFFFFF and config.read(0xFC, 4) == 0xFFFFFFFF
    config.forget()
    assert bytes(config)[0x4E:] == bytes(0x100 - 0x4E) and config.read(0x40, 1) == 5


@pytest.mark.parametrize(("offset", "size"), [(0x100, 4), (0xFE, 4), (-4, 4), (0x3, 2), (0x2, 4), (0, 8), (0, 3)])
def test_an_impossible_access_reads_all_ones_and_writes_nothing(offset: int, size: int) -> None:
    config = header()
    before = bytes(config)
    config.write(offset, size, 0)
    assert config.read(offset, size) == (1 << size * 8) - 1
    assert bytes(config) == before


def test_any_alignment_inside_a_dword() -> None:
    config = header()
    config.add(Field("scratch", 0x40, 4, writable=0xFFFFFFFF))
    config.write(0x41, 2, 0xABCD)
    assert config.read(0x40, 4) == 0x00ABCD00 and config.read(0x41, 2) == 0xABCD


def test_command_keeps_its_writable_bits_only() -> None:
    config = header()
    config.write(4, 2, 0xFFFF)
    assert config.read(4, 2) == COMMAND_WRITABLE


def test_status_errors_are_cleared_by_writing_one() -> None:
    config = header()
    config.set("status", 0xF900)
    config.write(6, 2, 0x8000)
    assert config.get("status") == 0x7900


def test_reset_gives_back_what_a_guest_can_change_and_keeps_the_wiring() -> None:
    config = header()
    MsiCapability(config, 1)
    before = bytes(config)
    for offset in range(0, 0x4E, 2):
        config.write(offset, 2, 0xFFFF)
    config.reset()
    assert bytes(config) == before


def test_a_watcher_runs_after_writes_that_touch_its_register() -> None:
    config, seen = header(), list[int]()
    config.on_write("command", lambda: seen.append(config.get("command")))
    config.write(4, 4, 0x6)
    config.write(0x3C, 1, 5)
    config.write(5, 1, 0x4)
    assert seen == [0x6, 0x406]


def test_capabilities_form_a_list_in_order() -> None:
    config = header()
    assert config.read(0x34, 1) == 0 and not config.get("status") & 0x10
    first = config.add_capability(0x09, 6, (Field("length", 2, 1, reset=6),), prefix="vendor")
    msi = MsiCapability(config, 4)
    assert (first, msi.offset) == (0x40, 0x48)
    assert config.read(0x34, 1) == 0x40 and config.read(0x41, 1) == 0x48 and config.read(0x49, 1) == 0
    assert config.get("status") & 0x10


def test_a_register_is_declared_once_and_inside_the_space() -> None:
    config = header()
    with pytest.raises(AssertionError):
        config.add(Field("command", 0x80, 2))
    with pytest.raises(AssertionError):
        config.add(Field("far", 0xFE, 4))
    with pytest.raises(AssertionError):
        Field("wide", 0, 1, reset=0x100)


@given(st.lists(st.tuples(st.integers(0, 0xFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)), max_size=30))
def test_against_byte_masks(writes: list[tuple[int, int, int]]) -> None:
    """Whatever is written in whatever sizes, each byte follows its own mask."""
    config = header()
    config.add(Field("scratch", 0x80, 8, reset=0x1122334455667788, writable=0x00FF00FF0F0FF0F0))
    reset, mask = bytes(config), bytearray(256)
    mask[0x80:0x88] = (0x00FF00FF0F0FF0F0).to_bytes(8, "little")
    oracle = bytearray(reset)
    for offset, size, value in writes:
        config.write(0x80 + offset % 8, size, value)
        if offset % 4 + size <= 4:
            for at, byte in enumerate((value & (1 << size * 8) - 1).to_bytes(size, "little"), 0x80 + offset % 8):
                oracle[at] = oracle[at] & ~mask[at] | byte & mask[at]
    assert bytes(config) == bytes(oracle)


# -- BARs


@pytest.mark.parametrize(
    ("bar", "sized"),
    [
        (BarSpec(0, 1 << 20), 0xFFF00000),
        (BarSpec(0, 1 << 12, BarType.MEM32, prefetch=True), 0xFFFFF008),
        (BarSpec(0, 1 << 12, BarType.MEM64), 0xFFFFFFFF_FFFFF004),
        (BarSpec(0, 1 << 34, BarType.MEM64, prefetch=True), 0xFFFFFFFC_0000000C),
        (BarSpec(0, 32, BarType.IO), 0xFFFFFFE1),
    ],
)
def test_sizing_by_all_ones(bar: BarSpec, sized: int) -> None:
    config = ConfigSpace([Field("bar0", bar.offset, bar.width, bar.type_bits, bar.write_mask)])
    for offset in range(bar.offset, bar.offset + bar.width, 4):
        config.write(offset, 4, 0xFFFFFFFF)
    assert config.get("bar0") == sized
    assert bar.decoded(sized) is None, "a BAR that is being sized decodes nothing"


def test_where_a_bar_decodes() -> None:
    bar = BarSpec(0, 1 << 20)
    assert bar.decoded(0xFEB00000) == Range(0xFEB00000, 0xFEBFFFFF)
    assert bar.decoded(0) is None
    assert bar.decoded(0, allow_zero=True) == Range(0, 0xFFFFF)
    assert BarSpec(0, 1 << 20, BarType.MEM64).decoded(0x80_0000_0004) == Range(0x80_0000_0000, 0x80_000F_FFFF)


def test_illegal_bars_cannot_be_stated() -> None:
    for arguments in ((0, 3000), (6, 4096), (0, 8)):
        with pytest.raises(ConfigError):
            BarSpec(*arguments)
    with pytest.raises(ConfigError):
        BarSpec(5, 4096, BarType.MEM64)


# -- MSI


def test_msi_with_one_vector() -> None:
    config = header()
    msi = MsiCapability(config, 1)
    assert config.read(0x42, 2) == 0x0080, "64-bit, no mask bits, disabled"
    config.write(0x44, 4, 0xFEE0_1003)
    config.write(0x48, 4, 0x1)
    config.write(0x4C, 4, 0xFFFF_4041)
    config.write(0x42, 2, 0xFFFF)
    assert msi.enabled and msi.allocated == 1
    assert msi.message(0) == (0x1_FEE0_1000, 0x4041)


def test_msi_vectors_replace_the_low_bits_of_the_data() -> None:
    config = header()
    msi = MsiCapability(config, 4)
    assert config.read(0x42, 2) == 0x0084
    config.write(0x4C, 2, 0x4043)
    config.write(0x42, 2, 2 << 4 | 1)
    assert [msi.message(vector)[1] for vector in range(4)] == [0x4040, 0x4041, 0x4042, 0x4043]
    config.write(0x42, 2, 7 << 4 | 1)
    assert msi.allocated == 4


@pytest.mark.parametrize(("written", "found"), [(0x50, 0x00D2), (0x51, 0x0093), (0x11, 0x0093), (0x01, 0x0083)])
def test_enabled_messages_are_no_more_than_there_are(written: int, found: int) -> None:
    config = header()
    msi = MsiCapability(config, 2)
    config.write(msi.offset + 2, 2, written)
    assert config.read(msi.offset + 2, 2) == found
