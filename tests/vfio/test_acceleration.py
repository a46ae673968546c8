"""In-kernel acceleration over the direct chain: what differs from a guest without it, that nothing else does, and that
a table moves into the kernel and home without losing an entry.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vfio.direct_chain import DEVICE, LIOBN0, LIOBN1, MIB, Chain, host_gone
from vfio_model.host.topology import DeviceSpec, GroupSpec
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.memory.iommu_region import IOMMUNotifier, IOMMUTLBEntry
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.uapi.containers import ContainerKind
from vfio_model.uapi.hvcall import HCall, HReturn
from vfio_model.uapi.kvm import KvmIoctl
from vfio_model.uapi.vfio import Ioctl

SUCCESS, PARAMETER, TOO_HARD = int(HReturn.H_SUCCESS), int(HReturn.H_PARAMETER), int(HReturn.H_TOO_HARD)
PUT, STUFF, INDIRECT = HCall.H_PUT_TCE, HCall.H_STUFF_TCE, HCall.H_PUT_TCE_INDIRECT
PAGE = 0x1000
PAGES = 16
NO_LINKS = ("KVM_CAP_SPAPR_TCE_VFIO",)


def small(*, kvm: bool, connect: bool = True, kvm_lacks: tuple[str, ...] = ()) -> Chain:
    """A default window of :data:`PAGES` pages."""
    return Chain(ram=2 * MIB, page_size=1 << 16, window=PAGES << 12, kvm=kvm, connect=connect, kvm_lacks=kvm_lacks)


def table_of(chain: Chain, liobn: int = LIOBN0) -> SpaprTceTable:
    return chain.machine.tables[liobn]


def in_kernel(chain: Chain, liobn: int = LIOBN0) -> bool:
    return table_of(chain, liobn).kernel is not None


def entries(chain: Chain) -> list[int]:
    return table_of(chain).entries.tolist()


class TestDifferences:
    """All that a guest can tell acceleration by. Each first without it, then with it."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda chain: chain.put(0x1008, 0x5003),
            lambda chain: chain.stuff(0x1008, 0, 1),
            lambda chain: chain.indirect(0x1008, [0x5003]),
        ],
        ids=["put", "stuff", "indirect"],
    )
    def test_a_misaligned_bus_address_is_rounded_or_refused(self, call: Callable[[Chain], int]) -> None:
        for kvm, ret in ((False, SUCCESS), (True, PARAMETER)):
            assert call(small(kvm=kvm)) == ret

    @pytest.mark.parametrize(
        "call",
        [
            lambda chain: chain.stuff((PAGES - 2) * PAGE, 0xBAD0, 3),
            lambda chain: chain.indirect((PAGES - 2) * PAGE, [0xBAD0] * 3),
        ],
        ids=["stuff", "indirect"],
    )
    def test_what_leaves_the_window_is_done_as_far_as_it_goes_or_not_at_all(self, call: Callable[[Chain], int]) -> None:
        for kvm, left in ((False, [0xBAD0, 0xBAD0]), (True, [0, 0])):
            chain = small(kvm=kvm)
            assert call(chain) == PARAMETER
            assert entries(chain)[-2:] == left

    @pytest.mark.parametrize("perm", [1, 2, 3])
    def test_a_value_with_permission_is_stuffed_or_refused(self, perm: int) -> None:
        for kvm, ret, value in ((False, SUCCESS, 0x5000 | perm), (True, PARAMETER, 0)):
            chain = small(kvm=kvm)
            assert chain.stuff(0, 0x5000 | perm, 2) == ret
            assert entries(chain)[:3] == [value, value, 0]
            assert chain.host_view() == chain.guest_view()


page = st.one_of(st.integers(0, 40), st.sampled_from((512, 1 << 30)))
tces = st.builds(
    lambda page, low, perm: page << 12 | low | perm, page, st.sampled_from((0, 0, 0, 0x800)), st.integers(0, 3)
)
liobns = st.sampled_from((LIOBN0, LIOBN0, LIOBN0, LIOBN1))
at = st.integers(0, PAGES + 1).map(lambda number: number * PAGE)
put = st.tuples(st.just("put"), liobns, at, tces)
stuff = st.tuples(st.just("stuff"), liobns, at, st.sampled_from((0, 0, 0xBAD0)), st.integers(0, PAGES + 2))
indirect = st.tuples(st.just("indirect"), liobns, at, st.lists(tces, max_size=PAGES))
moves = st.sampled_from(("plug", "unplug", "host lost", "host back", "reset")).map(lambda name: (name,))


def fits(call: tuple[object, ...]) -> bool:
    """Whether the call stays in the window: :class:`TestDifferences` has those that do not."""
    match call:
        case ("stuff", _, int(ioba), _, int(count)):
            return ioba // PAGE + count <= PAGES
        case ("indirect", _, int(ioba), list(listed)):
            return ioba // PAGE + len(listed) <= PAGES
    return True


