"""NVMe: the admin command set (NVM Express Base Specification 1.4, chapter 5)."""

from __future__ import annotations

import pytest

from tests.devices.nvme_host import DATA, NvmeHost
from vfio_model.devices.nvme import admin, nvm, regs
from vfio_model.devices.nvme.features import FeatureId
from vfio_model.devices.nvme.logs import ADMIN_EFFECTS, NVM_EFFECTS
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode, Status
from vfio_model.devices.nvme.structures import ERROR_ENTRY, HEALTH, IDENTIFY_CONTROLLER, IDENTIFY_NAMESPACE

ALL = regs.BROADCAST_NSID


@pytest.fixture
def host() -> NvmeHost:
    host = NvmeHost()
    host.enable()
    return host


def set_feature(host: NvmeHost, fid: int, value: int, *, nsid: int = 0, save: bool = False) -> tuple[int, int]:
    done = host.admin(AdminOpcode.SET_FEATURES, nsid=nsid, prp1=DATA, cdw=(fid | save << 31, value))
    return done.status, done.result


def get_feature(host: NvmeHost, fid: int, select: int = 0, subject: int = 0, *, nsid: int = 0) -> tuple[int, int]:
    done = host.admin(AdminOpcode.GET_FEATURES, nsid=nsid, prp1=DATA, cdw=(fid | select << 8, subject))
    return done.status, done.result


def log(host: NvmeHost, lid: int, size: int, *, offset: int = 0, retain: bool = False, nsid: int = ALL) -> bytes:
    dwords = size // 4 - 1
    cdw = (lid | retain << 15 | (dwords & 0xFFFF) << 16, dwords >> 16, offset & 0xFFFFFFFF, offset >> 32)
    done = host.admin(AdminOpcode.GET_LOG_PAGE, nsid=nsid, prp1=DATA, prp2=DATA + 4096, cdw=cdw)
    assert done.status == Status.SUCCESS
    return bytes(host.ram[DATA : DATA + size])


# -- Identify


def test_identify_controller(host: NvmeHost) -> None:
    data = host.identify(1)
    number = lambda name: IDENTIFY_CONTROLLER.number(data, name)  # noqa: E731
    assert number("vid") == 0x1B36 and number("mdts") == 7 and number("ver") == 0x10400
    assert (number("sqes"), number("cqes"), number("nn")) == (0x66, 0x44, 1)
    assert number("sgls") == 0 and number("fuses") == 0 and number("vwc") & 1
    assert data[4:24] == b"vfio-model".ljust(20) and data[768:].startswith(b"nqn.") and data[1023] == 0


@pytest.mark.parametrize(("block", "format_"), [(512, 0), (4096, 1)])
def test_identify_namespace(block: int, format_: int) -> None:
    host = NvmeHost(logical_block_size=block)
    host.enable()
    data = host.identify(0, 1)
    number = lambda name: IDENTIFY_NAMESPACE.number(data, name)  # noqa: E731
    assert number("nsze") == number("ncap") == (4 << 20) // block
    assert number("flbas") == format_ and number("nlbaf") == 1
    assert data[128:136] == bytes((0, 0, 9, 0, 0, 0, 12, 0))


def test_namespaces_are_listed_in_order(host: NvmeHost) -> None:
    assert host.identify(2, 0) == bytes((1,)).ljust(4096, b"\0")
    assert host.identify(2, 1) == bytes(4096)


def test_a_namespace_has_an_identifier_that_follows_the_serial_number() -> None:
    found = []
    for serial in ("one", "two", "one"):
        host = NvmeHost(serial=serial)
        host.enable()
        data = host.identify(3, 1)
        assert data[:4] == bytes((3, 16, 0, 0)) and data[20:] == bytes(4076)
        found.append(data[4:20])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("cns", "nsid", "status"),
    [
        (0, 0, Status.INVALID_NAMESPACE),
        (0, 2, Status.INVALID_NAMESPACE),
        (0, ALL, Status.INVALID_NAMESPACE),
        (2, ALL - 1, Status.INVALID_NAMESPACE),
        (3, 2, Status.INVALID_NAMESPACE),
        (0x1C, 0, Status.INVALID_FIELD),
    ],
)
def test_identify_refuses_what_is_not_there(host: NvmeHost, cns: int, nsid: int, status: Status) -> None:
    done = host.admin(AdminOpcode.IDENTIFY, nsid=nsid, prp1=DATA, cdw=(cns,))
    assert done.status == status and done.dnr


