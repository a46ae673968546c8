"""The RTAS calls that reach PCI configuration space (LoPAPR "ibm,read-pci-config", "ibm,write-pci-config").

``config_addr`` holds bus, device, function and a register of 12 bits in two pieces. Values are numbers: the platform
turns config space's little-endian bytes into them. An access must be naturally aligned, of 1, 2 or 4 bytes, and go to a
function that exists; everything else is HW_ERROR, as QEMU answers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vfio_model.iommu.spapr.regs import RtasStatus, RtasToken
from vfio_model.iommu.spapr.rtas import HW_ERROR, RtasHandler
from vfio_model.machine.phb import SpaprPhb
from vfio_model.pci.bus import PCIBus

_SUCCESS = int(RtasStatus.SUCCESS)
_NO_BUID = 0


class ConfigRtas:
    """Configuration calls over the PHBs, by BUID."""

    def __init__(self, phbs: Mapping[int, SpaprPhb]) -> None:
        self._phbs = phbs
        self.handlers: dict[int, RtasHandler] = {
            int(RtasToken.READ_PCI_CONFIG): self.read_without_buid,
            int(RtasToken.WRITE_PCI_CONFIG): self.write_without_buid,
            int(RtasToken.IBM_READ_PCI_CONFIG): self.read,
            int(RtasToken.IBM_WRITE_PCI_CONFIG): self.write,
        }

    def read(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, size -> value."""
        if len(args) != 4 or nret != 2:
            return HW_ERROR
        return self._read(self._phbs.get(args[1] << 32 | args[2]), args[0], args[3])

    def write(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, size, value."""
        if len(args) != 5 or nret != 1:
            return HW_ERROR
        return self._write(self._phbs.get(args[1] << 32 | args[2]), args[0], args[3], args[4])

    def read_without_buid(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, size -> value: of the bridge with BUID 0, which is none of a pseries machine's."""
        if len(args) != 2 or nret != 2:
            return HW_ERROR
        return self._read(self._phbs.get(_NO_BUID), args[0], args[1])

    def write_without_buid(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, size, value; the same."""
        if len(args) != 3 or nret != 1:
            return HW_ERROR
        return self._write(self._phbs.get(_NO_BUID), args[0], args[1], args[2])

    def _read(self, phb: SpaprPhb | None, config_addr: int, size: int) -> list[int]:
        place = _place(phb, config_addr, size)
        if place is None:
            return HW_ERROR
        bus, devfn, register = place
        return [_SUCCESS, bus.config_read(devfn, register, size)]

    def _write(self, phb: SpaprPhb | None, config_addr: int, size: int, value: int) -> list[int]:
        place = _place(phb, config_addr, size)
        if place is None:
            return HW_ERROR
        bus, devfn, register = place
        bus.config_write(devfn, register, size, value & (1 << size * 8) - 1)
        return [_SUCCESS]


def _place(phb: SpaprPhb | None, config_addr: int, size: int) -> tuple[PCIBus, int, int] | None:
    """(bus, devfn, register) of an access that is possible, or None."""
    if phb is None or size not in (1, 2, 4):
        return None
    number, devfn = config_addr >> 16 & 0xFF, config_addr >> 8 & 0xFF
    register = config_addr >> 20 & 0xF00 | config_addr & 0xFF
    if number != phb.bus.number or register % size:
        return None
    device = phb.bus.devices.get(devfn)
    if device is None or register >= device.config.size:
        return None
    return phb.bus, devfn, register
