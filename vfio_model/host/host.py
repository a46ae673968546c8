"""The host as its clients meet it: files that are opened, ioctls on them, and what happens when a client goes.

Pure: memory comes from the :class:`Buffers` that the owner gives, devices are started by the callbacks it gives, and
what must wait for DMA comes back as :class:`~vfio_model.host.pending.Pending` for the owner to drive. While an
operation of a container is pending, the owner lets later requests of the same container queue behind it.

Sources: the kernel's ``Documentation/driver-api/vfio.rst`` and ``include/uapi/linux/vfio.h``.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from errno import EBADF, EBADFD, EBUSY, EFAULT, EINVAL, EIO, ENODEV, ENOENT, ENOTTY, EPERM

from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.container import IommuDriver, VfioContainer, copy_in
from vfio_model.host.explain import Step, explain
from vfio_model.host.group import Group, HostDevice
from vfio_model.host.hpa import HpaSpace, Segment
from vfio_model.host.kvm import CAPABILITIES, KvmPorts, KvmVm
from vfio_model.host.kvm_table import KvmTable
from vfio_model.host.mm import Mm, Vma
from vfio_model.host.pe import PE_SIZE, PeBlock, Stop
from vfio_model.host.pending import Batch, Pending, Revocation
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.host.spapr_v1 import SpaprV1Container
from vfio_model.host.struct_batch import StructBatch
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.topology import HostTopology
from vfio_model.host.type1 import Type1Container
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.containers import ContainerKind
from vfio_model.uapi.kvm import KVM_PATH, KvmCap, ioctl_name
from vfio_model.uapi.vfio import (
    VFIO_GROUP_FLAGS_CONTAINER_SET,
    VFIO_GROUP_FLAGS_VIABLE,
    DmaMap,
    DmaUnmap,
    GroupStatus,
    Ioctl,
    SpaprRegisterMemory,
    SpaprTceCreate,
    SpaprTceInfo,
    SpaprTceRemove,
)

Buffers = Callable[[str, int], memoryview]
"""``buffers(name, size)``: zeroed, writable memory of ``size`` bytes as words (format ``Q``), sparse where it can
be.
"""
OnDeviceOpen = Callable[[Group, HostDevice], int]
"""Start the device; returns the token under which the client finds it, raises OSError when it can't."""
OnDeviceClose = Callable[[Group, HostDevice, int], None]
"""The device with this token is closed and none of its DMA is under way any more."""

Memory = Callable[[Vma], memoryview | None]
"""The bytes that a process has mapped at a VMA (format ``B``), to be read; None where the host cannot see them."""
File = VfioContainer | Group | KvmVm | KvmTable

CONTAINER_PATH = "/dev/vfio/vfio"
GROUP_PREFIX = "/dev/vfio/"

_DRIVERS: dict[ContainerKind, Callable[[TableMemory, HostTopology], IommuDriver]] = {
    "spapr-v2": lambda memory, host: SpaprTceContainer(memory, host.host_page_size),
    "spapr-v1": lambda memory, host: SpaprV1Container(memory, host.host_page_size),
    "type1v2": lambda memory, host: Type1Container(memory, host.host_page_size, iova_ranges=host.iova_ranges),
    "type1": lambda memory, host: Type1Container(memory, host.host_page_size, v2=False, iova_ranges=host.iova_ranges),
}
"""What makes the driver of a kind, from its table memory and the host around it."""

STRUCT_SIZES: dict[int, int] = {
    Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO: SpaprTceInfo.SIZE,
    Ioctl.VFIO_IOMMU_MAP_DMA: DmaMap.SIZE,
    Ioctl.VFIO_IOMMU_UNMAP_DMA: DmaUnmap.SIZE,
    Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY: SpaprRegisterMemory.SIZE,
    Ioctl.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY: SpaprRegisterMemory.SIZE,
    Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE: SpaprTceCreate.SIZE,
    Ioctl.VFIO_IOMMU_SPAPR_TCE_REMOVE: SpaprTceRemove.SIZE,
}
"""What :meth:`Host.ioctl_many` takes, and the bytes of one struct of it."""


