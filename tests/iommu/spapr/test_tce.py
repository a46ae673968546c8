"""A TCE table as an IOMMU region: windows coming and going, translation one by one and in bulk, replay."""

from __future__ import annotations

import errno
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machine.boards import LIOBN, LIOBN64, PE, Follower, pseries
from vfio_model.iommu.spapr import tce as tce_module
from vfio_model.iommu.spapr.regs import DmaOptions, HCall, HReturn, RtasToken
from vfio_model.memory.iommu_region import IOMMUNotifier
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX

pytestmark = pytest.mark.machine

NONE = IOMMUAccessFlags.NONE


def test_a_table_is_enabled_once_and_disabled_quietly() -> None:
    table = pseries().tables[LIOBN]
    region = table.iommu
    table.enable(16, 0x1000_0000, 4)
    assert (table.page_shift, table.nb_table, table.iommu) == (12, 1 << 18, region)
    table.disable()
    table.disable()
    assert (table.nb_table, table.page_shift, table.bus_offset, table.iommu, table.window) == (0, 0, 0, None, None)
    table.enable(12, 0, 0)
    assert not table.enabled
    table.enable(12, 0, 1 << 32)
    assert not table.enabled, "the count has 32 bits"


@pytest.mark.parametrize(
    ("page_shift", "value", "address", "perm"),
    [(12, 0x0123_4003, 0x0123_4000, 3), (16, 0x3_4560_0001, 0x3_4560_0000, 1)],
)
def test_tce_encoding(page_shift: int, value: int, address: int, perm: int) -> None:
    table = pseries().tables[LIOBN64]
    table.enable(page_shift, 1 << 59, 16)
    table.put(2, value)
    entry = table.translate((2 << page_shift) + 5)
    assert (entry.translated_addr, int(entry.perm)) == (address, perm)
    assert (entry.iova, entry.addr_mask) == (2 << page_shift, (1 << page_shift) - 1)
    assert entry.target_as is table.system


def test_beyond_the_table_nothing_translates_and_the_mask_is_all_ones() -> None:
    table = pseries().tables[LIOBN]
    entry = table.translate(1 << 30)
    assert (entry.iova, entry.translated_addr, entry.addr_mask, entry.perm) == (0, 0, U64_MAX, NONE)


def test_every_window_is_a_new_region_so_that_its_followers_come_anew() -> None:
    machine = pseries()
    table = machine.tables[LIOBN]
    old = table.iommu
    machine.phb().dma.dma_reset()
    assert table.iommu is not old
    assert [r.mr for r in machine.phb().address_space.sections() if r.mr in (old, table.iommu)] == [table.iommu]


def test_a_device_reset_zeroes_entries_and_tells_nobody() -> None:
    machine = pseries()
    machine.hcall(HCall.H_PUT_TCE, LIOBN, 0, 0x1003)
    table = machine.tables[LIOBN]
    follower = Follower(table)
    table.reset()
    assert machine.translate(LIOBN, 0)[1] == 0
    assert (follower.calls, follower.flushes) == (0, 0)


def test_replay_tells_every_valid_entry_in_range_and_nothing_else() -> None:
    machine = pseries()
    table = machine.tables[LIOBN]
    for index in random.Random(7).sample(range(table.nb_table), 400):
        table.put(index, 0x9000_0000 + (index << 12) | index % 4)
    follower = Follower(table)
    assert table.iommu is not None
    table.iommu.replay(follower.notifier)
    assert follower.shadow == follower.expected()
    follower.shadow.clear()
    follower.notifier.start, follower.notifier.last = 0x100_0000, 0x1FF_FFFF
    table.iommu.replay(follower.notifier)
    assert follower.shadow == {k: v for k, v in follower.expected().items() if 0x100_0000 <= k < 0x200_0000}


def test_the_creation_of_a_window_is_not_replayed() -> None:
    table = pseries().tables[LIOBN]
    table.put(0, 0x1003)
    follower = Follower(table)
    table.skipping_replay = True
    assert table.iommu is not None
    table.iommu.replay(follower.notifier)
    assert follower.calls == 0


