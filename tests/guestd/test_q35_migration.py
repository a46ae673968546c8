"""A q35 that moves from one process to another, its IOMMU at work."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.guestd.qtest_client import SECONDS, Qtest, running

PROGRAM = (sys.executable, "-c", "import sys; from guestd.system import run; sys.exit(run('x-x86_64', sys.argv[1:]))")
MACHINE = ("-machine", "q35", "-m", "64M", "-accel", "qtest", "-nodefaults", "-display", "none")
DEVICES = ("-device", "intel-iommu", "-device", "pcie-root-port,id=rp,chassis=1", "-device", "edu,id=e,bus=rp")
BAR, VTD = 0xE000_0000, 0xFED9_0000
ROOT, CONTEXT, TABLES = 0x10_0000, 0x10_1000, 0x10_2000
IOVA, GPA = 0x234_5000, 0x80_0000


def ask(qtest: Qtest, execute: str, **arguments: object) -> Any:
    """A QMP command; events are passed over."""
    assert qtest.qmp is not None
    qtest.qmp.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
    return _answer(qtest)


def _answer(qtest: Qtest) -> Any:
    assert qtest.qmp is not None
    text = b""
    while True:
        while not text.endswith(b"\n"):
            text += qtest.qmp.recv(65536)
        for line in text.splitlines():
            said = json.loads(line)
            if "return" in said or "error" in said:
                assert "return" in said, said
                return said["return"]
        text = b""


def config(qtest: Qtest, bus: int, devfn: int, offset: int, value: int) -> None:
    assert qtest(f"outl 0xcf8 {1 << 31 | bus << 16 | devfn << 8 | offset:#x}") == "OK"
    assert qtest(f"outl 0xcfc {value:#x}") == "OK"


def bring_up(qtest: Qtest) -> None:
    """edu behind the port, and one page of a domain of three levels."""
    config(qtest, 0, 8, 0x18, 0x0101_00)
    config(qtest, 0, 8, 0x20, BAR >> 16 | BAR & 0xFFF0_0000)
    config(qtest, 0, 8, 4, 6)
    config(qtest, 1, 0, 0x10, BAR)
    config(qtest, 1, 0, 4, 6)
    entries = {ROOT + 16: CONTEXT | 1, CONTEXT: TABLES | 1, CONTEXT + 8: 5 << 8 | 1}
    for level, shift in enumerate((30, 21, 12)):
        table = TABLES + (level << 12)
        below = table + 0x1000 if level < 2 else GPA
        entries[table + (IOVA >> shift & 0x1FF) * 8] = below | 3
    for gpa, value in entries.items():
        assert qtest(f"writeq {gpa:#x} {value:#x}") == "OK"
    assert qtest(f"writeq {VTD + 0x20:#x} {ROOT:#x}") == "OK"
    for command in (1 << 30, 1 << 31):
        assert qtest(f"writel {VTD + 0x18:#x} {command:#x}") == "OK"


def dma(qtest: Qtest, source: int, target: int, way: int) -> None:
    for offset, value in ((0x80, source), (0x88, target), (0x90, 8), (0x98, way)):
        assert qtest(f"writeq {BAR + offset:#x} {value:#x}") == "OK"
    qtest("clock_step 200000000")


def test_the_iommu_and_bridges_move(runtime_dir: Path) -> None:
    here, there = runtime_dir / "here", runtime_dir / "there"
    here.mkdir()
    there.mkdir()
    stream = f"unix:{runtime_dir / 'stream'}"
    with running([*PROGRAM, *MACHINE, *DEVICES], here, qmp=True) as source:
        _greet(source)
        bring_up(source)
        assert source(f"writeq {GPA:#x} 0x1122334455667788") == "OK"
        dma(source, IOVA, 0x40000, 1)
        with running([*PROGRAM, *MACHINE, *DEVICES, "-incoming", stream], there, qmp=True) as target:
            _greet(target)
            ask(source, "migrate", uri=stream)
            deadline = time.monotonic() + SECONDS
            while ask(source, "query-migrate")["status"] != "completed":
                assert time.monotonic() < deadline, ask(source, "query-migrate")
            dma(target, 0x40000, IOVA + 0x100, 3)
            assert target(f"readq {GPA + 0x100:#x}") == "OK 0x1122334455667788"
            assert target.value(f"readl {VTD + 0x1C:#x}") == 0xC000_0000
            assert target.value(f"readl {VTD + 0x34:#x}") == 0, "no fault"
            dma(target, 0x40000, IOVA + 0x1000, 3)
            assert target.value(f"readl {VTD + 0x34:#x}") == 2, "the next page is not mapped"


def _greet(qtest: Qtest) -> None:
    assert qtest.qmp is not None
    assert b"QMP" in qtest.qmp.recv(65536)
    ask(qtest, "qmp_capabilities")