def perform(chain: Chain, call: tuple[object, ...]) -> int:
    match call:
        case ("put", int(liobn), int(ioba), int(tce)):
            return chain.put(ioba, tce, liobn)
        case ("stuff", int(liobn), int(ioba), int(value), int(count)):
            return chain.stuff(ioba, value, count, liobn)
        case ("indirect", int(liobn), int(ioba), list(listed)):
            return chain.indirect(ioba, listed, liobn)
    raise AssertionError(f"{call} is no hypercall")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(put, stuff, indirect).filter(fits), max_size=20))
def test_else_return_codes_and_both_tables_are_the_same(sequence: list[tuple[object, ...]]) -> None:
    plain, fast = small(kvm=False), small(kvm=True)
    for call in sequence:
        assert perform(plain, call) == perform(fast, call)
        assert entries(plain) == entries(fast)
        assert plain.host_view() == fast.host_view() == fast.guest_view()
        assert plain.mm == fast.mm
    assert fast.container is not None
    fast.container.close()
    assert fast.mm == 0


def wanted(oracle: dict[int, int], call: tuple[object, ...]) -> None:
    """What the call does to the entries, by an independent rule."""
    match call:
        case ("put", int(liobn), int(ioba), int(tce)) if liobn == LIOBN0 and ioba < PAGES * PAGE:
            oracle[ioba // PAGE] = tce
        case ("stuff", int(liobn), int(ioba), int(value), int(count)) if liobn == LIOBN0:
            oracle.update((number, value) for number in range(ioba // PAGE, ioba // PAGE + count))
        case ("indirect", int(liobn), int(ioba), list(listed)) if liobn == LIOBN0:
            oracle.update(enumerate(listed, ioba // PAGE))


class Moving:
    """A chain whose table is made to move."""

    def __init__(self, kvm_lacks: tuple[str, ...]) -> None:
        self.chain = small(kvm=True, connect=False, kvm_lacks=kvm_lacks)
        self.links = not kvm_lacks
        assert self.chain.kvm is not None
        self.kvm = self.chain.kvm

    def move(self, name: str) -> None:
        chain = self.chain
        if name == "plug" and chain.container is None:
            chain.container = chain.connect()
        elif name == "unplug" and chain.container is not None:
            chain.container.close()
            chain.container = None
        elif name == "host lost" and self.kvm.connected:
            self.move("unplug")
            self.kvm.disconnect()
        elif name == "host back" and not self.kvm.connected:
            self.kvm.connect(chain.port)
        elif name == "reset":
            table_of(chain).reset()

    @property
    def should_be_in_kernel(self) -> bool:
        return self.kvm.connected and (self.links or self.chain.container is None)


@pytest.mark.parametrize("kvm_lacks", [(), NO_LINKS], ids=["links", "no links"])
@settings(max_examples=60, deadline=None)
@given(sequence=st.lists(st.one_of(put, stuff, indirect, moves, moves).filter(fits), max_size=25))
def test_a_table_moves_without_losing_an_entry(kvm_lacks: tuple[str, ...], sequence: list[tuple[object, ...]]) -> None:
    moving, oracle = Moving(kvm_lacks), dict.fromkeys(range(PAGES), 0)
    chain = moving.chain
    for call in sequence:
        if len(call) == 1:
            if call == ("reset",):
                if chain.container is not None:
                    continue  # the host is told by the window's going and coming, which this is not
                oracle = dict.fromkeys(range(PAGES), 0)
            moving.move(str(call[0]))
        else:
            perform(chain, call)
            wanted(oracle, call)
        assert dict(enumerate(entries(chain))) == oracle
        assert in_kernel(chain) == moving.should_be_in_kernel
        if chain.container is not None:
            assert chain.host_view() == chain.guest_view()


class TestWhereATableLives:
    def test_in_the_kernel_until_vfio_needs_it_where_the_host_cannot_link(self) -> None:
        chain = small(kvm=True, connect=False, kvm_lacks=NO_LINKS)
        assert in_kernel(chain)
        chain.put(0, 0x5003)
        container = chain.connect()
        assert not in_kernel(chain) and table_of(chain).need_vfio
        assert entries(chain)[0] == 0x5003 and chain.host_view() == chain.guest_view() != {}
        chain.port.hcalls.clear()
        assert chain.put(PAGE, 0x6003) == SUCCESS and not chain.port.hcalls
        container.close()
        assert in_kernel(chain) and not table_of(chain).need_vfio
        assert entries(chain)[:3] == [0x5003, 0x6003, 0]

    def test_a_window_of_4_gib_does_not(self) -> None:
        chain = Chain(kvm=True, connect=False, window=1 << 31)
        assert in_kernel(chain)
        for shift, lives in ((31, True), (32, False), (33, False)):
            assert chain.create_window(12, shift)[0] == 0
            assert in_kernel(chain, LIOBN1) == lives
            chain.remove_window(LIOBN1)

    def test_which_does_not_fit_the_memlock_limit_is_here(self) -> None:
        chain = Chain(ram=2 * MIB, window=1 << 30, memlock=(32 + 1 + 1) << 16, kvm=True, connect=False)
        default = chain.machine.tables[LIOBN0]
        assert default.kernel is not None and chain.direct.mm.locked_vm == 32 + 1
        assert chain.create_window(12, 20)[0] == 0, "the guest has its window"
        window = chain.machine.tables[LIOBN1]
        assert window.enabled and window.kernel is None and chain.direct.mm.locked_vm == 32 + 1
        assert chain.put(1 << 59, 0x5003, LIOBN1) == 0 and window.get(0) == 0x5003
        failed = chain.trace.named("kvm_failed_spapr_tce")
        assert [fields["liobn"] for fields in failed] == [LIOBN1] and "memlock" in str(failed[0]["reason"])
        assert chain.remove_window(LIOBN0) == 0 and chain.direct.mm.locked_vm == 0
        assert chain.remove_window(LIOBN1) == 0, "the default window comes back"
        assert default.kernel is not None and chain.direct.mm.locked_vm == 32 + 1

    def test_without_a_machine_of_kvm_every_table_is_here(self) -> None:
        chain = small(kvm=False)
        assert not in_kernel(chain) and not chain.port.hcalls

    def test_a_host_that_refuses_a_table_leaves_it_here(self) -> None:
        chain = small(kvm=True, connect=False)
        assert chain.kvm is not None
        chain.kvm.disconnect()

        def full(vm: int, arg: bytes) -> tuple[int, memoryview]:
            raise OSError(errno.ENOMEM, "no memory for a table")

        chain.port.create_spapr_tce = full
        chain.kvm.connect(chain.port)
        assert not in_kernel(chain)
        assert chain.put(0, 0x5003) == SUCCESS and entries(chain)[0] == 0x5003

    def test_a_closed_window_gives_its_table_back(self) -> None:
        chain = small(kvm=True)
        assert chain.remove_window(LIOBN0) == 0
        assert chain.create_window(16, 18)[0] == 0  # the LIOBN is used again, and has no table at the host any more
        assert in_kernel(chain)
        assert chain.put(0, 0x3_0003) == SUCCESS
        assert chain.host_view() == chain.guest_view() != {}

    def test_a_window_in_large_pages_over_the_hosts_smaller_ones(self) -> None:
        chain = Chain(ram=32 * MIB, page_size=1 << 16, window=4 * MIB, kvm=True)
        chain.remove_window(LIOBN0)
        assert chain.create_window(21, 24)[0] == 0
        assert chain.host_windows()[0][2] == 16
        chain.port.hcalls.clear()
        assert chain.indirect(0, [number << 21 | 3 for number in range(8)]) == SUCCESS
        assert chain.put(0, 5 << 21 | 1) == SUCCESS
        assert chain.stuff(1 << 21, 0, 2) == SUCCESS
        assert chain.port.hcalls == [(INDIRECT, SUCCESS), (PUT, SUCCESS), (STUFF, SUCCESS)]
        assert chain.host_view() == chain.guest_view() != {}


class TestOneMessage:
    def test_a_hypercall_is_one_message_and_no_ioctl(self) -> None:
        chain = Chain(kvm=True)
        chain.port.calls.clear()
        assert chain.put(0x1000, 0x5003) == SUCCESS
        assert chain.indirect(0x10000, [0x9000 + (number << 12) | 1 + number % 3 for number in range(512)]) == SUCCESS
        assert chain.indirect(0x10000, [0x1000 + (number << 12) | 3 for number in range(512)]) == SUCCESS
        assert chain.stuff(0x10000, 0, 512) == SUCCESS
        assert chain.port.calls == []
        assert chain.port.hcalls == [(PUT, 0), (INDIRECT, 0), (INDIRECT, 0), (STUFF, 0)]
        assert chain.host_view() == chain.guest_view() == {0x1000: (0x5000, 3)}

    def test_what_is_too_hard_goes_by_ioctl(self) -> None:
        chain = Chain(kvm=True)
        chain.port.calls.clear()
        assert chain.put(0x1000, 0x5803) == SUCCESS
        assert chain.port.hcalls == [(PUT, TOO_HARD)] and [cmd for cmd, _ in chain.port.calls] == [MAP]
        assert chain.host_view() == chain.guest_view() == {0x1000: (0x5000, 3)}

    def test_an_unmap_of_what_the_host_mapped_itself_is_not_left_out(self) -> None:
        chain = Chain(kvm=True)
        chain.put(0x1000, 0x5003)
        chain.port.fail = no_hcalls
        assert chain.put(0x1000, 0) != SUCCESS, "the request failed on its way"
        assert chain.host_view() == chain.guest_view() == {0x1000: (0x5000, 3)}
        chain.port.fail = lambda _cmd: None
        follower = Follower(chain)
        assert chain.put(0x1000, 0) == SUCCESS
        assert follower.seen == [0x1000] and chain.host_view() == {}


MAP = Ioctl.VFIO_IOMMU_MAP_DMA


def no_hcalls(nr: int) -> None:
    if nr in (PUT, STUFF, INDIRECT):
        raise OSError(errno.EIO, "injected")


class Follower:
    """A cache of translations of the default window, which the host knows nothing of."""

    def __init__(self, chain: Chain) -> None:
        self.seen: list[int] = []
        self._region = table_of(chain).iommu
        assert self._region is not None
        self._notifier = IOMMUNotifier(self._told, IOMMUNotifierFlag.UNMAP, 0, (1 << 64) - 1)
        self._region.register_notifier(self._notifier)

    def _told(self, notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        self.seen.append(entry.iova)

    def leave(self) -> None:
        assert self._region is not None
        self._region.unregister_notifier(self._notifier)


@pytest.mark.parametrize("connect", [False, True])
def test_a_follower_that_the_host_does_not_serve_is_told_of_everything(connect: bool) -> None:
    chain = Chain(kvm=True, connect=connect)
    chain.put(0x1000, 0x5003)
    follower = Follower(chain)
    chain.port.hcalls.clear()
    chain.put(0x1000, 0)
    chain.stuff(0x4000, 0, 1)
    assert follower.seen == [0x1000, 0x4000] and not chain.port.hcalls
    follower.leave()
    assert chain.put(0x1000, 0x5003) == SUCCESS
    assert chain.port.hcalls == [(PUT, SUCCESS)]
    assert not connect or chain.host_view() == chain.guest_view() != {}


@pytest.mark.parametrize("kind", ["spapr-v1", "type1", "type1v2"])
def test_a_container_that_does_not_preregister_is_told_by_ioctl(kind: ContainerKind) -> None:
    group = GroupSpec(26, (DeviceSpec(DEVICE, "edu"),), dma32_size=1 << 30)
    chain = Chain(window=1 << 30, kvm=True, group=group, containers=(kind,), connect=False)
    if kind != "spapr-v1":  # whose page is the host's, and not the default window's
        chain.remove_window(LIOBN0)
        assert chain.create_window(16, 30)[0] == 0
    chain.container = chain.connect()
    index = 0x1_0000 >> table_of(chain).page_shift
    assert in_kernel(chain)
    chain.port.calls.clear()
    assert chain.put(0x1_0000, 0x3_0003) == SUCCESS
    assert not chain.port.hcalls and [cmd for cmd, _ in chain.port.calls] == [MAP]
    assert table_of(chain).entries[index] == 0x3_0003
    assert chain.put(0x1_0000, 0) == SUCCESS
    assert len(chain.port.calls) == 2
    chain.container.close()
    assert chain.put(0x1_0000, 0x3_0003) == SUCCESS
    assert chain.port.hcalls == [(PUT, SUCCESS)]


def test_a_link_that_the_host_refuses_fails_the_section() -> None:
    chain = Chain(kvm=True)

    def fail(cmd: int) -> None:
        if cmd == KvmIoctl.KVM_SET_DEVICE_ATTR:
            raise OSError(errno.EINVAL, "injected")

    chain.port.fail = fail
    assert chain.create_window(12, 24)[0] == -1
    chain.port.fail = lambda _cmd: None
    assert len(chain.host_windows()) == 1
    assert chain.create_window(12, 24)[0] == 0
    assert chain.put(1 << 59, 0x5003, LIOBN1) == SUCCESS
    assert chain.host_view() == chain.guest_view() != {}


def test_a_host_that_dies_in_a_hypercall_costs_no_entry() -> None:
    chain = Chain(kvm=True)
    chain.put(0x1000, 0x5003)
    chain.port.fail = host_gone
    assert chain.put(0x2000, 0x6003) == SUCCESS
    assert chain.kvm is not None and chain.container is not None and chain.container.lost
    chain.port.fail = lambda _cmd: None
    chain.kvm.disconnect()
    chain.container.abandon()
    assert not in_kernel(chain) and entries(chain)[:3] == [0, 0x5003, 0x6003]
    chain.kvm.connect(chain.port)
    chain.connect()
    assert in_kernel(chain)
    assert chain.host_view() == chain.guest_view() == {0x1000: (0x5000, 3), 0x2000: (0x6000, 3)}