def test_what_cannot_be_stored_is_a_transfer_error_worth_a_retry(host: NvmeHost) -> None:
    done = host.admin(AdminOpcode.IDENTIFY, prp1=1 << 40, cdw=(1,))
    assert done.status == Status.DATA_TRANSFER_ERROR and not done.dnr


@pytest.mark.parametrize("opcode", [0x10, 0x7F, 0xC0])
def test_opcodes_that_there_are_not(host: NvmeHost, opcode: int) -> None:
    assert host.admin(opcode).status == Status.INVALID_OPCODE


@pytest.mark.parametrize("flags", [0x01, 0x40, 0x80])
def test_fused_commands_and_sgls_are_refused(host: NvmeHost, flags: int) -> None:
    assert host.admin(AdminOpcode.IDENTIFY, flags=flags, prp1=DATA, cdw=(1,)).status == Status.INVALID_FIELD


# -- queues


@pytest.mark.parametrize(
    ("cdw10", "cdw11", "prp1", "status"),
    [
        (0 | 15 << 16, 1, 0x5000, Status.INVALID_QUEUE_ID),
        (65 | 15 << 16, 1, 0x5000, Status.INVALID_QUEUE_ID),
        (1 | 0 << 16, 1, 0x5000, Status.INVALID_QUEUE_SIZE),
        (1 | 2048 << 16, 1, 0x5000, Status.INVALID_QUEUE_SIZE),
        (1 | 15 << 16, 0, 0x5000, Status.INVALID_FIELD),
        (1 | 15 << 16, 1, 0x5004, Status.INVALID_PRP_OFFSET),
        (1 | 15 << 16, 3 | 1 << 16, 0x5000, Status.INVALID_INTERRUPT_VECTOR),
    ],
)
def test_a_completion_queue_that_cannot_be(host: NvmeHost, cdw10: int, cdw11: int, prp1: int, status: Status) -> None:
    assert host.admin(AdminOpcode.CREATE_CQ, prp1=prp1, cdw=(cdw10, cdw11)).status == status


@pytest.mark.parametrize(
    ("cdw10", "cdw11", "prp1", "status"),
    [
        (0 | 15 << 16, 1 | 1 << 16, 0x5000, Status.INVALID_QUEUE_ID),
        (1 | 0 << 16, 1 | 1 << 16, 0x5000, Status.INVALID_QUEUE_SIZE),
        (1 | 15 << 16, 0 | 1 << 16, 0x5000, Status.INVALID_FIELD),
        (1 | 15 << 16, 1 | 0 << 16, 0x5000, Status.INVALID_QUEUE_ID),
        (1 | 15 << 16, 1 | 99 << 16, 0x5000, Status.INVALID_QUEUE_ID),
        (1 | 15 << 16, 1 | 2 << 16, 0x5000, Status.INVALID_CQ),
        (1 | 15 << 16, 1 | 1 << 16, 0x5FFF, Status.INVALID_PRP_OFFSET),
    ],
)
def test_a_submission_queue_that_cannot_be(host: NvmeHost, cdw10: int, cdw11: int, prp1: int, status: Status) -> None:
    assert host.create_cq(1, 16)[0].status == Status.SUCCESS
    assert host.admin(AdminOpcode.CREATE_SQ, prp1=prp1, cdw=(cdw10, cdw11)).status == status


def test_queues_need_the_sizes_of_their_entries() -> None:
    host = NvmeHost()
    host.enable(cc=regs.CC_EN.at(1))
    assert host.create_cq(1, 16)[0].status == Status.INVALID_QUEUE_SIZE


def test_queues_go_in_the_right_order(host: NvmeHost) -> None:
    host.create_pair(1)
    assert host.create_cq(1, 16)[0].status == Status.INVALID_QUEUE_ID
    assert host.admin(AdminOpcode.DELETE_CQ, cdw=(1,)).status == Status.INVALID_QUEUE_DELETION
    assert host.admin(AdminOpcode.DELETE_SQ, cdw=(1,)).status == Status.SUCCESS
    assert host.admin(AdminOpcode.DELETE_SQ, cdw=(1,)).status == Status.INVALID_QUEUE_ID
    assert host.admin(AdminOpcode.DELETE_CQ, cdw=(1,)).status == Status.SUCCESS
    assert host.admin(AdminOpcode.DELETE_CQ, cdw=(1,)).status == Status.INVALID_QUEUE_ID
    for opcode in (AdminOpcode.DELETE_SQ, AdminOpcode.DELETE_CQ):
        assert host.admin(opcode, cdw=(0,)).status == Status.INVALID_QUEUE_ID


