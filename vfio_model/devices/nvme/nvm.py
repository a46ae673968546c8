"""nvme: the NVM command set (NVM Express Base Specification 1.4, chapter 6)."""

from __future__ import annotations

from collections.abc import Mapping

from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.controller import MAX_RANGE, Controller, Handler
from vfio_model.devices.nvme.namespace import Namespace, status_of
from vfio_model.devices.nvme.regs import Command, NvmOpcode, Status

VERIFY_CHUNK = 1 << 20
"""Bytes that Verify reads at a time."""

Extent = tuple[Namespace, int, int]
"""A namespace, and offset and length in bytes on its disk."""


def _extent(controller: Controller, command: Command, most: int) -> Extent | Status:
    """The blocks that ``command`` names, when they are all there and no more than ``most`` bytes."""
    namespace = controller.namespaces.get(command.nsid)
    if namespace is None:
        return Status.INVALID_NAMESPACE
    first, count = command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1
    shift = namespace.shift
    if count << shift > most:
        return Status.INVALID_FIELD
    if first + count > namespace.blocks:
        return Status.LBA_OUT_OF_RANGE
    return namespace, first << shift, count << shift


def _failed(controller: Controller, error: OSError, usual: Status) -> Status:
    controller.health.media_errors += 1
    return status_of(error, usual)


def _written(controller: Controller, command: Command, namespace: Namespace, length: int) -> None:
    """Blocks were written. :raise OSError: they cannot be made stable, and have to."""
    if command.cdw12 & regs.RW_FUA or not namespace.write_cache:
        namespace.disk.flush()
    health = controller.health
    health.writes += 1
    health.bytes_written += length


def read(controller: Controller, command: Command) -> int:
    """Section 6.9, "Read command"."""
    extent = _extent(controller, command, controller.max_transfer)
    if isinstance(extent, Status):
        return extent
    namespace, offset, length = extent
    memory, health = controller.memory, controller.health
    data = memory.buffer(length)
    try:
        namespace.disk.read(offset, data)
    except OSError as error:
        return _failed(controller, error, Status.UNRECOVERED_READ_ERROR)
    health.reads += 1
    health.bytes_read += length
    return memory.to_host(command, data)


def write(controller: Controller, command: Command) -> int:
    """Section 6.14, "Write command"."""
    extent = _extent(controller, command, controller.max_transfer)
    if isinstance(extent, Status):
        return extent
    namespace, offset, length = extent
    memory = controller.memory
    data = memory.buffer(length)
    status = memory.from_host(command, data)
    if status:
        return status
    try:
        namespace.disk.write(offset, data)
        _written(controller, command, namespace, length)
    except OSError as error:
        return _failed(controller, error, Status.WRITE_FAULT)
    return 0


def compare(controller: Controller, command: Command) -> int:
    """Section 6.6, "Compare command"."""
    extent = _extent(controller, command, controller.max_transfer)
    if isinstance(extent, Status):
        return extent
    namespace, offset, length = extent
    wanted, stored = controller.memory.buffer(length), bytearray(length)
    status = controller.memory.from_host(command, wanted)
    if status:
        return status
    try:
        namespace.disk.read(offset, stored)
    except OSError as error:
        return _failed(controller, error, Status.UNRECOVERED_READ_ERROR)
    controller.health.reads += 1
    controller.health.bytes_read += length
    return 0 if stored == wanted else Status.COMPARE_FAILURE


def verify(controller: Controller, command: Command) -> int:
    """Section 6.13, "Verify command": the blocks can be read."""
    extent = _extent(controller, command, MAX_RANGE)
    if isinstance(extent, Status):
        return extent
    namespace, offset, length = extent
    controller.memory.moved += length
    buffer = controller.memory.buffer(min(length, VERIFY_CHUNK))
    try:
        for at in range(0, length, VERIFY_CHUNK):
            namespace.disk.read(offset + at, buffer[: length - at])
    except OSError as error:
        return _failed(controller, error, Status.UNRECOVERED_READ_ERROR)
    return 0


def write_zeroes(controller: Controller, command: Command) -> int:
    """Section 6.16, "Write Zeroes command"."""
    extent = _extent(controller, command, MAX_RANGE)
    if isinstance(extent, Status):
        return extent
    namespace, offset, length = extent
    controller.memory.moved += length
    try:
        namespace.disk.write_zeroes(offset, length)
        _written(controller, command, namespace, 0)
    except OSError as error:
        return _failed(controller, error, Status.WRITE_FAULT)
    return 0


def flush(controller: Controller, command: Command) -> int:
    """Section 6.8, "Flush command"."""
    namespace = controller.namespaces.get(command.nsid)
    if namespace is None and command.nsid != regs.BROADCAST_NSID:
        return Status.INVALID_NAMESPACE
    try:
        for each in controller.namespaces.values() if namespace is None else (namespace,):
            each.disk.flush()
    except OSError as error:
        return _failed(controller, error, Status.WRITE_FAULT)
    return 0


def dataset_management(controller: Controller, command: Command) -> int:
    """Section 6.7, "Dataset Management command": of its hints, deallocation is heeded."""
    namespace = controller.namespaces.get(command.nsid)
    if namespace is None:
        return Status.INVALID_NAMESPACE
    ranges = controller.memory.buffer(((command.cdw10 & 0xFF) + 1) * regs.DSM_RANGE.size)
    status = controller.memory.from_host(command, ranges)
    if status:
        return status
    extents = [(first, count) for _, count, first in regs.DSM_RANGE.iter_unpack(ranges)]
    if any(first + count > namespace.blocks for first, count in extents):
        return Status.LBA_OUT_OF_RANGE
    if not command.cdw11 & regs.DSM_DEALLOCATE:
        return 0
    try:
        for first, count in extents:
            if count:
                controller.memory.moved += count << namespace.shift
                namespace.disk.discard(first << namespace.shift, count << namespace.shift)
    except OSError as error:
        return _failed(controller, error, Status.WRITE_FAULT)
    return 0


HANDLERS: Mapping[int, Handler] = {
    NvmOpcode.FLUSH: flush,
    NvmOpcode.WRITE: write,
    NvmOpcode.READ: read,
    NvmOpcode.COMPARE: compare,
    NvmOpcode.WRITE_ZEROES: write_zeroes,
    NvmOpcode.DATASET_MANAGEMENT: dataset_management,
    NvmOpcode.VERIFY: verify,
}
