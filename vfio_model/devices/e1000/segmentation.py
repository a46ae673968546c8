"""What an 82540EM does to a packet before it leaves: checksums, and TCP segmentation (manual 3.5 "TCP Segmentation",
3.6 "IP/TCP/UDP Transmit Checksum Offloading").

A context descriptor says where the headers are. Segmentation repeats the first HDRLEN bytes before every MSS bytes of
the rest and brings lengths, the IPv4 identification, the sequence number and the flags up to date. Offsets that lie
outside the packet leave it as it is: they are the guest's.
"""

from __future__ import annotations

from vfio_model.devices.e1000.descriptors import ContextCommand, ContextDescriptor, PacketOption
from vfio_model.devices.ethernet.checksum import add, ones_sum

_IPV4_LENGTH, _IPV4_IDENTIFICATION = 2, 4
_IPV6_LENGTH, _IPV6_HEADER = 4, 40
_TCP_SEQUENCE, _TCP_FLAGS = 4, 13
_UDP_LENGTH = 4
_TCP_FIN_PSH = 0x01 | 0x08


def insert_checksum(packet: bytearray, start: int, end: int, at: int, *, zero: bool = True) -> None:
    """Put the checksum of ``packet[start : end + 1]`` (``end`` 0: to the end) at ``at``.

    What is in the field counts: software leaves zero or the pseudo header's sum there. Without ``zero`` a checksum of
    zero is written as its other form.
    """
    stop = end + 1 if end else len(packet)
    if start >= len(packet) or at + 2 > len(packet) or stop <= start:
        return
    value = ones_sum(packet[start:stop]) ^ 0xFFFF
    packet[at : at + 2] = (value if value or zero else 0xFFFF).to_bytes(2, "big")


def offload(packet: bytearray, context: ContextDescriptor, options: int) -> None:
    """The checksums that ``options`` (:class:`PacketOption`) asks for, where ``context`` says."""
    if options & PacketOption.TXSM:
        tcp = bool(context.tucmd & ContextCommand.TCP)
        insert_checksum(packet, context.tucss, context.tucse, context.tucso, zero=tcp)
    if options & PacketOption.IXSM:
        insert_checksum(packet, context.ipcss, context.ipcse, context.ipcso)


def segment_count(length: int, context: ContextDescriptor) -> int:
    """Into how many frames a packet of ``length`` bytes goes; 0 when it is shorter than its headers or MSS is 0."""
    if not context.mss or length < context.hdrlen:
        return 0
    return max(1, -(-(length - context.hdrlen) // context.mss))


def segment(packet: bytes | bytearray, context: ContextDescriptor, options: int, index: int) -> bytearray:
    """Frame ``index`` of those that ``packet`` is cut into."""
    done = index * context.mss
    start = context.hdrlen + done
    last = start + context.mss >= len(packet)
    frame = bytearray(packet[: context.hdrlen]) + packet[start : start + context.mss]
    if context.tucmd & ContextCommand.IP:
        _put16(frame, context.ipcss + _IPV4_LENGTH, len(frame) - context.ipcss)
        identification = context.ipcss + _IPV4_IDENTIFICATION
        _put16(frame, identification, _get16(frame, identification) + index)
    else:
        _put16(frame, context.ipcss + _IPV6_LENGTH, len(frame) - context.ipcss - _IPV6_HEADER)
    transport = len(frame) - context.tucss
    if context.tucmd & ContextCommand.TCP:
        _tcp(frame, context.tucss, done, last=last)
    else:
        _put16(frame, context.tucss + _UDP_LENGTH, transport)
    if options & PacketOption.TXSM and transport > 0:
        # Software left the pseudo header's sum without the length there.
        _put16(frame, context.tucso, add(_get16(frame, context.tucso), transport & 0xFFFF))
    offload(frame, context, options)
    return frame


def _tcp(frame: bytearray, start: int, done: int, *, last: bool) -> None:
    sequence = start + _TCP_SEQUENCE
    if start + _TCP_FLAGS >= len(frame):
        return
    number = int.from_bytes(frame[sequence : sequence + 4], "big") + done
    frame[sequence : sequence + 4] = (number & 0xFFFFFFFF).to_bytes(4, "big")
    if not last:
        frame[start + _TCP_FLAGS] &= ~_TCP_FIN_PSH & 0xFF


def _get16(frame: bytearray, at: int) -> int:
    return int.from_bytes(frame[at : at + 2], "big")


def _put16(frame: bytearray, at: int, value: int) -> None:
    if at + 2 <= len(frame):
        frame[at : at + 2] = (value & 0xFFFF).to_bytes(2, "big")
