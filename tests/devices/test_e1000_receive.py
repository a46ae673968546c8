"""Reception by the e1000: filters, buffers, checksums, interrupts. Packets are built by :mod:`packets`."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devices import packets
from tests.devices.e1000_driver import RX_BUFFERS, RX_RING, Nic
from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.descriptors import RxError, RxStatus
from vfio_model.devices.e1000.regs import Ctrl, Interrupt, Rctl, Rxcsum

FRAME = packets.ethernet(bytes(range(100)), 0x88B5)
EN = Rctl.EN | Rctl.SECRC
MULTICAST = bytes.fromhex("01005e010203")
CHECKS = Rxcsum.IPOFLD | Rxcsum.TUOFLD
CHECKED = RxStatus.IPCS | RxStatus.TCPCS | RxStatus.IXSM


def one(nic: Nic, frame: bytes) -> tuple[bytes, int, int]:
    nic.wire.deliver(frame)
    (received,) = nic.poll()
    return received.frame, received.status, received.errors


def test_a_frame_arrives_in_the_first_buffer() -> None:
    nic = Nic().up()
    nic.write(regs.IMS, Interrupt.RXT0)
    nic.wire.deliver(FRAME)
    assert nic.host.signals == ["raise"] and nic.read(regs.ICR) & Interrupt.RXT0
    (received,) = nic.poll()
    assert received.frame == FRAME and nic.read(regs.RDH) == 1
    assert received.status == RxStatus.DD | RxStatus.EOP | RxStatus.IXSM and received.errors == 0


def test_short_frames_were_padded_on_the_wire() -> None:
    short = packets.ethernet(b"tiny", 0x88B5)
    assert one(Nic().up(), short)[0] == short.ljust(60, b"\0")


def test_the_check_sequence_is_there_unless_it_is_stripped() -> None:
    frame = one(Nic().up(rctl=Rctl.EN), FRAME)[0]
    assert frame == FRAME + zlib.crc32(FRAME).to_bytes(4, "little")


def test_the_packet_checksum_is_the_sum_from_pcss_on() -> None:
    nic = Nic().up()
    for start in (0, 14, 15):
        nic.write(regs.RXCSUM, start)
        nic.wire.deliver(FRAME)
        (received,) = nic.poll()
        assert received.checksum == packets.summed(FRAME[start:])


# -- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "rctl", "passes", "inexact"),
    [
        (packets.HOST_A, EN, True, False),
        (packets.HOST_B, EN, False, False),
        (packets.HOST_B, EN | Rctl.UPE, True, True),
        (packets.BROADCAST, EN, False, False),
        (packets.BROADCAST, EN | Rctl.BAM, True, False),
        (packets.BROADCAST, EN | Rctl.MPE, True, True),
        (MULTICAST, EN, False, False),
        (MULTICAST, EN | Rctl.MPE, True, True),
        (MULTICAST, EN | Rctl.UPE, False, False),
    ],
)
def test_addresses_pass_as_rctl_says(to: bytes, rctl: int, passes: bool, inexact: bool) -> None:
    nic = Nic().up(rctl=rctl)
    nic.wire.deliver(packets.ethernet(bytes(50), 0x88B5, to=to))
    received = nic.poll()
    assert bool(received) == passes and nic.wire.waiting == []
    assert not passes or bool(received[0].status & RxStatus.PIF) == inexact


def test_every_receive_address_counts_while_it_is_valid() -> None:
    nic = Nic().up(rctl=EN)
    for index, to in ((15, packets.HOST_B), (7, MULTICAST)):
        nic.write(regs.RAL + index * 8, int.from_bytes(to[:4], "little"))
        nic.write(regs.RAH + index * 8, int.from_bytes(to[4:], "little"))
        nic.wire.deliver(packets.ethernet(bytes(50), 0x88B5, to=to))
        assert nic.poll() == []
        nic.write(regs.RAH + index * 8, regs.RAH_AV | int.from_bytes(to[4:], "little"))
        nic.wire.deliver(packets.ethernet(bytes(50), 0x88B5, to=to))
        assert len(nic.poll()) == 1


def test_an_entry_may_compare_the_source() -> None:
    nic = Nic().up(rctl=EN)
    source = bytes.fromhex("020000000099")
    nic.write(regs.RAL + 8, int.from_bytes(source[:4], "little"))
    nic.write(regs.RAH + 8, regs.RAH_AV | 1 << 16 | int.from_bytes(source[4:], "little"))
    nic.wire.deliver(packets.ethernet(bytes(50), 0x88B5, to=packets.HOST_B, source=source))
    assert len(nic.poll()) == 1


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_the_multicast_table_is_indexed_by_twelve_bits_of_the_address(offset: int) -> None:
    number = int.from_bytes(MULTICAST, "little")
    index = number >> (36, 35, 34, 32)[offset] & 0xFFF
    nic = Nic().up(rctl=EN | offset << regs.RCTL_MO_SHIFT)
    nic.write(regs.MTA + (index >> 5) * 4, ~(1 << (index & 31)))
    nic.wire.deliver(packets.ethernet(bytes(50), 0x88B5, to=MULTICAST))
    assert nic.poll() == []
    nic.write(regs.MTA + (index >> 5) * 4, 1 << (index & 31))
    nic.wire.deliver(packets.ethernet(bytes(50), 0x88B5, to=MULTICAST))
    assert nic.poll()[0].status & RxStatus.PIF


def tagged(tag: int, ethertype: int = 0x8100) -> bytes:
    return FRAME[:12] + ethertype.to_bytes(2, "big") + tag.to_bytes(2, "big") + FRAME[12:]


def test_tags_are_stripped_when_vlans_are_on() -> None:
    nic = Nic().up()
    assert one(nic, tagged(0x6123))[0] == tagged(0x6123)
    nic.write(regs.CTRL, Ctrl.SLU | Ctrl.VME)
    nic.wire.deliver(tagged(0x6123), FRAME, tagged(7, 0x88A8))
    stripped, plain, other = nic.poll()
    assert (stripped.frame, stripped.special) == (FRAME, 0x6123) and stripped.status & RxStatus.VP
    assert plain.frame == FRAME and not plain.status & RxStatus.VP and other.frame == tagged(7, 0x88A8)
    nic.write(regs.VET, 0x88A8)
    nic.wire.deliver(tagged(7, 0x88A8))
    assert nic.poll()[0].special == 7


def test_the_vlan_table_decides_when_it_is_asked() -> None:
    nic = Nic().up(rctl=EN | Rctl.VFE)
    nic.write(regs.VFTA + (0x123 >> 5) * 4, 1 << (0x123 & 31))
    nic.wire.deliver(tagged(0x123), tagged(0x124), tagged(0xE123), FRAME)
    assert [each.frame for each in nic.poll()] == [tagged(0x123), tagged(0xE123), FRAME]
    nic.write(regs.RCTL, EN | Rctl.VFE | Rctl.CFIEN)
    nic.wire.deliver(tagged(0x123), tagged(0x1123))
    assert [each.frame for each in nic.poll()] == [tagged(0x123)]


def test_pause_frames_are_discarded_when_dpf_says_so() -> None:
    pause = packets.ethernet(b"\0\x01\xff\xff" + bytes(42), 0x8808, to=bytes.fromhex("0180c2000001"))
    nic = Nic().up(rctl=EN | Rctl.MPE)
    nic.wire.deliver(pause)
    nic.write(regs.RCTL, EN | Rctl.MPE | Rctl.DPF)
    nic.wire.deliver(pause)
    assert [each.frame for each in nic.poll()] == [pause]


@pytest.mark.parametrize(
    ("size", "rctl", "passes"),
    [
        (1518, EN, True),
        (1519, EN, False),
        (1519, EN | Rctl.SBP, True),
        (16380, EN | Rctl.LPE, True),
        (16381, EN | Rctl.LPE, False),
        (16381, EN | Rctl.LPE | Rctl.SBP, False),
    ],
)
def test_frames_may_be_so_long(size: int, rctl: int, passes: bool) -> None:
    frame = packets.ethernet(bytes(number & 0xFF for number in range(size - 14)), 0x88B5)
    nic = Nic().up(rctl=rctl)
    nic.wire.deliver(frame)
    assert [each.frame for each in nic.poll()] == [frame] * passes
    assert nic.read(regs.ROC) == (0 if passes and not rctl & Rctl.SBP else 1)


def test_what_comes_while_nobody_listens_is_lost() -> None:
    nic = Nic().up(rctl=0)
    nic.wire.deliver(FRAME)
    nic.write(regs.RCTL, EN)
    nic.write(regs.CTRL, 0)
    nic.wire.deliver(FRAME)
    nic.write(regs.CTRL, Ctrl.SLU)
    nic.wire.deliver(b"short", b"")
    assert nic.poll() == [] and nic.wire.waiting == []


# -- buffers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rctl", [0 << 16, 1 << 16, 2 << 16, 3 << 16, Rctl.BSEX | 3 << 16])
def test_a_frame_takes_as_many_buffers_as_it_needs(rctl: int) -> None:
    size = 4096 if rctl & Rctl.BSEX else 2048 >> (rctl >> 16)
    frame = packets.ethernet(bytes(number * 7 & 0xFF for number in range(5000)), 0x88B5)
    nic = Nic().up(rctl=EN | Rctl.LPE | rctl)
    for index in range(nic.rx_count):
        nic.put_rx(index, RX_BUFFERS + index * 4096)
    nic.wire.deliver(frame)
    assert nic.read(regs.RDH) == -(-len(frame) // size)
    statuses = [nic.ram[RX_RING + index * 16 + 12] for index in range(nic.read(regs.RDH))]
    assert statuses == [RxStatus.DD] * (len(statuses) - 1) + [RxStatus.DD | RxStatus.EOP | RxStatus.IXSM]
    assert [each.frame for each in nic.poll()] == [frame]


def test_a_frame_waits_for_buffers_and_comes_when_they_are_back() -> None:
    nic = Nic(rx=8).up()
    frames = [FRAME + bytes((number,)) for number in range(10)]
    nic.wire.deliver(*frames)
    assert len(nic.wire.waiting) == 3 and nic.read(regs.RNBC) == 1
    assert nic.read(regs.ICR) & (Interrupt.RXO | Interrupt.RXT0) == Interrupt.RXO | Interrupt.RXT0
    assert [each.frame for each in nic.poll()] == frames and nic.wire.waiting == []


def test_a_frame_that_no_ring_of_this_size_can_hold_is_missed() -> None:
    nic = Nic(rx=8).up(rctl=EN | Rctl.LPE | 3 << 16)
    nic.wire.deliver(packets.ethernet(bytes(2000), 0x88B5), FRAME)
    assert [each.frame for each in nic.poll()] == [FRAME] and nic.read(regs.MPC) == 1


def test_descriptors_without_a_buffer_are_passed() -> None:
    nic = Nic().up()
    nic.put_rx(0, 0)
    nic.wire.deliver(FRAME)
    assert nic.ram[RX_RING + 12] == RxStatus.DD and [each.frame for each in nic.poll()] == [FRAME]


def test_a_ring_of_descriptors_without_buffers_loses_frames() -> None:
    nic = Nic(rx=256).up()
    for index in range(256):
        nic.put_rx(index, 0)
    nic.wire.deliver(FRAME, FRAME)
    assert nic.wire.waiting == [] and nic.read(regs.RDH) == 0 and nic.read(regs.MPC) == 2


def test_a_ring_outside_memory_loses_frames() -> None:
    nic = Nic().up()
    nic.write(regs.RDBAH, 0x100)
    nic.wire.deliver(FRAME)
    assert nic.wire.waiting == [] and nic.read(regs.RDH) == 0 and nic.host.trace.named("e1000_dma_error")


def test_a_buffer_outside_memory_loses_its_bytes_alone() -> None:
    nic = Nic().up()
    nic.put_rx(0, 1 << 40)
    nic.wire.deliver(FRAME, FRAME)
    assert nic.ram[RX_RING + 12] & RxStatus.DD and nic.ram[RX_BUFFERS + 2048 :][: len(FRAME)] == FRAME


@pytest.mark.parametrize(("length", "head", "tail"), [(0, 0, 7), (128, 0, 8), (128, 8, 0), (128, 3, 3)])
def test_a_ring_that_makes_no_sense_takes_nothing(length: int, head: int, tail: int) -> None:
    nic = Nic().up()
    nic.write(regs.RDLEN, length)
    nic.write(regs.RDH, head)
    nic.write(regs.RDT, tail)
    nic.wire.deliver(FRAME)
    assert nic.wire.waiting == [FRAME] and nic.read(regs.RDH) == head


# -- checksums ---------------------------------------------------------------------------------------------------------


def ip4(segment: bytes, protocol: int = packets.TCP, fragment: int = 0) -> bytes:
    return packets.ethernet(packets.ipv4(protocol, segment, fragment=fragment), 0x0800)


def flipped(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes((frame[at] ^ 0x10,)) + frame[at + 1 :]


@pytest.mark.parametrize(
    ("frame", "status", "errors"),
    [
        (ip4(packets.tcp(b"payload" * 20)), RxStatus.IPCS | RxStatus.TCPCS, 0),
        (ip4(packets.tcp(b"")), RxStatus.IPCS | RxStatus.TCPCS, 0),
        (ip4(packets.udp(b"odd"), packets.UDP), RxStatus.IPCS | RxStatus.TCPCS, 0),
        (ip4(packets.udp(b"none", check=False), packets.UDP), RxStatus.IPCS, 0),
        (flipped(ip4(packets.tcp(b"payload" * 20)), 80), RxStatus.IPCS | RxStatus.TCPCS, RxError.TCPE),
        (flipped(ip4(packets.tcp(b"payload" * 20)), 22), RxStatus.IPCS | RxStatus.TCPCS, RxError.IPE),
        (ip4(b"icmp or so", 1), RxStatus.IPCS, 0),
        (ip4(packets.tcp(b"x" * 40), fragment=0x2000), RxStatus.IPCS, 0),
        (ip4(packets.tcp(b"x" * 40), fragment=5), RxStatus.IPCS, 0),
        (packets.ethernet(packets.ipv6(packets.TCP, packets.tcp(b"six", version=6)), 0x86DD), RxStatus.TCPCS, 0),
        (packets.ethernet(packets.ipv6(packets.UDP, packets.udp(b"six")), 0x86DD), RxStatus.TCPCS, RxError.TCPE),
        (packets.ethernet(bytes(100), 0x0806), RxStatus.IXSM, 0),
        (packets.ethernet(bytes(100), 0x0800), RxStatus.IXSM, 0),
    ],
)
def test_checksums_are_judged(frame: bytes, status: int, errors: int) -> None:
    nic = Nic().up()
    nic.write(regs.RXCSUM, CHECKS)
    _, found, wrong = one(nic, frame)
    assert found & CHECKED == status and wrong == errors


def test_options_and_tags_do_not_confuse_the_checks() -> None:
    nic = Nic().up()
    nic.write(regs.RXCSUM, CHECKS)
    packet = packets.ipv4(packets.TCP, packets.tcp(b"data"), options=bytes((1, 1, 1, 0)))
    frame = packets.ethernet(packet, 0x0800)
    assert one(nic, frame)[1] & CHECKED == RxStatus.IPCS | RxStatus.TCPCS
    assert one(nic, frame[:12] + bytes.fromhex("81000007") + frame[12:])[1] & CHECKED == RxStatus.IPCS | RxStatus.TCPCS


@pytest.mark.parametrize(
    ("control", "expected"), [(Rxcsum.IPOFLD, RxStatus.IPCS), (Rxcsum.TUOFLD, RxStatus.TCPCS), (0, RxStatus.IXSM)]
)
def test_only_what_is_enabled_is_checked(control: int, expected: int) -> None:
    nic = Nic().up()
    nic.write(regs.RXCSUM, control)
    _, status, errors = one(nic, flipped(flipped(ip4(packets.tcp(b"payload" * 20)), 22), 80))
    assert status & CHECKED == expected
    assert errors == {RxStatus.IPCS: RxError.IPE, RxStatus.TCPCS: RxError.TCPE, RxStatus.IXSM: 0}[expected]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.booleans(), st.integers(0, 120), st.integers(0, 255), st.integers(0, 60))
def test_a_damaged_packet_is_never_called_good(payload: bytes, is_tcp: bool, at: int, value: int, cut: int) -> None:
    protocol = packets.TCP if is_tcp else packets.UDP
    good = ip4(packets.tcp(payload) if is_tcp else packets.udp(payload), protocol)
    frame = bytearray(good)
    if 14 <= at < len(frame):
        frame[at] = value
    frame = frame[: max(len(frame) - cut, 14)]
    nic = Nic().up()
    nic.write(regs.RXCSUM, CHECKS)
    _, status, errors = one(nic, bytes(frame))
    header = frame[14 : 14 + (frame[14] & 15) * 4 if len(frame) > 14 else 14].ljust(20, b"\0")
    if status & RxStatus.IPCS:
        assert (errors & RxError.IPE == 0) == (packets.summed(bytes(header)) == 0xFFFF)
    if bytes(frame) == good:
        assert errors == 0 and status & CHECKED == RxStatus.IPCS | RxStatus.TCPCS


# -- interrupts and statistics -----------------------------------------------------------------------------------------


def test_rxt0_may_wait_for_quiet_but_not_for_ever() -> None:
    nic = Nic().up()
    nic.write(regs.RDTR, 10)
    nic.write(regs.RADV, 15)
    for _ in range(2):
        nic.wire.deliver(FRAME)
        assert not nic.read(regs.ICR) & Interrupt.RXT0
        nic.idle(9 * 1024)
    assert nic.read(regs.ICR) & Interrupt.RXT0
    nic.wire.deliver(FRAME)
    nic.write(regs.RDTR, 10 | regs.RDTR_FPD)
    assert nic.read(regs.ICR) & Interrupt.RXT0 and nic.read(regs.RDTR) == 10


@pytest.mark.parametrize(("threshold", "free"), [(0, 32), (1, 16), (2, 8)])
def test_rxdmt0_when_so_many_descriptors_are_left(threshold: int, free: int) -> None:
    nic = Nic(rx=64).up(rctl=EN | threshold << regs.RCTL_RDMTS_SHIFT)
    causes = []
    for _ in range(63):
        nic.wire.deliver(FRAME)
        causes.append(nic.read(regs.ICR) & Interrupt.RXDMT0)
    assert [63 - number for number, cause in enumerate(causes, 1) if cause] == [free]


def test_small_packets_may_have_an_interrupt_of_their_own() -> None:
    nic = Nic().up()
    nic.write(regs.RSRPD, 64)
    nic.wire.deliver(FRAME)
    assert not nic.read(regs.ICR) & Interrupt.SRPD
    nic.wire.deliver(FRAME[:60])
    assert nic.read(regs.ICR) & Interrupt.SRPD


def test_what_comes_is_counted() -> None:
    nic = Nic().up(rctl=EN | Rctl.BAM | Rctl.MPE)
    for size, to in ((60, packets.HOST_A), (124, packets.BROADCAST), (700, MULTICAST), (60, packets.HOST_B)):
        nic.wire.deliver(packets.ethernet(bytes(size - 14), 0x88B5, to=to))
    assert [nic.read(at) for at in (regs.TPR, regs.GPRC, regs.BPRC, regs.MPRC)] == [4, 3, 1, 1]
    assert [nic.read(regs.PRC64 + at) for at in range(0, 24, 4)] == [1, 0, 1, 0, 1, 0]
    assert nic.read(regs.GORCL, 8) == 60 + 124 + 700 + 12 and nic.read(regs.TORL, 8) == 60 + 124 + 700 + 60 + 16


# -- loopback ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mac", "phy"])
def test_in_loopback_what_is_sent_comes_back(how: str) -> None:
    nic = Nic().up(rctl=EN | (1 << 6 if how == "mac" else 0))
    if how == "phy":
        nic.write(regs.MDIC, regs.Mdic.WRITE | 1 << 21 | 0x4140)
    nic.send(FRAME)
    assert nic.wire.sent == [] and [each.frame for each in nic.poll()] == [FRAME]
