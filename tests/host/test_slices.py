"""Where the slices of long work are cut makes no difference: to results, tables, accounting and regions."""

from __future__ import annotations

import struct
from errno import EFAULT

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_model.host import pending
from vfio_model.host.host import Host
from vfio_model.host.mm import Mm, Vma
from vfio_model.host.pending import Batch, Pending
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.uapi.containers import IOMMU_TYPES, ContainerKind
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl, SpaprRegisterMemory

DEVICE, HVA, PAGE, PAGES = "0000:01:00.0", 1 << 40, 1 << 16, 96
HOLE = 64
"""Pages from here on are memory too, but no region: version 2 refuses them."""
MAP, UNMAP = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)

Run = tuple[bool, int, int, int]
"""MAP or UNMAP, bus page, page of memory, pages."""
runs = st.tuples(st.booleans(), st.integers(0, PAGES), st.integers(0, PAGES + 2), st.integers(0, 40))
batches = st.lists(st.lists(runs, min_size=1, max_size=5), max_size=6)


class Rig:
    """A process with a container of ``kind``, whose host cuts slices of ``size``."""

    def __init__(self, kind: ContainerKind, size: int, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(pending, "SLICE", size)
        spec = GroupSpec(26, (DeviceSpec(DEVICE, "edu"),), dma32_size=16 << 20)
        self.host = Host(HostTopology(groups=(spec,), containers=(kind,), domain_bytes=1 << 20, hpa="scatter"))
        self.mm: Mm = self.host.create_mm(1 << 40)
        for number, pages in enumerate((40, PAGES - 40)):
            segment = self.host.place_segment(f"ram{number}", pages * PAGE, PAGE)
            self.mm.declare(Vma(HVA + number * 40 * PAGE, pages * PAGE, segment))
        self.container = self.host.open("/dev/vfio/vfio", self.mm)
        self.group = self.host.open("/dev/vfio/26", self.mm)
        self.steps = 0
        self.do(self.group, Ioctl.VFIO_GROUP_SET_CONTAINER, struct.pack("=Q", self.container))
        self.do(self.container, Ioctl.VFIO_SET_IOMMU, struct.pack("=I", IOMMU_TYPES[kind]))
        self.do(self.group, Ioctl.VFIO_GROUP_GET_DEVICE_FD, DEVICE.encode() + b"\0")
        if kind == "spapr-v2":
            arg = SpaprRegisterMemory(vaddr=HVA, size=HOLE * PAGE).pack()
            self.do(self.container, Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, arg)
        elif kind == "spapr-v1":
            self.do(self.container, Ioctl.VFIO_IOMMU_ENABLE, b"")

    def end(self, outcome: bytes | Batch | Pending[bytes | Batch] | Pending[None] | None) -> bytes | Batch | None:
        if not isinstance(outcome, Pending):
            return outcome
        while outcome.long:
            self.steps += 1
            outcome.step()
        assert set(outcome.lane_devices) <= {DEVICE}
        return outcome.finish()

    def do(self, handle: int, cmd: int, arg: bytes, count: int = 1) -> bytes | Batch | int | None:
        """The result, or an errno."""
        try:
            if count > 1:
                return self.end(self.host.ioctl_many(self.mm, handle, cmd, arg, count))
            return self.end(self.host.ioctl(self.mm, handle, cmd, arg))
        except OSError as error:
            return error.errno

    def batch(self, some: list[Run]) -> bytes | Batch | int | None:
        if some[0][0]:
            args = [DmaMap(0, 3, HVA + page * PAGE, iova * PAGE, n * PAGE).pack() for _, iova, page, n in some]
            return self.do(self.container, MAP, b"".join(args), len(args))
        args = [DmaUnmap(0, 0, iova * PAGE, n * PAGE).pack() for _, iova, _, n in some]
        return self.do(self.container, UNMAP, b"".join(args), len(args))

    def words(self) -> bytes:
        container = self.host.groups[26].container
        assert container is not None and container.driver is not None
        return container.driver.domain_words.tobytes()

    def state(self) -> object:
        regions = {number: (region.used, region.mapped) for number, region in self.mm.regions.items()}
        return self.mm.locked_vm, regions, self.words()


@pytest.mark.parametrize("kind", ["spapr-v2", "spapr-v1", "type1v2", "type1"])
@settings(max_examples=20, deadline=None)
@given(batches)
def test_in_many_slices_or_in_one(kind: ContainerKind, script: list[list[Run]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        for size in (1, 1 << 62):
            rig = Rig(kind, size, patch)
            results = [(rig.batch(some), rig.state()) for some in script]
            rig.end(rig.host.close(rig.group))
            seen.append((results, rig.mm.locked_vm, rig.mm.regions.keys() if kind == "spapr-v2" else None))
            assert size == 1 or not rig.steps
        assert seen[0] == seen[1]
        assert rig.mm.locked_vm == 0


@pytest.mark.parametrize("kind", ["spapr-v1", "type1v2"])
def test_memory_that_goes_between_two_slices(kind: ContainerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 pins page by page: what is gone is EFAULT, and nothing stays mapped. Type 1 pins all of it first."""
    rig = Rig(kind, 1, monkeypatch)
    arg = DmaMap(0, 3, HVA, 0, PAGES * PAGE).pack()
    before = rig.words() if kind == "spapr-v1" else b""
    outcome = rig.host.ioctl(rig.mm, rig.container, MAP, arg)
    assert isinstance(outcome, Pending) and outcome.long
    rig.mm.undeclare(HVA + 40 * PAGE)
    if kind == "spapr-v1":
        with pytest.raises(OSError, match="not mapped by this process") as caught:
            rig.end(outcome)
        assert caught.value.errno == EFAULT
        assert [region.mapped for region in rig.mm.regions.values()] == [0]
        assert sum(map(bool, before)) <= sum(map(bool, rig.words())), "the table was made meanwhile, and is empty"
    else:
        assert rig.end(outcome) == arg
        assert [region.mapped for region in rig.mm.regions.values()] == [1, 1]
    rig.end(rig.host.close(rig.group))
    assert rig.mm.locked_vm == 0