# -- features


def test_the_number_of_queues(host: NvmeHost) -> None:
    assert set_feature(host, FeatureId.NUMBER_OF_QUEUES, 3 | 3 << 16) == (Status.SUCCESS, 63 | 63 << 16)
    assert get_feature(host, FeatureId.NUMBER_OF_QUEUES) == (Status.SUCCESS, 63 | 63 << 16)
    assert set_feature(host, FeatureId.NUMBER_OF_QUEUES, 0xFFFF)[0] == Status.INVALID_FIELD
    host.create_pair(1)
    assert set_feature(host, FeatureId.NUMBER_OF_QUEUES, 3 | 3 << 16)[0] == Status.COMMAND_SEQUENCE_ERROR


@pytest.mark.parametrize(
    ("fid", "value", "kept"),
    [
        (FeatureId.ARBITRATION, 0x01020303, 0x01020303),
        (FeatureId.POWER_MANAGEMENT, 0x40, 0x40),
        (FeatureId.INTERRUPT_COALESCING, 0x1F0203, 0x0203),
        (FeatureId.WRITE_ATOMICITY, 1, 1),
        (FeatureId.ASYNC_EVENTS, 0x1F, 0x1F),
        (FeatureId.VOLATILE_WRITE_CACHE, 0, 0),
    ],
)
def test_features_keep_a_value_until_a_reset(host: NvmeHost, fid: int, value: int, kept: int) -> None:
    default = get_feature(host, fid, select=1)
    assert set_feature(host, fid, value) == (Status.SUCCESS, 0)
    assert get_feature(host, fid) == (Status.SUCCESS, kept)
    assert get_feature(host, fid, select=1) == default
    assert get_feature(host, fid, select=3) == (Status.SUCCESS, 4), "changeable, neither saved nor per namespace"
    host.disable()
    host.enable()
    assert get_feature(host, fid) == default


def test_error_recovery_is_per_namespace(host: NvmeHost) -> None:
    assert set_feature(host, FeatureId.ERROR_RECOVERY, 7, nsid=1)[0] == Status.SUCCESS
    assert get_feature(host, FeatureId.ERROR_RECOVERY, nsid=1) == (Status.SUCCESS, 7)
    assert get_feature(host, FeatureId.ERROR_RECOVERY, select=3, nsid=1) == (Status.SUCCESS, 6)
    assert get_feature(host, FeatureId.ERROR_RECOVERY, nsid=2)[0] == Status.INVALID_NAMESPACE


def test_each_vector_has_its_own_coalescing(host: NvmeHost) -> None:
    assert set_feature(host, FeatureId.INTERRUPT_VECTOR, 3 | 1 << 16)[0] == Status.SUCCESS
    assert get_feature(host, FeatureId.INTERRUPT_VECTOR, subject=3) == (Status.SUCCESS, 3 | 1 << 16)
    assert get_feature(host, FeatureId.INTERRUPT_VECTOR, subject=4) == (Status.SUCCESS, 4)
    assert set_feature(host, FeatureId.INTERRUPT_VECTOR, 65)[0] == Status.INVALID_FIELD


def test_the_timestamp_goes_on(host: NvmeHost) -> None:
    host.ram[DATA : DATA + 8] = (1_700_000_000_000).to_bytes(8, "little")
    assert set_feature(host, FeatureId.TIMESTAMP, 0)[0] == Status.SUCCESS
    host.host.clock.advance(5_000_000)
    assert get_feature(host, FeatureId.TIMESTAMP)[0] == Status.SUCCESS
    value = int.from_bytes(host.ram[DATA : DATA + 8], "little")
    assert value & (1 << 48) - 1 == 1_700_000_000_005 and value >> 49 & 7 == 1


