"""``VFIO_DEVICE_FEATURE``: a device's migration states and its own log of what it writes.

Source: Linux ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_FEATURE_MIGRATION" and behind it). Over vfio-user, data that
the uapi points at lies behind the structure (QEMU ``docs/interop/vfio-user.rst``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from vfio_model.uapi.vfio import Struct


class FeatureFlags(IntFlag):
    """What is done with a feature; its number is in the low 16 bits."""

    VFIO_DEVICE_FEATURE_MASK = 0xFFFF
    VFIO_DEVICE_FEATURE_GET = 1 << 16
    VFIO_DEVICE_FEATURE_SET = 1 << 17
    VFIO_DEVICE_FEATURE_PROBE = 1 << 18


class Feature(IntEnum):
    """Numbers of features."""

    VFIO_DEVICE_FEATURE_MIGRATION = 1
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9
    X_MIG_PRECOPY_INFO = 0x8000
    """Ours: what ``VFIO_MIG_GET_PRECOPY_INFO`` answers, an ioctl of a descriptor that vfio-user does not have."""


class MigrationFlags(IntFlag):
    """What VFIO_DEVICE_FEATURE_MIGRATION says."""

    VFIO_MIGRATION_STOP_COPY = 1
    VFIO_MIGRATION_P2P = 2
    VFIO_MIGRATION_PRE_COPY = 4


class DeviceState(IntEnum):
    """``enum vfio_device_mig_state``."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


SAVING: Final = frozenset((DeviceState.STOP_COPY, DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P))
"""The states in which there is data to read. No way leads through one, but for that from PRE_COPY to STOP_COPY."""

ARCS: Final[Mapping[DeviceState, frozenset[DeviceState]]] = {
    DeviceState.RUNNING: frozenset((DeviceState.RUNNING_P2P, DeviceState.PRE_COPY)),
    DeviceState.RUNNING_P2P: frozenset((DeviceState.RUNNING, DeviceState.STOP, DeviceState.PRE_COPY_P2P)),
    DeviceState.PRE_COPY: frozenset((DeviceState.RUNNING, DeviceState.PRE_COPY_P2P)),
    DeviceState.PRE_COPY_P2P: frozenset((DeviceState.RUNNING_P2P, DeviceState.PRE_COPY, DeviceState.STOP_COPY)),
    DeviceState.STOP: frozenset((DeviceState.RUNNING_P2P, DeviceState.STOP_COPY, DeviceState.RESUMING)),
    DeviceState.STOP_COPY: frozenset((DeviceState.STOP,)),
    DeviceState.RESUMING: frozenset((DeviceState.STOP,)),
    DeviceState.ERROR: frozenset(),
}
"""Single steps of a device with STOP_COPY, P2P and PRE_COPY. Only a reset leads out of ERROR; nobody may ask for it."""


def path(before: DeviceState, after: DeviceState) -> list[DeviceState] | None:
    """The states on the shortest way, without ``before``; None when there is no way.

    Nothing leads from STOP_COPY back to PRE_COPY: what was read would not be the state any more.
    """
    if before is DeviceState.STOP_COPY and after in SAVING - {before}:
        return None
    paths: list[list[DeviceState]] = [[before]]
    seen = {before}
    for way in paths:
        here = way[-1]
        if here is after:
            return way[1:]
        through = here is before or here not in SAVING or (before is DeviceState.PRE_COPY and after in SAVING)
        fresh = sorted(ARCS[here] - seen) if through else []
        seen.update(fresh)
        paths += [[*way, state] for state in fresh]
    return None


@dataclass(slots=True)
class MigrationInfo(Struct):
    """``struct vfio_device_feature_migration``."""

    FORMAT = struct.Struct("=Q")
    SIZE = 8
    flags: int = 0


@dataclass(slots=True)
class MigState(Struct):
    """``struct vfio_device_feature_mig_state``; over vfio-user ``data_fd`` means nothing: -1."""

    FORMAT = struct.Struct("=Ii")
    SIZE = 8
    device_state: int = 0
    data_fd: int = -1


@dataclass(slots=True)
class MigDataSize(Struct):
    """``struct vfio_device_feature_mig_data_size``: how much the device would have to say, about, in bytes."""

    FORMAT = struct.Struct("=Q")
    SIZE = 8
    stop_copy_length: int = 0


@dataclass(slots=True)
class PreCopyInfo(Struct):
    """``struct vfio_precopy_info``: estimates in bytes of what there is to read in PRE_COPY, of the first data and of
    what changed since.
    """

    FORMAT = struct.Struct("=IIQQ")
    SIZE = 24
    argsz: int = 24
    flags: int = 0
    initial_bytes: int = 0
    dirty_bytes: int = 0


@dataclass(slots=True)
class DmaLoggingControl(Struct):
    """``struct vfio_device_feature_dma_logging_control`` without its pointer: the ranges lie behind it."""

    FORMAT = struct.Struct("=QII")
    SIZE = 16
    page_size: int = 0
    num_ranges: int = 0
    reserved: int = 0


@dataclass(slots=True)
class DmaLoggingReport(Struct):
    """``struct vfio_device_feature_dma_logging_report`` without its pointer: in the answer the bitmap lies behind
    it."""

    FORMAT = struct.Struct("=QQQ")
    SIZE = 24
    iova: int = 0
    length: int = 0
    page_size: int = 0


_RANGE = struct.Struct("=QQ")


def pack_ranges(ranges: list[tuple[int, int]]) -> bytes:
    """(iova, length) pairs, as they lie behind a :class:`DmaLoggingControl`."""
    return b"".join(_RANGE.pack(iova, length) for iova, length in ranges)


def unpack_ranges(data: bytes) -> Iterator[tuple[int, int]]:
    """What :func:`pack_ranges` was given; ``data`` holds whole pairs."""
    return _RANGE.iter_unpack(data)
