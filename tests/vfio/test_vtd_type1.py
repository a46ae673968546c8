"""Functions behind VT-d in caching mode over type 1 containers: exactly what changed is mapped and unmapped."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.machine.q35_boards import ram_block
from tests.vfio.direct_chain import MIB
from tests.vfio.vtd_chain import DATA, DISK, MODES, NIC, PAGE, RAM, VtdChain
from vfio_model.guest_drivers.vtd import Domain
from vfio_model.guest_drivers.vtd_tables import READ, WRITE
from vfio_model.host import type1
from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U64_MAX

IOVA = 0x1_0000_0000
LARGE = 2 * MIB
RW = READ | WRITE


@pytest.fixture(params=list(MODES))
def chain(request: pytest.FixtureRequest) -> VtdChain:
    return VtdChain(request.param)


def test_a_page_is_mapped_changed_and_unmapped_by_as_many_calls(chain: VtdChain) -> None:
    domain = chain.started()
    chain.driver.map(domain, IOVA, DATA, PAGE)
    assert chain.port.take() == [("map", IOVA, PAGE, DATA)]
    chain.driver.flush(domain, IOVA, PAGE)
    assert chain.port.take() == [], "nothing has changed"
    table = domain.table
    chain.machine.mmio_write(table.slot(IOVA), 8, table.leaf(DATA + PAGE, READ))
    assert chain.port.take() == [] and chain.table() == {IOVA: (PAGE, DATA, 3)}, "until it is invalidated"
    chain.driver.flush(domain, IOVA, PAGE)
    assert chain.port.take() == [("unmap", IOVA, PAGE, 0), ("map", IOVA, PAGE, DATA + PAGE)]
    assert chain.table() == {IOVA: (PAGE, DATA + PAGE, 1)}
    chain.driver.unmap(domain, IOVA, PAGE)
    assert chain.port.take() == [("unmap", IOVA, PAGE, 0)]
    assert chain.table() == {} and not chain.locked


def test_an_invalidation_of_many_pages_maps_what_is_new_alone(chain: VtdChain) -> None:
    domain = chain.started()
    chain.driver.map(domain, IOVA, DATA, 4 * PAGE)
    chain.port.take()
    domain.table.map(IOVA + 6 * PAGE, DATA, PAGE, RW)
    list(domain.table.unmap(IOVA + PAGE, PAGE))
    chain.driver.flush(domain, IOVA, 16 * PAGE)
    assert chain.port.take() == [("unmap", IOVA + PAGE, PAGE, 0), ("map", IOVA + 6 * PAGE, PAGE, DATA)]


def test_a_large_page_is_one_map_and_narrowing_it_unmaps_it_whole(chain: VtdChain) -> None:
    domain = chain.started()
    chain.driver.map(domain, IOVA, DATA, LARGE, level=2)
    assert chain.port.take() == [("map", IOVA, LARGE, DATA)]
    assert chain.container().mappings.count == 1
    list(domain.table.unmap(IOVA, LARGE))
    domain.table.map(IOVA, DATA, LARGE // 2, RW)
    chain.driver.flush(domain, IOVA, LARGE)
    calls = chain.port.take()
    assert calls[0] == ("unmap", IOVA, LARGE, 0) and len(calls) == 257
    assert chain.table() == chain.guest_table(domain) and len(chain.table()) == 256
    list(domain.table.unmap(IOVA, LARGE))
    chain.machine.mmio_write(domain.table.slot(IOVA, 2), 8, domain.table.leaf(DATA, READ, 2))
    chain.driver.flush(domain, IOVA, PAGE)
    calls = chain.port.take()
    assert [call for call in calls if call[0] == "map"] == [("map", IOVA, LARGE, DATA)]
    assert chain.table() == {IOVA: (LARGE, DATA, 1)}, "all of a page that the invalidation touches"
    assert chain.locked == LARGE // PAGE


def test_nothing_was_in_the_way(chain: VtdChain) -> None:
    """No map is refused: an entry that is there is unmapped before."""
    rng, domain = random.Random(7), chain.started()
    for _ in range(150):
        change(chain, domain, rng)
        assert chain.table() == chain.guest_table(domain)
    assert not chain.trace.named("vfio_dma_error")
    sent = chain.port.take()
    assert len([call for call in sent if call[0] == "map"]) > 100


def change(chain: VtdChain, domain: Domain, rng: random.Random) -> None:
    """The guest changes something, and says so."""
    level = rng.choice([1, 1, 1, 2])
    size = PAGE if level == 1 else LARGE
    iova = IOVA + (rng.randrange(40) * PAGE if level == 1 else rng.randrange(3) * LARGE)
    count = rng.randint(1, 12) if level == 1 else 1
    list(domain.table.unmap(iova & -LARGE, LARGE)) if level == 2 else list(domain.table.unmap(iova, count * size))
    if rng.random() < 0.7:
        # some lead beyond RAM: the host has nothing there
        gpa = rng.randrange(DATA, RAM + (size if rng.random() < 0.1 else 0), size)
        perm = rng.choice([READ, RW, RW, WRITE])
        step = size
        for n in range(count):
            at = domain.table.slot(iova + n * step, level)
            chain.machine.mmio_write(at, 8, domain.table.leaf((gpa + n * step), perm, level))
    covered = (iova & -LARGE, LARGE) if level == 2 else (iova, count * size)
    if rng.random() < 0.15:
        chain.driver.invalidation.iotlb(domain.did if rng.random() < 0.5 else None)
    else:
        chain.driver.flush(domain, *covered)


def test_each_function_has_a_container_of_its_own(chain: VtdChain) -> None:
    domain = chain.started()
    other = chain.domain()
    chain.plug(DISK)
    chain.driver.attach(other, DISK)
    chain.driver.map(domain, IOVA, DATA, PAGE)
    chain.driver.map(other, IOVA, DATA + PAGE, PAGE, READ)
    assert chain.container(NIC) is not chain.container(DISK)
    assert chain.table(NIC) == {IOVA: (PAGE, DATA, 3)} and chain.table(DISK) == {IOVA: (PAGE, DATA + PAGE, 1)}
    chain.driver.unmap(domain, IOVA, PAGE)
    assert chain.table(NIC) == {} and len(chain.table(DISK)) == 1


def test_functions_of_one_domain_have_the_same_pages(chain: VtdChain) -> None:
    domain = chain.started()
    chain.plug(DISK)
    chain.driver.map(domain, IOVA, DATA, 8 * PAGE)
    chain.driver.attach(domain, DISK)
    assert chain.table(NIC) == chain.table(DISK) == chain.guest_table(domain)
    chain.driver.unmap(domain, IOVA + PAGE, PAGE)
    assert chain.table(NIC) == chain.table(DISK) == chain.guest_table(domain)
    assert chain.locked == 14


def test_a_function_changes_its_domain(chain: VtdChain) -> None:
    first, second = chain.started(), chain.domain()
    chain.driver.map(first, IOVA, DATA, 2 * PAGE)
    second.table.map(IOVA + PAGE, DATA + PAGE, 2 * PAGE, RW)
    chain.driver.detach(first, NIC)
    assert chain.table() == {} and not chain.locked, "in none"
    chain.driver.attach(second, NIC)
    assert chain.table() == chain.guest_table(second)
    chain.driver.map(first, IOVA + 8 * PAGE, DATA, PAGE)
    assert chain.table() == chain.guest_table(second), "it is not in that one any more"


@pytest.mark.parametrize("whole", ["domain", "global"])
def test_a_whole_domain_is_compared(chain: VtdChain, whole: str) -> None:
    domain = chain.started()
    chain.driver.map(domain, IOVA, DATA, 16 * PAGE)
    chain.driver.map(domain, 4 * LARGE, DATA, LARGE, level=2)
    list(domain.table.unmap(IOVA + 3 * PAGE, 2 * PAGE))
    domain.table.map(1 << 40, DATA, PAGE, RW)
    chain.port.take()
    chain.driver.invalidation.iotlb(domain.did if whole == "domain" else None)
    gone = [("unmap", IOVA + n * PAGE, PAGE, 0) for n in (3, 4)]
    assert chain.port.take() == [*gone, ("map", 1 << 40, PAGE, DATA)]
    assert chain.table() == chain.guest_table(domain)


def test_without_translation_and_passed_through_all_ram_is_mapped_as_it_is(chain: VtdChain) -> None:
    chain.plug()
    assert chain.one_to_one()
    at_start = chain.locked
    chain.driver.start()
    assert chain.table() == {}, "in no domain"
    domain = chain.domain()
    chain.driver.attach(domain, NIC)
    chain.driver.map(domain, IOVA, DATA, PAGE)
    assert chain.table() == {IOVA: (PAGE, DATA, 3)} and chain.locked == 1
    chain.driver.detach(domain, NIC)
    chain.driver.attach_pass_through(NIC)
    assert chain.one_to_one()
    chain.driver.detach_pass_through(NIC)
    chain.driver.attach(domain, NIC)
    assert chain.table() == {IOVA: (PAGE, DATA, 3)} and chain.locked == 1
    chain.driver.stop()
    assert chain.one_to_one() and chain.locked == at_start


def test_another_root_table_and_a_reset(chain: VtdChain) -> None:
    domain = chain.started()
    chain.driver.map(domain, IOVA, DATA, PAGE)
    registers = chain.driver.registers
    root = registers.read(regs.RTADDR, 8)
    empty = chain.pages.take()
    for address, wanted in ((empty | root & 0xFFF, {}), (root, {IOVA: (PAGE, DATA, 3)})):
        registers.write(regs.RTADDR, address, 8)
        registers.write(regs.GCMD, registers.read(regs.GSTS) & ~regs.GCMD_SRTP | regs.GCMD_SRTP)
        assert chain.table() == wanted
    chain.machine.reset()
    assert chain.one_to_one()


def test_one_that_is_plugged_while_translation_is_on(chain: VtdChain) -> None:
    chain.driver.start()
    domain = chain.domain()
    chain.driver.attach(domain, NIC)
    chain.driver.map(domain, IOVA, DATA, 3 * PAGE)
    chain.driver.map(domain, LARGE, DATA, LARGE, level=2)
    chain.plug()
    assert chain.table() == chain.guest_table(domain) and len(chain.table()) == 4
    chain.unplug()
    assert not chain.locked and not chain.spaces
    chain.driver.map(domain, IOVA + 8 * PAGE, DATA, PAGE)
    chain.plug()
    assert chain.table() == chain.guest_table(domain) and len(chain.table()) == 5


def test_the_device_reaches_what_the_guest_gave_it(chain: VtdChain) -> None:
    domain = chain.started()
    dma = chain.dma()
    assert dma.write(IOVA, b"early") != MemTxResult.OK
    chain.driver.map(domain, IOVA, DATA, PAGE)
    assert dma.write(IOVA + 8, b"given") == MemTxResult.OK
    assert chain.machine.read_memory(DATA + 8, 5) == b"given"
    chain.driver.unmap(domain, IOVA, PAGE)
    assert dma.write(IOVA + 8, b"taken") != MemTxResult.OK
    assert chain.machine.read_memory(DATA + 8, 5) == b"given"


def test_where_messages_go_nothing_is_mapped(chain: VtdChain) -> None:
    """A page of 1 GiB over it reaches the host as what lies on either side."""
    domain = chain.started()
    chain.driver.map(domain, 0xFEE0_0000 - PAGE, DATA, 4 * PAGE)
    assert chain.table() == {0xFEE0_0000 - PAGE: (PAGE, DATA, 3)}
    chain.driver.map(domain, 0xFEF0_0000 - PAGE, DATA, 2 * PAGE)
    assert chain.table().keys() == {0xFEE0_0000 - PAGE, 0xFEF0_0000}
    assert not chain.trace.named("vfio_dma_error")


@pytest.mark.parametrize("mode", MODES)
def test_a_map_that_the_host_refuses_leaves_the_others_alone(mode: str) -> None:
    """The guest is not told, as on QEMU; the device is refused there."""
    holes = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 40) - 1), (1 << 41, (1 << 48) - 1))
    chain = VtdChain(mode, iova_ranges=holes)
    domain = chain.started()
    dma = chain.dma()
    chain.driver.map(domain, IOVA, DATA, PAGE)
    domain.table.map((1 << 40) - PAGE, DATA, 4 * PAGE, RW)
    list(domain.table.unmap(IOVA, PAGE))
    chain.driver.invalidation.iotlb(domain.did)
    assert chain.table() == {(1 << 40) - PAGE: (PAGE, DATA, 3)}
    assert len(chain.trace.named("vfio_dma_error")) == 3
    assert dma.write(1 << 40, b"x") != MemTxResult.OK and dma.write(IOVA, b"x") != MemTxResult.OK
    list(domain.table.unmap(1 << 40, 3 * PAGE))
    chain.driver.invalidation.iotlb(domain.did)
    assert chain.driver.faults() == []


def test_the_memlock_limit_is_reached() -> None:
    """What is beyond it is not mapped, and what is unmapped makes room."""
    chain = VtdChain(memlock=RAM + 16 * PAGE)
    domain = chain.started()
    chain.plug(DISK)
    other = chain.domain()
    chain.driver.attach(other, DISK)
    for base in (IOVA, 2 * IOVA):
        chain.driver.map(domain, base, DATA, RAM // 2)
    chain.driver.map(other, IOVA, DATA, 20 * PAGE)
    assert len(chain.table(DISK)) == 16 and chain.locked == (RAM >> 12) + 16
    assert len(chain.trace.named("vfio_dma_error")) == 4
    chain.driver.unmap(domain, IOVA, RAM // 2)
    chain.driver.unmap(other, IOVA, 20 * PAGE)
    assert chain.table(DISK) == {}
    chain.driver.map(other, IOVA, DATA, 20 * PAGE)
    assert chain.table(DISK) == chain.guest_table(other) and len(chain.table(DISK)) == 20


def test_as_many_mappings_as_the_host_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = VtdChain()
    domain = chain.started()
    monkeypatch.setattr(type1, "DMA_ENTRY_LIMIT", 40)
    chain.driver.map(domain, IOVA, DATA, 45 * PAGE)
    assert len(chain.table()) == 40
    chain.driver.unmap(domain, IOVA, 10 * PAGE)
    chain.driver.map(domain, IOVA, DATA, 4 * PAGE)
    assert len(chain.table()) == 34
    assert chain.table().items() <= chain.guest_table(domain, U64_MAX).items()


def test_without_caching_mode_nothing_is_mapped_while_translation_is_on() -> None:
    """As guestd never has it: a device there is refused."""
    chain = VtdChain("no caching")
    chain.plug()
    assert chain.one_to_one()
    chain.driver.start()
    domain = chain.domain()
    chain.driver.attach(domain, NIC)
    chain.driver.map(domain, IOVA, DATA, PAGE)
    assert chain.table() == {} and not chain.locked
    assert "requires caching mode" in str(chain.trace.named("vfio_listener_region_add_iommu")[0]["refused"])
    chain.driver.stop()
    assert chain.one_to_one()
    chain.driver.start()
    chain.unplug()
    with pytest.raises(OSError, match="requires caching mode"):
        chain.plug()
    assert not chain.locked


@pytest.mark.parametrize(
    ("options", "bits", "why"),
    [
        ({}, 64, "Device assignment is not allowed without enabling caching-mode=on for Intel IOMMU."),
        ({"caching_mode": True}, 39, "aw-bits 48 > host aw-bits 39"),
        ({"caching_mode": True, "aw_bits": 39}, 39, ""),
        ({"caching_mode": True, "snoop_control": True}, 48, "Snoop Control with vhost or VFIO is not supported"),
        ({"caching_mode": True, "scalable_mode": True, "fsts": True}, 48, "Need IOMMUFD backend when fsts=on"),
        ({"caching_mode": True, "scalable_mode": True}, 48, ""),
    ],
)
def test_what_a_unit_says_of_an_assigned_device(options: dict[str, Any], bits: int, why: str) -> None:
    machine = Q35Machine([ram_block()], Q35Options(iommu=VtdOptions(**options)))
    assert machine.root_bus.refuses_assignment(NIC, bits) == why
    past = Q35Machine([ram_block()], Q35Options(iommu=VtdOptions(**options), bypass_iommu=True))
    assert past.root_bus.refuses_assignment(NIC, bits) == "", "it does not reach the unit"


def test_the_hosts_address_bits() -> None:
    chain = VtdChain()
    chain.plug()
    assert chain.spaces[NIC].address_bits == 48
    assert chain.spaces[NIC].has_group("/dev/vfio/26") and not chain.spaces[NIC].has_group("/dev/vfio/27")
    chain.unplug()
