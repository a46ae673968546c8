"""EEH by RTAS: over a container with one group each call reaches the host, otherwise none is there."""

from __future__ import annotations

import errno

import pytest

from tests.vfio.direct_chain import MIB, Chain, host_gone
from tests.vfio.test_pci import Connection
from vfio_model.iommu.spapr.regs import RtasToken, phb_buid
from vfio_model.pci.config_space import COMMAND, COMMAND_MASTER
from vfio_model.ranges import U32_MAX
from vfio_model.uapi.vfio import EehOp, EehState
from vfio_model.vfio.eeh import eeh_port
from vfio_model.vfio.ioctl import SpaprContainer
from vfio_model.vfio.pci import VFIOPCIDevice

pytestmark = pytest.mark.machine

BUID = (phb_buid(0) >> 32, phb_buid(0) & U32_MAX)
DEVFN = 1 << 3
ADDR = DEVFN << 8
OK, PARAM_ERROR, HW_ERROR = 0, -3, -1
SET_OPTION, STATE = RtasToken.IBM_SET_EEH_OPTION, RtasToken.IBM_READ_SLOT_RESET_STATE2
SLOT_RESET, CONFIGURE = RtasToken.IBM_SET_SLOT_RESET, RtasToken.IBM_CONFIGURE_PE
INFO, DETAIL = RtasToken.IBM_GET_CONFIG_ADDR_INFO2, RtasToken.IBM_SLOT_ERROR_DETAIL
WELL_FORMED = [
    (SET_OPTION, (ADDR, *BUID, 0), 1),
    (INFO, (ADDR, *BUID, 0), 2),
    (STATE, (ADDR, *BUID), 4),
    (SLOT_RESET, (ADDR, *BUID, 0), 1),
    (CONFIGURE, (ADDR, *BUID), 1),
    (DETAIL, (ADDR, *BUID, 0, 0, 0, 0, 1), 1),
]


class Slot:
    """A chain whose bridge has EEH, and an assigned function."""

    def __init__(self, *, assigned: bool = True) -> None:
        self.chain = Chain(ram=2 * MIB, page_size=1 << 16, window=1 << 16)
        container = self.chain.container
        assert container is not None
        self.container = SpaprContainer(container.port, container.handle)
        self.phb = self.chain.machine.phb()
        self.phb.eeh = lambda: eeh_port([container])
        self.connection = Connection()
        if assigned:
            device = VFIOPCIDevice(self.phb.bus.host_for(DEVFN), self.connection, name="nic")
            self.phb.bus.attach(device, DEVFN)

    def option(self, number: int, addr: int = ADDR) -> int:
        return self.chain.rtas(SET_OPTION, addr, *BUID, number)[0]

    def reset(self, number: int) -> int:
        return self.chain.rtas(SLOT_RESET, ADDR, *BUID, number)[0]

    def state(self) -> list[int]:
        return self.chain.rtas(STATE, ADDR, *BUID, nret=5)


@pytest.mark.parametrize(("token", "args", "nret"), WELL_FORMED)
def test_without_a_container_there_is_no_eeh(token: RtasToken, args: tuple[int, ...], nret: int) -> None:
    slot = Slot()
    assert slot.chain.rtas(token, *args, nret=nret)[0] in (OK, 1)
    slot.phb.eeh = lambda: eeh_port([])
    assert slot.chain.rtas(token, *args, nret=nret) == [PARAM_ERROR]


@pytest.mark.parametrize(("token", "args", "nret"), WELL_FORMED)
def test_wrong_counts_and_unknown_bridges(token: RtasToken, args: tuple[int, ...], nret: int) -> None:
    slot = Slot()
    assert slot.chain.rtas(token, *args[:-1], nret=nret) == [PARAM_ERROR]
    assert slot.chain.rtas(token, *args, nret=nret + 3) == [PARAM_ERROR]
    assert slot.chain.rtas(token, args[0], args[1], args[2] + 1, *args[3:], nret=nret) == [PARAM_ERROR]


def test_two_containers_or_two_groups_are_not_one_pe() -> None:
    slot = Slot()
    container = slot.chain.container
    assert container is not None
    assert eeh_port([container, container]) is None
    container.groups["/dev/vfio/27"] = container.groups["/dev/vfio/26"]
    assert eeh_port([container]) is None


