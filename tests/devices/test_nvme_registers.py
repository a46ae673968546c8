"""NVMe: registers, enabling and resets (NVM Express Base Specification 1.4, chapters 3 and 7)."""

from __future__ import annotations

import pytest

from tests.devices.nvme_host import ADMIN_CQ, ADMIN_SQ, DATA, ENABLE, NvmeHost
from vfio_model.devices import DEVICES
from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode, Status
from vfio_model.errors import ConfigError

READY, FAILED = regs.CSTS_RDY, regs.CSTS_CFS
SHUT_DOWN = regs.CSTS_SHST.at(regs.SHST_COMPLETE)


@pytest.fixture
def host() -> NvmeHost:
    return NvmeHost()


def test_identity(host: NvmeHost) -> None:
    config = host.device.config
    assert DEVICES["nvme"] is NvmeDevice
    assert config.read(0, 4) == 0x00101B36
    assert config.read(8, 4) == 0x01080202, "class 01 08 02: what Linux's driver binds to"
    config.write(0x10, 4, 0xFFFFFFFF)
    assert config.read(0x10, 4) == 0xFFFFC004, "64-bit memory, 16 KiB"


def test_capabilities(host: NvmeHost) -> None:
    cap = host.read(regs.CAP, 8)
    assert regs.CAP_MQES.of(cap) == 2047 and regs.CAP_CQR.of(cap) == 1 and regs.CAP_DSTRD.of(cap) == 0
    assert (regs.CAP_MPSMIN.of(cap), regs.CAP_MPSMAX.of(cap), regs.CAP_CSS.of(cap)) == (0, 4, 1)
    assert host.read(regs.VS) == 0x10400
    assert host.read(regs.CAP) == cap & 0xFFFFFFFF and host.read(regs.CAP + 4) == cap >> 32
    assert host.read(regs.CAP + 2, 1) == 1, "any part of a register can be read"


def test_what_cannot_be_written_keeps_its_value(host: NvmeHost) -> None:
    for offset, size in ((regs.CAP, 8), (regs.VS, 4), (regs.CSTS, 4)):
        before = host.read(offset, size)
        host.write(offset, (1 << size * 8) - 1, size)
        assert host.read(offset, size) == before


def test_admin_queue_registers_keep_their_own_bits(host: NvmeHost) -> None:
    for offset, size, kept in ((regs.AQA, 4, 0x0FFF0FFF), (regs.ASQ, 8, ~0xFFF), (regs.ACQ, 8, ~0xFFF)):
        host.write(offset, (1 << size * 8) - 1, size)
        assert host.read(offset, size) == kept & (1 << size * 8) - 1
    host.write(regs.ASQ, 0x12345000)
    host.write(regs.ASQ + 4, 0x7)
    assert host.read(regs.ASQ, 8) == 0x7_1234_5000, "in two halves, as a 32-bit host writes it"


def test_the_interrupt_mask_is_set_and_cleared(host: NvmeHost) -> None:
    host.write(regs.INTMS, 0x5)
    host.write(regs.INTMS, 0x2)
    host.write(regs.INTMC, 0x1)
    assert host.read(regs.INTMS) == host.read(regs.INTMC) == 0x6


def test_enabling_makes_it_ready(host: NvmeHost) -> None:
    assert host.status == 0
    host.enable()
    assert host.status == READY and host.read(regs.CC) == ENABLE


@pytest.mark.parametrize(
    "cc",
    [
        ENABLE | regs.CC_MPS.at(5),
        ENABLE | regs.CC_CSS.at(6),
        ENABLE | regs.CC_AMS.at(1),
    ],
)
def test_settings_that_it_does_not_support_make_it_fail(host: NvmeHost, cc: int) -> None:
    host.enable(cc=cc)
    assert host.status == FAILED
    host.disable()
    assert host.status == 0
    host.enable()
    assert host.status == READY


def test_page_size_arbitration_and_command_set_stay_while_it_is_enabled(host: NvmeHost) -> None:
    host.enable()
    host.write(regs.CC, ENABLE | regs.CC_MPS.at(5) | regs.CC_CSS.at(6) | regs.CC_AMS.at(1))
    assert host.read(regs.CC) == ENABLE and host.nvme.controller.memory.page_size == 4096


def test_admin_queues_of_one_entry_make_it_fail(host: NvmeHost) -> None:
    host.enable(sq_size=1)
    assert host.status == FAILED