@pytest.mark.parametrize(
    ("status", "fid", "value", "nsid", "save"),
    [
        (Status.INVALID_FIELD, 0x7F, 0, 0, False),
        (Status.FEATURE_NOT_SAVEABLE, FeatureId.ARBITRATION, 0, 0, True),
        (Status.FEATURE_NOT_NAMESPACE_SPECIFIC, FeatureId.ARBITRATION, 0, 1, False),
        (Status.INVALID_FIELD, FeatureId.POWER_MANAGEMENT, 1, 0, False),
        (Status.INVALID_FIELD, FeatureId.ERROR_RECOVERY, 1 << 16, 1, False),
        (Status.INVALID_FIELD, FeatureId.TEMPERATURE_THRESHOLD, 3 << 16, 0, False),
        (Status.INVALID_FIELD, FeatureId.TEMPERATURE_THRESHOLD, 2 << 20, 0, False),
    ],
)
def test_features_that_cannot_be_set(
    host: NvmeHost, status: Status, fid: int, value: int, nsid: int, save: bool
) -> None:
    assert set_feature(host, fid, value, nsid=nsid, save=save)[0] == status


# -- log pages


def test_health_counts_what_was_done(host: NvmeHost) -> None:
    host.create_pair(1)
    for first in range(0, 2000, 200):
        host.rw(NvmOpcode.WRITE, first, 200)
    host.rw(NvmOpcode.READ, 0, 8)
    data = log(host, 2, 512)
    number = lambda name: HEALTH.number(data, name)  # noqa: E731
    assert (number("data_units_written"), number("data_units_read")) == (2, 1), "units of 512000 bytes, rounded up"
    assert (number("host_write_commands"), number("host_read_commands")) == (10, 1)
    assert number("temperature") == 323 and number("critical_warning") == 0


def test_the_newest_failure_comes_first_in_the_error_log(host: NvmeHost) -> None:
    host.admin(0x7F, cid=0x111)
    host.admin(AdminOpcode.IDENTIFY, cid=0x222, nsid=9, cdw=(0,))
    data = log(host, 1, 128)
    first, second = data[:64], data[64:]
    number = ERROR_ENTRY.number
    assert (number(first, "error_count"), number(first, "cid"), number(first, "nsid")) == (2, 0x222, 9)
    assert number(second, "cid") == 0x111 and number(second, "status") >> 1 & 0x7FF == Status.INVALID_OPCODE
    assert HEALTH.number(log(host, 2, 512), "error_log_entries") == 2


def test_the_error_log_names_the_block(host: NvmeHost) -> None:
    host.create_pair(1)
    host.rw(NvmOpcode.READ, 1 << 33, 1)
    entry = log(host, 1, 64)
    assert (ERROR_ENTRY.number(entry, "lba"), ERROR_ENTRY.number(entry, "sqid")) == (1 << 33, 1)


def test_effects_name_every_command_that_there_is(host: NvmeHost) -> None:
    data = log(host, 5, 4096)
    effects = [int.from_bytes(data[at : at + 4], "little") for at in range(0, 4096, 4)]
    assert {opcode for opcode in range(256) if effects[opcode] & 1} == set(admin.HANDLERS) == set(ADMIN_EFFECTS)
    assert {opcode for opcode in range(256) if effects[256 + opcode] & 1} == set(nvm.HANDLERS) == set(NVM_EFFECTS)
    assert effects[256 + NvmOpcode.WRITE] == 3 and effects[256 + NvmOpcode.READ] == 1


def test_a_log_page_by_pieces(host: NvmeHost) -> None:
    whole = log(host, 5, 4096)
    assert log(host, 5, 8, offset=1024) == whole[1024:1032]
    assert log(host, 3, 512)[8:16] == b"1.0".ljust(8) and log(host, 4, 4096) == bytes(4096)


def test_behind_the_end_of_a_page_nothing_is_written(host: NvmeHost) -> None:
    host.ram[DATA : DATA + 4096] = b"u" * 4096
    assert log(host, 2, 4096)[512:] == b"u" * 3584
    done = host.admin(AdminOpcode.GET_LOG_PAGE, nsid=ALL, prp1=DATA, cdw=(2 | 1 << 16, 0, 516))
    assert done.status == Status.INVALID_FIELD


@pytest.mark.parametrize(
    ("lid", "nsid", "offset", "status"),
    [
        (0x42, ALL, 0, Status.INVALID_LOG_PAGE),
        (1, ALL, 2, Status.INVALID_FIELD),
        (1, 1, 0, Status.INVALID_FIELD),
    ],
)
def test_log_pages_that_there_are_not(host: NvmeHost, lid: int, nsid: int, offset: int, status: Status) -> None:
    assert host.admin(AdminOpcode.GET_LOG_PAGE, nsid=nsid, prp1=DATA, cdw=(lid, 0, offset)).status == status


