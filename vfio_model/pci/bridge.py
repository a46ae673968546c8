"""A PCI-to-PCI bridge: a function with a bus behind it.

What it forwards down: configuration cycles to the buses from its secondary to its subordinate number, memory and I/O
inside its windows while the command register lets it decode them. Up: DMA while it may master its primary bus, and
interrupt pins, turned by the slot of the device below (PCI-to-PCI Bridge Architecture Specification, 9.1, "Interrupt
Routing"). Both stop while it holds its secondary bus in reset.

A bridge is plugged as every device is; :attr:`PCIBridge.secondary` is then the bus to plug others into::

    port = root_bus.plug(PcieRootPort, 4 << 3, id="rp0", chassis=1)
    port.secondary.plug(Nvme, 0)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from vfio_model.errors import ConfigError
from vfio_model.memory.region import AliasRegion, MemoryRegion, transaction
from vfio_model.pci.bus import PCIBus, Window
from vfio_model.pci.config_space import CAPABILITY_POINTER, COMMAND_IO, COMMAND_MEMORY, ConfigSpace, Field
from vfio_model.pci.device import DeviceHost, PCIDevice, Prop
from vfio_model.pci.express import ExpressCapability, PortType
from vfio_model.pci.msi import CONTROL_64BIT, MsiCapability
from vfio_model.pci.msix import MsixCapability
from vfio_model.pci.type1 import CONTROL_BUS_RESET, io_window, memory_window, type1_header
from vfio_model.ranges import Range

CLASS_BRIDGE_PCI = 0x0604
PINS = 4
IO_SPACE = 1 << 32
_OWN = -1
"""The bridge itself, among those that hold one of its pins."""
_WINDOWS = (
    "command", "io_base", "io_limit", "memory_base", "memory_limit", "prefetch_base", "prefetch_limit",
    "prefetch_base_upper", "prefetch_limit_upper",
)  # fmt: skip


@runtime_checkable
class OnBus(Protocol):
    """A ``DeviceHost`` that is a place on a bus."""

    @property
    def bus(self) -> PCIBus:
        """The bus."""

    @property
    def devfn(self) -> int:
        """The place."""


class HasBus(PCIDevice):
    """A function on a bus, with another bus behind it. A model makes the latter."""

    secondary: PCIBus
    """The bus behind it."""
    _place: OnBus

    @property
    def bus(self) -> PCIBus:
        """The bus that it is on."""
        return self._place.bus

    @property
    def devfn(self) -> int:
        """The place there."""
        return self._place.devfn

    def realize(self) -> None:
        """Hang the secondary bus on the primary one."""
        self.bus.children.append(self.secondary)

    def unrealize(self) -> None:
        """Take out what is behind, deepest first, then the bus."""
        for devfn in list(self.secondary.devices):
            self.secondary.detach(devfn)
        self.bus.children.remove(self.secondary)

    def reset_enter(self) -> None:
        """Also of all that is behind."""
        super().reset_enter()
        self.secondary.reset_enter()

    def reset_hold(self) -> None:
        """Also of all that is behind."""
        self.secondary.reset_hold()
        super().reset_hold()

    def reset_exit(self) -> None:
        """Also of all that is behind."""
        super().reset_exit()
        self.secondary.reset_exit()


class PCIBridge(HasBus):
    """Base of bridges with a type 1 header. A model states its facts: identity, capabilities and their places.

    :raise ConfigError: when it is made anywhere but on a bus.
    """

    CLASS_ID = CLASS_BRIDGE_PCI
    CONVENTIONAL: ClassVar[bool] = False
    """Whether the secondary bus is a conventional one."""
    WINDOWS_OFF: ClassVar[bool] = False
    """Whether windows decode nothing after a reset."""
    FIRST_CAPABILITY: ClassVar[int] = 0
    MSI_PLACE: ClassVar[tuple[int, int] | None] = None
    MSI_LAYOUT: ClassVar[int] = CONTROL_64BIT
    MSIX_PLACE: ClassVar[tuple[int, int] | None] = None
    PROPS: Mapping[str, Prop] = {"id": Prop(str, "", "name of the bridge, and of its secondary bus")}

    def __init__(self, host: DeviceHost, **props: object) -> None:
        """:raise ConfigError: as :class:`PCIDevice`."""
        if not isinstance(host, OnBus):
            raise ConfigError("a bridge is plugged into a bus", where=type(self).__name__)
        self._place = host
        self._pins: tuple[set[int], ...] = tuple(set() for _ in range(PINS))
        self._bus_in_reset = False
        self._shown: list[tuple[MemoryRegion, AliasRegion]] = []
        super().__init__(host, **props)
        self._add_capabilities()
        self.secondary = self._make_bus(self.props["id"] or self._default_name())
        for name in _WINDOWS:
            self.config.on_write(name, self._update_windows)
        self.config.on_write("bridge_control", self._control_written)
        self._slot_interrupts = False
        if self.express is not None and self.express.spec.slot is not None:
            for name in "express.slot_control", "express.slot_status":
                self.config.on_write(name, self._slot_written)

    # -- making ------------------------------------------------------------------------------------------------------

    def _build_config(self) -> ConfigSpace:
        header = type1_header(self._identity(), conventional=self.CONVENTIONAL, windows_off=self.WINDOWS_OFF)
        config = ConfigSpace(header, self._config_size)
        for bar in self.BARS:
            assert bar.offset + bar.width <= 0x18, "a bridge has two BAR registers"
            config.add(Field(f"bar{bar.index}", bar.offset, bar.width, bar.type_bits, bar.write_mask))
        config.add(Field("cap_ptr", CAPABILITY_POINTER, 1, self.FIRST_CAPABILITY))
        return config

    def _make_msi(self) -> MsiCapability | None:
        if not self.MSI_VECTORS:
            return None
        return MsiCapability(self.config, self.MSI_VECTORS, layout=self.MSI_LAYOUT, place=self.MSI_PLACE)

    def _make_msix(self) -> MsixCapability | None:
        if self.MSIX is None:
            return None
        return MsixCapability(self.config, self.MSIX, self.host.msi, place=self.MSIX_PLACE)

    def _add_capabilities(self) -> None:
        """Those of the model, beside MSI, MSI-X and PCI Express."""

    def _default_name(self) -> str:
        return f"{self._place.bus.name}.{self._place.devfn:02x}"

    def _make_bus(self, name: str) -> PCIBus:
        above = self._place.bus
        return PCIBus(
            name,
            memory=Window(MemoryRegion(f"{name}.memory", 1 << 64)),
            io=Window(MemoryRegion(f"{name}.io", IO_SPACE)),
            system=above.system,
            clock=above.clock,
            options=replace(above.options, intx=self._below),
            trace=above.trace,
            express=not self.CONVENTIONAL,
            upstream=self,
        )

    def unrealize(self) -> None:
        """Close the windows, too."""
        super().unrealize()
        self._hide_windows()

    # -- as the secondary bus sees it --------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """The number of the secondary bus."""
        return self.config.get("secondary_bus")

    @property
    def begins_hierarchy(self) -> bool:
        """No expander."""
        return False

    @property
    def takes_ownership(self) -> bool:
        """Whether it is a PCI Express to PCI bridge."""
        return self.express is not None and self.express.type is PortType.PCIE_TO_PCI_BRIDGE

    @property
    def masters(self) -> bool:
        """Whether DMA from behind goes on."""
        return self.bus_master and not self._bus_in_reset

    def forwards(self, number: int) -> bool:
        """Whether configuration cycles to bus ``number`` go through: not without a secondary number, not in reset."""
        first = self.number
        in_range = first == number or first < number <= self.config.get("subordinate_bus")
        return bool(first) and in_range and not self._bus_in_reset

    def check_plug(self, device: PCIDevice, devfn: int) -> None:
        """Everything may be behind a bridge."""

    def populated(self) -> None:
        """Link and slot of a port show what is behind it: the function with the lowest number."""
        if self.express is not None:
            first = next(iter(self.secondary), None)
            link = first.express if first is not None else None
            self._show_link(self.express, link, occupied=first is not None)

    def _show_link(self, express: ExpressCapability, link: ExpressCapability | None, *, occupied: bool) -> None:
        if express.spec.type in (PortType.ROOT_PORT, PortType.DOWNSTREAM_PORT):
            link_below = None if link is None else link.spec.link
            express.populated(link_below, occupied=occupied, detected=self._is_below_expander)

    @property
    def _is_below_expander(self) -> bool:
        """Where its hierarchy begins at an expander. As on QEMU only there do ports detect what is in their slots:
        below the host bridge that is left to ACPI."""
        up = self.bus.upstream
        while up is not None and not up.begins_hierarchy:
            up = up.bus.upstream
        return up is not None

    # -- interrupts --------------------------------------------------------------------------------------------------

    def _below(self, devfn: int, pin: int, level: bool) -> None:
        """A pin behind the bridge changed: it is one of the bridge's, by the slot."""
        self._hold(self.turned(devfn, pin), devfn << 3 | pin, level)

    def turned(self, devfn: int, pin: int) -> int:
        """Which pin (1..4) of the bridge ``pin`` of ``devfn`` on the secondary bus is."""
        return (pin - 1 + (devfn >> 3)) % PINS + 1

    def _slot_written(self) -> None:
        assert self.express is not None, "it has a slot"
        was, self._slot_interrupts = self._slot_interrupts, self.express.slot_interrupt
        if self._slot_interrupts and not was:
            self.raise_irq()
        elif was and not self._slot_interrupts:
            self.lower_irq()

    def _set_pin(self, level: bool) -> None:
        if self.INTERRUPT_PIN:
            self._hold(self.INTERRUPT_PIN, _OWN, level)

    def _hold(self, pin: int, who: int, level: bool) -> None:
        holders = self._pins[pin - 1]
        was = bool(holders)
        (holders.add if level else holders.discard)(who)
        if bool(holders) != was:
            self.bus.options.intx(self.devfn, pin, level)

    # -- windows -----------------------------------------------------------------------------------------------------

    def windows(self) -> Iterable[tuple[str, Window | None, MemoryRegion, Range]]:
        """(name, the primary bus's window, what is shown there, bus addresses) of each that decodes now."""
        get, command, io = self.config.get, self.config.get("command"), self.secondary.io
        if command & COMMAND_MEMORY:
            below = self.secondary.memory.region
            memory = memory_window(get("memory_base"), get("memory_limit"))
            uppers = get("prefetch_base_upper"), get("prefetch_limit_upper")
            prefetch = memory_window(get("prefetch_base"), get("prefetch_limit"), *uppers)
            for name, where in ("memory", memory), ("prefetch", prefetch):
                if where is not None:
                    yield name, self.bus.memory, below, where
        ports = io_window(get("io_base"), get("io_limit")) if command & COMMAND_IO else None
        if ports is not None and io is not None:
            yield "io", self.bus.io, io.region, ports

    def _update_windows(self) -> None:
        with transaction():
            self._hide_windows()
            for name, window, below, where in self.windows():
                if window is not None:
                    self._show(f"{self.secondary.name}.{name}", window, below, where)

    def _hide_windows(self) -> None:
        for region, alias in self._shown:
            region.del_subregion(alias)
        self._shown.clear()

    def _show(self, name: str, window: Window, below: MemoryRegion, where: Range) -> None:
        seen = Range(window.base, window.base + window.region.size - 1).intersect(where)
        if seen is not None:
            alias = AliasRegion(name, below, seen.start, seen.size)
            window.region.add_subregion(seen.start - window.base, alias, priority=1)
            self._shown.append((window.region, alias))

    # -- control and reset -------------------------------------------------------------------------------------------

    def _control_written(self) -> None:
        was, self._bus_in_reset = self._bus_in_reset, self._asserts_reset
        if self._bus_in_reset and not was:
            self.secondary.reset()
        self.secondary.update_forwarding()

    @property
    def _asserts_reset(self) -> bool:
        return bool(self.config.get("bridge_control") & CONTROL_BUS_RESET)

    def _bind_dma(self) -> None:
        super()._bind_dma()
        self.secondary.update_forwarding()

    def reset_hold(self) -> None:
        """The guest has to number buses and open windows anew."""
        super().reset_hold()
        self.populated()
        self._settle()

    def import_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`PCIDevice`."""
        super().import_state(state)
        self._settle()

    def _settle(self) -> None:
        """Everything follows from the registers, which have changed by themselves."""
        self._bus_in_reset = self._asserts_reset
        self._slot_interrupts = self.express is not None and self.express.slot_interrupt
        self._update_windows()
        self.secondary.update_forwarding()
