"""A device process's features: migration states, the state as data, the log of its writes."""

from __future__ import annotations

import errno
import itertools
import random

import pytest

from hostd.device_migration import DeviceMigration, NoRoom
from hostd.device_surroundings import ProcessSurroundings
from tests.memory.fakes import system_memory
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.devices.dma_burst.device import DMABurstDevice
from vfio_model.devices.edu import regs
from vfio_model.devices.edu.device import EduDevice
from vfio_model.memory.types import DMADirection
from vfio_model.pci.config_space import COMMAND, COMMAND_MASTER
from vfio_model.pci.device import PARENT, PCIDevice
from vfio_model.ranges import U64_MAX
from vfio_model.trace import NULL_TRACE
from vfio_model.uapi.migration import (
    ARCS,
    SAVING,
    DeviceState,
    DmaLoggingControl,
    DmaLoggingReport,
    Feature,
    FeatureFlags,
    MigDataSize,
    MigrationInfo,
    MigState,
    PreCopyInfo,
    pack_ranges,
    path,
)
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

GET, SET, PROBE = (
    int(FeatureFlags.VFIO_DEVICE_FEATURE_GET),
    int(FeatureFlags.VFIO_DEVICE_FEATURE_SET),
    int(FeatureFlags.VFIO_DEVICE_FEATURE_PROBE),
)
INFO = int(Feature.VFIO_DEVICE_FEATURE_MIGRATION)
STATE = int(Feature.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE)
DATA_SIZE = int(Feature.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)
PRECOPY_INFO = int(Feature.X_MIG_PRECOPY_INFO)
LOG_START, LOG_STOP, LOG_REPORT = (
    int(Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_START),
    int(Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP),
    int(Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT),
)
PAGE, RAM = 4096, 1 << 20
MS = 1_000_000
REACHABLE = [state for state in DeviceState if state is not DeviceState.ERROR]


class Process:
    """A device as its process has it, over RAM of its own."""

    def __init__(self, kind: type[PCIDevice] = EduDevice, *, logs: bool = True) -> None:
        self.around = ProcessSurroundings(NULL_TRACE)
        self.device = kind(self.around)
        self.device.realize()
        self.migration = DeviceMigration(self.device, NULL_TRACE, logs=logs)
        space, self.ram = system_memory(RAM)
        self.migration.attach_dma(space)
        self.device.config_write(COMMAND, 2, COMMAND_MASTER | 2)

    def to(self, state: DeviceState) -> None:
        answer = self.migration.feature(SET | STATE, MigState(state).pack())
        assert MigState.unpack(answer).device_state == state is self.migration.state

    def read_all(self, size: int = 100) -> bytes:
        return b"".join(iter(lambda: self.migration.read(size), b""))

    def log(self, page: int = PAGE, ranges: tuple[tuple[int, int], ...] = ((0, 1 << 63),)) -> None:
        self.migration.feature(SET | LOG_START, DmaLoggingControl(page, len(ranges)).pack() + pack_ranges(list(ranges)))

    def written(self, iova: int = 0, size: int = RAM, page: int = PAGE) -> set[int]:
        answer = self.migration.feature(GET | LOG_REPORT, DmaLoggingReport(iova, size, page).pack())
        number = int.from_bytes(answer[DmaLoggingReport.SIZE :], "little")
        return {at for at in range(number.bit_length()) if number >> at & 1}


def refusal(act: object) -> int:
    assert callable(act)
    with pytest.raises(OSError) as caught:
        act()
    assert caught.value.errno is not None
    return caught.value.errno


@pytest.mark.parametrize(("before", "after"), list(itertools.product(REACHABLE, REACHABLE)))
def test_every_state_is_reached_by_legal_steps(before: DeviceState, after: DeviceState) -> None:
    way = path(before, after)
    if before is DeviceState.STOP_COPY and after in SAVING - {before}:
        assert way is None
        return
    assert way is not None
    assert all(step in ARCS[last] for last, step in itertools.pairwise([before, *way]))
    process = Process()
    process.to(before)
    process.to(after)
    assert process.migration.runs == (after not in (DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.RESUMING))


