"""The process of a remote emulated device: a vfio-user server, by its listening socket.

The device lives as long as the server. Several clients may be connected: one that says nothing keeps nobody out. The
device is the first one's that negotiates, until it goes; the others are told EBUSY.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable

from hostd.device_surroundings import ProcessSurroundings
from hostd.log import log
from hostd.remote_client import RemoteClient
from hostd.remote_device import RemoteDevice
from protocols.transport.kernel import probe
from protocols.transport.loop import Loop
from protocols.transport.unix import StreamConnection
from protocols.transport.unix_listener import StreamListener
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import Trace

MAX_CLIENTS = 64
"""Connections at a time, silent ones included; the oldest silent one makes room."""


class RemoteServer:
    """Serves the device that ``make`` makes, by a listener or one connection, until :meth:`stop`.

    :raise ConfigError: when the device's properties do not fit.
    """

    def __init__(self, make: Callable[[ProcessSurroundings], PCIDevice], name: str, trace: Trace) -> None:
        self.name, self._trace = name, trace
        self.loop = Loop()
        try:
            self.unit = RemoteDevice(make, self.loop, trace)
        except BaseException:
            self.loop.close()
            raise
        self._clients: list[RemoteClient] = []
        self._owner: RemoteClient | None = None
        self._listener: StreamListener | None = None
        self._done = False
        fence = probe()
        if fence is not None:
            fence.register()
        _raise_descriptor_limit()

    def listen(self, listener: StreamListener) -> None:
        """Take clients from ``listener``, taken over."""
        self._listener = listener
        self.loop.register(listener, self._accept, served=True)

    def serve(self, connection: StreamConnection) -> None:
        """Serve one client that is connected already; the server ends with it."""
        self._add(connection)

    def _accept(self) -> None:
        assert self._listener is not None, "registered with its listener"
        connection = self._listener.accept(f"client of {self.name}")
        if connection is None:
            return
        if len(self._clients) >= MAX_CLIENTS:
            silent = next((client for client in self._clients if client is not self._owner), None)
            if silent is not None:
                silent.session.end("made room for another client")
        self._add(connection)

    def _add(self, connection: StreamConnection) -> None:
        self._clients.append(RemoteClient(self.loop, connection, self.unit, self, self._trace))

    # -- hostd.remote_client.Owner -----------------------------------------------------------------------------------

    def admit(self, client: RemoteClient) -> bool:
        """See ``Owner``."""
        if self._owner is not None:
            log(self.name, "a second client is refused (EBUSY): the device serves another one")
            return False
        self._owner = client
        self.unit.used = True
        with contextlib.suppress(OSError):
            log(self.name, f"client connected (pid {client.session.endpoint.stream.peer().pid})")
        return True

    def ended(self, client: RemoteClient, reason: str) -> None:
        """See ``Owner``."""
        if client in self._clients:
            self._clients.remove(client)
        if self._owner is client:
            self._owner = None
            log(self.name, f"client disconnected: {reason}; the device keeps its state")
        else:
            log(self.name, f"a connection without the device ended: {reason}")
        if self._listener is None and not self._clients:
            self.stop()

    def let_work(self) -> float | None:
        """See ``Owner``."""
        owner = self._owner
        if owner is None:
            return None
        owner.look()
        return self.unit.work(clock=not owner.session.has_clock)

    # -- life --------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End :meth:`run`."""
        self._done = True
        self.loop.stop()

    def run(self) -> None:
        """Serve until :meth:`stop`. An exception of the device class passes through."""
        while not self._done:
            self.loop.run_once(self.let_work())

    def close(self) -> None:
        """End every client and the device, and remove the socket file."""
        for client in list(self._clients):
            client.session.end("the server ends")
        self.unit.close()
        if self._listener is not None:
            self.loop.unregister(self._listener)
            self._listener.close()
        self.loop.close()


def _raise_descriptor_limit() -> None:
    """A client's memory may be many files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
