"""Which pages of guest RAM were written, by anybody, while the machine is on its way elsewhere.

==================================== =============================================================
who writes                           how it is known
==================================== =============================================================
this process (CPUs, its devices,     :mod:`vfio_model.memory.dirty_log`
DMA that comes by message)
a remote device that translates      it has to give the map of RAM back meanwhile, and writes by message
a remote device that gets maps       its own log if it keeps one, else all that is mapped
an assigned device                   :mod:`vfio_model.vfio.dirty`, one for each container
==================================== =============================================================

Hypercalls that the host answers by itself are no exception: while somebody here follows a table, guestd answers them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from guestd.guest import Guest
from vfio_model.errors import PeerLost, VMStateError
from vfio_model.memory import dirty_log
from vfio_model.memory.dirty_log import DirtyMap
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import RAMRegion
from vfio_model.trace import Trace
from vfio_model.vfio.dirty import DirtySync
from vfio_model.vfio.dirty_source import FeatureDevice, choose_source


class DirtyRam:
    """Of ``guest``; between :meth:`start` and :meth:`stop`."""

    def __init__(self, guest: Guest, trace: Trace) -> None:
        self._guest, self._trace = guest, trace
        self._maps: dict[RAMBlock, DirtyMap] = {}
        self._syncs: list[DirtySync] = []
        self._losses = self._remote_losses = 0
        self.syncs = 0
        """How often devices have been asked."""

    @property
    def _regions(self) -> list[RAMRegion]:
        ranges = self._guest.machine.system.view.ranges
        found = {r.region: None for r in ranges if isinstance(r.region, RAMRegion)}
        return [region for region in found if region.block in self._guest.machine.ram]

    def start(self) -> None:
        """Every write from the return on is known.

        :raise OSError, PeerLost: somebody cannot track; nobody does then.
        """
        self._maps = dirty_log.start(self._regions)
        self._losses, self._remote_losses = self._guest.host.losses, self._guest.remote.losses
        try:
            self._guest.remote.share_ram(share=False)
            for sync in self._make_syncs():
                sync.start()
                self._syncs.append(sync)
        except (OSError, PeerLost):
            self.stop()
            raise

    def _make_syncs(self) -> Iterator[DirtySync]:
        host, system = self._guest.host, self._guest.machine.system
        for space, known in host.containers.items():
            for container in known.containers:
                source = choose_source(container.backend, self._behind(frozenset(container.groups)))
                self._trace("migration_dirty_source", space=space.name, source=type(source).__name__)
                yield DirtySync(source, container.backend, space, system, self._mark)
        for link in self._guest.remote.links.values():
            if link.space is not None and not link.space.lost:
                backend, space = link.space.backend, link.device_space.address_space
                source = choose_source(backend, [link.connection])
                self._trace("migration_dirty_source", space=link.config.id, source=type(source).__name__)
                yield DirtySync(source, backend, space, system, self._mark)

    def _behind(self, groups: frozenset[str]) -> list[FeatureDevice | None]:
        found: list[FeatureDevice | None] = []
        for config, device in self._guest.host.devices.values():
            if config.group_path in groups:
                connection = device.connection if device is not None else None
                able = config.dirty_tracking and isinstance(connection, FeatureDevice)
                found.append(connection if able and isinstance(connection, FeatureDevice) else None)
        return found

    def _mark(self, block: RAMBlock, offset: int, size: int) -> None:
        self._maps[block].mark(offset, size)

    def sync(self) -> None:
        """Ask the devices. :raise OSError, PeerLost, VMStateError: it is not known what they wrote."""
        self.syncs += 1
        for sync in self._syncs:
            sync.sync()
        if self._guest.host.losses != self._losses or self._guest.host.lost:
            raise VMStateError("the host was lost: nobody knows what its devices wrote")
        if self._guest.remote.losses != self._remote_losses:
            raise VMStateError("a remote device was lost: nobody knows what it wrote")

    @property
    def dirty_bytes(self) -> int:
        """Bytes of RAM that have to be sent, as far as it is known."""
        return sum(each.dirty_bytes for each in self._maps.values())

    def take(self) -> Iterator[tuple[int, int, int]]:
        """(number of the block, offset, bytes) of what was written; each is clean once it was yielded."""
        for number, block in enumerate(self._guest.machine.ram):
            for offset, size in self._maps[block].take():
                yield number, offset, size

    def stop(self) -> None:
        """Nothing is tracked any more. Harmless twice."""
        while self._syncs:
            with contextlib.suppress(OSError, PeerLost):
                self._syncs.pop().stop()
        dirty_log.stop(self._regions)
        try:
            self._guest.remote.share_ram(share=True)
        except OSError as error:  # it goes on by message
            self._trace("migration_share_refused", reason=str(error))
