"""Who a function is to the IOMMU, by the kinds of bus on its way."""

from __future__ import annotations

import errno

import pytest

from tests.pci.hierarchy import SLOT, Board, Endpoint, ExpressEndpoint, Ops, command, number
from vfio_model.pci.iommu_ops import IotlbInfo, RequesterBus
from vfio_model.pci.requester import requester_id


@pytest.fixture
def ops() -> Ops:
    return Ops()


def test_on_the_root_bus_a_function_is_itself(ops: Ops) -> None:
    board = Board(ops=ops)
    device = board.root.plug(Endpoint, 3 << 3)
    assert device.dma.impl is not ops.spaces[id(board.root), 0x18], "it may not master yet"
    command(device, 4)
    assert device.dma.impl is ops.spaces[id(board.root), 0x18] and ops.requester_ids == [0x0018]


def test_a_root_port_does_not_change_the_name(ops: Ops) -> None:
    board = Board(ops=ops)
    port = board.bridge("pcie-root-port")
    port.secondary.plug(ExpressEndpoint, 0)
    port.secondary.plug(ExpressEndpoint, 3)
    number(port, 5)
    assert ops.requester_ids == [0x0020, 0x0500, 0x0503]


def test_behind_a_pcie_to_pci_bridge_all_are_function_0_of_its_bus(ops: Ops) -> None:
    board = Board(ops=ops)
    port = board.bridge("pcie-root-port")
    bridge = board.bridge("pcie-pci-bridge", port.secondary, 0)
    devices = [bridge.secondary.plug(Endpoint, slot << 3) for slot in (5, 6)]
    number(port, 1, 2)
    number(bridge, 2)
    assert ops.requester_ids == [0x0020, 0x0100, 0x0200, 0x0200]
    for device in port, bridge, *devices:
        command(device, 4)
    assert devices[0].dma.impl is devices[1].dma.impl is ops.spaces[id(bridge.secondary), 0]


@pytest.mark.parametrize(("model", "props"), [("i82801b11-bridge", {}), ("pci-bridge", {"chassis_nr": 1})])
def test_behind_another_bridge_all_are_the_bridge(ops: Ops, model: str, props: dict[str, int]) -> None:
    board = Board(ops=ops)
    bridge = board.bridge(model, devfn=0x1E << 3, **props)
    for slot in 1, 2:
        bridge.secondary.plug(Endpoint, slot << 3)
    number(bridge, 1)
    assert ops.requester_ids == [0x00F0, 0x00F0, 0x00F0]


def test_the_outermost_conventional_bus_decides(ops: Ops) -> None:
    board = Board(ops=ops)
    port = board.bridge("pcie-root-port")
    outer = board.bridge("pcie-pci-bridge", port.secondary, 0)
    inner = board.bridge("pci-bridge", outer.secondary, 2 << 3, chassis_nr=1)
    inner.secondary.plug(Endpoint, 5 << 3)
    for at, (bridge, last) in enumerate(((port, 3), (outer, 3), (inner, 3)), start=1):
        number(bridge, at, last)
    assert ops.requester_ids == [0x0020, 0x0100, 0x0200, 0x0200]
    below = board.bridge("i82801b11-bridge", devfn=0x1E << 3)
    nested = board.bridge("pci-bridge", below.secondary, 8, chassis_nr=2)
    nested.secondary.plug(Endpoint, 0)
    assert ops.requester_ids[-3:] == [0x00F0, 0x00F0, 0x00F0]


def test_requester_ids_follow_the_numbers_of_buses(ops: Ops) -> None:
    board = Board(ops=ops)
    port = board.bridge("pcie-root-port")
    device = port.secondary.plug(ExpressEndpoint, 0)
    assert requester_id(port.secondary, 0) == 0
    for bus in 1, 7:
        number(port, bus)
        assert requester_id(port.secondary, 0) == bus << 8
    for bridge in port, device:
        command(bridge, 4)
    assert len(ops.asked) == 2 and device.dma.impl is ops.spaces[id(port.secondary), 0]


def test_an_expander_s_functions_are_themselves(ops: Ops) -> None:
    board = Board(ops=ops)
    expander = board.expander(bus_nr=8)
    port = board.bridge("pcie-root-port", expander.secondary, 0)
    port.secondary.plug(ExpressEndpoint, 0)
    number(port, 9)
    assert ops.requester_ids == [0x0020, 0x0800, 0x0900]


@pytest.mark.parametrize("expander_bypasses", [False, True])
@pytest.mark.parametrize("root_bypasses", [False, True])
def test_bypass_is_each_root_bus_s_own(ops: Ops, expander_bypasses: bool, root_bypasses: bool) -> None:
    board = Board(ops=ops, bypass_iommu=root_bypasses)
    ports = [
        board.bridge("pcie-root-port", bus, 0, slot=slot)
        for slot, bus in enumerate((board.root, board.expander(bus_nr=8, bypass_iommu=expander_bypasses).secondary))
    ]
    for port, bypasses in zip(ports, (root_bypasses, expander_bypasses), strict=True):
        device = port.secondary.plug(ExpressEndpoint, 0)
        command(port, 4)
        command(device, 4)
        assert (device.dma.impl is board.space) is bypasses
        assert (device.host.iommu is None) is bypasses and (port.secondary.requester(0) is None) is bypasses


def test_an_iommu_of_one_bus_leaves_expanders_alone(ops: Ops) -> None:
    board = Board()
    board.root.setup_iommu(ops, per_bus=True)
    expander = board.expander(bus_nr=8)
    assert expander.secondary.requester(0) is None
    port = board.bridge("pcie-root-port", devfn=0x28)
    assert port.secondary.requester(0) is not None


def test_without_an_iommu_dma_goes_to_system_memory() -> None:
    board = Board()
    port = board.bridge("pcie-root-port")
    device = port.secondary.plug(ExpressEndpoint, 0)
    command(port, 4)
    command(device, 4)
    assert device.dma.impl is board.space and device.host.iommu is None


def test_the_port_of_a_device_speaks_for_the_requester() -> None:
    asked: list[tuple[RequesterBus, int]] = []

    class Informed(Ops):
        def get_iotlb_info(self, bus: RequesterBus, devfn: int) -> IotlbInfo:
            asked.append((bus, devfn))
            return IotlbInfo(48, 4096)

    board = Board(ops=Informed())
    bridge = board.bridge("pcie-pci-bridge")
    device = bridge.secondary.plug(ExpressEndpoint, 7)
    assert device.get_iotlb_info() == IotlbInfo(48, 4096) and asked == [(bridge.secondary, 0)]
    with pytest.raises(OSError) as error:
        device.pri_unregister_notifier(5)
    assert error.value.errno == errno.ENODEV


def test_buses_below_ask_the_nearest_iommu(ops: Ops) -> None:
    board, nearer = Board(ops=ops), Ops()
    port = board.bridge("pcie-root-port")
    port.secondary.setup_iommu(nearer)
    port.secondary.plug(ExpressEndpoint, 0)
    assert len(nearer.asked) == 1 and ops.asked == [(board.root, SLOT)]
