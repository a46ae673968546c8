"""DMA of a device behind vfio-user: through the memory that its client has mapped, without a message.

Two large maps are what a client without an IOMMU gives (memory below and above 4 GiB); 4096 maps of a page are what
remains of its memory behind an IOMMU that maps page by page.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deploy.bench.measure import Row, against
from vfio_model.batch import variant
from vfio_model.memory.dma import BLOCKED
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.mapped_dma import MappedDma

PAGE = 4096
RAM_BYTES = 64 << 20
SCATTERED = 16 << 20
ABOVE = 4 << 30
PAGES = 4096
_CHUNK = (256 << 10) // PAGE
_PLACES = 256
"""Pages among which single accesses go round."""


@dataclass(frozen=True, slots=True)
class _Ram:
    """What the client's descriptor leads to."""

    view: memoryview


@dataclass(frozen=True, slots=True)
class Mapped:
    """A device's view: ``iovas`` of pages, and where in ``ram`` each of them is."""

    ram: memoryview
    dma: MappedDma
    iovas: list[int]
    places: list[int]


def large() -> Mapped:
    """Two maps of 32 MiB each."""
    half = RAM_BYTES // 2
    return _mapped([(0, 0, half), (ABOVE, half, half)])


def paged() -> Mapped:
    """4096 pages in shuffled order."""
    places = list(range(RAM_BYTES // PAGE))
    random.Random(1).shuffle(places)
    return _mapped([(ABOVE + 2 * number * PAGE, place * PAGE, PAGE) for number, place in enumerate(places[:PAGES])])


def _mapped(parts: list[tuple[int, int, int]]) -> Mapped:
    """From (IOVA, offset in RAM, bytes) of each map."""
    file = _Ram(memoryview(bytearray(RAM_BYTES)))
    maps: IovaMaps[_Ram] = IovaMaps()
    pages: list[tuple[int, int]] = []
    for iova, offset, size in parts:
        maps.add(IovaMap(iova, size, READ | WRITE, file.view[offset : offset + size], file, offset))
        pages += [(iova + at, offset + at) for at in range(0, size, PAGE)]
    iovas, places = zip(*pages, strict=True)
    return Mapped(file.view, MappedDma(maps, BLOCKED), list(iovas), list(places))


def rows() -> Iterator[Row]:
    """Single accesses, and 16 MiB at once, through few maps and through many."""
    for name, view in (("2 maps", large()), (f"{PAGES:,} maps", paged())):
        for size in (64, PAGE):
            yield _single(name, view, size)
            yield _elsewhere(name, view, size)
        yield _scattered(name, view)


def _label(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size >> 10} KiB"


def _single(name: str, view: Mapped, size: int) -> Row:
    ram, write, data = view.ram, view.dma.write, bytes(size)
    iova, at = view.iovas[-5], view.places[-5]
    assert write(iova, b"\x55" * size) == 0 and ram[at] == 0x55, "it arrives"

    def bare() -> None:
        ram[at : at + size] = data

    def mapped() -> None:
        write(iova, data)

    aim = 4.0 if size < 1024 else 2.0
    name = f"DMA {_label(size)} by a vfio-user client's {name}"
    return against(name, mapped, "bare slice copy", bare, number=4000, rounds=61, aim=aim)


def _elsewhere(name: str, view: Mapped, size: int) -> Row:
    """Another page each time."""
    ram, write, data = view.ram, view.dma.write, bytes(size)
    step = len(view.iovas) // _PLACES
    iovas, places = view.iovas[::step], view.places[::step]

    def bare() -> None:
        for at in places:
            ram[at : at + size] = data

    def mapped() -> None:
        for iova in iovas:
            write(iova, data)

    name = f"DMA {_label(size)} by a vfio-user client's {name}, another page each time"
    return against(name, mapped, "bare slice copies", bare, number=16, per=len(places))


def _scattered(name: str, view: Mapped) -> Row:
    count = SCATTERED // PAGE
    order = np.random.default_rng(2).permutation(len(view.iovas))[:count]
    iovas = np.array(view.iovas, dtype=np.uint64)[order]
    rows = np.array(view.places, dtype=np.int64)[order] // PAGE
    data = bytes(range(256)) * (SCATTERED // 256)
    pages = np.frombuffer(view.ram, dtype=np.uint8).reshape(-1, PAGE)
    source = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE)

    def bare() -> None:
        for at in range(0, count, _CHUNK):
            pages[rows[at : at + _CHUNK]] = source[at : at + _CHUNK]

    def mapped() -> None:
        if view.dma.write_many(iovas, PAGE, data):
            raise AssertionError("mapped pages refused a write")

    return against(
        f"16 MiB scattered over 4 KiB pages by a vfio-user client's {name}",
        mapped,
        "same copies, no translation",
        bare,
        number=1,
        aim=0.7,
        at_least=True,
        note=variant.chosen,
    )
