"""A whole running system for tests: host, notifier, guest, an assigned device and a remote emulated one.

:class:`Live` starts it with the operator's own launcher, signals its processes, brings dead ones back, and counts what
could be left behind: descriptors, processes, socket files, locked memory. Deadlines are short, so that a stopped
process is noticed in about two seconds. Nothing here sleeps to let something happen: :func:`until` asks again until
a deadline.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from deploy import assemble, live
from deploy.dma_drivers import EduDma
from deploy.launcher import Launcher
from deploy.link import Link
from deploy.live import ControlCpu
from deploy.quantity import Size
from deploy.runtime_dir import state as process_state
from deploy.scenario import Fault, Scenario
from deploy.scenario_machine import Device, Pseries
from protocols.control import messages as control
from protocols.transport.loop import DEADLINE_SCALE_VARIABLE
from tests import acceleration
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.guest_drivers.pci import MmioWindow, RtasConfig, assign_bars, probe, set_command
from vfio_model.host.kvm_table import locked_pages
from vfio_model.iommu.spapr import regs
from vfio_model.memory.lane import LANES_SIZE, lanes_snapshot
from vfio_model.pci.address import PCIAddress

SCALE = 0.4
"""Of every deadline: 5 s become 2 s."""
SECONDS = 30.0
"""How long a test waits for anything."""
NIC, CARD = "nic", "card"
"""The assigned dma-burst and the remote emulated edu."""
ADDRESSES = {NIC: "02.0", CARD: "03.0"}
RAM = 64 << 20


def until(what: str, condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What ``condition()`` returns when it is true for the first time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"within {seconds:g} s it did not happen that {what}"
        time.sleep(0.005)
    return value


class Interrupted(Exception):
    """The guest died, or was stopped, while an answer of it was awaited."""


class Live:
    """A running system; a context manager. ``scale`` of deadlines; daemons that end are started afresh by
    :meth:`revive`. With ``kvm`` (None: as the run says) the host answers hypercalls, and the card caches no translation
    that it could not tell of a change; where it caches them nevertheless, guestd carries out every hypercall.
    ``reconnects``: the guest looks for a card that was lost.
    """

    def __init__(
        self,
        *,
        scale: float = SCALE,
        card: str = "edu",
        interpose: bool = False,
        kvm: bool | None = None,
        caches: bool | None = None,
        reconnects: bool = True,
    ) -> None:
        self._reconnects = reconnects
        self.kvm = acceleration.kvm(kvm)
        dma: Literal["shared", "message"] = "message" if (self.kvm if caches is None else not caches) else "shared"
        devices = [
            Device(id=NIC, model="dma-burst", attach="assigned", addr=ADDRESSES[NIC]),
            Device(id=CARD, model=card, attach="remote", addr=ADDRESSES[CARD], dma=dma),
        ]
        self.scenario = Scenario(
            name="survive",
            machine=Pseries(ram=Size(RAM), page_size=Size(1 << 16), kvm=self.kvm),
            devices=devices,
            interpose=[Fault(action="delay", ioctl="UNMAP_DMA", armed=False)] if interpose else [],
            restart="on-failure",
        )
        env = {**os.environ, DEADLINE_SCALE_VARIABLE: str(scale)}
        self.launcher = Launcher(self.scenario.name, live.connect, restart=True, env=env)
        self._links: dict[str, Link] = {}
        self._configs: dict[str, Any] = {}
        self._window = MmioWindow.pseries()
        self.bars: dict[str, int] = {}
        self.drivers: dict[str, Any] = {}

    def __enter__(self) -> Live:
        self.launcher.__enter__()
        self.directory = self.launcher.directory
        try:
            self.cpu = ControlCpu(self.link("guestd"))
            specs = assemble.daemons(self.scenario, self.directory)
            config = msgspec.json.decode((self.directory / "guestd.json").read_bytes())
            if not self._reconnects:
                (card,) = (device for device in config["devices"] if device["id"] == CARD)
                card["reconnect_ms"] = 0
                (self.directory / "guestd.json").write_bytes(msgspec.json.encode(config))
            self._configs = {device["id"]: device for device in config["devices"]}
            self.launcher.start([spec for spec in specs if spec.stage == 0])
            self.before_guest = self.locked_vm()
            self.launcher.start([spec for spec in specs if spec.stage == 1])
            self.bring_up(NIC)
            self.bring_up(CARD)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            for log in sorted(self.directory.glob("*.log")):
                for line in log.read_text(errors="replace").splitlines()[-12:]:
                    error.add_note(f"{log.name}: {line}")
        self.close()

    def close(self) -> None:
        """End everything; the runtime directory goes."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        for daemon in self.launcher.daemons.values():
            if daemon.stopped:
                daemon.signal(signal.SIGCONT)
        self.launcher.stop()

    # -- talking -----------------------------------------------------------------------------------------------------

    def link(self, role: str) -> Link:
        """The control link to ``role``."""
        if role not in self._links:
            watch = self._watch_guest if role == "guestd" else _nothing
            self._links[role] = Link(self.directory, role, seconds=SECONDS, watch=watch)
        return self._links[role]

    def _watch_guest(self) -> None:
        guest = self.launcher.daemons.get("guestd")
        if guest is not None and (guest.ended or guest.stopped):
            raise Interrupted("guestd is stopped" if not guest.ended else "guestd is dead")

    def status(self, role: str) -> Any:
        """What a daemon says of itself."""
        return self.link(role).status()

    def locked_vm(self) -> int:
        """Locked pages of all of the host's clients."""
        return int(self.status("hostd")["locked_vm"])

    def device(self, name: str) -> Any:
        """The guest's view of a device."""
        listed: Any = self.link("guestd").document(control.DeviceList())
        return next((device for device in listed["devices"] if device["id"] == name), None)

    # -- devices -----------------------------------------------------------------------------------------------------

    def bring_up(self, name: str) -> None:
        """What firmware does to one device, and a driver for it."""
        devfn = PCIAddress.parse(ADDRESSES[name]).devfn
        config = RtasConfig(self.cpu, regs.phb_buid(0))
        function = until(f"{name} answers on the bus", lambda: probe(config, devfn))
        assign_bars(config, function, self._window)
        set_command(config, devfn)
        self.bars[name] = bar = self._window.to_cpu(function.bars[0].address)
        burst = self._configs[name]["model"] == "dma-burst"
        self.drivers[name] = DmaBurstDriver(self.cpu, bar) if burst else EduDma(self.cpu, bar)

    def locked_unassigned(self) -> int:
        """The pages that are locked while the guest has no assigned device: those of its tables in the kernel, where it
        has any (windows of less than 4 GiB)."""
        windows = self.status("guestd")["windows"] if self.kvm else []
        tables = [each["entries"] for each in windows if each["entries"] << each["page_shift"] < 1 << 32]
        return self.before_guest + sum(locked_pages(entries, 1 << 16) for entries in tables)

    def unplug(self, name: str) -> None:
        """``device_del``."""
        self.link("guestd").ask(control.DeviceDel(name))

    def plug(self, name: str) -> None:
        """``device_add`` of what the configuration has, and its driver."""
        self.link("guestd").ask(control.DeviceAdd(msgspec.json.encode(self._configs[name])))
        self.bring_up(name)

    # -- processes ---------------------------------------------------------------------------------------------------

    def pid(self, who: str) -> int:
        """The process of a role, or of a device."""
        if who in self.launcher.daemons:
            return self.launcher.daemons[who].pid
        host = self.status("hostd")["devices"]
        return int(next(device["pid"] for device in host if device["name"] == self._configs[who]["host"]))

    def alive(self, who: str) -> bool:
        """Whether a daemon runs (it may be stopped)."""
        return not self.launcher.daemons[who].ended

    def revive(self, role: str) -> None:
        """Let the launcher do what ``restart: on-failure`` says."""
        before = self.launcher.daemons[role].pid
        until(f"{role} ends", lambda: self.launcher.daemons[role].ended)
        self.launcher.check()
        assert self.launcher.daemons[role].pid != before, "the launcher has started it afresh"
        self.launcher.wait_ready(role, SECONDS)
        if role in self._links:
            self._links[role].reconnect()
        if role == "guestd":
            self.cpu = ControlCpu(self.link("guestd"))
            self._window = MmioWindow.pseries()
            self.bring_up(NIC)
            self.bring_up(CARD)

    # -- what could be left behind -------------------------------------------------------------------------------------

    def fds(self, role: str) -> int:
        """Open descriptors of a daemon."""
        return len(os.listdir(f"/proc/{self.pid(role)}/fd"))

    def device_processes(self) -> int:
        """Children of the host that are devices."""
        host = psutil.Process(self.pid("hostd"))
        with contextlib.suppress(psutil.Error):
            return sum(1 for child in host.children(recursive=True) if not _is_tracker(child))
        return -1

    def sockets(self) -> list[str]:
        """Socket files in the runtime directory."""
        return sorted(path.name for path in self.directory.iterdir() if stat.S_ISSOCK(path.lstat().st_mode))

    def census(self) -> dict[str, Any]:
        """Everything that must be as before when a test has disturbed and mended the system."""
        if self.kvm and self.alive("guestd"):
            self._show_memory()
        roles = [role for role, daemon in self.launcher.daemons.items() if not daemon.ended]
        host, notifier = self.status("hostd"), self.status("notifier")
        return {
            "fds": {role: self.fds(role) for role in roles},
            "device processes": self.device_processes(),
            "sockets": self.sockets(),
            "locked_vm": host["locked_vm"],
            "mms": len(host["mms"]),
            "files": len(host["files"]),
            "pending": host["pending"],
            "areas": host["areas"],
            "connections": host["connections"],
            "subscribers": sorted(notifier["subscribers"].values()),
        }

    def _show_memory(self) -> None:
        """The host maps the guest's memory with the first list that it reads: now at the latest."""
        gpa, ioba = RAM - 4096, regs.DEFAULT_WINDOW_SIZE - 4096
        self.cpu.write_memory(gpa, bytes(8))
        assert self.cpu.hcall(regs.HCall.H_PUT_TCE_INDIRECT, regs.pci_liobn(0, 0), ioba, gpa, 1) == (0, [])

    def settles(self, wanted: dict[str, Any]) -> None:
        """The census becomes ``wanted``."""
        seen: dict[str, Any] = {}

        def same() -> bool:
            seen.update(self.census())
            return seen == wanted

        try:
            until("the census is as before", same, 10.0)
        except AssertionError as error:
            different = {key: (wanted[key], seen.get(key)) for key in wanted if wanted[key] != seen.get(key)}
            raise AssertionError(f"left behind (before, now): {different}") from error


