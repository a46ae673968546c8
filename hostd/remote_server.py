"""The process of a remote emulated device: a vfio-user server, by its listening socket.

Several clients may be connected: one that says nothing keeps nobody out. The device is the first one's that negotiates,
until it goes; the others are told EBUSY.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from hostd.device_server import Model, device_factory, find_model
from hostd.device_surroundings import ProcessSurroundings
from hostd.log import log
from hostd.remote_device import RemoteDevice
from protocols.transport.eventfile import EventFile
from protocols.transport.heap import settle
from protocols.transport.kernel import probe
from protocols.transport.loop import Loop
from protocols.transport.unix import StreamConnection, StreamListener
from vfio_model.errors import ConfigError
from vfio_model.trace import NULL_TRACE, Trace

MAX_CLIENTS = 64
"""Connections at a time, silent ones included; the oldest silent one makes room."""


class RemoteServer:
    """Serves ``listener`` (or one ``connection``) with devices of ``model`` until :meth:`stop`."""

    def __init__(self, model: Model, props: dict[str, object], name: str, trace: Trace) -> None:
        factory = device_factory(model)
        self._make = lambda around: factory(around, dict(props))
        self._name, self._trace = name, trace
        self.loop = Loop()
        self._clients: list[RemoteDevice] = []
        self._owner: RemoteDevice | None = None
        self._listener: StreamListener | None = None
        self._done = False
        fence = probe()
        if fence is not None:
            fence.register()

    def listen(self, listener: StreamListener) -> None:
        """Take clients from ``listener``, taken over."""
        self._listener = listener
        self.loop.register(listener, self._accept, served=True)

    def serve(self, connection: StreamConnection) -> None:
        """Serve one client that is connected already; the server ends with it."""
        self._add(connection)

    def _accept(self) -> None:
        assert self._listener is not None, "registered with its listener"
        connection = self._listener.accept(f"client of {self._name}")
        if connection is None:
            return
        if len(self._clients) >= MAX_CLIENTS:
            silent = next((client for client in self._clients if client is not self._owner), None)
            if silent is not None:
                silent.session.end("made room for another client")
        self._add(connection)

    def _add(self, connection: StreamConnection) -> None:
        self._clients.append(RemoteDevice(self.loop, connection, self._make, self._admit, self._ended, self._trace))

    def _admit(self, client: RemoteDevice) -> bool:
        if self._owner is not None:
            return False
        self._owner = client
        return True

    def _ended(self, client: RemoteDevice) -> None:
        if client in self._clients:
            self._clients.remove(client)
        if self._owner is client:
            self._owner = None
        if self._listener is None and not self._clients:
            self.stop()

    def stop(self) -> None:
        """End :meth:`run`."""
        self._done = True
        self.loop.stop()

    def run(self) -> None:
        """Serve until :meth:`stop`. An exception of the device class passes through."""
        while not self._done:
            self.loop.run_once(0.0 if self._busy is not None else None)
            owner = self._busy  # what was served may have stopped it
            if owner is not None and not self._done:
                owner.around.run_idle()

    @property
    def _busy(self) -> RemoteDevice | None:
        """Whoever owns the device, when that has something to do by itself."""
        owner = self._owner
        return owner if owner is not None and owner.around.idle_work and owner.migration.runs else None

    def close(self) -> None:
        """End every client and remove the socket file."""
        for client in list(self._clients):
            client.session.end("the server ends")
        if self._listener is not None:
            self.loop.unregister(self._listener)
            self._listener.close()
        self.loop.close()


def serve_listening(model: str, path: str, props: tuple[str, ...], props_json: str, directory: Path | None) -> None:
    """``hostd device``: serve at ``path`` until SIGTERM.

    :raise ConfigError: for an unknown model, a property that does not fit, or a path that cannot be served.
    """
    find_model(model)
    values = read_props(model, props, props_json)
    name = Path(path).stem
    events = None if directory is None else EventFile(directory / f"{name}.events")
    try:
        server = RemoteServer(model, values, name, NULL_TRACE if events is None else events.trace)
        device_factory(model)(
            ProcessSurroundings(NULL_TRACE), dict(values)
        )  # properties are refused now, not at the first client
        if events is not None:
            server.loop.on_idle(events.flush)
        for number in (signal.SIGTERM, signal.SIGINT):
            server.loop.on_signal(number, server.stop)
        server.listen(StreamListener(path))
        log(name, f"{model} serves {path}")
        try:
            settle()
            server.run()
        finally:
            server.close()
    finally:
        if events is not None:
            events.close()


def read_props(model: str, pairs: tuple[str, ...], text: str) -> dict[str, object]:
    """Properties from ``k=v`` pairs, converted to the type that the model declares, over those of a JSON object.

    :raise ConfigError: when one does not fit.
    """
    try:
        values: dict[str, object] = msgspec.json.decode(text, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise ConfigError(str(error), where="--props") from error
    declared = find_model(model).PROPS
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r} is not K=V", where="--prop")
        if key not in declared:
            raise ConfigError(f"{model} has no property {key!r}", where="--prop", hint=", ".join(sorted(declared)))
        values[key] = _convert(declared[key].type, value, pair)
    return values


_CONVERTERS: dict[type, Callable[[str], object]] = {
    bool: lambda text: {"on": True, "true": True, "off": False, "false": False}[text],
    int: lambda text: int(text, 0),
    float: float,
}


def _convert(kind: type, text: str, pair: str) -> object:
    convert = _CONVERTERS.get(kind, str)
    try:
        return convert(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{pair!r}: not a {kind.__name__}", where="--prop") from error
