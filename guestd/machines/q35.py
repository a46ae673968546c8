"""The q35 machine in guestd: the root bus ``pcie.0``, bridges behind it, and a VT-d unit, if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Final

from guestd.config import DeviceConfig
from guestd.device_space import DeviceSpace
from guestd.machine_config import ANONYMOUS, ROOT_BUS, BridgeConfig, Q35Config
from guestd.machines import q35_info
from guestd.machines.board import Board, Bridge, InfoLines, Parts, Plugged, shown_id, slots_of
from guestd.machines.q35_places import add_bridge, root_places
from guestd.machines.qom import QomTree
from guestd.machines.walk import Walk
from guestd.places import EXPANDER, Buses, Occupant
from guestd.remote_peer import is_answering
from vfio_model.errors import ConfigError
from vfio_model.iommu.vtd.ports import RID
from vfio_model.iommu.vtd.queue import InvalidationQueue
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.memory.address_space import AddressSpace
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.bridges import BRIDGES
from vfio_model.pci.bus import BusOptions, PCIBus
from vfio_model.pci.device import PCIDevice

IOMMU: Final = "intel-iommu"


class Q35Board(Board):
    """Of ``config``."""

    ARCH: ClassVar = "x86_64"
    IRQ_INPUTS: ClassVar = "/machine/q35/ioapic"
    IRQ_LINES: ClassVar = q35_info.IOAPIC_PINS
    qom_types: ClassVar = q35_info.TYPES

    def __init__(self, config: Q35Config, parts: Parts) -> None:
        self.config = config
        self.machine: Q35Machine = Q35Machine(
            [parts.ram],
            Q35Options(config.iommu.options() if config.iommu is not None else None, config.default_bus_bypass_iommu),
            clock=parts.clock,
            bus_options=BusOptions(idle=parts.idle, bridges_gate_dma=config.bridges_gate_dma),
            trace=parts.trace,
        )
        if self.machine.iommu is not None:
            self._completes_later(self.machine.iommu.queue, parts)
            self.machine.iommu.translation.lookup.may_switch = lambda: not is_answering()
        self._buses: dict[str, PCIBus] = {ROOT_BUS: self.machine.root_bus}
        self._bridges: dict[str, PCIDevice] = {}
        for bridge in config.bridges:
            self._add_bridge(bridge)

    @staticmethod
    def _completes_later(queue: InvalidationQueue, parts: Parts) -> None:
        """A wait descriptor that is not completed as it is fetched (``invalidation=async``) is when the loop turns."""

        def go_on() -> bool:
            queue.step()
            return False

        queue.on_pending = lambda: parts.idle(go_on)

    def _add_bridge(self, bridge: BridgeConfig) -> None:
        model = BRIDGES[bridge.driver]
        props = {name: value for name, value in bridge.props.items() if name in model.PROPS}
        bus, devfn = self._buses[bridge.bus], PCIAddress.parse(bridge.addr).devfn
        try:
            device = bus.plug(model, devfn, id=bridge.bus_below, **props)
        except ConfigError as error:
            raise ConfigError(error.what, where=f"device {bridge.id}") from error
        device.config.multifunction = bridge.multifunction
        self._bridges[bridge.id] = device
        self._buses[bridge.bus_below] = device.secondary

    # -- buses -------------------------------------------------------------------------------------------------------

    @property
    def buses(self) -> Mapping[str, PCIBus]:
        """See :class:`~guestd.machines.board.Board`, here and below."""
        return self._buses

    @property
    def bridges(self) -> Mapping[str, PCIDevice]:
        """Those of the configuration."""
        return self._bridges

    def bus_at(self, address: PCIAddress) -> PCIBus:
        """The bus that the guest calls so now; there is one domain."""
        bus = self.machine.bus_numbered(address.bus) if not address.domain else None
        if bus is None:
            raise ConfigError(f"no PCI bus {address.domain:04x}:{address.bus:02x}")
        return bus

    def address_of(self, device: DeviceConfig) -> PCIAddress:
        """With the number that the guest gave its bus."""
        return PCIAddress.of(self.bus_of(device).number, PCIAddress.parse(device.addr).devfn)

    def places(self, devices: Plugged) -> Buses:
        """As at the start: what does not say goes to the newest expander's bus, or the root bus."""
        buses = self._own_places()
        for name, bus in self.buses.items():
            own = buses.slots[name].devices
            buses.slots[name].devices = {**slots_of(name, bus, devices).devices, **own}
        return buses

    def _own_places(self) -> Buses:
        buses = root_places()
        for bridge in self.config.bridges:
            add_bridge(buses, bridge)
        return buses

    def check_plug(self, given: Mapping[str, object], devices: Plugged) -> None:
        """The IOMMU and bridges."""
        driver = str(given.get("driver"))
        if driver in (*BRIDGES, IOMMU):
            if driver != IOMMU:
                places = self.places(devices)
                places.check(places.find(given.get("bus")), 0xF7, Occupant(driver), True)
            raise ConfigError(f"Device '{driver}' does not support hotplugging")

    def check_own(self, name: str) -> None:
        """The IOMMU and bridges."""
        iommu = self.config.iommu
        if iommu is not None and _names(iommu.id, name):
            raise ConfigError(f"Device '{IOMMU}' does not support hotplugging")
        for bridge in self.config.bridges:
            if _names(bridge.id, name):
                if not self._own_places().slots[bridge.bus].hotplug:
                    raise ConfigError(f"Bus '{bridge.bus}' does not support hotplugging")
                raise ConfigError(f"Device '{bridge.driver}' does not support hotplugging")

    def check_unplug(self, device: DeviceConfig) -> None:
        """Devices of the root bus, and of an expander's, stay."""
        name = device.bus or ROOT_BUS
        if not self._own_places().slots[name].hotplug:
            raise ConfigError(f"Bus '{name}' does not support hotplugging")

    def on_guest_reset(self, reset: Callable[[], None]) -> None:
        """By the reset control register."""
        self.machine.on_reset_request = reset

    def root_buses(self) -> list[PCIBus]:
        """The newest expander's first."""
        below = [bus for bus in self._buses.values() if bus.upstream is not None and bus.upstream.begins_hierarchy]
        return [*below[::-1], self.machine.root_bus]

    def functions(self) -> Iterator[tuple[int, PCIDevice]]:
        """By the bus's place in the tree, and devfn."""
        for index, bus in enumerate(self.machine.root_bus.walk()):
            for devfn, function in sorted(bus.devices.items()):
                yield index << 16 | devfn, function

    # -- address spaces ----------------------------------------------------------------------------------------------

    def device_space(self, device: DeviceConfig) -> DeviceSpace:
        """That of the function that its requests seem to come from."""
        space = self.bus_of(device).iommu_address_space(PCIAddress.parse(device.addr).devfn)
        return DeviceSpace(space.serial, space)

    def address_spaces(self) -> list[AddressSpace]:
        """Memory, ports, and what functions see."""
        machine = self.machine
        return list(dict.fromkeys([machine.system, machine.ports.space, *q35_info.function_spaces(self.buses)]))

    def explain(self, walk: Walk, device: DeviceConfig, iova: int) -> None:
        """What the unit makes of it, without a fault."""
        who = self.bus_of(device).requester(PCIAddress.parse(device.addr).devfn)
        iommu = self.machine.iommu
        if who is None or iommu is None:
            q35_info.explain_direct(walk, self.machine.system, iova)
        else:
            q35_info.explain(walk, iommu.translation, iommu.translation.space(who.bus, who.devfn, RID), iova)

    # -- what monitors show ------------------------------------------------------------------------------------------

    def windows(self) -> list[dict[str, int]]:
        """There are none."""
        return []

    def device_tree(self) -> Mapping[str, Mapping[str, object]]:
        """There is none."""
        return {}

    def info(self) -> dict[str, tuple[InfoLines, str]]:
        """The unit and who follows it."""
        return {"iommu": (lambda: q35_info.iommu_lines(self.config, self.buses), "show the vIOMMU and who follows it")}

    def qtree(self) -> list[Bridge]:
        """Expanders, the IOMMU and the root complex."""
        expanders = [bridge for bridge in self.config.bridges[::-1] if bridge.driver == EXPANDER]
        found = [Bridge("pxb-host", "", q35_info.expander_properties(each), each.bus_below) for each in expanders]
        if self.config.iommu is not None:
            found.append(
                Bridge(IOMMU, shown_id(self.config.iommu.id), q35_info.iommu_properties(self.config.iommu), "")
            )
        return [*found, Bridge("q35-pcihost", "", q35_info.host_properties(self.config), ROOT_BUS)]

    def qom(self) -> QomTree:
        """The root complex and the I/O APIC."""
        return q35_info.qom_tree(self.config, self._bridges)

    # -- ports -------------------------------------------------------------------------------------------------------

    def port_read(self, port: int, size: int) -> int:
        """IN."""
        return self.machine.port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        self.machine.port_write(port, size, value)


def _names(own: str, name: str) -> bool:
    """Whether ``name`` is the id ``own``, or the path of what is called so."""
    if own.startswith(ANONYMOUS):
        return name == f"/machine/peripheral-anon/{own}"
    return name in (own, f"/machine/peripheral/{own}")
