"""The pseries machine in guestd: its host bridges, each with one bus and one DMA address space, and VIO devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Final

from guestd.config import DeviceConfig
from guestd.device_space import DeviceSpace
from guestd.machine_config import PseriesConfig
from guestd.machines import pseries_info
from guestd.machines.board import Board, Bridge, InfoLines, Parts, Plugged, slots_of
from guestd.machines.qom import QomTree
from guestd.machines.walk import Walk
from guestd.places import Buses, check_pseries
from vfio_model.errors import ConfigError
from vfio_model.machine.phb import EehPort, SpaprPhb
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.machine.vio import KINDS
from vfio_model.memory.address_space import AddressSpace
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.bus import BusOptions, PCIBus
from vfio_model.pci.device import PCIDevice

PORTS: Final = 0x10000


class PseriesBoard(Board):
    """Of ``config``. ``eeh(space)`` is the way to EEH of devices that are translated in ``space``, if there is one."""

    ARCH: ClassVar = "ppc64"
    IRQ_INPUTS: ClassVar = "/machine"
    qom_types: ClassVar = pseries_info.TYPES

    def __init__(self, config: PseriesConfig, parts: Parts, eeh: Callable[[AddressSpace], EehPort | None]) -> None:
        self.config = config
        self.kvm = config.kvm
        per_phb = {phb.index: config.dma_options(phb) for phb in config.phbs}
        self.machine: PseriesMachine = PseriesMachine(
            [parts.ram],
            PseriesOptions(phbs=0, per_phb=per_phb, multi_tce=config.multitce),
            clock=parts.clock,
            bus_options=BusOptions(idle=parts.idle),
            trace=parts.trace,
        )
        self.calls = self.machine
        for each in config.phbs:
            phb = self.machine.add_phb(each.index)
            phb.eeh = functools.partial(eeh, phb.address_space)
        for unit in config.vio:
            self.machine.vio.add(KINDS[unit.kind], unit.reg)

    # -- buses -------------------------------------------------------------------------------------------------------

    @property
    def phbs(self) -> dict[str, SpaprPhb]:
        """Every host bridge by the name of its bus."""
        return {phb.bus: self.machine.phb(phb.index) for phb in self.config.phbs}

    @property
    def buses(self) -> Mapping[str, PCIBus]:
        """See :class:`~guestd.machines.board.Board`, here and below."""
        return {name: phb.bus for name, phb in self.phbs.items()}

    def phb_of(self, device: DeviceConfig) -> SpaprPhb:
        """The bridge of ``device``."""
        return self.machine.phb(self.config.phb_on(device.bus))

    def bus_at(self, address: PCIAddress) -> PCIBus:
        """The bus of the bridge whose index is the address's domain."""
        try:
            return self.machine.phb(address.domain).bus
        except KeyError:
            raise ConfigError(f"no PCI domain {address.domain:#x}") from None

    def address_of(self, device: DeviceConfig) -> PCIAddress:
        """The domain is the bridge's index."""
        phb = self.phb_of(device)
        return PCIAddress.of(phb.bus.number, PCIAddress.parse(device.addr).devfn, phb.index)

    def places(self, devices: Plugged) -> Buses:
        """QEMU puts a device on the bus that came last."""
        slots = {name: slots_of(name, bus, devices) for name, bus in self.buses.items()}
        return Buses(slots, list(slots)[-1], check_pseries)

    def check_plug(self, given: Mapping[str, object], devices: Plugged) -> None:
        """Nobody knows their drivers."""

    def check_own(self, name: str) -> None:
        """Nobody knows their names."""

    def check_unplug(self, device: DeviceConfig) -> None:
        """Every device may go."""

    def on_guest_reset(self, reset: Callable[[], None]) -> None:
        """Its guests have no way to."""

    def root_buses(self) -> list[PCIBus]:
        """The last one first."""
        return list(self.buses.values())[::-1]

    def functions(self) -> Iterator[tuple[int, PCIDevice]]:
        """By bridge and devfn."""
        for phb in self.machine.phbs.values():
            for devfn, function in sorted(phb.bus.devices.items()):
                yield phb.index << 16 | phb.bus.number << 8 | devfn, function

    # -- address spaces ----------------------------------------------------------------------------------------------

    def device_space(self, device: DeviceConfig) -> DeviceSpace:
        """That of the bridge."""
        phb = self.phb_of(device)
        return DeviceSpace(phb.address_space.serial, phb.address_space)

    def address_spaces(self) -> list[AddressSpace]:
        """Those of bridges, then of VIO units."""
        machine = self.machine
        spaces = [machine.system, *(phb.address_space for phb in machine.phbs.values())]
        return [*spaces, *(device.dma.address_space for device in machine.vio if device.dma is not None)]

    def explain(self, walk: Walk, device: DeviceConfig, iova: int) -> None:
        """The TCE of the window that holds it."""
        pseries_info.explain(walk, self.machine.system, self.phb_of(device), iova)

    # -- what monitors show ------------------------------------------------------------------------------------------

    def windows(self) -> list[dict[str, int]]:
        """TCE tables that are enabled."""
        return pseries_info.windows(self.machine)

    def device_tree(self) -> Mapping[str, Mapping[str, object]]:
        """Bridges and VIO devices."""
        return self.machine.device_tree()

    def info(self) -> dict[str, tuple[InfoLines, str]]:
        """Windows and tables."""
        machine = self.machine
        return {
            "iommu": (lambda: pseries_info.iommu_lines(machine), "show the vIOMMU's tables and who follows them"),
            "windows": (lambda: pseries_info.window_lines(machine), "show the open DMA windows"),
        }

    def qtree(self) -> list[Bridge]:
        """One for each bus."""
        bridge = pseries_info.PHB_TYPE
        return [Bridge(bridge, "", pseries_info.properties(phb), bus) for bus, phb in self.phbs.items()]

    def qom(self) -> QomTree:
        """Host bridges with their buses."""
        return pseries_info.qom_tree(self.config, self.phbs)

    # -- ports -------------------------------------------------------------------------------------------------------

    def port_read(self, port: int, size: int) -> int:
        """There are none outside PCI buses: all ones, and 0 beyond the last port."""
        return (1 << size * 8) - 1 if port + size <= PORTS else 0

    def port_write(self, port: int, size: int, value: int) -> None:
        """Nobody listens."""
