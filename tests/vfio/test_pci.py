"""A function of the guest's bus whose behaviour is elsewhere: what is emulated, what is written through, its end."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from vfio_model.clock import VirtualClock
from vfio_model.errors import PeerLost
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.config_space import COMMAND, COMMAND_MASTER, COMMAND_MEMORY, INTERRUPT_LINE, STATUS, Field
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.msi import MsiCapability
from vfio_model.pci.msix import MsixSpec
from vfio_model.trace import ListTrace
from vfio_model.uapi.vfio import DeviceInfo, IrqInfo, PciIrq, PciRegion, RegionInfo
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vfio.region import IrqHandler

CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
INTX, MSI = int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX), int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX)
MSI_CONTROL = 0x42


class Host:
    """Counts pins and messages."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.trace = ListTrace()
        self.iommu = None
        self.level = False
        self.messages: list[int] = []

    def set_intx(self, level: bool) -> None:
        self.level = level

    def msi(self, vector: int) -> None:
        self.messages.append(vector)


class Model(PCIDevice):
    """What is at the other end."""

    VENDOR_ID, DEVICE_ID, REVISION, CLASS_ID = 0x1234, 0x0B11, 0x10, 0x0200
    INTERRUPT_PIN = 1
    BARS = (BarSpec(0, 4096, BarType.MEM64, prefetch=True), BarSpec(2, 256))
    MSI_VECTORS = 4


class Connection:
    """``Model`` as a device file, with a BAR that is memory."""

    def __init__(self) -> None:
        self.model = Model(Host())
        self.bars = {0: bytearray(4096), 2: bytearray(256)}
        self.irqs: dict[int, Sequence[IrqHandler]] = {}
        self.unmasked = self.resets = 0
        self.gone = self.closed = False
        self.error = 0

    def _check(self) -> None:
        if self.gone:
            raise PeerLost("model")
        if self.error:
            raise OSError(self.error, "as told")

    def get_info(self) -> DeviceInfo:
        return DeviceInfo(num_regions=9, num_irqs=5)

    def get_region_info(self, index: int) -> RegionInfo:
        return RegionInfo(index=index, size=len(self.bars.get(index, b"")))

    def get_irq_info(self, index: int) -> IrqInfo:
        return IrqInfo(index=index, count=1)

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        self._check()
        source = bytes(self.model.config) if index == CONFIG else bytes(self.bars[index])
        return source[offset : offset + size]

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        self._check()
        if index == CONFIG:
            self.model.config_write(offset, len(data), int.from_bytes(data, "little"))
        else:
            self.bars[index][offset : offset + len(data)] = data

    def set_irqs(self, index: int, handlers: Sequence[IrqHandler]) -> None:
        self._check()
        self.irqs[index] = handlers

    def unmask_irq(self, index: int) -> None:
        self._check()
        self.unmasked += 1

    def reset(self) -> None:
        self._check()
        self.resets += 1

    def close(self) -> None:
        self.closed = True


def plugged() -> tuple[VFIOPCIDevice, Connection, Host]:
    connection, host = Connection(), Host()
    device = VFIOPCIDevice(host, connection, name="nic")
    device.realize()
    return device, connection, host


def test_identity_bars_and_messages_are_the_devices_own() -> None:
    device, _, _ = plugged()
    assert (device.VENDOR_ID, device.DEVICE_ID, device.REVISION, device.CLASS_ID) == (0x1234, 0x0B11, 0x10, 0x0200)
    assert device.BARS == Model.BARS
    assert device.MSI_VECTORS == 4
    assert bytes(device.config) == bytes(Model(Host()).config)


def test_bar_addresses_and_the_interrupt_line_stay_with_the_guest() -> None:
    device, connection, _ = plugged()
    device.config_write(0x10, 4, 0xE000_0000)
    device.config_write(INTERRUPT_LINE, 1, 9)
    assert device.config.get("bar0") & ~0xF == 0xE000_0000
    assert connection.model.config.get("bar0") & ~0xF == 0
    assert connection.model.config.get("interrupt_line") == 0


def test_bus_mastering_is_written_through() -> None:
    device, connection, _ = plugged()
    device.config_write(COMMAND, 2, COMMAND_MASTER | COMMAND_MEMORY)
    assert connection.model.bus_master and device.bus_master
    device.config_write(COMMAND, 4, 0)
    assert not connection.model.bus_master


def test_bars_are_little_endian() -> None:
    device, connection, _ = plugged()
    assert device.bar_write(2, 4, 4, 0x01020304) == MemTxResult.OK
    assert connection.bars[2][4:8] == b"\x04\x03\x02\x01"
    assert device.bar_read(2, 4, 2) == 0x0304


