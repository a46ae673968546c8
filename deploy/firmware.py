"""What a guest's firmware does for a scenario: find the devices behind each host bridge, number buses, place BARs,
switch on decoding and bus mastering; and which driver a device has afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from deploy import dma_drivers
from deploy.scenario import Scenario
from deploy.scenario_machine import Q35, ROOT_BUS, Device, Pseries
from deploy.system import DmaDriver, GuestCpu
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.guest_drivers.pc import PortConfig, enable_ecam, mmio_window
from vfio_model.guest_drivers.pci import MmioWindow, PciFunction, bring_up
from vfio_model.guest_drivers.pci_bridges import SECONDARY_BUS, BusTree
from vfio_model.guest_drivers.svm_kernel import SvmKernel
from vfio_model.iommu.spapr import regs
from vfio_model.machine.q35 import regs as q35_regs
from vfio_model.pci.address import PCIAddress

ToCpu = Callable[[int], int]
"""Where the CPU sees a bus address."""
_EXPANDER = "pxb-pcie"


class _PseriesFirmware:
    """One bus for each host bridge, found by its index."""

    def __init__(self, machine: Pseries) -> None:
        self._machine = machine
        self._windows = {phb.index: MmioWindow.pseries(phb.index) for phb in machine.bridges}
        self._functions: dict[tuple[int, int], PciFunction] = {}

    def bring_up(self, cpu: GuestCpu) -> None:
        for index, window in self._windows.items():
            for function in bring_up(cpu, regs.phb_buid(index), window):
                self._functions[index, function.devfn] = function

    def find(self, device: Device) -> tuple[PciFunction, ToCpu] | None:
        index = self._machine.phb_on(device.bus).index
        function = self._functions.get((index, PCIAddress.parse(device.addr).devfn))
        return None if function is None else (function, self._windows[index].to_cpu)


class _PcFirmware:
    """A tree of buses, found by the numbers that they were given."""

    def __init__(self, machine: Q35) -> None:
        self._machine = machine
        self._numbers: dict[str, int] = {}
        self._functions: dict[tuple[int, int], PciFunction] = {}

    def bring_up(self, cpu: GuestCpu) -> None:
        bridges = self._machine.bridges
        expanders = {each.id: int(each.props.get("bus_nr", 0)) for each in bridges if each.driver == _EXPANDER}
        found = BusTree(lambda number: PortConfig(cpu, number), mmio_window()).bring_up([0, *expanders.values()])
        self._functions = {(function.bus, function.devfn): function for function in found}
        self._numbers = {"": 0, ROOT_BUS: 0, **expanders}
        for bridge in bridges:
            if bridge.id not in self._numbers:
                config = PortConfig(cpu, self._numbers[bridge.bus])
                self._numbers[bridge.id] = config.read(PCIAddress.parse(bridge.addr).devfn, SECONDARY_BUS, 1)

    def requester(self, bus: str, devfn: int) -> int:
        """The requester ID of ``devfn`` on ``bus``: conventional buses do not say who asks, the bridge does."""
        found = self._numbers[bus] << 8 | devfn
        while bus not in ("", ROOT_BUS):
            bridge = next(each for each in self._machine.bridges if each.id == bus)
            if bridge.driver == "pcie-pci-bridge":
                found = self._numbers[bus] << 8
            elif bridge.driver in ("pci-bridge", "i82801b11-bridge"):
                found = self._numbers[bridge.bus] << 8 | PCIAddress.parse(bridge.addr).devfn
            bus = bridge.bus
        return found

    def find(self, device: Device) -> tuple[PciFunction, ToCpu] | None:
        function = self._functions.get((self._numbers[device.bus], PCIAddress.parse(device.addr).devfn))
        return None if function is None else (function, mmio_window().to_cpu)


class DrivenGuest:
    """The part of a system that is the guest's firmware and drivers; :attr:`cpu` is the rest's to set."""

    cpu: GuestCpu

    def __init__(self, scenario: Scenario) -> None:
        machine = self._machine = scenario.machine
        self._devices = {device.id: device for device in scenario.devices}
        self._firmware = _PseriesFirmware(machine) if isinstance(machine, Pseries) else _PcFirmware(machine)
        self._drivers: dict[str, DmaDriver] = {}
        self._kernel: tuple[str, SvmKernel] | None = None
        """The device that it drives, and the kernel."""

    def bring_up(self) -> None:
        """What firmware does: find the devices, place their BARs, switch on decoding and bus mastering."""
        self._firmware.bring_up(self.cpu)

    def driver(self, device: str) -> DmaDriver:
        """See :class:`~deploy.system.System`. :raise ConfigError: it is not on the bus, here and below."""
        if device not in self._drivers:
            config = self._devices[device]
            function, to_cpu = self._function(config)
            self._drivers[device] = dma_drivers.bind(self.cpu, device, config.model, function, to_cpu)
        return self._drivers[device]

    def burst(self, device: str) -> DmaBurstDriver:
        """See :class:`~deploy.system.System`."""
        config = self._devices[device]
        if config.model != "dma-burst":
            raise ConfigError(f"{device}: a {config.model} does not write without pause", hint="use a dma-burst")
        function, to_cpu = self._function(config)
        return DmaBurstDriver(self.cpu, to_cpu(function.bars[0].address))

    def requester(self, device: str) -> int:
        """See :class:`~deploy.system.System`."""
        config = self._devices[device]
        self._function(config)
        if not isinstance(self._firmware, _PcFirmware):
            raise ConfigError(f"{device}: only a PC's requests have an ID")
        return self._firmware.requester(config.bus, PCIAddress.parse(config.addr).devfn)

    def svm(self, device: str) -> SvmKernel:
        """The kernel of the guest, which drives ``device``, an svm, and nothing else; booted at first use.

        :raise ConfigError: it is none, or not on the root bus of a q35; another one is driven.
        """
        if self._kernel is None:
            self._kernel = device, self._boot(self._devices[device])
        driven, kernel = self._kernel
        if driven != device:
            raise ConfigError(f"{device}: the guest drives {driven}, and no other svm")
        return kernel

    def _boot(self, device: Device) -> SvmKernel:
        if device.model != "svm":
            raise ConfigError(f"{device.id}: a {device.model} shares no address space", hint="use an svm")
        function, to_cpu = self._function(device)
        if not isinstance(self._machine, Q35) or function.bus:
            raise ConfigError(f"{device.id}: its driver looks for it on {ROOT_BUS} of a q35")
        low = min(int(self._machine.ram), q35_regs.LOW_RAM_SPLIT)
        return SvmKernel.boot(self.cpu, enable_ecam(self.cpu), function.devfn, to_cpu(function.bars[0].address), low)

    def _function(self, device: Device) -> tuple[PciFunction, ToCpu]:
        found = self._firmware.find(device)
        if found is None:
            raise ConfigError(f"{device.id}: nothing answers on the bus at {device.addr}")
        return found
