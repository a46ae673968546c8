"""After any sequence of guest calls, resets, plugging and migration the host's tables are what the guest's say: with
in-kernel acceleration, and over a host with room for one window. The kinds of container: ``test_bridges_random``.
"""

from __future__ import annotations

import errno
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.vfio.direct_chain import LIOBN0, LIOBN1, MIB, Chain
from vfio_model.host.topology import DeviceSpec, GroupSpec
from vfio_model.machine.migration import load_device_state, save_device_state
from vfio_model.ranges import Range

pytestmark = pytest.mark.machine

PAGES = 16
DMA64 = 1 << 59
ONE_WINDOW = GroupSpec(26, (DeviceSpec("0005:01:00.0"),), max_windows=1)
tces = st.builds(lambda page, perm: page << 16 | perm, st.integers(0, 40), st.integers(0, 3))
liobns = st.sampled_from((LIOBN0, LIOBN0, LIOBN1, LIOBN1, 0x8000_0002))
iobas = st.builds(
    lambda base, page, low: base + (page << 12) + low,
    st.sampled_from((0, DMA64)),
    st.integers(0, PAGES),
    st.sampled_from((0, 0, 5)),
)


class Guest(RuleBasedStateMachine):
    """A chain whose machine may move to another one; ``GROUP`` is the host's, None for one with two windows."""

    GROUP: ClassVar[GroupSpec | None] = None
    KVM: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.chain = self._chain()

    def _chain(self, *, connect: bool = True) -> Chain:
        return Chain(
            ram=2 * MIB, page_size=1 << 16, window=PAGES << 12, group=self.GROUP, kvm=self.KVM, connect=connect
        )

    # -- what a guest does

    @rule(liobn=liobns, ioba=iobas, tce=tces)
    def put(self, liobn: int, ioba: int, tce: int) -> None:
        self.chain.put(ioba, tce, liobn)

    @rule(liobn=liobns, ioba=iobas, value=st.sampled_from((0, 0, 0x30003)), count=st.integers(0, PAGES + 2))
    def stuff(self, liobn: int, ioba: int, value: int, count: int) -> None:
        self.chain.stuff(ioba, value, count, liobn)

    @rule(liobn=liobns, ioba=iobas, entries=st.lists(tces, max_size=PAGES + 2))
    def indirect(self, liobn: int, ioba: int, entries: list[int]) -> None:
        self.chain.indirect(ioba, entries, liobn)

    @rule(page_shift=st.sampled_from((12, 16)), window_shift=st.sampled_from((16, 18)))
    def create(self, page_shift: int, window_shift: int) -> None:
        before = self.windows()
        if self.chain.create_window(page_shift, window_shift)[0]:
            assert self.windows() == before

    @rule(liobn=liobns)
    def remove(self, liobn: int) -> None:
        self.chain.remove_window(liobn)

    @rule(of=st.sampled_from(("windows", "bridge", "machine")))
    def reset(self, of: str) -> None:
        machine = self.chain.machine
        {"windows": self.chain.reset_windows, "bridge": machine.phb().reset, "machine": machine.reset}[of]()
        assert [start for start, _ in self.windows()] == [0]

    # -- what happens to it

    @precondition(lambda self: self.chain.container is not None)
    @rule()
    def unplug(self) -> None:
        assert self.chain.container is not None
        self.chain.container.close()
        self.chain.container = None
        assert self.chain.mm == 0, "nothing stays locked"

    @precondition(lambda self: self.chain.container is None)
    @rule()
    def plug(self) -> None:
        starts = [start for start, _ in self.windows()]
        try:
            self.chain.container = self.chain.connect()
        except OSError as error:
            # it lets a guest have more windows than it has itself while nothing is plugged
            assert self.GROUP is ONE_WINDOW and len(starts) == 2
            assert error.errno == errno.ENOSPC
            assert self.chain.mm == 0

    @rule()
    def migrate(self) -> None:
        here = self.chain
        there = self._chain(connect=here.container is not None)
        there.ram.view[:] = here.ram.view
        load_device_state(there.machine, save_device_state(here.machine))
        assert there.guest_view() == here.guest_view()
        self.teardown()
        self.chain = there

    def teardown(self) -> None:
        if self.chain.container is not None:
            self.unplug()

    # -- what always holds

    def windows(self) -> list[tuple[int, int]]:
        found = [table.window for table in self.chain.machine.tables.values()]
        return sorted((window.start, window.last) for window in found if window is not None)

    @invariant()
    def windows_are_apart(self) -> None:
        windows = self.windows()
        assert len(windows) <= 2
        assert len(windows) < 2 or not Range(*windows[0]).overlaps(Range(*windows[1]))

    @invariant()
    def the_host_has_what_the_guest_has(self) -> None:
        if self.chain.container is not None:
            assert self.chain.host_view() == self.chain.guest_view()
            assert [(start, last) for start, last, _ in self.chain.host_windows()] == self.windows()


class GuestOfOneWindow(Guest):
    """The host refuses the second window, cleanly."""

    GROUP = ONE_WINDOW


class AcceleratedGuest(Guest):
    """Tables live in the kernel where they can."""

    KVM = True


TestAHostWithOneWindow = GuestOfOneWindow.TestCase
TestAHostWithOneWindow.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestAnAcceleratedGuest = AcceleratedGuest.TestCase
TestAnAcceleratedGuest.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
