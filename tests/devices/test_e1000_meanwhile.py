"""What a guest does while the e1000 waits for its memory: DMA by message takes its time, and registers are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.devices import packets
from tests.devices.e1000_driver import EOP, IFCS, RS, RX_BUFFERS, RX_RING, TX_BUFFERS, Nic, data, legacy
from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.regs import Ctrl, Rctl
from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer

FRAMES = [packets.ethernet(bytes([number]) * 100, 0x88B5) for number in range(8)]
LAST = EOP | IFCS | RS


class Slow:
    """Memory in whose first access to ``[first, last]`` the guest does ``meanwhile``."""

    def __init__(self, nic: Nic, first: int, last: int, meanwhile: Callable[[], None]) -> None:
        self._nic, self._first, self._last, self._meanwhile = nic, first, last, meanwhile
        self.writes: list[int] = []
        nic.device.attach_dma(self)  # type: ignore[arg-type]  # a device of this kind maps nothing

    def _wait(self, iova: int) -> None:
        if self._first <= iova <= self._last:
            self._first, self._last = 1, 0
            self._meanwhile()
            self.writes.clear()

    def read(self, iova: int, out: WriteBuffer) -> MemTxResult:
        self._wait(iova)
        return self._nic.space.read(iova, out)

    def write(self, iova: int, data: ReadBuffer) -> MemTxResult:
        self._wait(iova)
        self.writes.append(iova)
        return self._nic.space.write(iova, data)

    def read_many(self, iovas: list[int], size: int, out: WriteBuffer) -> MemTxResult:
        self._wait(iovas[0])
        return self._nic.space.read_many(iovas, size, out)

    def write_many(self, iovas: list[int], size: int, data: ReadBuffer) -> MemTxResult:
        self._wait(iovas[0])
        self.writes += iovas
        return self._nic.space.write_many(iovas, size, data)


@pytest.fixture
def nic() -> Nic:
    return Nic().up()


def frames_to_send(nic: Nic) -> list[bytes]:
    return [
        legacy(nic.place(frame, TX_BUFFERS + 256 * number), len(frame), LAST) for number, frame in enumerate(FRAMES)
    ]


def all_buffers(nic: Nic, meanwhile: Callable[[], None], number: int = 0) -> Slow:
    """In the fetch of buffer ``number``."""
    return Slow(nic, TX_BUFFERS + 256 * number, TX_BUFFERS + 256 * number, meanwhile)


def test_a_tail_that_is_written_while_a_frame_is_fetched_sends_each_frame_once(nic: Nic) -> None:
    descriptors = frames_to_send(nic)
    all_buffers(nic, lambda: done.extend(nic.transmit(*descriptors[3:])), 1)
    done: list[int] = []
    done += nic.transmit(*descriptors[:3])
    nic.idle()
    assert nic.wire.sent == FRAMES
    assert all(nic.done(where) for where in done) and nic.read(regs.TDH) == len(FRAMES)


def test_a_tail_that_is_written_while_descriptors_are_written_back_is_found(nic: Nic) -> None:
    descriptors = frames_to_send(nic)
    first = nic.post(*descriptors[:3])
    Slow(nic, first[0] + 12, first[0] + 12, lambda: done.extend(nic.transmit(*descriptors[3:])))
    done: list[int] = []
    nic.kick()
    nic.idle()
    assert nic.wire.sent == FRAMES and all(nic.done(where) for where in first + done)


def test_a_transmitter_that_is_disabled_stops_after_the_frame_under_way(nic: Nic) -> None:
    all_buffers(nic, lambda: nic.write(regs.TCTL, 0), 2)
    nic.transmit(*frames_to_send(nic))
    nic.idle()
    assert nic.wire.sent == FRAMES[:3] and nic.read(regs.TDH) == 3


@pytest.mark.parametrize("how", ["reset", "no ring", "another ring"])
def test_a_ring_that_goes_while_a_frame_is_fetched(nic: Nic, how: str) -> None:
    def go() -> None:
        if how == "reset":
            nic.write(regs.CTRL, Ctrl.RST)
        elif how == "no ring":
            nic.write(regs.TDLEN, 0)
        else:
            nic.write(regs.TDBAL, 0x30000)
            nic.write(regs.TDH, 0)
            nic.write(regs.TDT, 0)

    slow = all_buffers(nic, go, 2)
    nic.transmit(*frames_to_send(nic))
    nic.idle()
    assert nic.wire.sent[:2] == FRAMES[:2] and len(nic.wire.sent) <= 3
    assert not slow.writes and (how == "no ring" or nic.read(regs.TDH) == 0)
    nic.tx_tail = 0
    again = nic.up().send(FRAMES[7], LAST)
    assert nic.wire.sent[-1] == FRAMES[7] and nic.done(again)


def test_a_reset_within_a_packet_of_many_buffers_leaves_nothing_of_it(nic: Nic) -> None:
    all_buffers(nic, lambda: nic.write(regs.CTRL, Ctrl.RST), 1)
    for number in range(3):
        nic.place(FRAMES[number], TX_BUFFERS + 256 * number)
    parts = [data(TX_BUFFERS + 256 * number, 114, IFCS | (LAST if number == 2 else 0)) for number in range(3)]
    nic.transmit(*parts)
    nic.tx_tail = 0
    nic.up().send(FRAMES[5])
    assert nic.wire.sent == [FRAMES[5]]


@pytest.mark.parametrize("where", [RX_RING, RX_BUFFERS, RX_RING + 8], ids=["descriptor", "data", "write-back"])
def test_a_reset_while_a_frame_is_received_writes_nothing_more(nic: Nic, where: int) -> None:
    slow = Slow(nic, where, where, lambda: nic.write(regs.CTRL, Ctrl.RST))
    nic.wire.deliver(FRAMES[0])
    assert len(slow.writes) <= 1 and nic.read(regs.RDH) == 0 and not nic.read(regs.ICR)
    nic.rx_next = 0
    nic.up()
    nic.wire.deliver(FRAMES[1])
    assert [each.frame for each in nic.poll()] == [FRAMES[1]]


def test_buffers_that_come_while_a_frame_is_received_do_not_let_the_next_one_in(nic: Nic) -> None:
    nic.write(regs.RCTL, Rctl.EN | Rctl.BAM | Rctl.SECRC | Rctl.UPE)
    Slow(nic, RX_BUFFERS, RX_BUFFERS, lambda: nic.write(regs.RDT, nic.rx_count - 1))
    nic.wire.deliver(*FRAMES)
    nic.wire.resume()
    assert [each.frame for each in nic.poll()] == FRAMES
