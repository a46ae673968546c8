"""Disks and networks of a device process (``vfio_model.backends.opening.BackendHost``).

A device that stands (nobody uses it, or it is being migrated) hears nothing of its network: frames wait, as many as
its queue holds, and are offered when it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from protocols.transport.block import FileDisk, open_file
from protocols.transport.loop import Loop
from protocols.transport.net import open_datagram
from vfio_model.backends.net import FrameQueue, Hub, NetBackend, OnFrame

_HUB: Final = "hub:"


class DeviceBackends:
    """What one device opens, in ``loop``. ``awake()`` says whether it may hear something."""

    def __init__(self, loop: Loop, awake: Callable[[], bool]) -> None:
        self._loop, self._awake = loop, awake
        self._hubs: dict[str, Hub] = {}
        self._nets: list[NetBackend] = []
        self._waits = False
        """Whether a frame came while the device stood."""

    def open_block(self, text: str) -> FileDisk:
        """See ``BackendHost``."""
        return open_file(text)

    def open_net(self, text: str, on_frame: OnFrame) -> NetBackend:
        """See ``BackendHost``."""

        def offered(frame: bytes) -> bool:
            if not self._awake():
                self._waits = True
                return False
            return on_frame(frame)

        net: NetBackend
        if text.startswith(_HUB):
            net = self._hubs.setdefault(text.removeprefix(_HUB), Hub()).join(offered)
        else:
            net = open_datagram(self._loop, text, lambda: FrameQueue(offered))
        self._nets.append(net)
        return net

    def go_on(self) -> None:
        """The device may be awake again: offer what waits."""
        if self._waits and self._awake():
            self._waits = False
            for net in self._nets:
                net.resume()
