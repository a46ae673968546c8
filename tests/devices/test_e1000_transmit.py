"""Transmission by the e1000: descriptors, checksums, segmentation, interrupts. Packets are built by :mod:`packets`."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devices import packets
from tests.devices.e1000_driver import (
    DEXT,
    EOP,
    IC,
    IDE,
    IFCS,
    RS,
    TSE,
    TX_BUFFERS,
    TX_RING,
    VLE,
    Nic,
    context,
    data,
    legacy,
)
from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.regs import Ctrl, Interrupt, Tctl
from vfio_model.devices.e1000.tx import BUDGET

FRAME = packets.ethernet(bytes(range(100)), 0x88B5)
LAST = EOP | IFCS | RS
IXSM, TXSM = 1, 2
TCP_COMMAND, IP_COMMAND = 1, 2


@pytest.fixture
def nic() -> Nic:
    return Nic().up()


# -- legacy descriptors ------------------------------------------------------------------------------------------------


def test_a_frame_goes_out_and_the_descriptor_is_done(nic: Nic) -> None:
    where = nic.send(FRAME)
    assert nic.wire.sent == [FRAME] and nic.done(where) and nic.read(regs.TDH) == 1
    assert nic.read(regs.ICR) & (Interrupt.TXDW | Interrupt.TXQE) == Interrupt.TXDW | Interrupt.TXQE


def test_without_rs_nothing_is_written_back(nic: Nic) -> None:
    where = nic.send(FRAME, EOP | IFCS)
    assert nic.wire.sent == [FRAME] and not nic.done(where) and not nic.read(regs.ICR) & Interrupt.TXDW


def test_only_the_status_byte_is_written_back(nic: Nic) -> None:
    raw = legacy(nic.place(FRAME), len(FRAME), LAST, cso=7, css=9, special=0xABCD)
    (where,) = nic.transmit(raw)
    assert nic.ram[where : where + 16] == raw[:12] + b"\x01" + raw[13:]


def test_a_frame_in_pieces_is_one_frame(nic: Nic) -> None:
    nic.place(FRAME)
    parts = [legacy(TX_BUFFERS + at, 16 if at < 112 else 2, LAST if at == 112 else IFCS) for at in range(0, 113, 16)]
    nic.transmit(*parts[:3])
    assert nic.wire.sent == []
    nic.transmit(*parts[3:])
    assert nic.wire.sent == [FRAME]


def test_short_frames_are_padded_when_psp_says_so() -> None:
    short = packets.ethernet(b"x", 0x88B5)
    padded, bare = Nic().up(), Nic().up(tctl=Tctl.EN)
    padded.send(short)
    bare.send(short)
    assert padded.wire.sent == [short.ljust(60, b"\0")] and bare.wire.sent == [short]


def test_the_ring_wraps_around() -> None:
    nic = Nic(tx=8).up()
    frames = [FRAME + bytes((number,)) for number in range(50)]
    for frame in frames:
        assert nic.done(nic.send(frame))
    assert nic.wire.sent == frames and nic.read(regs.TDH) == 50 % 8


def test_a_whole_ring_is_sent_in_order() -> None:
    nic = Nic(tx=64).up()
    frames = [FRAME + bytes((number,)) for number in range(63)]
    nic.tx_tail = 40
    nic.write(regs.TDH, 40)
    nic.write(regs.TDT, 40)
    nic.transmit(
        *(legacy(nic.place(frame, TX_BUFFERS + at * 256), len(frame), LAST) for at, frame in enumerate(frames))
    )
    assert nic.wire.sent == frames


@pytest.mark.parametrize("css", [0, 14])
def test_ic_inserts_a_checksum(nic: Nic, css: int) -> None:
    frame = bytearray(FRAME)
    frame[60:62] = b"\0\0"
    nic.transmit(legacy(nic.place(bytes(frame)), len(frame), LAST | IC, cso=60, css=css))
    frame[60:62] = (packets.summed(bytes(frame[css:])) ^ 0xFFFF).to_bytes(2, "big")
    assert nic.wire.sent == [bytes(frame)]


@pytest.mark.parametrize(("css", "cso"), [(len(FRAME), 20), (14, len(FRAME) - 1), (255, 255)])
def test_a_checksum_outside_the_packet_is_not_inserted(nic: Nic, css: int, cso: int) -> None:
    nic.transmit(legacy(nic.place(FRAME), len(FRAME), LAST | IC, cso=cso, css=css))
    assert nic.wire.sent == [FRAME]


def test_vle_inserts_a_tag_when_vlans_are_on(nic: Nic) -> None:
    descriptor = legacy(nic.place(FRAME), len(FRAME), LAST | VLE, special=0x6123)
    nic.transmit(descriptor)
    nic.write(regs.CTRL, Ctrl.SLU | Ctrl.VME)
    nic.transmit(descriptor)
    assert nic.wire.sent == [FRAME, FRAME[:12] + bytes.fromhex("81006123") + FRAME[12:]]


def test_a_frame_is_lost_while_the_link_is_down(nic: Nic) -> None:
    nic.write(regs.CTRL, 0)
    assert nic.done(nic.send(FRAME)) and nic.wire.sent == []


def test_nothing_is_sent_until_the_transmitter_is_enabled() -> None:
    nic = Nic().up(tctl=0)
    nic.send(FRAME)
    assert nic.wire.sent == [] and nic.read(regs.TDH) == 0
    nic.write(regs.TCTL, Tctl.EN)
    assert nic.wire.sent == [FRAME]


def test_what_is_too_long_for_the_fifo_is_not_sent(nic: Nic) -> None:
    places = nic.transmit(legacy(TX_BUFFERS, 16000, IFCS), legacy(TX_BUFFERS, 289, LAST))
    assert nic.wire.sent == [] and nic.done(places[1])
    nic.send(FRAME)
    assert nic.wire.sent == [FRAME]


def test_a_buffer_that_cannot_be_read_spoils_its_frame_alone(nic: Nic) -> None:
    places = nic.transmit(legacy(1 << 40, 64, LAST), legacy(nic.place(FRAME), len(FRAME), LAST))
    assert nic.wire.sent == [FRAME] and all(map(nic.done, places))
    assert nic.host.trace.named("e1000_dma_error") == [{"what": "transmit buffer", "iova": 1 << 40}]


def test_more_than_a_slice_is_done_in_the_background() -> None:
    nic = Nic(tx=1024).up()
    count = BUDGET + 50
    nic.transmit(*(legacy(nic.place(FRAME), len(FRAME), LAST) for _ in range(count)))
    assert len(nic.wire.sent) == BUDGET
    nic.idle()
    assert nic.wire.sent == [FRAME] * count


def test_a_reset_ends_what_is_left_for_the_background() -> None:
    nic = Nic(tx=1024).up()
    nic.transmit(*(legacy(nic.place(FRAME), len(FRAME), LAST) for _ in range(BUDGET + 50)))
    nic.write(regs.CTRL, Ctrl.RST)
    nic.idle()
    assert len(nic.wire.sent) == BUDGET


# -- interrupts --------------------------------------------------------------------------------------------------------


def test_ide_waits_for_quiet_but_not_for_ever(nic: Nic) -> None:
    nic.write(regs.TIDV, 10)
    nic.write(regs.TADV, 25)
    nic.write(regs.IMS, Interrupt.TXDW)
    for _ in range(4):
        assert nic.done(nic.send(FRAME, LAST | IDE))
        nic.idle(8 * 1024)
        raised = nic.host.signals == ["raise"]
    assert raised and nic.read(regs.ICR) & Interrupt.TXDW
    nic.send(FRAME, LAST | IDE)
    nic.idle(10 * 1024 - 1)
    assert not nic.read(regs.ICR) & Interrupt.TXDW
    nic.idle(1)
    assert nic.read(regs.ICR) & Interrupt.TXDW


def test_a_descriptor_without_ide_tells_of_those_that_waited(nic: Nic) -> None:
    nic.write(regs.TIDV, 10)
    nic.send(FRAME, LAST | IDE)
    assert not nic.read(regs.ICR) & Interrupt.TXDW
    nic.send(FRAME, LAST)
    assert nic.read(regs.ICR) & Interrupt.TXDW
    nic.idle()
    assert not nic.read(regs.ICR) & Interrupt.TXDW


def test_txd_low_when_few_descriptors_are_left(nic: Nic) -> None:
    nic.write(regs.TXDCTL, 1 << regs.TXDCTL_LWTHRESH_SHIFT)
    nic.send(FRAME)
    assert not nic.read(regs.ICR) & Interrupt.TXD_LOW
    nic.transmit(*(legacy(nic.place(FRAME), len(FRAME), LAST) for _ in range(9)))
    assert nic.read(regs.ICR) & Interrupt.TXD_LOW


# -- checksums ---------------------------------------------------------------------------------------------------------


def without_checksums(protocol: int, segment: bytes, *, version: int = 4) -> bytes:
    """A packet as a kernel hands it over: no IP checksum, the pseudo header's sum in the transport's."""
    at = 16 if protocol == packets.TCP else 6
    partial = packets.summed(packets.pseudo(protocol, len(segment), version=version))
    segment = segment[:at] + struct.pack(">H", partial) + segment[at + 2 :]
    if version == 6:
        return packets.ethernet(packets.ipv6(protocol, segment), 0x86DD)
    packet = packets.ipv4(protocol, segment)
    return packets.ethernet(packet[:10] + b"\0\0" + packet[12:], 0x0800)


@pytest.mark.parametrize("payload", [b"", b"odd", bytes(range(256)) * 4])
def test_tcp_and_ip_checksums_are_filled_in(nic: Nic, payload: bytes) -> None:
    frame = without_checksums(packets.TCP, packets.tcp(payload))
    nic.transmit(
        context(command=TCP_COMMAND | IP_COMMAND),
        data(nic.place(frame), len(frame), LAST, options=IXSM | TXSM),
    )
    expected = packets.ethernet(packets.ipv4(packets.TCP, packets.tcp(payload)), 0x0800)
    assert nic.wire.sent == [expected.ljust(60, b"\0")]


def test_udp_over_ipv6(nic: Nic) -> None:
    frame = without_checksums(packets.UDP, packets.udp(b"hello", version=6), version=6)
    nic.transmit(context(tu=(54, 60, 0)), data(nic.place(frame), len(frame), LAST, options=TXSM))
    assert nic.wire.sent == [packets.ethernet(packets.ipv6(packets.UDP, packets.udp(b"hello", version=6)), 0x86DD)]


def test_a_udp_checksum_is_never_zero(nic: Nic) -> None:
    frame = bytearray(without_checksums(packets.UDP, packets.udp(b"\0\0")))
    frame[42:44] = (packets.summed(bytes(frame[34:])) ^ 0xFFFF).to_bytes(2, "big")
    nic.transmit(context(tu=(34, 40, 0)), data(nic.place(bytes(frame)), len(frame), LAST, options=TXSM))
    assert nic.wire.sent[0][40:42] == b"\xff\xff"


def test_without_options_nothing_is_changed_and_the_first_descriptor_decides(nic: Nic) -> None:
    frame = without_checksums(packets.TCP, packets.tcp(b"payload" * 10))
    start = nic.place(frame)
    nic.transmit(
        context(command=TCP_COMMAND | IP_COMMAND),
        data(start, 54, IFCS, options=0),
        data(start + 54, len(frame) - 54, LAST, options=IXSM | TXSM),
    )
    assert nic.wire.sent == [frame]


def test_a_context_stays_until_the_next(nic: Nic) -> None:
    frame = without_checksums(packets.TCP, packets.tcp(b"again" * 9))
    nic.transmit(context(command=TCP_COMMAND | IP_COMMAND))
    for _ in range(2):
        nic.transmit(data(nic.place(frame), len(frame), LAST, options=IXSM | TXSM))
    expected = packets.ethernet(packets.ipv4(packets.TCP, packets.tcp(b"again" * 9)), 0x0800)
    assert nic.wire.sent == [expected] * 2


def test_a_context_descriptor_that_asks_for_it_is_done(nic: Nic) -> None:
    (where,) = nic.transmit(context(command=RS))
    assert nic.done(where) and nic.wire.sent == []


# -- segmentation ------------------------------------------------------------------------------------------------------


def prototype(version: int, payload: bytes, options: bytes, flags: int, *, protocol: int = packets.TCP) -> bytes:
    """What a kernel hands over to be cut: lengths zero, the pseudo header's sum without the length."""
    if protocol == packets.TCP:
        segment = packets.tcp(payload, sequence=0xFFFFFF00, flags=flags, options=options, check=False)
        at = 16
    else:
        segment, at = packets.udp(payload, check=False), 6
    partial = packets.summed(packets.pseudo(protocol, 0, version=version))
    segment = segment[:at] + struct.pack(">H", partial) + segment[at + 2 :]
    if version == 6:
        packet = packets.ipv6(protocol, segment)
        return packets.ethernet(packet[:4] + b"\0\0" + packet[6:], 0x86DD)
    packet = packets.ipv4(protocol, segment, identification=0xFFFE)
    return packets.ethernet(packet[:2] + b"\0\0" + packet[4:10] + b"\0\0" + packet[12:], 0x0800)


