"""A guest in this process with one device behind a vfio-user server in another."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from guestd.config import DeviceConfig, GuestConfig
from guestd.machine_config import PseriesConfig
from protocols.transport.loop import Loop
from tests.acceleration import kvm
from tests.guestd.accelerated_guest import HostedGuest
from tests.peers import spec_server as peer
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.pci import MmioWindow, PciFunction, RtasConfig, assign_bars, probe, set_command
from vfio_model.guest_drivers.pseries_ddw import TceWindow
from vfio_model.iommu.spapr import regs
from vfio_model.pci.msix import CONTROL_ENABLE, ENTRY_SIZE
from vfio_model.trace import ListTrace
from vfio_model.vfio.pci import VFIOPCIDevice

ROOT = Path(__file__).resolve().parents[2]
DEVFN = 2 << 3
NAME = "card"
RAM = 16 << 20
LIST = RAM - 4096
SECONDS = 20.0
Dma = Literal["shared", "mapped", "message"]


class SpecPeer:
    """``tests.peers.spec_server`` as a process."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.path, self.log_path, self.options = directory / "spec.sock", directory / "spec.log", options
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self, **options: Any) -> None:
        """Start it (again): a new process with the same options and ``options``."""
        self.stop()
        self.path.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "tests.peers.spec_server", str(self.path), str(self.log_path)]
        self.process = subprocess.Popen(
            [*argv, json.dumps({**self.options, **options})], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def log(self, what: str = "") -> list[dict[str, Any]]:
        """What it noted, of one kind or all."""
        if not self.log_path.exists():
            return []
        noted = [json.loads(line) for line in self.log_path.read_text().splitlines() if line.endswith("}")]
        return [line for line in noted if what in ("", line["what"])]

    def stop(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def maps(self) -> dict[int, dict[str, Any]]:
        """What the present client has mapped, by address."""
        found: dict[int, dict[str, Any]] = {}
        for line in self.log():
            if line["what"] == "client":
                found.clear()
            elif line["what"] == "map":
                found[line["address"]] = line
            elif line["what"] == "unmap":
                found.pop(line["address"], None)
        return found


class PeerGuest:
    """A guest whose :data:`NAME` is served at ``path``. With ``plug`` False nothing is attached yet."""

    def __init__(
        self, path: Path, directory: Path, *, dma: Dma = "shared", reconnect_ms: int = 200, plug: bool = True
    ) -> None:
        self.loop = Loop()
        self.trace = ListTrace()
        machine = PseriesConfig(ram=RAM, page_size=1 << 16, kvm=kvm())
        self.guest = HostedGuest(GuestConfig(machine=machine, notifier="inline"), directory, self.loop, self.trace)
        self.guest.start()
        self.config = DeviceConfig(
            id=NAME, attach="remote", addr="02.0", socket=str(path), dma=dma, reconnect_ms=reconnect_ms
        )
        self.cpu = DirectCpu(self.guest.machine)
        self.pci = RtasConfig(self.cpu, regs.phb_buid(0))
        self.window = TceWindow.default(self.cpu, list_gpa=LIST)
        self.bars: dict[int, int] = {}
        if plug:
            try:
                self.plug()
            except BaseException:
                self.close()
                raise

    def plug(self) -> None:
        """Attach the device, and do what firmware does."""
        self.guest.add_device(self.config)
        self.firmware()

    def firmware(self) -> None:
        """Find it, unless it is gone again, and place its BARs."""
        function = probe(self.pci, DEVFN)
        if function is not None:
            self.place(function)

    def place(self, function: PciFunction) -> None:
        """Give its BARs addresses, switch decoding and mastering on."""
        window = MmioWindow.pseries()
        assign_bars(self.pci, function, window)
        set_command(self.pci, DEVFN)
        self.bars = {index: window.to_cpu(bar.address) for index, bar in function.bars.items()}

    @property
    def device(self) -> VFIOPCIDevice:
        """The guest's side."""
        (found,) = self.guest.foreign
        return found

    @property
    def state(self) -> str:
        """``running`` or ``lost``."""
        return str(self.guest.device_status(NAME)["state"])

    def until(self, what: str, condition: Callable[[], Any]) -> None:
        """Turn the loop until ``condition()``."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen that {what}"
            self.loop.run_once(0.01)

    # -- registers of the peer's device, which is little-endian ------------------------------------------------------

    def read(self, offset: int, size: int = 4, bar: int = 0) -> int:
        """A load."""
        value = self.cpu.mmio_read(self.bars[bar] + offset, size)
        return int.from_bytes(value.to_bytes(size, "big"), "little")

    def write(self, offset: int, value: int, size: int = 4, bar: int = 0) -> None:
        """A store."""
        self.cpu.mmio_write(self.bars[bar] + offset, size, int.from_bytes(value.to_bytes(size, "little"), "big"))

    def dma(self, command: int, iova: int, length: int, pattern: int = 0) -> int:
        """Have it do DMA: its errno, 0xffffffff when it is gone."""
        self.write(peer.PATTERN, pattern, 1)
        self.write(peer.IOVA, iova & 0xFFFF_FFFF)
        self.write(peer.IOVA + 4, iova >> 32)
        self.write(peer.LENGTH, length)
        self.write(peer.COMMAND, command)
        return self.read(peer.RESULT)

    def data(self, length: int) -> bytes:
        """What it read."""
        return b"".join(self.read(peer.DATA + at, 1).to_bytes(1, "big") for at in range(length))

    def enable_msix(self, vectors: int) -> list[int]:
        """Arm vectors 0..vectors - 1 with message interrupts of the machine, whose numbers are returned."""
        msi = self.guest.machine.phb().msi.give(DEVFN << 8, vectors)
        assert msi is not None
        numbers = [msi.first + number for number in range(vectors)]
        for vector, number in enumerate(numbers):
            at = vector * ENTRY_SIZE
            self.write(at, regs.MSI_WINDOW & 0xFFFF_FFFF, bar=4)
            self.write(at + 4, regs.MSI_WINDOW >> 32, bar=4)
            self.write(at + 8, number, bar=4)
            self.write(at + 12, 0, bar=4)
        self.pci.write(DEVFN, 0x42, 2, CONTROL_ENABLE)
        return numbers

    def raised(self, irq: int) -> int:
        """How often an interrupt was pulsed."""
        return self.guest.machine.irqs.raised.get(irq, 0)

    def close(self) -> None:
        """The end of the guest."""
        self.guest.close()
        self.loop.close()


def fds() -> int:
    """Descriptors of this process; memory of a device that could not be attached may wait for the collector."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
