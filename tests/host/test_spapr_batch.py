"""Many structs at once end exactly as struct by struct: same answer, same table, same counts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.host.rig import HVA, MIB, Rig
from vfio_model.batch import variant
from vfio_model.batch.variant import Variant
from vfio_model.host.host import Host
from vfio_model.host.pending import Batch, Pending
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl

MAP, UNMAP = Ioctl.VFIO_IOMMU_MAP_DMA, Ioctl.VFIO_IOMMU_UNMAP_DMA

State = tuple[list[tuple[int, int]], list[tuple[int, int, int]], int]


def state(rig: Rig) -> State:
    """Tables, regions and accounting."""
    container = rig.host.groups[26].container
    assert container is not None and isinstance(container.driver, SpaprTceContainer)
    entries = [entry for table in container.driver.tables if table for entry in table.mapped()]
    regions = [(region.ua, region.used, region.mapped) for region in rig.mm.regions.values()]
    return entries, regions, rig.mm.locked_vm


def end(outcome: Batch | Pending[Batch]) -> tuple[Batch, bool]:
    """The result of a batch, and whether it had to wait."""
    if not isinstance(outcome, Pending):
        return outcome, False
    waited = bool(outcome.lane_devices)
    return outcome.finish(), waited


def singly(host: Host, rig: Rig, cmd: int, args: bytes, count: int) -> tuple[Batch, bool]:
    """The reference: one ioctl after another."""
    size, waited = len(args) // count, False
    for done in range(count):
        try:
            outcome = host.ioctl(rig.mm, rig.container.handle, cmd, args[done * size : (done + 1) * size])
            if isinstance(outcome, Pending):
                waited = True
                outcome.finish()
        except OSError as error:
            return Batch(done, error.errno or 0, error.strerror or ""), waited
    return Batch(count), waited


odd = st.sampled_from(
    ["", "", "argsz", "flags", "iova", "vaddr", "size", "outside", "unregistered", "replaced", "twice"]
)


def maps(count: int, start: int, fault: str, where: int) -> list[DmaMap]:
    """``count`` mappings of one page from page ``start`` on, with one thing wrong."""
    structs = [DmaMap(32, 3, HVA + (n * 7 % 1000) * 4096, (start + n) * 4096, 4096) for n in range(count)]
    broken = structs[where % count]
    match fault:
        case "argsz":
            broken.argsz = 31
        case "flags":
            broken.flags = 4
        case "iova":
            broken.iova += 1
        case "vaddr":
            broken.vaddr += 8
        case "size":
            broken.size = 8192
        case "outside":
            broken.iova = 1 << 40
        case "unregistered":
            broken.vaddr = HVA + 64 * MIB
        case "twice":
            broken.iova = structs[0].iova
    return structs


@pytest.mark.parametrize("way", ["numpy", *(["compiled"] if variant.compiled else [])])
@given(st.integers(1, 600), st.integers(0, 9000), odd, st.integers(0, 600), st.sampled_from([1, 2]), st.booleans())
def test_batches_equal_single_calls(
    way: Variant, count: int, start: int, fault: str, where: int, levels: int, scatter: bool
) -> None:
    rigs = [
        Rig(levels=levels, window=32 * MIB if levels == 1 else 64 * MIB, hpa="scatter" if scatter else "contiguous")
        for _ in "ab"
    ]
    structs = maps(count, start, fault, where)
    calls = [(MAP, b"".join(item.pack() for item in structs))]
    if fault == "replaced":
        calls.insert(0, (MAP, DmaMap(32, 1, HVA, (start + where % count) * 4096, 4096).pack() * 1))
    unmaps = [DmaUnmap(24, int(fault == "flags" and n == where), (start + n) * 4096, 4096).pack() for n in range(count)]
    calls.append((UNMAP, b"".join(unmaps)))
    for cmd, args in calls:
        size = 32 if cmd == MAP else 24
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(variant, "chosen", way)
            many = end(rigs[0].host.ioctl_many(rigs[0].mm, rigs[0].container.handle, cmd, args, len(args) // size))
        assert many == singly(rigs[1].host, rigs[1], cmd, args, len(args) // size)
        assert state(rigs[0]) == state(rigs[1])


@given(st.lists(st.integers(0, 300), min_size=8, max_size=40), st.integers(0, 2))
def test_scattered_iovas_too(pages: list[int], flags: int) -> None:
    rigs = [Rig() for _ in "ab"]
    args = b"".join(DmaMap(32, flags, HVA + page * 4096, page * 4096, 4096).pack() for page in pages)
    many = end(rigs[0].host.ioctl_many(rigs[0].mm, rigs[0].container.handle, MAP, args, len(pages)))
    assert many == singly(rigs[1].host, rigs[1], MAP, args, len(pages))
    assert state(rigs[0]) == state(rigs[1])


def test_a_batch_that_replaces_waits_once_for_all() -> None:
    rig = Rig()
    args = b"".join(DmaMap(32, 3, HVA, n * 4096, 4096).pack() for n in range(20))
    assert end(rig.host.ioctl_many(rig.mm, rig.container.handle, MAP, args, 20)) == (Batch(20), False)
    outcome = rig.host.ioctl_many(rig.mm, rig.container.handle, MAP, args, 20)
    region = rig.mm.lookup(HVA, 4096)
    assert region is not None and region.mapped == 40
    assert end(outcome) == (Batch(20), True)
    assert region.mapped == 20


def test_batches_of_what_cannot_be_batched() -> None:
    rig = Rig()
    for cmd, args, count in ((MAP, b"", 1), (Ioctl.VFIO_SET_IOMMU, struct.pack("=I", 7), 1), (MAP, bytes(64), -1)):
        try:
            rig.host.ioctl_many(rig.mm, rig.container.handle, cmd, args, count)
        except OSError as error:
            assert error.errno == 22
        else:
            raise AssertionError("EINVAL was expected")
    assert rig.host.ioctl_many(rig.mm, rig.container.handle, MAP, b"", 0) == Batch(0)
