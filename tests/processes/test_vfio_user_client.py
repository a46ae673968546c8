"""guestd as a client of a vfio-user server that is a stranger: one by the letter of the document, a slow, a rude and a
dying one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import EFAULT, EINVAL, ENOMEM, ENOTSUP, EPERM
from pathlib import Path
from typing import Any

import pytest

from guestd.control import GuestControl
from guestd.migration_state import incoming, outgoing
from guestd.posted_writes import burst
from guestd.precopy import DevicePreCopy
from protocols.control import messages as control
from protocols.transport.loop import DEADLINE_SCALE_VARIABLE
from protocols.transport.runtime import RoleLock
from protocols.transport.zmq import DealerClient
from tests.peers import spec_server as peer
from tests.peers.rig import DEVFN, LIST, NAME, RAM, Dma, PeerGuest, SpecPeer, fds
from vfio_model.errors import ConfigError, VMStateError
from vfio_model.iommu.spapr.regs import TcePerm
from vfio_model.pci.config_space import COMMAND, COMMAND_MASTER, COMMAND_MEMORY
from vfio_model.vmstate.fields import State
from vfio_model.vmstate.stream import Frame, FrameKind, FrameWriter, Section

pytestmark = pytest.mark.machine

GONE = 0xFFFF_FFFF
PAGE = 4096
GPA = 1 << 20
R, W, RW = TcePerm.READ, TcePerm.WRITE, TcePerm.RW

Start = Callable[..., PeerGuest]


class Bench:
    """Peers and guests of a test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.peers: list[SpecPeer] = []
        self.guests: list[PeerGuest] = []

    def start(self, *, dma: Dma = "shared", reconnect_ms: int = 200, plug: bool = True, **options: Any) -> PeerGuest:
        self.peers.append(SpecPeer(self.directory, **options))
        guest = PeerGuest(self.peer.path, self.directory, dma=dma, reconnect_ms=reconnect_ms, plug=plug)
        self.guests.append(guest)
        return guest

    @property
    def peer(self) -> SpecPeer:
        return self.peers[-1]

    def close(self) -> None:
        for guest in self.guests:
            guest.close()
        for each in self.peers:
            each.stop()
            each.path.unlink(missing_ok=True)
        violations = [line["why"] for each in self.peers for line in each.log("violation")]
        assert not violations


