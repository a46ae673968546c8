"""edu against what QEMU's edu was seen to do."""

from __future__ import annotations

import pytest

from vfio_model.devices.edu import regs
from vfio_model.devices.edu.device import EduDevice
from vfio_model.ranges import U64_MAX
from vfio_model.testing.bench import RAM_SIZE, Bench

MS = 1_000_000


@pytest.fixture
def edu() -> Bench:
    return Bench(EduDevice, dma_mask=U64_MAX)


def start(edu: Bench, src: int, dst: int, count: int, command: int) -> None:
    for offset, value in ((regs.DMA_SRC, src), (regs.DMA_DST, dst), (regs.DMA_COUNT, count)):
        edu.write(offset, value, 8)
    edu.write(regs.DMA_COMMAND, command | regs.DMA_RUN, 8)


def buffer(edu: Bench) -> bytearray:
    assert isinstance(edu.device, EduDevice)
    return edu.device.buffer


def test_identity(edu: Bench) -> None:
    config = edu.device.config
    assert config.read(0, 4) == 0x11E81234
    assert config.read(8, 4) == 0x00FF0010
    assert config.read(0x2C, 4) == 0x11001AF4
    assert config.read(0x3D, 1) == 1
    assert config.read(0x40, 2) == 0x0005 and config.read(0x42, 2) == 0x0080
    config.write(0x10, 4, 0xFFFFFFFF)
    assert config.read(0x10, 4) == 0xFFF00000


def test_identification_and_inversion(edu: Bench) -> None:
    assert edu.read(0x00) == 0x010000ED
    edu.write(0x04, 0x12345678)
    assert edu.read(0x04) == 0xEDCBA987


@pytest.mark.parametrize(("number", "product"), [(0, 1), (1, 1), (5, 120), (12, 479001600), (13, 1932053504), (34, 0)])
def test_factorial_modulo_2_to_the_32(edu: Bench, number: int, product: int) -> None:
    edu.write(0x08, number)
    assert not edu.read(0x20) & 1
    assert edu.read(0x08) == product


def test_a_factorial_of_everything_does_not_stall(edu: Bench) -> None:
    edu.write(0x08, 0xFFFFFFFF)
    assert edu.read(0x08) == 0


def test_a_factorial_interrupts_when_asked_to(edu: Bench) -> None:
    edu.write(0x20, 0xFF)
    assert edu.read(0x20) == 0x80
    edu.write(0x08, 3)
    assert edu.read(0x24) == 1 and edu.host.signals == ["raise"]


def test_the_pin_falls_when_every_cause_is_acknowledged(edu: Bench) -> None:
    edu.write(0x60, 0x5)
    edu.write(0x60, 0x2)
    edu.write(0x64, 0x4)
    assert edu.read(0x24) == 0x3 and edu.host.signals == ["raise"]
    edu.write(0x64, 0x3)
    assert edu.read(0x24) == 0 and edu.host.signals == ["raise", "lower"]


def test_with_msi_every_cause_is_a_message(edu: Bench) -> None:
    edu.enable_msi()
    edu.write(0x60, 1)
    edu.write(0x60, 2)
    edu.write(0x64, 3)
    assert edu.host.signals == ["msi 0", "msi 0"]


@pytest.mark.parametrize(
    ("offset", "size"), [(0x00, 8), (0x04, 1), (0x80, 2), (0x84, 4), (0x60, 4), (0x64, 4), (0x40000, 4), (0x28, 4)]
)
def test_what_cannot_be_read_is_all_ones(edu: Bench, offset: int, size: int) -> None:
    assert edu.device.bar_read(0, offset, size) == (1 << size * 8) - 1


def test_dma_registers_take_four_or_eight_bytes(edu: Bench) -> None:
    edu.write(0x80, 0x1_2345_6789, 8)
    assert edu.read(0x80, 8) == 0x1_2345_6789 and edu.read(0x80, 4) == 0x2345_6789
    edu.write(0x80, 0x55, 4)
    assert edu.read(0x80, 8) == 0x55


def test_a_transfer_happens_after_exactly_100_ms(edu: Bench) -> None:
    edu.ram[0x1000:0x1004] = b"data"
    start(edu, 0x1000, regs.BUFFER_ADDRESS + 8, 4, regs.DMA_IRQ)
    edu.host.clock.advance(99 * MS)
    assert edu.read(regs.DMA_COMMAND) & regs.DMA_RUN and edu.read(0x24) == 0
    edu.ram[0x1000:0x1004] = b"late"
    edu.host.clock.advance(1 * MS)
    assert not edu.read(regs.DMA_COMMAND) & regs.DMA_RUN
    assert buffer(edu)[8:12] == b"late"
    assert edu.read(0x24) == 0x100 and edu.host.signals == ["raise"]


