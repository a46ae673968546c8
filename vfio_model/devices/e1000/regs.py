"""82540EM: what its registers are. Sections are those of Intel's "PCI/PCI-X Family of Gigabit Ethernet Controllers
Software Developer's Manual" (317453).

:data:`REGISTERS` is the table; :mod:`vfio_model.devices.register_file` says what its columns mean. BAR 0 shows the
registers in memory. BAR 1 reaches them through I/O ports (13.2.2 "I/O-Mapped Internal Register, Internal Memory, and
Flash Access"): the offset goes to :data:`IOADDR`, the value to :data:`IODATA`.

Bits are plain numbers in a class for each register: they are tested for every frame, where an ``IntFlag`` would cost as
much as the work itself.
"""

from __future__ import annotations

from typing import Final

from vfio_model.devices.register_file import Register
from vfio_model.ranges import U32_MAX

VENDOR_ID = 0x8086
DEVICE_ID = 0x100E
REVISION = 3
CLASS_ID = 0x0200
MEMORY_SIZE = 0x20000
IO_SIZE = 64
IOADDR = 0
IODATA = 4

MAC_DEFAULT = "52:54:00:12:34:56"
DESCRIPTOR_SIZE = 16
NS_PER_DELAY = 1024
"""Unit of the receive and transmit delay timers: 1.024 µs."""
NS_PER_THROTTLE = 256
"""Unit of the interrupt throttling interval."""

# -- general (13.4) ----------------------------------------------------------------------------------------------------

CTRL = 0x00000
STATUS = 0x00008
EECD = 0x00010
EERD = 0x00014
CTRL_EXT = 0x00018
MDIC = 0x00020
FCAL = 0x00028
FCAH = 0x0002C
FCT = 0x00030
VET = 0x00038
ICR = 0x000C0
ITR = 0x000C4
ICS = 0x000C8
IMS = 0x000D0
IMC = 0x000D8
RCTL = 0x00100
FCTTV = 0x00170
TXCW = 0x00178
RXCW = 0x00180
TCTL = 0x00400
TIPG = 0x00410
AIFS = 0x00458
LEDCTL = 0x00E00
PBA = 0x01000
FCRTL = 0x02160
FCRTH = 0x02168
RDBAL = 0x02800
RDBAH = 0x02804
RDLEN = 0x02808
RDH = 0x02810
RDT = 0x02818
RDTR = 0x02820
RXDCTL = 0x02828
RADV = 0x0282C
RSRPD = 0x02C00
TXDMAC = 0x03000
TDBAL = 0x03800
TDBAH = 0x03804
TDLEN = 0x03808
TDH = 0x03810
TDT = 0x03818
TIDV = 0x03820
TXDCTL = 0x03828
TADV = 0x0382C
TSPMT = 0x03830
RXCSUM = 0x05000
MTA = 0x05200
RAL = 0x05400
RAH = 0x05404
RECEIVE_ADDRESSES = 16
VFTA = 0x05600


class Ctrl:
    """13.4.1 "Device Control Register"."""

    FD = 1 << 0
    ASDE = 1 << 5
    SLU = 1 << 6
    SPEED_1000 = 2 << 8
    FRCSPD = 1 << 11
    FRCDPLX = 1 << 12
    RST = 1 << 26
    RFCE = 1 << 27
    TFCE = 1 << 28
    VME = 1 << 30
    PHY_RST = 1 << 31


class Status:
    """13.4.2 "Device Status Register"."""

    FD = 1 << 0
    LU = 1 << 1
    TXOFF = 1 << 4


STATUS_SPEED_SHIFT = 6
STATUS_ASDV_SHIFT = 8


class CtrlExt:
    """13.4.6 "Extended Device Control Register"."""

    ASDCHK = 1 << 12
    EE_RST = 1 << 13