def reference(version: int, payload: bytes, options: bytes, flags: int, mss: int) -> list[bytes]:
    """The same data, sent segment by segment by a TCP that cuts for itself."""
    frames = []
    for number, at in enumerate(range(0, max(len(payload), 1), mss)):
        last = at + mss >= len(payload)
        segment = packets.tcp(
            payload[at : at + mss],
            sequence=(0xFFFFFF00 + at) & 0xFFFFFFFF,
            flags=flags if last else flags & ~0x09,
            version=version,
            options=options,
        )
        if version == 6:
            frame = packets.ethernet(packets.ipv6(packets.TCP, segment), 0x86DD)
        else:
            identification = (0xFFFE + number) & 0xFFFF
            frame = packets.ethernet(packets.ipv4(packets.TCP, segment, identification=identification), 0x0800)
        frames.append(frame.ljust(60, b"\0"))
    return frames


def tso(nic: Nic, version: int, frame: bytes, options: bytes, mss: int, cuts: list[int], command: int = TSE) -> None:
    ip_end = 34 if version == 4 else 54
    header = ip_end + 20 + len(options)
    bounds = [0, *sorted(cut % len(frame) for cut in cuts), len(frame)]
    start = nic.place(frame)
    kind = TSE | TCP_COMMAND | (IP_COMMAND if version == 4 else 0)
    tu, paylen = (ip_end, ip_end + 16, 0), len(frame) - header
    pieces = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
    nic.transmit(
        context(tu=tu, command=kind, paylen=paylen, hdrlen=header, mss=mss),
        *(
            data(
                start + a, b - a, command | IFCS | (EOP | RS if b == len(frame) else 0), options=IXSM | TXSM, special=5
            )
            if version == 4
            else data(start + a, b - a, command | IFCS | (EOP | RS if b == len(frame) else 0), options=TXSM, special=5)
            for a, b in pieces
        ),
    )


