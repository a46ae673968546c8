"""nvme: the namespace, which is a disk in blocks (NVM Express Base Specification 1.4, section 5.15.2.1, "Identify
Namespace data structure").

An I/O error of the disk is a status to the host.
"""

from __future__ import annotations

import errno

from vfio_model.backends.block import BlockBackend
from vfio_model.devices.nvme.regs import Status
from vfio_model.devices.nvme.structures import IDENTIFY_NAMESPACE, IDENTIFY_SIZE, NIDT_UUID

BLOCK_SHIFTS = (9, 12)
"""The formats, by index: 512 and 4096 bytes, without metadata."""
NSATTR_WRITE_PROTECTED = 0x01
_STATUS_BY_ERRNO = {errno.EROFS: Status.NAMESPACE_WRITE_PROTECTED, errno.ENOSPC: Status.CAPACITY_EXCEEDED}


def status_of(error: OSError, usual: Status) -> Status:
    """What a command says that failed with ``error``: ``usual``, unless the reason has a status of its own."""
    return _STATUS_BY_ERRNO.get(error.errno or 0, usual)


class Namespace:
    """Namespace ``nsid`` on ``disk``; ``uuid`` (16 bytes) identifies it. ``shift`` is log2 of the block size."""

    def __init__(self, nsid: int, disk: BlockBackend, shift: int, uuid: bytes) -> None:
        self.nsid, self.disk, self.uuid = nsid, disk, uuid
        self.shift = shift
        self.write_cache = True
        """Whether a write may end before it is on stable storage."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.disk.size >> self.shift

    @property
    def format(self) -> int:
        """The format in use, an index of :data:`BLOCK_SHIFTS`."""
        return BLOCK_SHIFTS.index(self.shift)

    def reformat(self, index: int) -> int:
        """Take format ``index``, and forget what is stored; a status."""
        try:
            self.disk.write_zeroes(0, self.disk.size)
            self.disk.flush()
        except OSError as error:
            return status_of(error, Status.WRITE_FAULT)
        self.shift = BLOCK_SHIFTS[index]
        return 0

    def identify(self) -> bytearray:
        """Identify Namespace."""
        formats = b"".join(bytes((0, 0, shift, 0)) for shift in BLOCK_SHIFTS)
        return IDENTIFY_NAMESPACE.build(
            nsze=self.blocks,
            ncap=self.blocks,
            nuse=self.blocks,
            nlbaf=len(BLOCK_SHIFTS) - 1,
            flbas=self.format,
            nsattr=NSATTR_WRITE_PROTECTED if self.disk.read_only else 0,
            lbaf=formats,
        )

    def descriptors(self) -> bytearray:
        """Namespace Identification Descriptor list."""
        out = bytearray(IDENTIFY_SIZE)
        out[:4] = bytes((NIDT_UUID, len(self.uuid), 0, 0))
        out[4 : 4 + len(self.uuid)] = self.uuid
        return out
