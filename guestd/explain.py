"""Stage 1 of ``explain``: how the guest's vIOMMU translates an address of a device, read from the live objects.

Each step says what was looked at, what was found there, and whether the walk can go on. Nothing is computed beside
the tables: the entry shown is the one that the next DMA of an emulated device, or the next translation request of
a remote one, would use.
"""

from __future__ import annotations

from guestd.guest import Guest
from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.machine.phb import SpaprPhb
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.device import PCIDevice
from vfio_model.ranges import Gpa
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vfio.ram_span import ram_span

_PERMS = {0: "no access", 1: "r", 2: "w", 3: "rw"}


class Walk:
    """The steps so far; :attr:`ok` is False after the first that failed."""

    def __init__(self) -> None:
        self.steps: list[dict[str, object]] = []
        self.ok = True
        self.result: int | None = None
        self.perm = ""
        self.page_size = 0

    def step(self, what: str, value: str, *, ok: bool = True) -> bool:
        """Note a step; whether the walk goes on."""
        self.steps.append({"what": what, "value": value, "ok": ok})
        self.ok = self.ok and ok
        return ok

    def document(self) -> dict[str, object]:
        """As the control socket gives it."""
        return {
            "steps": self.steps,
            "result": self.result if self.ok else None,
            "perm": self.perm if self.ok else "",
            "page_size": self.page_size,
        }


def explain(guest: Guest, address: str, iova: int) -> dict[str, object]:
    """The walk for ``iova`` of the function at ``address`` (``02.0``, ``0000:00:02.0``) or with that id.

    :raise ConfigError: when there is no such function.
    """
    name, device = _find(guest, address)
    walk = Walk()
    config = guest.devices[name][0]
    gone = device.dead if isinstance(device, VFIOPCIDevice) else None
    walk.step(
        "device", f"{name}, {config.model or 'vfio-user'}, {config.attach}" + (f": {gone}" if gone else ""), ok=not gone
    )
    walk.step("bus master", "on" if device.bus_master else "off", ok=device.bus_master)
    phb = guest.phb_of(config)
    walk.step("address space", f"{phb.address_space.name} (shared by all functions of the bridge)")
    table = _window(phb, iova)
    if table is None:
        windows = ", ".join(str(each.window) for each in phb.dma.tables if each.enabled) or "none"
        walk.step("DMA window", f"none holds {iova:#x}; open: {windows}", ok=False)
    else:
        _entry(guest, walk, table, iova)
    return walk.document()


def _find(guest: Guest, address: str) -> tuple[str, PCIDevice]:
    for name, (config, device) in guest.devices.items():
        if name == address:
            return name, device
        if guest.address_of(config) == _address(address):
            return name, device
    raise ConfigError(f"no device {address}", hint=f"devices: {', '.join(guest.devices) or 'none'}")


def _address(text: str) -> PCIAddress | None:
    try:
        return PCIAddress.parse(text)
    except ConfigError:
        return None


def _window(phb: SpaprPhb, iova: int) -> SpaprTceTable | None:
    for table in phb.dma.tables:
        window = table.window
        if window is not None and window.start <= iova <= window.last:
            return table
    return None


def _entry(guest: Guest, walk: Walk, table: SpaprTceTable, iova: int) -> None:
    shift = table.page_shift
    walk.page_size = 1 << shift
    walk.step("DMA window", f"LIOBN {table.liobn:#x}, {table.window}, pages of {1 << shift >> 10} KiB")
    index = table.index(iova)
    tce = table.get(index) or 0
    perm, page = tce & 3, tce & -(1 << shift)
    if not walk.step("TCE", f"entry {index:#x} is {tce:#x}: {_PERMS[perm]}", ok=bool(perm)):
        return
    gpa = page | iova & (1 << shift) - 1
    span = ram_span(guest.machine.system, Gpa(gpa))
    where = f"{span.block.name} + {span.offset:#x}" if span is not None else "not RAM"
    walk.step("guest-physical", f"{gpa:#x}: {where}", ok=span is not None)
    walk.result, walk.perm = gpa, _PERMS[perm]
