"""A PCI device of the guest whose behaviour is at the other end of a :class:`~vfio_model.vfio.region.DeviceConnection`.

What the guest sees is put together as ``vfio-pci`` does it: identity, BAR sizes and the list of capabilities are read
from the device once; BAR addresses, the messages of MSI and MSI-X, and the interrupt line are the guest side's own,
because the device's have no meaning there; the command register and the message capabilities are both: emulated here,
and written through, so that the device knows whether it may be a bus master. Everything else behind the header is the
device's; of a device that asks the IOMMU for translations and pages, what the guest enables is noted here. BAR accesses
go to the device's regions, or straight to what of them the connection has mapped.

The device signals as many MSI-X vectors as the guest has unmasked so far: a table of 2048 costs what is used of it.

INTx is signalled once and masks itself; the first BAR access after it takes the pin down and unmasks, and a device
that still wants service signals again (QEMU's ``vfio_intx_eoi``). A device that is gone reads as all ones, writes
to it are lost, its pin is down: a surprise removal. :meth:`VFIOPCIDevice.reconnect` puts a freshly opened device
in its place, under the configuration that the guest had given to the old one.

What takes bus mastering away (the command register, unplugging) returns when the device has taken it: no DMA of its
lands after that. What a device refuses (a reset, its interrupts) is traced and costs nobody else anything.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol, runtime_checkable

from vfio_model.errors import PeerLost
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.config_space import (
    CAPABILITY_POINTER,
    CLASS_DEVICE,
    CLASS_PROG,
    COMMAND,
    COMMAND_MASTER,
    DEVICE_ID,
    FIRST_CAPABILITY,
    INTERRUPT_PIN,
    REVISION_ID,
    STATUS_CAP_LIST,
    SUBSYSTEM_ID,
    SUBSYSTEM_VENDOR_ID,
    VENDOR_ID,
    Field,
)
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice
from vfio_model.pci.msi import CAP_ID_MSI, MsiCapability
from vfio_model.pci.msi import size as msi_size
from vfio_model.pci.msix import CAP_ID_MSIX, MSIX_SIZE, MsixCapability
from vfio_model.pci.parts import BarPart, BarParts
from vfio_model.uapi.vfio import PciIrq, PciRegion
from vfio_model.vfio.pci_facts import DeviceFacts, MappedRegions, RungRegions
from vfio_model.vfio.region import DeviceConnection
from vfio_model.vmstate.fields import VMStateDescription

_CONFIG: Final = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
_INTX: Final = int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX)
_MSI: Final = int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX)
_MSIX: Final = int(PciIrq.VFIO_PCI_MSIX_IRQ_INDEX)


@runtime_checkable
class ServedFunction(Protocol):
    """A ``DeviceConnection`` whose device may ask for what the IOMMU in front of it offers."""

    @property
    def iommu_services(self) -> bool:
        """Whether it may: its control registers for that are followed here, and decide."""


class _MappedPart:
    """``size`` bytes from ``offset`` of BAR ``bar`` that the device has shown as memory: accesses go there while
    :attr:`view` does, else as every other. One is, as every other, the end of the interrupt.
    """

    min_access_size, max_access_size = 1, 8

    def __init__(self, device: VFIOPCIDevice, bar: int, offset: int, view: memoryview) -> None:
        self.bar, self.offset, self.size, self._device = bar, offset, len(view), device
        self.view: memoryview | None = view

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``; little-endian."""
        view = self.view
        if view is not None and self._device.memory_accessed():
            value = int.from_bytes(view[addr : addr + size], "little")
            if not self._device.memory_vanished(self.bar):
                return value
        return self._device.bar_read(self.bar, self.offset + addr, size)

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``."""
        view = self.view
        if view is not None:
            view[addr : addr + size] = value.to_bytes(size, "little")
            self._device.memory_accessed()
            if not self._device.memory_vanished(self.bar):
                return MemTxResult.OK
        return self._device.bar_write(self.bar, self.offset + addr, size, value)


class VFIOPCIDevice(PCIDevice):
    """``connection`` as a function of the guest's bus. ``name`` is the guest's id of it, for the trace."""

    VMSTATE = VMStateDescription("vfio-pci", 1, (PARENT,))

    def __init__(self, host: DeviceHost, connection: DeviceConnection, *, name: str) -> None:
        """:raise OSError: as :class:`DeviceFacts`. :raise PeerLost: the device went away meanwhile."""
        facts = self._facts = DeviceFacts(connection)
        self.VENDOR_ID, self.DEVICE_ID = facts.word(VENDOR_ID), facts.word(DEVICE_ID)
        self.REVISION, self.CLASS_ID = facts.byte(REVISION_ID), facts.word(CLASS_DEVICE)
        self.CLASS_PROG = facts.byte(CLASS_PROG)
        self.SUBSYSTEM_VENDOR_ID, self.SUBSYSTEM_ID = facts.word(SUBSYSTEM_VENDOR_ID), facts.word(SUBSYSTEM_ID)
        self.INTERRUPT_PIN = facts.byte(INTERRUPT_PIN) if facts.byte(INTERRUPT_PIN) <= 4 else 0
        self.BARS = facts.bars
        self.MSI_VECTORS, self.MSIX = facts.msi_vectors, facts.msix
        if isinstance(connection, ServedFunction) and connection.iommu_services:
            self.ATS, self.PRI, self.PASID = facts.ats, facts.pri, facts.pasid
        self.name = name
        self.connection = connection
        self.dead: PeerLost | None = None
        """Why the device is gone; None while it answers."""
        self.irqs = 0
        """Interrupts that the device has signalled."""
        self._set: tuple[int, int] | None = None
        """Which interrupt index signals here, and how many of its vectors."""
        self._unmasked = 1
        """The vectors of MSI-X up to the highest that the guest has ever unmasked."""
        self._mapped: list[_MappedPart] = []
        super().__init__(host)
        if facts.capabilities:
            self.config.add(Field("cap_ptr", CAPABILITY_POINTER, 1, reset=facts.byte(CAPABILITY_POINTER)))
            self.config.set("status", self.config.get("status") | STATUS_CAP_LIST)
        self._emulated = frozenset(self._emulated_dwords())
        self._noted = {name: self.config.field(name).offset for name in self._service_registers()}
        """Registers of the device whose contents matter here, too."""
        if self.msi is not None:
            self.config.on_write("msi.control", self._irqs_written)
        if self.msix is not None:
            self.config.on_write("msix.control", self._irqs_written)
            self.msix.on_unmask = self._vector_unmasked

    @property
    def _config_size(self) -> int:
        return self._facts.config_size

    def _service_offset(self, cap_id: int) -> int | None:
        return self._facts.extended[cap_id][0]

    def _make_msi(self) -> MsiCapability | None:
        if not self.MSI_VECTORS:
            return None
        facts = self._facts
        return MsiCapability(self.config, self.MSI_VECTORS, layout=facts.msi_layout, place=facts.place(CAP_ID_MSI))

    def _make_msix(self) -> MsixCapability | None:
        if self.MSIX is None:
            return None
        return MsixCapability(self.config, self.MSIX, self.host.msi, place=self._facts.place(CAP_ID_MSIX))

    def _make_parts(self) -> BarParts:
        if isinstance(self.connection, MappedRegions):
            for bar in self.BARS:
                for area in self.connection.region_memory(bar.index):
                    self._mapped += self._around_msix(bar.index, *area)
        mapped: dict[int, list[BarPart]] = {}
        for part in self._mapped:
            mapped.setdefault(part.bar, []).append(part)
        return BarParts(self.BARS, self.host, self.msix, mapped)

    def _around_msix(self, bar: int, offset: int, view: memoryview) -> Iterator[_MappedPart]:
        """What of a mapped area is not the MSI-X structures, which are emulated here."""
        taken: list[tuple[int, int]] = []
        if self.MSIX is not None and bar == self.MSIX.bar:
            taken.append((self.MSIX.table_offset, self.MSIX.table_size))
        if self.MSIX is not None and bar == self.MSIX.pending_bar:
            taken.append((self.MSIX.pba_offset, self.MSIX.pba_size))
        at, end = offset, offset + len(view)
        for start, size in sorted(taken):
            if start > at:
                yield _MappedPart(self, bar, at, view[at - offset : min(start, end) - offset])
            at = max(at, min(start + size, end))
            if start >= end:
                return
        if at < end:
            yield _MappedPart(self, bar, at, view[at - offset :])

    def _emulated_dwords(self) -> Iterator[int]:
        yield from range(0, FIRST_CAPABILITY, 4)
        if self.msi is not None:
            yield from range(self.msi.offset, self.msi.offset + msi_size(self.msi.layout), 4)
        if self.msix is not None:
            yield from range(self.msix.offset, self.msix.offset + MSIX_SIZE, 4)

    def _service_registers(self) -> Iterator[str]:
        if self.ats is not None:
            yield "ats.control"
        if self.pri is not None:
            yield from ("pri.control", "pri.allocated")
        if self.pasid is not None:
            yield "pasid.control"

    # -- life ----------------------------------------------------------------------------------------------------

    def realize(self) -> None:
        """Let the device signal its pin, and be rung."""
        with self._surviving():
            self._ask_doorbells()
            self._set_irqs()

    def unrealize(self) -> None:
        """Stop the device's DMA, then close the device file."""
        with self._surviving():
            if self.dead is None:
                command = self.config.get("command") & ~COMMAND_MASTER
                self.connection.region_write(_CONFIG, COMMAND, command.to_bytes(2, "little"))
                self._settle()
        self._forget_memory()
        with self._surviving():
            self.connection.close()

    def lost(self, error: PeerLost) -> None:
        """The device is gone; whoever notices says so. Harmless twice."""
        if self.dead is None:
            self.dead = error
            self._forget_memory()
            self.host.trace("vfio_device_lost", name=self.name, reason=str(error))
            self.lower_irq()

    def difference(self, connection: DeviceConnection) -> str:
        """What tells the device behind ``connection`` from this one; empty when :meth:`reconnect` may be asked for.

        :raise OSError: as :class:`DeviceFacts`. :raise PeerLost: it is gone.
        """
        return self._facts.difference(DeviceFacts(connection))

    def reconnect(self, connection: DeviceConnection) -> None:
        """Go on with ``connection``, a device of the same kind that was just opened (and therefore reset).

        :raise PeerLost: it is gone again.
        """
        self.connection, self.dead = connection, None
        self._set = None
        self._show_memory()
        with self._surviving():
            self._ask_doorbells()
            self._set_irqs()
            self._forward_all()
        if self.dead is not None:
            raise self.dead
        self.host.trace("vfio_device_reconnected", name=self.name)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except PeerLost as error:
            self.lost(error)

    @contextlib.contextmanager
    def _bearing(self, what: str) -> Iterator[None]:
        """Go on when the device refuses ``what``, or is gone."""
        try:
            with self._surviving():
                yield
        except OSError as error:
            self.host.trace("vfio_device_refused", name=self.name, what=what, reason=str(error))

    # -- configuration -------------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """All ones once the device is gone."""
        nothing = (1 << size * 8) - 1
        if self.dead is not None:
            return nothing
        if not self._is_the_devices(offset, size):
            return super().config_read(offset, size)
        with self._bearing("configuration"):
            return int.from_bytes(self.connection.region_read(_CONFIG, offset, size), "little")
        return nothing

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Emulated, and written through where the device needs to know; or the device's alone."""
        if self.dead is not None:
            return
        if offset >= FIRST_CAPABILITY:
            with self._bearing("configuration"):
                self.connection.region_write(_CONFIG, offset, (value & (1 << size * 8) - 1).to_bytes(size, "little"))
            if self._is_the_devices(offset, size) and offset & ~3 not in {at & ~3 for at in self._noted.values()}:
                return
        mastering = self.bus_master
        super().config_write(offset, size, value)
        if offset < COMMAND + 2 and offset + size > COMMAND:
            with self._surviving():
                self._forward(COMMAND, 2)
                if mastering and not self.bus_master:
                    self._settle()

    def _is_the_devices(self, offset: int, size: int) -> bool:
        """Whether an access that is possible goes to the device's own configuration space."""
        return self.config.possible(offset, size) and offset & ~3 not in self._emulated

    def _settle(self) -> None:
        """Return when the device has taken what was written to it: an answer of any kind comes after that."""
        with contextlib.suppress(OSError):
            self.connection.region_read(_CONFIG, COMMAND, 2)

    def _forward_all(self) -> None:
        """What the guest has set and the device does not know: of bus mastering last."""
        for name, at in self._noted.items():
            self._forward(at, self.config.field(name).width)
        self._forward(COMMAND, 2)

    def _forward(self, offset: int, size: int) -> None:
        value = self.config.read(offset, size)
        self.connection.region_write(_CONFIG, offset, value.to_bytes(size, "little"))

    # -- BARs ----------------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """From the device's region, little-endian; all ones when it is gone, an error when it refuses."""
        if self.dead is None:
            try:
                self._end_of_interrupt()
                return int.from_bytes(self.connection.region_read(bar, offset, size), "little")
            except PeerLost as error:
                self.lost(error)
            except OSError:
                return None
        return (1 << size * 8) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """To the device's region; lost when the device is gone."""
        if self.dead is None:
            try:
                self.connection.region_write(bar, offset, value.to_bytes(size, "little"))
                self._end_of_interrupt()
            except PeerLost as error:
                self.lost(error)
            except OSError:
                return MemTxResult.ERROR
        return MemTxResult.OK

    def memory_accessed(self) -> bool:
        """Mapped memory is accessed; False when the device is gone."""
        with self._surviving():
            self._end_of_interrupt()
        return self.dead is None

    def memory_vanished(self, bar: int) -> bool:
        """Whether what was just accessed was not the device's memory: BAR ``bar`` goes by message from now on."""
        if not isinstance(self.connection, MappedRegions) or not self.connection.region_vanished(bar):
            return False
        self.host.trace("vfio_device_memory_vanished", name=self.name, bar=bar)
        self._forget_memory(bar)
        return True

    def _forget_memory(self, bar: int | None = None) -> None:
        for part in self._mapped:
            if bar in (None, part.bar):
                part.view = None

    def _show_memory(self) -> None:
        """The connection is another: what it has mapped of the parts that there are."""
        for part in self._mapped:
            areas = self.connection.region_memory(part.bar) if isinstance(self.connection, MappedRegions) else []
            end = part.offset + part.size
            holding = [(at, view) for at, view in areas if at <= part.offset and end <= at + len(view)]
            part.view = next((view[part.offset - at : end - at] for at, view in holding), None)

    def _ask_doorbells(self) -> None:
        if isinstance(self.connection, RungRegions):
            for bar in self.BARS:
                self.connection.region_doorbells(bar.index, bar.size)

    # -- interrupts ----------------------------------------------------------------------------------------------

    def _signalled(self, vector: int) -> None:
        self.irqs += 1
        self.raise_irq(vector)

    def _end_of_interrupt(self) -> None:
        if self._intx:
            self.lower_irq()
            self.connection.unmask_irq(_INTX)

    def _irqs_written(self) -> None:
        with self._bearing("interrupts"):
            self._set_irqs()

    def _vector_unmasked(self, vector: int) -> None:
        if vector >= self._unmasked:
            assert self.msix is not None, "it has the vector"
            self._unmasked = min(1 << vector.bit_length(), self.msix.vectors)  # doubled: not one by one
            self._irqs_written()

    def _wanted_irqs(self) -> tuple[int, int]:
        """The interrupt index that is to signal, and with how many vectors."""
        if self.msix is not None and self.msix.enabled:
            return _MSIX, self._unmasked
        if self.msi is not None and self.msi.enabled:
            return _MSI, self.msi.allocated
        return _INTX, int(self.INTERRUPT_PIN > 0)

    def _set_irqs(self) -> None:
        """Point the device's interrupts at this function: the messages that the guest uses, or the pin."""
        wanted, before = self._wanted_irqs(), self._set
        if wanted == before:
            return
        self._set = wanted
        if before is not None and before[1]:
            self.connection.set_irqs(before[0], ())
            if before[0] == _INTX:
                self.lower_irq()
        index, count = wanted
        if count:
            self.connection.set_irqs(index, [functools.partial(self._signalled, vector) for vector in range(count)])

    # -- migration -----------------------------------------------------------------------------------------------

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Configuration space as the guest left it; the device hears of what concerns it. Its own state is its own
        stream.
        """
        super().import_state(state)
        if self.dead is None:
            with self._bearing("migrated state"):
                self._set_irqs()
                self._forward_all()

    # -- reset ---------------------------------------------------------------------------------------------------

    def reset_hold(self) -> None:
        """Reset the device behind the connection too; its DMA has stopped with it."""
        super().reset_hold()
        self._unmasked = 1
        if self.dead is None:
            with self._bearing("reset"):
                self.connection.reset()
            with self._bearing("interrupts"):
                self._set_irqs()
                self._forward(COMMAND, 2)
