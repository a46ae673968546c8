"""A device model as a vfio-user server: for the command line, and from Python in five lines::

    from hostd.serve import serve_device
    from my_device import MyDevice

    serve_device(MyDevice, socket="/tmp/my.sock", size=4096)

QEMU attaches it with ``-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/my.sock"}}'``; the whole
command line is printed when the server is ready. A test starts the same in a process of its own with
:func:`device_server`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket as sockets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from hostd.device_server import Model, device_factory, device_process
from hostd.log import log
from hostd.model_name import find_class
from hostd.remote_server import RemoteServer
from hostd.spawn import SpawnProcess
from protocols.transport.eventfile import EventFile
from protocols.transport.heap import settle
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import deadline_scale
from protocols.transport.unix import StreamConnection, check_path
from protocols.transport.unix_listener import StreamListener
from vfio_model.errors import ConfigError
from vfio_model.trace import NULL_TRACE

START_SECONDS: Final = 20.0
END_SECONDS: Final = 5.0
Announce = Literal["text", "json", "nothing"]


def serve_device(
    model: Model,
    *,
    socket: str | os.PathLike[str] | None = None,
    fd: int | None = None,
    announce: Announce = "text",
    directory: Path | None = None,
    **props: object,
) -> None:
    """Serve ``model`` (a class, or a name as on the command line) with ``props`` until SIGINT or SIGTERM.

    It listens at the path ``socket``, or takes ``fd``: a listening socket, or the connection to one client, with which
    it ends. When it is ready it says how QEMU attaches it, as ``text`` on stderr or one line of ``json`` on stdout.
    ``directory`` gets a trace.

    :raise ConfigError: for an unknown model, a property that does not fit, a path or descriptor that cannot be served.
    """
    if (socket is None) == (fd is None):
        raise ConfigError("a server has one place to be reached", hint="give either a socket path or a descriptor")
    cls = find_class(model) if isinstance(model, str) else model
    factory = device_factory(cls)
    name = model if isinstance(model, str) else cls.__name__
    role = name if socket is None else Path(socket).stem
    with contextlib.ExitStack() as stack:
        events = None
        if directory is not None:
            events = EventFile(directory / f"{role}.events")
            stack.callback(events.close)
        server = RemoteServer(
            lambda around: factory(around, dict(props)), role, NULL_TRACE if events is None else events.trace
        )
        stack.callback(server.close)
        if events is not None:
            events.follow(server.loop)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                server.loop.on_signal(number, server.stop)
        where = _reach(server, socket, fd)
        _announce(announce, name, role, where)
        settle()
        server.run()
        log(role, "ends")


def _reach(server: RemoteServer, path: str | os.PathLike[str] | None, fd: int | None) -> str:
    if path is not None:
        server.listen(StreamListener(check_path(path)))
        return os.path.abspath(path)
    assert fd is not None, "one of the two is given"
    try:
        sock = sockets.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"not a socket: {error.strerror}", where=f"--fd {fd}") from error
    if sock.family != sockets.AF_UNIX or sock.type != sockets.SOCK_STREAM:
        sock.close()
        raise ConfigError("not an AF_UNIX stream socket", where=f"--fd {fd}")
    os.set_inheritable(sock.fileno(), False)
    if sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_ACCEPTCONN):
        server.listen(StreamListener.adopt(sock))
        return sock.getsockname() or f"descriptor {fd}"
    server.serve(StreamConnection(sock, f"client of {server.name}"))
    return ""


def qemu_arguments(path: str) -> list[str]:
    """The options of QEMU that attach the device at ``path``, with RAM that its process can map."""
    device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": path}}
    return [
        "-machine",
        "q35,memory-backend=mem",
        "-m",
        "512M",
        "-object",
        "memory-backend-memfd,id=mem,size=512M,share=on",
        "-device",
        json.dumps(device, separators=(",", ":")),
    ]


def _announce(how: Announce, name: str, role: str, where: str) -> None:
    arguments = qemu_arguments(where) if where else []
    if how == "json":
        ready = {"device": name, "socket": where, "pid": os.getpid(), "qemu": arguments}
        print(json.dumps(ready), flush=True)
    elif how == "text":
        log(role, f"{name} serves {where or 'one client'}, pid {os.getpid()}; Ctrl-C ends it")
        if where:
            print(f"attach it with:\n  qemu-system-x86_64 {shlex.join(arguments)}", file=sys.stderr, flush=True)


# -- in a process of its own -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServedDevice:
    """A server in another process; :attr:`path` is its socket."""

    path: str
    process: SpawnProcess
    pidfd: Pidfd

    @property
    def pid(self) -> int:
        """Of the server."""
        return self.pidfd.pid

    def kill(self) -> None:
        """SIGKILL, and wait for the end. The socket file stays, as after any such end."""
        self.pidfd.send_signal(signal.SIGKILL)
        self.process.join()

    def stop(self) -> int | None:
        """SIGTERM, and the exit status."""
        self.pidfd.send_signal(signal.SIGTERM)
        self.process.join(END_SECONDS * deadline_scale())
        status: int | None = self.process.exitcode
        return status


@contextlib.contextmanager
def device_server(
    model: Model, *, socket: str | os.PathLike[str], directory: Path | None = None, **props: object
) -> Iterator[ServedDevice]:
    """``model`` (a class that dill can pickle, or a name) served at ``socket`` by a child process, from when it listens
    to the end of the ``with`` block.

    :raise ConfigError: when the child ended before it listened; what it had to say is on stderr.
    """
    path = check_path(socket)
    process = SpawnProcess(
        target=_serve_main,
        args=(os.getpid(), model, path, directory, props),
        name=f"serve-{Path(path).stem}",
        daemon=True,
    )
    process.start()
    served = ServedDevice(path, process, Pidfd.open(process.pid))
    try:
        _await_listening(served)
        yield served
    finally:
        if served.pidfd.alive() and served.stop() is None:
            served.kill()
        process.join()
        process.close()
        served.pidfd.close()
        Path(path).unlink(missing_ok=True)


def _await_listening(served: ServedDevice) -> None:
    end = select.poll()
    end.register(served.pidfd, select.POLLIN)
    deadline = time.monotonic() + START_SECONDS * deadline_scale()
    while not os.path.exists(served.path):
        if end.poll(5) or time.monotonic() > deadline:
            raise ConfigError("the server did not start", where=served.path, hint="its messages are on stderr")


def _serve_main(parent: int, model: Model, path: str, directory: Path | None, props: dict[str, object]) -> None:
    """The main function of the child."""
    with device_process(parent, Path(path).stem, None):
        serve_device(model, socket=path, announce="nothing", directory=directory, **props)  # type: ignore[arg-type]
