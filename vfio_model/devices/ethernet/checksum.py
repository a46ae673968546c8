"""The Internet checksum (RFC 1071), and whether the checksums in a received frame are right.

Sums are ones' complement sums of big-endian 16-bit words, an odd last byte padded with zero. 65536 is 1 modulo 65535,
so the words of a buffer add up to the buffer as one number modulo 65535.
"""

from __future__ import annotations

from typing import NamedTuple

Bytes = bytes | bytearray | memoryview

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
ETHERTYPE_VLAN = 0x8100
ETHERNET_HEADER = 14
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17

_IPV4_HEADER = 20
_IPV6_HEADER = 40
_CHECKSUM_AT = {PROTOCOL_TCP: (16, 20), PROTOCOL_UDP: (6, 8)}
"""Offset of the checksum in a transport header, and the least length of that header (RFC 9293 3.1, RFC 768)."""


def ones_sum(data: Bytes) -> int:
    """The 16-bit ones' complement sum of ``data``; 0 only when every byte is."""
    number = int.from_bytes(data, "big") << (len(data) & 1) * 8
    return number % 0xFFFF or (0xFFFF if number else 0)


def add(left: int, right: int) -> int:
    """The ones' complement sum of two sums."""
    total = left + right
    return (total & 0xFFFF) + (total >> 16)


def checksum(data: Bytes) -> int:
    """The complement of the sum: what goes into a checksum field that was zero."""
    return ones_sum(data) ^ 0xFFFF


class Verdict(NamedTuple):
    """What was checked of a frame, and what was found; None: not there, or cannot be checked."""

    ip: bool | None
    """The IPv4 header's checksum."""
    transport: bool | None
    """The TCP or UDP checksum."""
    protocol: int = 0
    """The transport's protocol number, when :attr:`transport` is not None."""


NOTHING = Verdict(None, None)


def check(frame: Bytes, start: int = ETHERNET_HEADER) -> Verdict:
    """Check a frame whose EtherType ends at ``start``.

    Lengths in the headers are not trusted: what they say that is not there was not checked. Fragments, UDP without a
    checksum and IPv6 extension headers are not checked.
    """
    packet = memoryview(frame)[start:]
    ethertype = int.from_bytes(frame[start - 2 : start], "big")
    if ethertype == ETHERTYPE_IPV4:
        return _check_ipv4(packet)
    if ethertype == ETHERTYPE_IPV6:
        return _check_ipv6(packet)
    return NOTHING


def _check_ipv4(packet: memoryview) -> Verdict:
    if len(packet) < _IPV4_HEADER or packet[0] >> 4 != 4:
        return NOTHING
    header = (packet[0] & 15) * 4
    total = int.from_bytes(packet[2:4], "big")
    if header < _IPV4_HEADER or len(packet) < header:
        return NOTHING
    good = ones_sum(packet[:header]) == 0xFFFF
    fragment = int.from_bytes(packet[6:8], "big") & 0x3FFF
    if fragment or not header <= total <= len(packet):
        return Verdict(good, None)
    segment = packet[header:total]
    return _check_transport(segment, packet[9], ones_sum(packet[12:20]), good)


def _check_ipv6(packet: memoryview) -> Verdict:
    if len(packet) < _IPV6_HEADER or packet[0] >> 4 != 6:
        return NOTHING
    length = int.from_bytes(packet[4:6], "big")
    if length > len(packet) - _IPV6_HEADER:
        return NOTHING
    segment = packet[_IPV6_HEADER : _IPV6_HEADER + length]
    return _check_transport(segment, packet[6], ones_sum(packet[8:40]), None)


def _check_transport(segment: memoryview, protocol: int, addresses: int, ip: bool | None) -> Verdict:
    if protocol not in _CHECKSUM_AT:
        return Verdict(ip, None)
    at, least = _CHECKSUM_AT[protocol]
    if len(segment) < least:
        return Verdict(ip, None)
    if protocol == PROTOCOL_UDP:
        length = int.from_bytes(segment[4:6], "big")
        if not any(segment[at : at + 2]) or not least <= length <= len(segment):
            return Verdict(ip, None)
        segment = segment[:length]
    pseudo = add(add(addresses, protocol), len(segment))
    return Verdict(ip, add(pseudo, ones_sum(segment)) == 0xFFFF, protocol)
