"""A guest of 1 TiB that maps all of itself: the host's table in this process, then the whole way in live processes.

Its RAM is a sparse memfd, of which next to nothing is ever touched. The way is Linux's: a dynamic window as large as
the memory, then H_PUT_TCE_INDIRECT with 512 TCEs at a time. Every call is made, and each is timed by guestd; the sum is
judged by that of as many bare round trips.
"""

from __future__ import annotations

import mmap
import statistics
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import psutil

from deploy.bench import live
from deploy.bench.live import BARE, LIST_GPA, Bench
from deploy.bench.measure import Row, against
from deploy.launcher import Launcher
from deploy.link import Link
from deploy.quantity import Size
from deploy.scenario import Scenario
from deploy.scenario_machine import Device, Pseries
from protocols.control import messages as control
from vfio_model.errors import VfioModelError
from vfio_model.guest_drivers.pseries_ddw import PseriesDdw, TceWindow
from vfio_model.host.hpa import HpaSpace
from vfio_model.host.mm import Mm, Vma
from vfio_model.host.platform import table_geometry, table_pages
from vfio_model.host.spapr_map import MapRequest, map_range
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.tce_table import TceTable
from vfio_model.iommu.spapr import regs

RAM = 1 << 40
RAM_SHIFT = 40
BACKING = 16 << 20
HOST_PAGE = 1 << 16
HVA = 0x7F00_0000_0000
LIST = regs.INDIRECT_MAX_TCES
BATCH = 128
"""So many calls back to back, then as many bare round trips: what is compared is never at rest, nor far apart in
time."""
ALONE = 1024
"""So many lists (or all there are) are mapped once more, one at a time, and a bare round trip follows each: both find
the host asleep."""
SIZES = {16: "64 KiB", 24: "16 MiB"}
_DEVFN = 2 << 3
_PATTERN = 0x0123_4567_89AB_CDEF


def rows() -> Iterator[Row]:
    """Every figure of the 1 TiB guest."""
    yield from tables()
    for page_shift in SIZES:
        yield from mapped(page_shift)


# -- the host's table, in this process


@dataclass(frozen=True, slots=True)
class HostTable:
    """A window of 64 KiB pages over all of the guest's memory, in one level; ``words`` are its entries."""

    table: TceTable
    mm: Mm
    words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

    def map(self, offset: int, size: int) -> None:
        """MAP_DMA of ``size`` bytes of the memory from ``offset`` on, 1:1."""
        _, error = map_range(self.table, self.mm, MapRequest(3, HVA + offset, self.table.start + offset, size))
        if error is not None:
            raise error


