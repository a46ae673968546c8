"""Who dies takes only his own with him: devices, clients, the host itself. Afterwards nothing of theirs is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hostd.device_server import SpawnOptions, spawn_device
from protocols.port import files
from protocols.transport.kernel import Pidfd
from tests.processes.conftest import HostProcess, wait_dead
from tests.processes.port_client import Opened, RawFile, RawPort
from tests.processes.test_host_dma import burst
from vfio_model.devices.dma_burst import regs
from vfio_model.errors import PeerLost
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PCIDevice

PAGE = 4096
CLIENT = """
import sys
from pathlib import Path
from tests.processes.port_client import Opened, RawPort
opened = Opened(RawPort(Path(sys.argv[1])))
opened.container.map_dma(0x1000, opened.hva, 4096)
device = opened.device()
device.bus_master()
print(device.pid, flush=True)
sys.stdin.read()
"""


def empty(status: dict[str, object]) -> bool:
    """Nothing of any client is left."""
    return not any(status[key] for key in ("mms", "files", "devices", "pending", "connections"))


def test_a_killed_client_leaves_nothing_behind(host: HostProcess, runtime_dir: Path) -> None:
    before = host.fds()
    for _ in range(3):
        popen = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(runtime_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert popen.stdout is not None and popen.stdin is not None
        device = Pidfd.open(int(popen.stdout.readline()))
        assert host.status()["locked_vm"] != 0
        popen.kill()
        popen.wait()
        popen.stdout.close()
        popen.stdin.close()
        wait_dead(device.fd)
        device.close()
        status = host.until(empty)
        assert status["locked_vm"] == 0
    children = psutil.Process(host.pid).children(recursive=True)
    assert not [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert host.fds() <= before + 4, "the resource tracker of multiprocess keeps its pipe, nothing else stays"
    assert host.status()["areas"] == 3, "the PE blocks alone"


def test_a_killed_device_reads_as_gone_and_can_be_opened_again(
    host: HostProcess, client: Callable[..., RawPort]
) -> None:
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, PAGE)
    device = opened.device()
    os.kill(device.pid, signal.SIGKILL)
    wait_dead(device.pidfd.fd)
    with pytest.raises(PeerLost):
        device.read(0, 0, 8)
    host.until(lambda status: not status["devices"])
    again = opened.device()
    assert again.pid != device.pid
    again.bus_master()
    assert burst(again, 0x1000, 8, 1, regs.COMMAND_WRITE, pattern=2) == 1


def test_closing_the_device_file_ends_its_process(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    device = opened.device()
    device.endpoint.close()
    wait_dead(device.pidfd.fd)
    host.until(lambda status: not status["devices"])
    opened.device()


def test_a_device_is_open_once(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    opened.device()
    with pytest.raises(OSError) as refused:
        opened.device()
    assert refused.value.errno == 16


def test_when_the_host_dies_its_devices_do(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    device = opened.device()
    host.end(signal.SIGKILL)
    wait_dead(device.pidfd.fd)
    with pytest.raises(PeerLost):
        opened.port.mm.receive()


def test_a_device_of_ours_ends_with_the_host(
    host: HostProcess, client: Callable[..., RawPort], runtime_dir: Path
) -> None:
    server = spawn_device("dma-burst", SpawnOptions("0000:03:00.0", runtime_dir))
    offer = RawFile(runtime_dir)
    offer.ask(files.AttachDevice("0000:03:00.0"), (server.control.fileno(), server.pidfd.fd))
    opened = Opened(client(), group=28)
    opened.device("0000:03:00.0")
    host.end(signal.SIGKILL)
    wait_dead(server.pidfd.fd)
    server.close()
    offer.close()


def test_the_host_ends_in_order_and_can_be_started_again(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], runtime_dir: Path
) -> None:
    host = start_host()
    device = Opened(client()).device()
    assert host.end() == 0
    wait_dead(device.pidfd.fd)
    assert not [path.name for path in runtime_dir.iterdir() if path.is_socket()]
    start_host()
    Opened(client()).device()


def test_after_a_kill_the_sockets_are_taken_over(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort]
) -> None:
    start_host().end(signal.SIGKILL)
    start_host()
    Opened(client())


def test_a_second_host_in_the_same_directory_is_refused(host: HostProcess, runtime_dir: Path) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "hostd", "container", "--dir", str(runtime_dir)], capture_output=True, text=True
    )
    assert second.returncode == 2
    assert "hostd is already running there" in second.stderr


class Misbehaving(PCIDevice):
    """Raises when its register 8 is written; defined here, pickled to its process by dill."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0BAD
    BARS = (BarSpec(0, 4096),)

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        return 0x600D

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        raise ZeroDivisionError("a mistake in the model")


def test_a_device_class_of_the_test_and_its_mistake(
    host: HostProcess, client: Callable[..., RawPort], runtime_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A device given as a Python object is served; when it raises, its process ends and nobody else does."""
    local = type("Local", (Misbehaving,), {"DEVICE_ID": 0x0BAE})
    server = spawn_device(local, SpawnOptions("0000:03:00.0", runtime_dir))
    offer = RawFile(runtime_dir)
    offer.ask(files.AttachDevice("0000:03:00.0"), (server.control.fileno(), server.pidfd.fd))
    server.control.close()
    opened = Opened(client(), group=28)
    device = opened.device("0000:03:00.0")
    assert device.read(7, 2, 2) == 0x0BAE
    assert device.read(0, 0, 4) == 0x600D
    other = Opened(client(name="other"))
    device.post(0, 8, 4, 1)
    wait_dead(server.pidfd.fd)
    server.process.join()
    assert server.process.exitcode == 1
    assert "its model raised ZeroDivisionError: a mistake in the model" in capfd.readouterr().err
    other.device()
    server.close()
    offer.close()


def test_a_model_that_is_not_known_is_an_error_of_the_ioctl(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort]
) -> None:
    start_host(topology={"groups": [{"id": 26, "devices": [{"name": "0000:01:00.0", "model": "flux-capacitor"}]}]})
    opened = Opened(client())
    with pytest.raises(OSError) as refused:
        opened.device()
    assert refused.value.errno == 5
    with pytest.raises(OSError):
        opened.device()


def test_a_stopped_device_is_ended_with_its_client(host: HostProcess, client: Callable[..., RawPort]) -> None:
    port = client()
    device = Opened(port).device()
    pidfd = Pidfd.open(device.pid)
    os.kill(device.pid, signal.SIGSTOP)
    port.close()
    wait_dead(pidfd.fd)
    pidfd.close()
    assert host.until(empty)["locked_vm"] == 0
