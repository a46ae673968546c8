"""Numbers of the sPAPR platform interface: hypercalls, RTAS tokens, LIOBNs, TCE bits, page-size masks.

Data only, so that guest drivers may use them as well as the platform. Sources: LoPAPR (chapters "Hypervisor Call
Functions", "RTAS Call Buffer", "DDW: Dynamic DMA Windows") and, for what the platform may choose (RTAS tokens, BUIDs,
window addresses), QEMU's pseries machine, which recorded logs come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from vfio_model.uapi import hvcall

HReturn = hvcall.HReturn
HCall = hvcall.HCall
H_SUCCESS, H_HARDWARE, H_FUNCTION = HReturn.H_SUCCESS, HReturn.H_HARDWARE, HReturn.H_FUNCTION
H_PARAMETER, H_RESOURCE = HReturn.H_PARAMETER, HReturn.H_RESOURCE
MULTI_TCE = hvcall.MULTI_TCE
INDIRECT_MAX_TCES, INDIRECT_LIST_ALIGN = hvcall.INDIRECT_MAX_TCES, hvcall.INDIRECT_LIST_ALIGN


class RtasStatus(IntEnum):
    """``rets[0]`` of an RTAS call; signed 32-bit."""

    SUCCESS = 0
    HW_ERROR = -1
    BUSY = -2
    PARAM_ERROR = -3
    NOT_AUTHORIZED = -9002


class RtasToken(IntEnum):
    """RTAS tokens as QEMU's pseries machine hands them out in its device tree."""

    SET_TCE_BYPASS = 0x2010
    READ_PCI_CONFIG = 0x2014
    WRITE_PCI_CONFIG = 0x2015
    IBM_READ_PCI_CONFIG = 0x2016
    IBM_WRITE_PCI_CONFIG = 0x2017
    IBM_QUERY_INTERRUPT_SOURCE_NUMBER = 0x2018
    IBM_CHANGE_MSI = 0x2019
    IBM_SET_EEH_OPTION = 0x2020
    IBM_GET_CONFIG_ADDR_INFO2 = 0x2021
    IBM_READ_SLOT_RESET_STATE2 = 0x2022
    IBM_SET_SLOT_RESET = 0x2023
    IBM_CONFIGURE_PE = 0x2024
    IBM_SLOT_ERROR_DETAIL = 0x2025
    IBM_QUERY_PE_DMA_WINDOW = 0x2026
    IBM_CREATE_PE_DMA_WINDOW = 0x2027
    IBM_REMOVE_PE_DMA_WINDOW = 0x2028
    IBM_RESET_PE_DMA_WINDOW = 0x2029


def _rtas_name(token: RtasToken) -> str:
    if token is RtasToken.SET_TCE_BYPASS:
        return "ibm,set-tce-bypass"
    vendor, _, rest = token.name.lower().partition("_")
    return f"ibm,{rest.replace('_', '-')}" if vendor == "ibm" else token.name.lower().replace("_", "-")


RTAS_TOKENS: dict[str, RtasToken] = {_rtas_name(token): token for token in RtasToken}
"""The calls by the names of their properties in the device tree's ``/rtas``."""


class TcePerm(IntFlag):
    """Bits 1:0 of a TCE: what the *device* may do."""

    NONE = 0
    READ = 1
    WRITE = 2
    RW = 3


TCE_PERM_MASK = 3
TCE_PAGE_SHIFT = 12
"""Page shift of the default window and of VIO windows."""
MAX_WINDOWS = 2
"""DMA windows per PHB."""

DEFAULT_WINDOW_ADDR = 0
DEFAULT_WINDOW_SIZE = 0x4000_0000
DMA64_WINDOW_ADDR = 0x0800_0000_0000_0000
MSI_WINDOW = 0x400_0000_0000
MSI_WINDOW_SIZE = 0x1000
MAX_PHBS = 31
BUID_BASE = 0x0800_0000_2000_0000
VIO_UNIT_BASE = 0x7100_0000
VIO_WINDOW_SIZE = 0x1000_0000
PCI_LIOBN_BIT = 0x8000_0000
LARGEST_BLOCK_32 = 0x8000_0000
"""Largest window in TCEs as a query with 5 outputs says it."""
LARGEST_BLOCK_64 = 0x20_0000_0000
"""The same with 6 outputs: 2**(58-21)."""

PAGE_MASK_BITS: dict[int, int] = {
    12: 0x001, 16: 0x002, 24: 0x004, 25: 0x008, 26: 0x010, 27: 0x020, 28: 0x040, 34: 0x080, 21: 0x100,
}  # fmt: skip
"""Page shift -> bit of the query's page-size mask (LoPAPR "ibm,query-pe-dma-window"); 2M came last and is out of
order.
"""
DEFAULT_PGSZ = (1 << 12) | (1 << 16) | (1 << 21) | (1 << 24)
"""Supported IOMMU page sizes as a bitmap of sizes (QEMU's ``pgsz`` property): 4K, 64K, 2M, 16M."""

