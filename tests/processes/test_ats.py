"""ATS, PRI and PASID between processes: a VT-d guest, and devices that cache its translations in processes of their
own."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import guestd.notifier
from guestd.remote_peer import RemotePeer
from hostd.serve import device_server
from tests.processes.ats_rig import (
    ADDR,
    ASK_PAGE,
    BURST,
    CLOSE,
    COUNT,
    DATA,
    ERROR,
    FAILED,
    FILL,
    HANG,
    IOVA,
    MISS,
    NO_PASID,
    OK,
    OPEN,
    PAGE,
    PLAIN_READ,
    PLAIN_WRITE,
    RESPONSES,
    RESULT,
    STOP,
    AtsProbe,
    AtsRig,
    Card,
    running,
)
from vfio_model.guest_drivers.pc import mmio_window
from vfio_model.guest_drivers.pci import DriverError, bring_up_bus
from vfio_model.guest_drivers.vtd import Domain
from vfio_model.guest_drivers.vtd_tables import READ
from vfio_model.iommu.vtd import regs
from vfio_model.memory.lane import SECTION_BYTES
from vfio_model.pci.config_space import COMMAND, COMMAND_MEMORY

ITE = regs.FSTS_ITE
LARGE = 2 << 20
REQUEST_TYPE = 0xD


@pytest.fixture
def rig(runtime_dir: Path) -> Iterator[AtsRig]:
    with running(runtime_dir) as rig:
        yield rig


@pytest.fixture(params=["shared", "mapped", "message"])
def any_rig(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[AtsRig]:
    """Whichever way its DMA travels."""
    with running(runtime_dir, dma=request.param) as rig:
        yield rig


def opened(rig: AtsRig, card: Card, pasid: int = 5) -> Domain:
    """A domain with one page, its cache filled."""
    domain = rig.domain(card, pasid)
    rig.driver.map(domain, IOVA, DATA + (card.number << 16), PAGE)
    assert card.do(OPEN, pasid=pasid) == 0
    rig.armed(card)
    assert card.do(FILL, addr=IOVA, length=PAGE) == 1
    return domain


def test_a_translation_is_used_until_the_guest_invalidates_it(any_rig: AtsRig) -> None:
    rig = any_rig
    card = rig.cards[0]
    domain = opened(rig, card)
    assert card.write(IOVA + 8, 0x1234) == OK and rig.word(DATA + 8) == 0x1234
    rig.driver.unmap(domain, IOVA, PAGE)
    assert card.write(IOVA + 8, 0x5678) == MISS and rig.word(DATA + 8) == 0x1234
    assert card.do(FILL, addr=IOVA) == 1 << 32 | 1
    assert rig.driver.faults() == []


def test_a_hit_asks_nobody(rig: AtsRig) -> None:
    card = rig.cards[0]
    opened(rig, card)
    served = rig.function(card).serve
    asked: list[object] = []
    rig.function(card).serve = lambda request: asked.append(request) or served(request)  # type: ignore[method-assign,func-returns-value]
    for value in range(8):
        assert card.write(IOVA, value) == OK
    assert rig.word(DATA) == 7 and asked == []
    assert card.do(FILL, addr=IOVA, length=PAGE) == 1 and len(asked) == 1


def test_what_may_be_read_may_not_be_written(rig: AtsRig) -> None:
    card = rig.cards[0]
    domain = rig.domain(card, 5)
    rig.driver.map(domain, IOVA, DATA, PAGE, READ)
    card.do(OPEN, pasid=5)
    assert card.do(FILL, addr=IOVA, length=PAGE) == 1 << 32 | 1
    assert card.write(IOVA, 1) == MISS and rig.word(DATA) == 0


def test_a_pasid_of_another_process_is_another_space(any_rig: AtsRig) -> None:
    rig = any_rig
    card = rig.cards[0]
    domain = opened(rig, card)
    assert card.do(CLOSE) == 0
    rig.driver.detach(domain, card.devfn, 5)
    other = rig.domain(card, 5)
    rig.driver.map(other, IOVA, DATA + PAGE, PAGE)
    assert card.do(OPEN, pasid=5) == 0
    assert card.write(IOVA, 1) == MISS
    assert card.do(FILL, addr=IOVA, length=PAGE) == 1
    assert card.write(IOVA, 2) == OK
    assert rig.word(DATA) == 0 and rig.word(DATA + PAGE) == 2


def test_what_the_guest_has_not_enabled_is_refused(rig: AtsRig) -> None:
    card = rig.cards[0]
    opened(rig, card)
    device = rig.guest.devices["card0"][1]
    assert device.pasid is not None and device.ats is not None
    rig.config.write(card.devfn, device.ats.offset + 6, 2, 0)
    assert card.write(IOVA, 1) == FAILED
    assert card.do(FILL, addr=IOVA) == ERROR | errno.EPERM
    assert rig.config.read(card.devfn, device.ats.offset + 6, 2) == 0
    rig.config.write(card.devfn, device.pasid.offset + 6, 2, 0)
    assert card.do(OPEN) == ERROR | errno.EPERM


def test_bus_mastering_that_is_taken_away_blocks_the_cache(any_rig: AtsRig) -> None:
    rig = any_rig
    card = rig.cards[0]
    opened(rig, card)
    rig.config.write(card.devfn, COMMAND, 2, COMMAND_MEMORY)
    assert card.write(IOVA, 1) == FAILED and rig.word(DATA) == 0


def test_a_reset_closes_caches_and_what_is_opened_afterwards_works(rig: AtsRig) -> None:
    card = rig.cards[0]
    opened(rig, card)
    function = rig.guest.devices["card0"][1]
    function.reset()
    rig.functions = bring_up_bus(rig.config, mmio_window())
    assert card.write(IOVA, 1) == FAILED and card.do(FILL, addr=IOVA) == ERROR | errno.EPERM
    card.enable()
    assert card.write(IOVA, 1) == FAILED, "what was open before the reset is closed"
    assert card.do(OPEN, pasid=5) == 0
    assert card.do(FILL, addr=IOVA, length=PAGE) == 1
    assert card.write(IOVA, 2) == OK and rig.word(DATA) == 2


def test_a_context_that_forbids_translated_requests_blocks_them_with_a_fault(any_rig: AtsRig) -> None:
    rig = any_rig
    card = rig.cards[0]
    opened(rig, card)
    entry = rig.driver._root.entry(card.devfn)
    context = rig.word(entry)
    rig.cpu.write_memory(entry, (context & ~(1 << 2)).to_bytes(8, "little"))  # DTE
    rig.driver.invalidation.contexts()
    assert card.write(IOVA, 1) == FAILED and rig.word(DATA) == 0
    (fault,) = rig.driver.faults()
    assert (fault.reason, fault.sid, fault.address) == (REQUEST_TYPE, card.devfn, DATA)
    rig.cpu.write_memory(entry, context.to_bytes(8, "little"))
    rig.driver.invalidation.contexts()
    assert card.write(IOVA, 2) == OK and rig.word(DATA) == 2


def test_a_page_request_is_queued_and_its_response_comes_back(any_rig: AtsRig) -> None:
    rig = any_rig
    card = rig.cards[0]
    opened(rig, card)
    queue = rig.pages.take(16)
    rig.driver.registers.write(regs.PQA, queue | 4, 8)
    card.put(addr=IOVA + PAGE, command=ASK_PAGE)
    rig.until(lambda: card.get(RESULT) & ERROR or rig.driver.registers.read(regs.PQT, 8))
    assert card.get(RESULT) == 0
    low, high = rig.word(queue), rig.word(queue + 8)
    assert (low & 0xFF, low >> 16 & 0xFFFF, low >> 32 & 0xFFFFF) == (1, card.devfn, 5)
    assert high == IOVA + PAGE | 7 << 3 | 7
    rig.driver.invalidation.submit((9 | 1 << 4 | card.devfn << 16 | 5 << 32, 7 << 3))
    rig.until(lambda: card.get(RESPONSES))
    assert card.get(RESPONSES) == 1 << 32 | 7 << 8


def test_requests_without_pasid_are_translated_too_and_fault_where_nothing_is(rig: AtsRig) -> None:
    card = rig.cards[0]
    domain = rig.domain(card, None)
    rig.driver.map(domain, 0x40_0000, DATA, PAGE)
    rig.armed(card)
    assert card.do(PLAIN_WRITE, addr=0x40_0008, value=5) == 0 and rig.word(DATA + 8) == 5
    rig.driver.unmap(domain, 0x40_0000, PAGE)
    assert card.do(PLAIN_WRITE, addr=0x40_0008, value=6) != 0 and rig.word(DATA + 8) == 5
    (fault,) = rig.driver.faults()
    assert (fault.sid, fault.address, fault.is_read) == (card.devfn, 0x40_0000, False)
    rig.driver.map(domain, 0x40_0000, DATA, PAGE)
    assert card.do(OPEN, pasid=NO_PASID) == 0
    assert card.do(FILL, addr=0x40_0000, length=PAGE) == 1
    assert card.write(0x40_0000, 7) == OK and rig.word(DATA) == 7


def test_requests_without_pasid_follow_domains_and_the_unit_itself(rig: AtsRig) -> None:
    """What the process keeps of them goes with every way in which a guest takes it away."""
    card, iova = rig.cards[0], 0x40_0000
    first = rig.domain(card, None)
    rig.driver.map(first, iova, DATA, PAGE)
    rig.armed(card)
    assert card.do(PLAIN_WRITE, addr=iova, value=1) == 0 and rig.word(DATA) == 1
    rig.driver.detach(first, card.devfn)
    assert card.do(PLAIN_WRITE, addr=iova, value=2) != 0 and rig.word(DATA) == 1
    second = rig.domain(card, None)
    rig.driver.map(second, iova, DATA + PAGE, PAGE)
    assert card.do(PLAIN_WRITE, addr=iova, value=3) == 0
    assert (rig.word(DATA), rig.word(DATA + PAGE)) == (1, 3)
    rig.driver.stop()
    assert card.do(PLAIN_WRITE, addr=iova, value=4) == 0, "translation is off: addresses are those of memory"
    assert (rig.word(iova), rig.word(DATA + PAGE)) == (4, 3)
    rig.driver.start()
    assert card.do(PLAIN_WRITE, addr=iova, value=5) == 0
    assert (rig.word(iova), rig.word(DATA + PAGE)) == (4, 5)


def test_what_was_read_is_not_marked_as_written(rig: AtsRig) -> None:
    """A translation that the process keeps for reads sets no dirty bit, and lets no write go past it."""
    card = rig.cards[0]
    domain = rig.domain(card, None)
    rig.driver.map(domain, 0x40_0000, DATA, PAGE)
    rig.armed(card)
    accessed, dirty = 1 << 5, 1 << 6
    slot = domain.table.slot(0x40_0000)
    assert card.do(PLAIN_READ, addr=0x40_0000) == 0
    assert rig.word(slot) & (accessed | dirty) == accessed
    assert card.do(PLAIN_WRITE, addr=0x40_0000) == 0
    assert rig.word(slot) & (accessed | dirty) == accessed | dirty


def test_nothing_lands_after_an_invalidation_while_the_device_writes(
    rig: AtsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is remapped again and again under a device that writes it all the time, in sections as long as there are.
    What is noted at the end of what it writes, as soon as the invalidation is complete, stays there."""
    card, domain = rig.cards[0], rig.domain(rig.cards[0], 5)
    publisher = rig.guest.remote.publisher
    assert publisher is not None
    flush, ram, noted = publisher.flush_ats, rig.guest.memory.view, [0]

    def flush_and_note() -> OSError | None:
        (device,) = publisher._known()
        deadline = time.monotonic() + 0.05
        while not any(count & 1 for count in device.snapshot()) and time.monotonic() < deadline:
            pass  # it is to be in the middle of it
        error = flush()
        ram[noted[0] : noted[0] + 8] = b"complete"
        return error

    monkeypatch.setattr(publisher, "flush_ats", flush_and_note)
    iova, frames = IOVA & -LARGE, (DATA, DATA + LARGE)
    rig.driver.map(domain, iova, frames[0], LARGE, level=2)
    card.do(OPEN, pasid=5)
    rig.armed(card)
    assert card.do(BURST, addr=iova, length=SECTION_BYTES, value=0xAAAA_AAAA_AAAA_AAAA) == 0
    for turn in range(100):
        before = card.get(COUNT)
        rig.until(lambda before=before: card.get(COUNT) > before)  # type: ignore[misc]
        noted[0] = frames[turn % 2] + SECTION_BYTES - 8
        rig.driver.unmap(domain, iova, LARGE)
        assert bytes(ram[noted[0] : noted[0] + 8]) == b"complete", "a write after the invalidation was complete"
        rig.driver.map(domain, iova, frames[(turn + 1) % 2], LARGE, level=2)
    assert card.do(STOP) == 0 and rig.driver.faults() == []