def test_the_pin_goes_up_until_the_guest_looks() -> None:
    device, connection, host = plugged()
    (signal,) = connection.irqs[INTX]
    signal()
    assert host.level and device.config.read(STATUS, 2) & 8 and device.irqs == 1
    device.bar_read(0, 0, 4)
    assert not host.level and connection.unmasked == 1
    device.bar_read(0, 0, 4)
    assert connection.unmasked == 1


def test_enabling_messages_moves_the_interrupts_over() -> None:
    device, connection, host = plugged()
    assert device.msi is not None and device.msi.offset + 2 == MSI_CONTROL
    device.config_write(MSI_CONTROL, 2, 1 | 1 << 4)  # two of four
    assert connection.irqs[INTX] == () and len(connection.irqs[MSI]) == 2
    connection.irqs[MSI][1]()
    assert host.messages == [1] and not host.level
    device.config_write(MSI_CONTROL, 2, 0)
    assert connection.irqs[MSI] == () and len(connection.irqs[INTX]) == 1


def test_a_device_that_is_gone_reads_as_all_ones_and_swallows_writes() -> None:
    device, connection, host = plugged()
    connection.irqs[INTX][0]()
    connection.gone = True
    assert device.bar_read(0, 0, 4) == 0xFFFF_FFFF
    assert device.bar_write(0, 0, 4, 1) == MemTxResult.OK
    assert device.config_read(0, 4) == 0xFFFF_FFFF
    device.config_write(COMMAND, 2, COMMAND_MASTER)
    assert not device.bus_master
    assert not host.level, "its interrupt goes with it"
    assert len(host.trace.named("vfio_device_lost")) == 1


def test_an_error_of_the_device_is_a_bus_error_and_not_its_end() -> None:
    device, connection, _ = plugged()
    connection.error = errno.EINVAL
    assert device.bar_read(0, 0, 4) is None
    assert device.bar_write(0, 0, 4, 1) == MemTxResult.ERROR
    connection.error = 0
    assert device.bar_read(0, 0, 4) == 0


def test_a_new_connection_takes_over_the_configuration() -> None:
    device, old, host = plugged()
    device.config_write(0x10, 4, 0xE000_0000)
    device.config_write(COMMAND, 2, COMMAND_MASTER | COMMAND_MEMORY)
    device.config_write(MSI_CONTROL, 2, 1)
    old.gone = True
    device.bar_read(0, 0, 4)
    fresh = Connection()
    device.reconnect(fresh)
    assert device.dead is None
    assert device.config_read(0, 2) == 0x1234 and device.config.get("bar0") & ~0xF == 0xE000_0000
    assert fresh.model.bus_master and len(fresh.irqs[MSI]) == 1
    fresh.irqs[MSI][0]()
    assert host.messages == [0]


def test_a_new_connection_that_dies_at_once() -> None:
    device, old, _ = plugged()
    old.gone = True
    device.bar_read(0, 0, 4)
    fresh = Connection()
    fresh.gone = True
    with pytest.raises(PeerLost):
        device.reconnect(fresh)
    assert device.dead is not None


def test_a_reset_reaches_the_device() -> None:
    device, connection, _ = plugged()
    device.config_write(COMMAND, 2, COMMAND_MASTER)
    device.reset()
    assert connection.resets == 1
    assert not device.bus_master and not connection.model.bus_master
    assert len(connection.irqs[INTX]) == 1


def test_unplugging_closes_the_file() -> None:
    device, connection, _ = plugged()
    device.unrealize()
    assert connection.closed


def test_a_capability_list_that_is_a_ring_ends() -> None:
    connection = Connection()
    connection.model.config._bytes[0x40:0x42] = b"\x09\x40"  # something else, pointing at itself
    device = VFIOPCIDevice(Host(), connection, name="nic")
    assert device.MSI_VECTORS == 0


def test_a_bar_that_is_no_power_of_two_is_refused() -> None:
    connection = Connection()
    connection.bars[2] = bytearray(300)
    with pytest.raises(OSError, match="BAR 2"):
        VFIOPCIDevice(Host(), connection, name="nic")


