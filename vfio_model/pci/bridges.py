"""The models of bridges: what QEMU calls them, with its identities, its capabilities and their places.

====================== =========================== =================================================================
``pcie-root-port``     :class:`PcieRootPort`       a PCI Express slot on the root complex
``ioh3420``            :class:`Ioh3420`            the same, Intel's
``x3130-upstream``     :class:`X3130Upstream`      a switch: its upper port, on a root port
``xio3130-downstream`` :class:`Xio3130Downstream`  a switch: a lower port, behind the upper one
``pcie-pci-bridge``    :class:`PciePciBridge`      a conventional bus whose requests bear the bus's name
``pci-bridge``         :class:`PciBridge`          a conventional bus whose requests bear the bridge's name
``i82801b11-bridge``   :class:`I82801b11Bridge`    the same: ICH9's DMI to PCI bridge
``pxb-pcie``           :class:`PxbPcie`            another root bus (:mod:`vfio_model.pci.expander`)
====================== =========================== =================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from vfio_model.errors import ConfigError
from vfio_model.memory.types import MemTxResult
from vfio_model.pci import port_caps
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.bridge import HasBus, PCIBridge
from vfio_model.pci.device import MSIX_STATE, PARENT, Prop
from vfio_model.pci.expander import PxbPcie
from vfio_model.pci.express import ExpressCapability, ExpressSpec, PortType
from vfio_model.pci.msi import CONTROL_64BIT, CONTROL_MASKS
from vfio_model.pci.msix import MsixSpec
from vfio_model.pci.shpc import SHPC_BAR_SIZE, add_shpc, shpc_read, shpc_write
from vfio_model.vmstate.fields import VMStateDescription

VENDOR_REDHAT, VENDOR_INTEL, VENDOR_TI = 0x1B36, 0x8086, 0x104C
SLOT_NUMBERS, BYTE = 1 << 13, 256
SPEEDS, WIDTHS = ("2_5", "5", "8", "16", "32", "64"), ("1", "2", "4", "8", "12", "16", "32")
AER_MESSAGE_SHIFT = 27
"""In the root error status: which message reports errors."""


class SlotPort(PCIBridge):
    """A port with a slot behind it: the pair of chassis and slot numbers is the machine's only one."""

    EXPRESS = ExpressSpec(PortType.ROOT_PORT, ari_forwarding=True, slot=0)
    PROPS: Mapping[str, Prop] = {
        **PCIBridge.PROPS,
        "port": Prop(int, 0, "port number, 0 to 255"),
        "chassis": Prop(int, 0, "number of the chassis, 0 to 255"),
        "slot": Prop(int, 0, "number of the slot in the chassis, 0 to 8191"),
        "hotplug": Prop(bool, True, "whether the slot says that it can hot-plug"),
        "power_controller_present": Prop(bool, True, "whether the slot has a power controller"),
    }

    def _make_express(self) -> ExpressCapability | None:
        for name, past in ("port", BYTE), ("chassis", BYTE), ("slot", SLOT_NUMBERS):
            if not 0 <= self.props[name] < past:
                what = f"{name} is {self.props[name]}, not 0 to {past - 1}"
                raise ConfigError(what, where=type(self).__name__)
        assert self.EXPRESS is not None, "a port is PCI Express"
        return ExpressCapability(self.config, self._express_spec(self.EXPRESS), self.reset)

    def _express_spec(self, spec: ExpressSpec) -> ExpressSpec:
        """``spec`` with what this one was given."""
        slot = replace(spec, port=self.props["port"], slot=self.props["slot"])
        return replace(slot, hotplug=self.props["hotplug"], power_controller=self.props["power_controller_present"])

    def realize(self) -> None:
        """:raise ConfigError: when the slot is taken."""
        top = self.bus
        while top.upstream is not None:
            top = top.upstream.bus
        for bus in top.walk():
            for other in bus:
                if isinstance(other, SlotPort) and other is not self and other.chassis_slot == self.chassis_slot:
                    raise ConfigError(
                        "Can't add chassis slot, error -16", hint=f"chassis and slot {self.chassis_slot} are taken"
                    )
        super().realize()

    @property
    def chassis_slot(self) -> tuple[int, int]:
        """Chassis and slot numbers."""
        return self.props["chassis"], self.props["slot"]


