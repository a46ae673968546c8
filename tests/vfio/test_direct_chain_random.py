"""After any sequence of guest calls the host's tables are what the guest's say; a dict is the oracle of the guest's."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vfio.direct_chain import LIOBN0, LIOBN1, MIB, Chain
from vfio_model.host.topology import DeviceSpec, GroupSpec

PAGES = 16
tces = st.builds(lambda page, perm: page << 16 | perm, st.integers(0, 40), st.integers(0, 3))
liobns = st.sampled_from((LIOBN0, LIOBN1, 0x8000_0002))
iobas = st.builds(
    lambda base, page, low: base + (page << 12) + low,
    st.sampled_from((0, 1 << 59)),
    st.integers(0, PAGES),
    st.sampled_from((0, 0, 5)),
)
put = st.tuples(st.just("put"), liobns, iobas, tces)
stuff = st.tuples(st.just("stuff"), liobns, iobas, st.sampled_from((0, 0, 0x30003)), st.integers(0, PAGES + 2))
indirect = st.tuples(st.just("indirect"), liobns, iobas, st.lists(tces, max_size=PAGES + 2))
create = st.tuples(st.just("create"), st.sampled_from((12, 16)), st.sampled_from((16, 18)))
remove = st.tuples(st.just("remove"), liobns)
reset = st.tuples(st.just("reset"))
calls = st.lists(st.one_of(put, put, stuff, indirect, indirect, create, remove, reset), max_size=25)


def perform(chain: Chain, call: tuple[object, ...]) -> None:
    match call:
        case ("put", int(liobn), int(ioba), int(tce)):
            chain.put(ioba, tce, liobn)
        case ("stuff", int(liobn), int(ioba), int(value), int(count)):
            chain.stuff(ioba, value, count, liobn)
        case ("indirect", int(liobn), int(ioba), list(entries)):
            chain.indirect(ioba, entries, liobn)
        case ("create", int(page_shift), int(window_shift)):
            chain.create_window(page_shift, window_shift)
        case ("remove", int(liobn)):
            chain.remove_window(liobn)
        case _:
            chain.reset_windows()


def windows(chain: Chain) -> list[tuple[int, int]]:
    found = [table.window for table in chain.machine.tables.values()]
    return sorted((window.start, window.last) for window in found if window is not None)


@settings(max_examples=60, deadline=None)
@given(calls)
def test_the_host_follows_the_guest(sequence: list[tuple[object, ...]]) -> None:
    chain = Chain(ram=2 * MIB, page_size=1 << 16, window=PAGES << 12)
    for call in sequence:
        perform(chain, call)
        assert chain.host_view() == chain.guest_view()
        assert [(start, last) for start, last, _ in chain.host_windows()] == windows(chain)
    assert chain.container is not None
    chain.container.close()
    assert chain.mm == 0


@settings(max_examples=30, deadline=None)
@given(calls)
def test_a_host_with_one_window_refuses_cleanly(sequence: list[tuple[object, ...]]) -> None:
    group = GroupSpec(26, (DeviceSpec("0005:01:00.0"),), max_windows=1)
    chain = Chain(ram=2 * MIB, page_size=1 << 16, window=PAGES << 12, group=group)
    for call in sequence:
        perform(chain, call)
        assert chain.host_view() == chain.guest_view()
        assert [(start, last) for start, last, _ in chain.host_windows()] == windows(chain)
