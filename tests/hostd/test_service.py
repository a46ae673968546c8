"""The container service without processes: events in, effects out, a revoke held open at will."""

from __future__ import annotations

import itertools
import struct
from errno import EBADF, EIO, EMFILE

import pytest

from hostd.events import (
    Closed,
    Connected,
    DeviceDied,
    DeviceFailed,
    DeviceQuiet,
    DeviceReady,
    Disconnect,
    DomainsChanged,
    Effect,
    Event,
    FileMessage,
    Late,
    PortMessage,
    SendDevice,
    SendFile,
    SendReturn,
    ServerDied,
    StartDevice,
    StopDevice,
    Tick,
)
from hostd.service import ContainerService, ServiceOptions
from protocols.port import device as device_port
from protocols.port import files, messages
from vfio_model.host.host import private_buffers
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.revoke import Fence, NoFence
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl, SpaprRegisterMemory

HVA = 1 << 40
SIZE = 1 << 20
NAMES = ("0000:01:00.0", "0000:02:00.0")
TOPOLOGY = HostTopology(groups=tuple(GroupSpec(26 + n, (DeviceSpec(name, "edu"),)) for n, name in enumerate(NAMES)))


class Fd:
    """A descriptor that counts how often it was closed."""

    made: list[Fd]

    def __init__(self, ledger: list[Fd], size: int = SIZE, inode: int = 1) -> None:
        self.ledger, self.size, self.inode, self.closed = ledger, size, inode, 0
        ledger.append(self)

    def close(self) -> None:
        self.closed += 1

    def duplicate(self) -> Fd:
        return Fd(self.ledger, self.size, self.inode)

    def identity(self) -> tuple[int, int]:
        return 1, self.inode

    def sealed_size(self) -> int:
        return self.size


class Lanes:
    """One lane whose counter the test sets."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.living = name, 0, True

    def snapshot(self) -> list[int]:
        return [self.count]

    def alive(self) -> bool:
        return self.living


class World:
    """A service, the shell's side of its effects, and shorthands for clients."""

    def __init__(self, fence: Fence | None = NoFence(), **options: object) -> None:
        numbers = itertools.count(1000)
        self.service = ContainerService(
            TOPOLOGY,
            private_buffers,
            fence,
            ServiceOptions(new_handle=lambda: next(numbers), **options),  # type: ignore[arg-type]
        )
        self.effects: list[Effect] = []
        self.ledger: list[Fd] = []
        self.connections = itertools.count(1)
        self.seqs = itertools.count(1)
        self.lanes: dict[int, Lanes] = {}

    def do(self, event: Event) -> list[Effect]:
        """Handle an event; descriptors of what is sent are closed, as the shell does."""
        effects = self.service.handle(event)
        for effect in effects:
            if isinstance(effect, SendFile | SendDevice | StartDevice):
                for fd in effect.fds:
                    fd.close()
        self.effects += effects
        return effects

    def all(self, kind: type[Effect]) -> list[Effect]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def request(self, connection: int, message: files.Request, *fds: Fd) -> files.Response | None:
        for effect in self.do(FileMessage(connection, message, fds)):
            if isinstance(effect, SendFile) and effect.connection == connection:
                return effect.message
        return None

    def connect(self, pid: int) -> int:
        connection = next(self.connections)
        self.do(Connected(connection, pid))
        return connection

    def ready(self, key: int) -> None:
        self.lanes[key] = Lanes(self.service.state.devices.get(key).name)  # type: ignore[union-attr]
        self.do(DeviceReady(key, Fd(self.ledger), Fd(self.ledger), 4000 + key, self.lanes[key]))

    def leaked(self) -> list[Fd]:
        """Descriptors that are not closed exactly once."""
        return [fd for fd in self.ledger if fd.closed != 1]


