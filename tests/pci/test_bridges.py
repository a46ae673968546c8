"""What bridges forward: configuration cycles, memory and I/O, DMA, interrupts, resets; and what they do not."""

from __future__ import annotations

from random import Random

import pytest

from tests.pci.hierarchy import SLOT, Board, Endpoint, ExpressEndpoint, command, number, open_memory
from vfio_model.errors import ConfigError
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bridge import PCIBridge
from vfio_model.pci.bridges import BRIDGES
from vfio_model.pci.device import PCIDevice
from vfio_model.testing.bench import Host
from vfio_model.vmstate.fields import decode, encode

IDENTITY = 0x0001_1234
NOBODY = 0xFFFF_FFFF
BAR = 0x1000_0000
OK, DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def port(board: Board) -> PCIBridge:
    """A root port as bus 1, its windows open for BAR; both command registers are zero."""
    port = board.bridge("pcie-root-port", id="rp")
    number(port, 1)
    open_memory(port, BAR, BAR)
    return port


@pytest.fixture
def endpoint(port: PCIBridge) -> PCIDevice:
    """A function behind the port, its BARs placed."""
    endpoint = port.secondary.plug(ExpressEndpoint, 0)
    endpoint.config_write(0x10, 4, BAR)
    return endpoint


# -- configuration cycles


def test_cycles_are_routed_by_the_numbers_that_the_guest_gave(board: Board) -> None:
    port = board.bridge("pcie-root-port")
    upstream = board.bridge("x3130-upstream", port.secondary, 0)
    downstream = [
        board.bridge("xio3130-downstream", upstream.secondary, slot << 3, chassis=1, slot=slot) for slot in (0, 3)
    ]
    for bridge in downstream:
        bridge.secondary.plug(ExpressEndpoint, 0)
    assert board.read(0, SLOT, 0) == 0x000C_1B36 and board.read(1, 0, 0) == NOBODY
    number(port, 1, 9)
    assert board.read(1, 0, 0) == 0x8232_104C and board.read(2, 0, 0) == NOBODY
    number(upstream, 2, 9)
    number(downstream[0], 3, 4)
    number(downstream[1], 5, 9)
    assert board.read(2, 0, 0) == board.read(2, 0x18, 0) == 0x8233_104C
    assert board.read(3, 0, 0) == board.read(5, 0, 0) == IDENTITY
    assert [board.read(bus, 0, 0) for bus in (4, 6, 9, 10)] == [NOBODY] * 4
    board.write(5, 0, 0x3C, 0x0B, 1)
    assert board.read(5, 0, 0x3C, 1) == 0x0B and board.read(3, 0, 0x3C, 1) == 0
    number(port, 1, 4)
    assert board.read(3, 0, 0) == IDENTITY and board.read(5, 0, 0) == NOBODY, "beyond the port's subordinate number"
    number(downstream[1], 3)
    assert [bus.number for bus in board.root.walk()] == [0, 1, 2, 3, 3]


def test_extended_configuration_ends_at_a_conventional_bus(board: Board) -> None:
    port = board.bridge("pcie-root-port")
    bridge = board.bridge("pcie-pci-bridge", port.secondary, 0)
    bridge.secondary.plug(ExpressEndpoint, 0)
    number(port, 1, 2)
    number(bridge, 2)
    board.write(1, 0, 0x400, 0x1234)
    board.write(2, 0, 0x400, 0x1234)
    assert board.read(1, 0, 0x400) == 0x1234 and board.read(2, 0, 0x400) == NOBODY
    assert bridge.secondary.devices[0].config_read(0x400, 4) == 0 and board.read(2, 0, 0) == IDENTITY


def test_an_endpoint_on_a_root_bus_is_integrated(board: Board, endpoint: PCIDevice) -> None:
    assert board.read(1, 0, 0x42, 2) == 0x0002
    board.root.plug(ExpressEndpoint, 0x28)
    assert board.read(0, 0x28, 0x42, 2) == 0x0092


# -- memory and I/O