class PcieRootPort(SlotPort):
    """QEMU's generic root port: 16 GT/s, 32 lanes."""

    VENDOR_ID, DEVICE_ID = VENDOR_REDHAT, 0x000C
    INTERRUPT_PIN = 1
    WINDOWS_OFF = True
    BARS = (BarSpec(0, 0x1000),)
    MSIX = MsixSpec(1, 0, 0, 0x800)
    MSIX_PLACE = (0x48, 0x40)
    FIRST_CAPABILITY = 0x54
    EXPRESS = ExpressSpec(
        PortType.ROOT_PORT, ari_forwarding=True, speed=4, width=32, reports_link=True, slot=0, place=(0x54, 0x48)
    )
    PROPS: Mapping[str, Prop] = {
        **SlotPort.PROPS,
        "x-speed": Prop(str, "16", f"of the link in GT/s: {', '.join(SPEEDS)}"),
        "x-width": Prop(str, "32", f"of the link in lanes: {', '.join(WIDTHS)}"),
        **port_caps.RESERVE_PROPS,
    }
    VMSTATE = VMStateDescription("pcie-root-port", 1, (PARENT, MSIX_STATE))

    def _express_spec(self, spec: ExpressSpec) -> ExpressSpec:
        speed, width = self.props["x-speed"], self.props["x-width"]
        for name, known in ("x-speed", SPEEDS), ("x-width", WIDTHS):
            if self.props[name] not in known:
                raise ConfigError(f"Parameter '{name}' does not accept value '{self.props[name]}'")
        link = replace(spec, speed=SPEEDS.index(speed) + 1, width=int(width))
        return super()._express_spec(replace(link, reports_link=(speed, width) != (SPEEDS[0], WIDTHS[0])))

    def _add_capabilities(self) -> None:
        port_caps.add_reserve(self.config, self.props, self.FIRST_CAPABILITY)
        port_caps.add_subsystem(self.config, VENDOR_REDHAT, 0, (0x40, 0))
        port_caps.add_aer(self.config, several_headers=True, root=True)
        port_caps.add_acs(self.config)


class Ioh3420(SlotPort):
    """The root port of Intel's 5520 chipset."""

    VENDOR_ID, DEVICE_ID, REVISION = VENDOR_INTEL, 0x3420, 2
    INTERRUPT_PIN = 1
    WINDOWS_OFF = True
    MSI_VECTORS, MSI_LAYOUT, MSI_PLACE = 2, CONTROL_MASKS, (0x60, 0x40)
    FIRST_CAPABILITY = 0x90
    EXPRESS = ExpressSpec(PortType.ROOT_PORT, ari_forwarding=True, slot=0, place=(0x90, 0x60))
    VMSTATE = VMStateDescription("ioh-3240-express-root-port", 1, (PARENT,))

    def _add_capabilities(self) -> None:
        port_caps.add_subsystem(self.config, VENDOR_INTEL, 0, (0x40, 0))
        port_caps.add_aer(self.config, several_headers=True, root=True)
        self.config.on_write("msi.control", self._choose_message)

    def _choose_message(self) -> None:
        """Errors are reported by the second message, if it was given."""
        assert self.msi is not None, "it has messages"
        chosen = 1 if self.msi.enabled and self.msi.allocated > 1 else 0
        status = self.config.get("aer.root_status") & (1 << AER_MESSAGE_SHIFT) - 1
        self.config.set("aer.root_status", status | chosen << AER_MESSAGE_SHIFT)


class X3130Upstream(PCIBridge):
    """The upstream port of TI's XIO3130 switch; its secondary bus is the one inside, for downstream ports."""

    VENDOR_ID, DEVICE_ID, REVISION = VENDOR_TI, 0x8232, 2
    MSI_VECTORS, MSI_PLACE = 1, (0x70, 0)
    FIRST_CAPABILITY = 0x90
    EXPRESS = ExpressSpec(PortType.UPSTREAM_PORT, flr=True, place=(0x90, 0x80))
    VMSTATE = VMStateDescription("xio3130-express-upstream-port", 1, (PARENT,))

    def _add_capabilities(self) -> None:
        port_caps.add_subsystem(self.config, 0, 0, (0x80, 0x70))
        port_caps.add_aer(self.config, several_headers=True)


