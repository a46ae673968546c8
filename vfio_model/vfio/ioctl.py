"""The seam between a VFIO user and the host: file handles, ioctl numbers, raw uapi structs, errno.

One call underneath, :meth:`VfioPort.ioctl`; typed methods with the uapi's names on top. Adapters:
:mod:`vfio_model.vfio.direct`, which has the host in the same process, and one that sends messages to a host process.
What argsz, flags, ENOTTY and the ioctl numbers that mean two things mean is decided by the host alone, as with the
kernel.

Source: ``include/uapi/linux/vfio.h``.
"""

from __future__ import annotations

import struct
from typing import Protocol

from vfio_model.memory.ram import RAMBlock
from vfio_model.uapi.vfio import (
    DmaMap,
    DmaMapFlags,
    DmaUnmap,
    EehOp,
    EehPeOp,
    EehState,
    GroupStatus,
    Ioctl,
    SpaprRegisterMemory,
    SpaprTceCreate,
    SpaprTceInfo,
    SpaprTceRemove,
)
from vfio_model.vfio.region import DeviceConnection


class BatchError(OSError):
    """A struct of a batch failed with this errno after ``done`` of them had succeeded."""

    def __init__(self, errno: int, reason: str, done: int) -> None:
        super().__init__(errno, reason)
        self.done = done


class Ioctls(Protocol):
    """Who carries out the ioctls of open files. Methods raise ``OSError`` with the errno of the system call."""

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        """One ioctl; returns the argument as the host left it, or the result as 4 or 8 bytes."""
        ...

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        """``count`` structs of one ioctl, back to back, in order; returns ``count``. :raise BatchError: at the first
        failure.
        """
        ...


class VfioPort(Ioctls, Protocol):
    """One client's connection to a host."""

    def open(self, path: str) -> int:
        """A handle of ``/dev/vfio/vfio`` or ``/dev/vfio/<group>``."""
        ...

    def close(self, handle: int) -> None:
        """Close it; returns when everything it gave a right to has ended."""
        ...

    def declare_memory(self, block: RAMBlock) -> None:
        """Map ``block`` at its ``hva`` in the client's address space, as the host sees it."""
        ...

    def undeclare_memory(self, block: RAMBlock) -> None:
        """Undo :meth:`declare_memory`; what is registered stays pinned."""
        ...

    def take_device(self, token: int) -> DeviceConnection:
        """The device that VFIO_GROUP_GET_DEVICE_FD returned ``token`` for; once per token."""
        ...


class ContainerFile:
    """Ioctls of ``/dev/vfio/vfio`` whatever its type. Every method raises ``OSError`` as the uapi documents it."""

    def __init__(self, port: Ioctls, handle: int) -> None:
        self.port, self.handle = port, handle

    def _int(self, cmd: int, arg: bytes = b"") -> int:
        value: int = struct.unpack("=I", self.port.ioctl(self.handle, cmd, arg))[0]
        return value

    def get_api_version(self) -> int:
        """``VFIO_GET_API_VERSION``."""
        return self._int(Ioctl.VFIO_GET_API_VERSION)

    def check_extension(self, extension: int) -> int:
        """``VFIO_CHECK_EXTENSION``: 0 when not supported."""
        return self._int(Ioctl.VFIO_CHECK_EXTENSION, struct.pack("=I", extension))

    def set_iommu(self, kind: int) -> None:
        """``VFIO_SET_IOMMU``."""
        self.port.ioctl(self.handle, Ioctl.VFIO_SET_IOMMU, struct.pack("=I", kind))

    def map_dma(self, iova: int, vaddr: int, size: int, flags: int = 3) -> None:
        """``VFIO_IOMMU_MAP_DMA``; ``flags`` of :class:`~vfio_model.uapi.vfio.DmaMapFlags`, both by default."""
        arg = DmaMap(flags=int(DmaMapFlags(flags)), vaddr=vaddr, iova=iova, size=size).pack()
        self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_MAP_DMA, arg)

    def unmap_dma(self, iova: int, size: int) -> None:
        """``VFIO_IOMMU_UNMAP_DMA``."""
        self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_UNMAP_DMA, DmaUnmap(iova=iova, size=size).pack())