def test_a_bar_decodes_inside_the_window_while_the_bridge_decodes(
    board: Board, port: PCIBridge, endpoint: PCIDevice
) -> None:
    command(endpoint, 2)
    assert board.mmio(BAR) is None
    command(port, 2)
    assert board.mmio(BAR) == 0
    assert board.space.write(BAR + 8, b"\x78\x56\x34\x12") == OK and board.mmio(BAR) == 0x12345678
    endpoint.config_write(0x10, 4, BAR + 0x10_0000)
    assert board.mmio(BAR + 0x10_0000) is None, "past the window"
    open_memory(port, BAR, BAR + 0x10_0000)
    assert board.mmio(BAR + 0x10_0000) == 0x12345678
    open_memory(port, BAR + 0x10_0000, BAR)
    assert board.mmio(BAR + 0x10_0000) is None, "base above limit"
    open_memory(port, BAR, BAR + 0x10_0000)
    command(port, 1)
    assert board.mmio(BAR + 0x10_0000) is None


def test_the_prefetchable_window_has_64_bits(board: Board, port: PCIBridge, endpoint: PCIDevice) -> None:
    high = 0x12_3450_0000
    endpoint.config_write(0x18, 4, high & 0xFFFF_FFFF)
    endpoint.config_write(0x1C, 4, high >> 32)
    command(endpoint, 2)
    command(port, 2)
    port.config_write(0x24, 4, high >> 16 & 0xFFF0 | high & 0xFFF0_0000)
    assert board.mmio(high) is None
    port.config_write(0x28, 4, high >> 32)
    port.config_write(0x2C, 4, high >> 32)
    assert board.mmio(high) == 0


def test_the_io_window(board: Board, port: PCIBridge, endpoint: PCIDevice) -> None:
    endpoint.config_write(0x20, 4, 0xC020)
    command(endpoint, 1)
    command(port, 1)
    assert board.port(0xC020) is None
    port.config_write(0x1C, 2, 0xC0C0)
    assert board.port(0xC020) == 0 and board.port(0xC000) is None
    port.config_write(0x1C, 2, 0xD0D0)
    assert board.port(0xC020) is None


def test_windows_of_every_bridge_on_the_way_count(board: Board) -> None:
    port = board.bridge("pcie-root-port")
    inner = board.bridge("pcie-pci-bridge", port.secondary, 0)
    endpoint = inner.secondary.plug(Endpoint, 0x18)
    endpoint.config_write(0x10, 4, BAR)
    for device in port, inner, endpoint:
        command(device, 2)
    open_memory(inner, BAR, BAR)
    assert board.mmio(BAR) is None
    open_memory(port, BAR, BAR)
    assert board.mmio(BAR) == 0
    command(inner, 0)
    assert board.mmio(BAR) is None


def test_the_bars_of_a_bridge_are_in_front_of_it(board: Board) -> None:
    bridge = board.bridge("pci-bridge", chassis_nr=1)
    bridge.config_write(0x10, 4, BAR)
    command(bridge, 2)
    assert board.mmio(BAR + 0x0C) == 0xE001_011F and board.mmio(BAR + 0x24) == 0x7F00_0D3F
    assert board.space.write(BAR + 0x0C, bytes(4)) == OK and board.mmio(BAR + 0x0C) == 0xE001_011F
    bridge.config_write(0x42, 1, 3)
    assert bridge.config_read(0x44, 4) == 0xE001_011F
    bridge.config_write(0x42, 1, 0xFF)
    assert bridge.config_read(0x44, 4) == 0


# -- DMA


def test_dma_goes_up_while_every_bridge_masters(board: Board) -> None:
    port = board.bridge("pcie-root-port")
    inner = board.bridge("pcie-pci-bridge", port.secondary, 0)
    endpoint = inner.secondary.plug(Endpoint, 0)
    for device in endpoint, inner, port:
        assert endpoint.dma.write(0x1000, b"x") == DECODE_ERROR
        command(device, 4)
    assert endpoint.dma.write(0x1000, b"x") == OK and board.ram[0x1000] == ord("x")
    assert endpoint.dma.write == board.space.write, "no bridge is asked for each access"
    command(port, 0)
    assert endpoint.dma.write(0x1000, b"y") == DECODE_ERROR
    late = inner.secondary.plug(Endpoint, 8)
    command(late, 4)
    assert late.dma.write(0x1000, b"y") == DECODE_ERROR
    command(port, 4)
    assert late.dma.write(0x1000, b"y") == OK and endpoint.dma.write(0x1000, b"x") == OK


