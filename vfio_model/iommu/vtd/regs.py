"""Registers, descriptors and table entries of the register side of an Intel VT-d unit, as data.

Source: Intel Virtualization Technology for Directed I/O specification (revision 4.1), "Register Descriptions" (11.4);
each register bears its title there. Descriptors: "Queued Invalidation Interface" (6.5.2) and "Page Request Queue"
(7.4); remapping entries: "Interrupt Remapping Table Entry (IRTE) for Remapped Interrupts" (9.9). What the specification
leaves to the implementation, writable bits among it, is as the unit of QEMU's PC has it: the queues end at 512 KiB,
FEDATA and PEDATA have 16 bits, the upper halves of FEADDR and IEADDR are zero, PECTL.IM is clear after a reset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from vfio_model.ranges import U32_MAX, U64_MAX

BASE: Final = 0xFED9_0000
"""Where a PC has the registers."""
SIZE: Final = 0x230
"""Bytes of registers."""
INTERRUPT_FIRST, INTERRUPT_LAST = 0xFEE0_0000, 0xFEEF_FFFF
"""Bus addresses of interrupt requests, inclusive."""


class Bits(NamedTuple):
    """Bits ``high``..``low`` of a word, inclusive."""

    high: int
    low: int

    @property
    def mask(self) -> int:
        """In their place."""
        return (2 << self.high) - (1 << self.low)

    def of(self, word: int) -> int:
        """The field's value in ``word``."""
        return (word & self.mask) >> self.low

    def put(self, value: int) -> int:
        """``value``, which fits, in its place."""
        assert 0 <= value <= self.mask >> self.low, f"{value:#x} does not fit bits {self.high}:{self.low}"
        return value << self.low


def bit(number: int) -> int:
    """The mask of one bit."""
    return 1 << number


@dataclass(frozen=True, slots=True)
class Register:
    """One register of ``size`` bytes (4, 8; 16 for a fault record).

    ``writable`` bits keep what is written, ``clear_on_write`` bits are cleared by a written one, ``write_only`` bits
    read as zero. ``narrow``: an access of 8 bytes stores 4. ``page_requests``: only there with page requests.
    """

    name: str
    offset: int
    size: int
    title: str
    writable: int = 0
    clear_on_write: int = 0
    write_only: int = 0
    reset: int = 0
    narrow: bool = False
    page_requests: bool = False


VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28
FSTS, FECTL, FEDATA, FEADDR, FEUADDR = 0x34, 0x38, 0x3C, 0x40, 0x44
IQH, IQT, IQA, ICS, IECTL, IEDATA, IEADDR, IEUADDR = 0x80, 0x88, 0x90, 0x9C, 0xA0, 0xA4, 0xA8, 0xAC
IRTA = 0xB8
PQH, PQT, PQA, PRS, PECTL, PEDATA, PEADDR, PEUADDR = 0xC0, 0xC8, 0xD0, 0xDC, 0xE0, 0xE4, 0xE8, 0xEC
IVA, IOTLB = 0xF0, 0xF8
FRCD = 0x220

_IM = bit(31)
_QUEUE_OFFSETS = 0x7FFF0
_PAGE_QUEUE_OFFSETS = 0x7FFE0

