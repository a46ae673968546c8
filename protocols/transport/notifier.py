"""The hub on its sockets: ``notifier.sock``, ``notifier.zmq`` and pidfds, on an event loop.

Used by the notifier process, and by a guest machine that runs the hub inline. Carries events to
:class:`protocols.notifier.hub.Hub` and does its effects; nothing is decided here.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections import deque
from pathlib import Path

from protocols.notifier.events import (
    Broken,
    Close,
    Connected,
    Died,
    Disconnect,
    Disconnected,
    HubEvent,
    Post,
    Received,
    Refuse,
    RouterReceived,
    Send,
    Tick,
    Unsent,
)
from protocols.notifier.hub import Hub
from protocols.notifier.messages import (
    FROM_HUB,
    ROUTER_FROM_HUB,
    ROUTER_TO_HUB,
    TO_HUB,
    FromHub,
    Refused,
    RouterFromHub,
    RouterToHub,
    ToHub,
    fd_count,
)
from protocols.transport.channel import FdChannel, RouterChannel
from protocols.transport.loop import Loop, LoopTimer
from protocols.transport.runtime import RoleLock
from protocols.transport.unix import close_fds
from protocols.transport.unix_listener import SeqpacketListener
from protocols.transport.zmq import RouterServer, Sent
from vfio_model.errors import PeerLost, RemoteProtocolError
from vfio_model.ranges import U64_MAX

Channel = FdChannel[ToHub, FromHub]


class _Watch:
    """A pidfd that is only watched; the hub says when it is closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


class NotifierServer:
    """Serves ``directory``'s notifier sockets on ``loop`` until :meth:`close`. ``served``: also inside waits
    (inline)."""

    def __init__(
        self, loop: Loop, directory: str | os.PathLike[str], lock: RoleLock | None = None, *, served: bool = False
    ) -> None:
        self.hub = Hub(lambda: secrets.randbelow(U64_MAX) + 1)
        self._loop, self._served = loop, served
        self._channels: dict[int, Channel] = {}
        self._watches: dict[int, _Watch] = {}
        self._numbers = itertools.count(1)
        self._timer: LoopTimer | None = None
        server = RouterServer(Path(directory) / "notifier.zmq", lock=lock)
        self._router: RouterChannel[RouterToHub, RouterFromHub] = RouterChannel(
            server, ROUTER_TO_HUB, ROUTER_FROM_HUB, Refused
        )
        self._listener = SeqpacketListener(Path(directory) / "notifier.sock")
        loop.register(self._listener, self._accept, served=served)
        loop.register(self._router, self._route, served=served)

    def _handle(self, event: HubEvent) -> None:
        """What could not be posted goes back to the hub before any other event, so that nothing is overtaken."""
        events = deque([event])
        while events:
            unsent: dict[bytes, bool] = {}
            for effect in self.hub.handle(events.popleft(), time.monotonic_ns()):
                if isinstance(effect, Post):
                    events += self._post(effect, unsent)
                else:
                    self._do(effect)
        self._set_timer()

    def _do(self, effect: Send | Disconnect | Refuse | Close) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Disconnect():
                self._disconnect(effect.peer)
            case Refuse():
                self._router.refuse(effect.identity, effect.reason)
            case Close():
                self._close_fds(effect.fds)

    def _send(self, effect: Send) -> None:
        channel = self._channels.get(effect.peer)
        if channel is None:
            return
        try:
            channel.send(effect.message, effect.fds)
        except PeerLost:
            peer = effect.peer
            self._loop.call_later(0, lambda: self._lost(peer, None), served=self._served)

    def _post(self, effect: Post, unsent: dict[bytes, bool]) -> list[HubEvent]:
        if effect.identity not in unsent:
            sent = self._router.send(effect.identity, effect.message)
            if sent is Sent.OK:
                return []
            unsent[effect.identity] = sent is Sent.AGAIN
        return [Unsent(effect.identity, effect.message, unsent[effect.identity])]

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moment = self.hub.next_deadline_ns()
        if moment is not None:
            self._timer = self._loop.call_later(moment - time.monotonic_ns(), self._tick, served=self._served)

    def _tick(self) -> None:
        self._timer = None
        self._handle(Tick())

    def _accept(self) -> None:
        connection = self._listener.accept()
        if connection is None:
            return
        try:
            pid, pidfd = connection.peer().pid, connection.open_pidfd()
        except PeerLost:
            connection.close()
            return
        number = next(self._numbers)
        connection.name = f"process {pid}"
        channel: Channel = FdChannel(connection, TO_HUB, FROM_HUB, fd_count)
        self._channels[number] = channel
        self._watches[pidfd] = watch = _Watch(pidfd)
        self._loop.register(channel, lambda: self._receive(number), served=self._served)
        self._loop.register(watch, lambda: self._died(number, watch), served=self._served)
        self._handle(Connected(number, pid, pidfd))

    def _receive(self, number: int) -> None:
        channel = self._channels.get(number)
        if channel is None:
            return
        try:
            received = channel.receive()
        except PeerLost:
            self._lost(number, None)
        except RemoteProtocolError as error:
            self._lost(number, str(error))
        else:
            if received is not None:
                self._handle(Received(number, *received))

    def _lost(self, number: int, reason: str | None) -> None:
        self._handle(Disconnected(number) if reason is None else Broken(number, reason))
        self._disconnect(number)

    def _died(self, number: int, watch: _Watch) -> None:
        self._loop.unregister(watch)
        self._handle(Died(number))
        self._disconnect(number)

    def _disconnect(self, number: int) -> None:
        channel = self._channels.pop(number, None)
        if channel is not None:
            self._loop.unregister(channel)
            channel.close()

    def _close_fds(self, fds: tuple[int, ...]) -> None:
        for fd in fds:
            watch = self._watches.pop(fd, None)
            if watch is not None:
                self._loop.unregister(watch)
        close_fds(fds)

    def _route(self) -> None:
        received = self._router.receive()
        if received is not None:
            self._handle(RouterReceived(*received))

    def close(self) -> None:
        """Leave the loop and close everything. Harmless twice."""
        for number in self.hub.peers():
            self._handle(Died(number))
            self._disconnect(number)
        for source in (self._listener, self._router):
            self._loop.unregister(source)
            source.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
