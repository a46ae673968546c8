"""NVMe: state goes to another device on the same disk, and only a state that one can be in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.devices.nvme_host import NvmeHost
from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.migration import NVME
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode
from vfio_model.errors import VMStateError
from vfio_model.vmstate.fields import State, decode, encode


def moved(source: NvmeHost) -> NvmeHost:
    """``source``'s guest on another device, with the same RAM; a disk in memory moves with the state."""
    target = NvmeHost()
    stream = encode(NVME, source.device.export_state())
    state = decode(NVME, NVME.version, stream, target.device.export_state(), where="nvme")
    target.device.check_state(state, where="nvme")
    target.ram[:] = source.ram
    target.device.import_state(state)
    target.rings, target._cid, target._next_queue = source.rings, source._cid, source._next_queue
    return target


def busy() -> NvmeHost:
    host = NvmeHost()
    host.enable_msix()
    host.start(vector=5)
    host.push(0, AdminOpcode.ASYNC_EVENT_REQUEST, cid=0x7777)
    host.ring(0)
    host.admin(AdminOpcode.SET_FEATURES, cdw=(0x08, 0x0203))
    host.write_blocks(3, b"m" * 512)
    host.admin(0x7F)
    return host


def test_a_running_controller_goes_on_elsewhere() -> None:
    target = moved(busy())
    assert target.status == regs.CSTS_RDY
    assert target.read_blocks(3, 1) == b"m" * 512 and target.host.signals[-1] == "msi 5"
    assert target.admin(AdminOpcode.GET_FEATURES, cdw=(0x08,)).result == 0x0203
    target.doorbell(40, 1)
    assert [each.cid for each in target.reap(0)] == [0x7777]
    assert target.nvme.controller.errors.count == 2


def test_state_survives_a_round_trip() -> None:
    source = busy()
    first, second = source.device.export_state(), moved(source).device.export_state()
    assert first == second


def test_commands_that_waited_are_carried_out_by_the_target() -> None:
    source = NvmeHost()
    source.enable()
    source.create_pair(1, 1024)
    sent = [source.push(1, NvmOpcode.FLUSH, nsid=1) for _ in range(1000)]
    source.ring(1)
    target = moved(source)
    target.host.clock.advance(100_000)
    assert [each.cid for each in target.reap(1)] == sent


def test_a_formatted_disk_keeps_its_block_size() -> None:
    source = NvmeHost()
    source.start()
    source.admin(AdminOpcode.FORMAT_NVM, nsid=1, cdw=(1,))
    assert moved(source).block == 4096


def test_a_failed_controller_is_still_one() -> None:
    source = NvmeHost()
    source.enable(sq_size=1)
    target = moved(source)
    assert target.status == regs.CSTS_CFS
    target.disable()
    target.enable()
    assert target.status == regs.CSTS_RDY


def test_a_controller_that_is_off_may_be_configured_anyhow() -> None:
    source = NvmeHost()
    source.write(regs.CC, 0x00FFFFF0)
    target = moved(source)
    assert target.read(regs.CC) == 0x00FFFFF0 and target.status & regs.CSTS_RDY == 0
    target.start()
    assert target.write_blocks(0, b"a" * 512).status == 0


def test_a_pin_that_is_up_stays_up_until_completions_are_taken() -> None:
    source = NvmeHost()
    source.start()
    source.push(1, NvmOpcode.FLUSH, nsid=1)
    source.ring(1)
    target = moved(source)
    assert target.host.signals[-1] == "raise"
    target.reap(1)
    assert target.host.signals[-1] == "lower"


def _ring(name: str, index: int, field: str, value: int) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        state[name][index][field] = value

    return spoil


def _set(name: str, value: Any) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        state[name] = value

    return spoil


def _drop_admin(state: State) -> None:
    del state["sqs"][0]
    state["sq_count"] -= 1


@pytest.mark.parametrize(
    "spoil",
    [
        _ring("sqs", 1, "head", 16),
        _ring("sqs", 1, "size", 1),
        _ring("sqs", 1, "size", 4096),
        _ring("sqs", 1, "id", 0),
        _ring("sqs", 1, "id", 65),
        _ring("sqs", 1, "cqid", 9),
        _ring("sqs", 0, "cqid", 1),
        _ring("cqs", 1, "tail", 99),
        _ring("cqs", 1, "vector", 65),
        _ring("cqs", 1, "phase", 2),
        _drop_admin,
        _set("csts", 0),
        _set("cap_lo", 1),
        _set("cc", 1 | regs.CC_MPS.at(9)),
        _set("aqa", 1 << 31),
        _set("block_shift", 10),
        _set("features", [{"fid": 0x42, "subject": 0, "value": 0}]),
        _set("chunks", [{"number": 64, "content": b""}]),
        _set("events", [{"type": 9, "info": 0, "log": 0}]),
        _set("masked", bytes((7,))),
        _set("request_count", 5),
        _set("error_size", 63),
    ],
)
def test_a_state_that_cannot_be_is_refused(spoil: Callable[[State], None]) -> None:
    state = copy.deepcopy(busy().device.export_state())
    target = NvmeHost()
    target.device.check_state(state, where="nvme")
    spoil(state)
    with pytest.raises(VMStateError):
        target.device.check_state(state, where="nvme")
    assert target.status == 0


@pytest.mark.parametrize("props", [{"drive": "mem:8M"}, {"max_ioqpairs": 3}, {"mdts": 5}])
def test_another_kind_of_device_is_refused(props: dict[str, object]) -> None:
    stream = encode(NVME, busy().device.export_state())
    with pytest.raises(VMStateError):
        decode(NVME, NVME.version, stream, NvmeHost(**props).device.export_state(), where="nvme")
