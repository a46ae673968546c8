"""NVMe: queues, doorbells and interrupts (NVM Express Base Specification 1.4, chapter 4 and section 7.5)."""

from __future__ import annotations

import pytest

from tests.devices.nvme_host import ADMIN_CQ, DATA, QUEUE_AREA, NvmeHost, Ring
from vfio_model.devices.nvme import engine, regs
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode, Status
from vfio_model.memory.region import IORegion, MemoryRegion
from vfio_model.memory.types import MemTxResult

FLUSH = NvmOpcode.FLUSH


@pytest.fixture
def host() -> NvmeHost:
    host = NvmeHost()
    host.start(size=16)
    host.host.signals.clear()
    return host


def flushes(host: NvmeHost, count: int, qid: int = 1) -> list[int]:
    cids = [host.push(qid, FLUSH, nsid=1) for _ in range(count)]
    host.ring(qid)
    return cids


def cids(host: NvmeHost, qid: int = 1, **how: int) -> list[int]:
    return [each.cid for each in host.reap(qid, **how)]


# -- rings


def test_rings_go_round_and_the_phase_changes(host: NvmeHost) -> None:
    for count in (15, 1, 7, 15, 12, 3, 15):
        assert cids(host) == []
        assert flushes(host, count) == cids(host)


def test_completions_say_how_far_the_queue_was_read(host: NvmeHost) -> None:
    flushes(host, 15)
    flushes_seen = [(each.sq_head, each.sqid) for each in host.reap(1)]
    assert flushes_seen == [(at, 1) for at in range(1, 16)]
    flushes(host, 3)
    assert [each.sq_head for each in host.reap(1)] == [0, 1, 2]


def test_a_full_completion_queue_holds_commands_back() -> None:
    host = NvmeHost()
    host.enable()
    host.create_pair(1, 16, cq_size=4)
    sent = flushes(host, 10)
    first = cids(host, ring=False)
    assert first == sent[:3], "one entry of a ring stays free"
    host.doorbell(1, 2, completion=True)
    assert cids(host, ring=False) == sent[3:5]
    host.doorbell(1, host.rings[1].head, completion=True)
    assert cids(host) + cids(host) + cids(host) == sent[5:]


def test_several_submission_queues_share_a_completion_queue(host: NvmeHost) -> None:
    sent = {1: [host.push(1, FLUSH, nsid=1) for _ in range(3)]}
    for qid in (2, 3):
        done, sq = host.create_sq(qid, 8, 1)
        assert done.status == Status.SUCCESS
        host.rings[qid] = Ring(qid, 1, sq, 8, host.rings[1].cq, host.rings[1].cq_size)
        sent[qid] = [host.push(qid, FLUSH, nsid=1) for _ in range(4)]
    for qid in sent:
        host.ring(qid)
    got: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for each in host.reap(1):
        got[each.sqid].append(each.cid)
    assert got == sent


def test_a_deleted_queue_drops_what_was_not_fetched() -> None:
    host = NvmeHost()
    host.enable()
    host.create_pair(1, 16, cq_size=2)
    sent = flushes(host, 5)
    assert cids(host, ring=False) == sent[:1]
    assert host.admin(AdminOpcode.DELETE_SQ, cdw=(1,)).status == Status.SUCCESS
    host.doorbell(1, 1, completion=True)
    assert cids(host) == []
    assert host.admin(AdminOpcode.DELETE_CQ, cdw=(1,)).status == Status.SUCCESS


