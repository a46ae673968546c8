"""A host in the test's own loop: it opens everything, answers ioctls as told, or falls silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from protocols.port import files, messages
from protocols.transport.channel import FdChannel, RouterChannel
from protocols.transport.loop import Loop
from protocols.transport.unix import close_fds
from protocols.transport.unix_listener import SeqpacketListener
from protocols.transport.zmq import RouterServer
from vfio_model.errors import PeerLost

Channel = FdChannel[files.Request, files.Response]
MM = 77


class FakeHost:
    """``on_ioctl(message)`` gives the answer, or None for none. ``opened`` are the files that are open, by handle."""

    def __init__(self, directory: Path, loop: Loop) -> None:
        self.loop = loop
        self.on_ioctl: Callable[[messages.Ioctl], messages.Return | None] = succeed
        self.on_file: Callable[[files.Request], files.Response | None] = self._open
        self.ioctls: list[messages.Ioctl] = []
        self.requests: list[files.Request] = []
        self.pongs = True
        self.channels: list[Channel] = []
        self._handles = 100
        self._listener = SeqpacketListener(directory / "hostd.sock")
        self._router: RouterChannel[messages.Request, messages.Response] = RouterChannel(
            RouterServer(directory / "hostd.zmq"), messages.REQUESTS, messages.RESPONSES, messages.Refused
        )
        loop.register(self._listener, self._accept, served=True)
        loop.register(self._router, self._route, served=True)

    def _open(self, request: files.Request) -> files.Response:
        if isinstance(request, files.OpenMm):
            return files.Opened(MM)
        if isinstance(request, files.OpenFile):
            self._handles += 1
            return files.Opened(self._handles)
        return files.Done()

    def _accept(self) -> None:
        connection = self._listener.accept()
        if connection is None:
            return
        channel: Channel = FdChannel(connection, files.REQUESTS, files.RESPONSES, files.fd_count)
        self.channels.append(channel)
        self.loop.register(channel, lambda: self._receive(channel), served=True)

    def _receive(self, channel: Channel) -> None:
        try:
            received = channel.receive()
        except PeerLost:
            self.hang_up(channel)
            return
        if received is not None:
            close_fds(received[1])
            self.requests.append(received[0])
            answer = self.on_file(received[0])
            if answer is not None:
                channel.send(answer)

    def hang_up(self, channel: Channel) -> None:
        """Close one open file from this side."""
        if channel in self.channels:
            self.channels.remove(channel)
            self.loop.unregister(channel)
            channel.close()

    def _route(self) -> None:
        received = self._router.receive()
        if received is None:
            return
        peer, message = received
        if isinstance(message, messages.Ping):
            if self.pongs:
                self._router.send(peer, messages.Pong(message.seq))
            return
        self.ioctls.append(message)
        answer = self.on_ioctl(message)
        if answer is not None:
            self._router.send(peer, answer)

    def close(self) -> None:
        """Everything ends."""
        for channel in list(self.channels):
            self.hang_up(channel)
        for source in (self._listener, self._router):
            self.loop.unregister(source)
            source.close()


def succeed(message: messages.Ioctl) -> messages.Return:
    """The argument as it came."""
    return messages.Return(message.seq, 0, message.count, message.arg)
