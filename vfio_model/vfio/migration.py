"""An assigned or remote device's own state, moved from where it was to where it goes on.

::

    source:       RUNNING ─► RUNNING_P2P (all devices) ─► STOP ─► STOP_COPY: read everything ─► STOP
    destination:  RUNNING ─► RESUMING: write everything ─► STOP ─► RUNNING_P2P (all devices) ─► RUNNING

The bytes mean something to devices of the same kind alone. They are one section of the machine's stream for each
function, after everything that the guest's memory and IOMMU are made of.

Source: ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE").
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, Protocol, runtime_checkable

from vfio_model.errors import VMStateError
from vfio_model.uapi.migration import DeviceState, Feature, FeatureFlags, MigrationFlags, MigState
from vfio_model.vfio.dirty_source import FeatureDevice, has_feature
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

_KNOWN_FLAGS: Final = int(
    MigrationFlags.VFIO_MIGRATION_STOP_COPY | MigrationFlags.VFIO_MIGRATION_P2P | MigrationFlags.VFIO_MIGRATION_PRE_COPY
)
DATA_CHUNK: Final = 256 << 10
"""Bytes of one message."""
DEVICE_STATE: Final = VMStateDescription(
    "vfio-pci/device", 1, (Field("length"), Field("data", Type.U8, array="length"))
)
"""What a device says of itself."""


@runtime_checkable
class MigratingDevice(FeatureDevice, Protocol):
    """A connection to a device that may have a state to give."""

    def mig_data_read(self, size: int) -> bytes:
        """The next at most ``size`` bytes in STOP_COPY; none at the end. :raise OSError: EINVAL elsewhere."""

    def mig_data_write(self, data: bytes) -> None:
        """More of the state in RESUMING. :raise OSError: EINVAL elsewhere."""


def migrating(device: VFIOPCIDevice) -> MigratingDevice:
    """The connection behind ``device``.

    :raise VMStateError: it has no migration states, or is gone.
    """
    connection = device.connection
    feature = Feature.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, FeatureFlags.VFIO_DEVICE_FEATURE_SET
    if device.dead is not None:
        raise VMStateError(str(device.dead), where=device.name)
    if not isinstance(connection, MigratingDevice) or not has_feature(connection, *feature):
        raise VMStateError("the device behind it does not support migration", where=device.name)
    return connection


def migration_flags(device: MigratingDevice) -> MigrationFlags:
    """Which states there are besides STOP and RUNNING: ``VFIO_DEVICE_FEATURE_MIGRATION``."""
    flags = int(FeatureFlags.VFIO_DEVICE_FEATURE_GET) | Feature.VFIO_DEVICE_FEATURE_MIGRATION
    try:
        (found,) = struct.unpack_from("=Q", device.device_feature(flags))
    except (OSError, struct.error):
        return MigrationFlags.VFIO_MIGRATION_STOP_COPY
    return MigrationFlags(found & _KNOWN_FLAGS)


def set_state(device: MigratingDevice, state: DeviceState) -> None:
    """RUNNING_P2P is left out where the device has no such state.

    :raise OSError: EINVAL when the device cannot go there, or did not take what was written.
    """
    p2p = MigrationFlags.VFIO_MIGRATION_P2P
    if state is DeviceState.RUNNING_P2P and p2p not in migration_flags(device):
        return
    flags = int(FeatureFlags.VFIO_DEVICE_FEATURE_SET) | Feature.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
    device.device_feature(flags, MigState(state).pack())


def set_states(devices: Iterable[MigratingDevice], *states: DeviceState) -> None:
    """Every device to the first of ``states``, then every device to the next. :raise OSError: as :func:`set_state`."""
    devices = list(devices)
    for state in states:
        for device in devices:
            set_state(device, state)


def save(device: MigratingDevice) -> State:
    """The state of a stopped device, as :data:`DEVICE_STATE` has it. :raise OSError: it does not give it."""
    set_state(device, DeviceState.STOP_COPY)
    data = bytearray()
    while part := device.mig_data_read(DATA_CHUNK):
        data += part
    set_state(device, DeviceState.STOP)
    return {"length": len(data), "data": bytes(data)}


def load(device: MigratingDevice, state: State) -> None:
    """Give a state that :func:`save` took; the device is stopped then. :raise OSError: EINVAL, it is none of its."""
    set_state(device, DeviceState.RESUMING)
    data = bytes(state["data"])
    for at in range(0, len(data), DATA_CHUNK):
        device.mig_data_write(data[at : at + DATA_CHUNK])
    set_state(device, DeviceState.STOP)