def test_device_iotlb_notifiers_are_refused() -> None:
    table = pseries().tables[LIOBN]
    assert table.iommu is not None
    with pytest.raises(OSError) as refused:
        table.iommu.register_notifier(IOMMUNotifier(lambda n, e: None, IOMMUNotifierFlag.DEVIOTLB_UNMAP, 0, 4095))
    assert refused.value.errno == errno.EINVAL
    assert not table.need_vfio
    follower = Follower(table)
    assert table.need_vfio
    table.iommu.unregister_notifier(follower.notifier)
    assert not table.need_vfio


def test_translate_many_equals_translate() -> None:
    table = pseries().tables[LIOBN]
    rng = random.Random(3)
    for index in range(64):
        table.put(index, rng.getrandbits(40) & ~0xFFF | rng.randrange(4))
    addrs = [rng.randrange(64 << 12) for _ in range(200)] + [1 << 30, (1 << 30) - 1, U64_MAX, 1 << 63]
    region = table.iommu
    assert region is not None
    many = region.translate_many(np.array(addrs, dtype=np.uint64), NONE, 0)
    assert many is not None
    for addr, translated, perm in zip(addrs, many[1], many[2], strict=True):
        entry = region.translate(addr, NONE, 0)
        assert int(perm) == int(entry.perm)
        if entry.perm:
            assert int(translated) == entry.translated_addr + (addr & entry.addr_mask)


def test_a_huge_window_costs_what_is_touched() -> None:
    machine = pseries()
    rets = machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*PE, 12, 12 + 27], 4)
    assert rets[0] == 0
    assert machine.hcall(HCall.H_PUT_TCE, LIOBN64, (1 << 59) + (1 << 39) - 1, 0x1003)[0] == 0
    assert machine.translate(LIOBN64, (1 << 59) + (1 << 39) - 1) == (0x1000, 3, 0xFFF)
    assert machine.hcall(HCall.H_STUFF_TCE, LIOBN64, 1 << 59, 0x5003, 600)[0] == 0
    assert machine.translate(LIOBN64, (1 << 59) + 0x1000) == (0x5000, 3, 0xFFF)


def test_a_fill_of_2_to_the_31_entries_is_one_run_for_its_followers() -> None:
    entries = 1 << 31
    machine = pseries(dma=DmaOptions(dma_win_size=entries << 12))
    table = machine.tables[LIOBN]
    used = (0, 5, (1 << 20) - 1, 1 << 20, (1 << 30) + 7, entries - 2, entries - 1)
    for index in used:
        assert table.put(index, index << 12 | 3) is None
    follower = Follower(table)
    runs: list[tuple[int, int]] = []
    follower.notifier.fn_run = lambda _, run: runs.append((run.iova, run.count))
    follower.fail = [OSError(errno.EIO, "no")]
    assert machine.hcall(HCall.H_STUFF_TCE, LIOBN, 0, 0, entries)[0] == HReturn.H_HARDWARE
    assert [table.get(index) for index in used] == [index << 12 | 3 for index in used], "undone"
    assert runs[0] == (0, entries)
    assert sum(count for _, count in runs[1:]) == len(used)
    runs.clear()
    assert machine.hcall(HCall.H_STUFF_TCE, LIOBN, 0x1000, 0, entries - 2)[0] == 0
    assert runs == [(0x1000, entries - 2)]
    assert [table.get(index) for index in used] == [3, 0, 0, 0, 0, 0, (entries - 1) << 12 | 3]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_fill_in_slices_is_a_fill(data: st.DataObject) -> None:
    machine = pseries(dma=DmaOptions(dma_win_size=64 << 12))
    table = machine.tables[LIOBN]
    follower, oracle = Follower(table), [0] * 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tce_module, "_SLICE", 8)
        for _ in range(data.draw(st.integers(1, 6))):
            index = data.draw(st.integers(0, 63))
            count = data.draw(st.integers(1, 64 - index))
            tce = data.draw(st.sampled_from((0, 0, 0x7000, 0x5003, 0x6001)))
            slices = -(-count // 8) if tce & 3 else 1
            refused = data.draw(st.none() | st.integers(0, slices - 1))
            follower.fail = [] if refused is None else [None] * refused + [OSError(errno.ENOMEM, "full")]
            error = table.fill(index, tce, count)
            assert (error is None) is (refused is None)
            if error is None:
                oracle[index : index + count] = [tce] * count
            assert table.entries.tolist() == oracle
            assert follower.shadow == follower.expected()
