"""EEH: what each operation does to the PE's state and to the DMA of its device."""

from __future__ import annotations

import pytest

from tests.host.rig import DEVICE, Rig
from vfio_model.host.eeh import EFFECTS, state
from vfio_model.host.layout import PE_GENERATION, PE_STATE
from vfio_model.host.pe import Stop
from vfio_model.host.pending import Pending
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.types import MemTxResult
from vfio_model.uapi.vfio import EehOp, EehPeOp, EehState, Ioctl
from vfio_model.vfio.ioctl import VfioGroup

OK, DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR
NORMAL, RESET = EehState.VFIO_EEH_PE_STATE_NORMAL, EehState.VFIO_EEH_PE_STATE_RESET
STOPPED, STOPPED_DMA = EehState.VFIO_EEH_PE_STATE_STOPPED, EehState.VFIO_EEH_PE_STATE_STOPPED_DMA
UNAVAIL = EehState.VFIO_EEH_PE_STATE_UNAVAIL
GOES_ON = NORMAL, UNAVAIL
"""States with DMA: where I/O alone is stopped, the PE is unavailable to the user and its DMA goes on."""


class Eeh:
    """A rig with a page mapped, its device's path warmed up, and operations by their short names."""

    def __init__(self, gated: bool = False) -> None:
        self.rig = Rig()
        self.dma = DMASpace(self.rig.impl((lambda: None) if gated else None))
        self.rig.map(0, 0)
        assert self.move() == OK

    def move(self) -> MemTxResult:
        written = self.dma.write(64, b"dma")
        assert self.dma.read(64, bytearray(3)) == written
        assert self.dma.write_many([64] * 40, 4, bytes(160)) == written
        return written

    def do(self, *names: str) -> EehState:
        for name in names:
            if name == "inject":
                self.rig.container.eeh_inject_err(0, 4)
            else:
                assert self.rig.container.eeh_pe_op(EehOp[f"VFIO_EEH_PE_{name}"]) == 0
        return self.rig.container.eeh_pe_op(EehOp.VFIO_EEH_PE_GET_STATE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        (("ENABLE",), NORMAL),
        (("DISABLE",), NORMAL),
        (("UNFREEZE_IO", "UNFREEZE_DMA", "CONFIGURE", "RESET_DEACTIVATE"), NORMAL),
        (("inject",), STOPPED),
        (("inject", "DISABLE", "CONFIGURE"), STOPPED),
        (("inject", "inject"), STOPPED),
        (("inject", "ENABLE"), NORMAL),
        (("inject", "UNFREEZE_IO"), STOPPED_DMA),
        (("inject", "UNFREEZE_IO", "UNFREEZE_DMA"), NORMAL),
        (("inject", "UNFREEZE_DMA"), UNAVAIL),
        (("inject", "UNFREEZE_DMA", "UNFREEZE_IO"), NORMAL),
        (("inject", "UNFREEZE_DMA", "inject"), STOPPED),
        (("RESET_HOT",), RESET),
        (("RESET_FUNDAMENTAL",), RESET),
        (("RESET_HOT", "UNFREEZE_IO", "UNFREEZE_DMA", "CONFIGURE", "ENABLE"), RESET),
        (("RESET_HOT", "inject", "RESET_FUNDAMENTAL", "RESET_DEACTIVATE"), NORMAL),
        (("inject", "RESET_DEACTIVATE"), NORMAL),
        (("inject", "UNFREEZE_IO", "RESET_HOT", "RESET_DEACTIVATE", "CONFIGURE"), NORMAL),
    ],
)
def test_states_and_what_dma_does_in_them(operations: tuple[str, ...], expected: EehState, gated: bool) -> None:
    eeh = Eeh(gated)
    assert eeh.do(*operations) == expected
    assert eeh.move() == (OK if expected in GOES_ON else DECODE_ERROR)
    eeh.do("RESET_DEACTIVATE")
    assert eeh.move() == OK


def test_every_operation_has_its_effect_and_every_stop_its_state() -> None:
    assert set(EFFECTS) == set(EehOp)
    assert {state(Stop(stops)) for stops in range(8)} == set(EehState)


def test_stopping_waits_for_the_dma_under_way_and_lifting_does_not() -> None:
    eeh = Eeh()
    rig = eeh.rig
    inject = EehPeOp(op=EehOp.VFIO_EEH_PE_INJECT_ERR).pack()
    rig.lane.enter()
    outcome = rig.host.ioctl(rig.mm, rig.container.handle, Ioctl.VFIO_EEH_PE_OP, inject)
    assert isinstance(outcome, Pending) and outcome.lane_devices == (DEVICE,)
    assert rig.device.pe.words[PE_STATE] == 1, "stored before the wait"
    rig.lane.leave()
    assert outcome.finish() == bytes(4)
    waits, generation = len(rig.waited_for), rig.device.pe.words[PE_GENERATION]
    assert eeh.do("RESET_HOT", "UNFREEZE_IO") == RESET
    assert (len(rig.waited_for), rig.device.pe.words[PE_GENERATION]) == (waits, generation), "no DMA was allowed"
    assert eeh.do("RESET_DEACTIVATE") == NORMAL
    assert len(rig.waited_for) == waits


def test_the_host_and_the_user_stop_the_same_pe() -> None:
    eeh = Eeh()
    group = eeh.rig.host.groups[26]
    eeh.rig.port.run(eeh.rig.host.freeze(group))
    assert (eeh.do(), eeh.move()) == (STOPPED, DECODE_ERROR)
    assert eeh.do("UNFREEZE_IO", "UNFREEZE_DMA") == NORMAL
    eeh.do("RESET_HOT")
    eeh.rig.host.unfreeze(group)
    assert (eeh.do(), eeh.move()) == (NORMAL, OK)


def test_a_pe_without_an_open_device_waits_for_nothing() -> None:
    eeh = Eeh()
    eeh.rig.port.device_closed(eeh.rig.token)
    waits = len(eeh.rig.waited_for)
    assert eeh.do("inject") == STOPPED
    assert len(eeh.rig.waited_for) == waits
    assert eeh.rig.device.pe.frozen, "who opens the device next finds it stopped"


def test_a_closed_group_is_normal_again() -> None:
    eeh = Eeh()
    assert eeh.do("inject") == STOPPED
    eeh.rig.port.close(eeh.rig.group.handle)
    assert not eeh.rig.device.pe.frozen
    group = VfioGroup(eeh.rig.port, eeh.rig.port.open("/dev/vfio/26"))
    group.set_container(eeh.rig.container.handle)
    eeh.rig.container.set_iommu(7)
    assert eeh.do() == NORMAL
