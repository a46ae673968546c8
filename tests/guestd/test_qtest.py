"""guestd-system-ppc64 as a test's QEMU: started as libqtest starts one, driven over qtest."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceleration import kvm
from tests.guestd.accelerated_guest import host_options
from tests.guestd.qtest_client import DEVICES, EDU, MACHINE, SECONDS, WINDOW, Qtest, ask_everything, map_edu, running

pytestmark = pytest.mark.machine

PROGRAM = (sys.executable, "-m", "guestd.system")
H_PUT_TCE = 0x20
LIOBN = 0x8000_0000
EDU_LINE = 0x1202
"""Pin A of slot 2 on the first bridge."""


@pytest.fixture
def machine(runtime_dir: Path) -> Iterator[tuple[str, ...]]:
    """The command line of a machine without devices."""
    with host_options(runtime_dir) as options:
        yield (*PROGRAM, *MACHINE, *options)


@pytest.fixture
def qtest(machine: tuple[str, ...], runtime_dir: Path) -> Iterator[Qtest]:
    with running([*machine, "-device", "edu,addr=2.0,id=e"], runtime_dir) as qtest:
        yield qtest


def _put_tce(qtest: Qtest, ioba: int, tce: int) -> str:
    return qtest(f"hcall {H_PUT_TCE:#x} {LIOBN:#x} {ioba:#x} {tce:#x}")


def _dma(qtest: Qtest, src: int, dst: int, size: int, command: int) -> None:
    for offset, value in ((0x80, src), (0x88, dst), (0x90, size), (0x98, command)):
        assert qtest(f"writeq {WINDOW + offset:#x} {value:#x}") == "OK"


def test_every_answer_is_qemus(machine: tuple[str, ...], runtime_dir: Path) -> None:
    recorded = Path(__file__).with_name("qtest_answers.txt").read_text(encoding="utf-8")
    with running([*machine, *DEVICES], runtime_dir) as qtest:
        assert [str(each) for each in ask_everything(qtest)] == recorded.splitlines()


def test_libqtests_beginning(machine: tuple[str, ...], runtime_dir: Path) -> None:
    with running(machine, runtime_dir, qmp=True) as qtest:
        assert qtest("endianness") == "OK big"
        assert qtest.qmp is not None
        with qtest.qmp.makefile("rwb") as qmp:
            assert "QMP" in json.loads(qmp.readline())
            qmp.write(b'{"execute": "qmp_capabilities"}')
            qmp.flush()
            assert json.loads(qmp.readline()) == {"return": {}}
            qmp.write(b'{"execute": "query-status"}')
            qmp.flush()
            assert json.loads(qmp.readline())["return"]["status"] == "running"


def test_dma_through_the_table_that_hypercalls_fill(qtest: Qtest) -> None:
    map_edu(qtest)
    for ioba, tce in ((0x3000, 0x20003), (0x4000, 0x30003)):
        registers = [0, LIOBN, ioba, tce, 0, 0, 0]
        assert _put_tce(qtest, ioba, tce) == "OK " + " ".join(f"0x{word:016x}" for word in registers)
    assert qtest("write 0x20010 5 0x68656c6c6f") == "OK"
    _dma(qtest, 0x3010, 0x40000, 5, 1)
    assert qtest("clock_step 100000000") == "OK 100000000"
    _dma(qtest, 0x40000, 0x4020, 5, 3)
    assert qtest("clock_step") == "OK 200000000"
    assert qtest("read 0x30020 6") == "OK 0x68656c6c6f00"
    answer = qtest("hcall 0x1c 0x80000000 0x4000").split()
    assert answer[1:4] == ["0x" + "0" * 16, "0x0000000000030003", "0x0000000000004000"]


def test_a_hypercall_that_fails(qtest: Qtest) -> None:
    assert _put_tce(qtest, 0x4000_0000, 3).split()[1] == "0xfffffffffffffffc"
    assert qtest("hcall 0xabcd").split()[1] == "0xfffffffffffffffe"


def test_interrupts_come_before_the_reply_to_what_caused_them(qtest: Qtest) -> None:
    map_edu(qtest)
    assert qtest("irq_intercept_in /machine/peripheral/e") == "FAIL No intercepts installed"
    assert qtest("irq_intercept_in /machine") == "OK"
    assert qtest(f"writel {WINDOW + 0x60:#x} 1") == f"IRQ raise {EDU_LINE}"
    assert qtest.line() == "OK"
    assert qtest(f"writel {WINDOW + 0x64:#x} 1") == f"IRQ lower {EDU_LINE}"
    assert qtest.line() == "OK"


def test_commands_may_be_sent_before_their_replies_are_read(qtest: Qtest) -> None:
    count = 20000
    qtest.socket.sendall(b"".join(b"writel %#x %#x\n" % (0x1000 + 4 * n, n) for n in range(count)))
    assert {qtest.line() for _ in range(count)} == {"OK"}
    assert qtest.value(f"readl {0x1000 + 4 * (count - 1):#x}") == count - 1


def test_what_cannot_be_understood_leaves_the_machine_as_it_was(qtest: Qtest) -> None:
    qtest.socket.sendall(b"\x00\xff\xfe garbage\nwritel\nread 0 -1\n" + b"x" * 100000 + b"\n")
    assert all(qtest.line().startswith("FAIL") for _ in range(4))
    assert qtest("readl 0x100") == "OK 0x0000000000000000"


def test_the_machine_lives_on_when_its_test_has_gone(machine: tuple[str, ...], runtime_dir: Path) -> None:
    path = runtime_dir / "listening"
    process = subprocess.Popen([*machine, "-qtest", f"unix:{path},server=on,wait=off", "-qtest-log", "none"])
    try:
        for value in (b"OK 5", b"OK 10"):
            with _connect(path) as client, client.makefile("rwb") as stream:
                stream.write(b"clock_step 5\n")
                stream.flush()
                assert stream.readline().strip() == value
    finally:
        process.terminate()
        assert process.wait(SECONDS) == 0
    assert not path.exists()


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + SECONDS
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SECONDS)
        try:
            client.connect(os.fspath(path))
        except OSError:
            client.close()
            assert time.monotonic() < deadline, "nobody listens"
            time.sleep(0.01)
        else:
            return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_nothing_stays(
    machine: tuple[str, ...], runtime_dir: Path, number: int
) -> None:
    qtest = Qtest(machine, runtime_dir)
    assert qtest("endianness") == "OK big"
    own = {Path(link).parent for link in _open_files(qtest.process.pid) if link.startswith("/tmp/vm-")}
    assert len(own) == (0 if kvm() else 1), "a runtime directory of its own, or the one that it was told"
    qtest.process.send_signal(number)
    assert qtest.process.wait(SECONDS) == 0
    qtest.close()
    assert not any(path.exists() for path in own)
    assert (runtime_dir / "stderr").read_text() == ""


def _open_files(pid: int) -> list[str]:
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except OSError:
            continue
    return found


def test_quit_ends_it_with_status_0(machine: tuple[str, ...], runtime_dir: Path) -> None:
    qtest = Qtest(machine, runtime_dir, qmp=True)
    assert qtest.qmp is not None
    qtest.qmp.sendall(b'{"execute": "qmp_capabilities"} {"execute": "quit"}')
    assert qtest.process.wait(SECONDS) == 0
    qtest.close()


def test_the_log_and_traces(machine: tuple[str, ...], runtime_dir: Path) -> None:
    log, trace = runtime_dir / "log", runtime_dir / "trace"
    patterns = ("-trace", "spapr_iommu*", "-trace", "enable=-*_new_table", "-D", os.fspath(trace))
    qtest = Qtest([*machine, *patterns], runtime_dir, log=os.fspath(log))
    _put_tce(qtest, 0x3000, 0x20003)
    qtest.rtas("ibm,remove-pe-dma-window", [LIOBN], 1)
    assert qtest.close() == 0
    put = "spapr_iommu_pci_put liobn=0x80000000 ioba=0x3000 tce=0x20003 ret=0"  # not what the host answers
    removed = "spapr_iommu_ddw_remove liobn=0x80000000"
    assert trace.read_text().splitlines() == ([removed] if kvm() else [put, removed])
    lines = [(line.split(" ")[0], line.split("] ")[1]) for line in log.read_text().splitlines()]
    assert lines[0] == ("[I", "OPENED") and lines[1] == ("[R", "hcall 0x20 0x80000000 0x3000 0x20003")
    assert lines[2][0] == "[S" and lines[-1][1] == "CLOSED"


def test_a_stopped_machine_takes_its_steps_when_it_goes_on(machine: tuple[str, ...], runtime_dir: Path) -> None:
    with running([*machine, "-S", "-device", "edu,addr=2.0"], runtime_dir, qmp=True) as qtest:
        map_edu(qtest)
        _dma(qtest, 0x3000, 0x40000, 4, 1)
        assert qtest("clock_step 100000000") == "OK 100000000"
        assert qtest.value(f"readq {WINDOW + 0x98:#x}") == 1
        assert qtest.qmp is not None
        with qtest.qmp.makefile("rwb") as qmp:
            qmp.write(b'{"execute": "qmp_capabilities"} {"execute": "query-status"} {"execute": "cont"}')
            qmp.flush()
            answers = [json.loads(qmp.readline()) for _ in range(4)]
        assert answers[2]["return"] == {"running": False, "status": "prelaunch"}
        assert qtest.value(f"readq {WINDOW + 0x98:#x}") == 0


def test_nobody_to_connect_to(machine: tuple[str, ...], runtime_dir: Path) -> None:
    path = runtime_dir / "nobody"
    done = subprocess.run([*machine, "-qtest", f"unix:{path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Failed to connect to '{path}': No such file or directory" in done.stderr


def test_functions_that_are_absent_have_no_configuration_space(qtest: Qtest) -> None:
    assert qtest.config_read(EDU, 0, 4) == 0x11E8_1234
    assert [qtest.config_read(devfn, 0, 4) for devfn in (0, EDU + 1, 0xFF)] == [None] * 3
