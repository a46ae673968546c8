"""The address translation cache of a remote device: hits without messages, and every order of answer and
invalidation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.batch import variant
from vfio_model.memory import atc_path
from vfio_model.memory.atc import MAX_ASKS, CachedImpl
from vfio_model.memory.atc_entries import EntryTable
from vfio_model.memory.dma import BLOCKED, DMASpace
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.lane import LANES_SIZE, SECTION_BYTES, Lane, LaneArea, init_lanes
from vfio_model.memory.revoke import NoFence, Revoke
from vfio_model.memory.ring import RecordFlags, RingReader, RingWriter, init_ring, pasid_flags, ring_size
from vfio_model.memory.types import PCI_NO_PASID, DMADirection, IOMMUAccessFlags, MemTxResult
from vfio_model.ranges import U64_MAX

RAM_SIZE = 1 << 20
PAGE = 0x1000
AS_ID = 7
RW, RO, NONE = IOMMUAccessFlags.RW, IOMMUAccessFlags.RO, IOMMUAccessFlags.NONE
IOVA = 0x8000_0000
OK, DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR


@pytest.fixture(params=["compiled", "Python"], autouse=True, scope="module")
def variant_of_hits(request: pytest.FixtureRequest) -> Iterator[None]:
    """What serves hits, in every test here."""
    if request.param == "compiled" and atc_path.Path is None:
        pytest.skip("not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "chosen", "compiled" if request.param == "compiled" else "numpy")
        yield


def ram_at(gpa: int, view: memoryview) -> IovaMaps[None]:
    """Guest RAM of one segment."""
    maps: IovaMaps[None] = IovaMaps()
    maps.add(IovaMap(gpa, len(view), READ | WRITE, view, None))
    return maps


class Guest:
    """The vIOMMU's side: a table, the ring's writer, and hooks that run while an answer is on its way."""

    def __init__(self, *, compiled: bool = True) -> None:
        self.ram = memoryview(bytearray(RAM_SIZE))
        self.table: dict[int, tuple[int, int, IOMMUAccessFlags]] = {}
        words = memoryview(bytearray(ring_size(16))).cast("Q")
        init_ring(words, 16)
        self.ring = RingWriter(words)
        self.asked = 0
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        lanes = memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_lanes(lanes)
        self.lanes = LaneArea("device", lanes)
        self.lane = Lane(lanes, 0)
        self.memory = ram_at(0, self.ram)
        self.fallback = RecordingFallback()
        self.impl = CachedImpl(
            self.ask,
            RingReader(words),
            self.lane,
            self.memory,
            as_id=AS_ID,
            fallback=self.fallback,
            compiled=compiled,
        )

    def map(self, iova: int, gpa: int, perm: IOMMUAccessFlags = RW, mask: int = PAGE - 1) -> None:
        self.table[iova] = (gpa, mask, perm)

    def unmap(self, iova: int) -> None:
        """Take the page away and publish, as a guest's invalidation does; the revoke is up to the test."""
        _, mask, _ = self.table.pop(iova)
        self.invalidate(iova, iova + mask)

    def invalidate(self, iova: int, last: int) -> None:
        self.ring.append(AS_ID, iova, last)
        self.ring.publish()

    def ask(self, iova: int, length: int, is_write: bool) -> IOMMUTLBEntry | None:
        assert not self.lane.inside, "nobody waits for anything inside a DMA section"
        self.asked += 1
        before, self.before = self.before, lambda: None
        after, self.after = self.after, lambda: None
        before()
        answer = IOMMUTLBEntry(None, iova & ~(PAGE - 1), 0, PAGE - 1, NONE)
        for start, (gpa, mask, perm) in self.table.items():
            if start <= iova <= start + mask:
                answer = IOMMUTLBEntry(None, start, gpa, mask, perm)
        after()
        return answer


