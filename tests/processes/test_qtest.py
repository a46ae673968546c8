"""qtest with devices in other processes: an assigned one at the host, a remote one behind its socket. A step returns
when each has taken it.

Registers of a device that is not the machine's own are little-endian.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceleration import kvm
from tests.guestd.qtest_client import EDU, MACHINE, SECONDS, WINDOW, Qtest, map_edu, running
from tests.processes.conftest import HostProcess

pytestmark = pytest.mark.machine

PROGRAM = (sys.executable, "-m", "guestd.system")
SHARED = ("-object", "memory-backend-memfd,id=m,size=256M", "-machine", "memory-backend=m")
H_PUT_TCE = 0x20
SUCCESS = "0x" + "0" * 16


def _store(qtest: Qtest, offset: int, value: int) -> None:
    assert qtest(f"write {WINDOW + offset:#x} 8 0x{value.to_bytes(8, 'little').hex()}") == "OK"


def _running(qtest: Qtest) -> bool:
    return bool(bytes.fromhex(qtest(f"read {WINDOW + 0x98:#x} 8").removeprefix("OK 0x"))[0] & 1)


def _put_tce(qtest: Qtest, ioba: int, tce: int) -> None:
    assert qtest(f"hcall {H_PUT_TCE:#x} 0x80000000 {ioba:#x} {tce:#x}").split()[1] == SUCCESS


def _carry(qtest: Qtest) -> None:
    """A few bytes into edu's buffer and back to another page, through TCEs; then with the TCE gone."""
    assert qtest.config_read(EDU, 0, 4) == 0x11E8_1234
    map_edu(qtest)
    _put_tce(qtest, 0x3000, 0x20003)
    _put_tce(qtest, 0x4000, 0x30003)
    assert qtest("write 0x20010 5 0x68656c6c6f") == "OK"
    _transfer(qtest, 0x3010, 0x40000, 1)
    _transfer(qtest, 0x40000, 0x4020, 3)
    assert qtest("read 0x30020 6") == "OK 0x68656c6c6f00"
    _put_tce(qtest, 0x4000, 0)
    _transfer(qtest, 0x40000, 0x4040, 3)
    assert qtest("read 0x30040 6") == "OK 0x" + "00" * 6


def _transfer(qtest: Qtest, src: int, dst: int, command: int) -> None:
    for offset, value in ((0x80, src), (0x88, dst), (0x90, 5), (0x98, command)):
        _store(qtest, offset, value)
    assert qtest("clock_step 99999999").startswith("OK") and _running(qtest)
    assert qtest("clock_step 1").startswith("OK") and not _running(qtest)


def test_an_assigned_device(host: HostProcess, runtime_dir: Path) -> None:
    device = ("-device", "vfio-pci,host=0000:02:00.0,group=27,addr=2,id=n")
    accelerated = ("-machine", "kvm-tce=on") if kvm() else ()
    with running([*PROGRAM, *MACHINE, *accelerated, "-runtime-dir", str(runtime_dir), *device], runtime_dir) as qtest:
        _carry(qtest)


@pytest.mark.parametrize("memory", [SHARED, ()], ids=["shared", "message"])
def test_a_remote_device(runtime_dir: Path, memory: tuple[str, ...]) -> None:
    path = runtime_dir / "card"
    argv = [sys.executable, "-m", "hostd", "device", "--model", "edu", "--socket", str(path), "--die-with-parent"]
    card = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        assert card.stderr is not None and "serves" in card.stderr.readline()
        device = ("-device", f"vfio-user-pci,socket={path},addr=2,id=n")
        with running([*PROGRAM, *MACHINE, *memory, *device], runtime_dir) as qtest:
            _carry(qtest)
    finally:
        card.terminate()
        assert card.wait(SECONDS) == 0
        if card.stderr is not None:
            card.stderr.close()
