"""H_PUT_TCE, H_STUFF_TCE and H_PUT_TCE_INDIRECT, answered by the host.

Where they differ from the calls that a VM's process answers (:mod:`vfio_model.iommu.spapr.hcalls`): a misaligned bus
address, or a range that leaves the window, is H_PARAMETER and nothing is stored; so is a value to stuff that has a
permission; and H_PUT_TCE_INDIRECT looks at all entries before it stores the first. H_TOO_HARD is the answer for an
address that is not whole pages, lies in no memory slot that may be written, or is not preregistered with every
container behind the table; for a list that cannot be read; where table memory ran out; and for no pages at all, on
which the two sides would not agree. A page that the guest maps for writing only is mapped for both, as by
VFIO_IOMMU_MAP_DMA.

Source: Linux ``Documentation/virt/kvm/api.rst`` and LoPAPR ("TCE hcall()s").
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.kvm_table import KvmTable, Link, MemorySlot
from vfio_model.host.mm import Region
from vfio_model.host.pending import Revocation
from vfio_model.host.spapr_map import MapRequest, map_range
from vfio_model.host.tce_table import Dropped, add, give_back, take
from vfio_model.uapi.hvcall import INDIRECT_LIST_ALIGN, INDIRECT_MAX_TCES, HCall, HReturn

_SUCCESS, _PARAMETER, _TOO_HARD = int(HReturn.H_SUCCESS), int(HReturn.H_PARAMETER), int(HReturn.H_TOO_HARD)
_PERM = 3
_MAP_FLAGS = (0, 1, 3, 3)
"""Flags of VFIO_IOMMU_MAP_DMA by the permission bits of a TCE."""
_LEAST = 8
"""Fewer entries are faster one by one."""


class Memory(Protocol):
    """What a call sees of its VM."""

    def slot_of(self, gpa: int, size: int) -> MemorySlot | None:
        """The slot that holds all ``size`` bytes at ``gpa``."""

    def guest_memory(self, gpa: int, size: int) -> memoryview | None:
        """Bytes of the guest's memory."""


def put_tce(vm: Memory, table: KvmTable, args: Sequence[int], revocation: Revocation) -> int:
    """``liobn, ioba, tce``."""
    index, tce = table.entry(args[1], 1), args[2]
    if index is None:
        return _PARAMETER
    if not tce & _PERM:
        _clear(table, index, 1, tce, revocation)
        return _SUCCESS
    ua = _address(vm, table, tce)
    if ua is None:
        return _TOO_HARD
    return _put(table, index, tce, ua, revocation)


def stuff_tce(vm: Memory, table: KvmTable, args: Sequence[int], revocation: Revocation) -> int:
    """``liobn, ioba, value, npages``; a value without permission may be anything, as a guest poisons its table."""
    ioba, value, npages = args[1], args[2], args[3]
    if not npages:
        return _TOO_HARD
    index = table.entry(ioba, npages)
    if index is None or value & _PERM:
        return _PARAMETER
    _clear(table, index, npages, value, revocation)
    return _SUCCESS


def put_tce_indirect(vm: Memory, table: KvmTable, args: Sequence[int], revocation: Revocation) -> int:
    """``liobn, ioba, list, npages``: the list is big-endian and read once."""
    ioba, tce_list, npages = args[1], args[2], args[3]
    if npages > INDIRECT_MAX_TCES or tce_list % INDIRECT_LIST_ALIGN:
        return _PARAMETER
    if not npages:
        return _TOO_HARD
    index = table.entry(ioba, npages)
    if index is None:
        return _PARAMETER
    data = vm.guest_memory(tce_list, npages * 8)
    if data is None:
        return _TOO_HARD
    tces = array("Q", bytes(data))
    if sys.byteorder == "little":
        tces.byteswap()
    if npages >= _LEAST and _put_many(vm, table, index, tces, revocation):
        return _SUCCESS
    return _put_each(vm, table, index, tces, revocation)


CALLS: dict[int, Callable[[Memory, KvmTable, Sequence[int], Revocation], int]] = {
    HCall.H_PUT_TCE: put_tce,
    HCall.H_STUFF_TCE: stuff_tce,
    HCall.H_PUT_TCE_INDIRECT: put_tce_indirect,
}
"""By opcode."""


# -- one entry ---------------------------------------------------------------------------------------------------------


