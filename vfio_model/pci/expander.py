"""An expander: a function on the host bridge's bus by which a machine has another root bus (QEMU's ``pxb-pcie``).

The new bus shares the memory and I/O space of the host bridge's, so nothing has to be forwarded; its number is fixed
when it is made. Its hierarchy may bypass an IOMMU while the others do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vfio_model.errors import ConfigError
from vfio_model.pci.bridge import PINS, HasBus, OnBus, PCIBridge
from vfio_model.pci.bus import PCIBus
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice, Prop
from vfio_model.pci.type1 import STATUS_66MHZ_FAST_BACK
from vfio_model.vmstate.fields import VMStateDescription

LAST_BUS = 255


class PxbPcie(HasBus):
    """QEMU's PCI Express expander. :attr:`secondary` is the new root bus."""

    VENDOR_ID, DEVICE_ID = 0x1B36, 0x000B
    CLASS_ID = 0x0600
    PROPS: Mapping[str, Prop] = {
        "id": Prop(str, "", "name of the expander, and of its bus"),
        "bus_nr": Prop(int, 0, "number of the bus, 0 to 255"),
        "bypass_iommu": Prop(bool, False, "whether requests from it go past the IOMMU"),
    }
    VMSTATE = VMStateDescription("pxb-pcie", 1, (PARENT,))
    begins_hierarchy = True
    takes_ownership = False
    masters = True

    def __init__(self, host: DeviceHost, **props: object) -> None:
        """:raise ConfigError: as :class:`PCIDevice`; when ``host`` is no place on a host bridge's bus, or the bus
        number is taken."""
        super().__init__(host, **props)
        if not isinstance(host, OnBus) or not host.bus.is_root:
            raise ConfigError("PXB devices can be attached only to root bus", where=type(self).__name__)
        self._place = host
        self.config.set("status", STATUS_66MHZ_FAST_BACK)
        number = self.props["bus_nr"]
        if not 0 <= number <= LAST_BUS:
            raise ConfigError(f"bus_nr is {number}, not 0 to {LAST_BUS}", where=type(self).__name__)
        if any(number == other.number for other in self.bus.children):
            raise ConfigError(f"Bus {number} is already in use", where=type(self).__name__)
        above = self.bus
        self.secondary = PCIBus(
            self.props["id"] or f"{above.name}.{self.devfn:02x}",
            memory=above.memory,
            io=above.io,
            system=above.system,
            clock=above.clock,
            options=replace(above.options, intx=self._below),
            trace=above.trace,
            express=True,
            upstream=self,
            bypass_iommu=self.props["bypass_iommu"],
        )

    # -- as the new bus sees it --------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """The new bus's number."""
        return int(self.props["bus_nr"])

    def forwards(self, number: int) -> bool:
        """From the bus to the last that a bridge on it has below."""
        bridges = (device for device in self.secondary if isinstance(device, PCIBridge))
        last = max((device.config.get("subordinate_bus") for device in bridges), default=0)
        return self.number <= number <= max(last, self.number)

    def check_plug(self, device: PCIDevice, devfn: int) -> None:
        """:raise ConfigError: when ``device`` is no bridge."""
        if not isinstance(device, PCIBridge):
            raise ConfigError("PCI: Only PCI/PCIe bridges can be plugged into pxb-pcie", where=self.secondary.name)

    def populated(self) -> None:
        """Nothing to show."""

    def _below(self, devfn: int, pin: int, level: bool) -> None:
        """A pin on the new bus is turned by the slot there alone: the host bridge's turn by the expander's slot is
        taken back."""
        turned = (pin - 1 + (devfn >> 3) - (self.devfn >> 3)) % PINS + 1
        self.bus.options.intx(self.devfn, turned, level)