def host_table() -> HostTable:
    """An empty table, and a process that has registered its memory."""
    words = memoryview(mmap.mmap(-1, 256 << 20)).cast("Q")
    memory, mm = TableMemory(words, HOST_PAGE), Mm(HOST_PAGE)
    mm.declare(Vma(HVA, RAM, HpaSpace("scatter").place("ram", RAM, BACKING)))
    mm.register(HVA, RAM // HOST_PAGE)
    geometry = table_geometry("powernv", 16, RAM, 1, HOST_PAGE)
    table = TceTable(memory, geometry, regs.DMA64_WINDOW_ADDR, 1, table_pages("powernv", geometry, HOST_PAGE))
    entries = np.frombuffer(words, dtype=np.uint64)
    return HostTable(table, mm, entries[table.root // 8 :][: geometry.entries])


def tables() -> Iterator[Row]:
    """Filling the table with 16.7 million TCEs, each checked, against a memcpy of it."""
    host = host_table()
    other = host.words.copy()

    def at_once() -> None:
        host.map(0, RAM)

    def in_lists() -> None:
        for offset in range(0, RAM, LIST << 16):
            host.map(offset, LIST << 16)

    def memcpy() -> None:
        np.copyto(other, host.words)

    name, limit = f"fill a host table: {len(host.words):,} TCEs", f"memcpy of its {host.words.nbytes >> 20} MiB"
    yield against(f"{name}, one MAP_DMA", at_once, limit, memcpy, number=1, rounds=7, aim=3.0, note="1 TiB by 64 KiB")
    calls = RAM // (LIST << 16)
    note = "the cost is the calls'; the live rows have all of it"
    yield against(f"{name}, {calls:,} MAP_DMA", in_lists, limit, memcpy, number=1, rounds=3, note=note)


# -- between live processes


def _scenario() -> Scenario:
    device = Device(id="load", model="dma-burst", attach="assigned", addr="02.0")
    return Scenario(
        name="bench-huge",
        description="a guest of 1 TiB maps itself",
        machine=Pseries(ram=Size(RAM), page_size=Size(BACKING)),
        devices=[device],
        steps=[],
    )


def _one_level(directory: Path) -> None:
    """Let the host's tables have one level, for which the table memory is known to the page."""
    path = directory / "hostd.json"
    topology = msgspec.json.decode(path.read_bytes())
    for group in topology["groups"]:
        group["levels"] = 1
    path.write_bytes(msgspec.json.encode(topology))


@dataclass(frozen=True, slots=True)
class Memory:
    """What the processes hold: proportional set sizes in bytes, and pages that count as locked."""

    guestd: int
    hostd: int
    locked: int

    @classmethod
    def now(cls, launcher: Launcher) -> Memory:
        """Of the running processes."""
        host = Link(launcher.directory, "hostd", watch=launcher.check)
        locked = host.status()["locked_vm"]
        host.close()
        if not isinstance(locked, int):
            raise VfioModelError(f"hostd reports {locked!r} locked pages")
        guestd, hostd = (psutil.Process(launcher.daemons[role].pid) for role in ("guestd", "hostd"))
        return cls(guestd.memory_full_info().pss, hostd.memory_full_info().pss, locked)


def mapped(page_shift: int) -> Iterator[Row]:
    """All of the memory through a window of such pages."""
    with live.running(_scenario(), _one_level) as bench:
        before = Memory.now(bench.launcher)
        ddw = PseriesDdw(bench.cpu, _DEVFN, ram_size=RAM, list_gpa=LIST_GPA)
        window = ddw.create(page_shift, RAM_SHIFT)
        if window is None:
            raise VfioModelError(f"no window of {SIZES[page_shift]} pages for 1 TiB")
        opened = Memory.now(bench.launcher)
        times = _map_all(bench, window)
        after = Memory.now(bench.launcher)
        _check(bench, window)
    geometry = table_geometry("powernv", page_shift, RAM, 1, HOST_PAGE)
    pages, wanted = opened.locked - before.locked, table_pages("powernv", geometry, HOST_PAGE)
    if pages != wanted or after.locked != opened.locked:
        raise VfioModelError(
            f"the window counts {pages} host pages, not {wanted}; later {after.locked - before.locked}"
        )
    grown = {name: getattr(after, name) - getattr(before, name) >> 20 for name in ("guestd", "hostd")}
    alone = statistics.median(times.alone) / statistics.median(times.bare_alone)
    yield Row(
        f"1 TiB mapped by {SIZES[page_shift]} pages: {len(times.calls):,} H_PUT_TCE_INDIRECT",
        sum(times.calls),
        f"{BARE}, as many",
        sum(times.bare),
        aim=1.3,
        note=f"back to back; one at a time {alone:.2f}; table memory {pages:,} host pages; "
        f"PSS +{grown['guestd']} MiB guestd, +{grown['hostd']} MiB hostd",
        extra={
            "table_pages": pages,
            "guestd_pss_mib": grown["guestd"],
            "hostd_pss_mib": grown["hostd"],
            "tces": geometry.entries,
            "alone_ratio": round(alone, 3),
        },
    )


@dataclass
class Times:
    """Seconds of all calls and of as many bare round trips, back to back; of calls that were made alone, and of the
    round trip behind each of these."""

    calls: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    bare_alone: list[float] = field(default_factory=list)


def _map_all(bench: Bench, window: TceWindow) -> Times:
    """Map bus address ``bus_offset`` + n to n for all of the memory."""
    make, calls, times = _calls(window), (RAM >> window.page_shift) // LIST, Times()
    for first in range(0, calls, BATCH):
        numbers = range(first, min(first + BATCH, calls))
        times.calls += bench.timed([command for number in numbers for command in make(number)])[1::2]
        times.bare += bench.trips.times(len(numbers))
    again = range(min(calls, ALONE))
    step = LIST << window.page_shift
    clear = [(regs.HCall.H_STUFF_TCE, [window.liobn, window.bus_offset + each * step, 0, LIST]) for each in again]
    bench.timed([control.Hcall(*call) for call in clear])
    for number in again:
        write, call = make(number)
        bench.timed([write])
        times.alone += bench.timed([call])
        times.bare_alone.append(bench.trips.once())
    return times


def _calls(window: TceWindow) -> Callable[[int], list[control.Command]]:
    """What the guest does for its n-th list: it writes the list, then it calls."""
    pages = np.arange(LIST, dtype=np.uint64) << np.uint64(window.page_shift)
    step = LIST << window.page_shift

    def make(number: int) -> list[control.Command]:
        tces = (pages + np.uint64(number * step)) | np.uint64(regs.TCE_PERM_MASK)
        args = [window.liobn, window.bus_offset + number * step, LIST_GPA, LIST]
        page_list = control.WriteMemory(LIST_GPA, tces.astype(">u8").tobytes())
        return [page_list, control.Hcall(regs.HCall.H_PUT_TCE_INDIRECT, args)]

    return make


def _check(bench: Bench, window: TceWindow) -> None:
    """The device reaches the end of the memory."""
    last = RAM - 8
    bench.device.store(window.bus_offset + last, 8, pattern=_PATTERN)
    if bench.device.result().completed != 1 or bench.cpu.read_memory(last, 8) != struct.pack("<Q", _PATTERN):
        raise VfioModelError("a DMA to the end of the memory did not arrive")
