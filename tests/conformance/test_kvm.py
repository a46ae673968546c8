"""What in-kernel acceleration is, whoever implements the port: KVM's errors, tables that both sides see, and the
hypercalls that the host answers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import errorcode
from typing import cast

import pytest

from tests.conformance.adapters import Adapter, Client, Running
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.ram import RAMBlock
from vfio_model.uapi.hvcall import HCall, HReturn
from vfio_model.uapi.kvm import KVM_PATH, CreateSpaprTce64, DeviceAttr, KvmCap, KvmIoctl, UserspaceMemoryRegion
from vfio_model.uapi.vfio import Ioctl, IommuType
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup
from vfio_model.vfio.kvm import KvmPort, KvmTable, KvmVm

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HVA = 0x7F00_0000_0000
LIOBN = 0x8000_0000
PAGE = 4 * KIB
LIST = 4 * MIB
TOPOLOGY = HostTopology(
    groups=(GroupSpec(26, (DeviceSpec("0000:01:00.0", "edu"),)), GroupSpec(27, (DeviceSpec("0000:02:00.0", "edu"),)))
)
TABLE_PAGES = 2
"""What a table of one page of entries counts as locked: that page, and one for the descriptor with its pointer."""
PUT, STUFF, INDIRECT = HCall.H_PUT_TCE, HCall.H_STUFF_TCE, HCall.H_PUT_TCE_INDIRECT
SUCCESS, PARAMETER, TOO_HARD = int(HReturn.H_SUCCESS), int(HReturn.H_PARAMETER), int(HReturn.H_TOO_HARD)


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that ``call`` fails with."""
    with pytest.raises(OSError) as caught:
        call()
    return errorcode[caught.value.errno or 0]


@dataclass
class Machine:
    """A virtual machine with 8 MiB of memory at 0, whose process has 16 MiB: a hole of the guest is memory of its
    process.
    """

    client: Client
    vm: KvmVm
    ram: RAMBlock

    @property
    def port(self) -> KvmPort:
        return cast(KvmPort, self.client.port)

    def table(self, *, page_shift: int = 12, size: int = 1024, offset: int = 0) -> KvmTable:
        return self.vm.create_spapr_tce(LIOBN, page_shift, offset, size)

    def connect(self, number: int = 26) -> tuple[SpaprContainer, VfioGroup]:
        """A container with all memory registered and one window of 4 KiB pages at 0; the group is known to KVM."""
        port = self.client.port
        container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
        group = VfioGroup(port, port.open(f"/dev/vfio/{number}"))
        group.set_container(container.handle)
        container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)
        container.register_memory(HVA, 16 * MIB)
        container.tce_remove(0)
        container.tce_create(12, GIB)
        self.vm.group_add(group.handle)
        return container, group

    def linked(self) -> tuple[KvmTable, SpaprContainer, VfioGroup]:
        table = self.table()
        container, group = self.connect()
        self.vm.set_spapr_tce(group.handle, table.fd)
        return table, container, group

    def hcall(self, nr: int, *args: int, links: int = 0) -> int:
        return self.port.hcall(self.vm.handle, nr, (*args, 0, 0, 0, 0)[:4], links)

    def write_list(self, tces: list[int]) -> None:
        self.ram.view[LIST : LIST + 8 * len(tces)] = struct.pack(f">{len(tces)}Q", *tces)


@pytest.fixture
def machine(adapter: Adapter) -> Iterator[Machine]:
    with adapter(TOPOLOGY) as running:
        yield make(running)


def make(running: Running, memlock: int | None = None) -> Machine:
    client = running.client(memlock)
    ram = client.memory("ram", 16 * MIB, HVA)
    port = cast(KvmPort, client.port)
    vm = KvmVm(port, port.open(KVM_PATH))
    vm.set_user_memory_region(0, 0, 8 * MIB, HVA)
    return Machine(client, vm, ram)