HUGE_PAGE = 1 << 24
"""What hugetlbfs gives on POWER8 and is offered as IOMMU page for it."""


@dataclass(frozen=True, slots=True)
class DmaOptions:
    """What QEMU's ``spapr-pci-host-bridge`` takes as properties; addresses and sizes in bytes."""

    ddw: bool = True
    pgsz: int = DEFAULT_PGSZ
    """Supported IOMMU page sizes, as a bitmap of sizes."""
    dma_win_addr: int = DEFAULT_WINDOW_ADDR
    dma_win_size: int = DEFAULT_WINDOW_SIZE
    dma64_win_addr: int = DMA64_WINDOW_ADDR
    quirks: frozenset[str] = frozenset()
    """Selected quirks by name; see :mod:`vfio_model.iommu.spapr.quirks`."""


def pgsz_over(pgsz: int, backing: int) -> int:
    """``pgsz``, a bitmap of page sizes in bytes, with 16M added for RAM whose smallest backing page has ``backing``
    bytes, if that is so large.
    """
    return pgsz | HUGE_PAGE if backing >= HUGE_PAGE else pgsz


def page_mask(pgsz: int) -> int:
    """The query's mask for ``pgsz``, a bitmap of page sizes in bytes."""
    return sum(bit for shift, bit in PAGE_MASK_BITS.items() if pgsz >> shift & 1)


def pgsz_of_mask(mask: int) -> int:
    """The bitmap of page sizes that a query's ``mask`` stands for; the inverse of :func:`page_mask`."""
    return sum(1 << shift for shift, bit in PAGE_MASK_BITS.items() if mask & bit)


def pci_liobn(phb_index: int, window: int) -> int:
    """LIOBN of DMA window ``window`` (0 or 1) of PHB ``phb_index``."""
    return PCI_LIOBN_BIT | phb_index << 8 | window


def is_pci_liobn(liobn: int) -> bool:
    """Whether ``liobn`` belongs to a PHB rather than to a VIO device."""
    return bool(liobn & PCI_LIOBN_BIT)


def liobn_phb(liobn: int) -> int:
    """The PHB index in a PCI LIOBN."""
    return (liobn & ~PCI_LIOBN_BIT) >> 8


def liobn_window(liobn: int) -> int:
    """The window number in a PCI LIOBN."""
    return liobn & 0xFF


def phb_buid(phb_index: int) -> int:
    """Bus unit id of PHB ``phb_index``."""
    return BUID_BASE + phb_index


def config_addr(bus: int, devfn: int, register: int = 0) -> int:
    """The ``config_addr`` cell of the PCI RTAS calls: bus, device and function, and a register of up to 12 bits."""
    return (register >> 8 & 0xF) << 28 | bus << 16 | devfn << 8 | register & 0xFF


def rtas_status(rets: list[int]) -> int:
    """The signed status in the first return cell."""
    return (rets[0] ^ 1 << 31) - (1 << 31)


# Where QEMU's pseries machine shows PHB number ``index``: CPU addresses are per PHB, bus addresses are the same for
# each.
PCI_BASE = 0x2000_0000_0000
PCI_IO_SIZE = 0x1_0000
PCI_MEM32_BUS = 0x8000_0000
"""Bus address at which the 32-bit window begins."""
PCI_MEM32_SIZE = 0x8000_0000
PCI_MEM64_SIZE = 0x100_0000_0000
"""The 64-bit window; its bus addresses equal its CPU addresses."""
LSI_BASE = 0x1200
MSI_BASE = 0x1300
MSI_NUMBERS = 0xD00
"""Message interrupts of the machine: numbers up to 0x1fff."""
PCI_PINS = 4


def pci_io_window(index: int) -> int:
    """CPU address of PHB ``index``'s I/O space, :data:`PCI_IO_SIZE` bytes."""
    return PCI_BASE + index * PCI_IO_SIZE


def pci_mem32_window(index: int) -> int:
    """CPU address of PHB ``index``'s 32-bit memory window, :data:`PCI_MEM32_SIZE` bytes."""
    return PCI_BASE + (index + 1) * PCI_MEM32_SIZE


def pci_mem64_window(index: int) -> int:
    """CPU and bus address of PHB ``index``'s 64-bit memory window, :data:`PCI_MEM64_SIZE` bytes."""
    return PCI_BASE + (index + 1) * PCI_MEM64_SIZE
