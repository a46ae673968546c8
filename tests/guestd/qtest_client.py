"""A qtest client, and what it asks of a pseries machine: the same of this project's and of a real QEMU.

``python -m tests.guestd.qtest_client BINARY`` asks that binary and prints its answers; ``qtest_answers.txt`` holds
those of QEMU 11.1.3.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vfio_model.iommu.spapr.regs import BUID_BASE, pci_mem32_window

ARGS, RETS = 0x10000, 0x10100
EDU = 0x10
"""devfn of ``addr=2.0``."""
BUS_ADDRESS = 0x8010_0000
WINDOW = pci_mem32_window(0) + BUS_ADDRESS - 0x8000_0000
MACHINE = ("-machine", "pseries", "-m", "256M", "-nodefaults", "-display", "none", "-accel", "qtest")
DEVICES = ("-device", "spapr-pci-host-bridge,index=3,id=far,ddw=off", "-device", "edu,bus=pci.0,addr=2.0,id=e")
DEVICES += ("-device", "iommu-testdev,addr=1")
SECONDS = 30


class Qtest:
    """The listening side, as libqtest has it: listen, start, accept."""

    def __init__(self, argv: Sequence[str], directory: Path, *, qmp: bool = False, log: str = "none") -> None:
        self._listeners = [_listen(directory / name) for name in ("qtest", "qmp")[: 1 + qmp]]
        sockets = ["-qtest", f"unix:{directory / 'qtest'}", "-qtest-log", log]
        if qmp:
            sockets += ["-chardev", f"socket,path={directory / 'qmp'},id=char0", "-mon", "chardev=char0,mode=control"]
        with open(directory / "stderr", "wb") as errors:
            self.process = subprocess.Popen([*argv, *sockets], stderr=errors)
        accepted = [listener.accept()[0] for listener in self._listeners]
        for each in accepted:
            each.settimeout(SECONDS)
        self.socket = accepted[0]
        self.qmp = accepted[1] if qmp else None
        self._begun = b""

    def line(self) -> str:
        """The next line."""
        while b"\n" not in self._begun:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(self._begun)
            self._begun += data
        line, _, self._begun = self._begun.partition(b"\n")
        return line.decode("latin-1")

    def __call__(self, command: str) -> str:
        """One command, one reply."""
        self.socket.sendall(command.encode() + b"\n")
        return self.line()

    def value(self, command: str) -> int:
        """The number that a command replies."""
        word, number = self(command).split(" ")
        assert word == "OK", number
        return int(number, 0)

    def rtas(self, name: str, args: Sequence[int], nret: int) -> list[int]:
        """An RTAS call: its return cells, those that were not written 0xdeadbeef."""
        for place, cell in enumerate(args):
            assert self(f"writel {ARGS + 4 * place:#x} {cell:#x}") == "OK"
        for place in range(nret):
            assert self(f"writel {RETS + 4 * place:#x} 0xdeadbeef") == "OK"
        assert self(f"rtas {name} {len(args)} {ARGS:#x} {nret} {RETS:#x}") == "OK 0"
        return [self.value(f"readl {RETS + 4 * place:#x}") for place in range(nret)]

    def config_read(self, devfn: int, register: int, size: int, *, phb: int = 0) -> int | None:
        """Configuration space by RTAS; None when it refuses."""
        buid = BUID_BASE + phb
        status, value = self.rtas(
            "ibm,read-pci-config", [devfn << 8 | register, buid >> 32, buid & 0xFFFFFFFF, size], 2
        )
        return None if status else value

    def config_write(self, devfn: int, register: int, size: int, value: int, *, phb: int = 0) -> None:
        """The same."""
        args = [devfn << 8 | register, BUID_BASE >> 32, BUID_BASE + phb & 0xFFFFFFFF, size, value]
        assert self.rtas("ibm,write-pci-config", args, 1) == [0]

    def close(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        status = self.process.wait(SECONDS)
        for each in (self.socket, self.qmp, *self._listeners):
            if each is not None:
                each.close()
        return status


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen(1)
    listener.settimeout(SECONDS)
    return listener


@contextlib.contextmanager
def running(argv: Sequence[str], directory: Path, *, qmp: bool = False) -> Iterator[Qtest]:
    """A machine; it ends with status 0."""
    qtest = Qtest(argv, directory, qmp=qmp)
    try:
        yield qtest
    finally:
        status = qtest.close()
    assert status == 0


def ask_config_space(qtest: Qtest) -> list[object]:
    """Sizes, alignment, absent functions, sizing a BAR."""
    asked: list[object] = [qtest.config_read(EDU, 0, size) for size in (1, 2, 4, 3, 8)]
    asked += [qtest.config_read(EDU, register, 4) for register in (1, 2, 8, 0x10, 0x14, 0x3C)]
    asked += [qtest.config_read(devfn, 0, 4) for devfn in (0x18, 0x11, 0)]
    asked.append(qtest.config_read(EDU, 0, 4, phb=1))
    qtest.config_write(EDU, 0x10, 4, 0xFFFF_FFFF)
    asked.append(qtest.config_read(EDU, 0x10, 4))
    return asked


def map_edu(qtest: Qtest) -> None:
    """Its BAR into the 32-bit window, memory and bus mastering on."""
    qtest.config_write(EDU, 0x10, 4, BUS_ADDRESS)
    qtest.config_write(EDU, 4, 2, 6)


def ask_edu(qtest: Qtest) -> list[object]:
    """Registers in several sizes, then a DMA that no TCE lets through."""
    map_edu(qtest)
    lines = [f"readl {WINDOW:#x}", f"read {WINDOW:#x} 4", f"writel {WINDOW + 4:#x} 0x12345678"]
    lines += [f"read{size} {WINDOW + offset:#x}" for size in "bwlq" for offset in (0, 4, 0x80, 0x84)]
    lines += [f"writel {WINDOW + 0x60:#x} 0x12", f"readl {WINDOW + 0x24:#x}", f"writel {WINDOW + 0x64:#x} 0x12"]
    lines += [f"readl {WINDOW + 0x24:#x}", f"read {WINDOW:#x} 16", "memset 0x20000 64 0x5a"]
    for offset, value in ((0x80, 0x20000), (0x88, 0x40000), (0x90, 64), (0x98, 1)):
        lines += [f"writeq {WINDOW + offset:#x} {value:#x}", f"readq {WINDOW + offset:#x}"]
    lines += ["clock_step 99999999", f"readq {WINDOW + 0x98:#x}", "clock_step 1", f"readq {WINDOW + 0x98:#x}"]
    lines += [f"writeq {WINDOW + offset:#x} {value:#x}" for offset, value in ((0x80, 0x40000), (0x88, 0x20000))]
    lines += [
        f"writeq {WINDOW + 0x98:#x} 3",
        "clock_step",
        f"readq {WINDOW + 0x98:#x}",
        "read 0x20000 16",
        "clock_step",
    ]
    return [(line, qtest(line)) for line in lines]


def ask_windows(qtest: Qtest) -> list[object]:
    """Dynamic DMA windows by RTAS."""
    pe = [0, BUID_BASE >> 32, BUID_BASE & 0xFFFFFFFF]
    asked: list[object] = [qtest.rtas("ibm,query-pe-dma-window", pe, outputs) for outputs in (5, 6)]
    asked += [qtest.rtas("ibm,create-pe-dma-window", [*pe, shift, 28], 4) for shift in (13, 16, 24)]
    asked.append(qtest.rtas("ibm,query-pe-dma-window", pe, 5))
    asked += [qtest.rtas("ibm,remove-pe-dma-window", [liobn], 1) for liobn in (0x8000_0001, 0x8000_0001, 5)]
    asked.append(qtest.rtas("ibm,reset-pe-dma-window", pe, 1))
    return asked


def ask_second_bridge(qtest: Qtest) -> list[object]:
    """A bridge without dynamic windows, with a device of its own whose DMA goes nowhere."""
    pe = [0, BUID_BASE >> 32, BUID_BASE + 3 & 0xFFFFFFFF]
    asked: list[object] = [qtest.config_read(8, register, 4, phb=3) for register in (0, 8, 0x10)]
    asked += [qtest.rtas("ibm,query-pe-dma-window", pe, 5), qtest.rtas("ibm,create-pe-dma-window", [*pe, 16, 28], 4)]
    window = pci_mem32_window(3) + 0x10_0000
    qtest.config_write(8, 0x10, 4, BUS_ADDRESS, phb=3)
    qtest.config_write(8, 4, 2, 6, phb=3)
    lines = [f"readl {window + 0x10:#x}", f"writel {window + 4:#x} 0", f"writel {window + 0xC:#x} 0x10000000"]
    lines += [f"writel {window + 0x14:#x} 0x01000000", f"readl {window + 0x10:#x}", f"readl {window:#x}"]
    return asked + [(line, qtest(line)) for line in [*lines, f"readl {window + 0x10:#x}"]]


def ask_everything(qtest: Qtest) -> list[object]:
    """All of the above, after what libqtest begins with."""
    return [
        qtest("endianness"),
        *ask_config_space(qtest),
        *ask_edu(qtest),
        *ask_windows(qtest),
        *ask_second_bridge(qtest),
    ]


def _main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vq-", dir="/tmp") as directory,
        running([*sys.argv[1:], *MACHINE, *DEVICES], Path(directory)) as qtest,
    ):
        for each in ask_everything(qtest):
            print(each)


if __name__ == "__main__":
    _main()
