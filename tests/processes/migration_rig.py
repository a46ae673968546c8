"""Two guests of one host, of which one is to become the other: processes, what they know of each other, and a proxy
between them that cuts or alters what goes through.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from deploy.dma_drivers import SwappedCpu
from deploy.link import Link
from deploy.live import ControlCpu
from protocols.control import messages as control
from tests import acceleration
from tests.processes.conftest import HostProcess
from tests.processes.rig import GuestRam, until
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.guest_drivers.edu import EduDriver
from vfio_model.guest_drivers.pci import MmioWindow, RtasConfig, assign_bars, probe, set_command
from vfio_model.iommu.spapr import regs

RAM = 64 << 20
NIC, EDU, OWN, REMOTE, FAR = "nic", "edu", "own", "remote", "far"
"""An assigned dma-burst, an assigned edu, an edu of guestd's own, one that is remote; and instead of the assigned edu a
dma-burst behind another host bridge.
"""
ADDRESSES = {NIC: 0x10, EDU: 0x18, OWN: 0x20, REMOTE: 0x28, FAR: 0x10}
SOURCE, TARGET = "source", "target"
PAGE_SIZES = 0x11_1000 | 1 << 24


def topology(*kinds: str, second: str = "edu") -> dict[str, object]:
    """A host with one group for each assigned device of either guest: a dma-burst and a ``second``."""
    window = {"pgsizes": 1 << 12 | 1 << 16 | 1 << 24, "max_windows": 2}
    groups = [
        {"id": 26 + n, "devices": [{"name": f"0000:01:{n:02x}.0", "model": model}], **window}
        for n, model in enumerate(["dma-burst", second, "dma-burst", second])
    ]
    return {"groups": groups, "host_page_size": 1 << 12, "containers": list(dict.fromkeys(kinds))}


class GuestProcess:
    """``guestd`` in a directory of its own under ``host``'s. ``number`` 0 or 1 says which groups are its. ``remote``: a
    remote device too, of that model, or an edu; ``remote_dma`` is how it reaches memory.
    """

    def __init__(self, host: HostProcess, name: str, number: int, **options: Any) -> None:
        self.directory = host.directory / name
        self.directory.mkdir(mode=0o700)
        bridges = options.pop("bridges", 1)
        assigned = self.assigned(number, bridges)
        tracking = options.pop("dirty_tracking", True)
        remote, remote_dma = options.pop("remote", False), options.pop("remote_dma", "shared")
        self._remote_model = remote if isinstance(remote, str) else "edu"
        self.remote = [REMOTE] if remote else []
        self._servers = [self._serve(name) for name in self.remote]
        far = [
            {"id": name, "model": self._remote_model, "attach": "remote", "addr": f"{ADDRESSES[name] >> 3:02x}.0"}
            | {"socket": str(self.directory / f"{name}.sock"), "dma": remote_dma}
            for name in self.remote
        ]
        own = {"id": OWN, "model": "edu", "attach": "emulated", "addr": f"{ADDRESSES[OWN] >> 3:02x}.0"}
        devices = [*({**each, "dirty_tracking": tracking} for each in assigned), own, *far]
        config = {
            "machine": self.machine(bridges, options.pop("kvm", None)),
            "devices": devices,
            "host_dir": str(host.directory),
            "host_page_size": 1 << 12,
            "notifier": "inline",
            "name": name,
            **options,
        }
        path = self.directory / "guestd.json"
        path.write_text(json.dumps(config))
        self.log = self.directory / "guestd.log"
        argv = [sys.executable, "-m", "guestd", "--dir", str(self.directory), "--config", str(path)]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*argv, "--die-with-parent"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self.popen.pid
        self.link = Link(self.directory, "guestd", seconds=30.0, watch=self._watch)
        self.link.ask(control.Hello())
        self.cpu = ControlCpu(self.link)
        self.ram = GuestRam(self.pid)
        self.bars: dict[str, int] = {}

    def assigned(self, number: int, bridges: int) -> list[dict[str, object]]:
        """Its assigned devices."""
        second = (EDU, "edu", "") if bridges == 1 else (FAR, "dma-burst", "phb1.0")
        return [
            {"id": name, "model": model, "bus": bus, "attach": "assigned", "addr": f"{ADDRESSES[name] >> 3:02x}.0"}
            | {"group": 26 + 2 * number + n, "host": f"0000:01:{2 * number + n:02x}.0"}
            for n, (name, model, bus) in enumerate(((NIC, "dma-burst", ""), second))
        ]

    @staticmethod
    def machine(bridges: int, kvm: bool | None) -> dict[str, object]:
        """Its machine."""
        phbs = [{"index": n} for n in range(bridges)]
        return {"ram": RAM, "page_size": 1 << 16, "kvm": acceleration.kvm(kvm), "phbs": phbs}

    def _serve(self, name: str) -> subprocess.Popen[bytes]:
        """A remote device's process."""
        argv = [sys.executable, "-m", "hostd", "device", "--dir", str(self.directory), "--model", self._remote_model]
        socket_path = self.directory / f"{name}.sock"
        server = subprocess.Popen([*argv, "--socket", str(socket_path)], stdin=subprocess.DEVNULL)
        until("it listens", socket_path.exists)
        return server

    def _watch(self) -> None:
        if self.popen.poll() is not None:
            raise AssertionError(f"guestd has ended: {self.log.read_text()}")

    # -- what is asked -------------------------------------------------------------------------------------------

    def ask(self, name: str, **arguments: object) -> Any:
        """A QMP command."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        answer = self.link.ask(control.Qmp(name, msgspec.json.encode(given)))
        assert isinstance(answer, control.Document)
        return msgspec.json.decode(answer.json)

    @property
    def state(self) -> str:
        """Its run state."""
        return str(self.ask("query-status")["status"])

    def migrated(self, *ends: str) -> Any:
        """``query-migrate`` once its status is one of ``ends``."""
        return until(f"{ends}", lambda: (info := self.ask("query-migrate"))["status"] in ends and info)

    # -- devices -------------------------------------------------------------------------------------------------

    def bring_up(self, *names: str) -> None:
        """What firmware does; of one bridge."""
        index = int(names[0] == FAR)
        window, config = MmioWindow.pseries(index), RtasConfig(self.cpu, regs.phb_buid(index))
        for name in names:
            function = probe(config, ADDRESSES[name])
            assert function is not None, f"{name} answers"
            assign_bars(config, function, window)
            set_command(config, ADDRESSES[name])
            self.bars[name] = window.to_cpu(function.bars[0].address)

    def burst(self, name: str = NIC) -> DmaBurstDriver:
        """A driver of a dma-burst, the assigned one."""
        return DmaBurstDriver(self.cpu, self.bars[name])

    def edu(self, name: str = EDU) -> EduDriver:
        """A driver of an edu; an assigned one is little-endian."""
        cpu = self.cpu if name == OWN else SwappedCpu(self.cpu)
        return EduDriver(cpu, self.bars[name])

    def step(self, ns: int) -> None:
        """Let virtual time pass."""
        self.cpu.clock_step(ns)
        self.cpu.flush()

    def put(self, ioba: int, tce: int, liobn: int = regs.pci_liobn(0, 0)) -> None:
        """H_PUT_TCE, which succeeds."""
        assert self.cpu.hcall(regs.HCall.H_PUT_TCE, liobn, ioba, tce)[0] == 0

    def windows(self) -> Any:
        """Its DMA windows."""
        return self.link.status()["windows"]

    def tces(self, first: int, count: int, shift: int, liobn: int = regs.pci_liobn(0, 0)) -> list[tuple[int, int, int]]:
        """Where its table leads."""
        return [self.cpu.translate(liobn, first + (n << shift)) for n in range(count)]

    def close(self) -> None:
        """Kill and reap."""
        self.link.close()
        with contextlib.suppress(BufferError):
            self.ram.close()
        for process in (self.popen, *self._servers):
            if process.poll() is None:
                process.kill()
            process.wait()


class Proxy:
    """Between source and destination: ``change(sent, data)`` is given how many bytes went before and returns what goes
    on. After byte ``end``, if there is one, the connection ends.
    """

    def __init__(self, path: Path, to: Path, change: Callable[[int, bytes], bytes], end: int | None = None) -> None:
        self._end = end
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._to, self._change = to, change
        self.sent = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            left, _ = self._listener.accept()
        except OSError:  # nobody came
            return
        right = socket.socket(socket.AF_UNIX)
        right.connect(str(self._to))
        back = threading.Thread(target=_copy, args=(right, left), daemon=True)
        back.start()
        while self.sent != self._end and (data := left.recv(1 << 16)):
            data = data[: None if self._end is None else self._end - self.sent]
            with contextlib.suppress(OSError):
                right.sendall(self._change(self.sent, data))
            self.sent += len(data)
        with contextlib.suppress(OSError):
            right.shutdown(socket.SHUT_WR)
        back.join(20)
        left.close()
        right.close()

    def close(self) -> None:
        """Stop."""
        self._listener.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


class Mute:
    """A destination at ``path`` that reads no more than ``limit`` bytes, and does nothing then; ``says`` goes back."""

    def __init__(self, path: Path, limit: int = 0, says: bytes = b"") -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._limit, self._says = limit, says
        self.connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            self.connection, _ = self._listener.accept()
            self.connection.sendall(self._says)
            while self._limit > 0 and (data := self.connection.recv(min(self._limit, 1 << 16))):
                self._limit -= len(data)

    def close(self) -> None:
        """It ends."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        if self.connection is not None:
            self.connection.close()
        self._path.unlink(missing_ok=True)
        assert not self._thread.is_alive()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Pair:
    """The guests, one of which waits for the other at :attr:`path`."""

    def __init__(self, host: HostProcess, kind: type[GuestProcess] = GuestProcess, **options: Any) -> None:
        self.host, self._kind = host, kind
        self.path = host.directory / "migration.sock"
        self._options = options
        self.source = kind(host, SOURCE, 0, **options)
        self.targets: list[GuestProcess] = []

    @property
    def target(self) -> GuestProcess:
        """The guest that waits, or waited."""
        return self.targets[-1]

    def make_target(self, uri: str = "", **options: Any) -> GuestProcess:
        """A guest that waits; each is one of its own."""
        where, name = uri or f"unix:{self.path}", f"{TARGET}{len(self.targets)}"
        self.targets.append(self._kind(self.host, name, 1, incoming=where, **{**self._options, **options}))
        return self.target

    def make_paused(self) -> GuestProcess:
        """One that does not run by itself when the machine is there."""
        return self.make_target(paused=True)

    def close(self) -> None:
        """End all."""
        for guest in (self.source, *self.targets):
            guest.close()


@contextlib.contextmanager
def pair(host: HostProcess, **options: Any) -> Iterator[Pair]:
    """A :class:`Pair` that is closed; what the processes said goes with an error."""
    made = Pair(host, **options)
    try:
        yield made
    except BaseException as error:
        for log in (host.log, made.source.log, *(target.log for target in made.targets)):
            error.add_note(f"{log}: {log.read_text()[-2000:]}")
        raise
    finally:
        made.close()
