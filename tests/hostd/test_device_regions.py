"""A device model behind region and interrupt numbers."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from hostd.device_regions import DeviceRegions
from hostd.device_surroundings import ProcessSurroundings
from protocols.transport.kernel import EventFd
from protocols.vfio_user.messages import SetIrqs
from vfio_model.devices.edu import regs
from vfio_model.devices.edu.device import EduDevice
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.config_space import CONFIG_SIZE
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import NULL_TRACE

CONFIG, INTX, MSI = 7, 0, 1
TRIGGER_EVENTFD, TRIGGER_NONE, TRIGGER_BOOL = 0x24, 0x21, 0x22


@pytest.fixture
def regions() -> DeviceRegions:
    around = ProcessSurroundings(NULL_TRACE)
    device = EduDevice(around)
    device.realize()
    return DeviceRegions(device, around)


def raised(call: object, *args: object) -> int | None:
    with pytest.raises(OSError) as refused:
        call(*args)  # type: ignore[operator]
    return refused.value.errno


def test_only_what_is_there_has_a_size(regions: DeviceRegions) -> None:
    sizes = [regions.region_info(index)[0].size for index in range(9)]
    assert sizes == [regs.BAR_SIZE, 0, 0, 0, 0, 0, 0, CONFIG_SIZE, 0]
    assert raised(regions.region_info, 9) == errno.EINVAL
    assert [regions.irq_info(index).count for index in range(5)] == [1, 1, 0, 1, 1]
    assert raised(regions.irq_info, 5) == errno.EINVAL


def test_configuration_space_can_be_read_at_once_and_in_parts(regions: DeviceRegions) -> None:
    whole = regions.read(CONFIG, 0, CONFIG_SIZE)
    assert whole == b"".join(regions.read(CONFIG, offset, 1) for offset in range(CONFIG_SIZE))
    assert int.from_bytes(whole[:4], "little") == regs.DEVICE_ID << 16 | regs.VENDOR_ID
    assert regions.read(CONFIG, 1, 6) == whole[1:7]


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (0, regs.BAR_SIZE, 4),
        (0, 0, 0),
        (0, regs.BAR_SIZE - 4, 8),
        (CONFIG, 250, 8),
        (1, 0, 4),
        (8, 0, 4),
        (0, 1 << 60, 4),
    ],
)
def test_accesses_outside_are_invalid(regions: DeviceRegions, region: int, offset: int, count: int) -> None:
    assert raised(regions.read, region, offset, count) == errno.EINVAL
    assert raised(regions.write, region, offset, bytes(count)) == errno.EINVAL


@pytest.mark.parametrize(("value", "count"), [((1 << 64) - 1, 4), (-1, 4), (1 << 40, 8), (0x1FF, 1)])
def test_what_a_device_says_is_cut_to_the_access(value: int, count: int) -> None:
    class Wide(PCIDevice):
        VENDOR_ID, DEVICE_ID = 0x1234, 1
        BARS = (BarSpec(0, 4096), BarSpec(2, 8192, mmap=((4096, 4096),)))

        def bar_read(self, bar: int, offset: int, size: int) -> int | None:
            return value

    around = ProcessSurroundings(NULL_TRACE)
    regions = DeviceRegions(Wide(around), around)
    said = (value & (1 << 64) - 1).to_bytes(8, "little")[:count]
    assert (regions.read(0, 0, count), regions.read(2, 0, count)) == (said, said)
    around.close()


def test_interrupts_go_where_they_were_pointed_and_outlive_a_reset(regions: DeviceRegions) -> None:
    event = EventFd()
    regions.set_irqs(SetIrqs(20, TRIGGER_EVENTFD, INTX, 0, 1), [os.dup(event.fd)])
    regions.reset()
    regions.write(0, regs.IRQ_RAISE, (1).to_bytes(4, "little"))
    assert event.drain() == 1
    regions.set_irqs(SetIrqs(20, TRIGGER_NONE, INTX, 0, 0), [])
    regions.reset()
    regions.write(0, regs.IRQ_RAISE, (1).to_bytes(4, "little"))
    assert event.drain() == 0
    event.close()


def test_messages_take_the_place_of_the_pin(regions: DeviceRegions) -> None:
    pin, message = EventFd(), EventFd()
    regions.set_irqs(SetIrqs(20, TRIGGER_EVENTFD, INTX, 0, 1), [os.dup(pin.fd)])
    regions.set_irqs(SetIrqs(20, TRIGGER_EVENTFD, MSI, 0, 1), [os.dup(message.fd)])
    regions.write(0, regs.IRQ_RAISE, (1).to_bytes(4, "little"))
    assert (pin.drain(), message.drain()) == (0, 1)
    regions.set_irqs(SetIrqs(20, TRIGGER_BOOL, MSI, 0, 1, b"\1"), [])
    assert message.drain() == 1
    regions.set_irqs(SetIrqs(20, TRIGGER_NONE, MSI, 0, 0), [])
    regions.set_irqs(SetIrqs(20, TRIGGER_NONE, INTX, 0, 1), [])
    assert (pin.drain(), message.drain()) == (1, 0)
    regions.set_irqs(SetIrqs(20, TRIGGER_NONE, INTX, 0, 0), [])
    pin.close()
    message.close()


@pytest.mark.parametrize(
    ("request_", "fds"),
    [
        (SetIrqs(20, TRIGGER_EVENTFD, 5, 0, 1), 1),
        (SetIrqs(20, TRIGGER_EVENTFD, INTX, 0, 2), 2),
        (SetIrqs(20, TRIGGER_EVENTFD, INTX, 1, 1), 1),
        (SetIrqs(20, TRIGGER_EVENTFD, INTX, 0, 1), 2),
        (SetIrqs(20, TRIGGER_NONE, INTX, 0, 1), 1),
        (SetIrqs(20, 0x27, INTX, 0, 1), 1),
        (SetIrqs(20, 0x20, INTX, 0, 1), 0),
        (SetIrqs(20, 0x40, INTX, 0, 1), 0),
        (SetIrqs(20, 0x09, MSI, 0, 1), 0),
    ],
)
def test_what_does_not_belong_together_is_invalid_and_costs_no_descriptor(
    regions: DeviceRegions, request_: SetIrqs, fds: int
) -> None:
    event = EventFd()
    numbers = [os.dup(event.fd) for _ in range(fds)]
    assert raised(regions.set_irqs, request_, numbers) == errno.EINVAL
    for number in numbers:
        with pytest.raises(OSError):
            os.fstat(number)
    event.close()


def test_only_eventfds_are_rung(regions: DeviceRegions) -> None:
    numbers = list(os.pipe())
    assert raised(regions.set_irqs, SetIrqs(20, TRIGGER_EVENTFD, INTX, 0, 1), numbers[:1]) == errno.EINVAL
    with pytest.raises(OSError):
        os.fstat(numbers[0])
    os.close(numbers[1])


def test_a_counter_that_is_full_holds_no_device_up(regions: DeviceRegions) -> None:
    full = os.eventfd(0)
    os.write(full, ((1 << 64) - 2).to_bytes(8, sys.byteorder))
    regions.set_irqs(SetIrqs(20, TRIGGER_EVENTFD, INTX, 0, 1), [os.dup(full)])
    regions.set_irqs(SetIrqs(20, TRIGGER_NONE, INTX, 0, 1), [])
    regions.set_irqs(SetIrqs(20, TRIGGER_NONE, INTX, 0, 0), [])
    os.close(full)
