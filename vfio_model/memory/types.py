"""The vocabulary of memory transactions, as QEMU's ``include/exec`` names it.

What a guest or a device can cause is a value here (:class:`MemTxResult`), never an exception. Flags keep QEMU's
numbers, because traces, wire messages and recorded sessions carry them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

ReadBuffer = bytes | bytearray | memoryview
"""What a write takes its bytes from: C-contiguous, item size 1."""
WriteBuffer = bytearray | memoryview
"""What a read puts its bytes into: writable, C-contiguous, item size 1."""

PCI_NO_PASID = 0xFFFFFFFF
"""The PASID field of an entry that has none."""


class MemTxResult(IntFlag):
    """How a memory transaction ended; the bits of several pieces are OR-ed."""

    OK = 0
    ERROR = 1
    """The device that was addressed answered with an error."""
    DECODE_ERROR = 2
    """Nothing decodes the address: unassigned, unmapped, or no permission in an IOMMU."""
    ACCESS_ERROR = 4
    """The address decodes, but this requester may not go there."""


class DMADirection(IntEnum):
    """Seen from the device, as QEMU's ``DMADirection``."""

    TO_DEVICE = 0
    """The device reads memory."""
    FROM_DEVICE = 1
    """The device writes memory."""


class IOMMUAccessFlags(IntFlag):
    """Permissions of a translation; RO and WO are seen from the device. NONE asks for a full walk."""

    NONE = 0
    RO = 1
    WO = 2
    RW = 3
    EXEC = 4
    PRIV = 8
    GLOBAL = 16
    UNTRANSLATED_ONLY = 32


class IOMMUNotifierFlag(IntFlag):
    """Kinds of IOMMU events, and the kinds that a notifier wants."""

    NONE = 0
    UNMAP = 1
    MAP = 2
    DEVIOTLB_UNMAP = 4
    IOTLB_EVENTS = 3
    ALL = 7


@dataclass(frozen=True, slots=True)
class MemTxAttrs:
    """What rides with a transaction besides address and data; an IOMMU may choose its index by it."""

    unspecified: bool = False
    secure: bool = False
    user: bool = False
    memory: bool = False
    debug: bool = False
    requester_id: int = 0
    pid: int = 0
    translated: bool = False
    """PCIe address type "translated": the address came from the requester's ATC."""


MEMTXATTRS_UNSPECIFIED = MemTxAttrs(unspecified=True)
