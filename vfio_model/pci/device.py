"""A PCI function: configuration space, BARs, interrupts, DMA and reset, around the behaviour of a device class.

A device sees two things of the world: its :class:`~vfio_model.memory.dma.DMASpace` and its :class:`DeviceHost`. The
same class therefore runs in the guest machine (:mod:`vfio_model.pci.bus` is its host), in a device process (an
eventfd is its interrupt) and in a unit test. Registers are integers: byte order is decided by who carries them, by
:attr:`PCIDevice.ENDIANNESS`.

Life of a device::

    __init__ ──► realize() ──► attach_dma() ──► accesses … reset_enter() ─ reset_hold() ─ reset_exit() … ──► unrealize()
                                                 DMA stops    registers      running again

Bus mastering is not asked for on each DMA: :attr:`PCIDevice.dma` is *bound* to the device's address space or to one
that decodes nothing, when the bit in the command register changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from vfio_model.clock import VirtualClock
from vfio_model.errors import ConfigError, VMStateError
from vfio_model.memory.dma import BLOCKED, DMAImpl, DMASpace
from vfio_model.memory.region import MemoryRegion
from vfio_model.memory.types import MemTxResult
from vfio_model.pci import msix, parts
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.config_space import (
    COMMAND_INTX_DISABLE,
    COMMAND_IO,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    CONFIG_SIZE,
    EXTENDED_CONFIG_SIZE,
    STATUS_INTERRUPT,
    ConfigSpace,
    Field,
    type0_header,
)
from vfio_model.pci.declaration import check_class, check_identity, fits
from vfio_model.pci.doorbell import Doorbell
from vfio_model.pci.express import ExpressCapability, ExpressSpec
from vfio_model.pci.iommu_ops import IommuPort
from vfio_model.pci.msi import CONTROL_MASKS, MsiCapability
from vfio_model.pci.msix import MsixCapability, MsixSpec
from vfio_model.pci.parts import BarPart, BarParts
from vfio_model.pci.power import PowerCapability, PowerSpec
from vfio_model.pci.services import IommuServices
from vfio_model.ranges import Range
from vfio_model.trace import Trace
from vfio_model.vmstate.fields import Field as StateField
from vfio_model.vmstate.fields import State, Type, VMStateDescription

PCI_DEVICE = VMStateDescription(
    "PCIDevice",
    3,
    (StateField("config_size"), StateField("config", Type.U8, array="config_size"), StateField("intx", Type.BOOL)),
    minimum_version=3,
)
"""What every function has: configuration space with its BARs and MSI capability, and what it wishes of its pin."""
PARENT = StateField("parent_obj", struct=PCI_DEVICE)
"""The first field of every device's state."""
MSIX_STATE: Final = msix.STATE
"""The field of a device with :attr:`PCIDevice.MSIX`."""
BAR_MEMORY_STATE: Final = parts.STATE
"""The field of a device with mmap areas."""

SUBSYSTEM_VENDOR_QUMRANET = 0x1AF4
SUBSYSTEM_QEMU = 0x1100

IDLE_SLICE_NS = 1000


class DeviceHost(Protocol):
    """What surrounds a device: the guest machine's bus, a device process, or a test."""

    clock: VirtualClock

    @property
    def iommu(self) -> IommuPort | None:
        """The way to the IOMMU's services for devices (ATS, PRI); None where there is no IOMMU."""

    @property
    def trace(self) -> Trace:
        """Where events go."""

    def set_intx(self, level: bool) -> None:
        """Drive the device's interrupt pin."""

    def msi(self, vector: int) -> None:
        """Send message ``vector``. The host knows where messages go."""


@runtime_checkable
class IdleHost(Protocol):
    """A host with an event loop that lets a device work when nothing else is to be done."""

    def idle(self, callback: Callable[[], bool]) -> None:
        """Call ``callback()`` whenever there is nothing else to do, until it returns False."""


class Prop(NamedTuple):
    """A property that whoever creates the device may give."""

    type: type
    default: object
    doc: str