class Interrupt:
    """13.4.17 "Interrupt Cause Read Register": the same bits in ICR, ICS, IMS and IMC."""

    TXDW = 1 << 0
    TXQE = 1 << 1
    LSC = 1 << 2
    RXSEQ = 1 << 3
    RXDMT0 = 1 << 4
    RXO = 1 << 6
    RXT0 = 1 << 7
    MDAC = 1 << 9
    RXCFG = 1 << 10
    TXD_LOW = 1 << 15
    SRPD = 1 << 16


INTERRUPTS: Final = 0x1FFFF


class Mdic:
    """13.4.7 "MDI Control Register"."""

    WRITE = 1 << 26
    READ = 2 << 26
    READY = 1 << 28
    INTERRUPT = 1 << 29
    ERROR = 1 << 30


class Rctl:
    """13.4.22 "Receive Control Register"."""

    EN = 1 << 1
    SBP = 1 << 2
    UPE = 1 << 3
    MPE = 1 << 4
    LPE = 1 << 5
    LBM = 3 << 6
    BAM = 1 << 15
    VFE = 1 << 18
    CFIEN = 1 << 19
    CFI = 1 << 20
    DPF = 1 << 22
    BSEX = 1 << 25
    SECRC = 1 << 26


RCTL_RDMTS_SHIFT = 8
RCTL_MO_SHIFT = 12
RCTL_BSIZE_SHIFT = 16


class Tctl:
    """13.4.33 "Transmit Control Register"."""

    EN = 1 << 1
    PSP = 1 << 3


class Rxcsum:
    """13.4.47 "Receive Checksum Control"."""

    IPOFLD = 1 << 8
    TUOFLD = 1 << 9


RXCSUM_PCSS = 0xFF
RDTR_FPD = 1 << 31
RAH_AV = 1 << 31
RAH_AS_SHIFT = 16
TXDCTL_LWTHRESH_SHIFT = 25
EERD_START = 1 << 0
EERD_DONE = 1 << 4
EERD_ADDRESS_SHIFT = 8
EERD_DATA_SHIFT = 16

# -- the table ---------------------------------------------------------------------------------------------------------

_ALL = U32_MAX

