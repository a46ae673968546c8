"""Any sequence of what a guest does and of what happens to it, over every kind of container: the host's tables are the
guest's view, devices reach what it says, and what is locked is what is needed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.acceleration import answered_otherwise, kvm
from tests.vfio.bridges import BACKING, BRIDGE_OF, PAGES, RAM, Bridges, View
from vfio_model.host.spapr_container import SpaprTables
from vfio_model.iommu.spapr.regs import RtasStatus, pci_liobn, rtas_status
from vfio_model.machine.migration import load_device_state, save_device_state
from vfio_model.ranges import Range
from vfio_model.uapi.containers import CONTAINER_KINDS, ContainerKind

pytestmark = pytest.mark.machine

DMA64 = 1 << 59
WINDOW_CALLS = ("create",) * 4 + ("remove",) * 2 + ("reset windows", "reset bridge", "reset machine")
UPHEAVALS = ("plug", "plug", "die", "migrate")
"""What happens besides what the guest does; a host that has died comes back."""
V1_WINDOW = 2 << 30
CALLS = ("put", "stuff", "indirect")
bridges = st.sampled_from((0, 0, 0, 1))
groups = st.sampled_from(sorted(BRIDGE_OF))
windows = st.sampled_from((0, 0, 1))
liobns = st.builds(pci_liobn, bridges, windows)
tces = st.builds(lambda page, perm: page << 16 | perm, st.integers(0, 34), st.sampled_from((0, 1, 2, 3, 3)))
pages = st.integers(0, PAGES - 3)


def at_window(bridge: int, window: int, page: int, astray: int) -> tuple[int, int]:
    """(LIOBN, bus address) that belong together, most of the time."""
    return pci_liobn(bridge, window), (DMA64 if window ^ (astray == 1) else 0) + (page << 12) + (
        5 if astray == 2 else 0
    )


tables_entries = st.builds(at_window, bridges, windows, pages, st.sampled_from((0,) * 10 + (1, 2)))
addresses = st.builds(
    lambda window, page, low: DMA64 * window + (page << 12) + low,
    windows,
    st.integers(0, PAGES),
    st.sampled_from((0, 4088)),
)
values = st.one_of(st.none(), st.integers(1, 0xFFFF))
counts = st.one_of(st.integers(0, 5), st.integers(0, PAGES + 2))
lists = st.one_of(st.lists(tces, max_size=5), st.lists(tces, max_size=PAGES + 2))
shifts = st.tuples(st.sampled_from((12, 16)), st.sampled_from((16, 18)))


table_calls = st.one_of(
    st.tuples(st.just("put"), tables_entries, tces),
    st.tuples(st.just("stuff"), tables_entries, st.sampled_from((0, 0x30003)), counts),
    st.tuples(st.just("indirect"), tables_entries, lists),
)


class Guest(RuleBasedStateMachine):
    """A guest that may move to another machine, over containers of ``KIND``."""

    KIND: ClassVar[ContainerKind]

    def __init__(self) -> None:
        super().__init__()
        self.at = Bridges(self.KIND)
        self.dying = False
        self.steps = 0

    @initialize()
    def begin(self) -> None:
        for number in (26, 28):
            assert self.at.plug(number)

    # -- what a guest does

    @rule(calls=st.lists(table_calls, min_size=1, max_size=6))
    def hypercalls(self, calls: list[tuple[Any, ...]]) -> None:
        for name, entry, *args in calls:
            getattr(self.at, name)(*entry, *args)

    @rule(what=st.sampled_from(WINDOW_CALLS), bridge=bridges, window=st.sampled_from((0, 1, 1, 1)), shift=shifts)
    def change_windows(self, what: str, bridge: int, window: int, shift: tuple[int, int]) -> None:
        at, before = self.at, self.at.windows(bridge)
        if what == "create":
            if rtas_status(at.create(bridge, *shift)):
                assert at.windows(bridge) == before
        elif what == "remove":
            at.remove(pci_liobn(bridge, window))
        else:
            if what == "reset windows":
                at.reset_windows(bridge)
            else:
                (at.machine if what == "reset machine" else at.machine.phb(bridge)).reset()
            assert [start for start, _ in at.windows(bridge)] == [0]

    # -- what happens to it

    @rule(what=st.sampled_from(UPHEAVALS), number=groups, after=st.integers(1, 4))
    def upheaval(self, what: str, number: int, after: int) -> None:
        if self.dying:
            self.dying = False
            self.may_be_left_out(self.at.restart_host())
        elif what == "die":
            self.at.port.left, self.dying = after, True
        elif what == "migrate":
            self.migrate()
        elif number in self.at.plugged:
            self.at.unplug(number)
        else:
            self.may_be_left_out([] if self.at.plug(number) else [number])

    def may_be_left_out(self, numbers: list[int]) -> None:
        """A host without dynamic windows cannot follow one that the guest made while nothing was plugged, and one with
        them cannot put it where the guest has it without the default window.
        """
        for number in numbers:
            assert self.KIND.startswith("spapr")
            assert DMA64 in [start for start, _ in self.at.windows(BRIDGE_OF[number])]

    def migrate(self) -> None:
        here, there = self.at, Bridges(self.KIND)
        for number in here.plugged:
            assert there.plug(number)
        there.ram.view[:] = here.ram.view
        load_device_state(there.machine, save_device_state(here.machine))
        for bridge in range(2):
            assert there.guest_view(bridge) == here.guest_view(bridge)
        self.leave()
        self.at = there

    def leave(self) -> None:
        for number in list(self.at.plugged):
            self.at.unplug(number)
        assert self.at.locked == 0, "nothing stays locked"

    def teardown(self) -> None:
        if not self.dying:
            self.leave()

    # -- what always holds

    def reach(self, number: int, iova: int, value: int | None, view: View) -> None:
        """The device of group ``number`` writes ``value``, or reads, as far as ``view`` lets it and no further."""
        page = view.get(iova & ~0xFFF)
        allowed = page is not None and (value is None or page[1] == 3)
        at, ram = page[0] + (iova & 0xFFF) if page is not None else 0, self.at.ram.view
        if value is None:
            assert self.at.dma(number, iova, None) == (allowed, bytes(ram[at : at + 8]) if allowed else bytes(8))
            return
        expected = bytearray(ram)
        if allowed:
            expected[at : at + 8] = value.to_bytes(8, "little")
        assert self.at.dma(number, iova, value) == (allowed, b"") and ram == expected

    @invariant()
    def windows_are_apart(self) -> None:
        for bridge in range(2):
            windows = self.at.windows(bridge)
            assert len(windows) <= 2
            assert len(windows) < 2 or not Range(*windows[0]).overlaps(Range(*windows[1]))

    @invariant()
    def the_host_has_what_the_guest_has(self) -> None:
        if not self.dying:
            for number in self.at.plugged:
                assert self.at.host_view(number) == self.at.guest_view(BRIDGE_OF[number])

    @invariant()
    def devices_reach_what_the_guest_has(self) -> None:
        """One page that is mapped, and two that most likely are not."""
        self.steps += 1
        for number in () if self.dying else self.at.plugged:
            view = self.at.guest_view(BRIDGE_OF[number])
            mapped = sorted(view)[self.steps % len(view) :][:1] if view else []
            for iova in (*mapped, (self.steps % PAGES) << 12, DMA64 + (self.steps % PAGES << 12)):
                self.reach(number, iova + 8, None if self.steps % 5 else self.steps, view)

    @invariant()
    def what_is_locked_is_what_is_needed(self) -> None:
        if self.dying:
            return
        drivers = self.at.drivers()
        if self.KIND.startswith("type1"):
            firsts = {id(self.at.driver(number)): number for number in self.at.plugged}
            assert self.at.locked == sum(len(self.at.host_view(number)) for number in firsts.values())
            return
        tables = [table for driver in drivers if isinstance(driver, SpaprTables) for table in driver.tables if table]
        needed = sum(128 if table.last + 1 - table.start == V1_WINDOW else 2 for table in tables)
        if self.KIND == "spapr-v1":
            needed += len(drivers) * (V1_WINDOW // BACKING)
        elif drivers:
            needed += RAM // BACKING
        assert self.at.locked == needed
        behind = [BRIDGE_OF[number] for number in self.at.plugged]
        assert len(drivers) == (len(behind) if self.KIND == "spapr-v1" else len(set(behind)))


@pytest.mark.parametrize("kind", CONTAINER_KINDS)
def test_the_host_follows_the_guest(kind: ContainerKind) -> None:
    machine = type(f"Guest_{kind}", (Guest,), {"KIND": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=40, deadline=None))


steps = st.one_of(
    table_calls,
    table_calls,
    st.tuples(st.just("get"), tables_entries),
    st.tuples(st.just("query"), bridges),
    st.tuples(st.just("remove"), liobns),
    st.tuples(st.just("reset_windows"), bridges),
    st.tuples(st.just("dma"), groups, addresses, values),
    st.tuples(st.just("dma"), groups, addresses, values),
    st.tuples(st.just("create"), bridges, st.sampled_from((12, 16)), st.sampled_from((16, 18))),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(steps, min_size=10, max_size=60))
def test_a_guest_cannot_tell_the_kinds_apart(program: list[tuple[Any, ...]]) -> None:
    """But for dynamic windows: a container of version 1 has none. Where one kind refuses what another makes, the others
    give it back, and the guests go on alike.
    """
    guests = [Bridges(kind) for kind in CONTAINER_KINDS]
    assert all(guest.plug(number) for guest in guests for number in BRIDGE_OF)
    for name, *given_args in program:
        args = [*given_args[0], *given_args[1:]] if isinstance(given_args[0], tuple) else given_args
        if name == "dma" and (view := sorted(guests[0].guest_view(BRIDGE_OF[args[0]]))):
            args[1] = view[args[1] // 4096 % len(view)] if args[1] & 8 else args[1]
        if name in CALLS and kvm() and answered_otherwise(guests[0].machine.tables[args[0]], name, *args[1:]):
            continue  # only the host of a container of version 2 answers
        results = [getattr(guest, name)(*args) for guest in guests]
        if name == "create" and any(result != results[0] for result in results):
            for guest, result in zip(guests, results, strict=True):
                if rtas_status(result):
                    assert guest.kind.startswith("spapr") and rtas_status(result) == RtasStatus.HW_ERROR
                else:
                    assert rtas_status(guest.remove(result[1])) == 0
        else:
            assert all(result == results[0] for result in results), (name, args, results)
        for guest in guests[1:]:
            assert guest.ram.view == guests[0].ram.view
            assert all(guest.guest_view(bridge) == guests[0].guest_view(bridge) for bridge in (0, 1))