def test_what_is_no_state_or_no_feature_is_refused_and_changes_nothing() -> None:
    process = Process()
    feature = process.migration.feature
    for number in (0, 8, 99):
        assert refusal(lambda number=number: feature(SET | STATE, MigState(number).pack())) == errno.EINVAL
    assert refusal(lambda: feature(SET | STATE, b"\1")) == errno.EINVAL
    assert refusal(lambda: feature(GET | SET | STATE, MigState(1).pack())) == errno.EINVAL
    assert refusal(lambda: feature(STATE, b"")) == errno.EINVAL
    assert refusal(lambda: feature(1 << 19 | GET | STATE, b"")) == errno.EINVAL
    assert refusal(lambda: feature(SET | INFO, b"")) == errno.EINVAL
    assert refusal(lambda: feature(GET | 77, b"")) == errno.ENOTTY
    assert refusal(lambda: process.migration.read(10)) == refusal(lambda: process.migration.write(b"x")) == errno.EINVAL
    assert MigState.unpack(feature(GET | STATE, b"")).device_state == DeviceState.RUNNING
    assert feature(PROBE | GET | SET | STATE, b"") == feature(PROBE | SET | LOG_START, b"") == b""
    assert MigrationInfo.unpack(feature(GET | INFO, b"")).flags == 7


def test_a_device_that_was_at_work_becomes_the_one_whose_state_it_takes() -> None:
    other, used = Process(), Process()
    for process in other, used:
        process.device.bar_write(0, regs.DMA_COUNT, 8, 16)
        process.device.bar_write(0, regs.DMA_DST, 8, regs.BUFFER_ADDRESS)
    other.to(DeviceState.STOP_COPY)
    used.device.bar_write(0, regs.DMA_COMMAND, 8, regs.DMA_RUN)
    used.ram.view[:16] = b"x" * 16
    used.to(DeviceState.RESUMING)
    used.migration.write(other.read_all())
    used.to(DeviceState.RUNNING)
    used.around.clock.advance(200 * MS)
    assert used.device.bar_read(0, regs.DMA_COUNT, 8) == 16
    assert bytes(used.device.buffer[:16]) == bytes(16), "a transfer that the other one never began"


def test_a_device_that_does_not_describe_itself_cannot_be_migrated() -> None:
    class Plain(PCIDevice):
        VENDOR_ID, DEVICE_ID = 0x1234, 0x1111

    process = Process(Plain, logs=False)
    for feature in (INFO, STATE, LOG_START):
        assert refusal(lambda feature=feature: process.migration.feature(PROBE | SET | feature, b"")) == errno.ENOTTY


def test_a_transfer_that_was_under_way_ends_in_the_other_process() -> None:
    source, target = Process(), Process()
    source.ram.view[0:5] = b"hello"
    _edu(source, 0, regs.BUFFER_ADDRESS, 5, regs.DMA_RUN)
    source.around.clock.advance(101 * MS)
    _edu(source, regs.BUFFER_ADDRESS, 0x3000, 5, regs.DMA_RUN | regs.DMA_TO_RAM)
    source.around.clock.advance(60 * MS)
    source.to(DeviceState.STOP_COPY)
    assert MigDataSize.unpack(source.migration.feature(GET | DATA_SIZE, b"")).stop_copy_length > 4096
    data = source.read_all()
    target.around.clock.advance_to(999 * MS)
    target.to(DeviceState.RESUMING)
    for at in range(0, len(data), 1000):
        target.migration.write(data[at : at + 1000])
    target.to(DeviceState.RUNNING)
    target.around.clock.advance(38 * MS)
    assert bytes(target.ram.view[0x3000:0x3005]) == bytes(5)
    target.around.clock.advance(2 * MS)
    assert bytes(target.ram.view[0x3000:0x3005]) == b"hello"
    assert bytes(source.ram.view[0x3000:0x3005]) == bytes(5)


def _edu(process: Process, source: int, target: int, count: int, command: int) -> None:
    registers = {regs.DMA_SRC: source, regs.DMA_DST: target, regs.DMA_COUNT: count, regs.DMA_COMMAND: command}
    for register, value in registers.items():
        process.device.bar_write(0, register, 4 if register == regs.DMA_COMMAND else 8, value)


