"""Remote devices of a guest: a link to each (:mod:`guestd.remote_link`), and who tells them of invalidations.

A device that caches translations follows the publisher of its address space; one that gets maps is told by
DMA_UNMAP.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from guestd.clock import GuestClock
from guestd.config import DeviceConfig
from guestd.device_space import DeviceSpace
from guestd.notifier import Publisher, SpaceFollower
from guestd.remote import VfioUserDevice
from guestd.remote_link import RemoteLink
from protocols.transport.kernel import probe
from protocols.transport.loop import Loop
from protocols.transport.notifier import NotifierServer
from vfio_model.errors import ConfigError, PeerLost
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.trace import Trace
from vfio_model.vfio.pci import VFIOPCIDevice


@dataclass(frozen=True)
class GuestParts:
    """What of the guest its remote devices have to do with. ``back`` is told of one that came back."""

    name: str
    directory: Path
    notifier: Literal["process", "inline"]
    ram: RAMBlock
    system: AddressSpace
    clock: GuestClock
    back: Callable[[VFIOPCIDevice], None] = lambda _device: None


class RemoteDevices:
    """Ended by :meth:`close`, when the devices are."""

    def __init__(self, guest: GuestParts, loop: Loop, trace: Trace) -> None:
        self._guest, self._loop, self._trace = guest, loop, trace
        self.ram, self.system, self.clock = guest.ram, guest.system, guest.clock
        self.publisher: Publisher | None = None
        self._hub: NotifierServer | None = None
        self._followers: dict[int, SpaceFollower] = {}
        self.links: dict[str, RemoteLink] = {}
        """By the guest's name for the device."""
        self.losses = 0
        """How often a device was lost."""
        self.sharing = True
        """Whether devices that cache have guest RAM mapped."""

    def open(self, config: DeviceConfig, space: DeviceSpace, bus_master: Callable[[], bool]) -> VfioUserDevice:
        """Connect to the device of ``config``, whose DMA is translated in ``space``; ``bus_master`` is asked when it
        wants to do DMA.

        :raise OSError: it refuses. :raise PeerLost: it is gone, or nobody listens. :raise ConfigError: it cannot cache.
        """
        link = RemoteLink(config, space, bus_master, self, self._loop, self._trace)
        connection = link.open()
        self.links[config.id] = link
        return connection

    def follow(self, name: str, device: VFIOPCIDevice) -> None:
        """``device`` is plugged: what becomes of its connection it is told, and it is brought back."""
        self.links[name].follow(device)

    def forget(self, name: str) -> None:
        """The device was unplugged. Harmless when it is none of these."""
        link = self.links.pop(name, None)
        if link is not None:
            link.close()

    # -- guestd.remote_link.Around -----------------------------------------------------------------------------------

    def follow_notifier(self, space: DeviceSpace) -> str:
        """The publisher, which follows ``space`` from its first remote device on; see ``Around``."""
        if self.publisher is None:
            self.publisher = self._publish()
        if space.as_id not in self._followers:
            self.publisher.add_space(space.as_id)
            follower = self._followers[space.as_id] = SpaceFollower(self.publisher, space.as_id)
            space.address_space.register_listener(follower)
        return os.fspath(self.publisher.path)

    def hears_all(self, space: DeviceSpace) -> bool:
        """See ``Around``."""
        follower = self._followers.get(space.as_id)
        return follower is not None and follower.complete

    @property
    def invalidations(self) -> Publisher | None:
        """See ``Around``."""
        return self.publisher

    def _publish(self) -> Publisher:
        fence = probe()
        if fence is None:
            what = "this kernel has no membarrier(2): remote devices cannot cache"
            raise ConfigError(what, hint="give them dma: mapped, or dma: message")
        guest = self._guest
        if guest.notifier == "inline":
            self._hub = NotifierServer(self._loop, guest.directory, served=True)
        on_x86 = os.uname().machine in ("x86_64", "i686")
        return Publisher(guest.directory, guest.name, self._loop, fence, on_x86=on_x86, trace=self._trace)

    def lost(self, link: RemoteLink) -> None:
        """See ``Around``."""
        self.losses += 1

    def back(self, link: RemoteLink) -> None:
        """See ``Around``."""
        if link.device is not None:
            self._guest.back(link.device)

    # -- memory ------------------------------------------------------------------------------------------------------

    def share_ram(self, *, share: bool) -> None:
        """Give every device that caches its map of guest RAM, or take it away: what it writes comes by message then.

        :raise OSError: it refuses.
        """
        self.sharing = share
        for link in self.links.values():
            if link.caches and link.connection is not None:
                with contextlib.suppress(PeerLost):
                    link.share_ram(link.connection, share=share)

    def close(self) -> None:
        """Harmless twice."""
        for name in list(self.links):
            self.forget(name)
        if self.publisher is not None:
            self.publisher.close()
            self.publisher = None
        if self._hub is not None:
            self._hub.close()
            self._hub = None
