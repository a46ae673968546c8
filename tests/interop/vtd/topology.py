"""Where edu and iommu-testdev are: beside each other on bus 0, or behind ports and bridges.

A function behind a bridge to conventional PCI asks as the bridge's secondary bus, device 0 (PCI Express to
PCI/PCI-X Bridge specification, "Assignment of Requester ID and Tag by the Bridge").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.interop.vtd.places import CONTEXTS, CONTEXTS_BELOW, EDU_BAR, EDU_SLOT, PAGE, TESTDEV_BAR, TESTDEV_SLOT

_LETTER = {1: "b", 2: "w", 4: "l"}
_MIB = 1 << 20
PORT_SLOT, BRIDGE_SLOT, EXPANDER_SLOT, EXPANDER_BUS = 4, 5, 6, 0x40


@dataclass(frozen=True)
class Place:
    """A function: where it is in configuration space, and the source ID of its requests."""

    bus: int
    slot: int
    sid: int
    bar: int


@dataclass(frozen=True)
class Bridge:
    """A bridge at ``bus``:``slot``.0 in front of bus ``below``, and the BAR behind it."""

    bus: int
    slot: int
    below: int
    bar: int


def config(bus: int, slot: int, offset: int, size: int, value: int) -> Iterator[str]:
    """A write of configuration space."""
    yield f"outl 0xcf8 {1 << 31 | bus << 16 | slot << 11 | offset & 0xFC:#x}"
    yield f"out{_LETTER[size]} {0xCFC + (offset & 3):#x} {value:#x}"


@dataclass(frozen=True)
class Topology:
    """``devices``: QEMU's options; ``bridges``: from the top."""

    devices: tuple[str, ...]
    edu: Place
    testdev: Place
    bridges: tuple[Bridge, ...] = ()

    @property
    def sids(self) -> tuple[int, int]:
        """Of edu and of iommu-testdev."""
        return self.edu.sid, self.testdev.sid

    @property
    def buses(self) -> tuple[int, ...]:
        """Those that requests come from."""
        return tuple(sorted({sid >> 8 for sid in self.sids}))

    def contexts(self, bus: int) -> int:
        """The page of context entries of ``bus``; there is another one behind it."""
        return CONTEXTS if not bus else CONTEXTS_BELOW + 2 * PAGE * self.buses.index(bus)

    def bring_up(self) -> Iterator[str]:
        """What firmware does: bus numbers, windows, BARs, decoding, bus mastering."""
        for bridge in self.bridges:
            where = bridge.bus, bridge.slot
            yield from config(*where, 0x18, 4, bridge.bus | bridge.below << 8 | bridge.below << 16)
            yield from config(*where, 0x20, 4, bridge.bar >> 16 | bridge.bar + _MIB - 1 & 0xFFF0_0000)
            yield from config(*where, 0x04, 2, 0x6)
        for place in (self.edu, self.testdev):
            yield from config(place.bus, place.slot, 0x10, 4, place.bar)
            yield from config(place.bus, place.slot, 0x04, 2, 0x6)


def _device(name: str, bus: str, slot: int) -> str:
    wide = f",dma_mask={(1 << 64) - 1:#x}" if name == "edu" else ""
    return f"{name},bus={bus},addr={slot:02x}.0{wide}"


ROOT_BUS = Topology(
    ("-device", _device("edu", "pcie.0", EDU_SLOT), "-device", _device("iommu-testdev", "pcie.0", TESTDEV_SLOT)),
    Place(0, EDU_SLOT, EDU_SLOT << 3, EDU_BAR),
    Place(0, TESTDEV_SLOT, TESTDEV_SLOT << 3, TESTDEV_BAR),
)
_PORT = ("-device", f"pcie-root-port,id=port1,bus=pcie.0,addr={PORT_SLOT:02x}.0,chassis=1")
BEHIND_BRIDGES = Topology(
    (
        *_PORT,
        *("-device", f"pcie-pci-bridge,id=bridge1,bus=pcie.0,addr={BRIDGE_SLOT:02x}.0"),
        *("-device", _device("edu", "bridge1", EDU_SLOT), "-device", _device("iommu-testdev", "port1", 0)),
    ),
    Place(2, EDU_SLOT, 0x200, EDU_BAR),
    Place(1, 0, 0x100, TESTDEV_BAR),
    (Bridge(0, PORT_SLOT, 1, TESTDEV_BAR), Bridge(0, BRIDGE_SLOT, 2, EDU_BAR)),
)
BYPASSED = Topology(
    (
        *(
            "-device",
            f"pxb-pcie,id=expander1,bus=pcie.0,addr={EXPANDER_SLOT:02x}.0,bus_nr={EXPANDER_BUS},bypass_iommu=on",
        ),
        *("-device", "pcie-root-port,id=port1,bus=expander1,addr=00.0,chassis=1"),
        *("-device", _device("edu", "pcie.0", EDU_SLOT), "-device", _device("iommu-testdev", "port1", 0)),
    ),
    Place(0, EDU_SLOT, EDU_SLOT << 3, EDU_BAR),
    Place(EXPANDER_BUS + 1, 0, EXPANDER_BUS + 1 << 8, TESTDEV_BAR),
    (Bridge(EXPANDER_BUS, 0, EXPANDER_BUS + 1, TESTDEV_BAR),),
)
"""iommu-testdev is below a root bus that the unit does not serve."""