def test_a_machine_may_let_dma_through_any_bridge() -> None:
    board = Board(gate=False)
    endpoint = board.bridge("pcie-root-port").secondary.plug(Endpoint, 0)
    command(endpoint, 4)
    assert endpoint.dma.write(0x1000, b"x") == OK


def test_messages_are_dma(board: Board, port: PCIBridge) -> None:
    class Signaller(Endpoint):
        MSI_VECTORS = 1

    device = port.secondary.plug(Signaller, 0)
    for offset, value in (0x44, 0x2000), (0x4C, 0x4041), (0x42, 1), (4, 4):
        device.config_write(offset, 2, value)
    device.raise_irq()
    assert board.ram[0x2000] == 0
    command(port, 4)
    device.raise_irq()
    assert board.ram[0x2000:0x2002] == b"\x41\x40"


# -- interrupts


def test_pins_are_turned_by_the_slot_at_every_bridge(board: Board) -> None:
    port = board.bridge("pcie-root-port")
    bridge = board.bridge("pcie-pci-bridge", port.secondary, 0)
    first, second, third = (bridge.secondary.plug(Endpoint, slot << 3) for slot in (1, 2, 5))
    first.raise_irq()
    third.raise_irq()
    second.raise_irq()
    assert board.pins == [(SLOT, 2, True), (SLOT, 3, True)], "slots 1 and 5 share INTB"
    first.lower_irq()
    assert len(board.pins) == 2
    third.lower_irq()
    assert board.pins[2:] == [(SLOT, 2, False)]


def test_a_slot_that_interrupts_shares_its_pin_with_what_is_behind(
    board: Board, port: PCIBridge, endpoint: PCIDevice
) -> None:
    endpoint.raise_irq()
    port.config_write(0x6C, 2, 0x30)
    endpoint.lower_irq()
    assert board.pins == [(SLOT, 1, True)] and port.config_read(0x6E, 2) == 0x10
    port.config_write(0x6E, 2, 0x10)
    assert board.pins == [(SLOT, 1, True), (SLOT, 1, False)] and port.config_read(0x6E, 2) == 0


def test_the_interlock_toggles(port: PCIBridge) -> None:
    for held in (0x80, 0):
        port.config_write(0x6C, 2, 0x800)
        assert port.config_read(0x6E, 2) & 0x80 == held and port.config_read(0x6C, 2) == 0


def test_link_and_power_of_a_slot_follow_what_is_in_it(board: Board, port: PCIBridge) -> None:
    def shown() -> tuple[int, int]:
        return port.config_read(0x66, 2), port.config_read(0x6C, 2)

    assert shown() == (0x0204, 0x07C0)
    port.secondary.plug(ExpressEndpoint, 0)
    assert shown() == (0x0011, 0x03C0)
    board.root.reset()
    assert shown() == (0x0011, 0x03C0)
    port.secondary.detach(0)
    assert shown() == (0x0204, 0x07C0)


def test_ports_below_an_expander_detect_what_is_in_their_slots(board: Board) -> None:
    port = board.bridge("pcie-root-port", board.expander(bus_nr=8).secondary, 0)
    upstream = board.bridge("x3130-upstream", port.secondary, 0)
    lower = board.bridge("xio3130-downstream", upstream.secondary, 0, chassis=2)
    assert (lower.config_read(0xA2, 2), lower.config_read(0xAA, 2)) == (0x0011, 0)
    lower.secondary.plug(ExpressEndpoint, 0)
    for _ in range(2):
        assert (port.config_read(0x66, 2), port.config_read(0x6E, 2)) == (0x2011, 0x40)
        assert (lower.config_read(0xA2, 2), lower.config_read(0xAA, 2)) == (0x2011, 0x40)
        board.root.reset()
    lower.secondary.detach(0)
    assert (lower.config_read(0xA2, 2), lower.config_read(0xAA, 2)) == (0x0011, 0)


