"""82540EM descriptors: 16 bytes, little-endian, in rings.

Manual 3.2.3 "Receive Descriptor Format", 3.3.3 "Legacy Transmit Descriptor Format", 3.3.6 "TCP/IP Context Descriptor
Layout", 3.3.7 "TCP/IP Data Descriptor Format".
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

RECEIVE_WRITE_BACK = struct.Struct("<HHBBH")
"""The upper half of a receive descriptor: length, packet checksum, status, errors, special."""
RECEIVE_WRITE_BACK_AT: Final = 8
TRANSMIT_STATUS_AT: Final = 12
TRANSMIT_DD: Final = 1


class RxStatus:
    """3.2.3.1 "Receive Descriptor Status Field"."""

    DD = 1 << 0
    EOP = 1 << 1
    IXSM = 1 << 2
    VP = 1 << 3
    TCPCS = 1 << 5
    IPCS = 1 << 6
    PIF = 1 << 7


class RxError:
    """3.2.3.2 "Receive Descriptor Errors Field"."""

    TCPE = 1 << 5
    IPE = 1 << 6
    RXE = 1 << 7


class TxCommand:
    """Commands of a descriptor: legacy (3.3.3.1), and data (3.3.7.1), where bit 2 is TSE in place of IC."""

    EOP = 1 << 0
    IFCS = 1 << 1
    IC = 1 << 2
    TSE = 1 << 2
    RS = 1 << 3
    DEXT = 1 << 5
    VLE = 1 << 6
    IDE = 1 << 7


class ContextCommand:
    """3.3.6.1 "TCP/UDP Offload Transmit Descriptor Command Field"."""

    TCP = 1 << 0
    IP = 1 << 1
    """The packet is IPv4, else IPv6."""
    TSE = 1 << 2


class PacketOption:
    """3.3.7.3 "TCP/IP Data Descriptor Option Field"."""

    IXSM = 1 << 0
    TXSM = 1 << 1


DTYP_CONTEXT: Final = 0
DTYP_DATA: Final = 1

_LEGACY = struct.Struct("<QHBBBBH")
_CONTEXT = struct.Struct("<BBHBBHIBBH")
_DATA = struct.Struct("<QIBBH")


class LegacyDescriptor(NamedTuple):
    """Table 3-8 "Transmit Descriptor (TDESC) Layout – Legacy Mode"."""

    address: int
    length: int
    checksum_offset: int
    command: int
    status: int
    checksum_start: int
    special: int


class ContextDescriptor(NamedTuple):
    """Table 3-13 "Transmit Descriptor (TDESC) Layout – (Type = 0000b)".

    Ends are inclusive; an end of 0 is the packet's.
    """

    ipcss: int = 0
    ipcso: int = 0
    ipcse: int = 0
    tucss: int = 0
    tucso: int = 0
    tucse: int = 0
    paylen: int = 0
    tucmd: int = 0
    hdrlen: int = 0
    mss: int = 0


class DataDescriptor(NamedTuple):
    """Table 3-17 "Transmit Descriptor (TDESC) Layout – (Type = 0001b)"."""

    address: int
    length: int
    command: int
    status: int
    options: int
    special: int


def decode_context(raw: bytes | bytearray | memoryview) -> ContextDescriptor:
    """A context descriptor's 16 bytes."""
    ipcss, ipcso, ipcse, tucss, tucso, tucse, length, _status, hdrlen, mss = _CONTEXT.unpack(raw)
    return ContextDescriptor(ipcss, ipcso, ipcse, tucss, tucso, tucse, length & 0xFFFFF, length >> 24, hdrlen, mss)


def decode_data(raw: bytes | bytearray | memoryview) -> DataDescriptor:
    """A data descriptor's 16 bytes."""
    address, length, status, options, special = _DATA.unpack(raw)
    return DataDescriptor(address, length & 0xFFFFF, length >> 24, status, options, special)


def decode_legacy(raw: bytes | bytearray | memoryview) -> LegacyDescriptor:
    """A legacy descriptor's 16 bytes."""
    return LegacyDescriptor._make(_LEGACY.unpack(raw))
