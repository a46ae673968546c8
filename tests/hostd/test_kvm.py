"""Hypercalls that the host answers, in the service: what they wait for, what waits for them, and whose they are."""

from __future__ import annotations

import struct
from errno import EBADF

from hostd.events import Closed, DomainsChanged, FileMessage, PortMessage, SendFile, SendTable, Tick
from protocols.port import files, messages
from tests.hostd.test_service import HVA, SIZE, Guest, World
from vfio_model.uapi.hvcall import HCall, HReturn
from vfio_model.uapi.kvm import (
    KVM_DEV_VFIO_GROUP,
    KVM_DEV_VFIO_GROUP_ADD,
    KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE,
    CreateSpaprTce64,
    DeviceAttr,
    KvmIoctl,
    UserspaceMemoryRegion,
    VfioSpaprTce,
)
from vfio_model.uapi.vfio import DmaMap, Ioctl, SpaprRegisterMemory

LIOBN = 0x8000_0000
TOO_HARD = int(HReturn.H_TOO_HARD)


class Machine:
    """A guest's virtual machine with one table, linked to the window of its container."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.world = guest, guest.world
        self.connection, self.vm = guest.open("/dev/kvm")
        slot = UserspaceMemoryRegion(0, 0, 0, SIZE, HVA).pack()
        assert not guest.ioctl(self.vm, KvmIoctl.KVM_SET_USER_MEMORY_REGION, slot).errno
        self.table_connection, self.table = self.create()
        self.attr(KVM_DEV_VFIO_GROUP_ADD, struct.pack("=Q", guest.group))
        self.attr(KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE, VfioSpaprTce(guest.group, self.table).pack())

    def create(self) -> tuple[int, int]:
        connection = self.world.connect(self.guest.pid)
        arg = CreateSpaprTce64(LIOBN, 12, 0, 0, 1024).pack()
        effects = self.world.do(FileMessage(connection, files.CreateSpaprTce(self.guest.mm, self.vm, arg)))
        sent = next(effect for effect in effects if isinstance(effect, SendTable))
        assert sent.connection == connection and len(sent.words) >= 1024
        return connection, sent.message.handle

    def attr(self, attr: int, value: bytes) -> None:
        arg = DeviceAttr(group=KVM_DEV_VFIO_GROUP, attr=attr).pack() + value
        assert not self.guest.ioctl(self.vm, KvmIoctl.KVM_SET_DEVICE_ATTR, arg).errno

    def send(self, nr: int, *args: int, links: int = 1, mm: int | None = None) -> int:
        seq = next(self.world.seqs)
        padded = [*args, 0, 0, 0, 0][:4]
        message = messages.Hcall(seq, seq, self.guest.mm if mm is None else mm, self.vm, nr, padded, links)
        self.world.do(PortMessage(b"guest", message))
        return seq

    def ret(self, seq: int) -> int:
        answer = self.guest.answer(seq)
        assert answer is not None and not answer.errno and answer.done == 1
        return int(struct.unpack("=q", answer.arg)[0])

    def put(self, ioba: int, tce: int) -> int:
        return self.send(HCall.H_PUT_TCE, LIOBN, ioba, tce)


def test_an_unmap_by_hypercall_is_answered_when_the_lane_has_moved() -> None:
    world = World()
    guest, other = Guest(world), Guest(world, pid=200, group=27)
    machine = Machine(guest)
    lanes = world.lanes[guest.open_device()]
    assert machine.ret(machine.put(0x1000, 3)) == 0
    lanes.count = 7
    unmap = machine.put(0x1000, 0)
    behind = guest.send(guest.container, Ioctl.VFIO_GET_API_VERSION, b"")
    assert guest.answer(unmap) is None and guest.answer(behind) is None
    assert not other.map().errno, "another container goes on"
    assert world.service.revoking
    lanes.count = 8
    world.do(Tick(1.0))
    assert machine.ret(unmap) == 0 and guest.answer(behind) is not None
    assert not world.service.revoking


def test_while_an_operation_of_the_container_is_pending_a_hypercall_is_too_hard() -> None:
    world = World()
    guest = Guest(world)
    machine = Machine(guest)
    lanes = world.lanes[guest.open_device()]
    lanes.count = 7
    unmap = guest.send_unmap()
    assert guest.answer(unmap) is None
    assert machine.ret(machine.put(0x1000, 3)) == TOO_HARD
    lanes.count = 8
    world.do(Tick(1.0))
    assert guest.answer(unmap) is not None
    assert machine.ret(machine.put(0x1000, 3)) == 0


def test_operations_of_every_container_that_it_changed_wait_behind_a_hypercall() -> None:
    world = World()
    guest = Guest(world)
    machine = Machine(guest)
    _, second = guest.open("/dev/vfio/vfio")
    _, group = guest.open("/dev/vfio/27")
    for handle, cmd, arg in (
        (group, Ioctl.VFIO_GROUP_SET_CONTAINER, struct.pack("=Q", second)),
        (second, Ioctl.VFIO_SET_IOMMU, struct.pack("=I", 7)),
        (second, Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, SpaprRegisterMemory(vaddr=HVA, size=SIZE).pack()),
        (second, Ioctl.VFIO_IOMMU_MAP_DMA, DmaMap(0, 3, HVA, 0, 4096).pack()),
    ):
        assert not guest.ioctl(handle, cmd, arg).errno
    machine.attr(KVM_DEV_VFIO_GROUP_ADD, struct.pack("=Q", group))
    machine.attr(KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE, VfioSpaprTce(group, machine.table).pack())
    lanes = world.lanes[guest.open_device()]
    assert machine.ret(machine.send(HCall.H_PUT_TCE, LIOBN, 0x1000, 3, links=2)) == 0
    lanes.count = 7
    unmap = machine.send(HCall.H_PUT_TCE, LIOBN, 0x1000, 0, links=2)
    behind = [guest.send(handle, Ioctl.VFIO_GET_API_VERSION, b"") for handle in (guest.container, second)]
    assert [guest.answer(seq) for seq in (unmap, *behind)] == [None, None, None]
    lanes.count = 8
    world.do(Tick(1.0))
    assert machine.ret(unmap) == 0 and all(guest.answer(seq) is not None for seq in behind)
    assert not world.service.revoking and world.service.state.jobs.empty


def test_the_end_of_a_tables_connection_frees_it() -> None:
    world = World()
    guest = Guest(world)
    machine = Machine(guest)
    host = world.service.state.host
    assert len(host.kvm_words) == 1
    world.do(Closed(machine.table_connection))
    assert host.kvm_words == [] and world.all(DomainsChanged)
    assert machine.ret(machine.put(0x1000, 3)) == TOO_HARD
    machine.create()
    assert machine.ret(machine.send(HCall.H_PUT_TCE, LIOBN, 0x1000, 3, links=0)) == 0


def test_the_end_of_the_guest_frees_machine_and_tables() -> None:
    world = World()
    guest = Guest(world)
    machine = Machine(guest)
    assert machine.ret(machine.put(0x1000, 3)) == 0
    world.do(Closed(guest.mm_connection))
    world.do(Tick(0.0))
    assert world.service.state.host.kvm_words == [] and not world.service.state.clients.files
    assert world.service.locked_vm == 0 and not world.leaked()


def test_a_machine_is_its_processes_own() -> None:
    world = World()
    guest, other = Guest(world), Guest(world, pid=200, group=27)
    machine = Machine(guest)
    answer = guest.answer(machine.send(HCall.H_PUT_TCE, LIOBN, 0, 3, mm=other.mm))
    assert answer is not None and answer.errno == EBADF
    connection = world.connect(other.pid)
    arg = CreateSpaprTce64(LIOBN + 1, 12, 0, 0, 16).pack()
    for mm in (guest.mm, other.mm):
        effects = world.do(FileMessage(connection, files.CreateSpaprTce(mm, machine.vm, arg)))
        refused = [effect.message for effect in effects if isinstance(effect, SendFile)]
        assert isinstance(refused[0], files.OpenError) and refused[0].errno == EBADF
