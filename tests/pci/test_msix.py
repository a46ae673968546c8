from __future__ import annotations

import pytest

from vfio_model.errors import ConfigError, VMStateError
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, PCIDevice
from vfio_model.pci.msix import CAP_ID_MSIX, STATE, MsixSpec
from vfio_model.pci.parts import STATE as BAR_MEMORY
from vfio_model.testing.bench import Bench
from vfio_model.vmstate.fields import VMStateDescription, decode, encode

TABLE, PBA, ENTRY = 0x2000, 0x3000, 16
ENABLE, FUNCTION_MASK = 0x8000, 0x4000


class Card(PCIDevice):
    VENDOR_ID, DEVICE_ID, INTERRUPT_PIN = 0x1234, 0x5678, 1
    MSIX = MsixSpec(70, 2, TABLE, PBA)
    BARS = (BarSpec(0, 0x10000, access=(4, 4), mmap=((0x1000, 0x2000), (0x8000, 0x1000))), BarSpec(2, 0x4000))
    VMSTATE = VMStateDescription("card", 1, (PARENT, STATE, BAR_MEMORY))

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        return 0x5A5A5A5A & (1 << 8 * size) - 1


@pytest.fixture
def bench() -> Bench:
    return Bench(Card)


def control(bench: Bench, value: int) -> None:
    assert bench.device.msix is not None
    bench.device.config_write(bench.device.msix.offset + 2, 2, value)


def entry(bench: Bench, vector: int, *, masked: bool, address: int = 0xFEE0_1000, data: int = 0x41) -> None:
    at = TABLE + vector * ENTRY
    assert bench.device.region_write(2, at, 8, address) is MemTxResult.OK
    assert bench.device.region_write(2, at + 8, 8, data | int(masked) << 32) is MemTxResult.OK


def test_capability_says_where_the_table_is(bench: Bench) -> None:
    device = bench.device
    at = device.config_read(0x34, 1)
    assert device.config_read(at, 1) == CAP_ID_MSIX
    assert device.config_read(at + 2, 2) == 69
    assert (device.config_read(at + 4, 4), device.config_read(at + 8, 4)) == (TABLE | 2, PBA | 2)


def test_pin_without_and_message_with_msix(bench: Bench) -> None:
    bench.device.raise_irq(3)
    bench.device.lower_irq()
    control(bench, ENABLE)
    entry(bench, 3, masked=False)
    bench.device.raise_irq(3)
    assert bench.host.signals == ["raise", "lower", "msi 3"]
    assert bench.device.message(3) == (0xFEE0_1000, 0x41)


@pytest.mark.parametrize("mask", ["vector", "function"])
def test_masked_vector_is_pending_and_sent_when_unmasked(bench: Bench, mask: str) -> None:
    control(bench, ENABLE | (FUNCTION_MASK if mask == "function" else 0))
    entry(bench, 65, masked=mask == "vector")
    bench.device.raise_irq(65)
    bench.device.raise_irq(65)
    assert bench.host.signals == []
    assert bench.device.region_read(2, PBA + 8, 8) == 1 << 1
    if mask == "vector":
        entry(bench, 65, masked=False)
    else:
        control(bench, ENABLE)
    assert bench.host.signals == ["msi 65"]
    assert bench.device.region_read(2, PBA + 8, 8) == 0


def test_reset_masks_everything_and_forgets_what_is_pending(bench: Bench) -> None:
    control(bench, ENABLE)
    bench.device.raise_irq(0)
    bench.device.reset()
    control(bench, ENABLE)
    assert bench.device.region_read(2, PBA, 8) == 0
    assert bench.device.region_read(2, TABLE + 12, 4) == 1
    entry(bench, 0, masked=False)
    assert bench.host.signals == []


def test_vector_that_does_not_exist_is_lost(bench: Bench) -> None:
    control(bench, ENABLE)
    bench.device.raise_irq(70)
    assert bench.host.signals == []


def test_table_keeps_no_reserved_bits_and_pending_bits_are_read_only(bench: Bench) -> None:
    assert bench.device.region_write(2, TABLE + 12, 4, 0xFFFF_FFFF) is MemTxResult.OK
    assert bench.device.region_read(2, TABLE + 12, 4) == 1
    assert bench.device.region_write(2, PBA, 8, 0xFF) is MemTxResult.OK
    assert bench.device.region_read(2, PBA, 8) == 0


def test_host_that_masks_itself_gets_every_message(bench: Bench) -> None:
    bench.device.irq_by_msi = True
    bench.device.raise_irq(7)
    assert bench.host.signals == ["msi 7"]


def test_parts_answer_for_themselves_and_the_device_for_the_rest(bench: Bench) -> None:
    device = bench.device
    assert device.region_write(0, 0x1FFE, 2, 0xBEEF) is MemTxResult.OK
    assert bytes(device.bar_memory(0)[0x1FFE:0x2000]) == b"\xef\xbe"
    assert device.region_read(0, 0x1FFE, 2) == 0xBEEF
    assert device.region_read(0, 0x3000, 4) == 0x5A5A5A5A
    assert device.region_access(0, 0x10) == (4, 4, 0x1000)
    assert device.region_access(0, 0x1001) == (1, 8, 0x3000)
    assert device.region_access(0, 0x3000) == (4, 4, 0x8000)
    assert device.region_access(0, 0xA000) == (4, 4, 0x10000)
    assert device.region_access(2, TABLE) == (4, 8, TABLE + 70 * ENTRY)


def test_state_travels(bench: Bench) -> None:
    control(bench, ENABLE)
    entry(bench, 5, masked=True)
    bench.device.raise_irq(5)
    bench.device.bar_memory(0)[0x8000] = 0x77
    data = encode(Card.VMSTATE, bench.device.export_state())
    other = Bench(Card)
    state = decode(Card.VMSTATE, 1, data, other.device.export_state(), where="card")
    other.device.check_state(state, where="card")
    other.device.import_state(state)
    assert other.device.bar_memory(0)[0x8000] == 0x77
    entry(other, 5, masked=False)
    assert other.host.signals == ["msi 5"]


def test_state_of_another_table_is_refused(bench: Bench) -> None:
    state = bench.device.export_state()
    for name, size in (("msix", "table_size"), ("bar_memory", "size")):
        changed = {**state, name: {**state[name], size: 16}}
        with pytest.raises(VMStateError):
            bench.device.check_state(changed, where="card")


def test_areas_are_whole_pages_inside_the_bar() -> None:
    for mmap in (((0x800, 0x1000),), ((0, 0x1001),), ((0x2000, 0x1000), (0, 0x1000)), ((0, 0x20000),)):
        with pytest.raises(ConfigError):
            BarSpec(0, 0x10000, mmap=mmap)