class TestMachine:
    def test_what_it_can(self, machine: Machine) -> None:
        assert all(machine.vm.check_extension(cap) for cap in KvmCap)
        assert not machine.vm.check_extension(cast(KvmCap, 9999))
        version = machine.port.ioctl(machine.vm.handle, KvmIoctl.KVM_GET_API_VERSION, b"")
        assert struct.unpack("=I", version)[0] == 12

    def test_a_host_may_lack_some_of_it_or_all(self, adapter: Adapter) -> None:
        with adapter(HostTopology(TOPOLOGY.groups, kvm_lacks=("KVM_CAP_SPAPR_TCE_VFIO",))) as running:
            machine = make(running)
            assert not machine.vm.check_extension(KvmCap.KVM_CAP_SPAPR_TCE_VFIO)
            table = machine.table()
            _, group = machine.connect()
            assert errno_of(lambda: machine.vm.set_spapr_tce(group.handle, table.fd)) == "ENXIO"
        with adapter(HostTopology(TOPOLOGY.groups, kvm_lacks=("KVM_CAP_USER_MEMORY",))) as running:
            assert errno_of(lambda: running.client().port.open(KVM_PATH)) == "ENOENT"

    def test_unknown_ioctls(self, machine: Machine) -> None:
        assert errno_of(lambda: machine.port.ioctl(machine.vm.handle, 0xAE41, b"")) == "ENOTTY"
        assert errno_of(lambda: machine.port.ioctl(machine.vm.handle, Ioctl.VFIO_SET_IOMMU, bytes(4))) == "ENOTTY"
        table = machine.table()
        assert errno_of(lambda: machine.port.ioctl(table.fd, KvmIoctl.KVM_CHECK_EXTENSION, bytes(4))) == "ENOTTY"

    @pytest.mark.parametrize(
        ("region", "error"),
        [
            (UserspaceMemoryRegion(1, 0, 0x1_0800, MIB, HVA), "EINVAL"),
            (UserspaceMemoryRegion(1, 0, 32 * MIB, MIB + 1, HVA), "EINVAL"),
            (UserspaceMemoryRegion(1, 0, 32 * MIB, MIB, HVA + 8), "EINVAL"),
            (UserspaceMemoryRegion(1, 4, 32 * MIB, MIB, HVA), "EINVAL"),
            (UserspaceMemoryRegion(600, 0, 32 * MIB, MIB, HVA), "EINVAL"),
            (UserspaceMemoryRegion(1, 0, (1 << 64) - MIB, 2 * MIB, HVA), "EINVAL"),
            (UserspaceMemoryRegion(1, 0, 0, 0, 0), "EINVAL"),
            (UserspaceMemoryRegion(0, 0, 0, 4 * MIB, HVA), "EINVAL"),
            (UserspaceMemoryRegion(1, 0, 7 * MIB, 2 * MIB, HVA), "EEXIST"),
        ],
    )
    def test_memory_slots_refused(self, machine: Machine, region: UserspaceMemoryRegion, error: str) -> None:
        cmd = KvmIoctl.KVM_SET_USER_MEMORY_REGION
        assert errno_of(lambda: machine.port.ioctl(machine.vm.handle, cmd, region.pack())) == error

    def test_a_slot_moves_and_goes(self, machine: Machine) -> None:
        machine.table()
        machine.vm.set_user_memory_region(0, 32 * MIB, 8 * MIB, HVA)
        assert machine.hcall(PUT, LIOBN, 0, 3) == TOO_HARD
        assert machine.hcall(PUT, LIOBN, 0, 32 * MIB | 3) == SUCCESS
        machine.vm.set_user_memory_region(0, 0, 0, 0)
        assert machine.hcall(PUT, LIOBN, 0, 32 * MIB | 3) == TOO_HARD