class Guest:
    """A client with a container and a group, ready to map."""

    def __init__(self, world: World, pid: int = 100, group: int = 26) -> None:
        self.world, self.pid = world, pid
        self.mm_connection = world.connect(pid)
        opened = world.request(self.mm_connection, files.OpenMm((1 << 64) - 1, "guest"))
        assert isinstance(opened, files.Opened)
        self.mm = opened.handle
        self.container_connection, self.container = self.open("/dev/vfio/vfio")
        self.group_connection, self.group = self.open(f"/dev/vfio/{group}")
        self.name = NAMES[group - 26]
        done = world.request(self.mm_connection, files.DeclareMemory(HVA, SIZE, "ram", 0, 65536), Fd(world.ledger))
        assert isinstance(done, files.Done)
        assert not self.ioctl(self.group, Ioctl.VFIO_GROUP_SET_CONTAINER, struct.pack("=Q", self.container)).errno
        assert not self.ioctl(self.container, Ioctl.VFIO_SET_IOMMU, struct.pack("=I", 7)).errno
        register = SpaprRegisterMemory(vaddr=HVA, size=SIZE).pack()
        assert not self.ioctl(self.container, Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, register).errno
        assert not self.map().errno

    def open(self, path: str) -> tuple[int, int]:
        connection = self.world.connect(self.pid)
        opened = self.world.request(connection, files.OpenFile(path, self.mm))
        assert isinstance(opened, files.Opened), opened
        return connection, opened.handle

    def send(self, handle: int, cmd: int, arg: bytes) -> int:
        seq = next(self.world.seqs)
        self.world.do(PortMessage(b"guest", messages.Ioctl(seq, seq, self.mm, handle, cmd, 1, arg)))
        return seq

    def answer(self, seq: int) -> messages.Return | None:
        for effect in self.world.effects:
            if isinstance(effect, SendReturn) and effect.message.seq == seq:
                return effect.message
        return None

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> messages.Return:
        answer = self.answer(self.send(handle, cmd, arg))
        assert answer is not None, "the ioctl is pending"
        return answer

    def map(self) -> messages.Return:
        return self.ioctl(self.container, Ioctl.VFIO_IOMMU_MAP_DMA, DmaMap(0, 3, HVA, 0, 4096).pack())

    def send_unmap(self) -> int:
        return self.send(self.container, Ioctl.VFIO_IOMMU_UNMAP_DMA, DmaUnmap(iova=0, size=4096).pack())

    def send_get_device(self) -> int:
        return self.send(self.group, Ioctl.VFIO_GROUP_GET_DEVICE_FD, self.name.encode() + b"\0")

    def open_device(self) -> int:
        """The key of a running device."""
        seq = self.send_get_device()
        start = self.world.all(StartDevice)[-1]
        assert isinstance(start, StartDevice)
        self.world.ready(start.key)
        answer = self.answer(seq)
        assert answer is not None and not answer.errno
        return start.key

    def vanish(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        """EOF of all its connections, in some order."""
        connections = (self.mm_connection, self.container_connection, self.group_connection)
        for index in order:
            self.world.do(Closed(connections[index]))


def kinds(effects: list[Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def test_the_device_file_is_sent_before_the_return_that_carries_its_token() -> None:
    world = World()
    guest = Guest(world)
    seq = guest.send_get_device()
    assert guest.answer(seq) is None, "it waits for the device process"
    start = world.all(StartDevice)[0]
    assert isinstance(start, StartDevice)
    assert [segment.length for segment in start.segments] == [SIZE]
    before = len(world.effects)
    world.ready(start.key)
    sent = [effect for effect in world.effects[before:] if isinstance(effect, SendFile | SendReturn)]
    assert kinds(sent) == ["SendFile", "SendReturn"]
    first, second = sent
    assert isinstance(first, SendFile) and isinstance(first.message, files.DeviceFd) and isinstance(second, SendReturn)
    assert second.message.arg == struct.pack("=Q", first.message.token)
    assert first.connection == guest.group_connection


@pytest.mark.parametrize("how", ["failed", "died", "client gone"])
def test_a_device_that_does_not_start_is_eio_and_can_be_opened_again(how: str) -> None:
    world = World()
    guest = Guest(world)
    seq = guest.send_get_device()
    start = world.all(StartDevice)[0]
    assert isinstance(start, StartDevice)
    if how == "failed":
        world.do(DeviceFailed(start.key, "no such model"))
        assert world.all(StopDevice)
    elif how == "client gone":
        guest.vanish()
        assert world.all(StopDevice)
    world.do(DeviceDied(start.key))
    if how == "client gone":
        guest = Guest(world, pid=101)
    else:
        answer = guest.answer(seq)
        assert answer is not None and answer.errno == EIO
    guest.open_device()


def test_an_unmap_is_answered_when_the_lane_has_moved_and_later_requests_wait_behind_it() -> None:
    world = World()
    guest, other = Guest(world), Guest(world, pid=200, group=27)
    lanes = world.lanes[guest.open_device()]
    lanes.count = 7
    unmap = guest.send_unmap()
    behind = guest.send(guest.container, Ioctl.VFIO_GET_API_VERSION, b"")
    assert guest.answer(unmap) is None and guest.answer(behind) is None
    assert not other.map().errno, "another container goes on"
    assert world.service.revoking
    world.do(Tick(1.0))
    assert guest.answer(unmap) is None
    lanes.count = 8
    world.do(Tick(1.1))
    returns = [effect.message.seq for effect in world.effects[-2:] if isinstance(effect, SendReturn)]
    assert returns == [unmap, behind]
    assert not world.service.revoking


def test_an_even_lane_is_not_waited_for() -> None:
    world = World()
    guest = Guest(world)
    world.lanes[guest.open_device()].count = 8
    assert guest.answer(guest.send_unmap()) is not None


def test_with_the_fault_injection_nobody_waits() -> None:
    world = World(skip_wait=True)
    guest = Guest(world)
    world.lanes[guest.open_device()].count = 7
    assert guest.answer(guest.send_unmap()) is not None


def test_late_is_said_once_after_the_deadline_and_only_of_who_is_still_inside() -> None:
    world = World(deadline=5.0)
    guest = Guest(world)
    key = guest.open_device()
    world.lanes[key].count = 7
    unmap = guest.send_unmap()
    for now in (10.0, 14.9):
        assert not [effect for effect in world.do(Tick(now)) if isinstance(effect, Late)]
    late = [effect for effect in world.do(Tick(15.0)) if isinstance(effect, Late)]
    assert [(effect.key, effect.request, effect.client) for effect in late] == [(key, "VFIO_IOMMU_UNMAP_DMA", 100)]
    assert not [effect for effect in world.do(Tick(16.0)) if isinstance(effect, Late)]
    pending = world.service.status(16.0)["pending"]
    assert pending == [
        {
            "request": "VFIO_IOMMU_UNMAP_DMA",
            "waits_for": f"DMA sections of {guest.name}",
            "seconds": 6.0,
            "late": [guest.name],
        }
    ]
    world.lanes[key].count = 8
    world.do(Tick(17.0))
    assert guest.answer(unmap) is not None


def test_a_lane_that_moved_while_this_process_was_away_is_not_late() -> None:
    world = World(deadline=5.0)
    guest = Guest(world)
    key = guest.open_device()
    world.lanes[key].count = 7
    unmap = guest.send_unmap()
    world.do(Tick(10.0))
    world.lanes[key].count = 9
    assert not [effect for effect in world.do(Tick(99.0)) if isinstance(effect, Late)]
    assert guest.answer(unmap) is not None


def test_the_death_of_a_device_ends_the_wait_for_its_lane() -> None:
    world = World()
    guest = Guest(world)
    key = guest.open_device()
    world.lanes[key].count = 7
    unmap = guest.send_unmap()
    world.lanes[key].living = False
    world.do(DeviceDied(key, "by SIGKILL"))
    answer = guest.answer(unmap)
    assert answer is not None and not answer.errno
    assert not list(world.service.state.devices)
    guest.map()
    assert guest.open_device() != key


def asked(world: World) -> list[tuple[int, int]]:
    """Key and sequence number of each Quiesce that was sent."""
    sent = [effect for effect in world.effects if isinstance(effect, SendDevice)]
    return [(effect.key, effect.message.seq) for effect in sent if isinstance(effect.message, device_port.Quiesce)]


def test_without_a_fence_an_unmap_is_answered_when_its_device_has_answered() -> None:
    world = World(fence=None)
    guest, other = Guest(world), Guest(world, pid=200, group=27)
    assert guest.answer(guest.send_unmap()) is not None, "no device is open: nobody is asked"
    guest.map()
    key, stranger = guest.open_device(), other.open_device()
    unmap = guest.send_unmap()
    behind = guest.send(guest.container, Ioctl.VFIO_GET_API_VERSION, b"")
    [(device, seq)] = asked(world)
    assert device == key, "the device of another container is not asked"
    assert not other.ioctl(other.container, Ioctl.VFIO_GET_API_VERSION, b"").errno, "another container goes on"
    for event in (DeviceQuiet(key, seq - 1), DeviceQuiet(stranger, seq), Tick(1.0)):
        world.do(event)
        assert guest.answer(unmap) is None and guest.answer(behind) is None
    world.do(DeviceQuiet(key, seq))
    assert [effect.message.seq for effect in world.effects[-2:] if isinstance(effect, SendReturn)] == [unmap, behind]
    assert not world.service.revoking
    world.do(DeviceQuiet(key, seq))  # once more: harmless


def test_without_a_fence_a_device_that_does_not_answer_is_late_and_its_death_ends_the_wait() -> None:
    world = World(fence=None, deadline=5.0)
    guest = Guest(world)
    key = guest.open_device()
    unmap = guest.send_unmap()
    world.do(Tick(10.0))
    late = [effect for effect in world.do(Tick(15.0)) if isinstance(effect, Late)]
    assert [(effect.key, effect.name, effect.meanwhile) for effect in late] == [(key, guest.name, "without an answer")]
    pending = world.service.status(16.0)["pending"]
    assert isinstance(pending, list) and pending[0]["waits_for"] == f"an answer of {guest.name}"
    world.lanes[key].living = False
    world.do(DeviceDied(key, "by SIGKILL"))
    answer = guest.answer(unmap)
    assert answer is not None and not answer.errno


def test_a_close_is_answered_when_the_file_is_released() -> None:
    world = World()
    guest = Guest(world)
    key = guest.open_device()
    answer = Disconnect(guest.group_connection)
    assert answer not in world.do(Closed(guest.group_connection)), "its device has not ended"
    assert answer in world.do(DeviceDied(key, ""))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("inside", [False, True])
def test_whatever_the_order_of_its_ends_a_client_gives_everything_back(order: tuple[int, ...], inside: bool) -> None:
    world = World()
    guest = Guest(world)
    key = guest.open_device()
    if inside:
        world.lanes[key].count = 7
        guest.send_unmap()
    guest.vanish(order)
    assert [effect.key for effect in world.all(StopDevice)] == [key]  # type: ignore[union-attr]
    if key in world.lanes:
        world.lanes[key].living = False
    world.do(DeviceDied(key))
    world.do(Tick(1.0))
    state = world.service.state
    assert not state.clients.mms and not state.clients.files and not state.clients.connections
    assert not list(state.devices) and not len(state.jobs)
    assert not state.host.segments
    assert world.service.locked_vm == 0
    assert world.all(DomainsChanged)
    assert not world.leaked()


def test_opening_a_group_waits_until_its_last_client_is_gone() -> None:
    world = World()
    guest = Guest(world)
    key = guest.open_device()
    guest.vanish()
    mm = world.connect(300)
    opened = world.request(mm, files.OpenMm(1 << 30, "next"))
    assert isinstance(opened, files.Opened)
    connection = world.connect(300)
    assert world.request(connection, files.OpenFile("/dev/vfio/26", opened.handle)) is None
    world.do(DeviceDied(key))
    answers = [effect for effect in world.all(SendFile) if effect.connection == connection]  # type: ignore[union-attr]
    assert len(answers) == 1 and isinstance(answers[0].message, files.Opened)  # type: ignore[union-attr]


def test_a_group_that_is_open_is_busy() -> None:
    world = World()
    guest = Guest(world)
    connection = world.connect(guest.pid)
    answer = world.request(connection, files.OpenFile("/dev/vfio/26", guest.mm))
    assert isinstance(answer, files.OpenError) and answer.errno == 16
    answer = world.request(connection, files.OpenFile("/dev/vfio/99", guest.mm))
    assert isinstance(answer, files.OpenError) and answer.errno == 2


def test_handles_are_good_for_their_own_process_only() -> None:
    world = World()
    guest, other = Guest(world), Guest(world, pid=200, group=27)
    answer = other.ioctl(guest.container, Ioctl.VFIO_GET_API_VERSION, b"")
    assert answer.errno == EBADF
    connection = world.connect(300)
    refused = world.request(connection, files.OpenFile("/dev/vfio/vfio", guest.mm))
    assert isinstance(refused, files.OpenError) and refused.errno == EBADF
    stolen = other.ioctl(other.group, Ioctl.VFIO_GROUP_SET_CONTAINER, struct.pack("=Q", guest.container))
    assert stolen.errno == EBADF


def test_memory_declared_while_a_device_runs_is_announced_and_taken_back() -> None:
    world = World()
    guest = Guest(world)
    key = guest.open_device()
    message = files.DeclareMemory(2 * HVA, SIZE, "more", 0, 65536)
    done = world.request(guest.mm_connection, message, Fd(world.ledger, inode=2))
    assert isinstance(done, files.Done)
    sent = world.all(SendDevice)[-1]
    assert isinstance(sent, SendDevice) and sent.key == key and isinstance(sent.message, device_port.AddSegment)
    order = kinds(world.effects)
    assert order.index("SendDevice") < len(order) - 1 - order[::-1].index("SendFile"), "before the client may map it"
    world.request(guest.mm_connection, files.UndeclareMemory(2 * HVA, SIZE))
    removed = world.all(SendDevice)[-1]
    assert isinstance(removed, SendDevice) and isinstance(removed.message, device_port.RemoveSegment)
    assert removed.message.id == sent.message.segment.id


def test_memory_that_is_pinned_stays_after_it_was_undeclared() -> None:
    world = World()
    guest = Guest(world)
    guest.open_device()
    world.request(guest.mm_connection, files.UndeclareMemory(HVA, SIZE))
    assert not world.all(SendDevice)


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (files.DeclareMemory(HVA, SIZE, "other", 0, 65536), 17),
        (files.DeclareMemory(4 * HVA, 2 * SIZE, "other", 0, 65536), 22),
        (files.DeclareMemory(4 * HVA, SIZE, "other", SIZE, 65536), 22),
        (files.DeclareMemory(4 * HVA, SIZE, "other", 0, 3), 22),
        (files.DeclareMemory(4 * HVA, SIZE, "ram", 0, 65536), 17),
    ],
)
def test_memory_that_cannot_be_declared_is_refused_and_closed(message: files.DeclareMemory, number: int) -> None:
    world = World()
    guest = Guest(world)
    fd = Fd(world.ledger, inode=2)
    answer = world.request(guest.mm_connection, message, fd)
    assert isinstance(answer, files.OpenError) and answer.errno == number
    assert fd.closed == 1
    assert [segment.id for segment in world.service.state.host.segments] == ["ram#0"]


def test_a_request_out_of_turn_costs_the_connection() -> None:
    world = World()
    guest = Guest(world)
    for connection, message in (
        (guest.container_connection, files.UndeclareMemory(0, 1)),
        (guest.mm_connection, files.OpenMm(1, "again")),
    ):
        effects = world.do(FileMessage(connection, message))
        assert connection in [effect.connection for effect in effects if isinstance(effect, Disconnect)]
        assert connection not in world.service.state.clients.connections


def test_an_offered_server_is_used_for_the_next_open_and_for_no_other() -> None:
    world = World()
    guest = Guest(world)
    connection = world.connect(400)
    control, pidfd = Fd(world.ledger), Fd(world.ledger)
    assert isinstance(world.request(connection, files.AttachDevice(guest.name), control, pidfd), files.Done)
    guest.send_get_device()
    start = world.all(StartDevice)[-1]
    assert isinstance(start, StartDevice) and start.attached == (control, pidfd)
    world.do(DeviceDied(start.key))
    guest.send_get_device()
    start = world.all(StartDevice)[-1]
    assert isinstance(start, StartDevice) and start.attached is None


@pytest.mark.parametrize("end", [Closed, ServerDied])
def test_an_offer_ends_with_its_server_or_its_connection(end: type[Closed] | type[ServerDied]) -> None:
    world = World()
    connection = world.connect(400)
    control, pidfd = Fd(world.ledger), Fd(world.ledger)
    world.request(connection, files.AttachDevice(NAMES[0]), control, pidfd)
    world.do(Closed(connection) if end is Closed else ServerDied(NAMES[0]))
    assert (control.closed, pidfd.closed) == (1, 1)
    assert not world.service.state.offers


def test_every_prefix_of_a_life_can_be_cut_off() -> None:
    """Whenever the client vanishes, whatever was pending: in the end nothing is left."""
    steps = ("open device", "odd lane", "unmap", "map", "get device again")
    for length in range(len(steps) + 1):
        world = World()
        guest = Guest(world)
        for step in steps[:length]:
            if step == "open device":
                guest.open_device()
            elif step == "odd lane":
                next(iter(world.lanes.values())).count = 3
            elif step == "unmap":
                guest.send_unmap()
            elif step == "map":
                guest.send(guest.container, Ioctl.VFIO_IOMMU_MAP_DMA, DmaMap(0, 3, HVA, 0, 4096).pack())
            else:
                guest.send_get_device()
        guest.vanish()
        for device in world.service.state.devices:
            if device.key in world.lanes:
                world.lanes[device.key].living = False
            world.do(DeviceDied(device.key))
        world.do(Tick(0.0))
        assert not len(world.service.state.jobs), steps[:length]
        assert not world.service.state.clients.mms, steps[:length]
        assert not world.leaked(), steps[:length]


def test_an_ioctl_whose_mm_goes_while_it_waits_is_ebadf() -> None:
    world = World()
    guest = Guest(world)
    second = world.connect(guest.pid)
    opened = world.request(second, files.OpenMm((1 << 64) - 1, "second"))
    assert isinstance(opened, files.Opened)
    guest.send_get_device()
    seq = next(world.seqs)
    arg = DmaUnmap(iova=0, size=4096).pack()
    ioctl = messages.Ioctl(seq, 0, opened.handle, guest.container, Ioctl.VFIO_IOMMU_UNMAP_DMA, 1, arg)
    world.do(PortMessage(b"second", ioctl))
    world.do(Closed(second))
    start = world.all(StartDevice)[-1]
    assert isinstance(start, StartDevice)
    world.ready(start.key)
    answer = guest.answer(seq)
    assert answer is not None and answer.errno == EBADF


def test_a_device_whose_process_has_just_died_is_waited_for_and_opened_anew() -> None:
    world = World()
    guest = Guest(world)
    key = guest.open_device()
    world.lanes[key].living = False
    seq = guest.send_get_device()
    assert guest.answer(seq) is None, "its end is not known yet"
    world.do(DeviceDied(key))
    again = world.all(StartDevice)[-1]
    assert isinstance(again, StartDevice) and again.key != key
    world.ready(again.key)
    answer = guest.answer(seq)
    assert answer is not None and not answer.errno


def test_tables_of_a_type_that_does_not_fit_are_swept() -> None:
    world = World()
    plain = HostTopology(groups=(GroupSpec(26, (DeviceSpec(NAMES[0], "edu"),), ddw=False),))
    numbers = itertools.count(1000)
    world.service = ContainerService(
        plain, private_buffers, NoFence(), ServiceOptions(new_handle=lambda: next(numbers))
    )
    with pytest.raises(AssertionError):
        Guest(world)  # SET_IOMMU is refused: the group has no dynamic windows
    assert world.all(DomainsChanged)


def test_no_backing_page_uses_the_host_physical_space_up() -> None:
    world = World()
    guest = Guest(world)
    for page_size in (1 << 51, 1 << 63):
        lie = files.DeclareMemory(1 << 51, SIZE, "lie", 0, page_size)
        assert isinstance(world.request(guest.mm_connection, lie, Fd(world.ledger, inode=2)), files.OpenError)
    Guest(world, pid=200, group=27)


def test_a_device_that_cannot_be_started_for_want_of_descriptors_holds_nothing() -> None:
    world = World()
    guest = Guest(world)

    def none_left() -> Fd:
        raise OSError(EMFILE, "none left")

    for _, fd in world.service.state.clients.mms[guest.mm].memory.values():
        fd.duplicate = none_left  # type: ignore[method-assign]
    answer = guest.answer(guest.send_get_device())
    assert answer is not None and answer.errno == EMFILE
    guest.vanish()
    assert not world.service.status(0.0)["pending"]
    assert world.service.locked_vm == 0


def test_one_process_cannot_take_all_connections() -> None:
    world = World(max_connections=40)
    for _ in range(40):
        world.connect(100)
    refused = [effect for effect in world.effects if isinstance(effect, Disconnect)]
    assert [effect.connection for effect in refused] == list(range(11, 41))
    Guest(world, pid=200)
    world.do(Closed(1))
    before = len(world.all(Disconnect))
    world.connect(100)
    assert len(world.all(Disconnect)) == before, "a place is free again"
