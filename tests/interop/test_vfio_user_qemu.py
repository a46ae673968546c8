"""This project's devices as stock QEMU's ``vfio-user-pci`` sees them: no CPU, every access by qtest."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.pc import CAP_MSI, CAP_MSIX, Function, PcQemu, vfio_user
from tests.interop.pc_iommus import PAGE, READ, WRITE, AmdVi, Vtd
from tests.interop.served import Served
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.iommu_testdev import regs as testdev

SLOT = 2
"""amd-iommu has slot 1."""
MASK64 = (1 << 64) - 1
BUFFER = 0x20_0000
MESSAGE = 0x30_0000
"""RAM that a message is written to: without a CPU nothing else is there to take it."""
SHARE = [pytest.param(True, id="share"), pytest.param(None, id="no-descriptor")]


@pytest.fixture
def where() -> Iterator[Path]:
    path = tempfile.mkdtemp(prefix="vm-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path)


def edu_dma(function: Function, iova: int, size: int, *, to_ram: bool, command: int = 0) -> None:
    source, target = (edu.BUFFER_ADDRESS, iova) if to_ram else (iova, edu.BUFFER_ADDRESS)
    for register, value in ((edu.DMA_SRC, source), (edu.DMA_DST, target), (edu.DMA_COUNT, size)):
        function.store(register, value, 8)
    function.store(edu.DMA_COMMAND, edu.DMA_RUN | (edu.DMA_TO_RAM if to_ram else 0) | command)
    function.pc.wait("edu's transfer", lambda: not function.load(edu.DMA_COMMAND) & edu.DMA_RUN)


def write_pattern(function: Function, iova: int, size: int) -> int:
    for register, value in (
        (testdev.IOVA_LO, iova & 0xFFFF_FFFF), (testdev.IOVA_HI, iova >> 32), (testdev.LENGTH, size),
        (testdev.GPA_LO, iova & 0xFFFF_FFFF), (testdev.GPA_HI, iova >> 32), (testdev.ATTRIBUTES, 0xA),
        (testdev.DOORBELL, testdev.DOORBELL_ARM),
    ):  # fmt: skip
        function.store(register, value)
    function.load(testdev.TRIGGER)
    return function.load(testdev.RESULT)


@pytest.mark.parametrize("share", SHARE)
def test_edu_from_enumeration_to_dma(where: Path, share: bool | None) -> None:
    with Served("edu", where / "edu", dma_mask=MASK64) as served, PcQemu(vfio_user(served.socket), share=share) as pc:
        function = Function(pc, SLOT)
        assert function.identity == (edu.VENDOR_ID, edu.DEVICE_ID)
        function.bring_up()
        assert function.load(edu.IDENTIFICATION) == edu.IDENTIFICATION_VALUE
        function.store(edu.INVERSION, 0x1234_5678)
        assert function.load(edu.INVERSION) == 0xEDCB_A987
        function.store(edu.FACTORIAL, 10)
        pc.wait("factorial", lambda: not function.load(edu.STATUS) & edu.STATUS_COMPUTING)
        assert function.load(edu.FACTORIAL) == 3_628_800
        data = random.Random(1).randbytes(edu.BUFFER_SIZE)
        pc.write(BUFFER, data)
        edu_dma(function, BUFFER, len(data), to_ram=False)
        edu_dma(function, BUFFER + 0x1234, 3000, to_ram=True)
        assert pc.read(BUFFER + 0x1234, 3000) == data[:3000]
        pc.qmp.ask("system_reset", until="RESET")
        assert function.load(edu.IDENTIFICATION) != edu.IDENTIFICATION_VALUE, "nothing is decoded after a reset"
        function.bring_up()
        assert function.load(edu.IDENTIFICATION) == edu.IDENTIFICATION_VALUE


@pytest.mark.parametrize("share", SHARE)
def test_pin_and_message_of_edu(where: Path, share: bool | None) -> None:
    with Served("edu", where / "edu") as served, PcQemu(vfio_user(served.socket), share=share) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        pc.qtest.ask("irq_intercept_in /machine/q35/ioapic")
        function.store(edu.IRQ_RAISE, 1)
        pc.wait("the pin", lambda: bool(function.read(6, 2)) and any(up for _, up in pc.qtest.irqs))
        line = pc.qtest.irqs[0][0]
        assert function.load(edu.IRQ_STATUS) == 1
        function.store(edu.IRQ_ACK, 1)
        pc.wait("the pin to fall", lambda: bool(function.read(6, 2)) and pc.qtest.irqs[-1] == (line, False))
        before = len(pc.qtest.irqs)
        at = function.capability(CAP_MSI)
        function.write(at + 4, MESSAGE)
        function.write(at + 12, 0xBEEF, 2)
        function.write(at + 2, function.read(at + 2, 2) | 1, 2)
        function.store(edu.IRQ_RAISE, 2)
        pc.wait("the message", lambda: pc.load(MESSAGE) == 0xBEEF)
        assert len(pc.qtest.irqs) == before, "with messages the pin rests"


PROBER = '''
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PCIDevice


class Prober(PCIDevice):
    """Writes 64 bytes to an address and reads them back, at a *posted* write: while QEMU waits for a register that it
    reads, it does not carry out what the device asks of it by message."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0BEE
    BARS = (BarSpec(0, 4096, access=(4, 8)),)
    seen = 0, 0, 0

    def bar_read(self, bar, offset, size):
        return self.seen[offset // 8 % 3]

    def bar_write(self, bar, offset, size, value):
        back = bytearray(64)
        wrote = self.dma.write(value, bytes(range(64)))
        read = self.dma.read(value, back)
        self.seen = self.seen[0] + 1, wrote, read | (back != bytes(range(64))) << 8
        return MemTxResult.OK
'''


@pytest.mark.parametrize("iommu_class", [Vtd, AmdVi], ids=["vtd", "amdvi"])
@pytest.mark.parametrize("share", SHARE)
def test_behind_an_iommu_whose_mappings_come_and_go(
    where: Path, iommu_class: type[Vtd] | type[AmdVi], share: bool | None
) -> None:
    rng = random.Random(7)
    (where / "prober.py").write_text(PROBER)
    with (
        Served(f"{where}/prober.py:Prober", where / "dev") as served,
        PcQemu([*iommu_class.options, *vfio_user(served.socket)], share=share) as pc,
    ):
        function = Function(pc, SLOT)
        function.bring_up()
        iommu = iommu_class(pc, SLOT << 3)
        iommu.enable()
        mapped: dict[int, tuple[int, int]] = {}
        good = refused = 0
        for number in range(1, 151):
            iova = rng.randrange(16) * PAGE + rng.choice((0, 1 << 21, 1 << 33))
            if iova in mapped and rng.random() < 0.5:
                iommu.unmap(iova)
                del mapped[iova]
            elif iova not in mapped:
                mapped[iova] = (BUFFER + rng.randrange(64) * PAGE, rng.choice((READ, READ | WRITE, READ | WRITE)))
                iommu.map(iova, *mapped[iova])
            gpa, perm = mapped.get(iova, (0, 0))
            if gpa:
                pc.write(gpa, b"\x55" * 64)
            function.store(0, iova, 8)
            pc.wait("the probe", lambda: function.load(0, 8) == number)  # noqa: B023 (called at once)
            wrote, read = function.load(8, 8), function.load(16, 8)
            assert (wrote == 0) == bool(perm & WRITE), f"{iova:#x} with {perm}: {wrote}"
            assert (read & 0xFF == 0) == bool(perm & READ), f"{iova:#x} with {perm}: {read}"
            assert read >> 8 == (perm != READ | WRITE), f"{iova:#x} with {perm}: other bytes"
            if gpa:
                assert pc.read(gpa, 64) == (bytes(range(64)) if perm & WRITE else b"\x55" * 64)
            good, refused = good + bool(perm & WRITE), refused + (not perm & WRITE)
        assert good > 30 and refused > 30


def test_dma_without_an_iommu_goes_where_the_guest_says(where: Path) -> None:
    with Served("iommu-testdev", where / "dev") as served, PcQemu(vfio_user(served.socket)) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        assert write_pattern(function, BUFFER, 256) == testdev.RESULT_OK
        assert pc.read(BUFFER, 256) == testdev.PATTERN.to_bytes(4, "little") * 64
        assert write_pattern(function, 0x40_0000_0000, 256) == testdev.RESULT_DMA_FAILED


def test_private_memory_is_reached_by_nobody_but_qemu_goes_on(where: Path) -> None:
    """With ``share=off`` QEMU sends the descriptor all the same, and what is written through it is not guest RAM."""
    with Served("edu", where / "edu", dma_mask=MASK64) as served, PcQemu(vfio_user(served.socket), share=False) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        pc.write(BUFFER, b"\x77" * 64)
        edu_dma(function, BUFFER, 64, to_ram=False)
        edu_dma(function, BUFFER + 0x1000, 64, to_ram=True)
        assert pc.read(BUFFER, 64) == b"\x77" * 64
        assert function.load(edu.IDENTIFICATION) == edu.IDENTIFICATION_VALUE


DEADLOCK = '''
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PCIDevice


class Rude(PCIDevice):
    """Raises its pin, which makes QEMU unmap the BAR's pages, and does DMA before anybody could answer."""

    VENDOR_ID, DEVICE_ID, INTERRUPT_PIN = 0x1234, 0x0BAD, 1
    BARS = (BarSpec(0, 0x4000, mmap=((0x1000, 0x1000), (0x3000, 0x1000))),)

    def bar_write(self, bar, offset, size, value):
        if offset == 0:
            self.raise_irq()
            for number in range(16):
                self.dma.write(value + number * 4096, self.bar_memory(0)[0x1000:0x2000])
        else:
            self.lower_irq()
        return MemTxResult.OK
'''


@pytest.mark.parametrize("share", SHARE)
def test_pin_goes_up_in_the_middle_of_dma(where: Path, share: bool | None) -> None:
    (where / "rude.py").write_text(DEADLOCK)
    with Served(f"{where}/rude.py:Rude", where / "dev") as served, PcQemu(vfio_user(served.socket), share=share) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        pc.qtest.ask("irq_intercept_in /machine/q35/ioapic")
        function.store(0x1000, 0x1122_3344)
        assert function.load(0x1000) == 0x1122_3344, "the mapped area is memory"
        for _ in range(20):
            function.store(0, BUFFER)
            pc.wait("the DMA", lambda: pc.load(BUFFER + 15 * 4096) == 0x1122_3344)
            function.store(4, 0)
            pc.qtest.ask(f"memset {BUFFER:#x} 0x10000 0x0")
        assert function.load(0x1000) == 0x1122_3344
        assert sum(up for _, up in pc.qtest.irqs) >= 20


def test_server_killed_and_started_again(where: Path) -> None:
    served = Served("edu", where / "edu", dma_mask=MASK64)
    served.start()
    with PcQemu(vfio_user(served.socket)) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        assert function.load(edu.IDENTIFICATION) == edu.IDENTIFICATION_VALUE
        served.kill()
        assert function.load(edu.IDENTIFICATION) != edu.IDENTIFICATION_VALUE
        served.start()
    with contextlib.closing(served), PcQemu(vfio_user(served.socket)) as pc:
        again = Function(pc, SLOT)
        again.bring_up()
        assert again.load(edu.IDENTIFICATION) == edu.IDENTIFICATION_VALUE
        pc.write(BUFFER, b"back" * 16)
        edu_dma(again, BUFFER, 64, to_ram=False)
        edu_dma(again, BUFFER + 0x1000, 64, to_ram=True)
        assert pc.read(BUFFER + 0x1000, 64) == b"back" * 16


def test_one_server_outlives_many_qemus_and_keeps_its_registers(where: Path) -> None:
    with Served("edu", where / "edu") as served:
        for value in (1, 2, 3):
            with PcQemu(vfio_user(served.socket)) as pc:
                function = Function(pc, SLOT)
                function.bring_up()
                function.store(edu.INVERSION, value)
                assert function.load(edu.INVERSION) == 0xFFFF_FFFF ^ value


def test_message_of_the_nvme_table(where: Path) -> None:
    with Served("nvme", where / "nvme", serial="one") as served, PcQemu(vfio_user(served.socket)) as pc:
        function = Function(pc, SLOT)
        assert function.read(9, 1) == 2 and function.read(10, 2) == 0x0108
        function.bring_up()
        at = function.capability(CAP_MSIX)
        table = function.read(at + 4)
        entry = function.bars[table & 7] + (table & ~7)
        pc.store(entry, 8, MESSAGE)
        pc.store(entry + 8, 4, 0xCAFE)
        pc.store(entry + 12, 4, 0)
        function.write(at + 2, 0x8000, 2)
        queues = BUFFER
        pc.qtest.ask(f"memset {queues:#x} 0x4000 0x0")
        for offset, value, size in (
            (0x24, 15 << 16 | 15, 4), (0x28, queues, 8), (0x30, queues + 0x1000, 8), (0x14, 0x460001, 4)
        ):  # fmt: skip
            function.store(offset, value, size)
        pc.wait("ready", lambda: bool(function.load(0x1C) & 1))
        identify = bytearray(64)
        identify[0], identify[40] = 0x06, 1  # Identify, controller
        identify[24:32] = (queues + 0x2000).to_bytes(8, "little")
        pc.write(queues, bytes(identify))
        function.store(0x1000, 1)
        pc.wait("the message", lambda: pc.load(MESSAGE) == 0xCAFE)
        assert pc.read(queues + 0x2000 + 4, 3) == b"one"
        assert pc.load(queues + 0x1000 + 12) >> 16 == 1, "status 0, phase 1"
