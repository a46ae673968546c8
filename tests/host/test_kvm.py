"""A list that the host stores at once leaves its tables as entry by entry does; a dict is the oracle."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_model.host.host import Host
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva
from vfio_model.uapi.hvcall import HCall
from vfio_model.uapi.kvm import KVM_PATH
from vfio_model.uapi.vfio import IommuType
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup
from vfio_model.vfio.kvm import KvmVm

MIB = 1 << 20
RAM, LIST, HVA, LIOBN = 4 * MIB, 3 * MIB, Hva(0x7F00_0000_0000), 0x8000_0000
ENTRIES = 64


class Linked:
    """A machine whose table is linked to a window with pages of ``1 << window_shift`` bytes."""

    def __init__(self, window_shift: int, table_shift: int) -> None:
        spec = GroupSpec(26, (DeviceSpec("0000:01:00.0", "edu"),))
        self.shift = table_shift
        self.host = Host(HostTopology((spec,), hpa="scatter", domain_bytes=16 * MIB))
        self.port = DirectPort(self.host)
        self.ram = RAMBlock("ram", bytearray(RAM), page_size=1 << 16, hva=HVA)
        self.port.declare_memory(self.ram)
        container = SpaprContainer(self.port, self.port.open("/dev/vfio/vfio"))
        self.group = VfioGroup(self.port, self.port.open("/dev/vfio/26"))
        self.group.set_container(container.handle)
        container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)
        container.register_memory(HVA, RAM // 2)
        container.register_memory(HVA + RAM // 2, RAM // 2)
        container.tce_remove(0)
        container.tce_create(window_shift, ENTRIES << table_shift)
        self.container = container
        self.vm = KvmVm(self.port, self.port.open(KVM_PATH))
        self.vm.set_user_memory_region(0, 0, RAM, HVA)
        self.table = self.vm.create_spapr_tce(LIOBN, table_shift, 0, ENTRIES)
        self.vm.group_add(self.group.handle)
        self.vm.set_spapr_tce(self.group.handle, self.table.fd)

    def put(self, index: int, tce: int) -> None:
        ioba = index << self.shift
        assert self.table.hcall(HCall.H_PUT_TCE, (LIOBN, ioba, tce, 0), 1) == 0

    def indirect(self, index: int, tces: Sequence[int]) -> None:
        self.ram.view[LIST : LIST + 8 * len(tces)] = struct.pack(f">{len(tces)}Q", *tces)
        ioba = index << self.shift
        assert self.table.hcall(HCall.H_PUT_TCE_INDIRECT, (LIOBN, ioba, LIST, len(tces)), 1) == 0

    def mapped(self) -> list[tuple[int, int]]:
        """Every entry of the host's window."""
        container = self.host.groups[26].container
        assert container is not None and isinstance(container.driver, SpaprTceContainer)
        driver = container.driver
        window = driver.tables[0]
        assert window is not None
        return list(window.mapped())

    def counted(self) -> list[int]:
        """How many TCEs each region has."""
        return [region.mapped for region in self.port.mm.regions.values()]


def lists(shift: int) -> st.SearchStrategy[list[int]]:
    """Lists that go at once and such that do not: of one permission or of several, in one region or in both."""
    pages, half = st.integers(0, (RAM >> shift) - 1), st.integers(0, (RAM >> shift) // 2 - 1)
    one = st.integers(1, 3).map(lambda perm: [perm] * ENTRIES)
    several = st.lists(st.integers(0, 3), min_size=ENTRIES, max_size=ENTRIES)
    where = st.one_of(st.lists(half, min_size=8, max_size=ENTRIES), st.lists(pages, max_size=ENTRIES))
    perms = st.one_of(one, several)
    return st.builds(
        lambda numbers, bits: [n << shift | bit for n, bit in zip(numbers, bits, strict=False)], where, perms
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(((12, 12), (16, 16), (12, 16))))
def test_a_list_ends_as_its_entries_one_by_one(data: st.DataObject, shifts: tuple[int, int]) -> None:
    window, table = shifts
    whole, single = Linked(window, table), Linked(window, table)
    oracle: dict[int, int] = {}
    for tces in data.draw(st.lists(lists(table).filter(bool), min_size=1, max_size=4)):
        index = data.draw(st.integers(0, ENTRIES - len(tces)))
        whole.indirect(index, tces)
        for at, tce in enumerate(tces, index):
            single.put(at, tce)
            oracle[at] = tce
        assert whole.mapped() == single.mapped()
        assert whole.counted() == single.counted()
        assert whole.table.entries.tolist() == single.table.entries.tolist()
    expected = []
    for at, tce in sorted(oracle.items()):
        for part in range(1 << table - window if tce & 3 else 0):
            offset = (tce & ~3) + (part << window)
            segment = whole.host.segments[0]
            expected.append(((at << table - window) + part, segment.hpa.to_hpa(offset) | (0, 1, 3, 3)[tce & 3]))
    assert whole.mapped() == expected
    assert whole.table.hcall(HCall.H_STUFF_TCE, (LIOBN, 0, 0, ENTRIES), 1) == 0
    assert whole.mapped() == [] and whole.counted() == [0, 0]
