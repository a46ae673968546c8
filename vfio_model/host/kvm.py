"""KVM's side of in-kernel acceleration: a virtual machine's TCE tables, and the hypercalls that the host answers
itself.

A table (``KVM_CREATE_SPAPR_TCE_64``) is shared memory that the VM's process reads translations from; here the
hypercalls H_PUT_TCE, H_STUFF_TCE and H_PUT_TCE_INDIRECT store into it. Through the KVM VFIO device
(``KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE``) a table is *linked* to the host window that shadows it: the same call then stores
the host's TCE as well, looked up in the preregistered memory of the process, and revokes what it replaced.

What is not plain goes back: H_TOO_HARD, and nothing that the VM's process could see has changed. The process then does
the call as it would without KVM. Who writes the table's words is never in doubt: the host only while it carries out a
hypercall of the VM, which its process waits for; the process at any other time.

The VM's handle also stands for its one device of type KVM_DEV_TYPE_VFIO.

Sources: Linux ``Documentation/virt/kvm/api.rst`` ("KVM_CREATE_SPAPR_TCE_64", "KVM_CAP_SPAPR_TCE_VFIO"),
``Documentation/virt/kvm/devices/vfio.rst``, ``include/uapi/linux/kvm.h``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from errno import EBADF, EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENOENT, ENOTTY, ENXIO

from vfio_model.host.container import VfioContainer, pack_int, unpack_int
from vfio_model.host.group import Group
from vfio_model.host.kvm_calls import CALLS
from vfio_model.host.kvm_table import KvmTable, Link, MemorySlot, locked_pages
from vfio_model.host.mm import Mm
from vfio_model.host.pending import Revocation
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.host.tce_table import TceTable
from vfio_model.memory.tce_area import tce_area_size
from vfio_model.uapi.hvcall import HReturn
from vfio_model.uapi.kvm import (
    KVM_API_VERSION,
    KVM_DEV_VFIO_GROUP,
    KVM_DEV_VFIO_GROUP_ADD,
    KVM_DEV_VFIO_GROUP_DEL,
    KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE,
    KVM_MEM_READONLY,
    CreateSpaprTce64,
    DeviceAttr,
    KvmCap,
    KvmIoctl,
    UserspaceMemoryRegion,
    VfioSpaprTce,
)
from vfio_model.uapi.vfio import Struct

_TOO_HARD = int(HReturn.H_TOO_HARD)
_MIN_PAGE_SHIFT, _MAX_PAGE_SHIFT = 12, 34
_MAX_TABLE = 1 << 23
"""Entries that one table may have here: a window of 2**32 bytes in 4K pages has 2**20."""
_MAX_SLOTS = 512
CAPABILITIES = frozenset(
    {
        KvmCap.KVM_CAP_USER_MEMORY,
        KvmCap.KVM_CAP_READONLY_MEM,
        KvmCap.KVM_CAP_DEVICE_CTRL,
        KvmCap.KVM_CAP_SPAPR_TCE,
        KvmCap.KVM_CAP_SPAPR_MULTITCE,
        KvmCap.KVM_CAP_SPAPR_TCE_64,
        KvmCap.KVM_CAP_SPAPR_TCE_VFIO,
    }
)
"""What KVM_CHECK_EXTENSION says yes to, where the host's topology does not say less."""


@dataclass(frozen=True, slots=True)
class KvmPorts:
    """What a VM needs of its host: files by handle, and the bytes behind a process's address.

    ``file(handle)`` raises EBADF. ``memory(mm, hva, size)`` is None where the process has no such memory, or the host
    cannot see it.
    """

    file: Callable[[int], object]
    memory: Callable[[Mm, int, int], memoryview | None]


