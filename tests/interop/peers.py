"""Whom a program can be run on: the real QEMU, the project's ``guestd-system-ppc64``, and its machine in this process.

All three take hypercalls in batches. Both processes are driven over qtest and QMP sockets to which they connect; they
differ in how a hypercall gets in (by the mailbox, or by the ``hcall`` command) and in whose clock runs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tests.interop import firmware
from tests.interop.qmp import Qmp
from tests.interop.qtest import QTest
from tests.interop.variants import EDU_SLOT, RAM_SIZE, TESTDEV_SLOT, Variant
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.edu.regs import DMA_DELAY_MS
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.iommu.spapr.regs import RTAS_TOKENS, HCall, HReturn
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.machine.vio import KINDS
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import U64_MAX, Hva

_DEADLINE_S = 30.0
CallResult = tuple[int, tuple[int, ...]]
"""Signed return code, and the output registers that differ from what they held: r4 to r9, else 0."""


class Peer(Protocol):
    """A pseries machine. Writes may be queued until something is read or called."""

    name: str
    version: str

    def calls(self, wanted: Sequence[Sequence[int]]) -> list[CallResult]:
        """Hypercalls, one after another: each an opcode and up to six arguments."""

    def rtas(self, name: str, args: tuple[int, int], rets: tuple[int, int]) -> int:
        """An RTAS call by name; ``args`` and ``rets`` are (number of cells, guest-physical address).

        :return: the return code, unsigned.
        """

    def write(self, gpa: int, data: bytes) -> None:
        """The CPU stores ``data``."""

    def clear(self, gpa: int, size: int) -> None:
        """Zero ``size`` bytes of RAM."""

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each ``(gpa, size)``."""

    def load(self, gpa: int, size: int) -> int:
        """A load in the machine's byte order."""

    def store(self, gpa: int, size: int, value: int) -> None:
        """A store in the machine's byte order."""

    def settle(self, gpa: int, busy: int) -> None:
        """Let virtual time pass until the u64 at ``gpa`` has none of the ``busy`` bits."""

    def reset(self) -> None:
        """A system reset, complete on return."""

    def close(self) -> None:
        """End it."""


def signed(value: int) -> int:
    """A register as a return code."""
    return value - (1 << 64) if value >= 1 << 63 else value


_LETTER = {1: "b", 2: "w", 4: "l", 8: "q"}
OUTPUTS = {int(HCall.H_GET_TCE): 1}
"""Output registers of the calls that have any, when they succeed."""


