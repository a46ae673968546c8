"""``VFIO_DEVICE_FEATURE`` of a device process: its migration states, its state as data, and the log of its writes.

::

    PRE_COPY ◄──► PRE_COPY_P2P ───────────────┐
       ▲ │             ▲ │                    ▼
       │ ▼             │ ▼                STOP_COPY (the state is read)
    RUNNING ◄───► RUNNING_P2P ◄──► STOP ◄────►┘
                                    ▲ │
                                    │ └────► RESUMING  (a state is written) ──► STOP: it is taken

A request names where to go, and the device takes every step on the way; a step that fails leaves it where it came to,
or, when a state that was written cannot be taken, in ERROR, out of which only a reset leads. A device that stands does
nothing by itself: idle work rests, no timer fires and no network is heard. No device here does peer-to-peer DMA without
being told.

The data is one section: the name and version of the device's described state, and the state; read from PRE_COPY on, it
is that section and what changes of it until the device stands (:mod:`hostd.device_image`).

Source: ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"); QEMU ``docs/interop/vfio-user.rst``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from hostd.device_image import STREAM, ImageReader, ImageWriter
from vfio_model.errors import ConfigError, VMStateError
from vfio_model.memory.dma import BLOCKED, DMAImpl
from vfio_model.memory.dma_log import DmaLog, LoggedDma
from vfio_model.pci.device import PCIDevice
from vfio_model.ranges import U64_MAX, Range
from vfio_model.trace import Trace
from vfio_model.uapi.migration import (
    SAVING,
    DeviceState,
    DmaLoggingControl,
    DmaLoggingReport,
    Feature,
    FeatureFlags,
    MigDataSize,
    MigrationFlags,
    MigrationInfo,
    MigState,
    PreCopyInfo,
    path,
    unpack_ranges,
)
from vfio_model.uapi.vfio import dirty_bitmap_bytes
from vfio_model.vmstate.fields import decode, encode
from vfio_model.vmstate.stream import Frame, FrameKind, Section

MAX_STATE: Final = 64 << 20
"""Bytes of a device's state that are taken, besides the memory in its BARs."""
MAX_REPORT: Final = 1 << 22
"""Pages that one report is about."""
LOG_PAGE: Final = 4096
"""The log knows pages at least so fine, whatever was asked for: a report may be about any larger ones."""
_GET, _SET, _PROBE = (
    FeatureFlags.VFIO_DEVICE_FEATURE_GET,
    FeatureFlags.VFIO_DEVICE_FEATURE_SET,
    FeatureFlags.VFIO_DEVICE_FEATURE_PROBE,
)
_LOGGING = frozenset(
    (
        Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
        Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
        Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    )
)
_PRE_COPY = frozenset((DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P))
_RUNS = (DeviceState.RUNNING, DeviceState.RUNNING_P2P, DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P)