def test_a_state_that_cannot_be_taken_leaves_an_error_that_a_reset_ends() -> None:
    source, target, other = Process(), Process(), Process(DMABurstDevice)
    source.to(DeviceState.STOP_COPY)
    data = source.read_all()
    rng = random.Random(3)
    broken = [data[:-1], data + b"x", b"\0" + data[1:], data[: len(data) // 2], rng.randbytes(40)]
    for device, wrong in [*((target, each) for each in broken), (other, data)]:
        device.to(DeviceState.RESUMING)
        device.migration.write(wrong)
        assert refusal(lambda device=device: device.to(DeviceState.STOP)) == errno.EINVAL
        assert device.migration.state is DeviceState.ERROR and not device.migration.runs
        assert refusal(lambda device=device: device.to(DeviceState.RUNNING)) == errno.EINVAL
        device.migration.reset()
        assert device.migration.state is DeviceState.RUNNING
    target.to(DeviceState.RESUMING)
    target.migration.write(data)
    target.to(DeviceState.RUNNING)


class Area(PCIDevice):
    """64 KiB of memory are all that it is."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x1112
    VMSTATE = VMStateDescription("area", 1, (PARENT, Field("size"), Field("memory", Type.U8, array="size")))

    def realize(self) -> None:
        self.memory = bytearray(64 << 10)

    def export_state(self) -> State:
        return {**super().export_state(), "size": len(self.memory), "memory": bytes(self.memory)}

    def import_state(self, state: State) -> None:
        super().import_state(state)
        self.memory[:] = state["memory"]


def precopied(process: Process, size: int = 1000) -> bytes:
    """What there is to read until a read gets less than it asked for."""
    data, part = b"", b"x" * size
    while len(part) == size:
        part = process.migration.read(size)
        data += part
    return data


def waiting(process: Process) -> tuple[int, int]:
    info = PreCopyInfo.unpack(process.migration.feature(GET | PRECOPY_INFO, b""))
    return info.initial_bytes, info.dirty_bytes


@pytest.mark.parametrize("through", [DeviceState.PRE_COPY_P2P, DeviceState.PRE_COPY])
def test_what_was_read_while_it_ran_is_not_read_again(through: DeviceState) -> None:
    source, target = Process(Area), Process(Area)
    source.device.memory[:] = random.Random(1).randbytes(64 << 10)
    source.to(DeviceState.PRE_COPY)
    assert waiting(source)[0] > 64 << 10 and waiting(source)[1] == 0
    data = precopied(source)
    assert len(data) > 64 << 10 and waiting(source) == (0, 0) and precopied(source) == b""
    source.device.memory[5 * PAGE] ^= 0xFF
    initial, dirty = waiting(source)
    assert initial == 0 and PAGE < dirty < 3 * PAGE
    data += (changed := precopied(source))
    assert len(changed) == dirty
    source.device.memory[9 * PAGE] ^= 0xFF
    source.to(through)
    source.device.memory[-1] ^= 0xFF
    source.to(DeviceState.STOP_COPY)
    last = precopied(source)
    assert PAGE < len(last) < 5 * PAGE and precopied(source) == b""
    target.to(DeviceState.RESUMING)
    data += last
    for at in range(0, len(data), 777):
        target.migration.write(data[at : at + 777])
    target.to(DeviceState.RUNNING)
    assert target.device.memory == source.device.memory


def test_a_round_of_pre_copy_ends_though_the_device_goes_on_writing() -> None:
    process = Process(Area)
    process.to(DeviceState.PRE_COPY)
    size, rounds = waiting(process)[0], 0
    while len(process.migration.read(1000)) == 1000:
        process.device.memory[rounds * 64 % (64 << 10)] ^= 1
        rounds += 1
    assert rounds == size // 1000


def test_pre_copy_that_was_left_begins_anew() -> None:
    process = Process(Area)
    process.to(DeviceState.PRE_COPY)
    whole = precopied(process)
    process.to(DeviceState.RUNNING)
    assert refusal(lambda: waiting(process)) == refusal(lambda: process.migration.read(10)) == errno.EINVAL
    process.to(DeviceState.PRE_COPY_P2P)
    assert precopied(process) == whole
    process.migration.reset()
    process.to(DeviceState.STOP_COPY)
    assert precopied(process)[:1] != whole[:1], "a stopped device is sent as it is"


def test_a_stream_that_is_cut_or_altered_is_no_state() -> None:
    source, target = Process(Area), Process(Area)
    source.to(DeviceState.PRE_COPY)
    first = precopied(source)
    source.device.memory[7] = 1
    source.to(DeviceState.STOP_COPY)
    data = first + precopied(source)
    far = (1 << 20).to_bytes(8, "big") + (4).to_bytes(4, "big") + bytes(4)
    for wrong in (first, data[:-1], data + b"x", data + data[1:], b"\0" + far, b"\0"):
        target.to(DeviceState.RESUMING)
        target.migration.write(wrong)
        assert refusal(lambda: target.to(DeviceState.STOP)) == errno.EINVAL
        assert target.migration.state is DeviceState.ERROR
        target.migration.reset()
    target.to(DeviceState.RESUMING)
    long = bytes(8) + b"\xff" * 4
    assert refusal(lambda: target.migration.write(b"\0" + long)) == errno.ENOSPC


def test_a_log_has_the_pages_that_were_written_since_it_was_asked() -> None:
    process = Process(DMABurstDevice)
    dma = process.device.dma
    dma.write(0x1000, b"before")
    process.log()
    assert process.written() == set()
    dma.write(0x1FFF, b"ab")
    dma.read(0x9000, bytearray(8))
    dma.write_many([0x1_0000 + n * 0x2000 for n in range(4)], 8, bytes(32))
    assert process.written(0x1000, 0x2000) == {0, 1}
    assert process.written() == {16, 18, 20, 22} and process.written() == set()
    mapping = dma.map(0x4_0000, 2 * PAGE, DMADirection.FROM_DEVICE)
    assert mapping is not None
    dma.unmap(mapping, PAGE + 1)
    assert process.written() == {64, 65}
    for register, value in {burst.IOVA: 0x5_0000, burst.LENGTH: 8, burst.COUNT: 3, burst.STRIDE: PAGE}.items():
        process.device.bar_write(0, register, 8, value)
    process.device.bar_write(0, burst.COMMAND, 8, burst.COMMAND_START | burst.COMMAND_WRITE)
    assert process.written() == {80, 81, 82}
    process.migration.feature(SET | LOG_STOP, b"")
    dma.write(0, b"x")
    process.log()
    assert process.written() == set(), "an old log is gone"
    dma.write(0x2_0000, b"x")
    assert process.written() == {32}


def test_only_what_lies_in_a_logged_range_is_reported() -> None:
    process = Process()
    process.log(1 << 13, ((0x4000, 0x4000), (0x2_0000, 0x1000)))
    process.device.dma.write(0, bytes(0x3_0000))
    assert process.written(0, 1 << 20, 1 << 13) == {2, 3, 16}


def test_a_log_without_ranges_has_every_write_and_reports_pages_of_any_larger_size() -> None:
    process = Process()
    process.log(1 << 16, ())
    process.device.dma.write(5 * PAGE, b"x")
    process.device.dma.write(33 * PAGE, b"x")
    assert process.written(0, 1 << 20, 1 << 16) == {0, 2}
    process.device.dma.write(5 * PAGE, b"x")
    assert process.written(0, 1 << 20, PAGE) == {5}
    assert refusal(lambda: process.written(0, 1 << 20, 2048)) == errno.EINVAL


def test_an_answer_without_room_says_what_it_needs_and_takes_nothing() -> None:
    process = Process()
    process.log()
    process.device.dma.write(5 * PAGE, b"x")
    request = DmaLoggingReport(0, RAM, PAGE).pack()
    with pytest.raises(NoRoom) as short:
        process.migration.feature(GET | LOG_REPORT, request, len(request))
    assert short.value.needed == len(request) + RAM // PAGE // 8
    assert process.written() == {5}
    with pytest.raises(NoRoom):
        process.migration.feature(GET | INFO, b"", 7)


@pytest.mark.parametrize(
    ("control", "ranges"),
    [
        ((0, 1), [(0, PAGE)]),
        ((3000, 1), [(0, PAGE)]),
        ((PAGE, 0), [(0, PAGE)]),
        ((PAGE, 2), [(0, PAGE)]),
        ((PAGE, 1), [(0, 0)]),
        ((PAGE, 1), [(PAGE, U64_MAX)]),
    ],
)
def test_logs_that_cannot_be(control: tuple[int, int], ranges: list[tuple[int, int]]) -> None:
    process = Process()
    data = DmaLoggingControl(*control).pack() + pack_ranges(ranges)
    assert refusal(lambda: process.migration.feature(SET | LOG_START, data)) == errno.EINVAL
    assert refusal(lambda: process.written()) == errno.EINVAL, "it is off"
    process.log()
    assert refusal(process.log) == errno.EINVAL, "it is on"
    for report in ((0, 0, PAGE), (1, PAGE, PAGE), (0, PAGE + 1, PAGE), (0, PAGE, 2 * PAGE), (0, 1 << 40, PAGE)):
        assert refusal(lambda report=report: process.written(*report)) == errno.EINVAL
