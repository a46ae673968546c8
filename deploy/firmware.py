"""What a guest's firmware does for a scenario: find the devices behind each host bridge, place their BARs, switch on
decoding and bus mastering; and which driver a device has afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from deploy import dma_drivers
from deploy.scenario import Device, Machine
from deploy.system import DmaDriver
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.cpu import PseriesCpu
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.guest_drivers.pci import MmioWindow, PciFunction, bring_up
from vfio_model.iommu.spapr import regs
from vfio_model.pci.address import PCIAddress


class Firmware:
    """The functions of ``machine``, once :meth:`bring_up` has run."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._windows = {phb.index: MmioWindow.pseries(phb.index) for phb in machine.bridges}
        self._functions: dict[tuple[int, int], PciFunction] = {}
        """By the bridge's index, and devfn."""

    def bring_up(self, cpu: PseriesCpu) -> None:
        """Find and start everything that is plugged now."""
        for index, window in self._windows.items():
            for function in bring_up(cpu, regs.phb_buid(index), window):
                self._functions[index, function.devfn] = function

    def driver(self, cpu: PseriesCpu, device: Device) -> DmaDriver:
        """A DMA driver of ``device``.

        :raise ConfigError: when there is none for its model, or it is not on the bus.
        """
        function, to_cpu = self._function(device)
        return dma_drivers.bind(cpu, device.id, device.model, function, to_cpu)

    def burst(self, cpu: PseriesCpu, device: Device) -> DmaBurstDriver:
        """The driver of ``device``, a dma-burst. :raise ConfigError: it is none, or it is not on the bus."""
        if device.model != "dma-burst":
            raise ConfigError(f"{device.id}: a {device.model} does not write without pause", hint="use a dma-burst")
        function, to_cpu = self._function(device)
        return DmaBurstDriver(cpu, to_cpu(function.bars[0].address))

    def _function(self, device: Device) -> tuple[PciFunction, Callable[[int], int]]:
        index = self._machine.phb_on(device.bus).index
        function = self._functions.get((index, PCIAddress.parse(device.addr).devfn))
        if function is None:
            raise ConfigError(f"{device.id}: nothing answers on the bus at {device.addr}")
        return function, self._windows[index].to_cpu