@pytest.mark.parametrize(
    ("props", "link", "status", "speeds", "target"),
    [
        ({"x-speed": "8", "x-width": "16"}, 0x0030_0503, 0x0103, 0xE, 3),
        ({"x-speed": "5", "x-width": "12"}, 0x0030_04C2, 0x00C2, 0, 2),
        ({"x-speed": "2_5", "x-width": "1"}, 0x0411, 0x0011, 0, 0),
    ],
)
def test_the_link_of_a_port(
    board: Board, props: dict[str, str], link: int, status: int, speeds: int, target: int
) -> None:
    port = board.bridge("pcie-root-port", chassis=1, **props)
    assert (port.config_read(0x60, 4), port.config_read(0x66, 2)) == (link, status)
    assert (port.config_read(0x80, 4), port.config_read(0x84, 2)) == (speeds, target)


def test_what_a_slot_can(board: Board) -> None:
    fixed = board.bridge("pcie-root-port", chassis=1, hotplug=False)
    assert fixed.config_read(0x68, 4) == 0x2001B
    always_on = board.bridge("ioh3420", devfn=0x28, chassis=2, power_controller_present=False)
    assert (always_on.config_read(0xA4, 4), always_on.config_read(0xA8, 2)) == (0x20079, 0x03C0)
    always_on.config_write(0xA8, 2, 0xFFFF)
    assert always_on.config_read(0xA8, 2) == 0x03F9


def test_what_firmware_is_to_leave_free_behind_a_bridge(board: Board) -> None:
    port = board.bridge(
        "pcie-root-port", chassis=1, **{"bus-reserve": 4, "io-reserve": 0x1000, "pref64-reserve": 1 << 33}
    )
    assert port.config_read(0x34, 1) == 0x90
    words = [port.config_read(offset, 4) for offset in range(0x90, 0xB0, 4)]
    assert words == [0x0120_5409, 4, 0x1000, 0, 0xFFFF_FFFF, 0xFFFF_FFFF, 0, 2]
    conventional = board.bridge("pci-bridge", devfn=0x28, chassis_nr=1, **{"mem-reserve": 0x10_0000})
    assert conventional.config_read(0x34, 1) == 0x64 and conventional.config_read(0x64, 4) == 0x0120_4C09
    for wrong, what in (
        ({"pref32-reserve": 1, "pref64-reserve": 1}, "PREF32 and PREF64 conflict"),
        ({"mem-reserve": 1 << 32}, "mem-reserve must be less than 4G"),
    ):
        with pytest.raises(ConfigError, match=what):
            board.bridge("pcie-root-port", devfn=0x30, chassis=3, **wrong)
    with pytest.raises(ConfigError, match="Parameter 'x-speed' does not accept value '7'"):
        board.bridge("pcie-root-port", devfn=0x30, chassis=3, **{"x-speed": "7"})


# -- reset


def test_a_secondary_bus_reset_resets_what_is_behind_alone(board: Board) -> None:
    port = board.bridge("pcie-root-port")
    inner = board.bridge("pcie-pci-bridge", port.secondary, 0)
    endpoint = inner.secondary.plug(Endpoint, 0)
    beside = board.root.plug(Endpoint, 0x28)
    number(port, 1, 2)
    number(inner, 2)
    for device in port, inner, endpoint, beside:
        command(device, 6)
    port.config_write(0x3E, 2, 0x40)
    assert [device.bus_master for device in (port, inner, endpoint, beside)] == [True, False, False, True]
    assert inner.number == 0 and board.read(1, 0, 0) == NOBODY
    command(inner, 4)
    command(endpoint, 4)
    assert endpoint.dma.write(0x1000, b"x") == DECODE_ERROR, "still held in reset"
    port.config_write(0x3E, 2, 0)
    assert board.read(1, 0, 0) == 0x000E_1B36 and endpoint.dma.write(0x1000, b"x") == OK
    command(endpoint, 6)
    port.config_write(0x3E, 2, 0x03)
    assert endpoint.bus_master, "no edge"