# -- events and Abort


def request(host: NvmeHost, cid: int) -> None:
    host.push(0, AdminOpcode.ASYNC_EVENT_REQUEST, cid=cid)
    host.ring(0)


def test_an_event_waits_for_a_request_and_a_request_for_an_event(host: NvmeHost) -> None:
    request(host, 0x70)
    assert host.reap(0) == []
    host.doorbell(9, 1)
    (told,) = host.reap(0)
    assert (told.cid, told.status, told.result) == (0x70, 0, 0x010000), "invalid doorbell register, log page 1"
    host.doorbell(0, 64)
    request(host, 0x71)
    assert host.reap(0) == [], "an error was told, and its log page not read"
    log(host, 1, 64, retain=True)
    assert not host.stash
    log(host, 1, 64)
    host.doorbell(0, 64)
    assert [(each.cid, each.result) for each in (*host.stash, *host.reap(0))] == [(0x71, 0x010100)]


def test_a_doorbell_error_is_in_the_error_log(host: NvmeHost) -> None:
    host.create_pair(1, 16)
    host.doorbell(1, 16)
    entry = log(host, 1, 64)
    assert (ERROR_ENTRY.number(entry, "sqid"), ERROR_ENTRY.number(entry, "cid")) == (1, 0xFFFF)


def test_no_more_requests_than_may_wait(host: NvmeHost) -> None:
    for cid in range(0x70, 0x74):
        request(host, cid)
    assert host.reap(0) == []
    assert host.admin(AdminOpcode.ASYNC_EVENT_REQUEST).status == Status.ASYNC_EVENT_LIMIT


def test_a_waiting_request_can_be_aborted(host: NvmeHost) -> None:
    request(host, 0x70)
    host.push(0, AdminOpcode.ABORT, cid=0x71, cdw=(0 | 0x70 << 16,))
    host.ring(0)
    ends = {each.cid: (each.status, each.result) for each in host.reap(0)}
    assert ends == {0x70: (Status.ABORT_REQUESTED, 0), 0x71: (Status.SUCCESS, 0)}


def test_what_is_over_cannot_be_aborted(host: NvmeHost) -> None:
    done = host.admin(AdminOpcode.ABORT, cdw=(0 | 0x55 << 16,))
    assert (done.status, done.result) == (Status.SUCCESS, 1)
    assert host.admin(AdminOpcode.ABORT, cdw=(7,)).status == Status.INVALID_FIELD


def test_a_temperature_threshold_below_what_is_measured_is_told(host: NvmeHost) -> None:
    assert get_feature(host, FeatureId.TEMPERATURE_THRESHOLD) == (Status.SUCCESS, 343)
    set_feature(host, FeatureId.ASYNC_EVENTS, 0x2)
    request(host, 0x70)
    set_feature(host, FeatureId.TEMPERATURE_THRESHOLD, 300)
    assert [(each.cid, each.result) for each in (*host.stash, *host.reap(0))] == [(0x70, 0x020101)]
    assert HEALTH.number(log(host, 2, 512), "critical_warning") == 2
    set_feature(host, FeatureId.TEMPERATURE_THRESHOLD, 400)
    assert HEALTH.number(log(host, 2, 512), "critical_warning") == 0


# -- Format NVM


def test_a_format_changes_the_block_size_and_forgets_the_data(host: NvmeHost) -> None:
    host.create_pair(1)
    host.write_blocks(0, b"old!" * 128)
    assert host.admin(AdminOpcode.FORMAT_NVM, nsid=1, cdw=(1,)).status == Status.SUCCESS
    assert IDENTIFY_NAMESPACE.number(host.identify(0, 1), "nsze") == 1024
    assert host.read_blocks(0, 1) == bytes(4096)


@pytest.mark.parametrize(
    ("nsid", "cdw10", "status"),
    [
        (2, 0, Status.INVALID_NAMESPACE),
        (1, 2, Status.INVALID_FORMAT),
        (1, 1 << 5, Status.INVALID_FORMAT),
        (1, 2 << 9, Status.INVALID_FIELD),
    ],
)
def test_formats_that_there_are_not(host: NvmeHost, nsid: int, cdw10: int, status: Status) -> None:
    assert host.admin(AdminOpcode.FORMAT_NVM, nsid=nsid, cdw=(cdw10,)).status == status