class _Process:
    """What both processes have in common."""

    name = ""

    def __init__(self, command: Sequence[str], variant: Variant) -> None:
        self.variant = variant
        # sockets: their paths are short, and the directory is nobody else's
        self._directory = tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp")
        self.where = Path(self._directory.name)
        qtest, qmp = self.where / "qtest", self.where / "qmp"
        self._qtest, self._qmp = QTest(qtest), Qmp(qmp)
        arguments = [*command, *variant.arguments(), "-qtest", f"unix:{qtest}", "-qtest-log", "/dev/null"]
        arguments += ["-chardev", f"socket,path={qmp},id=char0", "-mon", "chardev=char0,mode=control"]
        self._log = (self.where / "log").open("wb")
        self._child = subprocess.Popen(
            [*arguments, *self.own_arguments()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self._qtest.accept(self._alive)
            self._qmp.accept(self._alive)
        except BaseException:
            self._end()
            raise
        of = self._qmp.version["qemu"]
        self.version = f"{of['major']}.{of['minor']}.{of['micro']}"

    def _alive(self) -> bool:
        return self._child.poll() is None

    def own_arguments(self) -> list[str]:
        """What only this kind of process is told."""
        return []

    def rtas(self, name: str, args: tuple[int, int], rets: tuple[int, int]) -> int:
        """See :class:`Peer`."""
        return int(self._qtest.ask(f"rtas {name} {args[0]} {args[1]:#x} {rets[0]} {rets[1]:#x}"))

    def write(self, gpa: int, data: bytes) -> None:
        """See :class:`Peer`."""
        self._qtest.write(gpa, data)

    def clear(self, gpa: int, size: int) -> None:
        """See :class:`Peer`."""
        self._qtest.send(f"memset {gpa:#x} {size:#x} 0x0")

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """See :class:`Peer`."""
        return self._qtest.read_many(list(spans))

    def load(self, gpa: int, size: int) -> int:
        """See :class:`Peer`."""
        return int(self._qtest.ask(f"read{_LETTER[size]} {gpa:#x}"), 0)

    def store(self, gpa: int, size: int, value: int) -> None:
        """See :class:`Peer`."""
        self._qtest.send(f"write{_LETTER[size]} {gpa:#x} {value:#x}")

    def reset(self) -> None:
        """See :class:`Peer`."""
        self._qtest.answers()
        self._qmp.ask("system_reset", until="RESET")

    def close(self) -> None:
        """See :class:`Peer`.

        :raise AssertionError: when it does not end as asked, or says that something went wrong.
        """
        self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_DEADLINE_S)
        status = self._child.poll()
        self._end()
        assert status == 0, f"{self.name} ended with {status}"

    def _end(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._qtest.close()
        self._qmp.close()
        self._log.close()
        if self._child.returncode:
            said = (self.where / "log").read_text(errors="replace")
            print(f"{self.name} ended with {self._child.returncode}:\n{said}")
        self._directory.cleanup()


class QemuPeer(_Process):
    """Stock QEMU, with TCG and the mailbox firmware. Instructions move its clock, so that 100 ms last one."""

    name = "QEMU"

    def own_arguments(self) -> list[str]:
        """The firmware."""
        image = self.where / "mailbox.bin"
        image.write_bytes(firmware.image())
        return ["-accel", "tcg", "-icount", "shift=10,sleep=off", "-bios", str(image)]

    def calls(self, wanted: Sequence[Sequence[int]]) -> list[CallResult]:
        """See :class:`Peer`."""
        self._qtest.write(firmware.MAILBOX + firmware.ENTRY, firmware.entries(wanted))
        self.store(firmware.MAILBOX, 8, len(wanted))
        self.settle(firmware.MAILBOX, U64_MAX)
        span = (firmware.MAILBOX + firmware.ENTRY, firmware.ENTRY * len(wanted))
        found: list[CallResult] = []
        for call, registers in zip(wanted, firmware.results(self.read_many([span])[0]), strict=True):
            before = [*call[1:], *[0] * (firmware.REGISTERS - len(call))]
            ret = signed(registers[0])
            outputs = OUTPUTS.get(call[0], 0) if ret == 0 else 0
            assert list(registers[1 + outputs :]) == before[outputs:], f"{call}: other registers changed: {registers}"
            found.append((ret, registers[1 : 1 + outputs]))
        return found

    def settle(self, gpa: int, busy: int) -> None:
        """See :class:`Peer`."""
        deadline = time.monotonic() + _DEADLINE_S
        while self.load(gpa, 8) & busy:
            assert time.monotonic() < deadline, "QEMU's guest no longer makes progress"


class GuestdPeer(_Process):
    """The project's own machine as a process. Its clock stands still unless stepped."""

    name = "guestd"

    def own_arguments(self) -> list[str]:
        """Time passes only in steps."""
        return ["-accel", "qtest", *self.variant.for_guestd]

    def calls(self, wanted: Sequence[Sequence[int]]) -> list[CallResult]:
        """See :class:`Peer`."""
        for call in wanted:
            self._qtest.send("hcall " + " ".join(f"{word:#x}" for word in call))
        found: list[CallResult] = []
        for call, answer in zip(wanted, self._qtest.answers()[-len(wanted) :], strict=True):
            ret, *registers = (int(word, 16) for word in answer.split())
            outputs = OUTPUTS.get(call[0], 0) if signed(ret) == 0 else 0
            before = [*call[1:], *[0] * (firmware.REGISTERS - len(call))]
            assert registers[outputs:] == before[outputs:], f"{call}: other registers changed: {answer}"
            found.append((signed(ret), tuple(registers[:outputs])))
        return found

    def settle(self, gpa: int, busy: int) -> None:
        """See :class:`Peer`."""
        if self.load(gpa, 8) & busy:
            self._qtest.ask(f"clock_step {DMA_DELAY_MS * 1_000_000}")
            assert not self.load(gpa, 8) & busy, "the DMA ends when its time has passed"


class ModelPeer:
    """The machine as objects of this process."""

    name = "model"
    version = "in process"

    def __init__(self, variant: Variant) -> None:
        ram = RAMBlock("ram", bytearray(RAM_SIZE), page_size=1 << 16, hva=Hva(0x7F00_0000_0000))
        self.machine = PseriesMachine([ram], PseriesOptions(phbs=variant.phbs, dma=variant.dma))
        for index in range(variant.phbs):
            bus = self.machine.phb(index).bus
            bus.plug(EduDevice, EDU_SLOT << 3, dma_mask=U64_MAX)
            bus.plug(IOMMUTestDevice, TESTDEV_SLOT << 3)
        for unit in variant.vio:
            self.machine.vio.add(KINDS["vscsi"], unit)

    def calls(self, wanted: Sequence[Sequence[int]]) -> list[CallResult]:
        """See :class:`Peer`."""
        return [(ret, tuple(outs)) for ret, outs in (self.machine.hcall(*call) for call in wanted)]

    def rtas(self, name: str, args: tuple[int, int], rets: tuple[int, int]) -> int:
        """See :class:`Peer`."""
        token = RTAS_TOKENS.get(name)
        ret = int(HReturn.H_PARAMETER) if token is None else self.machine.rtas_in_memory(int(token), args, rets)
        return ret & U64_MAX

    def write(self, gpa: int, data: bytes) -> None:
        """See :class:`Peer`."""
        self.machine.write_memory(gpa, data)

    def clear(self, gpa: int, size: int) -> None:
        """See :class:`Peer`."""
        self.machine.write_memory(gpa, bytes(size))

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """See :class:`Peer`."""
        return [self.machine.read_memory(gpa, size) for gpa, size in spans]

    def load(self, gpa: int, size: int) -> int:
        """See :class:`Peer`."""
        return self.machine.mmio_read(gpa, size)

    def store(self, gpa: int, size: int, value: int) -> None:
        """See :class:`Peer`."""
        self.machine.mmio_write(gpa, size, value)

    def settle(self, gpa: int, busy: int) -> None:
        """See :class:`Peer`."""
        if self.load(gpa, 8) & busy:
            self.machine.clock_step(DMA_DELAY_MS * 1_000_000)

    def reset(self) -> None:
        """See :class:`Peer`."""
        self.machine.reset()

    def close(self) -> None:
        """See :class:`Peer`."""


def qemu_binary() -> str:
    """QEMU as the environment names it, else where ``tools/get-qemu`` puts it."""
    return os.environ.get("VFIO_MODEL_QEMU", str(Path(__file__).parents[2] / ".qemu/bin/qemu-system-ppc64"))


@contextlib.contextmanager
def closing(peer: Peer) -> Iterator[Peer]:
    """Close ``peer`` at the end; how it ends counts only if nothing else failed."""
    try:
        yield peer
    except BaseException:
        with contextlib.suppress(AssertionError):
            peer.close()
        raise
    peer.close()
