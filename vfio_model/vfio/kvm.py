"""KVM as its user holds it: a virtual machine whose TCE tables may live in the kernel.

:class:`KvmPort` is the seam: what a client needs beside VFIO's. :class:`KvmAccelerator` decides with it which tables
live there (QEMU's ``kvmppc_create_spapr_tce``), tells the host where the guest's memory is, and links tables to the
containers that shadow them. It outlives its host: :meth:`~KvmAccelerator.disconnect` brings every table home,
:meth:`~KvmAccelerator.connect` hands them to the next one. The entries are in memory that is shared, so that the death
of the host costs none of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from vfio_model.errors import PeerLost
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.tce_area import tce_area_entries
from vfio_model.ranges import align_down, align_up
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.kvm import (
    KVM_DEV_VFIO_GROUP,
    KVM_DEV_VFIO_GROUP_ADD,
    KVM_DEV_VFIO_GROUP_DEL,
    KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE,
    KVM_MEM_READONLY,
    KVM_PATH,
    CreateSpaprTce64,
    DeviceAttr,
    KvmCap,
    KvmIoctl,
    UserspaceMemoryRegion,
    VfioSpaprTce,
)
from vfio_model.vfio.ioctl import VfioPort

IN_KERNEL_LIMIT = 1 << 32
"""A window of as many bytes or more does not live in the kernel."""


class KvmPort(VfioPort, Protocol):
    """A client's connection to a host with KVM; ``open`` takes ``/dev/kvm`` too, whose handle is a virtual
    machine's."""

    def create_spapr_tce(self, vm: int, arg: bytes) -> tuple[int, memoryview]:
        """``KVM_CREATE_SPAPR_TCE_64``: the table's handle, to be closed, and its mapped area
        (:mod:`vfio_model.memory.tce_area`), writable, which stays until the table is given to :meth:`unmap_spapr_tce`.
        """

    def unmap_spapr_tce(self, handle: int) -> None:
        """Unmap the area of a table; also when the host is gone. Harmless twice."""

    def hcall(self, vm: int, nr: int, args: Sequence[int], links: int) -> int:
        """A hypercall of machine ``vm``, whose table ``links`` followers have; the host's return code.

        :raise OSError: the request failed. :raise PeerLost: the host is gone.
        """


class KvmVm:
    """Ioctls of a virtual machine. Every method raises ``OSError`` as the uapi documents it."""

    def __init__(self, port: KvmPort, handle: int) -> None:
        self.port, self.handle = port, handle

    def check_extension(self, cap: KvmCap) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when not supported."""
        answer = self.port.ioctl(self.handle, KvmIoctl.KVM_CHECK_EXTENSION, struct.pack("=I", cap))
        value: int = struct.unpack("=I", answer)[0]
        return value

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        """``KVM_SET_USER_MEMORY_REGION``; a ``size`` of 0 takes the slot away."""
        flags = KVM_MEM_READONLY if readonly else 0
        arg = UserspaceMemoryRegion(slot, flags, gpa, size, hva).pack()
        self.port.ioctl(self.handle, KvmIoctl.KVM_SET_USER_MEMORY_REGION, arg)

    def _set_attr(self, attr: int, value: bytes) -> None:
        arg = DeviceAttr(group=KVM_DEV_VFIO_GROUP, attr=attr).pack() + value
        self.port.ioctl(self.handle, KvmIoctl.KVM_SET_DEVICE_ATTR, arg)

    def group_add(self, group: int) -> None:
        """``KVM_DEV_VFIO_GROUP_ADD``; ``group`` is a handle."""
        self._set_attr(KVM_DEV_VFIO_GROUP_ADD, struct.pack("=Q", group))

    def group_del(self, group: int) -> None:
        """``KVM_DEV_VFIO_GROUP_DEL``."""
        self._set_attr(KVM_DEV_VFIO_GROUP_DEL, struct.pack("=Q", group))

    def set_spapr_tce(self, group: int, table: int) -> None:
        """``KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE``: ``table`` is shadowed by the window of ``group``'s container."""
        self._set_attr(KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE, VfioSpaprTce(group, table).pack())

    def create_spapr_tce(self, liobn: int, page_shift: int, bus_offset: int, nb_table: int) -> KvmTable:
        """``KVM_CREATE_SPAPR_TCE_64``, for a window that begins at bus address ``bus_offset``."""
        request = CreateSpaprTce64(liobn, page_shift, 0, bus_offset >> page_shift, nb_table)
        handle, area = self.port.create_spapr_tce(self.handle, request.pack())
        return KvmTable(self, handle, tce_area_entries(area, nb_table))


class KvmTable:
    """A table in the kernel."""

    def __init__(self, vm: KvmVm, handle: int, entries: memoryview) -> None:
        self._vm, self.fd, self.entries = vm, handle, entries

    def hcall(self, nr: int, args: Sequence[int], followers: int) -> int:
        """See :class:`~vfio_model.iommu.spapr.acceleration.InKernelTable`."""
        return self._vm.port.hcall(self._vm.handle, nr, args, followers)

    def close(self) -> None:
        """Give the table back, and its memory; harmless when the host is gone."""
        self.entries = memoryview(b"").cast("Q")
        self._vm.port.unmap_spapr_tce(self.fd)
        self._vm.port.close(self.fd)


