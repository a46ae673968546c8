"""What guestd has to know of the type of its machine, and nothing of it elsewhere: a :class:`Board` for each.

Of the machine model itself others know what :class:`~vfio_model.machine.base.Machine` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from guestd.config import ANONYMOUS, DeviceConfig
from guestd.device_options import driver_of
from guestd.device_space import DeviceSpace
from guestd.machines.qom import QomTree
from guestd.machines.walk import Walk
from guestd.places import Buses, Occupant, Slots
from vfio_model.clock import VirtualClock
from vfio_model.errors import ConfigError
from vfio_model.machine.base import Machine
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.bus import PCIBus
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import Trace


class Paravirtual(Protocol):
    """The calls of a guest that knows what it runs on."""

    def hcall(self, nr: int, *args: int) -> tuple[int, list[int]]:
        """The signed return code and the output registers."""

    def rtas(self, token: int, args: Sequence[int], nret: int) -> list[int]:
        """The return cells that are written, the status first."""

    def rtas_in_memory(self, token: int, args: tuple[int, int], rets: tuple[int, int]) -> int:
        """The same as firmware calls it; a hypercall's return."""

    def translate(self, liobn: int, ioba: int) -> tuple[int, int, int]:
        """(page address, permission bits, address mask)."""


@dataclass(frozen=True)
class Parts:
    """What a machine is put together from; ``idle`` is the loop's hook for a device's idle work."""

    ram: RAMBlock
    clock: VirtualClock
    idle: Callable[[Callable[[], bool]], None]
    trace: Trace


InfoLines = Callable[[], list[str]]


Plugged = Mapping[str, tuple[DeviceConfig, PCIDevice]]
"""The guest's devices by name."""


@dataclass(frozen=True)
class Bridge:
    """A device of the main bus with a bus of PCI below it, as ``info qtree`` shows it."""

    driver: str
    id: str
    lines: list[str]
    bus: str


class Board(ABC):
    """One type of machine, built. Devices' configurations name its buses as QEMU does."""

    ARCH: ClassVar[str]
    """``query-target``."""
    IRQ_INPUTS: ClassVar[str]
    """QOM path of the object whose inputs are the machine's interrupt lines."""

    IRQ_LINES: ClassVar[int | None] = None
    """How many inputs it has; None: as many as there are interrupts."""
    qom_types: ClassVar[Mapping[str, tuple[str, bool]]]
    """Types of objects that only this machine has; by name: (parent, abstract)."""

    machine: Machine
    calls: Paravirtual | None = None
    """None: its guests know nothing but hardware."""
    kvm: bool = False
    """In-kernel acceleration."""

    # -- buses -------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def buses(self) -> Mapping[str, PCIBus]:
        """Every bus by its name, the first one first."""

    def bus_type(self, name: str) -> str:
        """The type of the bus called so in QOM."""
        return self.qom().buses[name].type

    @property
    def bridges(self) -> Mapping[str, PCIDevice]:
        """Bridges between PCI buses, by id."""
        return {}

    def bus_of(self, device: DeviceConfig) -> PCIBus:
        """The bus that ``device`` is or would be plugged into; the first one for an empty name.

        :raise ConfigError: when there is no bus of that name.
        """
        buses = self.buses
        name = device.bus or next(iter(buses))
        if name not in buses:
            raise ConfigError(f"Bus '{name}' not found", hint=f"there is {', '.join(buses)}")
        return buses[name]

    @abstractmethod
    def bus_at(self, address: PCIAddress) -> PCIBus:
        """The bus that ``address`` names now.

        :raise ConfigError: when there is none.
        """

    @abstractmethod
    def address_of(self, device: DeviceConfig) -> PCIAddress:
        """Where ``device`` is on the machine's buses now."""

    @abstractmethod
    def places(self, devices: Plugged) -> Buses:
        """The places on the buses now; ``devices`` are those that have names."""

    @abstractmethod
    def check_plug(self, given: Mapping[str, object], devices: Plugged) -> None:
        """:raise ConfigError: ``given`` are the options of a device that comes with the machine or not at all."""

    @abstractmethod
    def check_unplug(self, device: DeviceConfig) -> None:
        """:raise ConfigError: ``device`` has to stay, with QEMU's message."""

    @abstractmethod
    def check_own(self, name: str) -> None:
        """:raise ConfigError: ``name`` is the id or path of a device that the machine cannot be without."""

    @abstractmethod
    def on_guest_reset(self, reset: Callable[[], None]) -> None:
        """Let a guest that resets the machine ``reset()`` it."""

    @abstractmethod
    def root_buses(self) -> list[PCIBus]:
        """Those behind no bridge, as ``query-pci`` lists them."""

    @abstractmethod
    def functions(self) -> Iterator[tuple[int, PCIDevice]]:
        """Every function behind a number that is the same in every machine of this configuration."""

    # -- address spaces ----------------------------------------------------------------------------------------------

    @abstractmethod
    def device_space(self, device: DeviceConfig) -> DeviceSpace:
        """Where the DMA of ``device``, plugged or about to be, is translated."""

    @abstractmethod
    def address_spaces(self) -> list[AddressSpace]:
        """Every one of the machine, memory first."""

    @abstractmethod
    def explain(self, walk: Walk, device: DeviceConfig, iova: int) -> None:
        """The steps of the translation of ``iova`` for a device that is a bus master."""

    # -- what monitors show ------------------------------------------------------------------------------------------

    @abstractmethod
    def windows(self) -> list[dict[str, int]]:
        """Open DMA windows; ``start`` inclusive, numbers of pages, the shift of a page."""

    @abstractmethod
    def device_tree(self) -> Mapping[str, Mapping[str, object]]:
        """What a guest is told of DMA, where it is told by a tree."""

    @abstractmethod
    def info(self) -> dict[str, tuple[InfoLines, str]]:
        """Subjects of the monitor's ``info`` that are this machine's own, and what they show."""

    @abstractmethod
    def qtree(self) -> list[Bridge]:
        """Its host bridges."""

    @abstractmethod
    def qom(self) -> QomTree:
        """Its own objects, made anew from what there is."""

    # -- ports -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def port_read(self, port: int, size: int) -> int:
        """A load from an I/O port."""

    @abstractmethod
    def port_write(self, port: int, size: int, value: int) -> None:
        """A store to one."""


def shown_id(name: str) -> str:
    """The id of the device called ``name``; empty when it was given none."""
    return "" if name.startswith(ANONYMOUS) else name


def slots_of(name: str, bus: PCIBus, devices: Plugged) -> Slots:
    """The places of ``bus``."""
    known = {id(device): (config, name) for name, (config, device) in devices.items()}
    found: dict[int, Occupant] = {}
    for devfn, device in bus.devices.items():
        config, called = known.get(id(device), (None, ""))
        driver = driver_of(config) if config is not None else type(device).__name__
        found[devfn] = Occupant(driver, shown_id(called), device.config.multifunction)
    return Slots(name, found)
