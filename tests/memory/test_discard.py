"""Populated and discarded RAM: the manager against a dict, vetoes, and who may have one."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.fakes import ram_block
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.discard import RamDiscardListener, RamDiscardManager
from vfio_model.memory.iommu_region import IOMMUTLBEntry
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.translation import Translation, ram_target
from vfio_model.memory.types import DMADirection, IOMMUAccessFlags
from vfio_model.ranges import Range

GRANULE = 0x4000
COUNT = 16
SIZE = GRANULE * COUNT


@dataclass(frozen=True)
class Part:
    offset_within_region: int
    size: int


class Shadow(RamDiscardListener):
    """Keeps the bytes that it was told of in units of a quarter granule; vetoes one unit when asked to."""

    UNIT = GRANULE // 4

    def __init__(self, *, double_discard: bool = False) -> None:
        self.double_discard = double_discard
        self.units: set[int] = set()
        self.veto: int | None = None

    def _units(self, part: Range) -> set[int]:
        assert part.start % self.UNIT == 0 and part.size % self.UNIT == 0
        return set(range(part.start // self.UNIT, (part.last + 1) // self.UNIT))

    def notify_populate(self, part: Range) -> None:
        units = self._units(part)
        assert not units & self.units, "nothing is populated twice"
        if self.veto in units:
            raise OSError(errno.ENOSPC, "full")
        self.units |= units

    def notify_discard(self, part: Range) -> None:
        units = self._units(part)
        assert self.double_discard or units <= self.units, "nothing is discarded twice"
        self.units -= units


granules = st.tuples(st.integers(0, COUNT - 1), st.integers(1, 6)).map(lambda t: (t[0], min(t[1], COUNT - t[0])))
parts = st.tuples(st.integers(0, COUNT * 4 - 1), st.integers(1, 30)).map(lambda t: (t[0], min(t[1], COUNT * 4 - t[0])))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("populate"), granules, st.none() | st.integers(0, COUNT * 4 - 1)),
        st.tuples(st.just("discard"), granules, st.none()),
        st.tuples(st.just("join"), parts, st.booleans()),
        st.tuples(st.just("leave"), st.tuples(st.integers(0, 3), st.just(0)), st.none()),
    ),
    max_size=30,
)


@given(steps)
@settings(deadline=None, max_examples=120)
def test_every_listener_knows_what_is_populated_of_its_section(script: list[tuple[str, tuple[int, int], int]]) -> None:
    manager = RamDiscardManager(SIZE, GRANULE)
    oracle = dict.fromkeys(range(COUNT * 4), False)
    listeners: list[tuple[Shadow, set[int]]] = []
    for verb, (first, count), extra in script:
        touched = range(first * 4, (first + count) * 4)
        if verb == "populate":
            if listeners:
                listeners[-1][0].veto = extra
            vetoed = bool(listeners) and extra in listeners[-1][1] and extra in touched and not oracle[extra]
            try:
                manager.populate(first * GRANULE, count * GRANULE)
                assert not vetoed
                oracle.update(dict.fromkeys(touched, True))
            except OSError:
                assert vetoed
        elif verb == "discard":
            manager.discard(first * GRANULE, count * GRANULE)
            oracle.update(dict.fromkeys(touched, False))
        elif verb == "join":
            shadow = Shadow(double_discard=bool(extra))
            manager.register_listener(shadow, Part(first * Shadow.UNIT, count * Shadow.UNIT))
            listeners.append((shadow, set(range(first, first + count))))
        elif first < len(listeners):
            shadow, _ = listeners.pop(first)
            manager.unregister_listener(shadow)
            assert not shadow.units
        there = {unit for unit, state in oracle.items() if state}
        for shadow, scope in listeners:
            assert shadow.units == there & scope
        _check_replay(manager, oracle)


def _check_replay(manager: RamDiscardManager, oracle: dict[int, bool]) -> None:
    section = Part(Shadow.UNIT, SIZE - 3 * Shadow.UNIT)  # neither end at a granule
    seen: dict[int, bool] = {}
    for state, replay in ((True, manager.replay_populated), (False, manager.replay_discarded)):
        found: list[Range] = []
        replay(section, found.append)
        for part in found:
            seen.update(dict.fromkeys(range(part.start // Shadow.UNIT, (part.last + 1) // Shadow.UNIT), state))
    assert seen == {unit: oracle[unit] for unit in range(1, COUNT * 4 - 2)}
    for unit, state in oracle.items():
        assert manager.is_populated(Part(unit * Shadow.UNIT, Shadow.UNIT)) is state


def test_a_veto_takes_back_what_others_accepted() -> None:
    manager, first, second = RamDiscardManager(SIZE, GRANULE), Shadow(), Shadow()
    manager.register_listener(first, Part(0, SIZE))
    manager.register_listener(second, Part(0, SIZE))
    second.veto = 4
    with pytest.raises(OSError, match="full"):
        manager.populate(0, 2 * GRANULE)
    assert not first.units and not second.units
    assert not manager.is_populated(Part(0, 1))


def test_a_listener_that_refuses_what_is_there_is_not_registered() -> None:
    manager, shadow = RamDiscardManager(SIZE, GRANULE), Shadow()
    manager.populate(0, GRANULE)
    manager.populate(4 * GRANULE, GRANULE)
    shadow.veto = 16
    with pytest.raises(OSError, match="full"):
        manager.register_listener(shadow, Part(0, SIZE))
    assert not shadow.units
    manager.discard(0, SIZE)  # it would notice


@pytest.mark.parametrize(("offset", "size"), [(1, GRANULE), (0, 1), (SIZE, GRANULE), (0, SIZE + GRANULE), (0, 0)])
def test_only_whole_granules_of_the_ram_change(offset: int, size: int) -> None:
    manager = RamDiscardManager(SIZE, GRANULE)
    for change in (manager.populate, manager.discard):
        with pytest.raises(OSError, match="whole granules") as caught:
            change(offset, size)
        assert caught.value.errno == errno.EINVAL


def test_one_manager_per_region_and_only_while_nobody_shows_it() -> None:
    region = RAMRegion("ram", ram_block(SIZE))
    manager = RamDiscardManager(SIZE, GRANULE)
    region.set_discard_manager(manager)
    with pytest.raises(OSError, match="has a discard manager") as caught:
        region.set_discard_manager(RamDiscardManager(SIZE, GRANULE))
    assert caught.value.errno == errno.EBUSY and region.discard_manager is manager
    root = MemoryRegion("system", 1 << 64)
    space = AddressSpace("memory", root)
    root.add_subregion(0, region)
    with pytest.raises(AssertionError, match="is mapped"):
        region.set_discard_manager(None)
    root.del_subregion(region)
    region.set_discard_manager(None)
    region.set_discard_manager(RamDiscardManager(SIZE, GRANULE))
    assert not space.shows(region)


def managed_space() -> tuple[AddressSpace, RamDiscardManager]:
    region, manager = RAMRegion("ram", ram_block(SIZE)), RamDiscardManager(SIZE, GRANULE)
    region.set_discard_manager(manager)
    root = MemoryRegion("system", 1 << 64)
    root.add_subregion(0x10000, region)
    return AddressSpace("memory", root), manager


def test_an_iommu_entry_leads_to_populated_ram_only() -> None:
    space, manager = managed_space()
    manager.populate(GRANULE, GRANULE)
    inside = IOMMUTLBEntry(space, 0, 0x10000 + GRANULE, 0xFFF, IOMMUAccessFlags.RW)
    assert isinstance(ram_target(inside), Translation)
    outside = IOMMUTLBEntry(space, 0, 0x10000, 0xFFF, IOMMUAccessFlags.RW)
    assert ram_target(outside) == "iommu map to discarded memory (e.g., unplugged via virtio-mem): 10000"
    half = IOMMUTLBEntry(space, 0, 0x10000, 2 * GRANULE - 1, IOMMUAccessFlags.RW)
    assert str(ram_target(half)).startswith("iommu map to discarded memory")


def test_a_discard_rings_the_mappings_of_what_goes() -> None:
    space, manager = managed_space()
    manager.populate(0, SIZE)
    rung: list[int] = []
    for granule in range(3):
        at = 0x10000 + granule * GRANULE
        mapping = space.map(at, 16, DMADirection.TO_DEVICE, lambda gone: rung.append(gone.iova))
        assert mapping is not None
    manager.discard(GRANULE, GRANULE)
    assert rung == [0x10000 + GRANULE]