REGISTERS: Final = (
    Register("VER", VER, 4, "Version Register", reset=0x10),
    Register("CAP", CAP, 8, "Capability Register"),
    Register("ECAP", ECAP, 8, "Extended Capability Register"),
    Register("GCMD", GCMD, 4, "Global Command Register", writable=0xFF80_0000, write_only=U32_MAX, narrow=True),
    Register("GSTS", GSTS, 4, "Global Status Register"),
    Register("RTADDR", RTADDR, 8, "Root Table Address Register", writable=U64_MAX & ~0x3FF),
    Register(
        "CCMD",
        CCMD,
        8,
        "Context Command Register",
        writable=0xE000_0003_FFFF_FFFF,
        write_only=0x3_FFFF_0000,
    ),
    Register("FSTS", FSTS, 4, "Fault Status Register", clear_on_write=0x51),
    Register("FECTL", FECTL, 4, "Fault Event Control Register", writable=_IM, reset=_IM, narrow=True),
    Register("FEDATA", FEDATA, 4, "Fault Event Data Register", writable=0xFFFF),
    Register("FEADDR", FEADDR, 4, "Fault Event Address Register", writable=0xFFFF_FFFC),
    Register("FEUADDR", FEUADDR, 4, "Fault Event Upper Address Register"),
    Register("IQH", IQH, 8, "Invalidation Queue Head Register"),
    Register("IQT", IQT, 8, "Invalidation Queue Tail Register", writable=_QUEUE_OFFSETS),
    Register("IQA", IQA, 8, "Invalidation Queue Address Register", writable=U64_MAX & ~0x7F8),
    Register("ICS", ICS, 4, "Invalidation Completion Status Register", clear_on_write=1),
    Register("IECTL", IECTL, 4, "Invalidation Event Control Register", writable=_IM, reset=_IM, narrow=True),
    Register("IEDATA", IEDATA, 4, "Invalidation Event Data Register", writable=U32_MAX),
    Register("IEADDR", IEADDR, 4, "Invalidation Event Address Register", writable=0xFFFF_FFFC),
    Register("IEUADDR", IEUADDR, 4, "Invalidation Event Upper Address Register"),
    Register("IRTA", IRTA, 8, "Interrupt Remapping Table Address Register", writable=U64_MAX & ~0x7F0),
    Register("PQH", PQH, 8, "Page Request Queue Head Register", writable=_PAGE_QUEUE_OFFSETS, page_requests=True),
    Register("PQT", PQT, 8, "Page Request Queue Tail Register", writable=_PAGE_QUEUE_OFFSETS, page_requests=True),
    Register("PQA", PQA, 8, "Page Request Queue Address Register", writable=U64_MAX & ~0xFF8, page_requests=True),
    Register("PRS", PRS, 4, "Page Request Status Register", clear_on_write=3, page_requests=True),
    Register("PECTL", PECTL, 4, "Page Request Event Control Register", writable=_IM, narrow=True, page_requests=True),
    Register("PEDATA", PEDATA, 4, "Page Request Event Data Register", writable=0xFFFF, page_requests=True),
    Register("PEADDR", PEADDR, 4, "Page Request Event Address Register", writable=0xFFFF_FFFC, page_requests=True),
    Register("PEUADDR", PEUADDR, 4, "Page Request Event Upper Address Register", writable=U32_MAX, page_requests=True),
    Register("IVA", IVA, 8, "Invalidate Address Register", writable=U64_MAX & ~0xF80, write_only=U64_MAX),
    Register("IOTLB", IOTLB, 8, "IOTLB Invalidate Register", writable=0xB003_FFFF_0000_0000),
    Register("FRCD", FRCD, 16, "Fault Recording Registers", clear_on_write=bit(127)),
)


# -- fields, by the register's name ------------------------------------------------------------------------------------

GCMD_TE, GCMD_SRTP, GCMD_QIE, GCMD_IRE, GCMD_SIRTP, GCMD_CFI = bit(31), bit(30), bit(26), bit(25), bit(24), bit(23)
"""GSTS has the states in the same bits."""
RTADDR_SMT: Final = bit(10)
CCMD_ICC, CCMD_CIRG, CCMD_CAIG = bit(63), Bits(62, 61), Bits(60, 59)
CCMD_FM, CCMD_SID, CCMD_DID = Bits(33, 32), Bits(31, 16), Bits(15, 0)
IOTLB_IVT, IOTLB_IIRG, IOTLB_IAIG, IOTLB_DID = bit(63), Bits(61, 60), Bits(58, 57), Bits(47, 32)
IVA_AM: Final = Bits(5, 0)
FSTS_PFO, FSTS_PPF, FSTS_IQE, FSTS_ITE, FSTS_FRI = bit(0), bit(1), bit(4), bit(6), Bits(15, 8)
EVENT_IM, EVENT_IP = bit(31), bit(30)
"""FECTL, IECTL, PECTL."""
IQA_DW, IQA_QS = bit(11), Bits(2, 0)
ICS_IWC: Final = bit(0)
IRTA_EIME, IRTA_S = bit(11), Bits(3, 0)
PQA_PQS: Final = Bits(2, 0)
PRS_PPR, PRS_PRO = bit(0), bit(1)
PAGE: Final = 0xFFF
"""The bits below a page address."""

