"""Two e1000s on one hub talk to each other; and what a device is goes to another in a migration."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.devices import packets
from tests.devices.e1000_driver import EOP, IFCS, RS, TSE, TX_BUFFERS, Nic, context, data, legacy
from vfio_model.backends.net import Hub
from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.regs import Interrupt, Rctl
from vfio_model.devices.e1000.tx import BUDGET
from vfio_model.errors import VMStateError
from vfio_model.vmstate.fields import decode, encode

LAST = EOP | IFCS | RS


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Nic, Nic]:
    monkeypatch.setattr("tests.devices.e1000_driver.NetHost.hub", Hub())
    return Nic("hub").up(), Nic("hub", mac="52:54:00:ab:cd:ef").up()


def test_a_ping_and_its_answer(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    question = packets.ethernet(b"who has 10.0.0.2", 0x0806, to=packets.BROADCAST, source=packets.HOST_A)
    a.send(question)
    (asked,) = b.poll()
    assert asked.frame == question.ljust(60, b"\0")
    for number in range(300):
        ping = packets.ethernet(b"ping %d" % number + bytes(64), 0x0800, to=packets.HOST_B, source=packets.HOST_A)
        a.send(ping)
        (got,) = b.poll()
        b.send(got.frame[6:12] + got.frame[:6] + got.frame[12:])
        (back,) = a.poll()
        assert back.frame[14:] == ping[14:] and back.frame[:6] == packets.HOST_A
    assert a.read(regs.GPTC) == 301 and a.read(regs.GPRC) == 300


def test_a_stream_is_cut_sent_checked_and_put_together_again(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    b.write(regs.RXCSUM, regs.Rxcsum.IPOFLD | regs.Rxcsum.TUOFLD)
    stream = random.Random(7).randbytes(200_000)
    got = b""
    for at in range(0, len(stream), 40_000):
        part = stream[at : at + 40_000]
        head = packets.ethernet(packets.ipv4(6, packets.tcp(b"", check=False)), 0x0800, to=packets.HOST_B)
        partial = packets.summed(packets.pseudo(6, 0)).to_bytes(2, "big")
        frame = head[:24] + b"\0\0" + head[26:50] + partial + head[52:] + part
        start = a.place(frame)
        a.transmit(
            context(command=TSE | 3, paylen=len(part), hdrlen=54, mss=1460),
            data(start, len(frame), LAST | TSE, options=3),
        )
        for each in b.poll():
            assert each.status & 0x60 == 0x60 and each.errors == 0
            got += each.frame[54 : 14 + int.from_bytes(each.frame[16:18], "big")]
    assert got == stream


def test_frames_wait_in_the_hub_for_a_receiver_without_buffers(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    frames = [packets.ethernet(bytes((number,)) * 60, 0x88B5, to=packets.HOST_B) for number in range(100)]
    for frame in frames:
        a.send(frame)
    assert [each.frame for each in b.poll()] == frames


def test_a_device_that_is_gone_hears_nothing(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    b.device.unrealize()
    a.send(packets.ethernet(bytes(60), 0x88B5, to=packets.HOST_B))
    assert b.poll() == []


# -- migration ---------------------------------------------------------------------------------------------------------


def moved(source: Nic) -> Nic:
    """The same guest with another device: the state has been bytes in between."""
    device = source.device
    assert device.VMSTATE is not None
    raw = encode(device.VMSTATE, device.export_state())
    target = Nic(mac="52:54:00:00:00:99", tx=source.tx_count, rx=source.rx_count)
    target.ram[:] = source.ram
    target.tx_tail, target.rx_next = source.tx_tail, source.rx_next
    target.device.reset()
    state = decode(device.VMSTATE, device.VMSTATE.version, raw, target.device.export_state(), where="e1000")
    target.device.check_state(state, where="e1000")
    target.device.import_state(state)
    assert target.device.export_state() == device.export_state()
    return target


def test_a_packet_in_pieces_and_a_segmentation_go_on_elsewhere() -> None:
    a = Nic().up()
    frame = packets.ethernet(bytes(range(200)), 0x88B5)
    a.place(frame)
    a.transmit(legacy(TX_BUFFERS, 100, IFCS))
    b = moved(a)
    b.transmit(legacy(TX_BUFFERS + 100, len(frame) - 100, LAST))
    assert b.wire.sent == [frame]
    head = packets.ethernet(packets.ipv4(6, packets.tcp(b"x" * 946, check=False)), 0x0800)
    b.transmit(context(command=TSE | 3, paylen=946, hdrlen=54, mss=2), data(b.place(head), 1000, LAST | TSE, options=3))
    sent = b.wire.sent[1:]
    assert 0 < len(sent) < BUDGET
    c = moved(b)
    c.idle()
    assert len(sent) + len(c.wire.sent) == 473
    assert c.wire.sent[-1][38:42] == (944).to_bytes(4, "big")


def test_timers_pin_and_filters_go_along() -> None:
    a = Nic().up(rctl=Rctl.EN | Rctl.SECRC)
    a.write(regs.RDTR, 100)
    a.write(regs.IMS, Interrupt.RXT0 | Interrupt.LSC)
    a.wire.deliver(packets.ethernet(bytes(60), 0x88B5))
    a.idle(40 * 1024)
    b = moved(a)
    b.idle(60 * 1024 - 1)
    assert not b.device.intx_level
    b.idle(1)
    assert b.device.intx_level
    c = moved(b)
    assert c.device.intx_level and c.read(regs.ICR) & Interrupt.RXT0 and not c.device.intx_level
    c.wire.deliver(packets.ethernet(bytes(61), 0x88B5), packets.ethernet(bytes(62), 0x88B5, to=packets.HOST_B))
    assert [len(each.frame) for each in c.poll()] == [74, 75]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("vet",), 0x10000),
        (("eeprom", "bits"), 33),
        (("transmit", "packet_size"), 2 << 20),
        (("rah",), [0xFFFFFFFF] * 16),
    ],
)
def test_a_state_that_cannot_be_is_refused(where: tuple[str, ...], value: object) -> None:
    nic = Nic()
    state: dict[str, Any] = nic.device.export_state()
    inner = state
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    with pytest.raises(VMStateError):
        nic.device.check_state(state, where="e1000")
