"""DMA of a device in guestd behind a VT-d unit, against the same device without an IOMMU; and what it costs the guest
to give such a device another page."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deploy.bench.dma import QEMU_NOTE
from deploy.bench.measure import Row, against
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_tables import READ, WRITE, PageAllocator
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva

PAGE = 4096
RAM = 64 << 20
PAGES = 256
"""That are mapped, in shuffled order."""
_TABLES, _TABLES_END, _DATA = 0x10_0000, 0x80_0000, 0x100_0000
_DEVFN = 0x10


class _Pc:
    """A CPU of ``machine``."""

    big_endian = False

    def __init__(self, machine: Q35Machine) -> None:
        self.read_memory, self.write_memory = machine.read_memory, machine.write_memory
        self.mmio_read, self.mmio_write = machine.mmio_read, machine.mmio_write
        self.clock_step = machine.clock_step


@dataclass(frozen=True, slots=True)
class Emulated:
    """A device of ``machine`` behind its unit: ``iovas`` are mapped to the pages at ``places``."""

    machine: Q35Machine
    driver: VtdDriver
    domain: Domain
    device: DMASpace
    iovas: list[int]
    places: list[int]


def emulated() -> Emulated:
    """A PC whose guest has mapped pages for one of its devices, second stage, four levels."""
    block = RAMBlock("ram", memoryview(mmap.mmap(-1, RAM)), page_size=PAGE, hva=Hva(0x7F00_0000_0000))
    machine = Q35Machine([block], Q35Options(iommu=VtdOptions()))
    cpu = _Pc(machine)
    driver = VtdDriver(cpu, PageAllocator(cpu, _TABLES, _TABLES_END))
    driver.start()
    domain = driver.domain()
    places = [_DATA + page * PAGE for page in random.Random(6).sample(range((RAM - _DATA) // PAGE), PAGES)]
    iovas = [number * PAGE for number in range(PAGES)]
    for iova, place in zip(iovas, places, strict=True):
        driver.map(domain, iova, place, PAGE)
    driver.attach(domain, _DEVFN)
    assert machine.iommu is not None, "as configured"
    device = DMASpace(machine.iommu.ops.get_address_space(machine.root_bus, _DEVFN))
    return Emulated(machine, driver, domain, device, iovas, places)


def rows() -> Iterator[Row]:
    """Accesses of two sizes, to one page and to another each time; then a page that is mapped anew."""
    view = emulated()
    plain = DMASpace(view.machine.system)
    for size in (64, PAGE):
        data = bytes(size)
        label = f"{size} B" if size < 1024 else f"{size >> 10} KiB"
        for where, count in (("one page", 1), ("another page each time", PAGES)):
            translated = _writes(view.device, view.iovas[:count] * (PAGES // count), data)
            direct = _writes(plain, view.places[:count] * (PAGES // count), data)
            name = f"DMA {label} of an emulated device behind VT-d, warm, {where}"
            yield against(name, translated, "the same without IOMMU", direct, number=2, per=PAGES, note=QEMU_NOTE)
    yield _remapped(view)


def _writes(space: DMASpace, addresses: list[int], data: bytes) -> Callable[[], None]:
    write = space.write

    def writes() -> None:
        for address in addresses:
            write(address, data)

    writes()
    return writes


def _remapped(view: Emulated) -> Row:
    """Of each page: taken out of the table, invalidated by the queue, mapped again."""
    driver, domain, table = view.driver, view.domain, view.domain.table
    pages = list(zip(view.iovas[:32], view.places, strict=False))

    def by_queue() -> None:
        for iova, place in pages:
            driver.unmap(domain, iova, PAGE)
            driver.map(domain, iova, place, PAGE)

    def tables_alone() -> None:
        for iova, place in pages:
            list(table.unmap(iova, PAGE))
            table.map(iova, place, PAGE, READ | WRITE)

    name = "a page unmapped, invalidated by the queue and mapped again, each"
    note = "the guest's driver included"
    return against(name, by_queue, "its writes to the tables alone", tables_alone, number=2, per=len(pages), note=note)
