"""Memory of a vfio-user device's regions that this process maps: what the server offers, as far as that is true.

A region that can be mapped comes with a descriptor and, if only parts of it can, with a capability that lists them. A
server is not believed: what does not fit the region or the file goes by message. A file that is not sealed against
shrinking is guarded (:mod:`protocols.transport.file_memory`); when it turns out to be shorter, the region goes by
message from then on.

Source: QEMU ``docs/interop/vfio-user.rst`` ("VFIO_USER_DEVICE_GET_REGION_INFO"); ``include/uapi/linux/vfio.h``
(``struct vfio_region_info_cap_sparse_mmap``).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Final

from protocols.transport.file_memory import FileMemory
from protocols.vfio_user.messages import RegionInfo
from vfio_model.trace import Trace
from vfio_model.uapi.vfio import RegionFlags

_MAPPABLE: Final = int(
    RegionFlags.VFIO_REGION_INFO_FLAG_READ
    | RegionFlags.VFIO_REGION_INFO_FLAG_WRITE
    | RegionFlags.VFIO_REGION_INFO_FLAG_MMAP
)
_CAPS: Final = int(RegionFlags.VFIO_REGION_INFO_FLAG_CAPS)
_SPARSE_MMAP: Final = 1
"""``VFIO_REGION_INFO_CAP_SPARSE_MMAP``."""
_CAP_HEADER: Final = struct.Struct("=HHI")
_SPARSE_HEAD: Final = struct.Struct("=HHIII")
_AREA: Final = struct.Struct("=QQ")
_MAX_CAPS: Final = 32
"""Capabilities in a chain; a longer one goes in a circle."""

Areas = list[tuple[int, memoryview]]


class RegionMaps:
    """Of the device ``name``."""

    def __init__(self, name: str, trace: Trace) -> None:
        self._name, self._trace = name, trace
        self._files: dict[int, FileMemory] = {}
        self._areas: dict[int, Areas] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._areas

    def add(self, info: RegionInfo, fds: list[int]) -> None:
        """Map what ``info`` offers of a region; ``fds`` stay the caller's."""
        self._areas[info.index] = []
        if not info.size or info.flags & _MAPPABLE != _MAPPABLE:
            return
        try:
            self._areas[info.index] = self._map(info, fds)
        except (OSError, ValueError) as error:
            self._trace("vfio_user_region_by_message", name=self._name, region=info.index, reason=str(error))

    def _map(self, info: RegionInfo, fds: list[int]) -> Areas:
        if len(fds) != 1:
            raise ValueError(f"{len(fds)} descriptors")
        areas = mmap_areas(info)
        memory = FileMemory(fds[0])
        end = info.offset + max((offset + size for offset, size in areas), default=0)
        if end > memory.size or memory.view.readonly:
            memory.close()
            raise ValueError(f"a file of {memory.size:#x} bytes, {end:#x} needed, or one that cannot be written")
        self._files[info.index] = memory
        return [(offset, memory.view[info.offset + offset : info.offset + offset + size]) for offset, size in areas]

    def of(self, index: int) -> Areas:
        """(offset, bytes) of each area of a region that was added."""
        return list(self._areas[index])

    def vanished(self, index: int) -> bool:
        """Whether an access found the file of a region cut; said once."""
        memory = self._files.get(index)
        if memory is None or not memory.shrunk:
            return False
        self._drop(index)
        return True

    def _drop(self, index: int) -> None:
        self._areas[index] = []
        memory = self._files.pop(index)
        with contextlib.suppress(BufferError):  # who still has a piece of it keeps it
            memory.close()

    def close(self) -> None:
        """Unmap everything. Harmless twice."""
        for index in list(self._files):
            self._drop(index)


def mmap_areas(info: RegionInfo) -> list[tuple[int, int]]:
    """(offset, size) of the areas of a region that can be mapped, ascending and apart: those of its capability, or all
    of it.

    :raise ValueError: the capabilities are broken, or an area does not lie in the region.
    """
    areas = next(_sparse(info), None) if info.flags & _CAPS else None
    if areas is None:
        return [(0, info.size)]
    end = 0
    for offset, size in sorted(area for area in areas if area[1]):
        if offset < end or offset + size > info.size:
            raise ValueError(f"an area of {size:#x} bytes at {offset:#x} overlaps, or leaves {info.size:#x} bytes")
        end = offset + size
    return sorted(area for area in areas if area[1])


def _sparse(info: RegionInfo) -> Iterator[list[tuple[int, int]]]:
    at = info.cap_offset
    for _ in range(_MAX_CAPS):
        if not at:
            return
        start = at - RegionInfo.SIZE
        try:
            if start < 0:
                raise struct.error("it lies in the structure before")
            kind, _, following = _CAP_HEADER.unpack_from(info.caps, start)
            if kind == _SPARSE_MMAP:
                count = _SPARSE_HEAD.unpack_from(info.caps, start)[3]
                first = start + _SPARSE_HEAD.size
                yield list(_AREA.iter_unpack(info.caps[first : first + _exactly(count, len(info.caps) - first)]))
                return
        except struct.error as error:
            raise ValueError(f"a capability at {at:#x} of {info.argsz:#x} bytes: {error}") from error
        at = following
    raise ValueError("the capabilities have no end")


def _exactly(count: int, room: int) -> int:
    if count * _AREA.size > room:
        raise struct.error(f"{count} areas in {room} bytes")
    return int(count * _AREA.size)
