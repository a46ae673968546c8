"""Differences from the peer: listed, and those that can be selected do as the peer does."""

from __future__ import annotations

import pytest

from tests.machine.boards import LIOBN, LIOBN64, PE, pseries, tce
from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr.quirks import OVERLAPPING_WINDOWS, PEERS, PGSZ_AS_GIVEN, QUIRKS, selected
from vfio_model.iommu.spapr.regs import DMA64_WINDOW_ADDR, DmaOptions, HCall, RtasToken
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.ranges import U32_MAX

pytestmark = pytest.mark.machine

HW_ERROR = -1 & U32_MAX


def second_dynamic_window(machine: PseriesMachine) -> list[int]:
    """Create the 64-bit window, remove the default one, create another."""
    assert machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*PE, 16, 20], 4)[0] == 0
    assert machine.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, [LIOBN], 1) == [0]
    return machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*PE, 12, 20], 4)


def test_by_default_windows_never_overlap() -> None:
    machine = pseries()
    assert second_dynamic_window(machine) == [HW_ERROR]
    assert [table.enabled for table in machine.phb().dma.tables] == [False, True]


def test_as_the_peer_both_windows_lie_at_one_address_and_the_second_table_is_seen() -> None:
    machine = pseries(dma=DmaOptions(quirks=selected(["qemu"])))
    assert second_dynamic_window(machine) == [0, LIOBN, DMA64_WINDOW_ADDR >> 32, 0]
    machine.hcall(HCall.H_PUT_TCE, LIOBN, DMA64_WINDOW_ADDR, 0x1003)
    machine.hcall(HCall.H_PUT_TCE, LIOBN64, DMA64_WINDOW_ADDR, 0x20003)
    assert (tce(machine, DMA64_WINDOW_ADDR), tce(machine, DMA64_WINDOW_ADDR, LIOBN64)) == (0x1003, 0x20003)
    machine.write_memory(0x20000, b"second")
    data = bytearray(6)
    machine.phb().address_space.read(DMA64_WINDOW_ADDR, data)
    assert data == b"second"


def test_the_list_is_complete_and_names_are_unique() -> None:
    assert len({quirk.name for quirk in QUIRKS}) == len(QUIRKS)
    assert all(quirk.here and quirk.there and quirk.reason and quirk.versions for quirk in QUIRKS)
    assert {quirk.peer for quirk in QUIRKS} <= set(PEERS.values())


def test_names_and_peers_select() -> None:
    assert selected([]) == frozenset()
    assert selected([OVERLAPPING_WINDOWS]) == {OVERLAPPING_WINDOWS}
    assert selected(["qemu"]) == selected([OVERLAPPING_WINDOWS, PGSZ_AS_GIVEN]) == {OVERLAPPING_WINDOWS, PGSZ_AS_GIVEN}
    with pytest.raises(ConfigError, match="no quirk 'window-too-large' can be selected"):
        selected(["window-too-large"])
