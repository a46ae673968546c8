"""The part of the KVM uapi that in-kernel TCE tables need: ioctl numbers, capabilities, structures.

Sources: Linux ``include/uapi/linux/kvm.h`` and ``arch/powerpc/include/uapi/asm/kvm.h``; numbers are those of the
generic ``asm/ioctl.h``. Every structure has its size asserted. Where the header has a file descriptor, or a pointer to
a structure, an argument of ours carries an 8-byte handle, or the structure itself right behind: see
:class:`VfioSpaprTce` and :class:`DeviceAttr`.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from enum import IntEnum

from vfio_model.uapi import vfio

KVM_PATH = "/dev/kvm"
KVM_API_VERSION = 12
KVMIO = 0xAE
_WRITE = 1


def _ioc(direction: int, nr: int, size: int) -> int:
    return direction << 30 | size << 16 | KVMIO << 8 | nr


class KvmIoctl(IntEnum):
    """``_IO`` and ``_IOW`` of ``KVMIO``."""

    KVM_GET_API_VERSION = _ioc(0, 0x00, 0)
    KVM_CHECK_EXTENSION = _ioc(0, 0x03, 0)
    KVM_SET_USER_MEMORY_REGION = _ioc(_WRITE, 0x46, 32)
    KVM_CREATE_SPAPR_TCE_64 = _ioc(_WRITE, 0xA8, 32)
    KVM_SET_DEVICE_ATTR = _ioc(_WRITE, 0xE1, 24)


@functools.lru_cache(64)
def ioctl_name(cmd: int, *, spapr: bool = True) -> str:
    """The name of an ioctl number of the port: KVM's or VFIO's; ``spapr`` as :func:`vfio.ioctl_name` has it."""
    try:
        return KvmIoctl(cmd).name
    except ValueError:
        return vfio.ioctl_name(cmd, spapr=spapr)


class KvmCap(IntEnum):
    """Arguments of KVM_CHECK_EXTENSION."""

    KVM_CAP_USER_MEMORY = 3
    KVM_CAP_SPAPR_TCE = 63
    KVM_CAP_READONLY_MEM = 81
    KVM_CAP_DEVICE_CTRL = 89
    KVM_CAP_SPAPR_MULTITCE = 94
    KVM_CAP_SPAPR_TCE_64 = 125
    KVM_CAP_SPAPR_TCE_VFIO = 142


KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2
KVM_DEV_TYPE_VFIO = 4
KVM_DEV_VFIO_GROUP = 1
KVM_DEV_VFIO_GROUP_ADD = 1
KVM_DEV_VFIO_GROUP_DEL = 2
KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE = 3


@dataclass(slots=True)
class UserspaceMemoryRegion(vfio.Struct):
    """``struct kvm_userspace_memory_region``; ``memory_size`` 0 takes the slot away."""

    FORMAT = struct.Struct("=IIQQQ")
    SIZE = 32
    slot: int = 0
    flags: int = 0
    guest_phys_addr: int = 0
    memory_size: int = 0
    userspace_addr: int = 0


@dataclass(slots=True)
class CreateSpaprTce64(vfio.Struct):
    """``struct kvm_create_spapr_tce_64``; ``offset`` and ``size`` in pages of ``1 << page_shift`` bytes."""

    FORMAT = struct.Struct("=QIIQQ")
    SIZE = 32
    liobn: int = 0
    page_shift: int = 0
    flags: int = 0
    offset: int = 0
    size: int = 0


@dataclass(slots=True)
class DeviceAttr(vfio.Struct):
    """``struct kvm_device_attr``. What ``addr`` points to follows the structure; ``addr`` itself is 0."""

    FORMAT = struct.Struct("=IIQQ")
    SIZE = 24
    flags: int = 0
    group: int = 0
    attr: int = 0
    addr: int = 0


@dataclass(slots=True)
class VfioSpaprTce(vfio.Struct):
    """``struct kvm_vfio_spapr_tce`` with handles in place of its two descriptors."""

    FORMAT = struct.Struct("=QQ")
    SIZE = 16
    groupfd: int = 0
    tablefd: int = 0


for _kind in (UserspaceMemoryRegion, CreateSpaprTce64, DeviceAttr, VfioSpaprTce):
    assert _kind.FORMAT.size == _kind.SIZE, f"{_kind.__name__} has the size that the header gives it"