class TestTables:
    @pytest.mark.parametrize(
        ("request_", "error"),
        [
            (CreateSpaprTce64(LIOBN, 11, 0, 0, 16), "EINVAL"),
            (CreateSpaprTce64(LIOBN, 35, 0, 0, 16), "EINVAL"),
            (CreateSpaprTce64(LIOBN, 12, 1, 0, 16), "EINVAL"),
            (CreateSpaprTce64(LIOBN, 12, 0, 0, 0), "EINVAL"),
            (CreateSpaprTce64(LIOBN, 12, 0, (1 << 52) - 8, 16), "EINVAL"),
            (CreateSpaprTce64(LIOBN, 12, 0, 0, 1 << 40), "EINVAL"),
        ],
    )
    def test_refused(self, machine: Machine, request_: CreateSpaprTce64, error: str) -> None:
        assert errno_of(lambda: machine.port.create_spapr_tce(machine.vm.handle, request_.pack())) == error

    def test_one_of_a_liobn_at_a_time(self, machine: Machine) -> None:
        table = machine.table()
        assert errno_of(machine.table) == "EBUSY"
        table.close()
        assert machine.table().entries.tolist() == [0] * 1024

    @pytest.mark.parametrize(
        ("entries", "host_page", "pages"),
        [
            (1, 64 * KIB, 1 + 1),
            (8192, 64 * KIB, 1 + 1),
            (8193, 64 * KIB, 2 + 1),
            (1 << 18, 64 * KIB, 32 + 1),
            (1 << 20, 64 * KIB, 128 + 1),
            (1 << 20, 4 * KIB, 2048 + 5),
            (512 * 497, 4 * KIB, 497 + 1),
            (512 * 498, 4 * KIB, 498 + 2),
        ],
    )
    def test_its_memory_is_locked_while_it_is_open(
        self, adapter: Adapter, entries: int, host_page: int, pages: int
    ) -> None:
        with adapter(HostTopology(TOPOLOGY.groups, host_page_size=host_page)) as running:
            machine = make(running)
            table = machine.table(size=entries)
            assert machine.client.locked_vm() == pages
            assert errno_of(lambda: machine.table(size=entries)) == "EBUSY"
            assert machine.client.locked_vm() == pages
            table.close()
            assert machine.client.locked_vm() == 0

    def test_the_memlock_limit_holds_for_it(self, adapter: Adapter) -> None:
        with adapter(TOPOLOGY) as running:
            machine = make(running, memlock=(TABLE_PAGES + 1) * 64 * KIB)
            table = machine.table()
            assert errno_of(machine.table) == "ENOMEM", "the limit comes before the LIOBN"
            other = CreateSpaprTce64(LIOBN + 1, 12, 0, 0, 1024).pack()
            assert errno_of(lambda: machine.port.create_spapr_tce(machine.vm.handle, other)) == "ENOMEM"
            assert machine.client.locked_vm() == TABLE_PAGES
            assert machine.hcall(PUT, LIOBN, 0, 0x5003) == SUCCESS
            table.close()
            machine.table().close()

    def test_a_table_needs_a_machine_of_this_process(self, machine: Machine) -> None:
        request = CreateSpaprTce64(LIOBN, 12, 0, 0, 16).pack()
        assert errno_of(lambda: machine.port.create_spapr_tce(0x1234, request)) == "EBADF"

    def test_its_entries_are_seen_on_both_sides(self, machine: Machine) -> None:
        table = machine.table()
        assert machine.hcall(PUT, LIOBN, 5 * PAGE, 0x12_3003) == SUCCESS
        assert table.entries[5] == 0x12_3003
        table.entries[6] = 0x7003
        assert machine.hcall(STUFF, LIOBN, 5 * PAGE, 0, 1) == SUCCESS
        assert table.entries.tolist()[4:8] == [0, 0, 0x7003, 0]

    def test_a_closed_one_is_asked_no_more(self, machine: Machine) -> None:
        table = machine.table()
        table.close()
        assert machine.hcall(PUT, LIOBN, 0, 3) == TOO_HARD


