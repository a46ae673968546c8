"""Devices with all migration states and with few, moved through them as the machine stops and goes on."""

from __future__ import annotations

import struct
from errno import EINVAL, ENOTTY

import pytest

from vfio_model.uapi.migration import DeviceState, Feature, FeatureFlags, MigrationFlags, MigState
from vfio_model.vfio.migration import load, migration_flags, save, set_states

GET, SET = int(FeatureFlags.VFIO_DEVICE_FEATURE_GET), int(FeatureFlags.VFIO_DEVICE_FEATURE_SET)
STOP_COPY, P2P = MigrationFlags.VFIO_MIGRATION_STOP_COPY, MigrationFlags.VFIO_MIGRATION_P2P


class Device:
    """What it says is ``flags``; None: nothing. It goes where it says that it can."""

    name = "device"

    def __init__(self, flags: int | None, content: bytes = b"") -> None:
        self.flags, self.content = flags, bytearray(content)
        self.states = [DeviceState.RUNNING]
        self._at = 0

    def device_feature(self, flags: int, data: bytes = b"") -> bytes:
        if flags == GET | Feature.VFIO_DEVICE_FEATURE_MIGRATION:
            if self.flags is None:
                raise OSError(ENOTTY, "no such feature")
            return struct.pack("=Q", self.flags)
        assert flags == SET | Feature.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
        state = DeviceState(MigState.unpack(data).device_state)
        if state is DeviceState.RUNNING_P2P and not (self.flags or 0) & P2P:
            raise OSError(EINVAL, "no such state")
        self.states.append(state)
        self._at = 0
        if state is DeviceState.RESUMING:
            self.content.clear()
        return data

    mig_data_limit = 3

    def mig_data_read(self, size: int) -> bytes:
        found = bytes(self.content[self._at : self._at + min(size, 3)])
        self._at += len(found)
        return found

    def mig_data_write(self, data: bytes) -> None:
        self.content += data


@pytest.mark.parametrize(
    ("said", "found"), [(None, STOP_COPY), (1, STOP_COPY), (3, STOP_COPY | P2P), (1 << 40 | 1, STOP_COPY)]
)
def test_what_a_device_says_of_its_states(said: int | None, found: MigrationFlags) -> None:
    assert migration_flags(Device(said)) == found


@pytest.mark.parametrize("flags", [None, 1, 3])
def test_a_state_that_a_device_has_not_is_left_out(flags: int | None) -> None:
    device, full = Device(flags), Device(3)
    set_states([device, full], DeviceState.RUNNING_P2P, DeviceState.STOP)
    between = [DeviceState.RUNNING_P2P] if (flags or 0) & P2P else []
    assert device.states == [DeviceState.RUNNING, *between, DeviceState.STOP]
    assert full.states == [DeviceState.RUNNING, DeviceState.RUNNING_P2P, DeviceState.STOP]


def test_a_state_is_read_to_its_end_and_written_whole() -> None:
    source, target = Device(1, b"what it knows"), Device(1, b"else")
    load(target, save(source))
    assert target.content == b"what it knows"
    assert source.states[1:] == [DeviceState.STOP_COPY, DeviceState.STOP]
    assert target.states[1:] == [DeviceState.RESUMING, DeviceState.STOP]