def _nothing() -> None:
    return None


def _is_tracker(process: psutil.Process) -> bool:
    """multiprocess keeps a process of its own beside the devices."""
    return any("resource_tracker" in word for word in process.cmdline())


# -- signals ---------------------------------------------------------------------------------------------------------


class Target:
    """A process to be killed or stopped, by pidfd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.pidfd_open(pid)

    def signal(self, number: signal.Signals) -> None:
        """Nothing happens when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def dead(self) -> bool:
        """Whether it has ended."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def gone(self) -> None:
        """Return when it is dead."""
        until(f"process {self.pid} ends", self.dead)

    def stopped(self) -> None:
        """Return when job control holds it."""
        until(f"process {self.pid} is stopped", lambda: process_state(self.pid) in ("T", "t"))

    def close(self) -> None:
        """Give the pidfd back."""
        os.close(self.fd)


@contextlib.contextmanager
def target(pid: int) -> Iterator[Target]:
    """A :class:`Target`; one that is still stopped at the end is continued."""
    found = Target(pid)
    try:
        yield found
    finally:
        found.signal(signal.SIGCONT)
        found.close()


# -- guest memory from outside ---------------------------------------------------------------------------------------


class GuestRam:
    """The guest's RAM, mapped from its memfd: what is there can be seen when nobody answers any more."""

    def __init__(self, pid: int, *, name: str = "ram") -> None:
        self._fd = os.open(_memfd(pid, name), os.O_RDWR)
        self.map = mmap.mmap(self._fd, RAM)

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes at ``gpa``."""
        return self.map[gpa : gpa + size]

    def write(self, gpa: int, data: bytes) -> None:
        """Store ``data``."""
        self.map[gpa : gpa + len(data)] = data

    def close(self) -> None:
        """Unmap."""
        self.map.close()
        os.close(self._fd)


def in_section(pid: int) -> bool:
    """Whether the device process ``pid``, which is stopped, is inside a DMA section."""
    fd = os.open(_memfd(pid, "lanes."), os.O_RDONLY)
    try:
        with mmap.mmap(fd, LANES_SIZE, prot=mmap.PROT_READ) as area:
            return any(counter % 2 for counter in lanes_snapshot(memoryview(area[:]).cast("Q")))
    finally:
        os.close(fd)


def _memfd(pid: int, name: str) -> str:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(entry).startswith(f"/memfd:{name}"):
                return str(entry)
    raise AssertionError(f"process {pid} has no memfd {name}")
