"""A guest over an sPAPR v1 container: hypercalls at one end, the host's table at the other."""

from __future__ import annotations

import random

import pytest

from tests.acceleration import accelerate, kvm, locked_in_kernel
from tests.vfio.direct_chain import DEVICE, GROUP, HVA, LIOBN0, MIB
from vfio_model.host.host import Host
from vfio_model.host.spapr_v1 import SpaprV1Container
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.iommu.spapr.ddw import DmaOptions
from vfio_model.iommu.spapr.regs import HCall, RtasStatus, RtasToken, phb_buid
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import U32_MAX
from vfio_model.vfio.address_space import ContainerOptions, VFIOAddressSpace
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.kinds import ContainerChoice

pytestmark = pytest.mark.machine

WINDOW_PAGES = 1 << 15
OTHER = "/dev/vfio/27"


class V1Guest:
    """32 MiB of RAM, a default window of 4 MiB, a host that has v1 containers and perhaps others."""

    def __init__(self, kind: ContainerChoice = "spapr-v1") -> None:
        self.ram = RAMBlock("ram", bytearray(32 * MIB), page_size=1 << 16, hva=HVA)
        options = PseriesOptions(dma=DmaOptions(dma_win_size=4 * MIB))
        self.machine = PseriesMachine([self.ram], options)
        groups = (GroupSpec(26, (DeviceSpec(DEVICE),)), GroupSpec(27))
        self.host = Host(HostTopology(groups, domain_bytes=16 * MIB))
        self.port = DirectPort(self.host)
        self.port.declare_memory(self.ram)
        space = self.machine.phb().address_space
        accelerator = accelerate(self.machine, self.port) if kvm() else None
        self.vfio = VFIOAddressSpace(
            self.port, self.machine.system, space, ContainerOptions(1 << 16, kind, accelerator)
        )

    def driver(self, group: int = 26) -> SpaprV1Container:
        container = self.host.groups[group].container
        assert container is not None and isinstance(container.driver, SpaprV1Container)
        return container.driver

    def hcall(self, nr: HCall, *args: int) -> int:
        return self.machine.hcall(nr, LIOBN0, *args)[0]

    def host_view(self, group: int = 26) -> dict[int, int]:
        """Bus address → guest-physical address | permission."""
        table = self.driver(group).tables[0]
        seen = {}
        for index, tce in table.mapped() if table is not None else ():
            found = self.port.segments.find(tce & ~3)
            assert found is not None, "the host maps declared memory only"
            seen[index << 12] = found[2] | tce & 3
        return seen

    @property
    def locked(self) -> int:
        """Locked pages, without those of tables in the kernel."""
        return self.port.mm.locked_vm - locked_in_kernel(self.machine)

    def pinned(self) -> int:
        return sum(region.mapped for region in self.port.mm.regions.values())


def test_the_hosts_window_is_all_there_is() -> None:
    guest = V1Guest()
    container = guest.vfio.add_group(GROUP)
    assert [(w.min_iova, w.max_iova, w.iova_pgsizes) for w in guest.vfio.windows] == [(0, (1 << 31) - 1, 4096)]
    assert container.prereg is None
    assert guest.locked == WINDOW_PAGES
    guest.vfio.close()
    assert guest.locked == 0


def test_auto_takes_version_2_where_there_are_both() -> None:
    assert V1Guest("auto").vfio.add_group(GROUP).backend.kind == "spapr-v2"
    with pytest.raises(OSError, match="no available IOMMU models"):
        V1Guest("type1").vfio.add_group(GROUP)


def test_a_dynamic_window_is_refused_and_the_default_one_goes_on() -> None:
    guest = V1Guest()
    guest.vfio.add_group(GROUP)
    buid = phb_buid(0)
    rets = guest.machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, (0, buid >> 32, buid & U32_MAX, 16, 24), 4)
    assert rets[0] == RtasStatus.HW_ERROR & U32_MAX
    assert guest.hcall(HCall.H_PUT_TCE, 0x1000, 0x5003) == 0
    assert guest.host_view() == {0x1000: 0x5003}


def test_each_group_gets_a_container_and_both_follow_the_guest() -> None:
    guest = V1Guest()
    guest.hcall(HCall.H_PUT_TCE, 0x2000, 0x6001)
    first, second = guest.vfio.add_group(GROUP), guest.vfio.add_group(OTHER)
    assert first is not second
    guest.hcall(HCall.H_PUT_TCE, 0x1000, 0x5003)
    assert guest.host_view(26) == guest.host_view(27) == {0x1000: 0x5003, 0x2000: 0x6001}
    guest.vfio.remove_group(OTHER)
    assert guest.vfio.containers == [first]
    guest.vfio.close()
    assert guest.locked == guest.pinned() == 0


@pytest.mark.parametrize("seed", range(4))
def test_overwritten_and_cleared_entries_unpin_their_pages(seed: int) -> None:
    guest, choose = V1Guest(), random.Random(seed)
    guest.vfio.add_group(GROUP)
    wanted: dict[int, int] = {}
    for _ in range(200):
        page, count = choose.randrange(64), choose.randrange(1, 24)
        gpa, perm = choose.randrange(1 << 12, 1 << 13) << 12, choose.choice((0, 1, 3))
        tces = [gpa + (n << 12) | perm for n in range(count)]
        tces = [tce if tce < 32 * MIB else 0 for tce in tces]
        guest.machine.write_memory(0, b"".join(tce.to_bytes(8, "big") for tce in tces))
        assert guest.hcall(HCall.H_PUT_TCE_INDIRECT, page << 12, 0, count) == 0
        for n, tce in enumerate(tces):
            wanted[page + n << 12] = tce if tce & 3 else 0
        assert guest.host_view() == {iova: tce for iova, tce in wanted.items() if tce}
        assert guest.pinned() == len(guest.host_view())
    guest.vfio.close()
    assert guest.pinned() == guest.locked == 0