CAP_ND, CAP_CM, CAP_SAGAW, CAP_MGAW, CAP_FRO = Bits(2, 0), bit(7), Bits(12, 8), Bits(21, 16), Bits(33, 24)
CAP_SLLPS, CAP_PSI, CAP_NFR, CAP_MAMV = Bits(37, 34), bit(39), Bits(47, 40), Bits(53, 48)
CAP_DWD, CAP_DRD, CAP_FS1GP, CAP_ESRTPS = bit(54), bit(55), bit(56), bit(63)
ECAP_QI, ECAP_DT, ECAP_IR, ECAP_EIM, ECAP_PT, ECAP_SC = bit(1), bit(2), bit(3), bit(4), bit(6), bit(7)
ECAP_IRO, ECAP_MHMV, ECAP_NEST, ECAP_PRS = Bits(17, 8), Bits(23, 20), bit(26), bit(29)
ECAP_SRS, ECAP_NWFS, ECAP_PSS, ECAP_PASID, ECAP_PDS = bit(31), bit(33), Bits(39, 35), bit(40), bit(42)
ECAP_SMTS, ECAP_SSTS, ECAP_FSTS = bit(43), bit(46), bit(47)
MAMV: Final = 18
"""The largest address mask of an invalidation."""

FRCD_SID, FRCD_PP, FRCD_REASON, FRCD_PV = Bits(15, 0), bit(31), Bits(39, 32), Bits(59, 40)
"""The upper 64 bits of a fault record. PASID present; PASID value."""
FRCD_T, FRCD_F = bit(62), bit(63)
"""A read; a fault is recorded."""


class FaultReason:
    """What the register side itself records ("Fault Conditions" in 7.1; the translation half has its own)."""

    IR_REQUEST_RESERVED = 0x20
    IR_INDEX_TOO_BIG = 0x21
    IR_ENTRY_NOT_PRESENT = 0x22
    IR_TABLE_UNREADABLE = 0x23
    IR_ENTRY_RESERVED = 0x24
    IR_COMPATIBILITY_BLOCKED = 0x25
    IR_SID_MISMATCH = 0x26


# -- invalidation descriptors ("Queued Invalidation Interface", 6.5.2) -------------------------------------------------

TYPE_LOW, TYPE_HIGH = Bits(3, 0), Bits(11, 9)


