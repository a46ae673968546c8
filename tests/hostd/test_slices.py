"""Long work of one client is done in slices: others are served in between, and a client may die between two of them."""

from __future__ import annotations

import struct
from errno import EBADF
from itertools import count, pairwise

import pytest

from hostd.events import Closed, NextSlice, PortMessage, SendReturn
from protocols.port import files, messages
from tests.hostd.test_service import Fd, Guest, World
from vfio_model.host.pending import SLICE
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl, SpaprRegisterMemory, SpaprTceCreate

BIG, AT = 1 << 36, 1 << 44
"""Bytes of memory beside the guest's first, and where it is."""
SLICES = (BIG >> 16) // SLICE
"""At least so many make up all its pages."""
MAP, UNMAP = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)


class BigGuest(Guest):
    """With much memory, and a window for all of it in IOMMU pages of 64 KiB."""

    def __init__(self, world: World, pid: int = 100, group: int = 26) -> None:
        super().__init__(world, pid, group)
        fd = Fd(world.ledger, size=BIG, inode=pid)
        assert isinstance(
            world.request(self.mm_connection, files.DeclareMemory(AT, BIG, "big", 0, 65536), fd), files.Done
        )
        register = SpaprRegisterMemory(vaddr=AT, size=BIG).pack()
        assert not self.ioctl(self.container, Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, register).errno
        create = SpaprTceCreate(page_shift=16, window_size=BIG, levels=1).pack()
        created = self.ioctl(self.container, Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE, create)
        self.window = SpaprTceCreate.unpack(created.arg).start_addr
        self.everything = DmaMap(0, 3, AT, self.window, BIG).pack()
        self.nothing = DmaUnmap(0, 0, self.window, BIG).pack()
        container = world.service.state.host.groups[group].container
        assert container is not None and isinstance(container.driver, SpaprTceContainer)
        self.driver = container.driver

    def send_many(self, cmd: int, structs: list[bytes]) -> int:
        seq = next(self.world.seqs)
        message = messages.Ioctl(seq, seq, self.mm, self.container, cmd, len(structs), b"".join(structs))
        self.world.do(PortMessage(b"guest", message))
        return seq

    def mapped(self) -> int:
        """Entries of the large window."""
        table = self.driver.tables[1]
        return 0 if table is None else sum(len(words) - words.count(0) for words in table._regions.values())


def finish(world: World) -> int:
    """Go on until all work is done; returns the slices that it took."""
    for done in count():
        if not world.service.working:
            return done
        world.do(NextSlice())
    raise AssertionError


def test_other_clients_are_answered_between_the_slices_and_ones_own_requests_keep_their_order() -> None:
    world = World()
    guest, other = BigGuest(world), Guest(world, pid=200, group=27)
    long = guest.send(guest.container, MAP, guest.everything)
    behind = [guest.send(guest.container, Ioctl.VFIO_GET_API_VERSION, b""), guest.send_unmap()]
    status = guest.send(guest.group, Ioctl.VFIO_GROUP_GET_STATUS, struct.pack("=II", 8, 0))
    seen = []
    while world.service.working:
        assert guest.answer(long) is None and guest.answer(behind[0]) is None
        seen.append(guest.mapped())
        assert not other.map().errno
        assert isinstance(world.service.status(0.0)["pending"], list)
        world.do(NextSlice())
    assert len(seen) >= SLICES - 1
    assert all(0 < after - before <= SLICE for before, after in pairwise(seen)), seen
    order = [
        effect.message.seq
        for effect in world.effects
        if isinstance(effect, SendReturn) and effect.message.seq in (long, *behind, status)
    ]
    assert order == [long, *behind, status]
    assert guest.mapped() == BIG >> 16


def test_two_clients_with_long_work_take_turns() -> None:
    world = World()
    guest, other = BigGuest(world), BigGuest(world, pid=200, group=27)
    for each in (guest, other):
        each.send(each.container, MAP, each.everything)
    while world.service.working:
        assert abs(guest.mapped() - other.mapped()) <= SLICE
        world.do(NextSlice())
    assert guest.mapped() == other.mapped() == BIG >> 16