def test_freeze_and_thaw() -> None:
    slot = Slot()
    assert slot.option(1) == OK
    assert slot.state() == [0, EehState.VFIO_EEH_PE_STATE_NORMAL, 1, 1000, 0]
    slot.container.eeh_inject_err(0, 4)
    assert slot.state()[1] == EehState.VFIO_EEH_PE_STATE_STOPPED
    assert slot.option(2) == OK
    assert slot.state()[1] == EehState.VFIO_EEH_PE_STATE_STOPPED_DMA
    assert slot.option(3) == OK
    assert slot.state()[1] == EehState.VFIO_EEH_PE_STATE_NORMAL
    assert slot.option(0) == OK
    assert slot.option(4) == PARAM_ERROR


def test_enabling_needs_an_assigned_function_on_that_bus() -> None:
    assert Slot(assigned=False).option(1) == PARAM_ERROR
    slot = Slot()
    assert slot.option(1, addr=1 << 16 | ADDR) == PARAM_ERROR
    assert Slot(assigned=False).option(0) == OK


@pytest.mark.parametrize("number", [1, 3])
def test_a_slot_reset_holds_the_pe_and_leaves_msi_alone(number: int) -> None:
    slot = Slot()
    device = slot.phb.bus.devices[DEVFN]
    assert device.msi is not None
    device.config_write(device.msi.offset + 2, 2, 1)
    assert slot.reset(number) == OK
    assert device.msi.enabled
    assert slot.state()[1] == EehState.VFIO_EEH_PE_STATE_RESET
    assert slot.reset(0) == OK
    assert slot.state()[1] == EehState.VFIO_EEH_PE_STATE_NORMAL
    assert slot.reset(2) == PARAM_ERROR


def test_what_the_pe_is_called() -> None:
    slot = Slot()
    assert slot.chain.rtas(INFO, ADDR, *BUID, 0, nret=2) == [OK, 1]
    assert slot.chain.rtas(INFO, ADDR, *BUID, 1, nret=2) == [OK, 2]
    assert slot.chain.rtas(INFO, ADDR, *BUID, 2, nret=2) == [PARAM_ERROR]
    assert slot.chain.rtas(INFO, 9 << 11, *BUID, 0, nret=2) == [PARAM_ERROR]


def test_the_state_in_four_cells() -> None:
    assert Slot().chain.rtas(STATE, ADDR, *BUID, nret=4) == [OK, 0, 1, 1000]


def test_there_is_never_an_error_log() -> None:
    slot = Slot()
    assert slot.chain.rtas(DETAIL, ADDR, *BUID, 0, 0, 0, 0, 2) == [1]
    assert slot.chain.rtas(DETAIL, ADDR, *BUID, 0, 0, 0, 0, 3) == [PARAM_ERROR]


def test_what_the_host_refuses() -> None:
    slot = Slot()

    def refuse(_cmd: int) -> None:
        raise OSError(errno.ENODEV, "no PE")

    for failure in (refuse, host_gone):
        slot.chain.port.fail = failure
        assert slot.option(0) == HW_ERROR
        assert slot.reset(1) == HW_ERROR
        assert slot.state() == [PARAM_ERROR]
        assert slot.chain.rtas(CONFIGURE, ADDR, *BUID) == [PARAM_ERROR]


def test_a_bridge_reset_enables_eeh_again() -> None:
    slot = Slot()
    slot.container.eeh_inject_err(0, 4)
    done: list[EehOp] = []
    port = slot.phb.eeh()
    assert port is not None

    def watched(op: EehOp) -> EehState:
        windows = [table.enabled for table in slot.phb.dma.tables]
        assert windows == [True, False], "windows are reset before"
        assert not slot.phb.bus.devices[DEVFN].config.get("command") & COMMAND_MASTER, "functions are reset before"
        done.append(op)
        return port(op)

    slot.phb.bus.config_write(DEVFN, COMMAND, 2, COMMAND_MASTER)
    slot.chain.create_window(16, 18)
    slot.phb.eeh = lambda: watched
    slot.phb.reset()
    assert done == [EehOp.VFIO_EEH_PE_ENABLE]
    assert slot.state()[1] == EehState.VFIO_EEH_PE_STATE_NORMAL
