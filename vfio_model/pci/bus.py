"""A PCI bus: functions by devfn, configuration cycles, BARs in memory, and each function's DMA address space.

What belongs to a host bridge is given to the bus: the memory regions that show the bus's memory and I/O space, where
they begin in bus addresses, the machine's byte order, and what happens to an interrupt pin. An IOMMU puts its
:class:`~vfio_model.pci.iommu_ops.PCIIOMMUOps` on the bus before devices come; each function's address space is asked
for **once, at plug**, and bound into the device: no access walks the bus.

Buses form a tree. A bus below a bridge has that bridge as its :class:`Upstream`: configuration cycles find it by the
numbers that the guest has given it (:meth:`PCIBus.find`), memory and I/O by the bridge's windows, DMA goes up while
every bridge on the way lets it, and resets go down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from vfio_model.clock import VirtualClock
from vfio_model.errors import ConfigError
from vfio_model.memory.address_space import AddressSpace
from vfio_model.pci.address import FUNCTIONS, SLOTS, PCIAddress
from vfio_model.pci.bar_map import BarMap, Window
from vfio_model.pci.config_space import CONFIG_SIZE
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.iommu_ops import IommuPort, PCIIOMMUOps
from vfio_model.pci.iommu_port import BusIommuPort
from vfio_model.pci.requester import Above, Requester, requester_of
from vfio_model.trace import NULL_TRACE, Trace

D = TypeVar("D", bound=PCIDevice)

__all__ = ["DEVFNS", "BusOptions", "IdlePluggedHost", "PCIBus", "PluggedHost", "Upstream", "Window"]

DEVFNS = SLOTS * FUNCTIONS


@dataclass
class BusOptions:
    """What the host bridge decides. ``intx(devfn, pin, level)`` takes pin changes (pin 1..4)."""

    big_endian: bool = False
    """Byte order of the machine, for devices whose registers are in native order."""
    allow_zero_bars: bool = False
    """Whether a BAR at bus address 0 is set (pseries) or not yet (PC)."""
    intx: Callable[[int, int, bool], None] = field(default=lambda devfn, pin, level: None)
    idle: Callable[[Callable[[], bool]], None] | None = None
    """The event loop's idle hook, if the machine runs in one."""
    bridges_gate_dma: bool = True
    """Whether DMA stops at a bridge that may not master its primary bus. Stock QEMU lets it through."""


class Upstream(Protocol):
    """What a bus sees of the bridge above it."""

    @property
    def bus(self) -> PCIBus:
        """The bridge's primary bus."""

    @property
    def devfn(self) -> int:
        """Where the bridge is on that bus."""

    @property
    def number(self) -> int:
        """The secondary bus's number now."""

    @property
    def begins_hierarchy(self) -> bool:
        """Whether the secondary bus is a root bus (an expander's)."""

    @property
    def takes_ownership(self) -> bool:
        """See :class:`~vfio_model.pci.requester.Above`."""

    @property
    def masters(self) -> bool:
        """Whether it hands DMA up."""

    def forwards(self, number: int) -> bool:
        """Whether configuration cycles to bus ``number`` go down through it now."""

    def check_plug(self, device: PCIDevice, devfn: int) -> None:
        """:raise ConfigError: when ``device`` cannot be on the secondary bus."""

    def populated(self) -> None:
        """A device has been plugged into the secondary bus, or taken out."""


class PluggedHost:
    """The :class:`~vfio_model.pci.device.DeviceHost` of a function in the guest machine."""

    def __init__(self, bus: PCIBus, devfn: int) -> None:
        self.clock = bus.clock
        self.trace = bus.trace
        self.iommu = bus.iommu_port(devfn)
        self.bus, self.devfn = bus, devfn

    def set_intx(self, level: bool) -> None:
        """Hand a pin change to the host bridge."""
        device = self.bus.devices.get(self.devfn)
        if device is not None and device.INTERRUPT_PIN:
            self.bus.options.intx(self.devfn, device.INTERRUPT_PIN, level)

    def msi(self, vector: int) -> None:
        """A DMA write of the message through the device's own address space: translated, and gated by bus mastering.

        One that does not get through is lost, as on hardware."""
        device = self.bus.devices[self.devfn]
        address, data = device.message(vector)
        result = device.dma.write(address, data.to_bytes(4, "little"))
        self.trace("msi_message", devfn=self.devfn, vector=vector, address=address, data=data, result=int(result))


class IdlePluggedHost(PluggedHost):
    """The same in a machine that has an event loop."""

    def idle(self, callback: Callable[[], bool]) -> None:
        """Pass ``callback`` to the machine's loop."""
        hook = self.bus.options.idle
        assert hook is not None, "made for a bus with an idle hook only"
        hook(callback)


