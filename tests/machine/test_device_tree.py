"""What the guest is told about its DMA windows."""

from __future__ import annotations

import json

import pytest

from tests.machine.boards import LIOBN, pseries
from vfio_model.iommu.spapr.regs import DmaOptions, RtasToken
from vfio_model.machine.vio import KINDS

pytestmark = pytest.mark.machine

PHB = "/pci@800000020000000"


def test_a_phb_has_its_default_window_and_the_ddw_tokens() -> None:
    tree = pseries(phbs=2).device_tree()
    assert tree[PHB] == {
        "ibm,dma-window": [0x8000_0000, 0, 0, 0, 0x4000_0000],
        "ibm,#dma-address-cells": [2],
        "ibm,#dma-size-cells": [2],
        "ibm,ddw-applicable": [0x2026, 0x2027, 0x2028],
        "ibm,ddw-extensions": [2, 0x2029, 1],
    }
    assert tree["/pci@800000020000001"]["ibm,dma-window"][0] == 0x8000_0100


def test_without_ddw_no_tokens_are_told() -> None:
    node = pseries(dma=DmaOptions(ddw=False)).device_tree()[PHB]
    assert set(node) == {"ibm,dma-window", "ibm,#dma-address-cells", "ibm,#dma-size-cells"}


def test_the_address_has_two_cells_and_the_size_one() -> None:
    address = 0x12_8000_0000
    node = pseries(dma=DmaOptions(dma_win_addr=address, dma_win_size=(4 << 30) + 0x1000_0000)).device_tree()[PHB]
    assert node["ibm,dma-window"] == [LIOBN, 0x12, 0x8000_0000, 0, 0x1000_0000]


def test_a_removed_default_window_has_no_size() -> None:
    machine = pseries()
    machine.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, [LIOBN], 1)
    assert machine.device_tree()[PHB]["ibm,dma-window"] == [LIOBN, 0, 0, 0, 0]


def test_vio_devices_have_a_unit_and_those_with_dma_a_window() -> None:
    machine = pseries()
    for name in ("vty", "llan", "vscsi", "tpm"):
        machine.vio.add(KINDS[name])
    tree = machine.device_tree()
    assert list(tree) == [
        PHB,
        "/vdevice/vty@71000000",
        "/vdevice/l-lan@71000001",
        "/vdevice/v-scsi@71000002",
        "/vdevice/vtpm@71000003",
    ]
    assert tree["/vdevice/vty@71000000"] == {"reg": [0x7100_0000]}
    assert tree["/vdevice/v-scsi@71000002"] == {
        "reg": [0x7100_0002],
        "ibm,my-dma-window": [0x7100_0002, 0, 0, 0, 0x1000_0000],
        "ibm,#dma-address-cells": [2],
        "ibm,#dma-size-cells": [2],
    }
    assert json.loads(json.dumps(tree)) == tree
