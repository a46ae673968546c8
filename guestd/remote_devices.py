"""Remote devices of a guest: their connections, the guest's RAM that they have mapped, and who tells them of
invalidations.

A device gets RAM mapped and caches translations if it can ask for them; then it follows the publisher of its bridge's
address space. One with ``dma: message`` gets neither.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from guestd.clock import GuestClock
from guestd.config import DeviceConfig
from guestd.dma_services import DmaServices
from guestd.notifier import Publisher, SpaceFollower
from guestd.remote import VfioUserDevice, capabilities
from protocols.transport.kernel import Pidfd, probe
from protocols.transport.loop import Loop
from protocols.transport.notifier import NotifierServer
from protocols.transport.vfio_user import connect
from protocols.vfio_user import messages as wire
from vfio_model.errors import ConfigError, PeerLost
from vfio_model.machine.phb import SpaprPhb
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.trace import Trace

_DMA_RW: Final = 3


@dataclass(frozen=True)
class GuestParts:
    """What of the guest its remote devices have to do with."""

    name: str
    directory: Path
    notifier: Literal["process", "inline"]
    ram: RAMBlock
    system: AddressSpace
    clock: GuestClock


class RemoteDevices:
    """Ended by :meth:`close`, when the devices are."""

    def __init__(self, guest: GuestParts, loop: Loop, trace: Trace) -> None:
        self._guest, self._loop, self._trace = guest, loop, trace
        self.publisher: Publisher | None = None
        self._hub: NotifierServer | None = None
        self._followers: dict[int, SpaceFollower] = {}
        self._sharing: list[VfioUserDevice] = []
        """Those that have guest RAM mapped."""

    def open(self, config: DeviceConfig, phb: SpaprPhb, bus_master: Callable[[], bool]) -> VfioUserDevice:
        """Connect to the device of ``config`` behind ``phb``; ``bus_master`` is asked when it wants to do DMA.

        :raise OSError: it refuses. :raise PeerLost: it is gone, or nobody listens. :raise ConfigError: it cannot cache.
        """
        guest = self._guest
        by_message = config.dma == "message"
        publisher = None if by_message else self._publishing(phb)
        endpoint = connect(config.socket, config.id, capabilities(ats=not by_message))
        services = DmaServices(phb.address_space, guest.system, bus_master, trace=self._trace)
        try:
            process = Pidfd(endpoint.stream.open_pidfd())
        except PeerLost:
            endpoint.close()
            raise
        connection = VfioUserDevice(
            config.id, endpoint, self._loop, process=process, services=services, trace=self._trace
        )
        try:
            connection.reset()  # it may have served another guest
            guest.clock.attach(connection)
            if publisher is not None and connection.extensions.ats:
                connection.dma_map(self._ram_map, guest.ram.fd)
                if connection.extensions.notifier:
                    connection.notifier(phb.buid, os.fspath(publisher.path))
        except (OSError, PeerLost):
            connection.close()
            raise
        self._sharing = [each for each in self._sharing if each.lost is None]
        if publisher is not None and connection.extensions.ats:
            self._sharing.append(connection)
        return connection

    def _publishing(self, phb: SpaprPhb) -> Publisher:
        """The publisher, which follows the address space of ``phb`` from its first remote device on."""
        if self.publisher is None:
            self.publisher = self._publish()
        if phb.buid not in self._followers:
            self.publisher.add_space(phb.buid)
            follower = self._followers[phb.buid] = SpaceFollower(self.publisher, phb.buid)
            phb.address_space.register_listener(follower)
        return self.publisher

    def _publish(self) -> Publisher:
        fence = probe()
        if fence is None:
            what = "this kernel has no membarrier(2): remote devices cannot cache"
            raise ConfigError(what, hint="give them dma: message")
        guest = self._guest
        if guest.notifier == "inline":
            self._hub = NotifierServer(self._loop, guest.directory, served=True)
        on_x86 = os.uname().machine in ("x86_64", "i686")
        return Publisher(guest.directory, guest.name, self._loop, fence, on_x86=on_x86, trace=self._trace)

    def share_ram(self, *, share: bool) -> None:
        """Give every device its map of guest RAM, or take it away: what it writes comes by message then.

        :raise OSError: it refuses.
        """
        for connection in self._sharing:
            if connection.lost is not None:
                continue
            with contextlib.suppress(PeerLost):
                if share:
                    connection.dma_map(self._ram_map, self._guest.ram.fd)
                else:
                    connection.dma_unmap(wire.DmaUnmap(address=0, size=self._guest.ram.size))

    @property
    def _ram_map(self) -> wire.DmaMap:
        ram = self._guest.ram
        return wire.DmaMap(flags=_DMA_RW, offset=ram.fd_offset, address=0, size=ram.size)

    def close(self) -> None:
        """Harmless twice."""
        if self.publisher is not None:
            self.publisher.close()
            self.publisher = None
        if self._hub is not None:
            self._hub.close()
            self._hub = None
