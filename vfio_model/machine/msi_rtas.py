"""The RTAS calls by which a guest asks for message interrupts (LoPAPR "ibm,change-msi",
"ibm,query-interrupt-source-number").

The platform writes the bridge's message page and the numbers into the function's capability, or into its MSI-X table;
enabling it is the guest's own configuration write.

As on QEMU, neither call looks at how many cells it is given: arguments that are missing are what lies behind in memory,
and the results are written even where they were not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import RtasStatus, RtasToken
from vfio_model.iommu.spapr.rtas import HW_ERROR, PARAM_ERROR, RtasHandler
from vfio_model.machine.phb import SpaprPhb
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import NULL_TRACE, Trace

_SUCCESS = int(RtasStatus.SUCCESS)
CHANGE_FN, CHANGE_MSI_FN, CHANGE_MSIX_FN = 1, 3, 4
"""Functions of ``ibm,change-msi``: whatever the function has, MSI first; MSI; MSI-X."""
TYPE_MSI, TYPE_MSIX = 1, 2
"""The kind of interrupt that was given, in the last cell of ``ibm,change-msi``."""
TRIGGER_EDGE = 1
UNCOUNTED: Mapping[int, int] = {
    int(RtasToken.IBM_CHANGE_MSI): 6,
    int(RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER): 4,
}
"""How many argument cells the calls read, however many they are given."""


class MsiRtas:
    """The calls over the PHBs, by BUID."""

    def __init__(self, phbs: Mapping[int, SpaprPhb], *, trace: Trace = NULL_TRACE) -> None:
        self._phbs, self._trace = phbs, trace
        self.handlers: dict[int, RtasHandler] = {
            int(RtasToken.IBM_CHANGE_MSI): self.change_msi,
            int(RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER): self.query_source,
        }

    def change_msi(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, function, requested, sequence -> given, next sequence, kind.

        Nothing requested takes back what was given; a request for more than the function can use is answered with how
        many it can, and gives nothing. The kind is told to who offers more than three cells.
        """
        if len(args) < UNCOUNTED[RtasToken.IBM_CHANGE_MSI]:
            return PARAM_ERROR
        config_addr, buid, function, requested, sequence = args[0], args[1] << 32 | args[2], *args[3:6]
        phb = self._phbs.get(buid)
        device = phb.function(config_addr) if phb is not None else None
        if phb is None or device is None:
            return PARAM_ERROR
        if device.msi is not None and function in (CHANGE_FN, CHANGE_MSI_FN):
            kind, most = TYPE_MSI, device.msi.allocated
        elif device.msix is not None and function in (CHANGE_FN, CHANGE_MSIX_FN):
            kind, most = TYPE_MSIX, device.msix.vectors
        else:
            return PARAM_ERROR
        if not requested:
            return self._take_back(phb, device, config_addr)
        count, first = min(requested, most), 0
        if requested <= count:
            block = phb.msi.give(config_addr, requested)
            if block is None:
                return HW_ERROR
            first = block.first
            _set_messages(device, kind, regs.MSI_WINDOW, first, count)
        self._trace("spapr_pci_rtas_ibm_change_msi", cfg=config_addr, func=function, req=count, first=first)
        return [_SUCCESS, count, sequence + 1, kind][: max(nret, 3)]

    @staticmethod
    def _take_back(phb: SpaprPhb, device: PCIDevice, config_addr: int) -> list[int]:
        if not phb.msi.release(config_addr):
            return HW_ERROR
        if device.msi is not None:
            device.msi.set_message(0, 0)
        if device.msix is not None:
            _set_messages(device, TYPE_MSIX, 0, 0, device.msix.vectors)
        return [_SUCCESS, 0]

    def query_source(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, which of the function's -> number, trigger."""
        if len(args) < UNCOUNTED[RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER]:
            return PARAM_ERROR
        config_addr, which = args[0], args[3]
        phb = self._phbs.get(args[1] << 32 | args[2])
        if phb is None or phb.function(config_addr) is None:
            return PARAM_ERROR
        block = phb.msi.given.get(config_addr)
        if block is None or which >= block.num:
            return HW_ERROR
        number = block.first + which
        self._trace("spapr_pci_rtas_ibm_query_interrupt_source_number", ioa=which, intr=number)
        return [_SUCCESS, number, TRIGGER_EDGE]


def _set_messages(device: PCIDevice, kind: int, address: int, first: int, count: int) -> None:
    """One message whose low bits are the vector; or one for each vector of the table, with numbers that go up."""
    if kind == TYPE_MSI:
        assert device.msi is not None, "the kind is one that it has"
        device.msi.set_message(address, first)
        return
    assert device.msix is not None, "the kind is one that it has"
    for vector in range(count):
        device.msix.set_message(vector, address, first + vector if address else 0)