class SpaprContainer(ContainerFile):
    """Ioctls of ``/dev/vfio/vfio`` with an sPAPR type of either version."""

    def enable(self) -> None:
        """``VFIO_IOMMU_ENABLE`` (version 1)."""
        self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_ENABLE, b"")

    def disable(self) -> None:
        """``VFIO_IOMMU_DISABLE`` (version 1)."""
        self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_DISABLE, b"")

    def get_info(self) -> SpaprTceInfo:
        """``VFIO_IOMMU_SPAPR_TCE_GET_INFO``."""
        return SpaprTceInfo.unpack(
            self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO, SpaprTceInfo().pack())
        )

    def register_memory(self, vaddr: int, size: int) -> None:
        """``VFIO_IOMMU_SPAPR_REGISTER_MEMORY``; ``size`` in bytes."""
        arg = SpaprRegisterMemory(vaddr=vaddr, size=size).pack()
        self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, arg)

    def unregister_memory(self, vaddr: int, size: int) -> None:
        """``VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY``."""
        arg = SpaprRegisterMemory(vaddr=vaddr, size=size).pack()
        self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY, arg)

    def tce_create(self, page_shift: int, window_size: int, levels: int = 1) -> int:
        """``VFIO_IOMMU_SPAPR_TCE_CREATE``: the bus address at which the window begins."""
        arg = SpaprTceCreate(page_shift=page_shift, window_size=window_size, levels=levels).pack()
        answer = self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE, arg)
        return SpaprTceCreate.unpack(answer).start_addr

    def tce_remove(self, start_addr: int) -> None:
        """``VFIO_IOMMU_SPAPR_TCE_REMOVE`` of the window that contains ``start_addr``."""
        arg = SpaprTceRemove(start_addr=start_addr).pack()
        self.port.ioctl(self.handle, Ioctl.VFIO_IOMMU_SPAPR_TCE_REMOVE, arg)

    def eeh_pe_op(self, op: EehOp) -> EehState:
        """``VFIO_EEH_PE_OP`` on every group in turn: for GET_STATE the first state that is not normal; else normal.

        An error to inject goes through :meth:`eeh_inject_err`.
        """
        return EehState(self._int(Ioctl.VFIO_EEH_PE_OP, EehPeOp(op=op).pack()))

    def eeh_inject_err(self, type_: int, func: int, addr: int = 0, mask: int = 0) -> None:
        """``VFIO_EEH_PE_INJECT_ERR``; ``type_`` and ``func`` as ``<asm/eeh.h>`` numbers them."""
        arg = EehPeOp(op=EehOp.VFIO_EEH_PE_INJECT_ERR, type=type_, func=func, addr=addr, mask=mask).pack()
        self._int(Ioctl.VFIO_EEH_PE_OP, arg)


class VfioGroup:
    """Ioctls of ``/dev/vfio/<group>``."""

    def __init__(self, port: VfioPort, handle: int) -> None:
        self.port, self.handle = port, handle

    def get_status(self) -> int:
        """``VFIO_GROUP_GET_STATUS``: its flags."""
        answer = self.port.ioctl(self.handle, Ioctl.VFIO_GROUP_GET_STATUS, GroupStatus().pack())
        return GroupStatus.unpack(answer).flags

    def set_container(self, container: int) -> None:
        """``VFIO_GROUP_SET_CONTAINER``; ``container`` is a handle."""
        self.port.ioctl(self.handle, Ioctl.VFIO_GROUP_SET_CONTAINER, struct.pack("=Q", container))

    def unset_container(self) -> None:
        """``VFIO_GROUP_UNSET_CONTAINER``."""
        self.port.ioctl(self.handle, Ioctl.VFIO_GROUP_UNSET_CONTAINER, b"")

    def get_device_fd(self, name: str) -> int:
        """``VFIO_GROUP_GET_DEVICE_FD``: a token for :meth:`VfioPort.take_device`."""
        answer = self.port.ioctl(self.handle, Ioctl.VFIO_GROUP_GET_DEVICE_FD, name.encode() + b"\0")
        token: int = struct.unpack("=Q", answer)[0]
        return token