def private_buffers(name: str, size: int) -> memoryview:
    """Memory of this process alone, untouched pages costing nothing."""
    zeroed = lazy_numpy().zeros(size, dtype="u1")  # the one allocator at hand that leaves zero pages to the kernel
    return zeroed.data.cast("B").cast("Q")  # type: ignore[no-any-return]


class Host:
    """A host of ``topology``. ``handles`` yields file handles, none of them twice. ``table_buffers`` gives the memory
    of TCE tables of virtual machines, which a client writes as well.
    """

    def __init__(
        self,
        topology: HostTopology,
        *,
        buffers: Buffers = private_buffers,
        on_device_open: OnDeviceOpen | None = None,
        on_device_close: OnDeviceClose | None = None,
        handles: Iterator[int] | None = None,
        table_buffers: Buffers | None = None,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self.topology = topology.validate()
        self._buffers, self._table_buffers = buffers, table_buffers or buffers
        tokens = itertools.count(1)
        self._on_open: OnDeviceOpen = on_device_open or (lambda group, device: next(tokens))
        self._on_close: OnDeviceClose = on_device_close or (lambda group, device, token: None)
        self._handles = handles or itertools.count(1)
        self._trace = trace
        self._domains = itertools.count(1)
        self._clients = itertools.count(1)
        self._kinds = topology.containers
        self._space = HpaSpace(topology.hpa, topology.host_page_size)
        self._segments: dict[str, Segment] = {}
        self._files: dict[int, tuple[File, Mm]] = {}
        self._capabilities = CAPABILITIES - {KvmCap[name] for name in topology.kvm_lacks}
        self._memory: dict[Mm, Memory] = {}
        self.groups = {spec.id: Group(spec, topology.platform, self._make_pe) for spec in topology.groups}

    def _make_pe(self, device: str) -> PeBlock:
        return PeBlock(self._buffers(f"pe.{device}", PE_SIZE))

    def _make_driver(self, kind: ContainerKind) -> IommuDriver:
        page = self.topology.host_page_size
        words = self._buffers(f"domain.{next(self._domains)}", self.topology.domain_bytes)
        return _DRIVERS[kind](TableMemory(words, page), self.topology)

    # Clients and their memory

    def create_mm(self, memlock: int | None = None, name: str = "") -> Mm:
        """A client process with a memlock limit in bytes (None: without limit)."""
        return Mm(self.topology.host_page_size, memlock, name or f"mm{next(self._clients)}")

    def share_memory(self, mm: Mm, memory: Memory) -> None:
        """From now on the host can read the memory of process ``mm``, as its virtual machines need it to."""
        self._memory[mm] = memory

    def place_segment(self, segment_id: str, length: int, page_size: int) -> Segment:
        """Place memory in the host-physical space; a segment known by its id is the same one again.

        :raise OSError: EINVAL for another length or backing page than before; ENOMEM when the space is used up.
        """
        known = self._segments.get(segment_id)
        if known is None:
            known = self._segments[segment_id] = self._space.place(segment_id, length, page_size)
        elif (known.length, known.page_size) != (length, max(page_size, self.topology.host_page_size)):
            raise OSError(EINVAL, f"segment {segment_id} is {known.length:#x} bytes of {known.page_size:#x}-byte pages")
        return known

    def forget_segment(self, segment_id: str) -> None:
        """Nobody maps the segment any more; placed again it lies elsewhere."""
        self._segments.pop(segment_id, None)

    @property
    def segments(self) -> list[Segment]:
        """All placed segments."""
        return list(self._segments.values())

    def mm_gone(self, mm: Mm) -> Pending[None] | None:
        """The client has died: close every file of its and give back all it had."""
        mm.gone = True
        self._memory.pop(mm, None)
        revocation = Revocation()
        mine = [handle for handle, (_, owner) in self._files.items() if owner is mm]
        for handle in sorted(mine, key=lambda handle: isinstance(self._files[handle][0], VfioContainer)):
            self._release(handle, revocation)
        for group in self.groups.values():
            driver = group.container.driver if group.container is not None else None
            if group.container is not None and driver is not None and driver.mm is mm:
                group.container.detach(group, revocation)  # another process's group in this one's container
        return _pending(revocation)

    # Files

    def open(self, path: str, mm: Mm) -> int:
        """A handle of ``/dev/vfio/vfio``, of ``/dev/vfio/<group>``, or of a new virtual machine of ``/dev/kvm``.

        :raise OSError: ENOENT for another path, EBUSY for a group that is open already.
        """
        handle = next(self._handles)
        if path == CONTAINER_PATH:
            self._files[handle] = (VfioContainer(handle, self._kinds, self._make_driver), mm)
            return handle
        if path == KVM_PATH and KvmCap.KVM_CAP_USER_MEMORY in self._capabilities:
            ports = KvmPorts(self._file, self._memory_of)
            self._files[handle] = (KvmVm(mm, ports, self._capabilities), mm)
            return handle
        number = path.removeprefix(GROUP_PREFIX)
        group = self.groups.get(int(number)) if number.isascii() and number.isdigit() else None
        if group is None or path != f"{GROUP_PREFIX}{group.id}":
            raise OSError(ENOENT, f"{path} does not exist on this host")
        if group.handle is not None:
            raise OSError(EBUSY, f"{path} is open already")
        group.handle = handle
        self._files[handle] = (group, mm)
        return handle

    def close(self, handle: int) -> Pending[None] | None:
        """Close a file: a group's devices are closed and it leaves its container; a container goes with its last group.

        :raise OSError: EBADF.
        """
        revocation = Revocation()
        self._release(handle, revocation)
        return _pending(revocation)

    release = close

    def _release(self, handle: int, revocation: Revocation) -> None:
        file = self._file(handle)
        del self._files[handle]
        if isinstance(file, KvmTable):
            file.drop()
        if not isinstance(file, Group):
            return
        for device in file.open_devices:
            self._close_device(device, revocation)
        if file.container is not None:
            file.container.detach(file, revocation)
        file.handle = None
        file.stop(Stop.NOTHING)

    def _file(self, handle: int) -> File:
        try:
            return self._files[handle][0]
        except KeyError:
            raise OSError(EBADF, f"handle {handle:#x} is not open") from None

    # ioctl

    def ioctl(self, mm: Mm, handle: int, cmd: int, arg: bytes) -> bytes | Pending[bytes]:
        """One ioctl by process ``mm``; ``arg`` and result are raw uapi structs. :raise OSError: with the errno of the
        uapi.
        """
        revocation = Revocation()
        try:
            result = self._ioctl(mm, handle, cmd, arg, revocation)
        except OSError as error:
            if not revocation.actions and not revocation.work:
                raise
            return revocation.settle(_raiser(error))
        if not revocation.actions and not revocation.work:
            return result
        return revocation.settle(lambda: result if revocation.answer is None else revocation.answer)

    def _ioctl(self, mm: Mm, handle: int, cmd: int, arg: bytes, revocation: Revocation) -> bytes:
        file = self._file(handle)
        if isinstance(file, VfioContainer):
            return file.ioctl(mm, cmd, arg, revocation)
        if isinstance(file, KvmVm):
            return file.ioctl(mm, cmd, arg)
        handler = _GROUP_HANDLERS.get(cmd)
        if handler is None or not isinstance(file, Group):
            raise OSError(ENOTTY, f"ioctl {cmd:#x} is none of a group")
        return handler(self, file, arg, revocation)

    def ioctl_many(self, mm: Mm, handle: int, cmd: int, args: bytes | memoryview, count: int) -> Batch | Pending[Batch]:
        """``count`` structs of one ioctl, back to back and executed in order; stops at the first that fails.

        What follows the structs in ``args`` is ignored. :raise OSError: EBADF; EINVAL for an ioctl that takes no batch
        or for fewer bytes than ``count`` structs have.
        """
        file, size = self._file(handle), STRUCT_SIZES.get(cmd)
        view = memoryview(args).cast("B")
        if size is None or count < 0 or len(view) < count * size:
            raise OSError(EINVAL, f"ioctl {cmd:#x} takes no batch of {count} structs in {len(view)} bytes")
        driver = file.driver if isinstance(file, VfioContainer) else None
        batch = StructBatch(
            mm, cmd, size, view[: count * size], driver, lambda arg, more: self._ioctl(mm, handle, cmd, arg, more)
        )
        revocation = Revocation()
        revocation.run(batch.carry_out(revocation))
        return revocation.settle(lambda: batch.result)

    def ioctl_name(self, handle: int, cmd: int) -> str:
        """The name of ``cmd`` for this file: the type of a container decides between two meanings of a number."""
        file = self._files.get(handle, (None, None))[0]
        return ioctl_name(cmd, spapr=not isinstance(file, VfioContainer) or file.spapr)

    # Virtual machines

    def _vm(self, mm: Mm, handle: int) -> KvmVm:
        vm = self._file(handle)
        if not isinstance(vm, KvmVm):
            raise OSError(ENOTTY, "the handle is not a virtual machine's")
        if vm.mm is not mm:
            raise OSError(EIO, "the virtual machine belongs to another process")
        return vm

    def create_spapr_tce(self, mm: Mm, vm: int, arg: bytes) -> tuple[int, memoryview]:
        """``KVM_CREATE_SPAPR_TCE_64``: the table's handle, and the area that holds it
        (:mod:`vfio_model.host.kvm_table`).

        :raise OSError: EBADF, EIO for another process's machine, and as :meth:`KvmVm.create_table`.
        """
        table = self._vm(mm, vm).create_table(arg, self._table_buffers)
        handle = next(self._handles)
        self._files[handle] = (table, mm)
        return handle, table.words

    def hcall(self, mm: Mm, vm: int, nr: int, args: Sequence[int], links: int) -> int | Pending[int]:
        """A hypercall of machine ``vm``, see :meth:`KvmVm.hcall`. :raise OSError: EBADF, EIO."""
        revocation = Revocation()
        ret = self._vm(mm, vm).hcall(nr, args, links, revocation)
        return revocation.settle(lambda: ret)

    def linked_containers(self, vm: int, liobn: int) -> list[int]:
        """Handles of the containers that a hypercall about ``liobn`` concerns."""
        file = self._files.get(vm, (None, None))[0]
        return [container.handle for container in file.containers(liobn)] if isinstance(file, KvmVm) else []

    def _memory_of(self, mm: Mm, hva: int, size: int) -> memoryview | None:
        vma, memory = mm.find(hva), self._memory.get(mm)
        if vma is None or memory is None or hva + size > vma.end:
            return None
        view = memory(vma)
        return None if view is None else view[hva - vma.hva : hva - vma.hva + size]

    @property
    def kvm_words(self) -> list[memoryview]:
        """The areas of all tables of virtual machines."""
        return [file.words for file, _ in self._files.values() if isinstance(file, KvmTable)]

    # Groups

    def _get_status(self, group: Group, arg: bytes, revocation: Revocation) -> bytes:
        copy_in(GroupStatus, arg)
        flags = VFIO_GROUP_FLAGS_VIABLE if group.spec.viable else 0
        flags |= VFIO_GROUP_FLAGS_CONTAINER_SET if group.container is not None else 0
        return arg[:4] + struct.pack("=I", flags) + arg[GroupStatus.SIZE :]

    def _set_container(self, group: Group, arg: bytes, revocation: Revocation) -> bytes:
        if len(arg) < 8:
            raise OSError(EFAULT, "the argument is shorter than a container's handle")
        container = self._file(struct.unpack_from("=Q", arg)[0])
        if group.container is not None:
            raise OSError(EINVAL, f"group {group.id} is in a container already")
        if not isinstance(container, VfioContainer):
            raise OSError(EBADFD, "the handle is not a container's")
        if not group.spec.viable:
            raise OSError(EPERM, f"group {group.id} is not viable: not all its devices are bound to VFIO")
        container.attach(group)
        return b""

    def _unset_container(self, group: Group, arg: bytes, revocation: Revocation) -> bytes:
        if group.container is None:
            raise OSError(EINVAL, f"group {group.id} is in no container")
        if group.open_devices:
            raise OSError(EBUSY, f"devices of group {group.id} are open")
        group.container.detach(group, revocation)
        return b""

    def _get_device(self, group: Group, arg: bytes, revocation: Revocation) -> bytes:
        name, end, _ = arg.partition(b"\0")
        if not end:
            raise OSError(EINVAL, "the device's name does not end")
        device = group.devices.get(name.decode("ascii", "replace"))
        if device is None:
            raise OSError(ENODEV, f"group {group.id} has no device {name!r}")
        if group.container is None or group.container.driver is None:
            raise OSError(EINVAL, f"group {group.id} is in no container with a type")
        if device.token is not None:
            raise OSError(EBUSY, f"{device.name} is open already")
        device.pe.set_bus_master(True)
        try:
            device.token = self._on_open(group, device)
        except OSError:
            device.pe.set_bus_master(False)
            raise
        return struct.pack("=Q", device.token)

    # Devices

    def device_closed(self, token: int) -> Pending[None] | None:
        """The client closed the device, or its process died: no DMA of it any more. Unknown tokens are ignored."""
        revocation = Revocation()
        for group in self.groups.values():
            for device in group.open_devices:
                if device.token == token:
                    self._close_device(device, revocation)
        return _pending(revocation)

    def _close_device(self, device: HostDevice, revocation: Revocation) -> None:
        device.pe.set_bus_master(False)
        device.dirty = None
        device.closes += 1
        token = device.token
        assert token is not None, "only an open device is closed"

        def finish() -> None:
            device.token = None
            self._on_close(device.group, device, token)

        revocation.later([device.name], finish)

    def set_dirty_map(self, token: int, dirty: memoryview) -> None:
        """The dirty map of the process that serves the open device with this token, as bytes. Unknown tokens are
        ignored.
        """
        for group in self.groups.values():
            for device in group.open_devices:
                if device.token == token:
                    device.dirty = dirty

    def set_bus_master(self, device: HostDevice, enabled: bool) -> Pending[None] | None:
        """Let an open device master the bus or not, as its command register says."""
        return self._change(device.group, lambda: device.pe.set_bus_master(enabled), revokes=not enabled)

    def freeze(self, group: Group) -> Pending[None] | None:
        """Stop the group's I/O and DMA, as the host does when it finds an error (EEH freeze)."""
        return self._change(group, lambda: group.stop(group.stops | Stop.BOTH), revokes=True)

    def explain(self, device: HostDevice, iova: int, is_write: bool | None = None) -> list[Step]:
        """How a DMA of ``device`` to ``iova`` would go now; see :mod:`vfio_model.host.explain`."""
        container = device.group.container
        driver = container.driver if container else None
        if driver is None:
            return [Step("container", f"group {device.group.id}", 0, "in no container with a type", "fault")]
        return explain(device.pe.words, driver.domain_words, self.segments, iova, is_write)

    def device(self, name: str) -> HostDevice:
        """The device of this name. :raise OSError: ENODEV."""
        for group in self.groups.values():
            if name in group.devices:
                return group.devices[name]
        raise OSError(ENODEV, f"this host has no device {name}")

    def unfreeze(self, group: Group) -> None:
        """Lift every stop of the group, whether the host or EEH's user imposed it."""
        group.stop(Stop.NOTHING)

    def _change(self, group: Group, change: Callable[[], object], *, revokes: bool) -> Pending[None] | None:
        change()
        revocation = Revocation()
        if revokes and group.lanes:
            revocation.later(group.lanes, lambda: None)
        return _pending(revocation)


def _pending(revocation: Revocation) -> Pending[None] | None:
    settled = revocation.settle(lambda: None)
    return settled if isinstance(settled, Pending) else None


def _raiser(error: OSError) -> Callable[[], bytes]:
    def outcome() -> bytes:
        raise error

    return outcome


_GROUP_HANDLERS: dict[int, Callable[[Host, Group, bytes, Revocation], bytes]] = {
    Ioctl.VFIO_GROUP_GET_STATUS: Host._get_status,
    Ioctl.VFIO_GROUP_SET_CONTAINER: Host._set_container,
    Ioctl.VFIO_GROUP_UNSET_CONTAINER: Host._unset_container,
    Ioctl.VFIO_GROUP_GET_DEVICE_FD: Host._get_device,
}
