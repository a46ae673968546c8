"""What a remote device is told about an address, and what it may move by message; the vIOMMU decides."""

from __future__ import annotations

import pytest

from guestd.dma_services import MAX_ENTRIES, DmaServices
from protocols.vfio_user.messages import TranslateRequest, TranslationEntry
from tests.vfio.direct_chain import MIB, Chain
from vfio_model.memory.types import IOMMUAccessFlags

pytestmark = pytest.mark.machine

PAGE = 4096
BY_MESSAGE = int(IOMMUAccessFlags.UNTRANSLATED_ONLY)


def services(chain: Chain, *, allowed: bool = True) -> DmaServices:
    return DmaServices(chain.machine.phb().address_space, chain.machine.system, lambda: allowed)


def chain() -> Chain:
    return Chain(connect=False)


def test_a_page_is_translated_with_its_permission() -> None:
    machine = chain()
    machine.put(0x3000, 0x5001)
    entries = services(machine).translate(TranslateRequest(0x3123, 8))
    assert entries == [TranslationEntry(0x3000, 0x5000, 0xFFF, 1)]


def test_a_range_is_translated_up_to_the_first_refusal() -> None:
    machine = chain()
    machine.put(0x3000, 0x5003)
    machine.put(0x4000, 0x9003)
    entries = services(machine).translate(TranslateRequest(0x3800, 3 * PAGE))
    assert [(entry.iova, entry.translated, entry.perm) for entry in entries] == [
        (0x3000, 0x5000, 3),
        (0x4000, 0x9000, 3),
        (0x5000, 0, 0),
    ]


def test_what_is_not_in_a_window_is_refused() -> None:
    machine = chain()
    for iova in (0x7000, 1 << 50, (1 << 64) - 1):
        (entry,) = services(machine).translate(TranslateRequest(iova, 1))
        assert entry.perm == 0


def test_what_is_not_ram_goes_by_message() -> None:
    machine = chain()
    machine.put(0x3000, 0x4000_0000_0003)
    (entry,) = services(machine).translate(TranslateRequest(0x3000, 1))
    assert entry.perm == BY_MESSAGE | 3 and entry.translated == 0


def test_what_nobody_hears_of_goes_by_message() -> None:
    machine = chain()
    machine.put(0x3000, 0x5003)
    phb = machine.machine.phb()
    deaf = DmaServices(phb.address_space, machine.machine.system, lambda: True, cacheable=lambda: False)
    assert deaf.translate_page(0x3000).perm == BY_MESSAGE | 3


def test_memory_that_is_shown_as_it_is_has_its_own_addresses() -> None:
    system = chain().machine.system
    passed = DmaServices(system, system, lambda: True)
    assert passed.translate_page(3 * MIB) == TranslationEntry(2 * MIB, 2 * MIB, 2 * MIB - 1, 3)
    assert passed.translate_page(0x4000_0000_0000).perm == 0


def test_without_bus_mastering_nothing_is_translated_or_moved() -> None:
    machine = chain()
    machine.put(0x3000, 0x5003)
    blocked = services(machine, allowed=False)
    assert blocked.translate(TranslateRequest(0x3000, 1))[0].perm == 0
    assert blocked.dma_read(0x3000, 4) is None
    assert not blocked.dma_write(0x3000, b"abcd")


def test_one_answer_is_bounded() -> None:
    machine = chain()
    machine.indirect(0, [3] * 512)
    assert len(services(machine).translate(TranslateRequest(0, 2 * MIB))) == MAX_ENTRIES


def test_large_pages_are_one_entry() -> None:
    machine = chain()
    machine.create_window(24, 25)
    machine.put(1 << 59, 16 * MIB | 3, 0x8000_0001)
    entries = services(machine).translate(TranslateRequest((1 << 59) + 5, 16 * MIB - 5))
    assert entries == [TranslationEntry(1 << 59, 16 * MIB, 16 * MIB - 1, 3)]


def test_dma_by_message_goes_through_the_viommu() -> None:
    machine = chain()
    machine.put(0x3000, 0x5001)
    machine.put(0x4000, 0x6003)
    told = services(machine)
    assert told.dma_write(0x4000, b"abcd") and machine.machine.read_memory(0x6000, 4) == b"abcd"
    assert not told.dma_write(0x3000, b"abcd")
    assert told.dma_read(0x4000, 4) == b"abcd"
    assert told.dma_read(0x9000, 4) is None