class PCIBus:
    """One bus. ``memory`` and ``io`` show its spaces, ``system`` is where DMA goes without an IOMMU.

    A host bridge makes a root bus: ``express`` for a PCI Express root complex, ``bypass_iommu`` when the functions of
    its hierarchy are not translated. ``upstream`` is the bridge above any other bus (bridges make those themselves:
    :class:`~vfio_model.pci.bridge.PCIBridge`); then the bus's number is the bridge's to say.
    """

    def __init__(
        self,
        name: str,
        *,
        memory: Window,
        system: AddressSpace,
        clock: VirtualClock,
        io: Window | None = None,
        options: BusOptions | None = None,
        trace: Trace = NULL_TRACE,
        express: bool = False,
        upstream: Upstream | None = None,
        bypass_iommu: bool = False,
    ) -> None:
        self.name = name
        self.express, self.upstream = express, upstream
        self.is_root = upstream is None or upstream.begins_hierarchy
        self.extended_config = express or self.is_root
        """Whether configuration cycles reach beyond the first 256 bytes."""
        self._bypass_iommu = bypass_iommu
        self.children: list[PCIBus] = []
        """The buses below, in the order in which their bridges came."""
        self.memory, self.io, self.system = memory, io, system
        self.clock, self.trace = clock, trace
        self.options = options or BusOptions()
        self.devices: dict[int, PCIDevice] = {}
        """By devfn."""
        self.iommu_ops: PCIIOMMUOps | None = None
        """The IOMMU that sits on this bus; see :meth:`setup_iommu`."""
        self.iommu_per_bus = False
        """Whether it leaves the root buses of expanders alone."""
        big_endian, allow_zero = self.options.big_endian, self.options.allow_zero_bars
        self._bars = BarMap(memory, io, big_endian=big_endian, allow_zero=allow_zero)

    def setup_iommu(self, ops: PCIIOMMUOps, *, per_bus: bool = False) -> None:
        """Put an IOMMU on the bus, for it and all buses below (``per_bus``: but for the root buses of expanders);
        before any device is plugged."""
        assert not self.devices, "a bus gets its IOMMU before its devices"
        self.iommu_ops, self.iommu_per_bus = ops, per_bus

    @property
    def number(self) -> int:
        """What the guest calls the bus now; 0 for a root bus and for one without a number."""
        return 0 if self.upstream is None else self.upstream.number

    @property
    def root(self) -> PCIBus:
        """The root bus of this bus's hierarchy: a host bridge's, or an expander's."""
        return self if self.upstream is None or self.is_root else self.upstream.bus.root

    @property
    def bypass_iommu(self) -> bool:
        """Whether requests of this hierarchy go past the IOMMU: its root bus says."""
        return self.root._bypass_iommu

    def above(self) -> Above | None:
        """See :class:`~vfio_model.pci.requester.Segment`."""
        up = self.upstream
        return None if up is None else Above(up.bus, up.devfn, up.takes_ownership)

    def find(self, number: int) -> PCIBus | None:
        """The bus that configuration cycles for bus ``number`` reach from here, this one or one below."""
        if number == self.number:
            return self
        for child in self.children:
            if child.upstream is not None and child.upstream.forwards(number):
                return child.find(number)
        return None

    def walk(self) -> Iterator[PCIBus]:
        """This bus and all below, those of a bridge before those of the next."""
        yield self
        for child in self.children:
            yield from child.walk()

    def address(self, devfn: int) -> PCIAddress:
        """The address of ``devfn`` on this bus."""
        return PCIAddress.of(self.number, devfn)

    # -- plugging ------------------------------------------------------------------------------------------------

    def host_for(self, devfn: int) -> PluggedHost:
        """The surroundings for a device that is made for ``devfn`` and then given to :meth:`attach`."""
        return IdlePluggedHost(self, devfn) if self.options.idle is not None else PluggedHost(self, devfn)

    def plug(self, device_class: type[D], devfn: int, **props: object) -> D:
        """Make a device and attach it.

        :raise ConfigError: when ``devfn`` is taken or out of range, or a property does not fit.
        """
        self._check_free(devfn)
        return self.attach(device_class(self.host_for(devfn), **props), devfn)

    def attach(self, device: D, devfn: int) -> D:
        """Attach a device made with :meth:`host_for`; binds its DMA and realizes it.

        :raise ConfigError: when ``devfn`` is taken or out of range; what realizing raises passes. Nothing is plugged
            then.
        """
        self._check_plug(device, devfn)
        self.devices[devfn] = device
        if device.express is not None:
            device.express.plugged_into(root_complex=self.express and self.is_root)
        self._bars.add(device, str(self.address(devfn)))
        device.system.bind(self.system)
        device.attach_dma(self.iommu_address_space(devfn))
        device.set_upstream(self.forwards_dma)
        realized = False
        try:
            device.realize()
            realized = True
        finally:
            if not realized:
                self._take_out(devfn)
        if self.upstream is not None:
            self.upstream.populated()
        return device

    def detach(self, devfn: int) -> PCIDevice:
        """Take the device out (hot-unplug, surprise removal): DMA stops, BARs vanish.

        :raise KeyError: when nothing is plugged there.
        """
        self.devices[devfn].unrealize()
        return self._take_out(devfn)

    def _take_out(self, devfn: int) -> PCIDevice:
        device = self.devices[devfn]
        device.reset_enter()
        device.lower_irq()
        self._bars.remove(device)
        del self.devices[devfn]
        if self.upstream is not None:
            self.upstream.populated()
        return device

    def iommu_address_space(self, devfn: int) -> AddressSpace:
        """The address space that ``devfn`` has its DMA translated in; system memory without an IOMMU. Functions that
        are one requester share it."""
        who = self.requester(devfn)
        return who.ops.get_address_space(who.bus, who.devfn) if who is not None else self.system

    def refuses_assignment(self, devfn: int, host_bits: int) -> str:
        """Why a device of a host cannot be function ``devfn``, see
        :meth:`~vfio_model.pci.iommu_ops.PCIIOMMUOps.refuses_assignment`; empty: it can."""
        who = self.requester(devfn)
        return who.ops.refuses_assignment(who.bus, who.devfn, host_bits) if who is not None else ""

    def iommu_port(self, devfn: int) -> IommuPort | None:
        """What the IOMMU offers function ``devfn`` beside address spaces; None without an IOMMU."""
        who = self.requester(devfn)
        if who is None:
            return None
        return BusIommuPort(who.ops, who.bus, who.devfn)

    def requester(self, devfn: int) -> Requester | None:
        """Who ``devfn`` is to the IOMMU; None without an IOMMU, and where it is bypassed."""
        return requester_of(self, devfn)

    @property
    def forwards_dma(self) -> bool:
        """Whether every bridge above hands DMA up."""
        up = self.upstream
        return up is None or ((up.masters or not self.options.bridges_gate_dma) and up.bus.forwards_dma)

    def update_forwarding(self) -> None:
        """A bridge above may have begun to hand DMA up, or stopped."""
        for bus in self.walk():
            forwards = bus.forwards_dma
            for device in bus:
                device.set_upstream(forwards)

    def free_devfn(self, first_slot: int = 1) -> int:
        """The first function 0 that is free, from ``first_slot`` on.

        :raise ConfigError: when the bus is full.
        """
        for slot in range(first_slot, SLOTS):
            if slot << 3 not in self.devices:
                return slot << 3
        raise ConfigError(f"bus {self.name} has no free slot", hint="a bus holds 32 devices")

    def _check_plug(self, device: PCIDevice, devfn: int) -> None:
        self._check_free(devfn)
        if self.upstream is not None:
            self.upstream.check_plug(device, devfn)

    def _check_free(self, devfn: int) -> None:
        if not 0 <= devfn < DEVFNS:
            raise ConfigError(
                f"devfn {devfn:#x} does not exist on bus {self.name}", hint="devfn is slot << 3 | function"
            )
        if devfn in self.devices:
            taken = type(self.devices[devfn]).__name__
            raise ConfigError(
                f"{self.address(devfn)} on bus {self.name} is taken by {taken}", hint="give the device another addr="
            )

    # -- configuration cycles --------------------------------------------------------------------------------------

    def config_read(self, devfn: int, offset: int, size: int) -> int:
        """A configuration read of 1, 2 or 4 bytes; all ones where nothing answers."""
        device = self._answering(devfn, offset)
        return (1 << size * 8) - 1 if device is None else device.config_read(offset, size)

    def config_write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """A configuration write; lost where nothing answers."""
        device = self._answering(devfn, offset)
        if device is not None:
            device.config_write(offset, size, value)

    def _answering(self, devfn: int, offset: int) -> PCIDevice | None:
        """A function that was plugged while the machine ran answers once its slot has a function 0, as on QEMU."""
        if offset >= CONFIG_SIZE and not self.extended_config:
            return None
        device = self.devices.get(devfn)
        return None if device is not None and device.hotplugged and devfn & ~7 not in self.devices else device

    # -- reset ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[PCIDevice]:
        return iter([device for _, device in sorted(self.devices.items())])

    def reset_enter(self) -> None:
        """First phase of all devices, here and on the buses below: no DMA from here on."""
        for device in self:
            device.reset_enter()

    def reset_hold(self) -> None:
        """Second phase of all devices."""
        for device in self:
            device.reset_hold()

    def reset_exit(self) -> None:
        """Third phase of all devices."""
        for device in self:
            device.reset_exit()

    def reset(self) -> None:
        """Reset the bus alone, all three phases."""
        self.reset_enter()
        self.reset_hold()
        self.reset_exit()