GENERAL: tuple[Register, ...] = (
    Register("CTRL", CTRL, "13.4.1", reset=Ctrl.FD | Ctrl.SLU | Ctrl.SPEED_1000, writable=_ALL & ~Ctrl.RST),
    Register("STATUS", STATUS, "13.4.2"),
    Register("EECD", EECD, "13.4.3"),
    Register("EERD", EERD, "13.4.4"),
    Register("CTRL_EXT", CTRL_EXT, "13.4.6", writable=_ALL & ~(CtrlExt.ASDCHK | CtrlExt.EE_RST)),
    Register("MDIC", MDIC, "13.4.7", reset=Mdic.READY, writable=_ALL),
    Register("FCAL", FCAL, "13.4.8", reset=0x00C28001, writable=_ALL),
    Register("FCAH", FCAH, "13.4.9", reset=0x0100, writable=0xFFFF),
    Register("FCT", FCT, "13.4.10", reset=0x8808, writable=0xFFFF),
    Register("VET", VET, "13.4.11", reset=0x8100, writable=0xFFFF),
    Register("FCTTV", FCTTV, "13.4.12", writable=0xFFFF),
    Register("TXCW", TXCW, "13.4.13", writable=_ALL),
    Register("RXCW", RXCW, "13.4.14"),
    Register("LEDCTL", LEDCTL, "13.4.15", reset=0x07068302, writable=_ALL),
    Register("PBA", PBA, "13.4.16", reset=0x00100030, writable=0xFFFF),
    Register("ICR", ICR, "13.4.17", clear_on_read=INTERRUPTS, clear_on_write=INTERRUPTS),
    Register("ITR", ITR, "13.4.18", writable=0xFFFF),
    Register("ICS", ICS, "13.4.19"),
    Register("IMS", IMS, "13.4.20"),
    Register("IMC", IMC, "13.4.21"),
)
RECEIVE: tuple[Register, ...] = (
    Register("RCTL", RCTL, "13.4.22", writable=0x06DFF7FE),
    Register("FCRTL", FCRTL, "13.4.23", writable=0x8000FFF8),
    Register("FCRTH", FCRTH, "13.4.24", writable=0x0000FFF8),
    Register("RDBAL", RDBAL, "13.4.25", writable=_ALL & ~15),
    Register("RDBAH", RDBAH, "13.4.26", writable=_ALL),
    Register("RDLEN", RDLEN, "13.4.27", writable=0xFFF80),
    Register("RDH", RDH, "13.4.28", writable=0xFFFF),
    Register("RDT", RDT, "13.4.29", writable=0xFFFF),
    Register("RDTR", RDTR, "13.4.30", writable=0xFFFF),
    Register("RADV", RADV, "13.4.31", writable=0xFFFF),
    Register("RSRPD", RSRPD, "13.4.32", writable=0x0FFF),
    Register("RXDCTL", RXDCTL, "13.4.46", reset=0x01000000, writable=0x013F3F3F),
    Register("RXCSUM", RXCSUM, "13.4.47", writable=RXCSUM_PCSS | Rxcsum.IPOFLD | Rxcsum.TUOFLD),
    Register("MTA", MTA, "13.5.1", writable=_ALL, count=128),
    Register("RAL", RAL, "13.5.2", writable=_ALL, count=RECEIVE_ADDRESSES, stride=8),
    Register("RAH", RAH, "13.5.3", writable=0x8003FFFF, count=RECEIVE_ADDRESSES, stride=8),
    Register("VFTA", VFTA, "13.5.4", writable=_ALL, count=128),
)
TRANSMIT: tuple[Register, ...] = (
    Register("TCTL", TCTL, "13.4.33", writable=0x07FFFFFA),
    Register("TIPG", TIPG, "13.4.34", writable=0x3FFFFFFF),
    Register("AIFS", AIFS, "13.4.35", writable=0xFFFF),
    Register("TDBAL", TDBAL, "13.4.36", writable=_ALL & ~15),
    Register("TDBAH", TDBAH, "13.4.37", writable=_ALL),
    Register("TDLEN", TDLEN, "13.4.38", writable=0xFFF80),
    Register("TDH", TDH, "13.4.39", writable=0xFFFF),
    Register("TDT", TDT, "13.4.40", writable=0xFFFF),
    Register("TIDV", TIDV, "13.4.41", writable=0xFFFF),
    Register("TXDMAC", TXDMAC, "13.4.42", writable=1),
    Register("TXDCTL", TXDCTL, "13.4.43", writable=0xFF3F3F3F),
    Register("TADV", TADV, "13.4.44", writable=0xFFFF),
    Register("TSPMT", TSPMT, "13.4.45", reset=0x01000400, writable=_ALL),
)
WAKE_UP_AND_MANAGEMENT: tuple[Register, ...] = (
    Register("WUC", 0x05800, "13.6", writable=0x0F),
    Register("WUFC", 0x05808, "13.6", writable=0xF00FF),
    Register("WUS", 0x05810, "13.6", writable=0xF00FF),
    Register("MANC", 0x05820, "13.6", writable=_ALL),
    Register("IPAV", 0x05838, "13.6", writable=_ALL),
    Register("IP4AT", 0x05840, "13.6", writable=_ALL, count=4, stride=8),
    Register("IP6AT", 0x05880, "13.6", writable=_ALL, count=4),
    Register("WUPL", 0x05900, "13.6"),
    Register("WUPM", 0x05A00, "13.6", count=32),
    Register("FFLT", 0x05F00, "13.6", writable=0x7FF, count=4, stride=8),
    Register("FFMT", 0x09000, "13.6", writable=0xF, count=128, stride=8),
    Register("FFVT", 0x09800, "13.6", writable=_ALL, count=128, stride=8),
)
DIAGNOSTICS: tuple[Register, ...] = tuple(
    Register(name, offset, "13.8", writable=0x1FFF)
    for name, offset in (
        ("RDFH", 0x02410),
        ("RDFT", 0x02418),
        ("RDFHS", 0x02420),
        ("RDFTS", 0x02428),
        ("RDFPC", 0x02430),
        ("TDFH", 0x03410),
        ("TDFT", 0x03418),
        ("TDFHS", 0x03420),
        ("TDFTS", 0x03428),
        ("TDFPC", 0x03430),
    )
)