class PostedConnection(Connection):
    """Configuration writes arrive with the next request that is answered, as over a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[tuple[int, bytes]] = []

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        self.posted.append((offset, data))

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        for at, data in self.posted:
            super().region_write(CONFIG, at, data)
        self.posted.clear()
        return super().region_read(index, offset, size)


def test_taking_bus_mastering_away_returns_when_the_device_has_taken_it() -> None:
    connection = PostedConnection()
    device = VFIOPCIDevice(Host(), connection, name="nic")
    device.config_write(COMMAND, 2, COMMAND_MASTER | COMMAND_MEMORY)
    assert connection.posted, "giving it is not waited for"
    device.config_write(COMMAND, 2, COMMAND_MEMORY)
    assert not connection.posted and not connection.model.bus_master


def test_unplugging_takes_bus_mastering_away_before_the_file_is_closed() -> None:
    connection = PostedConnection()
    device = VFIOPCIDevice(Host(), connection, name="nic")
    device.config_write(COMMAND, 2, COMMAND_MASTER | COMMAND_MEMORY)
    device.unrealize()
    assert connection.closed and not connection.posted and not connection.model.bus_master


def test_what_a_device_refuses_ends_no_reset_and_no_configuration_write() -> None:
    device, connection, host = plugged()
    connection.error = errno.EIO
    device.config_write(MSI_CONTROL, 2, 1)
    connection.region_write = lambda *args: None  # type: ignore[method-assign]
    device.reset()
    assert device.dead is None
    assert {fields["what"] for fields in host.trace.named("vfio_device_refused")} == {
        "configuration",
        "interrupts",
        "reset",
    }


class Modern(Model):
    """MSI-X with its table inside an area that can be mapped, and a capability that is nobody's but the device's."""

    BARS = (BarSpec(0, 0x4000),)
    MSI_VECTORS = 0
    MSIX = MsixSpec(100, 0, 0x2000, 0x3000)

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        own = (Field("control", 2, 2, 0x0010, 0xFF00), Field("word", 4, 4, 0xCAFE, 0xFFFF_0000))
        self.config.add_capability(0x09, 8, own, prefix="vendor")


class ModernConnection(Connection):
    def __init__(self) -> None:
        super().__init__()
        self.model = Modern(Host())
        self.bars = {0: bytearray(0x4000)}
        self.shows, self.vanished = True, False
        self.accesses: list[tuple[int, int]] = []

    def region_memory(self, index: int) -> list[tuple[int, memoryview]]:
        return [(0x1000, memoryview(self.bars[0])[0x1000:0x4000])] if index == 0 and self.shows else []

    def region_vanished(self, index: int) -> bool:
        return self.vanished

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        if index != CONFIG:
            self.accesses.append((offset, size))
        return super().region_read(index, offset, size)


MSIX = int(PciIrq.VFIO_PCI_MSIX_IRQ_INDEX)


@pytest.fixture
def modern() -> tuple[VFIOPCIDevice, ModernConnection, Host]:
    connection, host = ModernConnection(), Host()
    device = VFIOPCIDevice(host, connection, name="nic")
    device.realize()
    return device, connection, host


Modern_ = tuple[VFIOPCIDevice, ModernConnection, Host]


def entry(device: VFIOPCIDevice, vector: int, masked: bool) -> None:
    assert device.region_write(0, 0x2000 + 16 * vector, 8, 0xFEE0_0000 + vector) is MemTxResult.OK
    assert device.region_write(0, 0x2008 + 16 * vector, 8, vector | masked << 32) is MemTxResult.OK


def test_the_list_of_capabilities_is_the_devices(modern: Modern_) -> None:
    device, connection, _ = modern
    kinds, at = [], device.config_read(0x34, 1)
    while at:
        kinds.append(device.config_read(at, 1))
        at = device.config_read(at + 1, 1)
    assert kinds == [0x11, 0x09]
    assert bytes(device.config)[:0x4C] == bytes(connection.model.config)[:0x4C]


def test_what_is_not_emulated_is_the_devices_own(modern: Modern_) -> None:
    device, connection, _ = modern
    at = connection.model.config.field("vendor.word").offset
    assert device.config_read(at, 4) == 0xCAFE
    device.config_write(at, 4, 0x1234_5678)
    assert connection.model.config.get("vendor.word") == 0x1234_CAFE == device.config_read(at, 4)
    connection.error = errno.EIO
    assert device.config_read(at, 2) == 0xFFFF
    connection.error, connection.gone = 0, True
    assert device.config_read(at, 1) == 0xFF and device.dead is not None


def test_messages_of_the_table_signal_as_they_are_unmasked(modern: Modern_) -> None:
    device, connection, host = modern
    assert device.msix is not None
    device.config_write(device.msix.offset + 2, 2, 0x8000)
    assert connection.irqs[INTX] == () and len(connection.irqs[MSIX]) == 1
    assert connection.model.msix is not None and connection.model.msix.enabled
    entry(device, 5, masked=False)
    assert len(connection.irqs[MSIX]) == 8
    entry(device, 99, masked=False)
    entry(device, 50, masked=True)
    assert len(connection.irqs[MSIX]) == 100
    for vector in (5, 99, 50):
        connection.irqs[MSIX][vector]()
    assert host.messages == [5, 99]
    entry(device, 50, masked=False)
    assert host.messages == [5, 99, 50]
    assert device.message(50) == (0xFEE0_0000 + 50, 50)
    device.config_write(device.msix.offset + 2, 2, 0)
    assert connection.irqs[MSIX] == () and len(connection.irqs[INTX]) == 1


def test_mapped_memory_is_reached_without_the_device_and_the_table_is_not_in_it(modern: Modern_) -> None:
    device, connection, host = modern
    assert device.region_write(0, 0x1FF8, 8, 0x1122_3344_5566_7788) is MemTxResult.OK
    assert connection.bars[0][0x1FF8:0x2000] == bytes.fromhex("8877665544332211")
    entry(device, 3, masked=False)
    assert connection.bars[0][0x2000:0x2640] == bytes(0x640)
    assert device.region_read(0, 0x3FFC, 4) == 0 and connection.accesses == []
    assert [(part.offset, part.size) for part in device.bar_parts(0)] == [
        (0x1000, 0x1000), (0x2000, 0x640), (0x2640, 0x9C0), (0x3000, 16), (0x3010, 0xFF0)
    ]  # fmt: skip
    assert device.region_read(0, 0, 4) == 0 and connection.accesses == [(0, 4)]
    connection.irqs[INTX][0]()
    assert host.level
    device.region_read(0, 0x1000, 4)
    assert not host.level and connection.unmasked == 1, "an access to mapped memory ends the interrupt too"


def test_mapped_memory_goes_with_the_device_and_comes_with_the_next(modern: Modern_) -> None:
    device, connection, _ = modern
    device.lost(PeerLost("model"))
    assert device.region_read(0, 0x1000, 4) == 0xFFFF_FFFF
    assert device.region_write(0, 0x1000, 4, 7) is MemTxResult.OK and connection.bars[0][0x1000] == 0
    after = ModernConnection()
    device.reconnect(after)
    assert device.region_write(0, 0x1000, 4, 9) is MemTxResult.OK
    assert (connection.bars[0][0x1000], after.bars[0][0x1000]) == (0, 9) and not after.accesses
    device.lost(PeerLost("model"))
    without = ModernConnection()
    without.shows = False
    device.reconnect(without)
    assert device.region_read(0, 0x3010, 4) == 0 and without.accesses == [(0x3010, 4)]


def test_memory_whose_file_was_cut_is_asked_for_by_message(modern: Modern_) -> None:
    device, connection, host = modern
    connection.vanished = True
    assert device.region_write(0, 0x1000, 2, 0x1234) is MemTxResult.OK
    assert device.region_read(0, 0x1000, 2) == 0x1234
    assert connection.accesses == [(0x1000, 2)]
    assert len(host.trace.named("vfio_device_memory_vanished")) == 1


@pytest.mark.parametrize("change", [{"table": 0x3F00}, {"table": 0x3001}, {"pba": 0x2008}, {"table": 0x2006}])
def test_a_table_that_lies_nowhere_is_refused(change: dict[str, int]) -> None:
    connection = ModernConnection()
    for name, value in change.items():
        connection.model.config.set(f"msix.{name}", value)
    with pytest.raises(OSError, match="MSI-X"):
        VFIOPCIDevice(Host(), connection, name="nic")


@pytest.mark.parametrize("layout", [0, 0x80, 0x100, 0x180])
def test_every_layout_of_msi(layout: int) -> None:
    class Laid(Model):
        def _make_msi(self) -> MsiCapability:
            return MsiCapability(self.config, 4, layout=layout)

    connection, host = Connection(), Host()
    connection.model = Laid(Host())
    device = VFIOPCIDevice(host, connection, name="nic")
    device.realize()
    assert bytes(device.config) == bytes(connection.model.config)
    data = 12 if layout & 0x80 else 8
    for at, size, value in ((4, 4, 0xFEE0_0000), (data, 2, 0x40), (2, 2, 0x21)):
        device.config_write(0x40 + at, size, value)
    assert device.message(3) == (0xFEE0_0000, 0x43)
    if layout & 0x100:
        device.config_write(0x40 + data + 4, 4, 1 << 2)
    connection.irqs[MSI][2]()
    assert host.messages == ([] if layout & 0x100 else [2])
    if layout & 0x100:
        assert device.config_read(0x40 + data + 8, 4) == 1 << 2
        device.config_write(0x40 + data + 4, 4, 0)
        assert host.messages == [2] and device.config_read(0x40 + data + 8, 4) == 0