class NoRoom(Exception):
    """An answer is longer than its receiver takes: :attr:`needed` bytes."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        super().__init__(f"an answer of {needed} bytes")


class DeviceMigration:
    """Of ``device``. ``logs``: whether it can log what it writes (its DMA ends in this process)."""

    def __init__(self, device: PCIDevice, trace: Trace, *, logs: bool) -> None:
        self._device, self._trace = device, trace
        self.state = DeviceState.RUNNING
        self._saved, self._read_to = b"", 0
        self._early: ImageWriter | None = None
        """What is read since the device is or was in PRE_COPY."""
        self._written = bytearray()
        self._built: ImageReader | None = None
        self._impl: DMAImpl = BLOCKED
        self._log: DmaLog | None = None
        self._room = U64_MAX
        self._limit = MAX_STATE + sum(size for bar in device.BARS for _, size in bar.mmap)
        get_set = _GET | _SET
        self._features: dict[Feature, tuple[FeatureFlags, Callable[[FeatureFlags, bytes], bytes]]] = {}
        if device.VMSTATE is not None:
            self._features |= {
                Feature.VFIO_DEVICE_FEATURE_MIGRATION: (_GET, self._info),
                Feature.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: (get_set, self._device_state),
                Feature.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: (_GET, self._data_size),
                Feature.X_MIG_PRECOPY_INFO: (_GET, self._precopy_info),
            }
        if logs:
            self._features |= {
                Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_START: (_SET, self._start_log),
                Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: (_SET, self._stop_log),
                Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: (_GET, self._report),
            }

    @property
    def runs(self) -> bool:
        """Whether the device may do something by itself."""
        return self.state in _RUNS

    def check(self) -> None:
        """Whether the device, realized, gives the state that it describes: better known now than when it shall move.

        :raise ConfigError: it does not.
        """
        if self._device.VMSTATE is not None:
            try:
                self._encoded()
            except VMStateError as error:
                raise ConfigError(str(error), where=f"{type(self._device).__name__}.export_state") from error

    def attach_dma(self, impl: DMAImpl) -> None:
        """Give the device its address space, through the log while one runs."""
        self._impl = impl
        self._device.attach_dma(impl if self._log is None else LoggedDma(impl, self._log))

    def reset(self) -> None:
        """The device was reset: it runs, whatever its state was."""
        self.state = DeviceState.RUNNING
        self._forget()

    def abandon(self) -> None:
        """The client that migrated or logged is gone: nothing is logged, and the device runs unless it is in ERROR."""
        self._log = None
        if self.state is not DeviceState.ERROR:
            self.state = DeviceState.RUNNING
        self._forget()

    def feature(self, flags: int, data: bytes, room: int = U64_MAX) -> bytes:
        """``VFIO_DEVICE_FEATURE``: the data of the answer, which has ``room`` bytes. To what sets or probes the answer
        is what came.

        :raise NoRoom: when it does not fit; nothing has happened.

        :raise OSError: ENOTTY for a feature that is not there, EINVAL for flags or data that do not fit it.
        """
        try:
            allowed, handler = self._features[Feature(flags & FeatureFlags.VFIO_DEVICE_FEATURE_MASK)]
        except (ValueError, KeyError):
            raise OSError(errno.ENOTTY, f"feature {flags & 0xFFFF}") from None
        asked = FeatureFlags(flags & (_GET | _SET | _PROBE))
        wanted = asked & ~_PROBE
        if flags >> 19 or wanted & ~allowed or (not asked & _PROBE and wanted not in (_GET, _SET)):
            raise OSError(errno.EINVAL, f"flags {flags:#x}")
        if asked & _PROBE:
            return data
        self._room = room
        answer = handler(wanted, data)
        if len(answer) > room and wanted is _GET:
            raise NoRoom(len(answer))
        return answer if wanted is _GET else data

    # -- states ------------------------------------------------------------------------------------------------------

    def _info(self, _flags: FeatureFlags, _data: bytes) -> bytes:
        flags = MigrationFlags.VFIO_MIGRATION_STOP_COPY | MigrationFlags.VFIO_MIGRATION_P2P
        return MigrationInfo(flags | MigrationFlags.VFIO_MIGRATION_PRE_COPY).pack()

    def _data_size(self, _flags: FeatureFlags, _data: bytes) -> bytes:
        return MigDataSize(len(self._encoded())).pack()

    def _precopy_info(self, _flags: FeatureFlags, _data: bytes) -> bytes:
        if self._early is None or self.state not in _PRE_COPY:
            raise OSError(errno.EINVAL, f"no pre-copy while {self.state.name}")
        initial, dirty = self._early.estimate(self._encoded())
        return PreCopyInfo(initial_bytes=initial, dirty_bytes=dirty).pack()

    def _device_state(self, flags: FeatureFlags, data: bytes) -> bytes:
        if flags is _SET:
            if len(data) < MigState.SIZE:
                raise OSError(errno.EINVAL, f"{len(data)} bytes of state")
            self.set_state(MigState.unpack(data).device_state)
        return MigState(self.state).pack()

    def set_state(self, wanted: int) -> None:
        """Go to state number ``wanted``, step by step.

        :raise OSError: EINVAL when it is none, cannot be asked for, or what was written is no state of this device.
        """
        try:
            way = path(self.state, DeviceState(wanted))
        except ValueError:
            way = None
        if way is None or (wanted != self.state and wanted == DeviceState.ERROR):
            raise OSError(errno.EINVAL, f"from {self.state.name} there is no way to state {wanted}")
        for step in way:
            self._step(step)

    def _step(self, after: DeviceState) -> None:
        before = self.state
        if before is DeviceState.RESUMING and (self._written or self._built):
            try:
                self._take(self._built.image() if self._built else bytes(self._written))
            except VMStateError as error:
                self.state = DeviceState.ERROR
                self._trace("migration_state_refused", reason=str(error))
                raise OSError(errno.EINVAL, str(error)) from error
        goes_on = self._early if before in SAVING and after in SAVING else None
        self._forget()
        self.state = after
        if after in _PRE_COPY:
            self._early = goes_on or ImageWriter()
        elif after is DeviceState.STOP_COPY and goes_on is not None:
            goes_on.finish(self._encoded())
            self._early = goes_on
        elif after is DeviceState.STOP_COPY:
            self._saved = self._encoded()
        self._trace("migration_state", before=before.name, after=after.name)

    def _forget(self) -> None:
        self._saved, self._read_to, self._early = b"", 0, None
        self._written.clear()
        self._built = None

    # -- data --------------------------------------------------------------------------------------------------------

    def _encoded(self) -> bytes:
        description = self._device.VMSTATE
        assert description is not None, "without it there are no such features"
        return Section(
            description.name, 0, description.version, encode(description, self._device.export_state())
        ).pack()

    def _take(self, data: bytes) -> None:
        device, description = self._device, self._device.VMSTATE
        assert description is not None, "without it there are no such features"
        section = Section.unpack(Frame(FrameKind.SECTION, data, 0))
        if section.name != description.name:
            raise VMStateError(f"the state of a {section.name}; this is a {description.name}", where="device state")
        state = decode(description, section.version, section.data, device.export_state(), where=section.where)
        device.check_state(state, where=section.where)
        device.reset()  # whatever it was about to do, it is another one now
        device.import_state(state)

    def read(self, size: int) -> bytes:
        """MIG_DATA_READ: the next ``size`` bytes, fewer when there are no more, in PRE_COPY for now.

        :raise OSError: EINVAL unless it saves.
        """
        if self.state not in SAVING:
            raise OSError(errno.EINVAL, f"no state to read while {self.state.name}")
        if self._early is not None:
            if self.state in _PRE_COPY and not self._early.in_round:
                self._early.begin_round(self._encoded())
            return self._early.read(size)
        part = self._saved[self._read_to : self._read_to + size]
        self._read_to += len(part)
        return part

    def write(self, data: bytes) -> None:
        """MIG_DATA_WRITE: more of a state.

        :raise OSError: EINVAL outside RESUMING; ENOSPC when it becomes too long.
        """
        if self.state is not DeviceState.RESUMING:
            raise OSError(errno.EINVAL, f"no state is taken while {self.state.name}")
        if self._built is None and not self._written and data.startswith(STREAM):
            self._built, data = ImageReader(self._limit), data[len(STREAM) :]
        if self._built is not None:
            self._build(self._built, data)
            return
        if len(self._written) + len(data) > self._limit:
            raise OSError(errno.ENOSPC, f"more than {self._limit} bytes of state")
        self._written += data

    def _build(self, image: ImageReader, data: bytes) -> None:
        try:
            image.feed(data)
        except OverflowError as error:
            raise OSError(errno.ENOSPC, f"more than {self._limit} bytes of state: {error}") from error

    # -- the log -----------------------------------------------------------------------------------------------------

    def _start_log(self, _flags: FeatureFlags, data: bytes) -> bytes:
        control = DmaLoggingControl.unpack(data) if len(data) >= DmaLoggingControl.SIZE else DmaLoggingControl()
        pairs = data[DmaLoggingControl.SIZE :]
        page = control.page_size
        if self._log is not None or page < 1 or page & (page - 1) or len(pairs) != 16 * control.num_ranges:
            raise OSError(errno.EINVAL, "logging runs, or not a page size and ranges")
        ranges = [] if control.num_ranges else [Range(0, U64_MAX)]
        for iova, length in unpack_ranges(pairs):
            if not length or iova + length - 1 > U64_MAX:
                raise OSError(errno.EINVAL, f"{length:#x} bytes from {iova:#x} cannot be logged")
            ranges.append(Range.sized(iova, length))
        self._log = DmaLog(min(page, LOG_PAGE), ranges)
        self.attach_dma(self._impl)
        return b""

    def _stop_log(self, _flags: FeatureFlags, _data: bytes) -> bytes:
        if self._log is not None:
            self._log = None
            self.attach_dma(self._impl)
        return b""

    def _report(self, _flags: FeatureFlags, data: bytes) -> bytes:
        if len(data) != DmaLoggingReport.SIZE or self._log is None:
            raise OSError(errno.EINVAL, "logging is off, or not a range")
        report, log = DmaLoggingReport.unpack(data), self._log
        page = report.page_size
        if page < log.page_size or page & (page - 1) or (report.iova | report.length) % page:
            raise OSError(errno.EINVAL, f"pages of {log.page_size} bytes are logged")
        pages = report.length // page
        if not 0 < pages <= MAX_REPORT or report.iova + report.length - 1 > U64_MAX:
            raise OSError(errno.EINVAL, f"a report on {pages} pages")
        size = dirty_bitmap_bytes(pages)
        if len(data) + size > self._room:
            raise NoRoom(len(data) + size)
        bitmap = bytearray(size)
        finer = page // log.page_size
        for number in log.take(report.iova, report.length):
            number //= finer
            bitmap[number >> 3] |= 1 << (number & 7)
        return data + bytes(bitmap)
