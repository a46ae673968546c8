"""What an opened device is, whoever implements the seam: information, regions, interrupts, reset, close.

The devices are small ones with known registers: edu has an interrupt pin and a message, iommu-testdev neither.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EINVAL
from functools import partial

import pytest

from tests.conformance.connections import EXPECTED, DeviceServers, Opened, implementations
from tests.conformance.live_host import LiveHosts
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.iommu_testdev import regs as testdev
from vfio_model.errors import PeerLost
from vfio_model.uapi.vfio import DeviceFlags, IrqInfoFlags, PciIrq, PciRegion
from vfio_model.vfio.region import DeviceConnection

BAR = int(PciRegion.VFIO_PCI_BAR0_REGION_INDEX)
CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
OTHER_IRQS = {int(PciIrq.VFIO_PCI_ERR_IRQ_INDEX): (1, 9), int(PciIrq.VFIO_PCI_REQ_IRQ_INDEX): (1, 9)}
"""Count and flags of those that every device has: an event, set up as a whole."""
INTX, MSI, MSIX = (
    int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX),
    int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX),
    int(PciIrq.VFIO_PCI_MSIX_IRQ_INDEX),
)
EVENTFD = int(IrqInfoFlags.VFIO_IRQ_INFO_EVENTFD)
AUTOMASKED = int(IrqInfoFlags.VFIO_IRQ_INFO_MASKABLE | IrqInfoFlags.VFIO_IRQ_INFO_AUTOMASKED)
NORESIZE = int(IrqInfoFlags.VFIO_IRQ_INFO_NORESIZE)
COMMAND, STATUS, BAR0, INTERRUPT_PIN = 0x04, 0x06, 0x10, 0x3D
MEMORY_AND_MASTER, INTX_DISABLE = 6, 0x400


@dataclass(frozen=True)
class Facts:
    """What a model says of itself."""

    identity: tuple[int, int]
    bar_size: int
    irqs: dict[int, tuple[int, int]]
    """(vectors, flags) by index, where there are any."""


FACTS = {
    "edu": Facts(
        (edu.VENDOR_ID, edu.DEVICE_ID), edu.BAR_SIZE, {INTX: (1, EVENTFD | AUTOMASKED), MSI: (1, EVENTFD | NORESIZE)}
    ),
    "iommu-testdev": Facts((testdev.VENDOR_ID, testdev.DEVICE_ID), testdev.BAR_SIZE, {}),
}
only_edu = pytest.mark.parametrize("model", ["edu"])
only_testdev = pytest.mark.parametrize("model", ["iommu-testdev"])


@pytest.fixture(params=sorted(FACTS))
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=EXPECTED)
def opened(
    request: pytest.FixtureRequest, model: str, live_hosts: LiveHosts, device_servers: DeviceServers
) -> Iterator[Opened]:
    with implementations(live_hosts, device_servers)[request.param](model) as device:
        yield device


@pytest.fixture
def device(opened: Opened) -> DeviceConnection:
    return opened.connection


def test_the_whole_set_is_collected(
    request: pytest.FixtureRequest, live_hosts: LiveHosts, device_servers: DeviceServers
) -> None:
    """Each of them runs each test over a device: what silently drops out would not be missed."""
    assert set(implementations(live_hosts, device_servers)) == set(EXPECTED) == {"inline", "remote", "assigned"}
    run: dict[str, set[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and "opened" in item.fixturenames:
            run.setdefault(item.originalname, set()).add(str(item.callspec.params["opened"]))
    assert all(names == set(EXPECTED) for names in run.values())


def refused(call: Callable[[], object]) -> None:
    """``call`` fails with EINVAL."""
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == EINVAL


# -- information -----------------------------------------------------------------------------------------------------


def test_info(device: DeviceConnection) -> None:
    info = device.get_info()
    assert info.flags == DeviceFlags.VFIO_DEVICE_FLAGS_PCI | DeviceFlags.VFIO_DEVICE_FLAGS_RESET
    assert (info.num_regions, info.num_irqs) == (9, 5)


def test_region_info(device: DeviceConnection, model: str) -> None:
    sizes = {BAR: FACTS[model].bar_size, CONFIG: 256}
    for index in range(9):
        info = device.get_region_info(index)
        assert (info.index, info.size) == (index, sizes.get(index, 0))
        assert info.flags == (3 if info.size else 0), "readable and writable, and not to be mapped"
    refused(lambda: device.get_region_info(9))


def test_irq_info(device: DeviceConnection, model: str) -> None:
    for index in range(5):
        info = device.get_irq_info(index)
        assert (info.index, info.count, info.flags) == (
            index,
            *FACTS[model].irqs.get(index, OTHER_IRQS.get(index, (0, 0))),
        )
    refused(lambda: device.get_irq_info(5))


# -- configuration space ---------------------------------------------------------------------------------------------


def test_config_is_little_endian_bytes_of_any_length(device: DeviceConnection, model: str) -> None:
    whole = device.region_read(CONFIG, 0, 256)
    assert struct.unpack_from("<HH", whole) == FACTS[model].identity
    assert whole[INTERRUPT_PIN] == int(INTX in FACTS[model].irqs)
    for offset, size in ((0, 1), (1, 2), (2, 2), (3, 4), (0x2C, 4), (255, 1), (1, 255)):
        assert device.region_read(CONFIG, offset, size) == whole[offset : offset + size]


def test_config_writes_what_is_writable(device: DeviceConnection) -> None:
    device.region_write(CONFIG, COMMAND, struct.pack("<H", MEMORY_AND_MASTER))
    assert device.region_read(CONFIG, COMMAND, 2) == struct.pack("<H", MEMORY_AND_MASTER)
    identity = device.region_read(CONFIG, 0, 4)
    device.region_write(CONFIG, 0, b"\xff" * 4)
    assert device.region_read(CONFIG, 0, 4) == identity


def test_the_size_of_a_bar_shows_in_its_register(device: DeviceConnection, model: str) -> None:
    device.region_write(CONFIG, BAR0, b"\xff" * 4)
    (bits,) = struct.unpack("<I", device.region_read(CONFIG, BAR0, 4))
    assert -(bits & ~0xF) & 0xFFFF_FFFF == FACTS[model].bar_size


# -- accesses --------------------------------------------------------------------------------------------------------


def test_accesses_outside_of_any_region(device: DeviceConnection, model: str) -> None:
    size = FACTS[model].bar_size
    for index, offset, count in ((BAR, size, 4), (BAR, size - 4, 8), (BAR, 1 << 40, 4), (CONFIG, 254, 4), (BAR, 0, 0)):
        refused(partial(device.region_read, index, offset, count))
    for index in (1, 6, 8, 9, 1000):
        refused(partial(device.region_read, index, 0, 4))


def test_a_write_that_is_refused_harms_nobody(device: DeviceConnection, model: str) -> None:
    before = device.region_read(CONFIG, 0, 256)
    for index, offset, data in (
        (BAR, FACTS[model].bar_size, b"1234"),
        (BAR, 2, b"12"),
        (CONFIG, 256, b"1"),
        (1, 0, b"1234"),
        (9, 0, b"1234"),
    ):
        device.region_write(index, offset, data)
    assert device.region_read(CONFIG, 0, 256) == before


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4), (0, 6), (1, 8)])
def test_no_register_is_smaller_than_four_bytes(device: DeviceConnection, offset: int, size: int) -> None:
    refused(lambda: device.region_read(BAR, offset, size))


@only_edu
def test_registers_of_four_and_eight_bytes(device: DeviceConnection) -> None:
    assert device.region_read(BAR, edu.IDENTIFICATION, 4) == struct.pack("<I", edu.IDENTIFICATION_VALUE)
    assert device.region_read(BAR, edu.IDENTIFICATION, 8) == b"\xff" * 8, "a register of four bytes"
    device.region_write(BAR, edu.INVERSION, struct.pack("<I", 0x0F0F_1234))
    assert device.region_read(BAR, edu.INVERSION, 4) == struct.pack("<I", 0xF0F0_EDCB)
    device.region_write(BAR, edu.DMA_SRC, struct.pack("<Q", 0x1122_3344_5566_7788))
    assert device.region_read(BAR, edu.DMA_SRC, 8) == struct.pack("<Q", 0x1122_3344_5566_7788)
    assert device.region_read(BAR, edu.DMA_SRC, 4) == struct.pack("<I", 0x5566_7788)


@only_edu
def test_a_long_access_is_one_of_each_register(device: DeviceConnection) -> None:
    values = struct.pack("<QQQ", 0x4_0000, 0x8765_4321_0000, 64)
    device.region_write(BAR, edu.DMA_SRC, values)
    assert device.region_read(BAR, edu.DMA_SRC, 24) == values
    assert device.region_read(BAR, edu.DMA_SRC + 4, 12) == b"\xff" * 4 + values[8:16]
    assert len(device.region_read(BAR, 0, 32 << 10)) == 32 << 10


@only_testdev
def test_a_long_access_of_narrow_registers(device: DeviceConnection) -> None:
    device.region_write(BAR, testdev.IOVA_LO, struct.pack("<III", 1, 2, 3))
    assert device.region_read(BAR, testdev.IOVA_LO, 12) == struct.pack("<III", 1, 2, 3)
    assert device.region_read(BAR, testdev.LENGTH, 4) == struct.pack("<I", 3)


# -- interrupts ------------------------------------------------------------------------------------------------------


class Bells:
    """A device whose interrupts are counted, by the name of the handler."""

    def __init__(self, opened: Opened) -> None:
        self.device, self._settle = opened.connection, opened.settle
        self._heard: list[str] = []

    def on(self, index: int, *names: str) -> None:
        self.device.set_irqs(index, [partial(self._ring, name) for name in names])

    def _ring(self, name: str) -> None:
        self._heard.append(name)

    def write(self, register: int, value: int) -> None:
        self.device.region_write(BAR, register, struct.pack("<I", value))

    def heard(self) -> list[str]:
        """What has rung since the last time."""
        self._settle()
        heard, self._heard = self._heard, []
        return heard


@pytest.fixture
def bells(opened: Opened) -> Bells:
    return Bells(opened)


@only_edu
def test_the_pin_signals_once_and_again_when_it_is_unmasked(bells: Bells) -> None:
    bells.on(INTX, "pin")
    assert bells.heard() == []
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == ["pin"]
    bells.write(edu.IRQ_RAISE, 2)
    assert bells.heard() == [], "it masked itself"
    bells.device.unmask_irq(INTX)
    assert bells.heard() == ["pin"], "still up"
    bells.write(edu.IRQ_ACK, 3)
    bells.device.unmask_irq(INTX)
    assert bells.heard() == []
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == ["pin"]


@only_edu
def test_a_pin_that_is_up_signals_who_comes(bells: Bells) -> None:
    bells.write(edu.IRQ_RAISE, 1)
    bells.on(INTX, "pin")
    assert bells.heard() == ["pin"]


@only_edu
def test_a_disabled_pin_is_silent(bells: Bells) -> None:
    bells.on(INTX, "pin")
    bells.device.region_write(CONFIG, COMMAND, struct.pack("<H", INTX_DISABLE))
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == []
    assert bells.device.region_read(CONFIG, STATUS, 1)[0] & 8, "but it is pending"
    bells.device.region_write(CONFIG, COMMAND, bytes(2))
    assert bells.heard() == ["pin"]


@only_edu
def test_a_message_is_one_signal_each(bells: Bells) -> None:
    bells.on(INTX, "pin")
    bells.on(MSI, "message")
    for _ in range(3):
        bells.write(edu.IRQ_RAISE, 1)
        assert bells.heard() == ["message"]


@only_edu
@pytest.mark.parametrize("index", [INTX, MSI])
def test_handlers_are_replaced_and_taken_away(bells: Bells, index: int) -> None:
    bells.on(index, "first")
    bells.on(index, "second")
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == ["second"]
    bells.write(edu.IRQ_ACK, 1)
    bells.on(index)
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == []
    bells.on(index)
    assert bells.heard() == [], "there is nothing to take away"


@only_edu
def test_without_messages_there_is_the_pin_again(bells: Bells) -> None:
    bells.on(INTX, "pin")
    bells.on(MSI, "message")
    bells.on(MSI)
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == ["pin"]


def test_handlers_for_vectors_that_are_not_there(bells: Bells, model: str) -> None:
    for index in (INTX, MSI, MSIX, 5):
        count = FACTS[model].irqs.get(index, (0, 0))[0]
        refused(partial(bells.on, index, *["handler"] * (count + 1)))
    refused(lambda: bells.on(5))
    assert bells.heard() == []
    assert bells.device.get_info().num_irqs == 5, "and the device goes on"


@only_edu
def test_what_is_refused_takes_nothing_away(bells: Bells) -> None:
    bells.on(INTX, "pin")
    refused(lambda: bells.on(INTX, "more", "than there are"))
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == ["pin"]


# -- reset and the end -----------------------------------------------------------------------------------------------


def test_reset_clears_the_command_register(device: DeviceConnection) -> None:
    device.region_write(CONFIG, COMMAND, struct.pack("<H", MEMORY_AND_MASTER))
    device.region_write(CONFIG, BAR0, struct.pack("<I", 0xE000_0000))
    device.reset()
    assert device.region_read(CONFIG, COMMAND, 2) == bytes(2)
    assert device.region_read(CONFIG, BAR0, 4) == bytes(4)


@only_testdev
def test_reset_gives_registers_their_first_values(device: DeviceConnection) -> None:
    first = device.region_read(BAR, testdev.IOVA_LO, 0x20)
    device.region_write(BAR, testdev.IOVA_LO, struct.pack("<II", 1, 2))
    device.region_write(BAR, testdev.DOORBELL, struct.pack("<I", testdev.DOORBELL_ARM))
    assert device.region_read(BAR, testdev.IOVA_LO, 0x20) != first
    device.reset()
    assert device.region_read(BAR, testdev.IOVA_LO, 0x20) == first


@only_edu
def test_reset_takes_the_pin_down_and_leaves_the_handlers(bells: Bells) -> None:
    bells.on(INTX, "pin")
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == ["pin"]
    bells.device.reset()
    bells.device.unmask_irq(INTX)
    assert bells.heard() == []
    bells.write(edu.IRQ_RAISE, 1)
    assert bells.heard() == ["pin"]


def test_a_closed_device_is_gone(device: DeviceConnection) -> None:
    device.close()
    calls: list[Callable[[], object]] = [
        device.get_info,
        lambda: device.get_region_info(BAR),
        lambda: device.get_irq_info(INTX),
        lambda: device.region_read(CONFIG, 0, 4),
        lambda: device.region_write(CONFIG, 0, b"1234"),
        lambda: device.set_irqs(INTX, [lambda: None]),
        lambda: device.set_irqs(INTX, []),
        lambda: device.unmask_irq(INTX),
        lambda: device.unmask_irq(MSI),
        device.reset,
    ]
    for call in calls:
        with pytest.raises(PeerLost):
            call()
    device.close()


@only_edu
def test_nothing_rings_after_close(bells: Bells) -> None:
    bells.on(INTX, "pin")
    bells.device.close()
    assert bells.heard() == []


def test_a_reopened_device_is_a_fresh_one(model: str, live_hosts: LiveHosts, device_servers: DeviceServers) -> None:
    for name, open_device in implementations(live_hosts, device_servers).items():
        for _ in range(2):
            with open_device(model) as opened:
                assert opened.connection.region_read(CONFIG, COMMAND, 2) == bytes(2), name
                opened.connection.region_write(CONFIG, COMMAND, struct.pack("<H", MEMORY_AND_MASTER))
