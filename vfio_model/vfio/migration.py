"""An assigned or remote device's own state, moved from where it was to where it goes on.

::

    source:       RUNNING ─► RUNNING_P2P (all devices) ─► STOP ─► STOP_COPY: read everything ─► STOP
                  RUNNING ─► PRE_COPY: read what there is, again and again
                               └─► PRE_COPY_P2P (all devices) ─► STOP_COPY: read the rest ─► STOP
    destination:  RUNNING ─► RESUMING: write everything ─► STOP ─► RUNNING_P2P (all devices) ─► RUNNING

The bytes mean something to devices of the same kind alone. They are one section of the machine's stream for each
function, after everything that the guest's memory and IOMMU are made of; what a device with PRE_COPY says while the
guest runs goes before, among the passes over RAM. vfio-user has no message for ``VFIO_MIG_GET_PRECOPY_INFO``: there is
as much as can be read, and a device of this project is asked by a feature.

Source: ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE").
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator
from typing import Final, Protocol, runtime_checkable

from vfio_model.errors import VMStateError
from vfio_model.uapi.migration import DeviceState, Feature, FeatureFlags, MigrationFlags, MigState, PreCopyInfo
from vfio_model.vfio.dirty_source import FeatureDevice, has_feature
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

_KNOWN_FLAGS: Final = int(
    MigrationFlags.VFIO_MIGRATION_STOP_COPY | MigrationFlags.VFIO_MIGRATION_P2P | MigrationFlags.VFIO_MIGRATION_PRE_COPY
)
DATA_CHUNK: Final = 256 << 10
"""Bytes of one message."""
MAX_EARLY: Final = 256 << 20
"""Bytes that are read of a device before it stands; what it has to say beyond them waits."""
DEVICE_STATE: Final = VMStateDescription(
    "vfio-pci/device",
    2,
    (Field("length"), Field("data", Type.U8, array="length"), Field("early", Type.U64, since=2)),
)
"""What a device says of itself. ``early``: of what came before the machine stood, how many bytes this goes on from; 0
if it is everything.
"""
_GET, _SET = int(FeatureFlags.VFIO_DEVICE_FEATURE_GET), int(FeatureFlags.VFIO_DEVICE_FEATURE_SET)
_P2P: Final = frozenset((DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P))
_STILL_SAVING: Final = {DeviceState.RUNNING_P2P: DeviceState.PRE_COPY_P2P, DeviceState.STOP: DeviceState.STOP_COPY}
"""Where a device in PRE_COPY goes while the others rest."""


@runtime_checkable
class MigratingDevice(FeatureDevice, Protocol):
    """A connection to a device that may have a state to give."""

    @property
    def mig_data_limit(self) -> int:
        """Bytes that it gives or takes at a time, at most."""

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
    try:
        (found,) = struct.unpack_from("=Q", device.device_feature(_GET | Feature.VFIO_DEVICE_FEATURE_MIGRATION))
    except (OSError, struct.error):
        return MigrationFlags.VFIO_MIGRATION_STOP_COPY
    return MigrationFlags(found & _KNOWN_FLAGS)


def set_state(device: MigratingDevice, state: DeviceState) -> None:
    """RUNNING_P2P and PRE_COPY_P2P are left out where the device has no such state.

    :raise OSError: EINVAL when the device cannot go there, or did not take what was written.
    """
    if state in _P2P and MigrationFlags.VFIO_MIGRATION_P2P not in migration_flags(device):
        return
    device.device_feature(_SET | Feature.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, MigState(state).pack())


def set_states(
    devices: Iterable[MigratingDevice], *states: DeviceState, saving: Collection[MigratingDevice] = ()
) -> None:
    """Every device to the first of ``states``, then every device to the next; those of ``saving``, which are in
    PRE_COPY, to the state like it in which they go on saying what they have to say.

    :raise OSError: as :func:`set_state`.
    """
    devices = list(devices)
    for state in states:
        for device in devices:
            set_state(device, _STILL_SAVING[state] if device in saving else state)


class PreCopy:
    """``device``, which runs, in PRE_COPY. :attr:`sent` bytes were read so far.

    :raise OSError: it does not go there.
    """

    def __init__(self, device: MigratingDevice) -> None:
        self.device = device
        self.sent = 0
        set_state(device, DeviceState.PRE_COPY)

    @property
    def goes_on(self) -> bool:
        """Whether it still is in PRE_COPY; a device that was reset or stopped in between has to say everything anew.

        :raise PeerLost: it is gone.
        """
        try:
            answer = self.device.device_feature(_GET | Feature.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE)
            return MigState.unpack(answer).device_state == DeviceState.PRE_COPY
        except (OSError, struct.error):
            return False

    def read(self) -> Iterator[bytes]:
        """What there is at present: the device says less than it was asked for when there is no more of it, and has
        something to say again at once, perhaps.

        :raise OSError: EINVAL when it is not in PRE_COPY any more.
        """
        size = part_size = min(DATA_CHUNK, self.device.mig_data_limit)
        while self.sent < MAX_EARLY and part_size == size:
            part = self.device.mig_data_read(size)
            part_size = len(part)
            self.sent += part_size
            if part:
                yield part

    def waiting(self) -> int:
        """Bytes that it could say, as far as it tells. :raise PeerLost: it is gone."""
        if self.sent >= MAX_EARLY:
            return 0
        try:
            info = PreCopyInfo.unpack(self.device.device_feature(_GET | Feature.X_MIG_PRECOPY_INFO))
        except (OSError, struct.error):
            return 0
        return info.initial_bytes + info.dirty_bytes

    def leave(self) -> None:
        """It runs as before, unless it has left already. :raise OSError: it does not. :raise PeerLost: it is gone."""
        if self.goes_on:
            set_state(self.device, DeviceState.RUNNING)


def save(device: MigratingDevice, early: int | None = None) -> State:
    """The state of a stopped device, as :data:`DEVICE_STATE` has it; one that came from PRE_COPY, where ``early`` bytes
    were read, is in STOP_COPY already.

    :raise OSError: it does not give it.
    """
    if early is None:
        set_state(device, DeviceState.STOP_COPY)
    data = bytearray()
    while part := device.mig_data_read(DATA_CHUNK):
        data += part
    set_state(device, DeviceState.STOP)
    return {"length": len(data), "data": bytes(data), "early": early or 0}


def load(device: MigratingDevice, state: State, early: bytes | bytearray = b"") -> None:
    """Give a state that :func:`save` took, and ``early``, what was read before; the device is stopped then.

    :raise OSError: EINVAL, it is none of its. :raise VMStateError: it goes on from something else than ``early``.
    """
    if state["early"] not in (0, len(early)):
        raise VMStateError(f"goes on from {state['early']} bytes; {len(early)} have come", where=device.name)
    set_state(device, DeviceState.RESUMING)
    data = bytes(early[: state["early"]]) + bytes(state["data"])
    for at in range(0, len(data), DATA_CHUNK):
        device.mig_data_write(data[at : at + DATA_CHUNK])
    set_state(device, DeviceState.STOP)
