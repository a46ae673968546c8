"""A device behind vfio-user framing, as its user sees it, and what it may ask."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest

import guestd.remote_peer
from guestd.remote import VfioUserDevice, capabilities
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Command, Role
from tests.guestd.fake_device import CONFIG, FakeDevice
from vfio_model.errors import PeerLost
from vfio_model.uapi.vfio import IrqSetFlags, PciIrq

INTX = int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX)
MSI = int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX)


class Services:
    """A guest that knows one page."""

    def translate(self, request: wire.TranslateRequest) -> list[wire.TranslationEntry]:
        return [wire.TranslationEntry(request.iova, 0x7000, 0xFFF, 3)]

    def dma_read(self, address: int, count: int) -> bytes | None:
        return bytes([address & 0xFF]) * count if address < 0x1000 else None

    def dma_write(self, address: int, data: bytes) -> bool:
        return address < 0x1000


def test_regions_are_read_and_written(fake: FakeDevice) -> None:
    device = fake.connect()
    device.region_write(0, 8, b"abcd")
    assert device.region_read(0, 8, 4) == b"abcd"
    assert device.region_read(CONFIG, 0, 2) == b"\x34\x12"
    assert fake.of(Command.REGION_WRITE)[0].no_reply, "writes are posted"


def test_an_errno_of_the_device_is_an_oserror(fake: FakeDevice) -> None:
    fake.errors[Command.DEVICE_RESET] = errno.EACCES
    device = fake.connect()
    with pytest.raises(OSError, match="fake") as caught:
        device.reset()
    assert caught.value.errno == errno.EACCES
    assert device.region_read(0, 0, 1) == b"\0", "and the device goes on"


def test_sync_asks_only_when_something_was_posted(fake: FakeDevice) -> None:
    device = fake.connect()
    device.sync()
    assert not fake.of(Command.DEVICE_GET_INFO)
    device.region_write(0, 0, b"x")
    device.sync()
    assert fake.bar[0:1] == b"x"
    device.sync()
    assert len(fake.of(Command.DEVICE_GET_INFO)) == 1


def test_interrupts_arrive_inside_a_wait(fake: FakeDevice) -> None:
    device = fake.connect()
    counts = [0, 0]

    def count(vector: int) -> None:
        counts[vector] += 1

    device.set_irqs(MSI, [lambda: count(0), lambda: count(1)])
    set_irqs = fake.of(Command.DEVICE_SET_IRQS)[-1]
    assert isinstance(set_irqs.payload, wire.SetIrqs) and set_irqs.payload.count == 2
    os.eventfd_write(set_irqs.fds[1], 1)
    device.region_read(0, 0, 4)
    assert counts == [0, 1]


def test_more_vectors_than_descriptors_in_one_message(fake: FakeDevice) -> None:  # it takes eight
    device = fake.connect()
    device.set_irqs(MSI, [lambda: None] * 20)
    payloads = [event.payload for event in fake.of(Command.DEVICE_SET_IRQS)]
    assert [(p.start, p.count) for p in payloads if isinstance(p, wire.SetIrqs)] == [(0, 8), (8, 8), (16, 4)]
    device.set_irqs(MSI, ())
    last = fake.of(Command.DEVICE_SET_IRQS)[-1].payload
    assert isinstance(last, wire.SetIrqs) and last.count == 0


def test_unmasking_is_posted(fake: FakeDevice) -> None:
    device = fake.connect()
    device.unmask_irq(INTX)
    device.sync()
    event = fake.of(Command.DEVICE_SET_IRQS)[0]
    assert isinstance(event.payload, wire.SetIrqs)
    assert event.payload.flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_UNMASK and event.no_reply


def test_translations_and_dma_messages_are_served_while_the_guest_waits(fake: FakeDevice) -> None:
    device = fake.connect(Services())
    fake.endpoint.command(Command.X_TRANSLATE, wire.TranslateRequest(0x5000, 4096))
    fake.endpoint.command(Command.DMA_READ, wire.DmaAccess(0x42, 3))
    fake.endpoint.command(Command.DMA_READ, wire.DmaAccess(0x4242, 3))
    fake.endpoint.command(Command.DMA_WRITE, wire.DmaAccess(0x42, 2, b"ab"))
    device.region_read(0, 0, 4)
    device.region_read(0, 0, 4)
    translated, read, refused, written = fake.replies
    assert isinstance(translated.payload, wire.TranslateReply)
    assert translated.payload.entries() == [wire.TranslationEntry(0x5000, 0x7000, 0xFFF, 3)]
    assert isinstance(read.payload, wire.DmaAccess) and read.payload.data == b"BBB"
    assert refused.errno == errno.EFAULT
    assert isinstance(written.payload, wire.DmaAccess) and written.errno == 0


def test_a_device_without_services_is_refused(fake: FakeDevice) -> None:
    device = fake.connect()
    fake.endpoint.command(Command.DMA_WRITE, wire.DmaAccess(0, 1, b"x"))
    device.region_read(0, 0, 1)
    device.region_read(0, 0, 1)
    assert fake.replies[0].errno == errno.EFAULT


def gone(device: VfioUserDevice) -> None:
    with pytest.raises(PeerLost):
        device.region_read(0, 0, 4)
    with pytest.raises(PeerLost):
        device.region_write(0, 0, b"x")


def test_eof_is_told_once_and_stays(fake: FakeDevice) -> None:
    device = fake.connect()
    told: list[PeerLost] = []
    device.on_lost = told.append
    fake.close()
    gone(device)
    gone(device)
    assert len(told) == 1


def test_a_device_that_does_not_answer_is_given_up_by_name(fake: FakeDevice) -> None:
    device = fake.connect(seconds=0.01)
    fake.silent.add(Command.REGION_READ)
    with pytest.raises(PeerLost, match=r"fake .*VFIO_USER_REGION_READ"):
        device.region_read(0, 0, 4)
    gone(device)


def test_a_device_that_breaks_the_protocol_loses_its_connection(fake: FakeDevice) -> None:
    device = fake.connect()
    fake.endpoint.stream.send(bytes(16))
    gone(device)
    assert device.lost is not None and "protocol" in str(device.lost)


def test_a_device_that_does_not_shake_hands(fake: FakeDevice) -> None:
    fake.silent.add(Command.VERSION)
    with pytest.raises(PeerLost, match="fake"):
        fake.connect(seconds=0.01)


def test_closing_ends_it_quietly(fake: FakeDevice) -> None:
    device = fake.connect()
    told: list[PeerLost] = []
    device.on_lost = told.append
    device.close()
    device.close()
    assert not told
    gone(device)


def test_closing_a_device_that_lives_for_us_sees_its_process_end(
    fake: FakeDevice, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestd.remote_peer, "END_SECONDS", 0.01)
    stubborn = subprocess.Popen(["sleep", "600"])
    endpoint = VfioUserEndpoint(fake.client_stream, Role.CLIENT, capabilities(ats=False))
    device = VfioUserDevice("fake", endpoint, loop, process=Pidfd.open(stubborn.pid), lives_for_us=True)
    device.close()
    assert stubborn.wait(10) == -signal.SIGKILL


def test_closing_another_ones_device_leaves_its_process_alone(fake: FakeDevice, loop: Loop) -> None:
    endpoint = VfioUserEndpoint(fake.client_stream, Role.CLIENT, capabilities(ats=False))
    device = VfioUserDevice("fake", endpoint, loop, process=Pidfd.open(os.getpid()))
    device.close()
    assert device.lost is not None


def test_nothing_is_asked_of_one_device_while_another_is_answered(fake: FakeDevice, loop: Loop) -> None:
    other = FakeDevice(loop)
    bar = other.connect()

    class Bar(Services):
        """DMA that leads to the BAR of a device in another process."""

        def dma_read(self, address: int, count: int) -> bytes | None:
            with pytest.raises(OSError, match="while another device is served") as caught:
                bar.region_read(0, 0, count)
            assert caught.value.errno == errno.EDEADLK
            return None

    fake.connect(Bar())
    fake.endpoint.command(Command.DMA_READ, wire.DmaAccess(0, 4))
    loop.serve_until(lambda: bool(fake.replies), 5.0, "guestd", "DMA_READ")
    assert fake.replies[0].errno == errno.EFAULT
    assert not other.of(Command.REGION_READ)
    assert bar.region_read(0, 0, 4) == bytes(4), "afterwards it answers"
    bar.close()
    other.close()
