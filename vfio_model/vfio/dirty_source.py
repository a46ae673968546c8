"""Who knows which bus addresses the devices behind a container have written, and the choice among them.

::

    every device logs what it writes, and none was told not to ─► the devices (VFIO_DEVICE_FEATURE_DMA_LOGGING_*)
    else the container tracks dirty pages (type1v2) ─► the container (VFIO_IOMMU_DIRTY_PAGES)
    else (sPAPR: its containers track nothing) ─► nobody: all that is mapped counts as written, always

A bitmap has one bit for each page of :attr:`DirtySource.page` bytes, least significant first. Asking clears.

Sources: ``include/uapi/linux/vfio.h``; QEMU's ``docs/devel/migration/vfio.rst``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

from vfio_model.errors import PeerLost
from vfio_model.ranges import U32_MAX, U64_MAX
from vfio_model.uapi.migration import (
    DmaLoggingControl,
    DmaLoggingReport,
    Feature,
    FeatureFlags,
    pack_ranges,
)
from vfio_model.uapi.vfio import dirty_bitmap_bytes
from vfio_model.vfio.container import MappingBackend
from vfio_model.vfio.type1 import Type1

DEVICE_PAGE: Final = 1 << 12
"""Bytes of the pages that devices are asked about: no IOMMU here has smaller ones."""
LOGGED_RANGES: Final = ((0, U32_MAX + 1), (U32_MAX + 1, U64_MAX - U32_MAX))
"""(iova, length) of what devices log: a guest with an IOMMU may open a window anywhere while it is being migrated."""
_REPORT_PAGES: Final = 1 << 22
"""Pages that one question is about: 512 KiB of bitmap."""


class DirtySource(Protocol):
    """See the module's head. Every method may raise ``OSError``, or PeerLost where the host is gone."""

    @property
    def page(self) -> int:
        """Bytes that one bit stands for."""

    def start(self) -> None:
        """Every write from the return on will be found."""

    def stop(self) -> None:
        """Nothing is noted any more."""

    def query(self, iova: int, size: int) -> bytes:
        """The bitmap of mapped pages, which go on being mapped."""

    def unmap(self, iova: int, size: int) -> bytes:
        """Unmap; the bitmap of what was written until no write could happen any more."""


@runtime_checkable
class FeatureDevice(Protocol):
    """A connection to a device that has features."""

    @property
    def name(self) -> str:
        """For messages."""

    def device_feature(self, flags: int, data: bytes = b"") -> bytes:
        """``VFIO_DEVICE_FEATURE``: ``flags`` are the number and :class:`~vfio_model.uapi.migration.FeatureFlags`; the
        data of the answer.

        :raise OSError: ENOTTY when there is no such feature, and as the feature says.
        """


def has_feature(device: FeatureDevice, feature: Feature, flags: FeatureFlags) -> bool:
    """Whether ``device`` says that it has it. :raise PeerLost: it is gone."""
    try:
        device.device_feature(int(FeatureFlags.VFIO_DEVICE_FEATURE_PROBE | flags) | feature)
    except OSError:
        return False
    return True


class ContainerDirty:
    """A type 1 container of version 2."""

    def __init__(self, backend: Type1) -> None:
        self._backend, self.page = backend, backend.host_page_size

    def start(self) -> None:
        """``VFIO_IOMMU_DIRTY_PAGES``."""
        self._backend.set_dirty_page_tracking(True)

    def stop(self) -> None:
        """The same."""
        self._backend.set_dirty_page_tracking(False)

    def query(self, iova: int, size: int) -> bytes:
        """The same."""
        return self._backend.query_dirty_bitmap(iova, size)

    def unmap(self, iova: int, size: int) -> bytes:
        """``VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP``."""
        return self._backend.unmap_dirty_bitmap(iova, size)


class DeviceDirty:
    """The logs of all ``devices`` behind ``backend``, one over the other."""

    page = DEVICE_PAGE

    def __init__(self, backend: MappingBackend, devices: Sequence[FeatureDevice]) -> None:
        self._backend, self._devices = backend, tuple(devices)

    def start(self) -> None:
        """Start every device's log; where one does not, none goes on. :raise OSError: as that one does."""
        data = DmaLoggingControl(self.page, len(LOGGED_RANGES)).pack() + pack_ranges(list(LOGGED_RANGES))
        for number, device in enumerate(self._devices):
            try:
                _set(device, Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, data)
            except (OSError, PeerLost):
                self._stop(self._devices[:number])
                raise

    def stop(self) -> None:
        """End every log; one that is gone has ended."""
        self._stop(self._devices)

    @staticmethod
    def _stop(devices: Sequence[FeatureDevice]) -> None:
        for device in devices:
            with contextlib.suppress(OSError, PeerLost):
                _set(device, Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP)

    def query(self, iova: int, size: int) -> bytes:
        """Ask each device; of one that does not answer everything counts as written."""
        found = bytearray(dirty_bitmap_bytes(size // self.page))
        step = _REPORT_PAGES * self.page
        for first in range(iova, iova + size, step):
            at = (first - iova) // self.page >> 3
            for device in self._devices:
                bits = self._report(device, first, min(step, iova + size - first))
                merged = int.from_bytes(found[at : at + len(bits)], "little") | int.from_bytes(bits, "little")
                found[at : at + len(bits)] = merged.to_bytes(len(bits), "little")
        return bytes(found)

    def _report(self, device: FeatureDevice, iova: int, size: int) -> bytes:
        flags = int(FeatureFlags.VFIO_DEVICE_FEATURE_GET) | Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
        request = DmaLoggingReport(iova, size, self.page).pack()
        try:
            return device.device_feature(flags, request)[len(request) :]
        except (OSError, PeerLost):
            return _all_ones(size // self.page)

    def unmap(self, iova: int, size: int) -> bytes:
        """Unmap, then ask: no device writes there any more, and each has noted what it wrote."""
        self._backend.container.unmap_dma(iova, size)
        return self.query(iova, size)


class EverythingDirty:
    """Nobody tracks: what is mapped may have been written at any time."""

    page = DEVICE_PAGE

    def __init__(self, backend: MappingBackend) -> None:
        self._backend = backend

    def start(self) -> None:
        """Nothing is to be done."""

    def stop(self) -> None:
        """Nothing is to be done."""

    def query(self, iova: int, size: int) -> bytes:
        """All of it."""
        return _all_ones(size // self.page)

    def unmap(self, iova: int, size: int) -> bytes:
        """All of it."""
        self._backend.container.unmap_dma(iova, size)
        return _all_ones(size // self.page)


def choose_source(backend: MappingBackend, devices: Sequence[FeatureDevice | None]) -> DirtySource:
    """Who is asked for ``backend``'s ``devices``, all that are behind it: None for one that is not to be asked, or has
    no features.
    """
    logging = Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, FeatureFlags.VFIO_DEVICE_FEATURE_SET
    able = [device for device in devices if device is not None and has_feature(device, *logging)]
    if able and len(able) == len(devices):
        return DeviceDirty(backend, able)
    if isinstance(backend, Type1) and backend.kind == "type1v2" and backend.dirty_pages_supported:
        return ContainerDirty(backend)
    return EverythingDirty(backend)


def _set(device: FeatureDevice, feature: Feature, data: bytes = b"") -> None:
    device.device_feature(int(FeatureFlags.VFIO_DEVICE_FEATURE_SET) | feature, data)


def _all_ones(pages: int) -> bytes:
    return ((1 << pages) - 1).to_bytes(dirty_bitmap_bytes(pages), "little")
