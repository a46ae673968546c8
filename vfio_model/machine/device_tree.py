"""What the device tree says about DMA windows, as data (LoPAPR "DMA Window Properties", "DDW: Dynamic DMA Windows").

A node is a path, a property a list of 32-bit cells. Only the properties that concern DMA are here, and the units of VIO
devices. Nodes show the machine as it is now: a default window that was removed has size 0.
"""

from __future__ import annotations

from vfio_model.iommu.spapr.ddw import PhbDma
from vfio_model.iommu.spapr.regs import RtasToken
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.machine.vio import VioDevice
from vfio_model.ranges import U32_MAX

Properties = dict[str, list[int]]
DeviceTree = dict[str, Properties]

_ADDRESS_CELLS = _SIZE_CELLS = 2
_EXTENSIONS, _SIX_OUTPUTS = 2, 1
"""``ibm,ddw-extensions``: how many extensions follow, and the value that says "the query has 6 outputs"."""


def window_cells(table: SpaprTceTable) -> list[int]:
    """LIOBN, address (2 cells), size (2 cells); the size's high cell is always 0, so that 4 GiB reads as 0."""
    size = table.nb_table << table.page_shift
    return [table.liobn, table.bus_offset >> 32, table.bus_offset & U32_MAX, 0, size & U32_MAX]


def _window(name: str, table: SpaprTceTable) -> Properties:
    return {
        "ibm,#dma-address-cells": [_ADDRESS_CELLS],
        "ibm,#dma-size-cells": [_SIZE_CELLS],
        name: window_cells(table),
    }


def phb_properties(phb: PhbDma) -> Properties:
    """The default window, and with dynamic windows the tokens of their RTAS calls."""
    properties = _window("ibm,dma-window", phb.tables[0])
    if phb.options.ddw:
        properties["ibm,ddw-applicable"] = [
            int(RtasToken.IBM_QUERY_PE_DMA_WINDOW),
            int(RtasToken.IBM_CREATE_PE_DMA_WINDOW),
            int(RtasToken.IBM_REMOVE_PE_DMA_WINDOW),
        ]
        reset = int(RtasToken.IBM_RESET_PE_DMA_WINDOW)
        properties["ibm,ddw-extensions"] = [_EXTENSIONS, reset, _SIX_OUTPUTS]
    return properties


def vio_properties(device: VioDevice) -> Properties:
    """The unit address, and the window of a device that has one."""
    window = _window("ibm,my-dma-window", device.dma.table) if device.dma is not None else {}
    return {"reg": [device.unit], **window}