def test_a_reset_of_the_root_closes_everything(board: Board, port: PCIBridge, endpoint: PCIDevice) -> None:
    for device in port, endpoint:
        command(device, 6)
    board.root.reset_enter()
    assert endpoint.dma.write(0x1000, b"x") == DECODE_ERROR and board.mmio(BAR) == 0
    board.root.reset_hold()
    board.root.reset_exit()
    assert port.number == 0 and not endpoint.bus_master and board.mmio(BAR) is None
    assert board.root.memory.region.subregions == []


def test_a_port_in_a_switch_can_be_reset_by_itself(board: Board, port: PCIBridge) -> None:
    upstream = board.bridge("x3130-upstream", port.secondary, 0)
    number(upstream, 2)
    upstream.config_write(0x98, 2, 0x8000)
    assert upstream.number == 0 and port.number == 1


# -- plugging


def test_a_bridge_that_is_taken_out_takes_along_what_is_behind(
    board: Board, port: PCIBridge, endpoint: PCIDevice
) -> None:
    for device in port, endpoint:
        command(device, 6)
    endpoint.raise_irq()
    board.root.detach(SLOT)
    assert board.root.children == [] and port.secondary.devices == {}
    assert board.mmio(BAR) is None and board.read(1, 0, 0) == NOBODY
    assert endpoint.dma.write(0x1000, b"x") == DECODE_ERROR and board.pins[-1] == (SLOT, 1, False)
    again = board.bridge("pcie-root-port", id="rp")
    assert [bus.name for bus in board.root.walk()] == ["pcie.0", "rp"] and again.secondary.devices == {}


def test_a_slot_is_in_one_place(board: Board) -> None:
    board.bridge("pcie-root-port", chassis=1, slot=1)
    inner = board.bridge("pcie-root-port", devfn=0x28, chassis=1, slot=2)
    with pytest.raises(ConfigError, match="Can't add chassis slot, error -16"):
        board.bridge("ioh3420", inner.secondary, 0, chassis=1, slot=1)
    assert len(list(board.root.walk())) == 3 and inner.secondary.devices == {}
    board.bridge("ioh3420", inner.secondary, 0, chassis=2, slot=1)