class KvmMemoryListener(MemoryListener):
    """Makes a memory slot of every section of RAM, as far as it is whole host pages.

    RAM with a discard manager is none: the host would map what is discarded, so it finds all of it too hard.
    """

    priority = 10

    def __init__(self, vm: KvmVm, host_page_size: int, trace: Trace = NULL_TRACE) -> None:
        self._vm, self._page, self._trace = vm, host_page_size, trace
        self._slots: dict[tuple[int, int], int] = {}
        self.lost = False

    def _interior(self, section: MemoryRegionSection) -> tuple[int, int, int] | None:
        """(guest-physical address, bytes, host-virtual address) of the whole pages in ``section``."""
        region = section.mr
        if not isinstance(region, RAMRegion):
            return None
        start = section.offset_within_address_space
        first, end = align_up(start, self._page), align_down(start + section.size, self._page)
        hva = region.block.hva + section.offset_within_region + first - start
        return (first, end - first, hva) if first < end and not hva % self._page else None

    def region_add(self, section: MemoryRegionSection) -> None:
        """A slot of its own for each section; what the host refuses is memory that it finds too hard."""
        found = self._interior(section)
        if found is None or self.lost or (isinstance(section.mr, RAMRegion) and section.mr.discard_manager is not None):
            return
        gpa, size, hva = found
        slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots.values())
        self._do(slot, gpa, size, hva, readonly=section.readonly)
        self._slots[gpa, size] = slot

    def region_del(self, section: MemoryRegionSection) -> None:
        """Take the section's slot away."""
        found = self._interior(section)
        slot = self._slots.pop(found[:2], None) if found is not None else None
        if slot is not None and not self.lost:
            self._do(slot, 0, 0, 0)

    def _do(self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        ret = 0
        try:
            self._vm.set_user_memory_region(slot, gpa, size, hva, readonly=readonly)
        except PeerLost:
            self.lost = True
        except OSError as error:
            ret = -(error.errno or 0)
        self._trace("kvm_set_user_memory", slot=slot, guest_phys_addr=gpa, memory_size=size, ret=ret)


class KvmAccelerator:
    """:class:`~vfio_model.iommu.spapr.acceleration.Accelerator` over whatever host there is at the moment; ``system``
    is the guest's memory. ``on_change()`` is called when tables may have to move.
    """

    def __init__(self, system: AddressSpace, host_page_size: int, trace: Trace = NULL_TRACE) -> None:
        self._system, self._page, self._trace = system, host_page_size, trace
        self.on_change: Callable[[], None] = lambda: None
        self._vm: KvmVm | None = None
        self._listener: KvmMemoryListener | None = None
        self._capabilities: frozenset[KvmCap] = frozenset()

    @property
    def connected(self) -> bool:
        """Whether there is a virtual machine."""
        return self._vm is not None

    @property
    def links(self) -> bool:
        """Whether tables that VFIO follows may live in the kernel."""
        return KvmCap.KVM_CAP_SPAPR_TCE_VFIO in self._capabilities

    def connect(self, port: KvmPort) -> None:
        """Make a virtual machine, show it the guest's memory, and move the tables there.

        :raise OSError: the host has no KVM. :raise PeerLost: it went away.
        """
        assert self._vm is None, "one host at a time"
        vm = KvmVm(port, port.open(KVM_PATH))
        self._capabilities = frozenset(cap for cap in KvmCap if vm.check_extension(cap))
        self._vm, self._listener = vm, KvmMemoryListener(vm, self._page, self._trace)
        self._system.register_listener(self._listener)
        self.on_change()

    def disconnect(self) -> None:
        """Bring every table home; afterwards nothing of the host is used. Harmless when there is none, or it is
        gone."""
        vm, listener = self._vm, self._listener
        self._vm = self._listener = None
        self._capabilities = frozenset()
        if vm is None or listener is None:
            return
        self.on_change()
        listener.lost = True
        self._system.unregister_listener(listener)
        vm.port.close(vm.handle)

    def takes(self, window_size: int, *, need_vfio: bool) -> bool:
        """Whether a table lives in the kernel: when VFIO needs it, only where the host can link it."""
        wanted = KvmCap.KVM_CAP_SPAPR_TCE_64 in self._capabilities and window_size < IN_KERNEL_LIMIT
        return wanted and (self.links or not need_vfio)

    def create(self, liobn: int, page_shift: int, bus_offset: int, nb_table: int) -> KvmTable | None:
        """An empty table in the kernel; None when the host refuses, or is gone."""
        if self._vm is None:
            return None
        try:
            return self._vm.create_spapr_tce(liobn, page_shift, bus_offset, nb_table)
        except (OSError, PeerLost) as error:
            self._trace("kvm_failed_spapr_tce", liobn=liobn, reason=str(error))
            return None

    # What a container asks for

    def add_group(self, group: int) -> None:
        """Tell the VFIO device of a group. :raise OSError: it refuses."""
        if self._vm is not None:
            self._vm.group_add(group)

    def del_group(self, group: int) -> None:
        """The group is about to be closed."""
        if self._vm is not None:
            try:
                self._vm.group_del(group)
            except (OSError, PeerLost) as error:
                self._trace("vfio_error", reason=f"KVM does not let go of a group: {error}")

    def link(self, region: IOMMUMemoryRegion, groups: Sequence[int]) -> bool:
        """Link the table behind ``region`` to the window of the container that ``groups`` are in.

        :return: False when it does not live in the kernel. :raise OSError: the host refuses.
        """
        if self._vm is None or not self.links:
            return False
        try:
            table = region.get_attr("spapr_tce_fd")
        except OSError:
            return False
        assert isinstance(table, int), "a file is a number"
        for group in groups:
            self._vm.set_spapr_tce(group, table)
            self._trace("vfio_spapr_group_attach", groupfd=group, tablefd=table)
        return True