class KvmVm:
    """``/dev/kvm`` after KVM_CREATE_VM, for process ``mm``."""

    def __init__(self, mm: Mm, ports: KvmPorts, capabilities: frozenset[KvmCap] = CAPABILITIES) -> None:
        self.mm, self._ports, self.capabilities = mm, ports, capabilities
        self.tables: dict[int, KvmTable] = {}
        """By LIOBN."""
        self.slots: dict[int, MemorySlot] = {}
        self._groups: list[Group] = []

    # Hypercalls

    def hcall(self, nr: int, args: Sequence[int], links: int, revocation: Revocation) -> int:
        """A hypercall of the VM: its return code, H_TOO_HARD for what the VM's process has to do.

        ``links`` is how many followers of the table the process expects the host to serve with it; with another number
        of linked windows it is too hard.
        """
        call = CALLS.get(nr)
        table = self.tables.get(args[0]) if call is not None and len(args) == 4 else None
        if call is None or table is None or table.live_links() != links:
            return _TOO_HARD
        return call(self, table, args, revocation)

    def slot_of(self, gpa: int, size: int) -> MemorySlot | None:
        """The slot that holds all ``size`` bytes at guest-physical ``gpa``."""
        for slot in self.slots.values():
            if slot.gpa <= gpa and gpa + size <= slot.end:
                return slot
        return None

    def guest_memory(self, gpa: int, size: int) -> memoryview | None:
        """Bytes of the guest's memory, which must lie in one slot and one mapping of its process."""
        slot = self.slot_of(gpa, size)
        return None if slot is None else self._ports.memory(self.mm, gpa + slot.to_ua, size)

    def containers(self, liobn: int) -> Iterator[VfioContainer]:
        """The containers whose windows are linked to the table of ``liobn``."""
        table = self.tables.get(liobn)
        return iter(()) if table is None else (link.container for link in table.links if link.live)

    # ioctls

    def ioctl(self, mm: Mm, cmd: int, arg: bytes) -> bytes:
        """One ioctl. :raise OSError: EIO for another process than the VM's, ENOTTY, and what each one has of its
        own."""
        if mm is not self.mm:
            raise OSError(EIO, "the virtual machine belongs to another process")
        handler = _HANDLERS.get(cmd)
        if handler is None:
            raise OSError(ENOTTY, f"ioctl {cmd:#x} is none of a virtual machine")
        return handler(self, arg)

    def _version(self, arg: bytes) -> bytes:
        return pack_int(KVM_API_VERSION)

    def _check_extension(self, arg: bytes) -> bytes:
        return pack_int(int(unpack_int(arg) in self.capabilities))

    def _set_memory(self, arg: bytes) -> bytes:
        request = UserspaceMemoryRegion(*_fields(UserspaceMemoryRegion, arg))
        low = self.mm.host_page - 1
        gpa, size, ua = request.guest_phys_addr, request.memory_size, request.userspace_addr
        if request.flags & ~KVM_MEM_READONLY or request.slot >= _MAX_SLOTS:
            raise OSError(EINVAL, f"flags {request.flags:#x}, slot {request.slot}")
        if not size:
            if self.slots.pop(request.slot, None) is None:
                raise OSError(EINVAL, f"there is no memory slot {request.slot}")
            return arg
        if (gpa | size | ua) & low or gpa + size > 1 << 64 or ua + size > 1 << 64:
            raise OSError(EINVAL, f"memory at {gpa:#x}, {size:#x} bytes at {ua:#x}: not whole host pages")
        old = self.slots.get(request.slot)
        if old is not None and (old.ua, old.end - old.gpa) != (ua, size):
            raise OSError(EINVAL, f"memory slot {request.slot} can move in the guest, not become other memory")
        new = MemorySlot(gpa, gpa + size, ua, bool(request.flags & KVM_MEM_READONLY))
        if any(one.gpa < new.end and new.gpa < one.end for at, one in self.slots.items() if at != request.slot):
            raise OSError(EEXIST, f"memory at {gpa:#x}, {size:#x} bytes, overlaps another slot")
        self.slots[request.slot] = new
        return arg

    def _set_attr(self, arg: bytes) -> bytes:
        attr = DeviceAttr(*_fields(DeviceAttr, arg))
        handler = _ATTRIBUTES.get(attr.attr) if attr.group == KVM_DEV_VFIO_GROUP else None
        if handler is None:
            raise OSError(ENXIO, f"the VFIO device has no attribute {attr.attr} in group {attr.group}")
        handler(self, arg[DeviceAttr.SIZE :])
        return arg

    # The VFIO device

    def _group(self, handle: int) -> Group:
        group = self._ports.file(handle)
        if not isinstance(group, Group):
            raise OSError(EINVAL, "the handle is not a group's")
        return group

    def _group_add(self, arg: bytes) -> None:
        group = self._group(_handle(arg))
        if group in self._groups:
            raise OSError(EEXIST, f"group {group.id} was added already")
        self._groups.append(group)

    def _group_del(self, arg: bytes) -> None:
        group = self._group(_handle(arg))
        if group not in self._groups:
            raise OSError(ENOENT, f"group {group.id} was not added")
        self._groups.remove(group)
        for table in self.tables.values():
            for link in table.links:
                link.groups.discard(group.id)

    def _set_spapr_tce(self, arg: bytes) -> None:
        """Link a table to the window, of the container that the group is in, which shadows it; again is no error."""
        request = VfioSpaprTce(*_fields(VfioSpaprTce, arg))
        group, table = self._group(request.groupfd), self._ports.file(request.tablefd)
        if KvmCap.KVM_CAP_SPAPR_TCE_VFIO not in self.capabilities:
            raise OSError(ENXIO, "this host links no tables")
        if group not in self._groups:
            raise OSError(ENOENT, f"group {group.id} was not added to the VFIO device")
        if not isinstance(table, KvmTable) or self.tables.get(table.liobn) is not table:
            raise OSError(EINVAL, "the handle is no table's of this virtual machine")
        container = group.container
        driver = container.driver if isinstance(container, VfioContainer) else None
        if not isinstance(container, VfioContainer) or not isinstance(driver, SpaprTceContainer):
            raise OSError(EFAULT, f"group {group.id} is in no container that preregisters memory")
        window = next((one for one in driver.tables if one is not None and _shadows(one, table)), None)
        if window is None or driver.mm is not self.mm:
            raise OSError(EINVAL, f"no window of the container holds the table of {table.liobn:#x}")
        for link in table.links:
            if link.window is window:
                link.groups.add(group.id)
                return
        table.links.append(Link(container, driver, window, {group.id}))

    # Tables

    def create_table(self, arg: bytes, allocate: Callable[[str, int], memoryview]) -> KvmTable:
        """``KVM_CREATE_SPAPR_TCE_64``; ``allocate(name, bytes)`` gives the words. The table's memory counts as
        locked by the process.

        :raise OSError: in this order EINVAL for flags, a size or a page shift that cannot be; ENOMEM beyond the memlock
            limit; EBUSY when the LIOBN has a table.
        """
        request = CreateSpaprTce64(*_fields(CreateSpaprTce64, arg))
        shift, end = request.page_shift, request.offset + request.size
        if request.flags or not 0 < request.size <= _MAX_TABLE:
            raise OSError(EINVAL, f"flags {request.flags:#x}, {request.size} entries")
        if not _MIN_PAGE_SHIFT <= shift <= _MAX_PAGE_SHIFT or end > (1 << 64) - 1 >> shift:
            raise OSError(EINVAL, f"{request.size} pages of 2**{shift} from page {request.offset:#x}")
        pages = locked_pages(request.size, self.mm.host_page)
        self.mm.account(pages)
        try:
            if request.liobn in self.tables:
                raise OSError(EBUSY, f"LIOBN {request.liobn:#x} has a table already")
            words = allocate(f"kvm.{request.liobn:x}", tce_area_size(request.size))
        except OSError:
            self.mm.unaccount(pages)
            raise
        table = KvmTable(request.liobn, shift, request.offset, request.size, words, self.tables, self.mm, pages)
        self.tables[request.liobn] = table
        return table