class TestLinks:
    def test_in_order(self, machine: Machine) -> None:
        vm, table = machine.vm, machine.table()
        container, group = machine.connect()
        assert errno_of(lambda: vm.group_add(group.handle)) == "EEXIST"
        assert errno_of(lambda: vm.group_add(container.handle)) == "EINVAL"
        assert errno_of(lambda: vm.group_add(0x1234)) == "EBADF"
        assert errno_of(lambda: vm.set_spapr_tce(group.handle, 0x1234)) == "EBADF"
        assert errno_of(lambda: vm.set_spapr_tce(group.handle, group.handle)) == "EINVAL"
        assert errno_of(lambda: vm.set_spapr_tce(0x1234, table.fd)) == "EBADF"
        other = VfioGroup(machine.port, machine.port.open("/dev/vfio/27"))
        assert errno_of(lambda: vm.set_spapr_tce(other.handle, table.fd)) == "ENOENT"
        vm.group_add(other.handle)
        assert errno_of(lambda: vm.set_spapr_tce(other.handle, table.fd)) == "EFAULT", "it is in no container"
        vm.set_spapr_tce(group.handle, table.fd)
        vm.set_spapr_tce(group.handle, table.fd)
        vm.group_del(group.handle)
        assert errno_of(lambda: vm.group_del(group.handle)) == "ENOENT"
        attr = DeviceAttr(group=1, attr=9).pack() + bytes(16)
        assert errno_of(lambda: machine.port.ioctl(vm.handle, KvmIoctl.KVM_SET_DEVICE_ATTR, attr)) == "ENXIO"

    @pytest.mark.parametrize(("page_shift", "offset", "size"), [(12, 0, 1 << 19), (12, 1 << 59, 16)])
    def test_a_window_that_does_not_hold_the_table(
        self, machine: Machine, page_shift: int, offset: int, size: int
    ) -> None:
        table = machine.table(page_shift=page_shift, offset=offset, size=size)
        _, group = machine.connect()
        assert errno_of(lambda: machine.vm.set_spapr_tce(group.handle, table.fd)) == "EINVAL"

    def test_the_host_answers_when_it_serves_as_many_as_are_expected(self, machine: Machine) -> None:
        table, container, _ = machine.linked()
        assert machine.hcall(PUT, LIOBN, 0, 0x5003, links=1) == SUCCESS
        for links in (0, 2):
            assert machine.hcall(PUT, LIOBN, 0, 0x6003, links=links) == TOO_HARD
        container.tce_remove(0)
        assert machine.hcall(PUT, LIOBN, 0, 0x6003, links=1) == TOO_HARD, "with its window the link is gone"
        assert table.entries[0] == 0x5003
        assert machine.hcall(PUT, LIOBN, 0, 0x6003) == SUCCESS

    def test_a_group_that_leaves_takes_the_link_along(self, machine: Machine) -> None:
        _, _, group = machine.linked()
        group.unset_container()
        assert machine.hcall(PUT, LIOBN, 0, 0x6003, links=1) == TOO_HARD

    def test_a_group_that_kvm_let_go_of_takes_the_link_along(self, machine: Machine) -> None:
        _, _, group = machine.linked()
        machine.vm.group_del(group.handle)
        assert machine.hcall(PUT, LIOBN, 0, 0x6003, links=1) == TOO_HARD

    def test_what_a_table_maps_cannot_be_unregistered(self, machine: Machine) -> None:
        _, container, _ = machine.linked()
        assert machine.hcall(PUT, LIOBN, 0, 0x5003, links=1) == SUCCESS
        assert errno_of(lambda: container.unregister_memory(HVA, 16 * MIB)) == "EBUSY"
        assert machine.hcall(PUT, LIOBN, 0, 0, links=1) == SUCCESS
        container.unregister_memory(HVA, 16 * MIB)
        assert machine.hcall(PUT, LIOBN, 0, 0x5003, links=1) == TOO_HARD, "nothing is preregistered"

    def test_lists_are_counted_in_and_out(self, machine: Machine) -> None:
        _, container, _ = machine.linked()
        for tces in ([0x1000 * at | 3 for at in range(512)], [0x3000 * at | 1 for at in range(512)]):
            machine.write_list(tces)
            assert machine.hcall(INDIRECT, LIOBN, 0, LIST, 512, links=1) == SUCCESS
        assert errno_of(lambda: container.unregister_memory(HVA, 16 * MIB)) == "EBUSY"
        assert machine.hcall(STUFF, LIOBN, 0, 0, 1024, links=1) == SUCCESS
        container.unregister_memory(HVA, 16 * MIB)
        window = 2 * (GIB >> 12) * 8 // (64 * KIB)
        assert machine.client.locked_vm() == window + TABLE_PAGES, "the window's table is what stays, and KVM's own"