@pytest.fixture
def bench(runtime_dir: Path) -> Iterator[Bench]:
    found = Bench(runtime_dir)
    yield found
    found.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of 5 s are 250 ms."""
    monkeypatch.setenv(DEADLINE_SCALE_VARIABLE, "0.05")


# -- regions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_size", [256, 4096])
def test_a_device_is_reset_and_shown_as_it_is(bench: Bench, config_size: int) -> None:
    guest = bench.start(config_size=config_size)
    assert guest.pci.read(DEVFN, 0, 4) == 0x5EC5_1AF4
    assert sorted(guest.bars) == [0, 2, 4]
    assert guest.read(peer.ID) == peer.IDENTITY and guest.read(peer.RESETS) == 1
    guest.write(peer.SCRATCH, 0xCAFE_F00D)
    assert guest.read(peer.SCRATCH) == 0xCAFE_F00D and guest.read(peer.SCRATCH + 2, 2) == 0xCAFE


def test_a_device_that_cannot_be_reset_is_not(bench: Bench) -> None:
    guest = bench.start(reset=False)
    assert guest.read(peer.ID) == peer.IDENTITY and not bench.peer.log("reset")
    guest.guest.reset()
    assert guest.state == "running"


@pytest.mark.parametrize(
    ("mapping", "areas"), [("sparse", peer.AREAS), ("sealed", peer.AREAS), ("whole", [(0, peer.BAR2)])]
)
def test_what_of_a_bar_can_be_mapped_is_and_the_rest_goes_by_message(
    bench: Bench, mapping: str, areas: list[tuple[int, int]]
) -> None:
    guest = bench.start(mmap=mapping)
    assert [(part.offset, part.size) for part in guest.device.bar_parts(2)] == areas
    for offset in (0, 0x1000, 0x1FFC, 0x2000, 0x4000, 0xBFFC, 0xC000, peer.BAR2 - 4):
        guest.write(offset, offset ^ 0x1234_5678, bar=2)
    connection = guest.device.connection
    for offset in (0, 0x1000, 0x1FFC, 0x2000, 0x4000, 0xBFFC, 0xC000, peer.BAR2 - 4):
        assert guest.read(offset, bar=2) == offset ^ 0x1234_5678
        seen = connection.region_read(2, offset, 4)
        assert int.from_bytes(seen, "little") == offset ^ 0x1234_5678, "the server sees the same bytes"


@pytest.mark.parametrize(
    "lie", ["none", "no-fd", "two-fds", "short-file", "overlap", "beyond", "circle", "count", "read-only", "pipe"]
)
def test_a_bar_that_cannot_be_mapped_as_the_server_says_goes_by_message(bench: Bench, lie: str) -> None:
    guest = bench.start(mmap=lie)
    if lie == "circle":  # the first capability leads to the second, which leads back
        assert "no end" in str(guest.trace.named("vfio_user_region_by_message"))
    assert not guest.device.bar_parts(2)
    assert bool(guest.trace.named("vfio_user_region_by_message")) is (lie != "none")
    guest.write(0x1000, 77, bar=2)
    assert guest.read(0x1000, bar=2) == 77 and guest.state == "running"


def test_a_file_that_is_cut_is_asked_for_by_message_from_then_on(bench: Bench) -> None:
    guest = bench.start()
    guest.write(0x1000, 0x1111, bar=2)
    guest.write(peer.CUT, 1)
    assert guest.read(peer.ID) == peer.IDENTITY
    assert guest.read(0x1000, bar=2) == 0x1111
    guest.write(0x1000, 0x2222, bar=2)
    assert guest.read(0x1000, bar=2) == 0x2222
    assert guest.trace.named("vfio_device_memory_vanished")


def test_large_accesses_go_in_pieces_that_the_server_takes(bench: Bench) -> None:
    guest = bench.start(capabilities={"max_data_xfer_size": 100}, mmap="none")
    connection = guest.device.connection
    connection.region_write(2, 3, bytes(range(250)))
    assert connection.region_read(2, 3, 250) == bytes(range(250))


def test_accesses_never_have_more_than_32_kib(bench: Bench) -> None:
    guest = bench.start(mmap="none", capabilities={"max_data_xfer_size": 32 << 10})
    connection = guest.device.connection
    connection.region_write(2, 0, bytes(50_000))
    assert connection.region_read(2, 0, 50_000) == bytes(50_000)


# -- interrupts --------------------------------------------------------------------------------------------------------


def test_the_pin_is_signalled_once_and_again_after_service(bench: Bench) -> None:
    guest = bench.start()
    lines = guest.guest.machine.irqs
    guest.write(peer.IRQ, 0)
    guest.until("the pin goes up", lambda: lines.high)
    guest.read(peer.ID)
    assert not lines.high
    guest.write(peer.IRQ, 0)
    guest.until("it goes up again", lambda: lines.high)


@pytest.mark.parametrize("most", [1, 3, 16])
def test_messages_of_msix_in_as_many_descriptors_as_the_server_takes(bench: Bench, most: int) -> None:
    guest = bench.start(capabilities={"max_msg_fds": most})
    numbers = guest.enable_msix(peer.VECTORS)
    for vector in (0, 5, 15, 5):
        before = guest.raised(numbers[vector])
        guest.write(peer.IRQ, vector)
        guest.until(f"vector {vector} comes", lambda: guest.raised(numbers[vector]) == before + 1)  # noqa: B023
    assert max(line["fds"] for line in bench.peer.log("set_irqs")) == most
    assert {line["index"] for line in bench.peer.log("set_irqs")} <= {0, 2}, "errors and requests are left alone"


# -- DMA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("dma", ["shared", "mapped", "message"])
def test_dma_reaches_what_the_guest_maps_and_nothing_else(bench: Bench, dma: Dma, twin: bool) -> None:
    guest = bench.start(dma=dma, twin=twin)
    guest.window.map_pages(0x10000, [GPA, GPA + 5 * PAGE, GPA + 2 * PAGE])
    guest.cpu.write_memory(GPA, bytes(8 * PAGE))
    assert guest.dma(peer.WRITE, 0x10F00, PAGE + 512, 0xAB) == 0
    assert guest.cpu.read_memory(GPA + 0xF00, 0x100) == b"\xab" * 0x100
    assert guest.cpu.read_memory(GPA + 5 * PAGE, PAGE) == b"\xab" * PAGE
    assert guest.cpu.read_memory(GPA + 2 * PAGE, 0x200) == b"\xab" * 0x100 + bytes(0x100)
    guest.cpu.write_memory(GPA + 5 * PAGE, b"from the guest")
    assert guest.dma(peer.READ, 0x11000, 14) == 0 and guest.data(14) == b"from the guest"
    assert guest.dma(peer.WRITE, 0x20000, 16, 1) == EFAULT
    assert guest.dma(peer.WRITE, 0x12FF0, 32, 2) == EFAULT, "it leaves the last page"
    messages = bench.peer.log("message")
    assert bool(messages) is (dma == "message")


@pytest.mark.parametrize("dma", ["mapped", "message"])
def test_permissions_are_the_tables(bench: Bench, dma: Dma) -> None:
    guest = bench.start(dma=dma)
    for number, perm in enumerate((R, W, RW)):
        guest.window.map(0x10000 + number * PAGE, GPA + 2 * number * PAGE, PAGE, perm)
    done = [
        (guest.dma(peer.READ, 0x10000 + page * PAGE, 8), guest.dma(peer.WRITE, 0x10000 + page * PAGE, 8, 1))
        for page in range(3)
    ]
    assert [(not read, not written) for read, written in done] == [(True, False), (False, True), (True, True)]
    if dma == "mapped":
        assert [line["flags"] for line in bench.peer.log("map")] == [1, 2, 3]


@pytest.mark.parametrize("dma", ["mapped", "message"])
def test_nothing_lands_after_an_unmap_has_returned(bench: Bench, dma: Dma) -> None:
    guest = bench.start(dma=dma)
    guest.window.map(0, GPA, 16 * PAGE)
    assert guest.dma(peer.WRITE, 0x3000, 8, 1) == 0
    guest.window.unmap(0x3000, PAGE)
    assert guest.dma(peer.WRITE, 0x3000, 8, 2) == EFAULT
    assert guest.cpu.read_memory(GPA + 0x3000, 8) == b"\1" * 8
    assert guest.dma(peer.WRITE, 0x2000, 8, 3) == 0 and guest.dma(peer.WRITE, 0x4000, 8, 4) == 0


def test_pages_in_order_are_one_map_and_what_is_left_of_it_comes_back(bench: Bench) -> None:
    guest = bench.start(dma="mapped")
    guest.window.map(0, GPA, 16 * PAGE)
    guest.window.unmap(0x3000, 2 * PAGE)
    said = [(line["what"], line["address"], line["size"] // PAGE) for line in bench.peer.log() if "address" in line]
    assert said == [("map", 0, 16), ("unmap", 0, 16), ("map", 0, 3), ("map", 0x5000, 11)]


def test_a_device_that_is_no_bus_master_reaches_nothing_by_message(bench: Bench) -> None:
    guest = bench.start(dma="message")
    guest.window.map(0, GPA, PAGE)
    guest.pci.write(DEVFN, COMMAND, 2, COMMAND_MEMORY)
    assert guest.dma(peer.UNSOLICITED, 0, 8, 1) == EFAULT
    assert guest.dma(peer.WRITE, 0, 8, 1) == EPERM, "the server was told"
    assert guest.cpu.read_memory(GPA, 8) == bytes(8)


@pytest.mark.parametrize("what", [{"max_dma_maps": 3}, {"pgsizes": 1 << 16}])
def test_what_the_server_cannot_map_goes_by_message(bench: Bench, what: dict[str, int]) -> None:
    guest = bench.start(dma="mapped", capabilities=what)
    for page in range(8):
        guest.window.map(page * PAGE, GPA + 2 * page * PAGE, PAGE)
    for page in range(8):
        assert guest.dma(peer.WRITE, page * PAGE, 8, page + 1) == 0
        assert guest.cpu.read_memory(GPA + 2 * page * PAGE, 8) == bytes([page + 1]) * 8
    assert guest.dma(peer.WRITE, 9 * PAGE, 8, 1) == EFAULT
    assert bench.peer.log("message") and guest.trace.named("vfio_user_dma_by_message")


def test_a_server_without_memory_for_maps_asks_for_every_access(bench: Bench) -> None:
    guest = bench.start(dma="mapped")
    bench.peer.start(refuse={str(peer.DMA_MAP): ENOMEM})
    guest.until("it is lost", lambda: guest.state == "lost")
    guest.window.map(0, GPA, PAGE)
    guest.until("it is given up: not even a map by message is taken", lambda: len(bench.peer.log("gone")) >= 1)
    assert guest.window.get(0) == GPA | RW, "the guest goes on"


def test_a_reset_of_the_machine_unmaps_everything(bench: Bench) -> None:
    guest = bench.start(dma="mapped")
    guest.window.map_pages(0, [GPA + 3 * n * PAGE for n in range(40)])
    assert len(bench.peer.maps()) == 40
    guest.guest.reset()
    guest.device.connection.get_info()
    assert bench.peer.maps() == {}


def test_a_server_that_refuses_an_unmap_is_lost_and_the_hypercall_succeeds(bench: Bench) -> None:
    guest = bench.start(dma="mapped", refuse={str(peer.DMA_UNMAP): EINVAL}, reconnect_ms=0)
    guest.window.map(0, GPA, PAGE)
    guest.window.unmap(0, PAGE)
    assert guest.state == "lost" and "DMA_UNMAP" in str(guest.device.dead)
    assert guest.read(peer.ID) == GONE


@pytest.mark.usefixtures("hasty")
def test_a_server_that_is_too_slow_with_an_unmap_is_lost_and_the_hypercall_succeeds(bench: Bench) -> None:
    guest = bench.start(dma="mapped", delay={str(peer.DMA_UNMAP): 30}, reconnect_ms=0)
    guest.window.map(0, GPA, PAGE)
    guest.window.unmap(0, PAGE)
    assert guest.state == "lost" and "DMA_UNMAP" in str(guest.device.dead)


def test_a_slow_server_is_borne(bench: Bench) -> None:
    delay = {str(command): 0.02 for command in (peer.DMA_MAP, peer.DMA_UNMAP, peer.REGION_READ, peer.SET_IRQS)}
    guest = bench.start(dma="mapped", delay=delay)
    guest.window.map_pages(0, [GPA, GPA + 2 * PAGE])
    assert guest.dma(peer.WRITE, 0, 8, 9) == 0
    guest.window.unmap(0, 2 * PAGE)
    assert guest.state == "running"


# -- bursts ------------------------------------------------------------------------------------------------------------

MULTI = {"write_multiple": True}


def bar_writes(bench: Bench) -> list[tuple[int, int]]:
    """(offset, bytes) of every write to BAR 0, in their order."""
    return [(line["offset"], line["size"]) for line in bench.peer.log("write") if line["region"] == 0]


def test_stores_of_a_burst_travel_together_and_in_order(bench: Bench) -> None:
    guest = bench.start(capabilities=MULTI)
    with burst():
        for at in range(100):
            guest.write(peer.DATA + 8 * at, at + 1, 8)
        guest.write(peer.SCRATCH, 7, 4)
    assert guest.read(peer.SCRATCH) == 7
    assert [guest.read(peer.DATA + 8 * at, 8) for at in range(100)] == list(range(1, 101))
    assert [line["count"] for line in bench.peer.log("multi")] == [64, 37]
    assert bar_writes(bench) == [*((peer.DATA + 8 * at, 8) for at in range(100)), (peer.SCRATCH, 4)]


def test_whatever_else_goes_to_the_device_comes_after_the_stores_before_it(bench: Bench) -> None:
    guest = bench.start(capabilities=MULTI)
    connection = guest.device.connection
    with burst():
        guest.write(peer.SCRATCH, 1)
        guest.write(peer.SCRATCH, 2)
        assert guest.read(peer.SCRATCH) == 2
        guest.write(peer.SCRATCH, 3)
        connection.region_write(0, peer.DATA, bytes(range(32)))
        guest.write(peer.PATTERN, 4)
        guest.write(peer.PATTERN, 5)
        connection.reset()
        guest.write(peer.PATTERN, 6, 1)
    assert guest.read(peer.SCRATCH) == 0 and guest.read(peer.PATTERN) == 6
    scratch, pattern = (peer.SCRATCH, 4), (peer.PATTERN, 4)
    assert bar_writes(bench) == [scratch] * 3 + [(peer.DATA, 32), pattern, pattern, (peer.PATTERN, 1)]
    kinds = [line["what"] for line in bench.peer.log() if line["what"] in ("multi", "reset")]
    assert kinds == ["reset", "multi", "multi", "reset"]


def test_stores_go_one_by_one_outside_a_burst_and_where_it_was_not_agreed(bench: Bench) -> None:
    guest = bench.start()
    with burst():
        guest.write(peer.SCRATCH, 1)
        guest.write(peer.SCRATCH, 2)
    guest.write(peer.SCRATCH, 3)
    assert guest.read(peer.SCRATCH) == 3 and len(bar_writes(bench)) == 3 and not bench.peer.log("multi")


def test_a_device_that_dies_in_a_burst_is_lost_and_the_guest_goes_on(bench: Bench) -> None:
    guest = bench.start(capabilities=MULTI, reconnect_ms=0)
    with burst():
        guest.write(peer.SCRATCH, 1)
        bench.peer.stop()
        guest.write(peer.SCRATCH, 2)
    guest.until("it is lost", lambda: guest.state == "lost")
    assert guest.read(peer.SCRATCH) == GONE


def test_a_drivers_stores_in_one_message_to_guestd_are_a_burst(bench: Bench) -> None:
    guest = bench.start(capabilities=MULTI)
    lock = RoleLock(bench.directory, "guestd")
    socket = GuestControl(guest.guest, bench.directory, lock, guest.loop, guest.trace)
    client = DealerClient(bench.directory / "guestd.ctl")
    store = [control.MmioWrite(guest.bars[0] + peer.DATA + 4 * at, 4, at << 24) for at in range(5)]
    load = control.MmioRead(guest.bars[0] + peer.DATA + 16, 4)
    commands = [*store[:3], control.ClockStep(0), *store[3:], load]
    client.send(control.REQUESTS.encode(control.Request(1, 0, control.Batch(commands))))
    answers: list[bytes] = []
    guest.until("it answers", lambda: (data := client.receive()) and answers.append(data) is None)
    answer = control.RESPONSES.decode(answers[0])
    assert isinstance(answer, control.Response) and isinstance(answer.answer, control.BatchDone)
    assert answer.answer.answers[-1] == control.Value(4 << 24)
    client.close()
    socket.close()
    lock.close()
    assert [line["count"] for line in bench.peer.log("multi")] == [3, 2], "a step of time is between"


# -- doorbells ---------------------------------------------------------------------------------------------------------

BELL = peer.DATA + 0x100
WRONG = ["type", "beyond", "index", "pipe", "full"]


def rings(bench: Bench) -> list[int]:
    return [line["offset"] for line in bench.peer.log("rung")]


def test_a_write_that_is_a_signal_rings_and_others_go_by_message(bench: Bench) -> None:
    bells = [(BELL, 4, None, ""), (BELL + 8, 2, 0x55, ""), (BELL + 8, 2, 0x66, ""), (BELL + 16, 0, None, "")]
    guest = bench.start(bells=bells)
    guest.read(peer.SCRATCH)
    for offset, value, size in ((BELL, 1, 4), (BELL + 8, 0x66, 2), (BELL + 16, 3, 1), (BELL + 16, 3, 8)):
        before = len(rings(bench))
        guest.write(offset, value, size)
        guest.until("it rings", lambda before=before: len(rings(bench)) > before)
    assert rings(bench) == [BELL, BELL + 8, BELL + 16, BELL + 16] and not bar_writes(bench)
    for offset, value, size in ((BELL, 1, 8), (BELL + 8, 0x77, 2), (BELL + 8, 0x66, 4), (BELL + 4, 1, 4)):
        guest.write(offset, value, size)
        assert guest.read(offset, size) == value
    assert bar_writes(bench) == [(BELL, 8), (BELL + 8, 2), (BELL + 8, 4), (BELL + 4, 4)] and len(rings(bench)) == 4


def test_a_ring_does_not_overtake_what_was_posted_before_it(bench: Bench) -> None:
    guest = bench.start(bells=[(BELL, 4, None, "")], capabilities=MULTI)
    guest.write(peer.SCRATCH, 1)
    guest.write(BELL, 2)
    guest.read(peer.SCRATCH)
    assert bar_writes(bench) == [(peer.SCRATCH, 4), (BELL, 4)] and not rings(bench)
    with burst():
        guest.write(peer.SCRATCH, 3)
        guest.write(BELL, 4)
    assert guest.read(BELL) == 4 and not rings(bench)
    guest.write(peer.SCRATCH, 6)
    for value in range(7, 500):
        guest.write(BELL, value)
    assert guest.device.connection.lost is None and not rings(bench)
    guest.until("it has an answer", lambda: guest.write(BELL, 5) or rings(bench))
    assert rings(bench)
    written = [offset for offset, _ in bar_writes(bench)]
    assert written[4] == peer.SCRATCH and set(written[5:]) == {BELL}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_doorbell_that_is_none_goes_by_message(bench: Bench, wrong: str) -> None:
    guest = bench.start(bells=[(BELL, 4, None, wrong)])
    guest.read(peer.SCRATCH)
    guest.write(BELL, 0x1234)
    assert guest.read(BELL) == 0x1234 and bar_writes(bench) == [(BELL, 4)]
    assert len(guest.trace.named("vfio_user_doorbell_by_message")) == (wrong != "full")


def test_many_doorbells_are_asked_for_again_and_closed_with_the_device(bench: Bench) -> None:
    before = fds()
    bells = [(BELL + 8 * at, 4, None, "") for at in range(15)]
    guest = bench.start(bells=bells, plug=False)
    empty = fds()
    guest.guest.add_device(guest.config)
    guest.firmware()
    guest.read(peer.SCRATCH)
    guest.write(BELL + 8 * 14, 1)
    guest.until("it rings", lambda: rings(bench) == [BELL + 8 * 14])
    bench.peer.stop()
    guest.until("it is lost", lambda: guest.state == "lost")
    guest.until("its descriptors are gone", lambda: fds() <= empty)
    assert empty > before


def test_a_device_that_is_back_is_rung_again(bench: Bench) -> None:
    guest = bench.start(bells=[(BELL, 4, None, "")])
    bench.peer.start()
    guest.until("it is lost", lambda: guest.state == "lost")
    guest.until("it is back", lambda: guest.state == "running")
    guest.read(peer.SCRATCH)
    guest.write(BELL, 1)
    guest.until("it rings", lambda: rings(bench) == [BELL])


# -- migration ---------------------------------------------------------------------------------------------------------


def test_a_device_without_migration_blocks_it_by_name(bench: Bench) -> None:
    guest = bench.start()
    with pytest.raises(VMStateError, match=f"{NAME}.*migration"):
        outgoing(guest.guest)


def moved(source: PeerGuest, target: PeerGuest, during: Callable[[], None] = lambda: None) -> DevicePreCopy:
    """The state of the source's device to the target's, ``during()`` between two rounds of what it says early."""
    writer = FrameWriter()
    precopy = DevicePreCopy(source.guest, writer, source.trace)
    precopy.start()
    frames = [Frame(FrameKind.EARLY, frame[5:-4], 0) for frame in precopy.frames()]
    during()
    frames += [Frame(FrameKind.EARLY, frame[5:-4], 0) for frame in precopy.frames()]
    source.guest.states.stop(precopy.check())
    states: list[State] = [entry.export() for entry in outgoing(source.guest, precopy.stand())]
    target.guest.states.stop()
    (entry,) = incoming(target.guest)
    for frame in frames:
        assert entry.early is not None
        entry.early(Section.unpack(frame).data)
    entry.load(states[0])
    target.guest.states.hold()
    target.guest.states.run()
    return precopy


def both(bench: Bench, flags: int) -> tuple[PeerGuest, PeerGuest]:
    """Two guests with a device each."""
    guests = []
    for name in ("a", "b"):
        directory = bench.directory / name
        directory.mkdir()
        bench.directory, old = directory, bench.directory
        guests.append(bench.start(migration=flags))
        bench.directory = old
    return guests[0], guests[1]


def states(peer_process: SpecPeer) -> list[int]:
    return [line["after"] for line in peer_process.log("state")]


def read_in(peer_process: SpecPeer) -> list[tuple[int, int]]:
    """(state, bytes) of each read that got something."""
    return [(line["state"], line["size"]) for line in peer_process.log("read") if line["size"]]


def test_what_a_device_says_in_pre_copy_is_not_asked_again(bench: Bench) -> None:
    source, target = both(bench, 5)
    source.write(peer.SCRATCH, 0xBEEF)
    source.write(peer.PATTERN, 7)
    moved(source, target, lambda: source.write(peer.SCRATCH, 0xF00D))
    assert target.read(peer.SCRATCH) == 0xF00D and target.read(peer.PATTERN) == 7
    first, *later = read_in(bench.peers[0])
    assert first[0] == peer.PRE_COPY and first[1] > 1000
    assert later == [(peer.PRE_COPY, 7)], "one register of 4 bytes has changed"
    assert states(bench.peers[0]) == [peer.PRE_COPY, peer.STOP_COPY, peer.STOP]
    assert states(bench.peers[1])[-3:] == [peer.RESUMING, peer.STOP, peer.RUNNING]


def test_what_changes_after_the_last_round_is_read_when_the_device_stands(bench: Bench) -> None:
    source, target = both(bench, 5)
    writer = FrameWriter()
    precopy = DevicePreCopy(source.guest, writer, source.trace)
    precopy.start()
    early = [Section.unpack(Frame(FrameKind.EARLY, frame[5:-4], 0)).data for frame in precopy.frames()]
    source.write(peer.SCRATCH, 0xCAFE)
    source.guest.states.stop(precopy.check())
    (state,) = (entry.export() for entry in outgoing(source.guest, precopy.stand()))
    assert state["early"] == sum(map(len, early)) == precopy.sent and state["length"] == 7
    (entry,) = incoming(target.guest)
    target.guest.states.stop()
    with pytest.raises(VMStateError, match="goes on from"):
        entry.load(state)
    assert entry.early is not None
    for part in early:
        entry.early(part)
    entry.load(state)
    assert target.read(peer.SCRATCH) == 0xCAFE


def test_a_device_without_pre_copy_says_everything_when_it_stands(bench: Bench) -> None:
    source, target = both(bench, 1)
    source.write(peer.SCRATCH, 0xBEEF)
    assert moved(source, target).sent == 0
    assert target.read(peer.SCRATCH) == 0xBEEF
    assert states(bench.peers[0]) == [peer.STOP, peer.STOP_COPY, peer.STOP]


@pytest.mark.parametrize("how", ["reset", "rest"])
def test_pre_copy_that_is_broken_off_counts_for_nothing(bench: Bench, how: str) -> None:
    source, target = both(bench, 5)
    source.write(peer.SCRATCH, 0xBEEF)
    source.write(peer.PATTERN, 9)

    def broken() -> None:
        if how == "reset":
            source.device.connection.reset()
        else:
            source.guest.states.rest()
            source.guest.states.run()
        source.write(peer.SCRATCH, 5)

    moved(source, target, broken)
    assert target.read(peer.SCRATCH) == 5 and target.read(peer.PATTERN) == 9
    assert states(bench.peers[0])[-3:] == [peer.STOP, peer.STOP_COPY, peer.STOP]
    assert len(source.trace.named("migration_precopy_broken")) == 1


def test_a_migration_that_is_given_up_leaves_pre_copy(bench: Bench) -> None:
    source, _ = both(bench, 5)
    precopy = DevicePreCopy(source.guest, FrameWriter(), source.trace)
    precopy.start()
    list(precopy.frames())
    precopy.abandon()
    precopy.abandon()
    assert states(bench.peers[0]) == [peer.PRE_COPY, peer.RUNNING]


# -- rude and dying ----------------------------------------------------------------------------------------------------

RUDE = [
    "garbage", "wrong-id", "wrong-command", "reply-to-nothing", "huge", "tiny", "type", "long-body", "fds",
    "client-command", "half", "half-body", "die",
]  # fmt: skip
ATTACHING = 40
"""More commands than it takes to attach the device."""


@pytest.mark.parametrize("act", RUDE)
@pytest.mark.parametrize("at", [1, 4, 11])
def test_a_server_that_breaks_off_while_it_is_attached_leaves_nothing(bench: Bench, act: str, at: int) -> None:
    guest = bench.start(plug=False, at=at, act=act)
    before = fds()
    with pytest.raises(ConfigError, match=NAME):
        guest.plug()
    assert fds() == before and not guest.guest.devices
    assert guest.window.map(0, GPA, PAGE) is None


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("act", ["stall", "hang"])
def test_a_server_that_falls_silent_while_it_is_attached(bench: Bench, act: str) -> None:
    guest = bench.start(plug=False, at=3, act=act)
    before = fds()
    with pytest.raises(ConfigError, match=NAME):
        guest.plug()
    assert fds() == before


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("version", ["error", "major", "minor", "json", "unasked-fd", "silent"])
def test_a_server_that_does_not_agree_is_not_attached(bench: Bench, version: str) -> None:
    guest = bench.start(plug=False, version=version)
    before = fds()
    with pytest.raises(ConfigError, match=NAME):
        guest.plug()
    assert fds() == before


@pytest.mark.parametrize("act", RUDE)
def test_a_server_that_is_rude_later_is_lost_and_comes_back(bench: Bench, act: str) -> None:
    guest = bench.start(dma="mapped", at=ATTACHING, act=act, first_client_only=True)
    guest.window.map_pages(0, [GPA, GPA + 4 * PAGE])
    before = fds()
    for _ in range(ATTACHING):
        guest.read(peer.ID)
    guest.until("it is lost", lambda: guest.state == "lost")
    assert guest.read(peer.ID) == GONE and guest.read(0x1000, bar=2) == GONE
    guest.window.map(5 * PAGE, GPA + PAGE, PAGE)
    if act in ("die", "half", "half-body"):
        bench.peer.start(at=0)
    guest.until("it is back", lambda: guest.state == "running")
    assert fds() == before
    assert guest.read(peer.ID) == peer.IDENTITY
    for page in (0, 1, 5):
        assert guest.dma(peer.WRITE, page * PAGE, 8, 7) == 0


def test_what_is_not_known_is_refused_and_the_device_goes_on(bench: Bench) -> None:
    guest = bench.start(at=ATTACHING, act="unknown-command")
    for _ in range(ATTACHING):
        guest.read(peer.ID)
    assert guest.state == "running" and guest.read(peer.ID) == peer.IDENTITY
    assert [(line["command"], line["errno"]) for line in bench.peer.log("reply")] == [(0x7777, ENOTSUP)]


@pytest.mark.usefixtures("hasty")
def test_a_server_that_floods_does_not_stop_the_guest(bench: Bench) -> None:
    guest = bench.start(at=ATTACHING, act="flood", reconnect_ms=0)
    for _ in range(ATTACHING):
        guest.read(peer.ID)
    guest.window.map(0, GPA, PAGE)
    assert guest.window.get(0) == GPA | RW


@pytest.mark.parametrize("at", range(1, 30, 2))
def test_a_server_that_dies_at_any_command_comes_back(bench: Bench, at: int) -> None:
    """The command may be one of attaching; the next server lives."""
    guest = bench.start(dma="mapped", plug=False, at=at, act="die")
    again = False
    try:
        guest.plug()
    except ConfigError:
        bench.peer.start(at=0)
        guest.plug()
        again = True
    guest.window.map_pages(0, [GPA, GPA + 2 * PAGE, GPA + 4 * PAGE])
    if guest.bars:
        guest.enable_msix(4)
    guest.window.unmap(PAGE, PAGE)
    while not bench.peer.log("misbehaves"):
        guest.pci.read(DEVFN, 0x40, 4)
    if not again:
        bench.peer.start(at=0)
    guest.until("it is back", lambda: guest.state == "running" and len(bench.peer.log("client")) > 1)
    guest.firmware()  # what was written while it was gone is lost
    assert guest.dma(peer.WRITE, 0, 8, 7) == 0 and guest.dma(peer.WRITE, PAGE, 8, 7) == EFAULT


# -- coming back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dma", ["mapped", "message"])
def test_a_server_that_is_started_again_is_a_device_that_was_reset(bench: Bench, dma: Dma) -> None:
    guest = bench.start(dma=dma)
    guest.window.map_pages(0, [GPA, GPA + 2 * PAGE])
    guest.write(peer.SCRATCH, 5)
    guest.write(0x1000, 6, bar=2)
    numbers = guest.enable_msix(3)
    bench.peer.stop()
    guest.until("it is lost", lambda: guest.state == "lost")
    assert guest.read(peer.ID) == GONE and guest.read(0x1000, bar=2) == GONE
    assert guest.pci.read(DEVFN, 0, 4) == GONE
    guest.window.unmap(0, PAGE)
    guest.window.map(7 * PAGE, GPA + PAGE, PAGE, W)
    bench.peer.start()
    guest.until("it is back", lambda: guest.state == "running")
    assert (guest.read(peer.SCRATCH), guest.read(peer.RESETS)) == (0, 1)
    assert guest.read(0x1000, bar=2) == 0
    guest.write(0x1000, 8, bar=2)
    assert guest.device.connection.region_read(2, 0x1000, 1) == b"\x08", "the new server's memory"
    assert guest.pci.read(DEVFN, COMMAND, 2) & 7 == COMMAND_MEMORY | COMMAND_MASTER
    assert guest.dma(peer.WRITE, 0, 8, 1) == EFAULT
    assert guest.dma(peer.WRITE, PAGE, 8, 2) == 0 and guest.dma(peer.WRITE, 7 * PAGE, 8, 3) == 0
    guest.write(peer.IRQ, 2)
    guest.until("its interrupts are set anew", lambda: guest.raised(numbers[2]) == 1)


def test_another_device_at_the_same_socket_is_not_taken_for_it(bench: Bench) -> None:
    guest = bench.start()
    bench.peer.stop()
    guest.until("it is lost", lambda: guest.state == "lost")
    bench.peer.start(device_id=0xBAD)
    guest.until("guestd has seen it", lambda: "0x0bad" in str(guest.device.dead))
    assert guest.state == "lost" and "another device" in str(guest.device.dead)
    bench.peer.start()
    guest.until("the right one is back", lambda: guest.state == "running")


def test_a_device_may_stay_lost(bench: Bench) -> None:
    guest = bench.start(reconnect_ms=0)
    bench.peer.start()
    guest.until("it is lost", lambda: guest.state == "lost")
    for _ in range(50):
        guest.loop.run_once(0.005)
    assert guest.state == "lost" and not [line for line in bench.peer.log("client")][1:]


@pytest.mark.usefixtures("hasty")
def test_a_silent_server_is_tried_again_and_the_guest_does_not_wait(bench: Bench) -> None:
    guest = bench.start()
    bench.peer.start(version="silent")
    guest.until("it was tried twice", lambda: len(guest.trace.named("vfio_user_not_back")) > 1)
    assert guest.read(peer.ID) == GONE
    bench.peer.start()
    guest.until("it is back", lambda: guest.state == "running")


def test_a_lost_device_is_unplugged_and_nobody_comes_back(bench: Bench) -> None:
    guest = bench.start(plug=False)
    before = fds()
    guest.plug()
    bench.peer.start()
    guest.until("it is lost", lambda: guest.state == "lost")
    guest.guest.remove_device(NAME)
    for _ in range(50):
        guest.loop.run_once(0.005)
    assert len(bench.peer.log("client")) == 1 and fds() == before
    guest.plug()
    assert guest.read(peer.ID) == peer.IDENTITY
    guest.guest.remove_device(NAME)
    assert fds() == before


def test_all_of_ram_is_where_it_was_said_to_be(bench: Bench) -> None:
    """A map of everything, and bytes at its ends."""
    guest = bench.start(dma="mapped")
    guest.window.map(0, 0, LIST)
    maps = bench.peer.maps()
    assert all(line["offset"] == address and line["fd"] for address, line in maps.items())
    assert sum(line["size"] for line in maps.values()) == LIST and len(maps) == -(-LIST // (512 * PAGE))
    guest.cpu.write_memory(LIST - 8, b"the last")
    assert guest.dma(peer.READ, LIST - 8, 8) == 0 and guest.data(8) == b"the last"
    assert RAM > LIST
