"""Stage 1 of ``explain``: how the guest's vIOMMU translates an address of a device, read from the live objects.

Each step says what was looked at, what was found there, and whether the walk can go on. Nothing is computed beside
the tables: the entry shown is the one that the next DMA of an emulated device, or the next translation request of
a remote one, would use.
"""

from __future__ import annotations

from guestd.guest import Guest
from guestd.machines.walk import Walk
from vfio_model.errors import ConfigError
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.device import PCIDevice
from vfio_model.vfio.pci import VFIOPCIDevice


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
    guest.board.explain(walk, config, iova)
    return walk.document()


def _find(guest: Guest, address: str) -> tuple[str, PCIDevice]:
    for name, (config, device) in guest.devices.items():
        if name == address:
            return name, device
        if guest.board.address_of(config) == _address(address):
            return name, device
    raise ConfigError(f"no device {address}", hint=f"devices: {', '.join(guest.devices) or 'none'}")


def _address(text: str) -> PCIAddress | None:
    try:
        return PCIAddress.parse(text)
    except ConfigError:
        return None