class PCIDevice(IommuServices):
    """Base of every device model. A subclass states its facts as class attributes and overrides the ``bar_*`` and reset
    methods; what it does to memory goes through :attr:`dma`."""

    VENDOR_ID: int
    DEVICE_ID: int
    REVISION: int = 0
    CLASS_ID: int = 0x00FF
    """Base class << 8 | subclass; 0x00ff is "unclassified"."""
    CLASS_PROG: int = 0
    """Programming interface of the class."""
    SUBSYSTEM_VENDOR_ID: int = SUBSYSTEM_VENDOR_QUMRANET
    SUBSYSTEM_ID: int = SUBSYSTEM_QEMU
    INTERRUPT_PIN: int = 0
    """1 for INTA … 4 for INTD; 0 for a device without."""
    BARS: tuple[BarSpec, ...] = ()
    MSI_VECTORS: int = 0
    MSIX: MsixSpec | None = None
    EXPRESS: ExpressSpec | None = None
    """The function is PCI Express: 4096 bytes of configuration space, and maybe :attr:`ATS`, :attr:`PRI`,
    :attr:`PASID`."""
    POWER: PowerSpec | None = None
    """The guest may switch the function off: then it decodes no BAR."""
    DOORBELLS: tuple[Doorbell, ...] = ()
    """Registers that may be rung instead of written."""
    ENDIANNESS: Literal["native", "little"] = "little"
    """Byte order of the BARs' registers: little-endian, or the machine's own (QEMU's ``DEVICE_NATIVE_ENDIAN``). Mmap
    areas and MSI-X structures are little-endian."""
    BUS_MASTER_GATED: bool = True
    """Whether DMA stops while bus mastering is off, as on hardware."""
    PROPS: Mapping[str, Prop] = {}
    VMSTATE: VMStateDescription | None = None
    """What migrates; see :meth:`export_state`. A machine with a device that does not say cannot be migrated."""

    def __init_subclass__(cls) -> None:
        """:raise ConfigError: when what the class states about itself cannot be."""
        super().__init_subclass__()
        check_class(cls, PCIDevice)

    def __init__(self, host: DeviceHost, **props: object) -> None:
        """:raise ConfigError: for a property that the device has not got, or of another type; no identity."""
        check_identity(type(self), self)
        self.host = host
        self.props = _checked_props(type(self), props)
        """The properties, each of its type."""
        self.dma = DMASpace()
        """The device's bus-master address space."""
        self.system = DMASpace()
        """System memory by guest-physical address, for test devices that look behind the IOMMU; blocked unless
        given."""
        self.on_mapping_change: Callable[[], None] | None = None
        """Called when a BAR may have moved: it was written, or decoding was switched, or the device was reset."""
        self.hotplugged = False
        """Whether it came to a machine that ran."""
        self._impl: DMAImpl = BLOCKED
        self._upstream_open = True
        self.irq_by_msi: bool | None = None
        """Set by a host that switches and masks messages itself (VFIO does); None is as the capabilities say."""
        self._intx = self._intx_driven = False
        self.config = self._build_config()
        self.msi = self._make_msi()
        self.msix = self._make_msix()
        self.express = self._make_express()
        self.power = None if self.POWER is None else PowerCapability(self.config, self.POWER, self._mapping_changed)
        self._init_services(host, self.config)
        self._parts = self._make_parts()
        self.config.on_write("command", self._command_written)
        if self.msi is not None and self.msi.layout & CONTROL_MASKS:
            self.config.on_write("msi.mask", self._msi_unmasked)
        for bar in self.BARS:
            self.config.on_write(f"bar{bar.index}", self._mapping_changed)

    # -- identity ------------------------------------------------------------------------------------------------

    def _build_config(self) -> ConfigSpace:
        config = ConfigSpace(type0_header(self._identity()), self._config_size)
        for bar in self.BARS:
            config.add(Field(f"bar{bar.index}", bar.offset, bar.width, bar.type_bits, bar.write_mask))
        return config

    @property
    def _config_size(self) -> int:
        return CONFIG_SIZE if self.EXPRESS is None else EXTENDED_CONFIG_SIZE

    def _identity(self) -> dict[str, int]:
        return {
            "vendor_id": self.VENDOR_ID,
            "device_id": self.DEVICE_ID,
            "revision": self.REVISION,
            "class_prog": self.CLASS_PROG,
            "class_device": self.CLASS_ID,
            "subsystem_vendor_id": self.SUBSYSTEM_VENDOR_ID,
            "subsystem_id": self.SUBSYSTEM_ID,
            "interrupt_pin": self.INTERRUPT_PIN,
        }

    def _make_msi(self) -> MsiCapability | None:
        return MsiCapability(self.config, self.MSI_VECTORS) if self.MSI_VECTORS else None

    def _make_msix(self) -> MsixCapability | None:
        return None if self.MSIX is None else MsixCapability(self.config, self.MSIX, self.host.msi)

    def _make_express(self) -> ExpressCapability | None:
        return None if self.EXPRESS is None else ExpressCapability(self.config, self.EXPRESS, self.reset)

    def _make_parts(self) -> BarParts:
        return BarParts(self.BARS, self.host, self.msix)

    def bar_spec(self, index: int) -> BarSpec:
        """The declaration of BAR ``index``.

        :raise KeyError: when the device has no such BAR.
        """
        for bar in self.BARS:
            if bar.index == index:
                return bar
        raise KeyError(index)

    # -- for the bus and other carriers --------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """A guest's configuration read; see :meth:`ConfigSpace.read`."""
        return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A guest's configuration write; see :meth:`ConfigSpace.write`."""
        self.config.write(offset, size, value)

    def bar_region(self, index: int) -> MemoryRegion | None:
        """What shows BAR ``index`` in memory, if the device has a region of its own (mmapped device memory); None lets
        the bus make one out of :meth:`bar_read` and :meth:`bar_write`."""
        return None

    def bar_parts(self, index: int) -> tuple[BarPart, ...]:
        """The parts of BAR ``index`` that :meth:`bar_read` and :meth:`bar_write` never see, in order."""
        return self._parts.of(index)

    def region_access(self, bar: int, offset: int) -> tuple[int, int, int]:
        """For an access at ``offset`` of BAR ``bar``: the smallest and largest size in bytes that is taken there, and
        where that ends to hold (exclusive).

        :raise KeyError: when the device has no such BAR.
        """
        spec = self.bar_spec(bar)
        for part in self._parts.of(bar):
            if offset < part.offset:
                return *spec.access, part.offset
            if offset < part.offset + part.size:
                return part.min_access_size, part.max_access_size, part.offset + part.size
        return *spec.access, spec.size

    def region_read(self, bar: int, offset: int, size: int) -> int | None:
        """What is at ``offset`` of BAR ``bar``, whoever answers there. The access is one that :meth:`region_access`
        allows."""
        for part in self._parts.of(bar):
            if part.offset <= offset < part.offset + part.size:
                return part.read(offset - part.offset, size)
        return self.bar_read(bar, offset, size)

    def region_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """As :meth:`region_read`."""
        for part in self._parts.of(bar):
            if part.offset <= offset < part.offset + part.size:
                return part.write(offset - part.offset, size, value)
        return self.bar_write(bar, offset, size, value)

    def bar_range(self, index: int, *, allow_zero: bool = False) -> Range | None:
        """The bus addresses that BAR ``index`` decodes now; None when it is not set, decoding is off,
        or the function is."""
        bar = self.bar_spec(index)
        if self.power is not None and not self.power.on:
            return None
        enabled = self.config.get("command") & (COMMAND_IO if bar.is_io else COMMAND_MEMORY)
        return bar.decoded(self.config.get(f"bar{index}"), allow_zero=allow_zero) if enabled else None

    def _mapping_changed(self) -> None:
        if self.on_mapping_change is not None:
            self.on_mapping_change()

    # -- for the device class ------------------------------------------------------------------------------------

    def realize(self) -> None:
        """Called once, before the first access, with :attr:`host` and :attr:`props` in place."""

    def unrealize(self) -> None:
        """Called once, after the last access: stop timers and idle work."""

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """The value of ``size`` bytes at ``offset`` of BAR ``bar``, which is cut to them; None is a device error."""
        return (1 << size * 8) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """Write ``value`` (``size`` bytes) at ``offset`` of BAR ``bar``."""
        return MemTxResult.OK

    def bar_memory(self, index: int) -> memoryview:
        """The bytes behind the mmap areas of BAR ``index``, by offset in the BAR. They survive a reset, unless the
        device clears them.

        :raise KeyError: when that BAR has no mmap areas.
        """
        return self._parts.memory[index]

    def run_when_idle(self, callback: Callable[[], bool]) -> None:
        """Call ``callback()`` again and again until it returns False, serving other work in between: from the host's
        idle hook, else from a timer, one slice per :data:`IDLE_SLICE_NS` of virtual time."""
        if isinstance(self.host, IdleHost):
            self.host.idle(callback)
            return
        clock = self.host.clock

        def slice_() -> None:
            if callback():
                timer.mod(clock.now_ns + IDLE_SLICE_NS)

        timer = clock.timer(slice_)
        timer.mod(clock.now_ns + IDLE_SLICE_NS)

    # -- interrupts ----------------------------------------------------------------------------------------------

    @property
    def uses_msi(self) -> bool:
        """Whether interrupts go out as messages now."""
        if self.irq_by_msi is not None:
            return self.irq_by_msi
        return any(way is not None and way.enabled for way in (self.msi, self.msix))

    def raise_irq(self, vector: int = 0) -> None:
        """Interrupt the guest: a message when MSI-X or MSI is enabled, else the pin goes (and stays) up."""
        if self.irq_by_msi is None and self.msix is not None and self.msix.enabled:
            self.msix.raise_(vector)
        elif self.irq_by_msi is None and self.msi is not None and self.msi.enabled:
            self.msi.raise_(vector, self.host.msi)
        elif self.irq_by_msi:
            self.host.msi(vector)
        elif not self._intx:
            self._intx = True
            self._drive_intx()

    def message(self, vector: int) -> tuple[int, int]:
        """(address, 32-bit data) of message ``vector`` as the guest set it."""
        if self.msix is not None and self.msix.enabled:
            return self.msix.message(vector)
        assert self.msi is not None, "a message from a device without the capability"
        return self.msi.message(vector)

    def _msi_unmasked(self) -> None:
        assert self.msi is not None, "it has masks"
        self.msi.unmasked(self.host.msi)

    def lower_irq(self) -> None:
        """Take the pin down; nothing when it is down already. Messages have no level."""
        if self._intx:
            self._intx = False
            self._drive_intx()

    @property
    def intx_level(self) -> bool:
        """What the pin shows: the device's wish, unless the command register disables it."""
        return self._intx and not self.config.get("command") & COMMAND_INTX_DISABLE

    def _drive_intx(self) -> None:
        status = self.config.get("status")
        self.config.set("status", status | STATUS_INTERRUPT if self._intx else status & ~STATUS_INTERRUPT)
        level = self.intx_level
        if level != self._intx_driven:
            self._intx_driven = level
            self._set_pin(level)

    def _set_pin(self, level: bool) -> None:
        self.host.set_intx(level)

    # -- DMA -----------------------------------------------------------------------------------------------------

    @property
    def bus_master(self) -> bool:
        """Whether the guest lets the device issue DMA."""
        return bool(self.config.get("command") & COMMAND_MASTER)

    def attach_dma(self, impl: DMAImpl) -> None:
        """Give the device its address space; bus mastering decides when :attr:`dma` reaches it."""
        self._impl = impl
        self._bind_dma()

    def set_upstream(self, forwards: bool) -> None:
        """Whether the bridges above let DMA of this function through."""
        if forwards != self._upstream_open:
            self._upstream_open = forwards
            self._bind_dma()

    def _bind_dma(self) -> None:
        open_ = self._upstream_open and (self.bus_master or not self.BUS_MASTER_GATED)
        self.dma.bind(self._impl if open_ else BLOCKED)
        self._allow_mastering(self._upstream_open and self.bus_master)

    def _command_written(self) -> None:
        self._bind_dma()
        self._drive_intx()
        self._mapping_changed()

    # -- reset ---------------------------------------------------------------------------------------------------

    def reset_enter(self) -> None:
        """First phase: no DMA leaves the device from here on. Subclasses stop their timers, then call this."""
        self.dma.bind(BLOCKED)
        self._forget_services()

    def reset_hold(self) -> None:
        """Second phase: registers go to their reset values, the pin goes down."""
        self.lower_irq()
        self.config.reset()
        if self.msix is not None:
            self.msix.reset()
        if self.power is not None:
            self.power.follow()
        self._mapping_changed()

    def reset_exit(self) -> None:
        """Third phase: the device runs again (without bus mastering, which the reset took away)."""
        self._bind_dma()

    def reset(self) -> None:
        """All three phases, for a device that is reset alone."""
        self.reset_enter()
        self.reset_hold()
        self.reset_exit()

    # -- migration -----------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """What :attr:`VMSTATE` describes (also :data:`MSIX_STATE` and
        :data:`BAR_MEMORY_STATE`, where the device has those). A subclass adds its own fields.
        """
        config = bytes(self.config)
        state: State = {"parent_obj": {"config_size": len(config), "config": config, "intx": self._intx}}
        if self.msix is not None:
            state["msix"] = self.msix.export_state()
        if self._parts.memory:
            state["bar_memory"] = self._parts.export_state()
        return state

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """Whether :meth:`import_state` could take ``state``; nothing changes.

        :raise VMStateError: it is of another device, or of no state that this one can be in.
        """
        at = self.config.difference(state["parent_obj"]["config"])
        if at is not None:
            raise VMStateError(f"another device's configuration space: it differs at {at:#x}", where=where)
        if self.msix is not None and "msix" in state:
            self.msix.check_state(state["msix"], where=where)
        if "bar_memory" in state:
            self._parts.check_state(state["bar_memory"], where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take a checked ``state``, after a reset. A subclass loads its own fields first: DMA may begin in here."""
        parent = state["parent_obj"]
        self.config.load(parent["config"])
        if self.power is not None:
            self.power.follow()
        self._intx = parent["intx"]
        if self.msix is not None and "msix" in state:
            self.msix.import_state(state["msix"])
        if "bar_memory" in state:
            self._parts.import_state(state["bar_memory"])
        self._command_written()


def _checked_props(cls: type[PCIDevice], given: Mapping[str, object]) -> dict[str, Any]:
    for name, value in given.items():
        prop = cls.PROPS.get(name)
        if prop is None:
            known = ", ".join(sorted(cls.PROPS)) or "none"
            raise ConfigError(f"{cls.__name__} has no property {name!r}", hint=f"properties: {known}")
        if not fits(value, prop.type):
            raise ConfigError(f"{cls.__name__}.{name} is {value!r}, expected {prop.type.__name__}", hint=prop.doc)
    return {name: given.get(name, prop.default) for name, prop in cls.PROPS.items()}