class TestHypercalls:
    """What the host answers by itself, and what it leaves to the machine's process."""

    def test_put(self, machine: Machine) -> None:
        table, _, _ = machine.linked()
        assert machine.hcall(PUT, LIOBN + 1, 0, 3, links=1) == TOO_HARD, "unknown LIOBN"
        assert machine.hcall(PUT, LIOBN, 8, 3, links=1) == PARAMETER, "misaligned"
        assert machine.hcall(PUT, LIOBN, 1024 * PAGE, 3, links=1) == PARAMETER, "beyond the window"
        assert machine.hcall(PUT, LIOBN, 0, 0x1803, links=1) == TOO_HARD, "the address is not a page's"
        assert machine.hcall(PUT, LIOBN, 0, 8 * MIB | 3, links=1) == TOO_HARD, "no memory there"
        assert machine.hcall(PUT, LIOBN, 0, 0xDEAD_0000, links=1) == SUCCESS, "a poisoned entry has no address"
        assert table.entries[0] == 0xDEAD_0000

    def test_below_the_window(self, machine: Machine) -> None:
        machine.table(offset=1 << 59, size=16)
        assert machine.hcall(PUT, LIOBN, 0, 3) == PARAMETER
        assert machine.hcall(PUT, LIOBN, 1 << 59, 3) == SUCCESS

    def test_put_where_memory_is_not_registered(self, machine: Machine) -> None:
        table, container, _ = machine.linked()
        container.unregister_memory(HVA, 16 * MIB)
        container.register_memory(HVA, MIB)
        assert machine.hcall(PUT, LIOBN, 0, 2 * MIB | 3, links=1) == TOO_HARD
        assert machine.hcall(PUT, LIOBN, 0, 0x5003, links=1) == SUCCESS
        assert table.entries[0] == 0x5003

    def test_stuff(self, machine: Machine) -> None:
        table, _, _ = machine.linked()
        assert machine.hcall(STUFF, LIOBN, 0, 0x1003, 4, links=1) == PARAMETER
        assert machine.hcall(STUFF, LIOBN, 0, 0x1001, 4, links=1) == PARAMETER
        assert machine.hcall(STUFF, LIOBN, 1022 * PAGE, 0, 3, links=1) == PARAMETER
        assert machine.hcall(STUFF, LIOBN, 8, 0, 1, links=1) == PARAMETER
        assert machine.hcall(STUFF, LIOBN, 0, 0, (1 << 64) - 1, links=1) == PARAMETER
        assert machine.hcall(STUFF, LIOBN, 0, 0, 0, links=1) == TOO_HARD
        assert table.entries.tolist() == [0] * 1024
        assert machine.hcall(STUFF, LIOBN, 1022 * PAGE, 0xBAD0, 2, links=1) == SUCCESS
        assert table.entries.tolist()[1021:] == [0, 0xBAD0, 0xBAD0]

    @pytest.mark.parametrize("bad", [0x1803, 8 * MIB | 3], ids=["misaligned", "no memory"])
    @pytest.mark.parametrize("count", [3, 100])
    def test_indirect_looks_at_every_entry_before_it_stores_one(self, machine: Machine, bad: int, count: int) -> None:
        table, _, _ = machine.linked()
        machine.write_list([0x1000 * at | 3 for at in range(count - 1)] + [bad])
        assert machine.hcall(INDIRECT, LIOBN, 0, LIST, count, links=1) == TOO_HARD
        assert table.entries.tolist() == [0] * 1024
        assert machine.hcall(INDIRECT, LIOBN, 0, LIST, count - 1, links=1) == SUCCESS
        assert table.entries.tolist()[:count] == [0x1000 * at | 3 for at in range(count - 1)] + [0]

    def test_indirect_arguments(self, machine: Machine) -> None:
        table, _, _ = machine.linked()
        machine.write_list([3] * 512)
        assert machine.hcall(INDIRECT, LIOBN, 0, LIST, 513, links=1) == PARAMETER
        assert machine.hcall(INDIRECT, LIOBN, 0, LIST + 8, 1, links=1) == PARAMETER
        assert machine.hcall(INDIRECT, LIOBN, 1000 * PAGE, LIST, 512, links=1) == PARAMETER
        assert machine.hcall(INDIRECT, LIOBN, 8, LIST, 1, links=1) == PARAMETER
        assert machine.hcall(INDIRECT, LIOBN, 0, 8 * MIB, 1, links=1) == TOO_HARD, "the list is not in memory"
        assert machine.hcall(INDIRECT, LIOBN, 0, LIST, 0, links=1) == TOO_HARD
        assert table.entries.tolist() == [0] * 1024

    def test_a_mixed_list(self, machine: Machine) -> None:
        table, _, _ = machine.linked()
        tces = [(0x1000 * at | at % 4) for at in range(64)]
        machine.write_list(tces)
        assert machine.hcall(INDIRECT, LIOBN, 0, LIST, 64, links=1) == SUCCESS
        assert table.entries.tolist()[:64] == tces

    def test_memory_that_is_only_read_is_too_hard(self, machine: Machine) -> None:
        machine.table()
        machine.vm.set_user_memory_region(1, 32 * MIB, MIB, HVA + 8 * MIB, readonly=True)
        assert machine.hcall(PUT, LIOBN, 0, 32 * MIB | 1) == TOO_HARD

    def test_other_hypercalls_are_too_hard(self, machine: Machine) -> None:
        machine.table()
        assert machine.hcall(HCall.H_GET_TCE, LIOBN, 0) == TOO_HARD
        assert machine.hcall(0x4, 0) == TOO_HARD
