"""Translations of a VT-d unit: one at a time, cached and not, and 64k at once through four levels of tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.bench.dma import QEMU_NOTE
from deploy.bench.measure import Row, against
from vfio_model.batch import variant
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST
from vfio_model.iommu.vtd.spaces import VtdRegion
from vfio_model.iommu.vtd.unit import IntelIommu
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import TranslatedPieces
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import IOMMUAccessFlags
from vfio_model.ranges import Hva

PAGE = 4096
PAGES = 1 << 16
"""Pages that are mapped, in shuffled order: 256 MiB of addresses, whose tables fit into a processor's own caches."""
MANY = 1 << 19
"""2 GiB of addresses, whose tables do not."""
BATCH = 1 << 16
SINGLE = 512
_LEVELS = 4
_RW = 3
_ADDRESS = 0xFFFF_FFFF_F000
_ROOT, _CONTEXT, _TOP = 0, 1, 2
"""Pages of the tables: root, context, then the page tables from the top."""
_DEVFN = 0x10
_RO = IOMMUAccessFlags.RO

_VARIANTS: tuple[variant.Variant, ...] = ("compiled", "numpy")
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Bus:
    name: str = "pcie.0"
    number: int = 0


def _tables(count: int) -> U64:
    """Words of the RAM that the tables lie in: ``count`` pages from 0 on, mapped to as many from 0 on."""
    shuffled = np.random.default_rng(1)
    upper = -(-count // (512 * 512))
    lowest = shuffled.permutation(count // 512) + _TOP + 2 + upper
    words = np.zeros((_TOP + 2 + upper + len(lowest), 512), dtype=np.uint64)
    words[_ROOT, 0] = _CONTEXT * PAGE | 1
    words[_CONTEXT, _DEVFN * 2 : _DEVFN * 2 + 2] = _TOP * PAGE | 1, 5 << 8 | _LEVELS - 2
    words[_TOP, 0] = (_TOP + 1) * PAGE | _RW
    words[_TOP + 1, :upper] = [(_TOP + 2 + number) * PAGE | _RW for number in range(upper)]
    flat = words.reshape(-1)
    flat[(_TOP + 2) * 512 :][: len(lowest)] = lowest.astype(np.uint64) * np.uint64(PAGE) | np.uint64(_RW)
    pages = shuffled.permutation(count).astype(np.uint64) * np.uint64(PAGE) | np.uint64(_RW)
    words[lowest] = pages.reshape(-1, 512)
    return words.reshape(-1)


def _region(words: U64) -> VtdRegion:
    """Behind a unit whose translation is on."""
    root = MemoryRegion("system", 1 << 64)
    block = RAMBlock("ram", words.data.cast("B"), page_size=PAGE, hva=Hva(0x7F00_0000_0000))
    root.add_subregion(0, RAMRegion("ram", block))
    unit = IntelIommu(VtdOptions(), AddressSpace("system", root), lambda _address, _data: None)
    unit.translation.set_root(_ROOT * PAGE, False)
    unit.translation.set_enabled(True)
    return unit.translation.space(_Bus(), _DEVFN, 0xFFFF_FFFF).region


def _indices(words: U64, iovas: U64) -> list[npt.NDArray[np.int64]]:
    """Which words a walk looks at, level by level."""
    table = np.full(len(iovas), _TOP * PAGE, dtype=np.uint64)
    indices = []
    for level in range(_LEVELS, 0, -1):
        where = table + (iovas >> np.uint64(9 * level) & np.uint64(0xFF8)) >> np.uint64(3)
        indices.append(where.view(np.int64))
        table = words[indices[-1]] & np.uint64(_ADDRESS)
    return indices


def rows() -> Iterator[Row]:
    """Batches against their bare gathers, a cached translation and a walk against a look into a dictionary."""
    for count in (PAGES, MANY):
        words = _tables(count)
        yield from _batches(_region(words), words, count)
    yield from _single(_region(_tables(PAGES)))


def _batches(region: VtdRegion, words: U64, count: int) -> Iterator[Row]:
    """By each variant. The gathers look at the same words, and find them as warm."""
    iovas = np.random.default_rng(2).integers(0, count, BATCH).astype(np.uint64) * np.uint64(PAGE)
    assert int(iovas.max()) < INTERRUPT_FIRST
    indices, gathered = _indices(words, iovas), np.empty(BATCH, dtype=np.uint64)

    def gathers() -> None:
        for where in indices:
            words.take(where, 0, gathered, "clip")

    for chosen in _VARIANTS if variant.chosen == "compiled" else _VARIANTS[1:]:

        def batch(chosen: variant.Variant = chosen) -> TranslatedPieces | None:
            before, variant.chosen = variant.chosen, chosen
            try:
                return region.translate_many(iovas, _RO, 0)
            finally:
                variant.chosen = before

        gathers()
        pieces = batch()
        if pieces is None:
            raise AssertionError("the tables are for batches")
        _, addresses, perms = pieces
        if not (np.array_equal(addresses, gathered & np.uint64(_ADDRESS)) and np.all(perms)):
            raise AssertionError("a batch is not what its gathers are")
        name = f"64k IOVAs through 4 levels, tables of {words.nbytes / (1 << 20):.1f} MiB"
        aim = 2.0 if chosen == variant.chosen else None
        yield against(name, batch, "four bare gathers", gathers, number=4, per=BATCH, aim=aim, note=chosen)


def _single(region: VtdRegion) -> Iterator[Row]:
    translate, front = region.translate, region.space.front
    known = {page: None for page in range(SINGLE)}

    def hits() -> None:
        for page in range(SINGLE):
            translate(page * PAGE, _RO, 0)

    def walks() -> None:
        front.clear()
        region.space.context = None
        for page in range(SINGLE):
            translate(page * PAGE, _RO, 0)

    def looks() -> None:
        for page in range(SINGLE):
            known.get(page)

    hits()
    note = QEMU_NOTE
    yield against("translation, cached", hits, "dictionary look", looks, number=20, per=SINGLE, note=note)
    yield against("translation, in the IOTLB", walks, "dictionary look", looks, number=4, per=SINGLE, note=note)