def _shadows(window: TceTable, table: KvmTable) -> bool:
    """Whether ``window`` begins where ``table`` does, holds all of it, in pages that are not larger."""
    start = table.offset << table.page_shift
    size = table.size << table.page_shift
    return window.page_shift <= table.page_shift and window.start == start and start + size - 1 <= window.last


def _fields(kind: type[Struct], arg: bytes) -> tuple[int, ...]:
    if len(arg) < kind.SIZE:
        raise OSError(EFAULT, f"{kind.__name__}: {len(arg)} bytes of {kind.SIZE} can be read")
    return kind.FORMAT.unpack_from(arg)


def _handle(arg: bytes) -> int:
    if len(arg) < 8:
        raise OSError(EBADF, "no handle")
    return int.from_bytes(arg[:8], sys.byteorder)


_HANDLERS: dict[int, Callable[[KvmVm, bytes], bytes]] = {
    KvmIoctl.KVM_GET_API_VERSION: KvmVm._version,
    KvmIoctl.KVM_CHECK_EXTENSION: KvmVm._check_extension,
    KvmIoctl.KVM_SET_USER_MEMORY_REGION: KvmVm._set_memory,
    KvmIoctl.KVM_SET_DEVICE_ATTR: KvmVm._set_attr,
}
_ATTRIBUTES: dict[int, Callable[[KvmVm, bytes], None]] = {
    KVM_DEV_VFIO_GROUP_ADD: KvmVm._group_add,
    KVM_DEV_VFIO_GROUP_DEL: KvmVm._group_del,
    KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE: KvmVm._set_spapr_tce,
}