@pytest.mark.parametrize(
    ("model", "props", "said"),
    [
        ("pcie-root-port", {"port": 256}, "port is 256"),
        ("pcie-root-port", {"slot": 8192}, "slot is 8192"),
        ("pci-bridge", {}, "Bridge chassis not specified"),
        ("pci-bridge", {"chassis_nr": 256}, "unique chassis id > 0"),
        ("pxb-pcie", {"bus_nr": 256}, "bus_nr is 256"),
    ],
)
def test_numbers_out_of_range_are_refused(board: Board, model: str, props: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        board.root.plug(BRIDGES[model], SLOT, **props)
    assert not board.root.devices and not board.root.children


@pytest.mark.parametrize("model", BRIDGES)
def test_a_bridge_is_nowhere_but_on_a_bus(model: str) -> None:
    with pytest.raises(ConfigError, match="bus"):
        BRIDGES[model](Host(), **({"chassis_nr": 1} if model == "pci-bridge" else {}))


# -- expanders


def test_an_expander_is_another_root_bus(board: Board) -> None:
    expander = board.expander(bus_nr=8, id="pxb")
    port = board.bridge("pcie-root-port", expander.secondary, 0)
    endpoint = port.secondary.plug(ExpressEndpoint, 0)
    assert board.read(8, 0, 0) == 0x000C_1B36 and board.read(9, 0, 0) == NOBODY
    number(port, 9, 10)
    assert board.read(9, 0, 0) == IDENTITY and board.read(8, 8, 0) == NOBODY and board.read(11, 0, 0) == NOBODY
    assert expander.secondary.is_root and not port.secondary.is_root and expander.secondary.root.name == "pxb"
    endpoint.config_write(0x10, 4, BAR)
    open_memory(port, BAR, BAR)
    for device in endpoint, port:
        command(device, 6)
    assert board.mmio(BAR) == 0 and endpoint.dma.write(0x1000, b"x") == OK, "the expander itself need not decode"
    board.root.reset()
    assert port.number == 0 and board.mmio(BAR) is None
    board.root.detach(SLOT)
    assert board.read(8, 0, 0) == NOBODY and not board.root.children


def test_the_pins_of_an_expander_are_turned_by_the_slots_on_its_bus(board: Board) -> None:
    expander = board.expander(bus_nr=8)
    port = board.bridge("pcie-root-port", expander.secondary, 3 << 3)
    port.secondary.plug(Endpoint, 0).raise_irq()
    ((devfn, pin, level),) = board.pins
    assert devfn == SLOT and level and (pin - 1 + (SLOT >> 3)) % 4 == 3


def test_where_expanders_are_and_what_is_on_them(board: Board) -> None:
    expander = board.expander(bus_nr=8)
    with pytest.raises(ConfigError, match="Only PCI/PCIe bridges can be plugged into pxb-pcie"):
        expander.secondary.plug(Endpoint, 0)
    with pytest.raises(ConfigError, match="Bus 8 is already in use"):
        board.expander(0x28, bus_nr=8)
    port = board.bridge("pcie-root-port", expander.secondary, 0)
    with pytest.raises(ConfigError, match="PXB devices can be attached only to root bus"):
        port.secondary.plug(BRIDGES["pxb-pcie"], 0)


# -- migration


def test_a_bridge_goes_on_as_it_was(board: Board, port: PCIBridge, endpoint: PCIDevice) -> None:
    for device in port, endpoint:
        command(device, 6)
    port.config_write(0x6C, 2, 0x0800)
    twin = Board()
    new_port = twin.bridge("pcie-root-port", id="rp")
    new = new_port.secondary.plug(ExpressEndpoint, 0)
    for old, fresh in (endpoint, new), (port, new_port):
        assert old.VMSTATE is not None
        data = encode(old.VMSTATE, old.export_state())
        state = decode(old.VMSTATE, 1, data, fresh.export_state(), where="twin")
        fresh.check_state(state, where="twin")
        fresh.import_state(state)
        assert bytes(fresh.config) == bytes(old.config)
    assert twin.read(1, 0, 0) == IDENTITY and twin.mmio(BAR) == 0 and new.dma.write(0x1000, b"x") == OK


# -- whatever a guest does


@pytest.mark.parametrize("seed", range(4))
def test_no_guest_can_break_a_tree_of_bridges(seed: int) -> None:
    """Random cycles: nothing is raised, what is shown below a bridge is what its registers say, a reset hides it."""
    random, board = Random(seed), Board()
    port = board.bridge("pcie-root-port")
    inner = board.bridge("pcie-pci-bridge", port.secondary, 0)
    innermost = board.bridge("pci-bridge", inner.secondary, 8, chassis_nr=1)
    deep, beside = innermost.secondary.plug(Endpoint, 0), board.root.plug(ExpressEndpoint, 0x28)
    bridges = port, inner, innermost
    for _ in range(1500):
        size = random.choice((1, 2, 4))
        offset = random.choice((4, random.randrange(0x10, 0x40), random.randrange(0x1000)))
        value = random.choice((0, 0xFFFF_FFFF, random.getrandbits(32), BAR | BAR >> 16, 0x0002_0100, 6, 7))
        if random.random() < 0.5:
            random.choice((*bridges, deep, beside)).config_write(offset, size, value)
        else:
            board.write(random.randrange(4), random.choice((0, 8, SLOT, 0x28)), offset, value, size)
        masters = deep.bus_master and all(bridge.masters for bridge in bridges)
        assert (deep.dma.impl is board.space) is masters
        seen = deep.bar_range(0)
        if seen is not None and board.space.read(seen.start, bytearray(4)) is OK:
            covers = all(any(where.contains(seen) for *_, where in bridge.windows()) for bridge in bridges)
            shadowed = any(device.bar_range(0) is not None for device in (*bridges, beside))
            assert covers or shadowed or seen.start < len(board.ram)
    board.root.reset()
    assert board.root.memory.region.subregions == [] and [bus.number for bus in board.root.walk()] == [0] * 4
