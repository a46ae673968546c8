"""The page on writing a device, its steps in stock QEMU as written; and what the monitor and a guest's firmware see."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.page import DOCS, Page
from tests.interop.pc import CAP_MSIX, Function, PcQemu, vfio_user
from tests.interop.served import Served, qemu_folder

SLOT = 2
EXAMPLES = DOCS / "examples"


@pytest.fixture
def where() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_the_steps_in_qemu_are_as_written(where: Path) -> None:
    page = Page("devices.md", where, (qemu_folder() / "bin",))
    served, drive = page.step("vfio-model serve"), page.step("python drive.py")
    pasted = served.said.splitlines()[-1].strip()
    assert drive.command == f"python drive.py {pasted}", "the line that the server printed"
    with page.running(served) as said:
        assert said == served.said
        for _ in range(2):  # the device outlives its client
            assert page.run(drive) == drive.said


def test_firmware_and_monitor_see_it(where: Path) -> None:
    Page("devices.md", where)
    device = f"{where / 'mine.py'}:Mine"
    with Served(device, where / "mine") as served, PcQemu(vfio_user(served.socket)) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        listed = pc.qmp.ask("human-monitor-command", **{"command-line": "info pci"})
        assert re.search(r"PCI device 1234:5afe.*?IRQ 0, pin A", str(listed), re.DOTALL), listed


def test_the_screen_is_painted_by_a_guest(where: Path) -> None:
    with Served(f"{EXAMPLES}/screen.py:Screen", where / "s") as served, PcQemu(vfio_user(served.socket)) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        pc.write(function.bars[0] + 0x4000, bytes([7]) * 0x4000)
        pc.write(function.bars[0] + 0x1000, bytes([1]) * 0x1000)
        assert function.load(4) == 7 * 0x4000 and function.load(8) == 0x1000
        function.store(0, 1)
        function.store(0x8000, 5)
        assert function.load(4) == 5


@pytest.mark.parametrize("share", [pytest.param(True, id="share"), pytest.param(None, id="no-descriptor")])
def test_the_copier_copies_for_a_guest(where: Path, share: bool | None) -> None:
    with (
        Served(f"{EXAMPLES}/copier.py:Copier", where / "c") as served,
        PcQemu(vfio_user(served.socket), share=share) as pc,
    ):
        function = Function(pc, SLOT)
        function.bring_up()
        data = bytes(range(256)) * 48
        pc.write(0x20_0000, data)
        for offset, value in (0x00, 0x20_0000), (0x08, 0x30_0000), (0x10, len(data)), (0x18, 1):
            function.store(offset, value, 8)
        pc.wait("the copy", lambda: function.load(0x28, 8) == 1)
        assert pc.read(0x30_0000, len(data)) == data


def test_the_samplers_messages_reach_a_guest(where: Path) -> None:
    with Served(f"{EXAMPLES}/sampler.py:Sampler", where / "m") as served, PcQemu(vfio_user(served.socket)) as pc:
        function = Function(pc, SLOT)
        function.bring_up()
        for vector in range(4):
            for offset, value in (0, 0x30_0000 + 8 * vector), (4, 0), (8, 0x40 + vector), (12, 0):
                function.store(0x1000 + 16 * vector + offset, value)
        at = function.capability(CAP_MSIX)
        function.write(at + 2, 0x8000, 2)
        for offset, value in (0x40, 0x20_0000), (0x48, 16), (0x50, 100_000):
            function.store(offset, value, 8)
        pc.wait("a message", lambda: pc.load(0x30_0010) == 0x42)
        assert [pc.load(0x30_0000 + 8 * vector) for vector in (0, 1, 3)] == [0, 0, 0]
        function.store(0x50, 0, 8)
        taken = function.load(0x58, 8)
        assert pc.load(0x20_0000 + (taken - 1) % 16 * 16, 8) == taken - 1