@pytest.mark.parametrize("value", [16, 0xFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("completion", [False, True])
def test_a_doorbell_value_that_cannot_be_changes_nothing(host: NvmeHost, value: int, completion: bool) -> None:
    host.doorbell(1, value, completion=completion)
    assert host.nvme.controller.errors.count == 1 and host.status == regs.CSTS_RDY
    assert flushes(host, 3) == cids(host)


def test_completions_that_were_not_posted_cannot_be_taken(host: NvmeHost) -> None:
    flushes(host, 2)
    host.doorbell(1, 3, completion=True)
    assert host.nvme.controller.errors.count == 1
    assert len(cids(host)) == 2


def test_one_doorbell_does_a_bounded_amount_of_work() -> None:
    host = NvmeHost()
    host.enable()
    host.create_pair(1, 1024)
    sent = flushes(host, 1000)
    now = cids(host)
    assert now == sent[: engine.COMMANDS_AT_ONCE]
    host.host.clock.advance(10_000)
    assert now + cids(host) == sent, "the rest is done when there is nothing else to do"


def test_large_commands_are_bounded_by_bytes() -> None:
    host = NvmeHost(drive="mem:64M")
    host.start(size=64)
    for _ in range(20):
        host.push(1, NvmOpcode.VERIFY, nsid=1, cdw=(0, 0, 2047))
    host.ring(1)
    assert len(cids(host)) == engine.BYTES_AT_ONCE // (2048 * 512)
    host.host.clock.advance(10_000)
    assert len(cids(host)) == 12


def test_queues_take_turns() -> None:
    host = NvmeHost()
    host.enable()
    for qid in (1, 2):
        host.create_pair(qid, 1024)
    flushes(host, 1000, 1)
    flushes(host, 10, 2)
    assert len(cids(host, 2)) == 10 and len(cids(host, 1)) < 1000
    host.host.clock.advance(10_000)
    cids(host, 1)
    assert host.rings[1].head == 1000


def test_a_reset_takes_away_what_was_left_for_later() -> None:
    host = NvmeHost()
    host.enable()
    host.create_pair(1, 1024)
    flushes(host, 1000)
    host.disable()
    host.ram[QUEUE_AREA : QUEUE_AREA + 0x4000] = bytes(0x4000)
    host.host.clock.advance(1_000_000)
    assert not any(host.ram[QUEUE_AREA : QUEUE_AREA + 0x4000])


# -- interrupts


def test_the_pin_is_up_while_there_are_completions(host: NvmeHost) -> None:
    flushes(host, 3)
    assert host.host.signals == ["raise"]
    cids(host, most=2)
    assert host.host.signals == ["raise"]
    cids(host)
    assert host.host.signals == ["raise", "lower"]


def test_the_pin_follows_the_mask(host: NvmeHost) -> None:
    host.write(regs.INTMS, 1)
    flushes(host, 1)
    assert host.host.signals == []
    host.write(regs.INTMC, 1)
    host.write(regs.INTMS, 1)
    assert host.host.signals == ["raise", "lower"]
    host.write(regs.INTMC, 1)
    host.disable()
    assert host.host.signals == ["raise", "lower"] * 2


def test_a_queue_without_interrupts_has_none() -> None:
    host = NvmeHost()
    host.enable()
    cq, sq = host.create_cq(1, 8, irq=False)[1], host.create_sq(1, 8, 1)[1]
    host.rings[1] = Ring(1, 1, sq, 8, cq, 8)
    host.host.signals.clear()
    assert flushes(host, 3) == cids(host) and host.host.signals == []


def test_there_is_one_vector_until_messages_are_enabled() -> None:
    host = NvmeHost()
    host.start()
    assert host.create_cq(2, 8, vector=1)[0].status == Status.INVALID_INTERRUPT_VECTOR
    host.enable_msix()
    assert host.create_cq(2, 8, vector=1)[0].status == Status.SUCCESS


def test_a_message_is_for_a_batch_and_does_not_ask_the_mask_of_the_pin() -> None:
    host = NvmeHost()
    host.enable_msix()
    host.start()
    host.host.signals.clear()
    flushes(host, 10)
    assert host.host.signals == ["msi 0"]
    cids(host)
    host.write(regs.INTMS, 1)
    flushes(host, 2)
    assert host.host.signals == ["msi 0", "msi 0"]
    host.write(regs.INTMC, 1)
    assert host.host.signals == ["msi 0", "msi 0"]


def test_msix_has_a_vector_for_each_queue() -> None:
    host = NvmeHost()
    host.enable_msix()
    host.enable()
    for qid in (1, 2, 3):
        host.create_pair(qid, vector=qid + 7)
    host.host.signals.clear()
    for qid in (3, 1, 2, 3):
        flushes(host, 4, qid)
    assert host.host.signals == ["msi 10", "msi 8", "msi 9", "msi 10"]
    assert host.create_cq(4, 8, vector=64)[0].status == Status.SUCCESS
    assert host.create_cq(5, 8, vector=65)[0].status == Status.INVALID_INTERRUPT_VECTOR


def test_a_masked_msix_vector_is_pending_until_unmasked() -> None:
    host = NvmeHost()
    host.enable_msix()
    host.start(vector=2)
    host.device.region_write(0, regs.MSIX_TABLE + 2 * 16 + 12, 4, 1)
    host.host.signals.clear()
    flushes(host, 1)
    assert host.host.signals == [] and host.device.region_read(0, regs.MSIX_PBA, 8) == 4
    host.device.region_write(0, regs.MSIX_TABLE + 2 * 16 + 12, 4, 0)
    assert host.host.signals == ["msi 2"]


# -- data that goes to the controller itself


class Mirror:
    """The controller's BAR on its own bus."""

    min_access_size, max_access_size = 4, 8

    def __init__(self, host: NvmeHost) -> None:
        self._host = host

    def read(self, addr: int, size: int) -> int | None:
        return self._host.device.region_read(0, addr, size)

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        return self._host.device.region_write(0, addr, size, value)


BAR = 0x1000_0000


def show_bar(host: NvmeHost) -> None:
    root = host.space.root
    assert isinstance(root, MemoryRegion)
    root.add_subregion(BAR, IORegion("nvme", regs.BAR_SIZE, Mirror(host)))


def test_a_read_into_its_own_registers_resets_it_and_ends_there(host: NvmeHost) -> None:
    show_bar(host)
    host.write_blocks(0, bytes(512))
    host.push(1, NvmOpcode.READ, nsid=1, prp1=BAR)
    flushes(host, 3)
    assert host.status == 0 and cids(host) == []
    assert not any(host.ram[ADMIN_CQ + 0x800 : ADMIN_CQ + 0x1000])
    host.start()
    assert flushes(host, 2) == cids(host)


def test_a_read_into_its_own_doorbells_adds_commands(host: NvmeHost) -> None:
    show_bar(host)
    doorbells = bytearray(512)
    doorbells[8:12] = (4).to_bytes(4, "little")
    host.write_blocks(0, bytes(doorbells))
    base = host.rings[1].tail
    assert base == 1
    ring = host.rings[1]
    host.ram[DATA : DATA + 512] = bytes(512)
    first = host.push(1, NvmOpcode.READ, nsid=1, prp1=BAR + regs.DOORBELLS)
    rest = [host.push(1, FLUSH, nsid=1) for _ in range(2)]
    host.doorbell(1, 2)
    assert ring.tail == 4 and cids(host) == [first, *rest]


def test_completions_into_its_own_doorbells_end(host: NvmeHost) -> None:
    show_bar(host)
    done = host.admin(AdminOpcode.CREATE_CQ, prp1=BAR + 0x1000, cdw=(2 | 15 << 16, 3))
    assert done.status == Status.SUCCESS
    done, sq = host.create_sq(2, 16, 2)
    for at in range(15):
        host.ram[sq + at * 64 : sq + at * 64 + 64] = regs.SQE.pack(FLUSH, 0, at, 1, *[0] * 10)
    host.doorbell(2, 15)
    host.host.clock.advance(100_000)
    assert host.status & regs.CSTS_RDY
