"""The PCs that programs run on, what a generator believes of one, and the registers of its unit.

Offsets and bits: Intel Virtualization Technology for Directed I/O, "Register Descriptions" (11.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.interop.vtd.topology import ROOT_BUS, Topology

VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD, FSTS = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28, 0x34
FECTL, FEDATA, FEADDR, FEUADDR = 0x38, 0x3C, 0x40, 0x44
IQH, IQT, IQA, ICS, IECTL, IEDATA, IEADDR, IEUADDR = 0x80, 0x88, 0x90, 0x9C, 0xA0, 0xA4, 0xA8, 0xAC
IRTA, PQH, PQT, PQA, PRS, PECTL, IVA, IOTLB, FRCD = 0xB8, 0xC0, 0xC8, 0xD0, 0xDC, 0xE0, 0xF0, 0xF8, 0x220
TE, SRTP, SFL, EAFL, WBF, QIE, IRE, SIRTP, CFI = (1 << bit for bit in (31, 30, 29, 28, 27, 26, 25, 24, 23))
R, W = 1, 2
PS, ACCESSED, DIRTY = 1 << 7, 1 << 5, 1 << 6


@dataclass(frozen=True)
class Variant:
    """A PC. ``properties``: of ``intel-iommu``; ``mode``: of its root table."""

    name: str
    properties: str = ""
    mode: str = "legacy"
    first_stage: bool = False
    levels: tuple[int, ...] = (3, 4)
    """Of the page tables that are right."""
    topology: Topology = ROOT_BUS


@dataclass
class Believed:
    """What the generator takes for granted."""

    queue: bool = False
    wide: bool = False
    """Whether descriptors have 256 bits."""
    tail: int = 0
    status: int = 0
    function_domain: dict[int, int] = field(default_factory=dict)
    """By source ID, index of the domain."""
    remapping: bool = False
    """Of interrupts."""
    latched: bool = False
    """Whether there is a table for it since the reset: QEMU keeps the size of the one before."""
    silent: bool = False
    """Whether context and PASID directory entries may have FPD. Then QEMU checks a PASID entry once only, and ends
    itself by an assertion over numbers of levels that there are not: a program has one or the other."""