@settings(max_examples=60, deadline=None)
@given(
    version=st.sampled_from([4, 6]),
    payload=st.binary(max_size=9000),
    words=st.integers(0, 10),
    flags=st.integers(0, 255),
    mss=st.integers(200, 1460),
    cuts=st.lists(st.integers(0, 10000), max_size=6),
)
def test_segments_are_those_of_a_tcp_that_cuts_for_itself(
    version: int, payload: bytes, words: int, flags: int, mss: int, cuts: list[int]
) -> None:
    nic = Nic().up()
    options = bytes(range(1, 4 * words + 1))
    tso(nic, version, prototype(version, payload, options, flags), options, mss, cuts)
    nic.idle()
    assert nic.wire.sent == reference(version, payload, options, flags, mss)
    assert nic.read(regs.TSCTC) == 1 and nic.read(regs.TSCTFC) == 0


def test_segments_carry_the_tag_of_the_first_descriptor(nic: Nic) -> None:
    nic.write(regs.CTRL, Ctrl.SLU | Ctrl.VME)
    tso(nic, 4, prototype(4, bytes(3000), b"", 0x10), b"", 1000, [], command=TSE | VLE)
    assert [frame[12:16].hex() for frame in nic.wire.sent] == ["81000005"] * 3


def test_udp_datagrams_are_cut_with_their_own_lengths(nic: Nic) -> None:
    frame = prototype(4, bytes(range(250)), b"", 0, protocol=packets.UDP)
    nic.transmit(
        context(tu=(34, 40, 0), command=TSE | IP_COMMAND, paylen=250, hdrlen=42, mss=100),
        data(nic.place(frame), len(frame), LAST | TSE, options=IXSM | TXSM),
    )
    expected = [
        packets.ethernet(
            packets.ipv4(
                packets.UDP, packets.udp(bytes(range(250))[at : at + 100]), identification=(0xFFFE + at // 100) & 0xFFFF
            ),
            0x0800,
        )
        for at in (0, 100, 200)
    ]
    assert nic.wire.sent == expected


def test_many_small_segments_are_sent_in_slices(nic: Nic) -> None:
    frame = prototype(4, bytes(1000), b"", 0x10)
    tso(nic, 4, frame, b"", 1, [])
    assert 0 < len(nic.wire.sent) < BUDGET
    nic.idle()
    assert len(nic.wire.sent) == 1000


@pytest.mark.parametrize(("hdrlen", "mss", "paylen"), [(54, 0, 946), (255, 100, 10), (54, 100, 947)])
def test_a_segmentation_that_does_not_work_out_is_counted(nic: Nic, hdrlen: int, mss: int, paylen: int) -> None:
    size = 1000 if hdrlen == 54 else 200
    nic.transmit(
        context(command=TSE | TCP_COMMAND | IP_COMMAND, hdrlen=hdrlen, mss=mss, paylen=paylen),
        data(TX_BUFFERS, size, LAST | TSE),
    )
    assert nic.read(regs.TSCTFC) == 1 and bool(nic.wire.sent) == (paylen == 947)
    nic.wire.sent.clear()
    nic.send(FRAME)
    assert nic.wire.sent == [FRAME]


# -- statistics --------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_counted_and_reading_clears(nic: Nic) -> None:
    for size, to in ((60, packets.HOST_B), (61, packets.BROADCAST), (1514, bytes.fromhex("01005e000001"))):
        nic.send(packets.ethernet(bytes(size - 14), 0x88B5, to=to))
    counted = [nic.read(at) for at in (regs.TPT, regs.GPTC, regs.BPTC, regs.MPTC)]
    assert counted == [3, 3, 1, 1]
    assert [nic.read(regs.PTC64 + at) for at in range(0, 24, 4)] == [1, 1, 0, 0, 0, 1]
    octets = 60 + 61 + 1514 + 12
    assert nic.read(regs.GOTCL) == octets and nic.read(regs.GOTCL) == octets
    assert nic.read(regs.GOTCL + 4) == 0 and nic.read(regs.GOTCL) == 0
    assert nic.read(regs.TOTL) == octets and nic.read(regs.TPT) == 0


def test_counters_stick_at_their_largest_value(nic: Nic) -> None:
    nic.device.registers[regs.GPTC] = 0xFFFFFFFF
    nic.device.registers[regs.GOTCL] = nic.device.registers[regs.GOTCL + 4] = 0xFFFFFFFF
    nic.send(FRAME)
    assert nic.read(regs.GPTC) == 0xFFFFFFFF and nic.read(regs.GOTCL, 8) == 0xFFFFFFFF_FFFFFFFF


# -- rings that a guest should not make --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "head", "tail"), [(0, 0, 5), (128, 0, 8), (128, 9, 3), (128, 0xFFFF, 0xFFFF), (0xFFFFFFFF, 0, 0xFFFF)]
)
def test_a_ring_that_makes_no_sense_sends_nothing(length: int, head: int, tail: int) -> None:
    nic = Nic().up()
    nic.write(regs.TDBAL, TX_RING)
    nic.write(regs.TDLEN, length)
    nic.write(regs.TDH, head)
    nic.write(regs.TDT, tail)
    nic.idle()
    assert nic.wire.sent == []


def test_a_ring_outside_memory_stops_until_it_is_moved(nic: Nic) -> None:
    nic.write(regs.TDBAH, 0x100)
    nic.send(FRAME)
    assert nic.read(regs.TDH) == 0 and nic.host.trace.named("e1000_dma_error")
    nic.write(regs.TDBAH, 0)
    nic.kick()
    assert nic.wire.sent == [FRAME]


def test_a_tail_that_goes_back_takes_descriptors_back(nic: Nic) -> None:
    nic.write(regs.TCTL, 0)
    nic.send(FRAME)
    nic.write(regs.TDT, 0)
    nic.tx_tail = 0
    nic.write(regs.TCTL, Tctl.EN)
    assert nic.wire.sent == []
    nic.send(FRAME[::-1])
    assert nic.wire.sent == [FRAME[::-1]]


def test_unknown_descriptor_types_are_passed_over(nic: Nic) -> None:
    raw = struct.pack("<QIBBH", TX_BUFFERS, 100 | 7 << 20 | (LAST | DEXT) << 24, 0, 0, 0)
    (where,) = nic.transmit(raw)
    assert nic.done(where) and nic.wire.sent == []
