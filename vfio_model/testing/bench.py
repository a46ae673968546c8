"""A device on a bench: RAM behind an address space, a clock that a test moves, a list of what the device signalled.

::

    bench = Bench(Mine)
    bench.ram[0x1000:0x1004] = b"\\1\\2\\3\\4"
    bench.write(0x08, 0x1000)
    bench.advance(1_000_000)
    assert bench.signals == ["raise"]

Nothing here has a process, a socket or real time: a test takes microseconds and does the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Self, TypeVar

from vfio_model.clock import VirtualClock
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.dma import DMAImpl, Iovas, OnInvalidate
from vfio_model.memory.dma_log import DmaLog, LoggedDma
from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import DMADirection, MemTxResult, ReadBuffer, WriteBuffer
from vfio_model.pci.config_space import COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY
from vfio_model.pci.declaration import check_made
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.iommu_ops import IommuPort
from vfio_model.pci.msix import CONTROL_ENABLE as MSIX_ENABLE
from vfio_model.pci.msix import ENTRY_SIZE, VECTOR_CONTROL
from vfio_model.ranges import U64_MAX, Hva, Range
from vfio_model.trace import ListTrace
from vfio_model.vmstate.fields import decode, encode

RAM_SIZE = 1 << 20
"""Bytes, from address 0 on. Behind them nothing decodes."""
_COMMAND = 4
_PAGE = 4096

D = TypeVar("D", bound=PCIDevice)


class Host:
    """A ``DeviceHost`` that keeps what it is told."""

    def __init__(self) -> None:
        self.clock, self.trace = VirtualClock(), ListTrace()
        self.iommu: IommuPort | None = None
        self.signals: list[str] = []

    def set_intx(self, level: bool) -> None:
        """See ``DeviceHost``."""
        self.signals.append("raise" if level else "lower")

    def msi(self, vector: int) -> None:
        """See ``DeviceHost``."""
        self.signals.append(f"msi {vector}")


class _Interrupted:
    """``impl``, with a call before each access (a :class:`~vfio_model.memory.dma.DMAImpl`)."""

    def __init__(self, impl: DMAImpl, before: Callable[[], None]) -> None:
        self._impl, self._before = impl, before

    def read(self, iova: int, out: WriteBuffer) -> MemTxResult:
        self._before()
        return self._impl.read(iova, out)

    def write(self, iova: int, data: ReadBuffer) -> MemTxResult:
        self._before()
        return self._impl.write(iova, data)

    def read_many(self, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        self._before()
        return self._impl.read_many(iovas, size, out)

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        self._before()
        return self._impl.write_many(iovas, size, data)

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        self._before()
        return self._impl.map(iova, length, direction, on_invalidate)


class Bench(Generic[D]):
    """A ``device_class`` with ``props``, realized, decoding and a bus master. ``HOST`` is what surrounds it.

    :raise ConfigError: when class or properties cannot be.
    """

    HOST: type[Host] = Host

    def __init__(self, device_class: type[D], **props: object) -> None:
        self.host = self.HOST()
        self.ram = bytearray(RAM_SIZE)
        """What the device reaches by DMA, address 0 first."""
        root = MemoryRegion("system", 1 << 64)
        root.add_subregion(0, RAMRegion("ram", RAMBlock("ram", self.ram, page_size=0x1000, hva=Hva(0x7F0000000000))))
        self.space = AddressSpace("system", root)
        self._class, self._props = device_class, props
        self._log: DmaLog | None = None
        self._impl: DMAImpl = self.space
        self.device = device_class(self.host, **props)
        check_made(device_class, self.device)
        self.device.attach_dma(self.space)
        self.device.system.bind(self.space)
        self.device.realize()
        self.bring_up()

    @property
    def signals(self) -> list[str]:
        """``raise`` and ``lower`` of the pin and ``msi N`` of messages, in order; a test may clear it."""
        return self.host.signals

    def bring_up(self) -> None:
        """What a driver does first, and again after a reset: decoding and bus mastering on."""
        self.device.config_write(_COMMAND, 2, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER)

    def read(self, offset: int, size: int = 4, bar: int = 0) -> int:
        """``size`` bytes at ``offset`` of BAR ``bar``, as a driver reads them."""
        self._check(offset, size, bar)
        value = self.device.region_read(bar, offset, size)
        assert value is not None, f"reading {size} bytes at {offset:#x} of BAR {bar} is a device error"
        return value & (1 << size * 8) - 1

    def write(self, offset: int, value: int, size: int = 4, bar: int = 0) -> None:
        """As :meth:`read`."""
        self._check(offset, size, bar)
        result = self.device.region_write(bar, offset, size, value)
        assert not result, f"writing {value:#x} at {offset:#x} of BAR {bar} is {result!r}"

    def _check(self, offset: int, size: int, bar: int) -> None:
        low, high, end = self.device.region_access(bar, offset)
        assert low <= size <= high and 0 <= offset <= end - size, (
            f"{size} bytes at {offset:#x} of BAR {bar}: accesses have {low} to {high} bytes and end by {end:#x}"
        )

    def advance(self, nanoseconds: int) -> None:
        """Virtual time passes; timers that come due run."""
        self.host.clock.advance(nanoseconds)

    def reset(self) -> None:
        """The device is reset, and brought up again."""
        self.device.reset()
        self.bring_up()

    def enable_msi(self) -> None:
        """As a driver does that takes messages."""
        assert self.device.msi is not None, "it has the capability"
        self.device.config_write(self.device.msi.offset + 2, 2, 1)

    def enable_msix(self) -> None:
        """The same for MSI-X, each vector unmasked."""
        msix = self.device.msix
        assert msix is not None, "it has the capability"
        self.device.config_write(msix.offset + 2, 2, MSIX_ENABLE)
        for vector in range(msix.spec.vectors):
            self.write(msix.spec.table_offset + vector * ENTRY_SIZE + VECTOR_CONTROL, 0, 4, msix.spec.bar)

    def during_dma(self, happens: Callable[[], None], *, skip: int = 0) -> None:
        """``happens()`` inside the next DMA but ``skip``, before it moves a byte: what a client may ask while a device
        waits for memory or a translation that it has to ask for.
        """
        left = iter(range(skip, -1, -1))

        def count() -> None:
            if next(left, None) == 0:
                self.device.attach_dma(self._impl)
                happens()

        self.device.attach_dma(_Interrupted(self._impl, count))

    # -- migration ---------------------------------------------------------------------------------------------------

    def migrate(self) -> Self:
        """Another bench, whose device has this one's state, as bytes on a wire carry it, and the same RAM content. Time
        does not go on here.

        :raise VMStateError: the state cannot be written, or not be taken.
        """
        description = self._class.VMSTATE
        assert description is not None, f"{self._class.__name__} has no VMSTATE"
        data = encode(description, self.device.export_state())
        other = type(self)(self._class, **self._props)
        other.ram[:] = self.ram
        other.device.reset()
        state = decode(description, description.version, data, other.device.export_state(), where=description.name)
        other.device.check_state(state, where=description.name)
        other.device.import_state(state)
        return other

    def log_writes(self) -> None:
        """From now on :meth:`written` knows what the device writes."""
        self._log = DmaLog(_PAGE, [Range(0, U64_MAX)])
        self._impl = LoggedDma(self.space, self._log)
        self.device.attach_dma(self._impl)

    def written(self) -> list[int]:
        """Addresses of the pages (4096 bytes) of RAM that the device wrote since it was last asked."""
        assert self._log is not None, "log_writes() comes first"
        return [number * _PAGE for number in self._log.take(0, RAM_SIZE)]
