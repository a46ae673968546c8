"""Windows, registrations and mappings made and undone in any order, against an oracle of dictionaries."""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOENT, ENOMEM, ENOSPC, ENXIO

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.host.rig import HVA, MIB, Rig
from vfio_model.host.spapr_tce import SpaprTceContainer

PAGE = 0x1_0000
CHUNKS = 16
"""Registrations are of 256 KiB, this many of them in the 4 MiB there are."""
CHUNK = 4 * MIB // CHUNKS
LIMIT = 160
STARTS = (0, 1 << 59)
TABLE_PAGES = {(12, 64 * MIB): 4, (16, 1 << 30): 4}
pages = st.integers(0, 40)


class ContainerMachine(RuleBasedStateMachine):
    """The oracle: registered chunks, window geometry per slot, and bus page → RAM offset per slot."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(memlock=LIMIT * PAGE)
        self.rig.container.unmap_dma(0, 64 * MIB)
        self.rig.container.tce_remove(0)
        self.rig.container.unregister_memory(HVA, 4 * MIB)
        self.registered: set[int] = set()
        self.windows: dict[int, tuple[int, int]] = {}
        self.mapped: dict[int, dict[int, int]] = {0: {}, 1: {}}
        self.enabled = True

    def call(self, expected: int, operation: object, *args: int) -> None:
        assert callable(operation)
        try:
            operation(*args)
        except OSError as error:
            assert error.errno == expected, error
        else:
            assert expected == 0

    @rule(chunk=st.integers(0, CHUNKS - 1))
    def register(self, chunk: int) -> None:
        expected = EBUSY if chunk in self.registered else ENOMEM if self.locked() + 4 > LIMIT else 0
        self.call(expected, self.rig.container.register_memory, HVA + chunk * CHUNK, CHUNK)
        if not expected:
            self.registered.add(chunk)

    @rule(chunk=st.integers(0, CHUNKS - 1))
    def unregister(self, chunk: int) -> None:
        used = any(offset // CHUNK == chunk for table in self.mapped.values() for offset in table.values())
        expected = ENOENT if chunk not in self.registered else EBUSY if used else 0
        self.call(expected, self.rig.container.unregister_memory, HVA + chunk * CHUNK, CHUNK)
        if not expected:
            self.registered.discard(chunk)

    @rule(geometry=st.sampled_from(sorted(TABLE_PAGES)), levels=st.integers(1, 3))
    def create(self, geometry: tuple[int, int], levels: int) -> None:
        slot = next((slot for slot in (0, 1) if slot not in self.windows), None)
        cost = self.cost(geometry, levels)
        expected = ENOSPC if slot is None else EINVAL if levels == 3 and geometry[0] == 16 else 0
        if not expected and self.locked() + cost > LIMIT:
            expected = ENOMEM
        self.call(expected, self.rig.container.tce_create, geometry[0], geometry[1], levels)
        if slot is not None and not expected:
            self.windows[slot] = (geometry[0], cost)

    def cost(self, geometry: tuple[int, int], levels: int) -> int:
        """Table pages: every level below the first takes one 64 KiB table more, twice."""
        return TABLE_PAGES[geometry] + 2 * (levels - 1)

    @rule(slot=st.integers(0, 1), inside=st.integers(0, 60 * MIB))
    def remove(self, slot: int, inside: int) -> None:
        self.call(0 if slot in self.windows else EINVAL, self.rig.container.tce_remove, STARTS[slot] + inside)
        self.windows.pop(slot, None)
        self.mapped[slot].clear()

    @rule(slot=st.integers(0, 1), page=pages, ram=pages, count=st.integers(0, 24))
    def map(self, slot: int, page: int, ram: int, count: int) -> None:
        if slot not in self.windows:
            self.call(ENXIO, self.rig.container.map_dma, STARTS[slot], HVA, PAGE)
            return
        shift = self.windows[slot][0]
        offsets = [(ram + n) << shift for n in range(count)]
        good = [offset // CHUNK in self.registered for offset in offsets]
        expected = 0 if all(good) else EINVAL
        self.call(
            expected, self.rig.container.map_dma, STARTS[slot] + (page << shift), HVA + (ram << shift), count << shift
        )
        for n in range(count if all(good) else good.index(False)):
            if expected:
                self.mapped[slot].pop(page + n, None)
            else:
                self.mapped[slot][page + n] = offsets[n]

    @rule(slot=st.integers(0, 1), page=pages, count=st.integers(0, 24))
    def unmap(self, slot: int, page: int, count: int) -> None:
        shift = self.windows[slot][0] if slot in self.windows else 12
        expected = 0 if slot in self.windows else ENXIO
        self.call(expected, self.rig.container.unmap_dma, STARTS[slot] + (page << shift), count << shift)
        for n in range(count):
            self.mapped[slot].pop(page + n, None)

    def locked(self) -> int:
        return 4 * len(self.registered) + sum(cost for _, cost in self.windows.values())

    @invariant()
    def accounting_agrees(self) -> None:
        assert self.rig.mm.locked_vm == self.locked()
        counts = sorted(region.mapped for region in self.rig.mm.regions.values() if region.mapped)
        chunks = [offset // CHUNK for table in self.mapped.values() for offset in table.values()]
        assert counts == sorted(chunks.count(chunk) for chunk in set(chunks))

    @invariant()
    def tables_agree(self) -> None:
        container = self.rig.host.groups[26].container
        assert container is not None and isinstance(container.driver, SpaprTceContainer)
        vma = self.rig.mm.find(HVA)
        assert vma is not None
        for slot, table in enumerate(container.driver.tables):
            found = dict(table.mapped()) if table else {}
            wanted = {page: vma.segment.hpa.to_hpa(offset) | 3 for page, offset in self.mapped[slot].items()}
            assert found == wanted
            assert bool(self.rig.device.pe.words[10 + slot]) == (table is not None)

    @precondition(lambda self: self.windows or self.registered)
    @rule(how=st.sampled_from(["exit", "unset"]))
    def start_over(self, how: str) -> None:
        memory = self.rig
        if how == "unset":
            memory.port.device_closed(memory.token)
            memory.group.unset_container()
        else:
            memory.port.exit()
        assert memory.mm.locked_vm == 0
        assert not memory.mm.regions
        assert not any(memory.device.pe.words[9:12])
        self.__init__()  # type: ignore[misc]


ContainerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestContainerMachine = ContainerMachine.TestCase
