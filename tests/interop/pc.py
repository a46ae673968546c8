"""A stock QEMU PC without a CPU (``-accel qtest``), and as much of firmware and drivers as a PCI device takes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.interop.qmp import Qmp, QmpError
from tests.interop.qtest import QTest, QTestError
from tests.interop.served import qemu_folder

RAM_MIB = 256
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
BAR_WINDOW = 0xE000_0000
IO_WINDOW = 0xC000
COMMAND = 0x04
CAPABILITY_POINTER = 0x34
CAP_MSI, CAP_MSIX = 0x05, 0x11
_DEADLINE_S = 30.0
_END_S = 2.0
_LETTER = {1: "b", 2: "w", 4: "l", 8: "q"}


class PcQemu:
    """q35 with ``devices`` (QEMU's options). ``share``: RAM that a vfio-user server can map; None: RAM that has no
    descriptor. ``binary``: another program that is told what QEMU is told."""

    def __init__(
        self,
        devices: Sequence[str],
        *,
        share: bool | None = True,
        options: Sequence[str] = (),
        binary: Path | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp")
        where = Path(self._directory.name)
        self.qtest, self.qmp = QTest(where / "qtest"), Qmp(where / "qmp")
        kind = "memory-backend-ram" if share is None else "memory-backend-memfd"
        backend = f"{kind},id=ram,size={RAM_MIB}M" + ("" if share is None else f",share={'on' if share else 'off'}")
        command = [
            str(binary or qemu_folder() / "bin/qemu-system-x86_64"), "-accel", "qtest", "-object", backend,
            "-machine", "q35,memory-backend=ram", "-m", f"{RAM_MIB}M", "-nodefaults", "-display", "none",
            "-qtest", f"unix:{where / 'qtest'}", "-qtest-log", "/dev/null",
            "-chardev", f"socket,path={where / 'qmp'},id=char0", "-mon", "chardev=char0,mode=control",
            *options, *devices,
        ]  # fmt: skip
        self._log = (where / "log").open("wb+")
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self.qtest.accept(self._alive)
            self.qmp.accept(self._alive)
        except (OSError, QTestError, QmpError) as error:
            said = self.said()
            self._end()
            raise AssertionError(f"QEMU did not start: {said}") from error

    @property
    def pid(self) -> int:
        """QEMU's."""
        return self._child.pid

    def _alive(self) -> bool:
        return self._child.poll() is None

    def said(self) -> str:
        """What QEMU complained about."""
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")

    def aborted(self) -> str:
        """The assertion of its own by which it has ended, or nothing."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_END_S)
        failed = [line for line in self.said().splitlines() if "Assertion" in line]
        return failed[-1] if self._child.poll() == -signal.SIGABRT and failed else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_DEADLINE_S)
        status, said = self._child.poll(), self.said()
        self._end()
        if error is None:
            assert status == 0, f"QEMU ended with {status}: {said}"
        else:
            print(f"{self._child.args[0]} (status {status}) said: {said}")

    def _end(self) -> None:
        """In order, if it does; a program that is killed leaves what it has made."""
        self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_END_S)
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        self.qtest.close()
        self.qmp.close()
        self._log.close()
        self._directory.cleanup()

    # -- memory and ports --------------------------------------------------------------------------------------------

    def load(self, gpa: int, size: int = 4) -> int:
        """``size`` bytes at ``gpa``."""
        return int(self.qtest.ask(f"read{_LETTER[size]} {gpa:#x}"), 0)

    def store(self, gpa: int, size: int, value: int) -> None:
        """``size`` bytes at ``gpa``."""
        self.qtest.ask(f"write{_LETTER[size]} {gpa:#x} {value:#x}")

    def read(self, gpa: int, size: int) -> bytes:
        """RAM."""
        return bytes.fromhex(self.qtest.ask(f"read {gpa:#x} {size:#x}")[2:])

    def write(self, gpa: int, data: bytes) -> None:
        """RAM."""
        self.qtest.ask(f"write {gpa:#x} {len(data):#x} 0x{data.hex()}")

    def inl(self, port: int, size: int = 4) -> int:
        """A port."""
        return int(self.qtest.ask(f"in{_LETTER[size]} {port:#x}"), 0)

    def outl(self, port: int, value: int, size: int = 4) -> None:
        """A port."""
        self.qtest.ask(f"out{_LETTER[size]} {port:#x} {value:#x}")

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Until ``condition()`` holds.

        :raise AssertionError: when it does not in time.
        """
        deadline = time.monotonic() + _DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after {_DEADLINE_S} s"
            time.sleep(0.001)


class Function:
    """A function on bus 0 of ``pc``, by its slot."""

    def __init__(self, pc: PcQemu, slot: int) -> None:
        self.pc, self.slot = pc, slot
        self.bars: dict[int, int] = {}

    def read(self, offset: int, size: int = 4) -> int:
        """Configuration space."""
        self.pc.outl(CONFIG_ADDRESS, 1 << 31 | self.slot << 11 | offset & 0xFC)
        return self.pc.inl(CONFIG_DATA + (offset & 3), size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Configuration space."""
        self.pc.outl(CONFIG_ADDRESS, 1 << 31 | self.slot << 11 | offset & 0xFC)
        self.pc.outl(CONFIG_DATA + (offset & 3), value, size)

    @property
    def identity(self) -> tuple[int, int]:
        """Vendor and device."""
        both = self.read(0)
        return both & 0xFFFF, both >> 16

    def capability(self, kind: int) -> int:
        """Where the capability ``kind`` is; 0 for nowhere."""
        at = self.read(CAPABILITY_POINTER, 1)
        while at and self.read(at, 1) != kind:
            at = self.read(at + 1, 1)
        return at

    def bring_up(self) -> None:
        """Size and place every BAR, a window of 16 MiB for each slot; decode, and be a bus master."""
        memory, io = BAR_WINDOW + (self.slot << 24), IO_WINDOW + (self.slot << 8)
        index = 0
        while index < 6:
            at = 0x10 + 4 * index
            low = self.read(at)
            self.write(at, 0xFFFF_FFFF)
            mask = self.read(at)
            wide = not low & 1 and low & 6 == 4
            if mask:
                size = -(mask & (~3 if low & 1 else ~15)) & 0xFFFF_FFFF
                if low & 1:
                    io = -(-io // size) * size
                    self.bars[index], io = io, io + size
                else:
                    memory = -(-memory // size) * size
                    self.bars[index], memory = memory, memory + size
                self.write(at, self.bars[index])
                if wide:
                    self.write(at + 4, 0)
            index += 2 if wide else 1
        self.write(COMMAND, 7, 2)

    def load(self, offset: int, size: int = 4, bar: int = 0) -> int:
        """A register of a memory BAR."""
        return self.pc.load(self.bars[bar] + offset, size)

    def store(self, offset: int, value: int, size: int = 4, bar: int = 0) -> None:
        """A register of a memory BAR."""
        self.pc.store(self.bars[bar] + offset, size, value)


def vfio_user(socket: Path, slot: int = 2) -> tuple[str, str]:
    """QEMU's options for a device behind ``socket``."""
    where = {"type": "unix", "path": str(socket)}
    return "-device", json.dumps({"driver": "vfio-user-pci", "addr": f"{slot:x}", "socket": where})
