"""DMA inside one process: the three paths against the same copies without any check.

RAM, tables and lanes are what a device process has, in this process's own memory: what is timed is the code that runs
in a DMA section.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deploy.bench.measure import Row, against
from vfio_model.batch import variant
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.host import Host, private_buffers
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.lane import Lane
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.topology import transaction
from vfio_model.ranges import Hva
from vfio_model.uapi.vfio import IommuType
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup

RAM_BYTES = 64 << 20
PAGE = 4096
SCATTERED = 16 << 20
DEFAULT_START, DEFAULT_ENTRIES = 0, (1 << 30) // PAGE
"""The default window."""
HVA = Hva(0x7F00_0000_0000)
QEMU_NOTE = "QEMU 11.1: 0.1-0.25 us a translation, recorded"


@dataclass(frozen=True, slots=True)
class Assigned:
    """An assigned device's view of 64 MiB of RAM through a window of 4 KiB pages, in shuffled order."""

    ram: memoryview
    impl: AssignedImpl
    table: memoryview
    start: int


def assigned() -> Assigned:
    """Build a host, a container and a window through the uapi, and a device's path over their shared words."""
    areas: dict[str, memoryview] = {}

    def buffers(name: str, size: int) -> memoryview:
        areas[name] = private_buffers(name, size)
        return areas[name]

    device = DeviceSpec("0000:01:00.0", model="edu")
    host = Host(HostTopology(groups=(GroupSpec(26, (device,)),)), buffers=buffers)
    port = DirectPort(host)
    group = VfioGroup(port, port.open("/dev/vfio/26"))
    container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
    group.set_container(container.handle)
    container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)
    block = RAMBlock("ram", memoryview(bytearray(RAM_BYTES)), page_size=1 << 16, hva=HVA)
    port.declare_memory(block)
    container.register_memory(HVA, RAM_BYTES)
    container.tce_remove(0)
    start = container.tce_create(12, RAM_BYTES, 1)
    pages = list(range(RAM_BYTES // PAGE))
    random.Random(1).shuffle(pages)
    for index, page in enumerate(pages):
        container.map_dma(start + index * PAGE, HVA + page * PAGE, PAGE)
    group.get_device_fd(device.name)
    pe = next(words for name, words in areas.items() if name.startswith("pe."))
    domain = next(words for name, words in areas.items() if name.startswith("domain."))
    impl = AssignedImpl(pe, domain, port.segments, Lane.private())
    table = domain[_table_word(pe, domain) :][: RAM_BYTES // PAGE]
    return Assigned(block.view, impl, table, start)


def _table_word(pe: memoryview, domain: memoryview) -> int:
    """The word at which the table of window 0 begins (see :mod:`vfio_model.host.layout`)."""
    return int(domain[pe[10] // 8 + 5] // 8)


def small(size: int) -> Iterator[Row]:
    """One DMA of ``size`` bytes: assigned with its lane, without IOMMU, and the bare copy."""
    view = assigned()
    ram, data, write = view.ram, bytes(size), view.impl.write
    hot = view.start + 5 * PAGE

    def bare() -> None:
        ram[4096 : 4096 + size] = data

    def checked() -> None:
        write(hot, data)

    plain = AssignedImpl(view.impl.pe, view.impl.domain, view.impl.segments, Lane.private(), compiled=False).write
    unlaned = without_lane(view)

    def in_python() -> None:
        plain(hot, data)

    def in_python_without_lane() -> None:
        unlaned(hot, data)

    label = f"{size} B" if size < 1024 else f"{size >> 10} KiB"
    if variant.chosen == "compiled":
        yield against(f"checked DMA {label}, with lane, compiled", checked, "bare slice copy", bare, number=4000)
    yield against(f"checked DMA {label}, with lane, in Python", in_python, "bare slice copy", bare, number=4000)
    yield against(
        f"checked DMA {label}, without lane, in Python", in_python_without_lane, "bare slice copy", bare, number=4000
    )
    root = MemoryRegion("system", 1 << 64)
    with transaction():
        root.add_subregion(0, RAMRegion("ram", RAMBlock("ram", ram, page_size=PAGE, hva=HVA)))
    system = AddressSpace("memory", root)
    device = DMASpace(system)
    aim = 4.0 if size < 1024 else 2.0
    space_write, dma_write = system.write, device.write

    def direct() -> None:
        space_write(4096, data)

    def through_device() -> None:
        dma_write(4096, data)

    yield against(
        f"DMA {label} without IOMMU", through_device, "system address space", direct, number=4000, rounds=61, aim=1.05
    )
    yield against(f"DMA {label} without IOMMU", through_device, "bare slice copy", bare, number=4000, aim=aim)


def without_lane(view: Assigned):  # type: ignore[no-untyped-def]
    """The same checks and copy as the assigned path's, with no lane around them: what the lane costs."""
    pe, words = view.impl.pe, view.impl.domain
    table, start, ram = _table_word(pe, words), view.start, view.ram
    (place, _, _) = view.impl.segments.find(words[table] & ~0xFFF) or (None, None, None)
    assert place is not None
    base, limit, last, record = place.base, len(ram), start + RAM_BYTES - 1, pe[10]

    def write(iova: int, data: bytes) -> int:
        size = len(data)
        if pe[10] == record and start <= iova <= last and not pe[8] and pe[9]:
            tce = words[table + (iova - start >> 12)]
            within = iova & 0xFFF
            at = (tce & ~0xFFF) - base + within
            if tce & 2 and within + size <= PAGE and 0 <= at <= limit - size:
                ram[at : at + size] = data
                return 0
        return 2

    return write


def scattered() -> Iterator[Row]:
    """16 MiB over shuffled 4 KiB pages, against the same copies to known places."""
    view = assigned()
    count = SCATTERED // PAGE
    order = np.random.default_rng(2).permutation(RAM_BYTES // PAGE)[:count]
    iovas = (order.astype(np.uint64) * PAGE) + np.uint64(view.start)
    data = bytes(range(256)) * (SCATTERED // 256)
    entries = np.frombuffer(view.table, dtype=np.uint64)
    found = view.impl.segments.find(int(entries[0]) & ~0xFFF)
    assert found is not None
    places = ((entries[order] & ~np.uint64(0xFFF)) - np.uint64(found[0].base)) // np.uint64(PAGE)
    rows = places.astype(np.int64)
    pages = np.frombuffer(view.ram, dtype=np.uint8).reshape(-1, PAGE)
    source = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE)
    chunk = (256 << 10) // PAGE

    def bare() -> None:
        for at in range(0, count, chunk):
            pages[rows[at : at + chunk]] = source[at : at + chunk]

    linear = memoryview(bytearray(SCATTERED))

    def memcpy() -> None:
        linear[:] = data

    def checked() -> None:
        if view.impl.write_many(iovas, PAGE, data):
            raise AssertionError("the mapped pages refused a write")

    yield against(
        "16 MiB scattered over 4 KiB pages",
        checked,
        "same copies, no translation",
        bare,
        number=1,
        aim=0.7,
        at_least=True,
        note=variant.chosen,
    )
    yield against(
        "16 MiB scattered over 4 KiB pages", checked, "one memcpy of 16 MiB", memcpy, number=1, note=variant.chosen
    )


def batches() -> Iterator[Row]:
    """Translating 1k and 64k IOVAs in one batch, through a table of the default window's size (1 GiB of 4 KiB pages),
    against a bare gather of the same entries."""
    numbers = np.random.default_rng(3)
    entries = (numbers.integers(0, 1 << 40, DEFAULT_ENTRIES).astype(np.uint64) << np.uint64(12)) | np.uint64(3)
    translator = variant.table_translator(entries, DEFAULT_START, 12)
    for count in (1024, 65536):
        index = numbers.integers(0, len(entries), count)
        iovas = index.astype(np.uint64) * np.uint64(PAGE) + np.uint64(DEFAULT_START + 64)
        out, gathered = np.empty(count, np.uint64), np.empty(count, np.uint64)

        def translate(iovas: object = iovas, out: object = out) -> None:
            translator.translate(iovas, out)

        def gather(index: object = index, gathered: object = gathered) -> None:
            np.take(entries, index, out=gathered, mode="clip")  # type: ignore[call-overload]

        number = 200 if count == 1024 else 5
        yield against(
            f"translate {count // 1024}k IOVAs, each",
            translate,
            "bare numpy gather",
            gather,
            number=number,
            aim=2.0,
            per=count,
            note=f"{variant.chosen}; {QEMU_NOTE}",
        )
