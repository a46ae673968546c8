"""Packets, built field by field, with checksums summed word by word: what the models' short cuts are compared with."""

from __future__ import annotations

import struct

HOST_A, HOST_B = bytes.fromhex("525400123456"), bytes.fromhex("525400abcdef")
BROADCAST = b"\xff" * 6
IP_A, IP_B = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
IP6_A, IP6_B = bytes.fromhex("fd" + "00" * 14 + "01"), bytes.fromhex("fd" + "00" * 14 + "02")
TCP, UDP = 6, 17


def summed(data: bytes) -> int:
    """RFC 1071, one word at a time."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | data[at + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ethernet(payload: bytes, ethertype: int, *, to: bytes = HOST_A, source: bytes = HOST_B) -> bytes:
    return to + source + struct.pack(">H", ethertype) + payload


def ipv4(protocol: int, payload: bytes, *, identification: int = 0, options: bytes = b"", fragment: int = 0) -> bytes:
    length = 20 + len(options) + len(payload)
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x40 | (20 + len(options)) // 4,
        0,
        length,
        identification,
        fragment,
        64,
        protocol,
        0,
        IP_A,
        IP_B,
    )
    header += options
    return header[:10] + struct.pack(">H", summed(header) ^ 0xFFFF) + header[12:] + payload


def ipv6(protocol: int, payload: bytes) -> bytes:
    return struct.pack(">IHBB16s16s", 6 << 28, len(payload), protocol, 64, IP6_A, IP6_B) + payload


def pseudo(protocol: int, length: int, *, version: int = 4) -> bytes:
    if version == 4:
        return IP_A + IP_B + struct.pack(">BBH", 0, protocol, length)
    return IP6_A + IP6_B + struct.pack(">IxxxB", length, protocol)


def tcp(
    payload: bytes, *, sequence: int = 0, flags: int = 0x10, version: int = 4, options: bytes = b"", check: bool = True
) -> bytes:
    offset = (20 + len(options)) // 4 << 4
    header = struct.pack(">HHIIBBHHH", 1000, 2000, sequence, 77, offset, flags, 512, 0, 0) + options
    whole = header + payload
    value = summed(pseudo(TCP, len(whole), version=version) + whole) ^ 0xFFFF if check else 0
    return whole[:16] + struct.pack(">H", value) + whole[18:]


def udp(payload: bytes, *, check: bool = True, version: int = 4) -> bytes:
    whole = struct.pack(">HHHH", 1000, 2000, 8 + len(payload), 0) + payload
    value = (summed(pseudo(UDP, len(whole), version=version) + whole) ^ 0xFFFF or 0xFFFF) if check else 0
    return whole[:6] + struct.pack(">H", value) + whole[8:]