class Xio3130Downstream(SlotPort):
    """A downstream port of that switch."""

    VENDOR_ID, DEVICE_ID, REVISION = VENDOR_TI, 0x8233, 1
    MSI_VECTORS, MSI_PLACE = 1, (0x70, 0)
    FIRST_CAPABILITY = 0x90
    EXPRESS = ExpressSpec(
        PortType.DOWNSTREAM_PORT, flr=True, ari_forwarding=True, speed=0, width=0, slot=0, place=(0x90, 0x80)
    )
    VMSTATE = VMStateDescription("xio3130-express-downstream-port", 1, (PARENT,))

    def _add_capabilities(self) -> None:
        port_caps.add_subsystem(self.config, 0, 0, (0x80, 0x70))
        port_caps.add_aer(self.config, several_headers=True)


class ConventionalBridge(PCIBridge):
    """A bridge with a hot-plug controller for its conventional bus."""

    VENDOR_ID = VENDOR_REDHAT
    INTERRUPT_PIN = 1
    CONVENTIONAL = True
    BARS = (BarSpec(0, SHPC_BAR_SIZE, BarType.MEM64),)
    MSI_VECTORS, MSI_LAYOUT = 1, CONTROL_64BIT | CONTROL_MASKS
    SHPC_PLACE: ClassVar[tuple[int, int]] = (0x40, 0)

    def _add_capabilities(self) -> None:
        add_shpc(self.config, self.SHPC_PLACE)

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """The hot-plug controller."""
        return shpc_read(offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """The hot-plug controller."""
        return shpc_write(offset, size, value)


class PciePciBridge(ConventionalBridge):
    """PCI Express to PCI."""

    DEVICE_ID = 0x000E
    MSI_PLACE = (0x8C, 0x84)
    FIRST_CAPABILITY = 0x8C
    EXPRESS = ExpressSpec(PortType.PCIE_TO_PCI_BRIDGE, ari_forwarding=True, place=(0x48, 0x40))
    VMSTATE = VMStateDescription("pcie-pci-bridge", 1, (PARENT,))

    def _add_capabilities(self) -> None:
        super()._add_capabilities()
        port_caps.add_power_management(self.config, (0x84, 0x48))
        port_caps.add_aer(self.config, several_headers=False)


class PciBridge(ConventionalBridge):
    """PCI to PCI."""

    DEVICE_ID = 0x0001
    MSI_PLACE = (0x4C, 0x48)
    FIRST_CAPABILITY = 0x4C
    PROPS: Mapping[str, Prop] = {
        **PCIBridge.PROPS,
        "chassis_nr": Prop(int, 0, "number of the chassis, 1 to 255"),
        **port_caps.RESERVE_PROPS,
    }
    VMSTATE = VMStateDescription("pci_bridge", 1, (PARENT,))

    def _add_capabilities(self) -> None:
        super()._add_capabilities()
        chassis = self.props["chassis_nr"]
        if not 0 < chassis < BYTE:
            raise ConfigError(
                "Bridge chassis not specified. Each bridge is required to be assigned a unique chassis id > 0.",
                hint="give it chassis_nr=1 to 255",
            )
        port_caps.add_slot_number(self.config, chassis, (0x48, 0x40))
        port_caps.add_reserve(self.config, self.props, self.FIRST_CAPABILITY)


class I82801b11Bridge(PCIBridge):
    """DMI to PCI."""

    VENDOR_ID, DEVICE_ID, REVISION, CLASS_PROG = VENDOR_INTEL, 0x244E, 0x92, 1
    CONVENTIONAL = True
    FIRST_CAPABILITY = 0x50
    VMSTATE = VMStateDescription("i82801b11_bridge", 1, (PARENT,))

    def _add_capabilities(self) -> None:
        port_caps.add_subsystem(self.config, 0, 0, (0x50, 0))


BRIDGES: Mapping[str, type[HasBus]] = {
    "pcie-root-port": PcieRootPort,
    "ioh3420": Ioh3420,
    "x3130-upstream": X3130Upstream,
    "xio3130-downstream": Xio3130Downstream,
    "pcie-pci-bridge": PciePciBridge,
    "pci-bridge": PciBridge,
    "i82801b11-bridge": I82801b11Bridge,
    "pxb-pcie": PxbPcie,
}
"""Every model, by QEMU's name."""