def _address(vm: Memory, table: KvmTable, tce: int) -> int | None:
    """The process's address behind ``tce``, when every window behind ``table`` can map it."""
    gpa = tce & ~_PERM
    if gpa & table.page - 1:
        return None
    slot = vm.slot_of(gpa, table.page)
    if slot is None or slot.readonly:
        return None
    ua = gpa + slot.to_ua
    return ua if all(_region(link, ua, table.page) is not None for link in table.links) else None


def _region(link: Link, ua: int, size: int) -> Region | None:
    """The registered region that holds ``size`` bytes at ``ua`` in one piece of memory and takes new TCEs."""
    region = link.mm.lookup(ua, size)
    if region is None or region.dying or region.page_shift < link.window.page_shift:
        return None
    return region if ua + size <= region.run_at(ua).end else None


def _put(table: KvmTable, index: int, tce: int, ua: int, revocation: Revocation) -> int:
    """Store one TCE whose address was looked at."""
    flags, iova = _MAP_FLAGS[tce & _PERM], table.offset + index << table.page_shift
    for link in table.links:
        dropped, error = map_range(link.window, link.mm, MapRequest(flags, ua, iova, table.page))
        _later(link, dropped, revocation)
        if error is not None:
            return _TOO_HARD
    table.entries[index] = tce
    return _SUCCESS


def _clear(table: KvmTable, index: int, count: int, value: int, revocation: Revocation) -> None:
    for link in table.links:
        first, pages = link.index(table, index), link.index(table, count)
        _later(link, link.window.clear(first, pages), revocation)
    table.entries[index : index + count] = memoryview(array("Q", (value,)) * count)


def _later(link: Link, dropped: Dropped, revocation: Revocation) -> None:
    if dropped:
        mm = link.mm
        revocation.later(link.driver.lanes, lambda: give_back(mm, dropped))


# -- a list ------------------------------------------------------------------------------------------------------------


def _put_each(vm: Memory, table: KvmTable, index: int, tces: array[int], revocation: Revocation) -> int:
    addresses: list[int] = []
    for tce in tces:
        ua = _address(vm, table, tce) if tce & _PERM else 0
        if ua is None:
            return _TOO_HARD
        addresses.append(ua)
    for at, (tce, ua) in enumerate(zip(tces, addresses, strict=True), index):
        if not tce & _PERM:
            _clear(table, at, 1, tce, revocation)
        elif _put(table, at, tce, ua, revocation) != _SUCCESS:
            return _TOO_HARD
    return _SUCCESS


def _put_many(vm: Memory, table: KvmTable, index: int, tces: array[int], revocation: Revocation) -> bool:
    """Store a list of one permission whose pages lie in one slot and one region; False: nothing was done."""
    np, count = lazy_numpy(), len(tces)
    words = np.frombuffer(tces, dtype=np.uint64)
    perm = int(np.bitwise_and.reduce(words)) & _PERM
    every = int(np.bitwise_or.reduce(words))
    if not perm or every & _PERM != perm or every & table.page - 1 & ~_PERM:
        return False
    low, high = int(words.min()) & ~_PERM, (int(words.max()) & ~_PERM) + table.page
    slot = vm.slot_of(low, high - low)
    if slot is None or slot.readonly:
        return False
    regions = [_region(link, low + slot.to_ua, high - low) for link in table.links]
    if any(region is None for region in regions) or any(
        one.window.page_shift != table.page_shift for one in table.links
    ):
        return False
    if not _ready(table, index, count):
        return False
    for link, region in zip(table.links, regions, strict=True):
        assert region is not None, "looked at above"
        run = region.run_at(low + slot.to_ua)
        to_offset = slot.to_ua + run.delta - perm & (1 << 64) - 1
        hpas = run.hpa.to_hpa_many(words + np.uint64(to_offset)) | np.uint64(_MAP_FLAGS[perm])
        _later(link, _store(link, index, hpas.data.cast("B").cast("Q"), region), revocation)
    table.entries[index : index + count] = memoryview(tces)
    return True


def _ready(table: KvmTable, index: int, count: int) -> bool:
    """Whether every window has the tables for these entries, or could make them."""
    try:
        for link in table.links:
            link.window.prepare(index, count)
    except OSError:
        return False
    return True


def _store(link: Link, index: int, tces: memoryview, region: Region) -> Dropped:
    done, dropped = 0, Dropped()
    while done < len(tces):
        step = min(len(tces) - done, link.window.chunk_room(index + done))
        add(dropped, link.window.store(index + done, tces[done : done + step], region.id))
        done += step
    take(region, len(tces))
    return dropped
