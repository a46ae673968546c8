"""All containers that follow one address space of a guest: QEMU's ``VFIOAddressSpace``.

A group joins a container that is there if the host lets it, and gets one of its own if not. So the groups behind a PHB
share one sPAPR v2 or type 1 container, while each has its own v1 container: a v1 table is not shared among PEs.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.memory.address_space import AddressSpace
from vfio_model.ranges import U64_MAX
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vfio.connect import VFIOContainer, connect_container
from vfio_model.vfio.host_window import VFIOHostDMAWindow
from vfio_model.vfio.ioctl import VfioPort
from vfio_model.vfio.kinds import ContainerChoice
from vfio_model.vfio.kvm import KvmAccelerator
from vfio_model.vfio.region import DeviceConnection


@dataclass(frozen=True, slots=True)
class ContainerOptions:
    """What all containers of an address space are made with; ``host_page_size`` in bytes."""

    host_page_size: int
    kind: ContainerChoice = "auto"
    kvm: KvmAccelerator | None = None


class VFIOAddressSpace:
    """The containers that follow ``device``, a PHB's address space, over ``port``; RAM lies in ``system``."""

    def __init__(
        self,
        port: VfioPort,
        system: AddressSpace,
        device: AddressSpace,
        options: ContainerOptions,
        *,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self._port, self._system, self._device = port, system, device
        self._options, self._trace = options, trace
        self.containers: list[VFIOContainer] = []

    @property
    def lost(self) -> bool:
        """Whether the host is gone."""
        return any(container.lost for container in self.containers)

    @property
    def windows(self) -> list[VFIOHostDMAWindow]:
        """The host windows of every container."""
        return [window for container in self.containers for window in container.backend.windows]

    @property
    def address_bits(self) -> int:
        """Of the addresses that every container can map; 64 as long as there is none."""
        last = [max((window.max_iova for window in each.backend.windows), default=U64_MAX) for each in self.containers]
        return min(last, default=U64_MAX).bit_length()

    def has_group(self, path: str) -> bool:
        """Whether one of the containers has the group at ``path``."""
        return self._container_of(path) is not None

    def add_group(self, path: str) -> VFIOContainer:
        """The container that the group at ``path`` is in, from now on if it was in none.

        :raise OSError: as :func:`~vfio_model.vfio.connect.connect_container` says. :raise PeerLost: the host went away.
        """
        if known := self._container_of(path):
            return known
        for container in self.containers:
            try:
                container.add_group(path)
            except OSError as error:
                self._trace("vfio_group_not_shared", path=path, reason=error.strerror or str(error))
            else:
                return container
        options = self._options
        made = connect_container(
            self._port,
            path,
            self._system,
            self._device,
            host_page_size=options.host_page_size,
            kind=options.kind,
            kvm=options.kvm,
            trace=self._trace,
        )
        self.containers.append(made)
        return made

    def _container_of(self, path: str) -> VFIOContainer | None:
        return next((container for container in self.containers if path in container.groups), None)

    def remove_group(self, path: str) -> None:
        """The last device of the group was closed: it leaves, and with its last group the container goes.

        :raise OSError: when the host refuses; it is gone from here all the same. :raise PeerLost: likewise.
        """
        container = self._container_of(path)
        if container is None:
            return
        try:
            container.remove_group(path)
        finally:
            if not container.groups:
                self.containers.remove(container)

    def get_device(self, group: str, name: str) -> DeviceConnection:
        """``VFIO_GROUP_GET_DEVICE_FD`` of ``name`` in a group that was added. :raise OSError: as it does."""
        container = self._container_of(group)
        assert container is not None, "a device is opened in a group that was added"
        return container.get_device(group, name)

    def abandon(self) -> None:
        """Forget the host: see :meth:`~vfio_model.vfio.connect.VFIOContainer.abandon`."""
        while self.containers:
            self.containers.pop().abandon()

    def close(self) -> None:
        """Unmap, unregister and close everything, the container made last first."""
        while self.containers:
            self.containers.pop().close()