# -- devices that do not follow


def stop_inside(rig: AtsRig, card: Card) -> None:
    """Stop its process in the middle of a DMA section."""
    publisher = rig.guest.remote.publisher
    assert publisher is not None
    (subscriber,) = [one for one in publisher._known() if one.pid == card.served.pid]
    deadline = time.monotonic() + 20
    while True:
        os.kill(card.served.pid, signal.SIGSTOP)
        while Path(f"/proc/{card.served.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            pass
        if any(count & 1 for count in subscriber.snapshot()):
            return
        assert time.monotonic() < deadline, "it was never inside"
        os.kill(card.served.pid, signal.SIGCONT)
        rig.loop.run_once(0.0005)


@pytest.mark.parametrize("how", ["stopped", "hanging"])
def test_a_device_that_does_not_follow_is_a_time_out_and_the_guest_goes_on(
    rig: AtsRig, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestd.notifier, "LANE_SECONDS", 0.3)
    card = rig.cards[0]
    domain = opened(rig, card)
    if how == "stopped":
        card.do(BURST, addr=IOVA, length=PAGE, value=1)
        stop_inside(rig, card)
    else:
        card.put(command=HANG)
        publisher = rig.guest.remote.publisher
        assert publisher is not None
        (lanes,) = publisher._known()
        while not any(count & 1 for count in lanes.snapshot()):
            rig.loop.run_once(0.001)
    with pytest.raises(DriverError, match="the invalidation queue stopped"):
        rig.driver.unmap(domain, IOVA, PAGE)
    status = rig.driver.registers
    assert status.read(regs.FSTS) & ITE
    rig.until(lambda: not card.served.pidfd.alive())
    rig.driver.invalidation.resume()
    assert not status.read(regs.FSTS) & ITE
    rig.driver.invalidation.iotlb()
    assert card.get(ADDR) == (1 << 64) - 1, "its device is gone, and reads as all ones"


def test_a_device_that_was_killed_has_acknowledged(rig: AtsRig) -> None:
    card = rig.cards[0]
    domain = opened(rig, card)
    card.do(BURST, addr=IOVA, length=PAGE, value=1)
    card.served.kill()
    rig.driver.unmap(domain, IOVA, PAGE)
    assert not rig.driver.registers.read(regs.FSTS) & ITE


def test_a_device_that_comes_back_knows_what_the_guest_has_enabled(runtime_dir: Path) -> None:
    with running(runtime_dir, reconnect_ms=200) as rig:
        card = rig.cards[0]
        domain = opened(rig, card)
        card.served.kill()
        link = rig.guest.remote.links["card0"]
        rig.until(lambda: link.connection is not None and link.connection.lost is not None)
        rig.driver.unmap(domain, IOVA, PAGE)
        rig.driver.map(domain, IOVA, DATA + PAGE, PAGE)
        Path(card.served.path).unlink()
        with device_server(AtsProbe, socket=card.served.path):
            rig.until(lambda: link.connection is not None and link.connection.lost is None)
            assert card.do(OPEN, pasid=5) == 0
            assert card.do(FILL, addr=IOVA, length=PAGE) == 1
            assert card.write(IOVA, 2) == OK and rig.word(DATA + PAGE) == 2


def test_an_invalidation_sends_no_message_to_a_device(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many follow: the ring is one for all."""
    with running(runtime_dir, 3) as rig:
        domains = [opened(rig, card) for card in rig.cards]
        sent: list[object] = []
        monkeypatch.setattr(RemotePeer, "_transmit", lambda self, command, *_, **__: sent.append(command))
        for domain in domains:
            rig.driver.unmap(domain, IOVA, PAGE)
        assert sent == []
        monkeypatch.undo()
        assert [card.write(IOVA, 1) for card in rig.cards] == [MISS] * 3
