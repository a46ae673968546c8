"""Network back ends: the other end of a device's cable.

Frames are Ethernet frames from the destination address on, without the frame check sequence. Sending never waits: what
cannot go is dropped and counted. What comes is offered to the device; one that has no buffer says so, and the back end
keeps the frame, and a bounded number of others, until :meth:`NetBackend.resume`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

OnFrame = Callable[[bytes], bool]
"""Takes a frame, or says False: there is no buffer now."""
QUEUE: Final = 256
"""Frames that wait for a device without buffers; the newest beyond it are dropped."""


class NetBackend(Protocol):
    """One device's connection."""

    def send(self, frame: bytes) -> None:
        """A frame of the device's."""

    def resume(self) -> None:
        """The device has buffers again: offer what waits."""

    def close(self) -> None:
        """Nothing is offered from now on. Harmless twice."""


class FrameQueue:
    """What every back end has towards its device: offers in order, keeps what is not taken."""

    def __init__(self, on_frame: OnFrame) -> None:
        self._on_frame: OnFrame | None = on_frame
        self._waiting: deque[bytes] = deque()
        self._offering = False
        self.dropped = 0
        """Frames that found the queue full, or nobody."""

    def offer(self, frame: bytes) -> None:
        """``frame`` has come."""
        if self._on_frame is None or len(self._waiting) >= QUEUE:
            self.dropped += 1
            return
        self._waiting.append(frame)
        self.resume()

    def resume(self) -> None:
        """Offer what waits; a device that sends while it takes a frame does not get the next one inside that."""
        if self._offering:
            return
        self._offering = True
        try:
            while self._waiting and self._on_frame is not None and self._on_frame(self._waiting[0]):
                if self._waiting:
                    self._waiting.popleft()
        finally:
            self._offering = False

    def close(self) -> None:
        """Nobody is there any more."""
        self._on_frame = None
        self._waiting.clear()


class NoNet:
    """A cable that is not plugged in."""

    def __init__(self) -> None:
        self.dropped = 0
        """Frames that were sent into it."""

    def send(self, frame: bytes) -> None:
        """Lost."""
        self.dropped += 1

    def resume(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing to close."""


class Hub:
    """A hub in this process: what one port sends, every other gets."""

    def __init__(self) -> None:
        self._ports: list[HubPort] = []

    def join(self, on_frame: OnFrame) -> HubPort:
        """A new port."""
        port = HubPort(self, on_frame)
        self._ports.append(port)
        return port

    def repeat(self, sender: HubPort, frame: bytes) -> None:
        """``frame`` to every port but ``sender``."""
        for port in list(self._ports):
            if port is not sender:
                port.queue.offer(frame)

    def leave(self, port: HubPort) -> None:
        """Take ``port`` out. Harmless twice."""
        if port in self._ports:
            self._ports.remove(port)

    def __len__(self) -> int:
        return len(self._ports)


class HubPort:
    """A device's connection to a hub."""

    def __init__(self, hub: Hub, on_frame: OnFrame) -> None:
        self._hub = hub
        self.queue = FrameQueue(on_frame)

    def send(self, frame: bytes) -> None:
        """See :class:`NetBackend`."""
        self._hub.repeat(self, frame)

    def resume(self) -> None:
        """See :class:`NetBackend`."""
        self.queue.resume()

    def close(self) -> None:
        """See :class:`NetBackend`."""
        self.queue.close()
        self._hub.leave(self)