def test_a_controller_reset_forgets_queues_but_not_where_the_admin_queue_is(host: NvmeHost) -> None:
    host.start()
    host.write(regs.INTMS, 1)
    host.push(0, AdminOpcode.ASYNC_EVENT_REQUEST)
    host.ring(0)
    host.disable()
    assert host.status == 0 and host.read(regs.INTMS) == 0
    assert host.read(regs.ASQ, 8) == ADMIN_SQ and host.read(regs.ACQ, 8) == ADMIN_CQ
    assert not host.nvme.controller.queues.submission and not host.nvme.controller.events.requests
    host.start()
    assert host.write_blocks(0, b"a" * 512).status == Status.SUCCESS


def test_a_pci_reset_forgets_all_but_the_disk(host: NvmeHost) -> None:
    host.start()
    host.write_blocks(7, b"kept" * 128)
    host.device.reset()
    assert host.status == 0
    for offset in (regs.CC, regs.AQA, regs.ASQ, regs.ACQ):
        assert host.read(offset) == 0
    host.device.config_write(4, 2, 4)
    host.start()
    assert host.read_blocks(7, 1) == b"kept" * 128


def test_doorbells_of_a_controller_that_is_not_ready_do_nothing(host: NvmeHost) -> None:
    host.doorbell(0, 1)
    host.doorbell(1, 1, completion=True)
    host.enable()
    assert host.reap(0) == []
    assert host.nvme.controller.errors.count == 0


@pytest.mark.parametrize("kind", [1, 2])
def test_shutdown_flushes_and_says_so(host: NvmeHost, kind: int) -> None:
    host.start()
    flushed: list[bool] = []
    host.nvme.controller.namespaces[1].disk.flush = lambda: flushed.append(True)  # type: ignore[method-assign]
    host.write(regs.CC, ENABLE | regs.CC_SHN.at(kind))
    assert host.status == READY | SHUT_DOWN and flushed == [True]
    host.disable()
    assert host.status == 0
    host.enable()
    assert host.status == READY


def test_where_there_is_no_register_writes_are_lost(host: NvmeHost) -> None:
    host.enable()
    host.write(0x800, 0xFFFFFFFF)
    assert host.read(0x800) == 0 and host.read(0xFF8, 8) == 0 and host.read(regs.DOORBELLS) == 0


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4)])
def test_a_doorbell_takes_all_of_its_32_bits(host: NvmeHost, offset: int, size: int) -> None:
    host.enable()
    host.push(0, AdminOpcode.IDENTIFY, prp1=DATA, cdw=(1,))
    host.write(regs.DOORBELLS + offset, 1, size)
    assert host.reap(0) == [] and host.nvme.controller.errors.count == 0
    host.ring(0)
    assert len(host.reap(0)) == 1


def test_without_bus_mastering_it_fails(host: NvmeHost) -> None:
    host.enable()
    host.device.config_write(4, 2, 0)
    host.push(0, AdminOpcode.IDENTIFY, prp1=DATA, cdw=(1,))
    host.ring(0)
    assert host.status == READY | FAILED
    host.device.config_write(4, 2, 4)
    host.ring(0)
    assert host.reap(0) == [], "a controller that has failed waits for a reset"
    host.disable()
    host.enable()
    assert host.status == READY and host.identify(1)


def test_a_completion_queue_out_of_reach_is_fatal(host: NvmeHost) -> None:
    host.enable()
    host.take(0)
    done = host.admin(AdminOpcode.CREATE_CQ, prp1=1 << 40, cdw=(1 | 15 << 16, 3))
    assert done.status == Status.SUCCESS
    created, sq = host.create_sq(1, 16, 1)
    assert created.status == Status.SUCCESS
    host.ram[sq : sq + 64] = regs.SQE.pack(NvmOpcode.FLUSH, 0, 9, 1, *[0] * 10)
    host.doorbell(1, 1)
    assert host.status == READY | FAILED


@pytest.mark.parametrize(
    "props",
    [
        {"logical_block_size": 1024},
        {"logical_block_size": 0},
        {"serial": "x" * 21},
        {"serial": "näher"},
        {"max_ioqpairs": 0},
        {"max_ioqpairs": 512},
        {"msix_qsize": 0},
        {"msix_qsize": 257},
        {"mdts": 17},
        {"drive": "mem:5000"},
        {"drive": "file:/nowhere"},
        {"drive": "mem:lots"},
    ],
)
def test_properties_that_make_no_sense_are_refused(props: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        NvmeHost(**props)


def test_properties_decide_what_there_is() -> None:
    host = NvmeHost(msix_qsize=3, max_ioqpairs=2, serial="S-1")
    assert host.device.msix is not None and host.device.msix.vectors == 3
    host.enable()
    assert host.identify(1)[4:24] == b"S-1".ljust(20)
    assert host.create_cq(3, 16)[0].status == Status.INVALID_QUEUE_ID