class DescriptorType:
    """Bits 3:0, with 11:9 above them."""

    CONTEXT_CACHE = 1
    IOTLB = 2
    DEVICE_TLB = 3
    INTERRUPT_ENTRY_CACHE = 4
    WAIT = 5
    PASID_IOTLB = 6
    PASID_CACHE = 7
    PASID_DEVICE_TLB = 8
    PAGE_GROUP_RESPONSE = 9


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A kind of descriptor. ``reserved``: bits that must be zero, by quadword. ``wide``: exists in queues of 256-bit
    descriptors only. ``trace``: how traces name it.
    """

    type: int
    trace: str
    title: str
    reserved: tuple[int, int]
    reserved_above: int = U64_MAX
    """Of the third and fourth quadword, in a queue of 256-bit descriptors."""
    wide: bool = False


CC_G, CC_DID, CC_SID, CC_FM = Bits(5, 4), Bits(31, 16), Bits(47, 32), Bits(49, 48)
TLB_G, TLB_DID, TLB_AM = Bits(5, 4), Bits(31, 16), Bits(5, 0)
"""IOTLB; AM is in the second quadword with the address."""
DEV_SID, DEV_S = Bits(47, 32), bit(0)
"""Device TLB; S is in the second quadword."""
IEC_G, IEC_IM, IEC_IIDX = bit(4), Bits(31, 27), Bits(47, 32)
WAIT_IF, WAIT_SW, WAIT_FN, WAIT_PD, WAIT_DATA = bit(4), bit(5), bit(6), bit(7), Bits(63, 32)
PASID_TLB_PASID: Final = Bits(51, 32)
PASID_CACHE_G: Final = Bits(5, 4)
PASID_DEV_SID, PASID_DEV_PASID, PASID_DEV_GLOBAL, PASID_DEV_S = Bits(31, 16), Bits(51, 32), bit(0), bit(11)
RESPONSE_PP, RESPONSE_CODE, RESPONSE_RID = bit(4), Bits(15, 12), Bits(31, 16)
RESPONSE_PASID, RESPONSE_PRGI = Bits(51, 32), Bits(11, 3)

DESCRIPTORS: Final = {
    each.type: each
    for each in (
        Descriptor(1, "context-cache", "Context-cache Invalidate", (0xFFFC_0000_0000_F1C0, U64_MAX)),
        Descriptor(2, "iotlb", "IOTLB Invalidate", (0xFFFF_FFFF_0000_F100, 0xF80)),
        Descriptor(3, "device", "Device-TLB Invalidate", (0xFFFF_0000_FFE0_F1F0, 0xFFE)),
        Descriptor(4, "iec", "Interrupt Entry Cache Invalidate", (0xFFFF_0000_07FF_F1E0, U64_MAX)),
        Descriptor(5, "wait", "Invalidation Wait", (0xFFFF_F100, 3)),
        Descriptor(6, "p-iotlb", "PASID-based IOTLB Invalidate", (0xFFF0_0000_0000_F1C0, 0xF80), wide=True),
        Descriptor(7, "pasid-cache", "PASID-cache Invalidate", (0xFFF0_0000_0000_F1C0, U64_MAX), wide=True),
        Descriptor(8, "device-piotlb", "PASID-based Device-TLB Invalidate", (0xFFF0_0000_0000_F000, 0x7FE), wide=True),
        Descriptor(9, "page group response", "Page Group Response", (0xFFF0_0000_0000_01E0, U64_MAX & ~0xFFC), 0),
    )
}
"""By type. Titles end in "Descriptor" in the specification."""


# -- tables and queues in memory ---------------------------------------------------------------------------------------

IRTE_SIZE: Final = 16
IRTE_P, IRTE_FPD, IRTE_DM, IRTE_RH, IRTE_TM = bit(0), bit(1), bit(2), bit(3), bit(4)
IRTE_DLM, IRTE_VECTOR, IRTE_DEST, IRTE_XAPIC_DEST = Bits(7, 5), Bits(23, 16), Bits(63, 32), Bits(47, 40)
IRTE_RESERVED: Final = 0xFF00_7000
IRTE_SID, IRTE_SQ, IRTE_SVT = Bits(15, 0), Bits(17, 16), Bits(19, 18)
"""The upper 64 bits of an entry; what is above is reserved."""
IRTE_HIGH_RESERVED: Final = U64_MAX & ~0xF_FFFF

PRQ_ENTRY: Final = 32
PRQ_TYPE, PRQ_PP, PRQ_RID, PRQ_PASID, PRQ_EXEC, PRQ_PRIV = (
    Bits(7, 0),
    bit(8),
    Bits(31, 16),
    Bits(51, 32),
    bit(52),
    bit(53),
)
PRQ_READ, PRQ_WRITE, PRQ_LPIG, PRQ_PRGI = bit(0), bit(1), bit(2), Bits(11, 3)
"""The second quadword of a page request, with the page address."""
