"""Connecting a guest's address space to a container, and letting go of it.

The order is the kernel's and QEMU's (``vfio_legacy_connect_container``)::

    open container, CHECK_EXTENSION ─► open group ─► SET_CONTAINER ─► SET_IOMMU
      ─► sPAPR v2: prereg listener on the system address space (its error ends it) ─► GET_INFO ─► remove the default
         window
         sPAPR v1: ENABLE ─► GET_INFO
         type 1: GET_INFO
      ─► VFIOListener on the devices' address space (its error ends it) ─► initialized

With sPAPR v2 RAM must be preregistered before anything can be mapped, and is unregistered after everything is unmapped.
A container whose host is gone is *abandoned*: its listeners go without a word to anybody, and a new container is
connected in its place; that its listeners are handed every section, and every section its mappings, is what
rebuilds the host's tables.
"""

from __future__ import annotations

from vfio_model.errors import PeerLost, VfioModelError
from vfio_model.memory.address_space import AddressSpace
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.containers import DRIVERS
from vfio_model.vfio.container import VFIOIOMMU
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup, VfioPort
from vfio_model.vfio.kinds import ContainerChoice, choose_kind
from vfio_model.vfio.kvm import KvmAccelerator
from vfio_model.vfio.listener import PreregListener, VFIOListener
from vfio_model.vfio.region import DeviceConnection
from vfio_model.vfio.spapr import SpaprV2
from vfio_model.vfio.spapr_v1 import SpaprV1
from vfio_model.vfio.type1 import Type1

CONTAINER_PATH = "/dev/vfio/vfio"


class VFIOContainer:
    """A connected container with its groups; made by :func:`connect_container`."""

    def __init__(
        self,
        port: VfioPort,
        system: AddressSpace,
        device: AddressSpace,
        *,
        host_page_size: int,
        trace: Trace,
        kvm: KvmAccelerator | None = None,
        wanted: ContainerChoice = "auto",
    ) -> None:
        self.port, self.system, self.device_as, self._trace = port, system, device, trace
        self.handle = port.open(CONTAINER_PATH)
        self.backend = self._make_backend(wanted, host_page_size)
        self.prereg = PreregListener(self.backend, trace=trace) if isinstance(self.backend, SpaprV2) else None
        self.listener = VFIOListener(self.backend, system, host_page_size=host_page_size, trace=trace)
        self.groups: dict[str, VfioGroup] = {}
        self._kvm = kvm
        if kvm is not None and self.prereg is not None:  # what the host maps by itself must be preregistered
            self.listener.link = lambda region: kvm.link(region, [group.handle for group in self.groups.values()])
        self._registered: list[tuple[AddressSpace, PreregListener | VFIOListener]] = []

    def _make_backend(self, wanted: ContainerChoice, host_page_size: int) -> VFIOIOMMU:
        container = SpaprContainer(self.port, self.handle)
        try:
            kind = choose_kind(container, wanted)
        except (OSError, VfioModelError):
            self.port.close(self.handle)
            raise
        if DRIVERS[kind] == "type1":
            return Type1(container, host_page_size=host_page_size, trace=self._trace, kind=kind)
        make = SpaprV2 if kind == "spapr-v2" else SpaprV1
        return make(container, host_page_size=host_page_size, trace=self._trace)

    @property
    def lost(self) -> bool:
        """Whether the host is gone: changes are dropped until a new container takes over."""
        return self.backend.queue.lost

    def add_group(self, path: str) -> VfioGroup:
        """Open the group at ``path`` and attach it; opening it twice yields the same one.

        :raise OSError: as open(2) and ``VFIO_GROUP_SET_CONTAINER`` do; nothing is left open then.
        """
        if path in self.groups:
            return self.groups[path]
        group = VfioGroup(self.port, self.port.open(path))
        try:
            group.set_container(self.handle)
            if self._kvm is not None:
                self._kvm.add_group(group.handle)
        except OSError:
            self.port.close(group.handle)
            raise
        self.groups[path] = group
        self.listener.link_again()
        return group

    def remove_group(self, path: str) -> None:
        """The last device of the group at ``path`` was closed: the group leaves. With the last group everything is
        unmapped, unregistered and closed.
        """
        if list(self.groups) == [path]:
            self.close()
        elif path in self.groups:
            self._close_group(self.groups.pop(path).handle)

    def get_device(self, group: str, name: str) -> DeviceConnection:
        """``VFIO_GROUP_GET_DEVICE_FD`` of ``name`` in a group that was added.

        :raise OSError: ENODEV when the group has no such device.
        """
        return self.port.take_device(self.groups[group].get_device_fd(name))

    def start(self) -> None:
        """From SET_IOMMU to initialized; at least one group is attached."""
        self.backend.set_type()
        if self.prereg is not None:
            self._register(self.system, self.prereg)
        self.backend.start()
        self._register(self.device_as, self.listener)
        self.listener.initialized = True

    def _register(self, space: AddressSpace, listener: PreregListener | VFIOListener) -> None:
        space.register_listener(listener)
        self._registered.append((space, listener))
        if listener.error is not None:
            raise listener.error
        if self.backend.queue.lost:
            raise PeerLost("hostd", "connecting a container")

    def abandon(self) -> None:
        """Forget the host: listeners go, nothing is unmapped, descriptors are closed."""
        self.backend.queue.lost = True
        self._unregister()
        self._close_handles()

    def close(self) -> None:
        """Unmap, unregister and close everything; the default window comes back with the container's end."""
        self._unregister()
        self._close_handles()

    def _unregister(self) -> None:
        while self._registered:
            space, listener = self._registered.pop()
            space.unregister_listener(listener)

    def _close_handles(self) -> None:
        handles = [group.handle for group in self.groups.values()]
        self.groups.clear()
        for handle in handles:
            self._close_group(handle)
        self.port.close(self.handle)

    def _close_group(self, handle: int) -> None:
        if self._kvm is not None and not self.lost:
            self._kvm.del_group(handle)
        self.port.close(handle)


def connect_container(
    port: VfioPort,
    group: str,
    system: AddressSpace,
    device: AddressSpace,
    *,
    host_page_size: int,
    trace: Trace = NULL_TRACE,
    kvm: KvmAccelerator | None = None,
    kind: ContainerChoice = "auto",
) -> VFIOContainer:
    """A container that follows ``device`` (the PHB's address space) with ``group`` attached; ``system`` is where
    RAM lies; it is of the ``kind`` that is asked for. With ``kvm`` its windows are linked to the tables that live in
    the kernel.

    :raise OSError: the first error of the host or of a listener, as the text above orders them; nothing is left behind.
    :raise PeerLost: the host went away meanwhile.
    """
    container = VFIOContainer(port, system, device, host_page_size=host_page_size, trace=trace, kvm=kvm, wanted=kind)
    try:
        container.add_group(group)
        container.start()
    except (OSError, VfioModelError):
        container.abandon()
        raise
    return container
