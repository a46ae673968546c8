"""PCs with a VT-d unit in caching mode and assigned devices, driven as Linux does; what each side has mapped."""

from __future__ import annotations

from typing import Any

import msgspec

from protocols.control import messages as control
from tests.processes.conftest import HostProcess, control_call
from tests.processes.migration_rig import ADDRESSES, EDU, NIC, OWN, RAM, GuestProcess
from vfio_model.guest_drivers.edu import EduDriver
from vfio_model.guest_drivers.pc import EcamConfig, enable_ecam, mmio_window
from vfio_model.guest_drivers.pci_bridges import BusTree
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_tables import PageAllocator

PAGE, MIB = 4096, 1 << 20
TABLES, TABLES_END = MIB, 16 * MIB
DATA = 16 * MIB
"""Guest memory that devices are given."""
_ADDRESS = (1 << 52) - PAGE

Pages = dict[int, tuple[int, str]]
"""By bus address of a page of 4 KiB: guest-physical address, permission."""


class Q35Guest(GuestProcess):
    """See :class:`GuestProcess`; a PC. The assigned burst is behind a root port, everything else on the root bus."""

    SIDS = {**ADDRESSES, NIC: 0x100}
    """Requester ids."""

    @staticmethod
    def machine(bridges: int, kvm: bool | None) -> dict[str, object]:
        """A q35."""
        port = {"driver": "pcie-root-port", "id": "rp1", "addr": "08.0", "props": {"chassis": 1}}
        iommu = {"caching-mode": True}
        return {"type": "q35", "ram": RAM, "page_size": 2 * MIB, "iommu": iommu, "bridges": [port]}

    def assigned(self, number: int, bridges: int) -> list[dict[str, object]]:
        """The burst has a place of its own."""
        nic, edu = super().assigned(number, bridges)
        return [nic | {"bus": "rp1", "addr": "00.0"}, edu]

    def bring_up(self, *names: str) -> None:
        """What firmware does: to all that is there, whoever is asked for."""
        self.cpu.big_endian = False
        enable_ecam(self.cpu)
        tree = BusTree(lambda bus: EcamConfig(self.cpu, bus), mmio_window())
        functions = {function.bus << 8 | function.devfn: function for function in tree.bring_up()}
        for name in names or (NIC, EDU, OWN, *self.remote):
            self.bars[name] = functions[self.SIDS[name]].bars[0].address

    def edu(self, name: str = EDU) -> EduDriver:
        """A driver of an edu: everything is little-endian here."""
        return EduDriver(self.cpu, self.bars[name])

    def start_iommu(self, *, queued: bool = True) -> VtdDriver:
        """Its driver, started: nobody is in a domain."""
        driver = VtdDriver(self.cpu, PageAllocator(self.cpu, TABLES, TABLES_END), queued=queued)
        driver.start()
        return driver

    def pages(self, domain: Domain) -> Pages:
        """What the page table of ``domain`` maps to RAM, read from memory."""
        found: Pages = {}
        self._below(domain.table.root, domain.table.levels, 0, 3, found)
        return found

    def _below(self, table: int, level: int, base: int, perm: int, found: Pages) -> None:
        words = memoryview(self.ram.read(table, PAGE)).cast("Q")
        shift = 3 + 9 * level
        for number, entry in enumerate(words):
            iova, granted = base + (number << shift), perm & entry
            if entry & 3 and level > 1 and not entry & 0x80:
                self._below(entry & _ADDRESS, level - 1, iova, granted, found)
            elif granted and (entry & _ADDRESS) + (1 << shift) <= RAM:
                for at in range(0, 1 << shift, PAGE):
                    found[iova + at] = (entry & _ADDRESS) + at, "rw" if granted & 2 else "r-"


def host_pages(host: HostProcess, name: str, iovas: list[int]) -> dict[int, tuple[int, str]]:
    """What of ``iovas`` the host's table lets the device ``name`` reach: host-physical address, permission."""
    found = {}
    for iova in iovas:
        answer = control_call(host.directory, "hostd", control.Explain(name, iova))
        assert isinstance(answer, control.Document)
        document: Any = msgspec.json.decode(answer.json)
        if document["result"] is not None:
            found[iova] = document["result"], document["perm"]
    return found


__all__ = ["DATA", "EDU", "MIB", "NIC", "OWN", "PAGE", "RAM", "Q35Guest", "host_pages"]