# -- statistics (13.7): cleared by reading, stuck at their largest value -----------------------------------------------

RLEC = 0x04040
PRC64 = 0x0405C
GPRC = 0x04074
BPRC = 0x04078
MPRC = 0x0407C
GPTC = 0x04080
GORCL = 0x04088
GOTCL = 0x04090
MPC = 0x04010
RNBC = 0x040A0
ROC = 0x040AC
TORL = 0x040C0
TOTL = 0x040C8
TPR = 0x040D0
TPT = 0x040D4
PTC64 = 0x040D8
MPTC = 0x040F0
BPTC = 0x040F4
TSCTC = 0x040F8
TSCTFC = 0x040FC
_WIDE = (GORCL, GOTCL, TORL, TOTL)
"""Low words of 64-bit counters: reading the high word clears both."""
# fmt: off
_SECTION_13_7 = (
    ("CRCERRS", 0x04000), ("ALGNERRC", 0x04004), ("SYMERRS", 0x04008), ("RXERRC", 0x0400C), ("MPC", 0x04010),
    ("SCC", 0x04014), ("ECOL", 0x04018), ("MCC", 0x0401C), ("LATECOL", 0x04020), ("COLC", 0x04028),
    ("DC", 0x04030), ("TNCRS", 0x04034), ("SEC", 0x04038), ("CEXTERR", 0x0403C), ("RLEC", 0x04040),
    ("XONRXC", 0x04048), ("XONTXC", 0x0404C), ("XOFFRXC", 0x04050), ("XOFFTXC", 0x04054), ("FCRUC", 0x04058),
    ("PRC64", 0x0405C), ("PRC127", 0x04060), ("PRC255", 0x04064), ("PRC511", 0x04068), ("PRC1023", 0x0406C),
    ("PRC1522", 0x04070), ("GPRC", 0x04074), ("BPRC", 0x04078), ("MPRC", 0x0407C), ("GPTC", 0x04080),
    ("GORC", 0x04088), ("GOTC", 0x04090), ("RNBC", 0x040A0), ("RUC", 0x040A4), ("RFC", 0x040A8),
    ("ROC", 0x040AC), ("RJC", 0x040B0), ("MGTPRC", 0x040B4), ("MGTPDC", 0x040B8), ("MGTPTC", 0x040BC),
    ("TOR", 0x040C0), ("TOT", 0x040C8), ("TPR", 0x040D0), ("TPT", 0x040D4), ("PTC64", 0x040D8),
    ("PTC127", 0x040DC), ("PTC255", 0x040E0), ("PTC511", 0x040E4), ("PTC1023", 0x040E8), ("PTC1522", 0x040EC),
    ("MPTC", 0x040F0), ("BPTC", 0x040F4), ("TSCTC", 0x040F8), ("TSCTFC", 0x040FC),
)
# fmt: on
"""The counters in the order of their sections, 13.7.1 and on."""


def _statistics() -> tuple[Register, ...]:
    registers: list[Register] = []
    for number, (name, offset) in enumerate(_SECTION_13_7, 1):
        section = f"13.7.{number}"
        if offset in _WIDE:
            registers.append(Register(name + "L", offset, section))
            registers.append(Register(name + "H", offset + 4, section, clear_on_read=_ALL))
        else:
            registers.append(Register(name, offset, section, clear_on_read=_ALL))
    return tuple(registers)


STATISTICS = _statistics()
WIDE_STATISTICS = _WIDE
REGISTERS: tuple[Register, ...] = (
    *GENERAL,
    *RECEIVE,
    *TRANSMIT,
    *STATISTICS,
    *WAKE_UP_AND_MANAGEMENT,
    *DIAGNOSTICS,
)