def test_the_100_ms_count_from_the_millisecond_that_was_running(edu: Bench) -> None:
    edu.host.clock.advance(MS - 1)
    start(edu, 0, regs.BUFFER_ADDRESS, 4, 0)
    edu.host.clock.advance_to(100 * MS)
    assert not edu.read(regs.DMA_COMMAND) & regs.DMA_RUN


def test_a_transfer_to_ram_without_an_interrupt(edu: Bench) -> None:
    buffer(edu)[:4096] = b"e" * 4096
    start(edu, regs.BUFFER_ADDRESS, 0x2000, 4096, regs.DMA_TO_RAM)
    edu.host.clock.advance(100 * MS)
    assert edu.ram[0x2000:0x3000] == b"e" * 4096 and edu.host.signals == []
    assert edu.read(regs.DMA_COMMAND) == regs.DMA_TO_RAM


def test_registers_are_frozen_while_a_transfer_is_pending(edu: Bench) -> None:
    start(edu, 0x1000, regs.BUFFER_ADDRESS, 4, 0)
    for offset in (regs.DMA_SRC, regs.DMA_DST, regs.DMA_COUNT):
        edu.write(offset, 0x77, 8)
    edu.write(regs.DMA_COMMAND, regs.DMA_RUN | regs.DMA_IRQ, 8)
    assert edu.read(regs.DMA_SRC, 8) == 0x1000 and edu.read(regs.DMA_COUNT, 8) == 4
    assert edu.read(regs.DMA_COMMAND, 8) == regs.DMA_RUN


def test_a_command_without_start_is_ignored(edu: Bench) -> None:
    edu.write(regs.DMA_COMMAND, regs.DMA_TO_RAM | regs.DMA_IRQ)
    assert edu.read(regs.DMA_COMMAND) == 0


@pytest.mark.parametrize(
    ("inside", "count"), [(-1, 4), (4093, 4), (4097, 0), (0, 4097), (0, U64_MAX), (-regs.BUFFER_ADDRESS, 16)]
)
def test_a_transfer_that_leaves_the_buffer_does_nothing_and_ends(edu: Bench, inside: int, count: int) -> None:
    before = bytes(edu.ram)
    start(edu, regs.BUFFER_ADDRESS + inside, 0x1000, count, regs.DMA_TO_RAM | regs.DMA_IRQ)
    edu.host.clock.advance(100 * MS)
    assert edu.ram == before and edu.read(0x24) == 0x100
    assert edu.host.trace.named("edu_dma_out_of_buffer")


def test_the_default_mask_has_28_bits_and_cuts_the_ram_side() -> None:
    edu = Bench(EduDevice)
    buffer(edu)[:4] = b"high"
    start(edu, regs.BUFFER_ADDRESS, 0x1000_2000, 4, regs.DMA_TO_RAM)
    edu.host.clock.advance(100 * MS)
    assert edu.ram[0x2000:0x2004] == b"high"
    assert edu.host.trace.named("edu_dma_clamped") == [{"address": 0x1000_2000, "iova": 0x2000}]


def test_a_failed_read_delivers_zeros(edu: Bench) -> None:
    buffer(edu)[:8] = b"stale..."
    start(edu, RAM_SIZE, regs.BUFFER_ADDRESS, 8, regs.DMA_IRQ)
    edu.host.clock.advance(100 * MS)
    assert buffer(edu)[:8] == bytes(8) and edu.read(0x24) == 0x100


def test_a_reset_keeps_registers_and_buffer_but_no_dma_survives_it(edu: Bench) -> None:
    edu.write(0x04, 1)
    buffer(edu)[:4] = b"kept"
    start(edu, regs.BUFFER_ADDRESS, 0x2000, 4, regs.DMA_TO_RAM)
    edu.device.reset()
    edu.device.config_write(4, 2, 4)
    edu.host.clock.advance(200 * MS)
    assert edu.ram[0x2000:0x2004] == bytes(4) and buffer(edu)[:4] == b"kept" and edu.read(0x04) == 0xFFFFFFFE
    start(edu, regs.BUFFER_ADDRESS, 0x2000, 4, regs.DMA_TO_RAM)
    edu.host.clock.advance(100 * MS)
    assert edu.ram[0x2000:0x2004] == b"kept"