def test_a_long_batch_goes_on_slice_by_slice_and_says_which_struct_failed() -> None:
    world = World()
    guest = BigGuest(world)
    wrong = DmaMap(0, 3, AT + 1, guest.window, 1 << 31).pack()
    good = [DmaMap(0, 3, AT, guest.window + (n % 32 << 31), 1 << 31).pack() for n in range(64)]
    seq = guest.send_many(MAP, [*good, wrong, *good])
    assert finish(world) >= 64 * (1 << 15) // SLICE - 1
    answer = guest.answer(seq)
    assert answer is not None and answer.done == 64 and answer.errno
    assert guest.mapped() == BIG >> 16


@pytest.mark.parametrize("slices", [0, 1, 5, 1000])
@pytest.mark.parametrize("what", ["map", "unmap", "many", "window"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_client_that_dies_between_two_slices_gives_everything_back(
    what: str, slices: int, order: tuple[int, ...]
) -> None:
    world = World()
    guest = BigGuest(world)
    if what != "map":
        guest.send(guest.container, MAP, guest.everything)
        finish(world)
    if what == "map":
        guest.send(guest.container, MAP, guest.everything)
    elif what == "unmap":
        guest.send(guest.container, UNMAP, guest.nothing)
    elif what == "many":
        guest.send_many(MAP, [guest.everything] * 64)
    else:
        guest.send(guest.group, Ioctl.VFIO_GROUP_UNSET_CONTAINER, b"")
    for _ in range(slices):
        world.do(NextSlice())
    guest.vanish(order)
    assert finish(world) <= 4 * SLICES, "what was begun ends, nothing more is begun"
    status = world.service.status(0.0)
    assert (status["mms"], status["files"], status["pending"], world.service.locked_vm) == ([], [], [], 0)
    assert not world.leaked()
    group = world.service.state.host.groups[26]
    assert group.container is None
    BigGuest(world, pid=101)


def test_a_file_that_is_closed_meanwhile_ends_a_batch_at_the_next_struct() -> None:
    world = World()
    guest = BigGuest(world)
    seq = guest.send_many(MAP, [guest.everything] * 64)
    world.do(Closed(guest.container_connection))
    finish(world)
    answer = guest.answer(seq)
    assert answer is not None and (answer.errno, answer.done) == (EBADF, 1)
    assert guest.mapped() == BIG >> 16, "the container lives on while its group is in it"


def test_a_group_that_is_taken_out_of_a_large_container_answers_in_order() -> None:
    world = World()
    guest = BigGuest(world)
    guest.send(guest.container, MAP, guest.everything)
    finish(world)
    out = guest.send(guest.group, Ioctl.VFIO_GROUP_UNSET_CONTAINER, b"")
    status = guest.send(guest.group, Ioctl.VFIO_GROUP_GET_STATUS, struct.pack("=II", 8, 0))
    assert guest.answer(out) is None and guest.answer(status) is None
    finish(world)
    assert [effect.message.seq for effect in world.effects if isinstance(effect, SendReturn)][-2:] == [out, status]
    answer = guest.answer(status)
    assert answer is not None and struct.unpack("=II", answer.arg)[1] == 1, "viable, and in no container"


def test_memory_that_is_undeclared_between_slices_stays_pinned_while_it_is_mapped() -> None:
    world = World()
    guest = BigGuest(world)
    guest.send(guest.container, MAP, guest.everything)
    assert isinstance(world.request(guest.mm_connection, files.UndeclareMemory(AT, BIG)), files.Done)
    finish(world)
    assert guest.mapped() == BIG >> 16
    assert guest.driver.registered[2].mapped == BIG >> 16
    guest.vanish()
    finish(world)
    assert world.service.locked_vm == 0 and not world.leaked()
