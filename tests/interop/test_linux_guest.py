"""Linux's own e1000 and nvme drivers, on stock QEMU, bind to this project's models and do real work."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop import guest_scripts as scripts
from tests.interop.pc import vfio_user
from tests.interop.pc_guest import boot
from tests.interop.served import Served, qemu_folder

DISK_SIZE = 64 << 20
IOMMU = ("-device", "intel-iommu,caching-mode=on")


@pytest.fixture
def where() -> Iterator[Path]:
    path = tempfile.mkdtemp(prefix="vm-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path)


def cable(where: Path, near: str, far: str) -> str:
    """The near end of a cable, as QEMU's ``-netdev dgram`` takes it."""
    return f"dgram,local.type=unix,local.path={where}/{near},remote.type=unix,remote.path={where}/{far}"


@pytest.mark.parametrize("iommu", [False, True], ids=["no-iommu", "intel-iommu"])
def test_disk_and_network_of_a_linux_guest(where: Path, iommu: bool) -> None:
    disk = where / "disk"
    disk.touch()
    os.truncate(disk, DISK_SIZE)
    with ExitStack() as stack:
        nvme = stack.enter_context(Served("nvme", where / "nvme.sock", drive=f"file:{disk}", serial="interop"))
        e1000 = stack.enter_context(
            Served("e1000", where / "e1000.sock", netdev=f"unix:{where}/a@{where}/b", mac="52:54:00:00:00:01")
        )
        devices = [
            *(IOMMU if iommu else ()), *vfio_user(nvme.socket, 2), *vfio_user(e1000.socket, 3),
            "-netdev", f"{cable(where, 'b', 'a')},id=n1", "-device", "e1000,netdev=n1,mac=52:54:00:00:00:02",
        ]  # fmt: skip
        said, seconds = boot(
            qemu_folder(),
            where,
            devices,
            (*scripts.DISK_DRIVERS, *scripts.NET_DRIVERS),
            scripts.DISK + scripts.NET,
            programs=scripts.DISK_PROGRAMS,
            kernel="intel_iommu=on iommu.strict=1" if iommu else "",
        )
    print(f"{seconds:.0f} s\n{said}")
    assert "interop: disk is good" in said and "interop: net is good" in said