class RecordingFallback:
    """The message path, as a list of what came."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def read(self, iova: int, out: bytearray | memoryview) -> MemTxResult:
        self.calls.append(("read", iova, len(out)))
        out[:] = b"m" * len(out)
        return OK

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> MemTxResult:
        self.calls.append(("write", iova, len(data)))
        return OK

    def read_many(self, iovas: object, size: int, out: bytearray | memoryview) -> MemTxResult:
        raise NotImplementedError

    def write_many(self, iovas: object, size: int, data: bytes | bytearray | memoryview) -> MemTxResult:
        raise NotImplementedError

    def map(self, iova: int, length: int, direction: DMADirection, on_invalidate: object = None) -> None:
        raise NotImplementedError


@pytest.fixture
def guest() -> Guest:
    guest = Guest()
    guest.impl.arm()
    guest.map(IOVA, 0x3000)
    return guest


def test_a_miss_asks_once_and_hits_ask_nobody(guest: Guest) -> None:
    for turn in range(5):
        assert guest.impl.write(IOVA + 8 * turn, b"abcdefgh") == OK
    out = bytearray(8)
    assert guest.impl.read(IOVA + 8, out) == OK and out == b"abcdefgh"
    assert guest.asked == 1 and guest.ram[0x3000:0x3008] == b"abcdefgh"
    assert not guest.lane.inside and guest.lane.words[guest.lane.slot] > 0


def test_a_device_that_is_not_armed_never_caches() -> None:
    guest = Guest()
    guest.map(IOVA, 0x3000)
    out = bytearray(4)
    assert guest.impl.read(IOVA, out) == OK and guest.impl.write(IOVA, b"data") == OK
    assert out == b"mmmm"
    assert guest.asked == 0 and len(guest.impl.entries) == 0
    assert guest.fallback.calls == [("read", IOVA, 4), ("write", IOVA, 4)]


def test_disarming_forgets_everything(guest: Guest) -> None:
    guest.impl.write(IOVA, b"x")
    guest.impl.disarm()
    assert guest.impl.write(IOVA, b"y") == OK
    assert guest.fallback.calls == [("write", IOVA, 1)] and guest.ram[0x3000] == ord("x")


# -- the six orders of request R, translation T, invalidation I, completion C, use U


def test_order_invalidation_before_the_request(guest: Guest) -> None:
    guest.invalidate(IOVA, IOVA + PAGE - 1)
    assert guest.impl.write(IOVA, b"x") == OK
    assert guest.asked == 1


@pytest.mark.parametrize("when", ["before", "after"], ids=["R-I-T-C", "R-T-I-C"])
@pytest.mark.parametrize("overlaps", [True, False])
def test_order_invalidation_while_the_request_is_out(guest: Guest, when: str, overlaps: bool) -> None:
    at = IOVA if overlaps else IOVA + PAGE
    setattr(guest, when, lambda: guest.invalidate(at, at + PAGE - 1))
    assert guest.impl.write(IOVA, b"x") == OK
    assert guest.asked == (2 if overlaps else 1)


def test_a_stale_answer_is_never_used(guest: Guest) -> None:
    def remap() -> None:
        guest.unmap(IOVA)
        guest.map(IOVA, 0x9000)

    guest.after = remap
    assert guest.impl.write(IOVA, b"new!") == OK
    assert guest.ram[0x9000:0x9004] == b"new!" and guest.ram[0x3000] == 0


def test_order_invalidation_between_completion_and_use(guest: Guest) -> None:
    guest.impl.write(IOVA, b"x")
    guest.unmap(IOVA)
    assert guest.impl.write(IOVA, b"y") == DECODE_ERROR
    assert guest.asked == 2 and guest.ram[0x3000] == ord("x")


def test_order_invalidation_inside_the_section_is_waited_for() -> None:
    """In Python: nothing can be run in the middle of a compiled one."""
    guest = Guest(compiled=False)
    guest.impl.arm()
    guest.map(IOVA, 0x3000)
    guest.impl.write(IOVA, b"x")
    revokes: list[Revoke] = []

    class Data(bytearray):
        """The moment between lookup and copy: the fast path takes the length after it compared the head."""

        def __len__(self) -> int:
            if not revokes:
                guest.unmap(IOVA)
                revokes.append(Revoke(NoFence(), [guest.lanes]))
                assert not revokes[0].start(), "the section is open: the revoke waits"
            return super().__len__()

    assert guest.impl.write(IOVA, Data(b"y")) == OK, "a section that began before may finish"
    assert revokes[0].poll(), "the section is over"
    assert guest.impl.write(IOVA, b"z") == DECODE_ERROR
    assert guest.ram[0x3000] == ord("y")


def test_order_invalidation_after_the_section_needs_no_wait(guest: Guest) -> None:
    guest.impl.write(IOVA, b"x")
    guest.unmap(IOVA)
    assert Revoke(NoFence(), [guest.lanes]).start()
    assert guest.impl.write(IOVA, b"y") == DECODE_ERROR


def test_an_invalidation_of_another_part_of_a_large_entry_drops_the_answer(guest: Guest) -> None:
    big = 0x9000_0000
    guest.map(big, 0x40000, mask=0xFFFF)
    guest.after = lambda: guest.invalidate(big + 0xF000, big + 0xFFFF)
    assert guest.impl.write(big, b"x") == OK
    assert guest.asked == 2


def test_a_request_inside_a_request_keeps_its_own_account(guest: Guest) -> None:
    guest.map(IOVA + PAGE, 0x5000)

    def nested() -> None:
        assert guest.impl.write(IOVA + PAGE, b"inner") == OK
        guest.invalidate(IOVA, IOVA + PAGE - 1)

    guest.after = nested
    assert guest.impl.write(IOVA, b"outer") == OK
    assert guest.asked == 3 and guest.ram[0x5000:0x5005] == b"inner"


def test_a_guest_that_always_invalidates_ends_in_a_bus_error(guest: Guest) -> None:
    def again() -> None:
        guest.invalidate(IOVA, IOVA)
        guest.after = again

    guest.after = again
    assert guest.impl.write(IOVA, b"x") == MemTxResult.ERROR
    assert guest.asked == MAX_ASKS


# -- invalidations


def test_overrun_flushes_all_also_answers_on_their_way(guest: Guest) -> None:
    def flood() -> None:
        for page in range(40):
            guest.ring.append(99, page, page)
            guest.ring.publish()

    guest.impl.write(IOVA, b"x")
    flood()
    guest.impl.write(IOVA, b"x")
    assert guest.asked == 2
    guest.map(IOVA + PAGE, 0x5000)
    guest.after = flood
    guest.impl.write(IOVA + PAGE, b"y")
    assert guest.asked == 4


@pytest.mark.parametrize(
    ("as_id", "flags", "kept"),
    [
        (AS_ID, pasid_flags(PCI_NO_PASID), False),
        (AS_ID + 1, pasid_flags(PCI_NO_PASID), True),
        (AS_ID, pasid_flags(5), True),
        (AS_ID, pasid_flags(5, RecordFlags.ANY_PASID), False),
    ],
)
def test_only_records_of_its_address_space_and_pasid_count(guest: Guest, as_id: int, flags: int, kept: bool) -> None:
    guest.impl.write(IOVA, b"x")
    guest.ring.append(as_id, IOVA, IOVA, flags)
    guest.ring.publish()
    guest.impl.write(IOVA, b"x")
    assert guest.asked == (1 if kept else 2)


def test_an_invalidation_by_message_and_a_new_address_space_forget(guest: Guest) -> None:
    guest.impl.write(IOVA, b"x")
    guest.impl.invalidate(IOVA + 5, IOVA + 5)
    guest.impl.write(IOVA, b"x")
    guest.impl.retarget(AS_ID + 1)
    guest.impl.write(IOVA, b"x")
    assert guest.asked == 3


# -- faults, permissions, what is not cacheable


def test_a_fault_is_not_cached(guest: Guest) -> None:
    out = bytearray(b"stale")
    assert guest.impl.read(IOVA + PAGE, out) == DECODE_ERROR and out == bytes(5)
    guest.map(IOVA + PAGE, 0x5000)
    guest.ram[0x5000:0x5005] = b"fresh"
    assert guest.impl.read(IOVA + PAGE, out) == OK and out == b"fresh"


def test_every_permission_needed_must_be_there(guest: Guest) -> None:
    guest.map(IOVA, 0x3000, RO)
    assert guest.impl.read(IOVA, bytearray(4)) == OK
    assert guest.impl.write(IOVA, b"x") == DECODE_ERROR
    guest.map(IOVA, 0x3000, RW)
    assert guest.impl.write(IOVA, b"x") == OK, "more permission needs no invalidation"


def test_untranslated_only_and_what_is_not_ram_go_by_message(guest: Guest) -> None:
    guest.map(IOVA, 0x3000, RW | IOMMUAccessFlags.UNTRANSLATED_ONLY)
    guest.map(IOVA + PAGE, RAM_SIZE)
    assert guest.impl.write(IOVA + PAGE - 2, b"abcd") == OK
    assert guest.fallback.calls == [("write", IOVA + PAGE - 2, 2), ("write", IOVA + PAGE, 2)]
    assert len(guest.impl.entries) == 0


def test_nobody_answers() -> None:
    guest = Guest()
    impl = CachedImpl(lambda *_: None, RingReader(guest.ring._words), guest.lane, guest.memory, as_id=1)
    impl.arm()
    out = bytearray(b"stale")
    assert impl.read(0, out) == MemTxResult.ERROR and out == bytes(5)


def test_an_access_over_several_pages_stops_at_the_first_failure(guest: Guest) -> None:
    guest.map(IOVA + PAGE, 0x7000)
    guest.ram[0x7000:0x8000] = b"7" * PAGE
    out = bytearray(b"s" * 0x1800)
    assert guest.impl.read(IOVA + 0xC00, out) == DECODE_ERROR
    assert out == bytes(0x400) + b"7" * 0x1000 + bytes(0x400)
    assert guest.impl.write(IOVA + 0xFFF, b"ab" + b"c" * PAGE) == DECODE_ERROR
    assert guest.ram[0x3FFF] == ord("a") and guest.ram[0x7000:0x8000] == b"b" + b"c" * 0xFFF


def test_a_long_copy_is_several_sections(guest: Guest) -> None:
    guest.map(0, 0, mask=RAM_SIZE - 1)
    data = bytes(range(256)) * (RAM_SIZE // 256)
    assert guest.impl.write(0, data) == OK
    before = guest.lane.words[guest.lane.slot]
    out = bytearray(RAM_SIZE)
    assert guest.impl.read(0, out) == OK and out == data and guest.asked == 1
    assert (guest.lane.words[guest.lane.slot] - before) // 2 >= RAM_SIZE // SECTION_BYTES


def test_many_pieces_are_one_section_while_they_hit(guest: Guest) -> None:
    guest.map(IOVA + PAGE, 0x5000)
    iovas = [IOVA + 64 * (at % 128) for at in range(256)]
    data = bytes(at & 0xFF for at in range(256 * 64))
    assert guest.impl.write_many(iovas, 64, data) == OK and guest.asked == 2
    before = guest.lane.words[guest.lane.slot]
    out = bytearray(len(data))
    assert guest.impl.read_many(iovas, 64, out) == OK
    assert guest.lane.words[guest.lane.slot] - before == 2
    assert out[128 * 64 :] == data[128 * 64 :]


def test_many_pieces_stop_at_the_first_failure_and_zero_the_rest(guest: Guest) -> None:
    guest.ram[0x3000:0x3004] = b"good"
    out = bytearray(b"s" * 12)
    assert guest.impl.read_many([IOVA, IOVA + PAGE, IOVA], 4, out) == DECODE_ERROR
    assert out == b"good" + bytes(8)


def test_a_map_is_a_bounce_buffer_that_translates_again_when_it_goes_back(guest: Guest) -> None:
    dma = DMASpace(guest.impl)
    mapping = dma.map(IOVA, 16, DMADirection.FROM_DEVICE)
    assert mapping is not None and mapping.bounce
    mapping.view[:4] = b"late"
    guest.unmap(IOVA)
    dma.unmap(mapping, 4)
    assert guest.ram[0x3000:0x3004] == bytes(4)
    assert dma.map(IOVA, 16, DMADirection.TO_DEVICE) is None
    assert guest.impl.bounce.used == 0


# -- the table


def test_an_entry_larger_than_its_ram_is_kept_as_the_part_that_fits() -> None:
    memory = ram_at(0x10000, memoryview(bytearray(0x30000)))
    table = EntryTable()
    identity = IOMMUTLBEntry(None, 0, 0, U64_MAX, RW)
    assert table.insert(0x25000, identity, memory)
    hit = table.find(0x25000, True)
    assert hit is not None and (hit[0], hit[1]) == (0x20000, 0x40000)
    assert table.find(0x1F000, True) is None
    assert not table.insert(0x40000, identity, memory)


PAGES = 32
SIZES = (0, 1, 3)  # entries of 1, 2 and 8 pages


@given(
    st.lists(
        st.tuples(st.sampled_from(["insert", "drop", "clear"]), st.integers(0, PAGES - 1), st.integers(0, 9)),
        max_size=40,
    )
)
def test_the_table_against_a_dict_of_pages(steps: list[tuple[str, int, int]]) -> None:
    memory = ram_at(0, memoryview(bytearray(PAGES * PAGE)))
    table, oracle = EntryTable(), dict[int, tuple[int, int]]()

    def forget(first: int, last: int) -> None:
        for start, size in {entry for entry in oracle.values()}:
            if start <= last and first < start + size:
                for page in range(start, start + size):
                    oracle.pop(page)

    for kind, page, extra in steps:
        if kind == "insert":
            size = 1 << SIZES[extra % len(SIZES)]
            start = page & ~(size - 1)
            perm = RW if extra & 1 else RO
            entry = IOMMUTLBEntry(None, start * PAGE, start * PAGE, size * PAGE - 1, perm)
            assert table.insert(page * PAGE, entry, memory)
            forget(start, start + size - 1)
            oracle.update(dict.fromkeys(range(start, start + size), (start, size)))
        elif kind == "drop":
            table.drop(page * PAGE, (page + extra) * PAGE + 5)
            forget(page, page + extra)
        else:
            table.clear()
            oracle.clear()
        for probe in range(PAGES):
            hit = table.find(probe * PAGE + 1, False)
            found = None if hit is None else (hit[0] // PAGE, (hit[1] - hit[0]) // PAGE)
            assert found == oracle.get(probe)


def test_methods_in_hand_use_nothing_cached_once_the_device_is_bound_elsewhere() -> None:
    guest = Guest()
    guest.impl.arm()
    guest.map(IOVA, 0x2000)
    dma = DMASpace(guest.impl)
    write = dma.write
    assert write(IOVA, b"before") == OK
    dma.bind(BLOCKED)
    guest.table.clear()  # bus mastering is off: the guest refuses what is asked
    assert write(IOVA, b"after!") == DECODE_ERROR
    assert guest.ram[0x2000:0x2006] == b"before"
