"""Device processes: how they are started, and what runs in them.

A device server is a child made by ``multiprocess`` (spawn, so that nothing is inherited by accident), whether hostd
starts it for a device of its topology or a test or notebook does it with a class of its own (pickled by dill) and
hands hostd the control socket (:class:`protocols.port.files.AttachDevice`). One mechanism; no daemon ever unpickles
what came over a wire.

The first thing a child does is to arm its own death with its parent's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import multiprocess

from hostd.assigned_device import AssignedDevice, Gate
from hostd.device_surroundings import ProcessSurroundings
from hostd.spawn import SpawnProcess
from protocols.transport.eventfile import EventFile
from protocols.transport.heap import settle
from protocols.transport.kernel import Pidfd, die_with_parent
from protocols.transport.unix import SeqpacketConnection
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError, PeerLost
from vfio_model.pci.declaration import check_made
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import NULL_TRACE, Trace

Model = str | type[PCIDevice]


@dataclass(frozen=True, slots=True)
class SpawnOptions:
    """``directory`` is where the trace goes (``device-<name>.events``); None: nowhere. ``gate`` holds two eventfds."""

    name: str = ""
    directory: Path | None = None
    gate: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class SpawnedDevice:
    """A device server that was started. ``control`` is our end of its control socket."""

    control: socket.socket
    process: SpawnProcess
    pidfd: Pidfd

    def close(self) -> None:
        """Kill it, reap it, close everything."""
        self.control.close()
        if self.pidfd.fd >= 0:
            self.pidfd.send_signal(signal.SIGKILL)
        self.process.join()
        self.process.close()
        self.pidfd.close()


def find_model(name: str) -> type[PCIDevice]:
    """The device class called ``name`` on a command line.

    :raise ConfigError: when there is none.
    """
    model = DEVICES.get(name)
    if model is None:
        raise ConfigError(f"no device model {name!r}", hint="known: " + ", ".join(sorted(DEVICES)))
    return model


def spawn_device(model: Model, options: SpawnOptions = SpawnOptions()) -> SpawnedDevice:
    """Start a device server for ``model`` (a name, or a class that dill can pickle). It waits for hostd's Setup.

    :raise ConfigError: when ``model`` is a name that is not known.
    """
    if isinstance(model, str):
        find_model(model)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return SpawnedDevice(ours, *_spawn(_assigned_main, theirs, model, options))


def _spawn(
    main: Callable[..., None], theirs: socket.socket, model: Model, options: SpawnOptions
) -> tuple[SpawnProcess, Pidfd]:
    """A started child that has ``theirs``, which is closed here, and the gate's eventfds."""
    gate = None if options.gate is None else tuple(_Inherited(fd) for fd in options.gate)
    process = SpawnProcess(
        target=main,
        args=(os.getpid(), theirs, model, options.name, options.directory, gate),
        name=f"device-{options.name or model}",
        daemon=True,
    )
    try:
        process.start()
    finally:
        theirs.close()
    return process, Pidfd.open(process.pid)


class _Inherited:
    """A descriptor that goes to the child: pickled while the child is being made, it arrives as the child's own
    number."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[..., int], tuple[object]]:
        return _detach, (multiprocess.reduction.DupFd(self.fd),)


def _detach(duplicate: multiprocess.resource_sharer.DupFd) -> int:
    fd: int = duplicate.detach()
    return fd


# -- in the child ----------------------------------------------------------------------------------------------------


def _assigned_main(
    parent: int, control: socket.socket, model: Model, name: str, directory: Path | None, gate: tuple[int, int] | None
) -> None:
    """The main function of a device server for hostd."""
    with device_process(parent, name, directory) as (trace, on_flush):
        make = device_factory(model)
        device = AssignedDevice(
            SeqpacketConnection(control, "hostd"), make, trace, None if gate is None else Gate(*gate)
        )
        device.on_idle(on_flush)
        settle()
        device.run()


def device_factory(model: Model) -> Callable[[ProcessSurroundings, dict[str, object]], PCIDevice]:
    """Makes devices of ``model``."""
    cls = find_model(model) if isinstance(model, str) else model

    def make(around: ProcessSurroundings, props: dict[str, object]) -> PCIDevice:
        device = cls(around, **props)
        check_made(cls, device)
        return device

    return make


@contextlib.contextmanager
def device_process(parent: int, name: str, directory: Path | None) -> Iterator[tuple[Trace, Callable[[], None]]]:
    """What every device process does first and last: dies with its parent, leaves signals to it, keeps a trace.

    An exception of the device class is logged and ends the process with status 1.
    """
    try:
        die_with_parent(parent)
    except PeerLost:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events = None if directory is None else EventFile(directory / f"device-{name}.events")
    try:
        yield (NULL_TRACE, _nothing) if events is None else (events.trace, events.flush)
    except BaseException as error:
        traceback.print_exc()
        print(f"device {name}: ends, because its model raised {type(error).__name__}: {error}", file=sys.stderr)
        if events is not None:
            events.trace("device_process_failed", name=name, error=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
    finally:
        if events is not None:
            events.close()


def _nothing() -> None:
    return None
