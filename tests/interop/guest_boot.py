"""``make interop-guest``: boot a stock Linux on stock QEMU, record what its IOMMU drivers do, check the recording.

The guest loads e1000 and nvme, pings its gateway, reads 4 MiB and writes 2 MiB on the disk, and powers off. QEMU's
trace of it is then replayed through the model by ``vfio-model check``. Recordings stay in ``recordings/`` below the
folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.interop.linux import DONE, initramfs

RAM_MIB = 1024
DISK_MIB = 64
TIMEOUT_S = 900
ENOUGH = 100
"""Translations that a recording holds at least."""
EVENTS = ("spapr_iommu_*", "spapr_pci_*")


@dataclass(frozen=True)
class Boot:
    """One machine: its name, more of QEMU's options, the modules that its guest loads, what it does then."""

    name: str
    options: tuple[str, ...]
    modules: tuple[str, ...]
    script: str
    check: tuple[str, ...] = ()
    """Options for ``vfio-model check``."""


_PCI = ("-device", "e1000,netdev=net0,addr=01.0", "-device", "nvme,drive=disk0,serial=interop,addr=02.0")
_PCI_SCRIPT = """\
ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0
ping -c 3 10.0.2.2 || fail
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/nvme0n1 ] && break; sleep 1; done
dd if=/dev/nvme0n1 of=/dev/null bs=64k count=64 || fail
dd if=/dev/zero of=/dev/nvme0n1 bs=64k count=32 conv=fsync || fail
"""
_VIO = ("-device", "spapr-vlan,netdev=net0", "-device", "spapr-vscsi", "-device", "scsi-hd,drive=disk0")
_VIO_SCRIPT = _PCI_SCRIPT.replace("nvme0n1", "sda")
BOOTS = (
    Boot("pseries-ddw", _PCI, ("e1000", "nvme"), _PCI_SCRIPT),
    Boot(
        "pseries-noddw",
        ("-global", "spapr-pci-host-bridge.ddw=off", *_PCI),
        ("e1000", "nvme"),
        _PCI_SCRIPT,
        ("--no-ddw",),
    ),
    Boot("pseries-vio", _VIO, ("ibmveth", "ibmvscsi", "sd_mod"), _VIO_SCRIPT),
)


def record(folder: Path, boot: Boot) -> Path:
    """Boot it; the recording.

    :raise SystemExit: when the guest did not do all of it.
    """
    where = folder / "recordings"
    where.mkdir(exist_ok=True)
    image, disk, trace = where / f"{boot.name}.cpio", where / f"{boot.name}.disk", where / f"{boot.name}.trace"
    console = where / f"{boot.name}.console"
    guest = folder / "guest/ppc64le"
    image.write_bytes(initramfs(guest, boot.modules, boot.script))
    with disk.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    trace.unlink(missing_ok=True)
    command: list[str | Path] = [
        folder / "bin/qemu-system-ppc64", "-machine", "pseries", "-m", str(RAM_MIB), "-nodefaults", "-display", "none",
        "-accel", "tcg", "-no-reboot", "-serial", f"file:{console}",
        "-kernel", guest / "vmlinuz", "-initrd", image, "-append", "console=hvc0 panic=-1 quiet",
        "-netdev", "user,id=net0,restrict=on", "-drive", f"file={disk},format=raw,if=none,id=disk0",
        *boot.options, "-D", trace,
    ]  # fmt: skip
    for event in EVENTS:
        command += ["-trace", event]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        sys.exit(f"interop-guest: {boot.name}: {error}; console: {console}")
    finally:
        image.unlink()
        disk.unlink()
    if DONE not in console.read_text(errors="replace"):
        sys.exit(f"interop-guest: {boot.name}: the guest did not finish; console: {console}")
    return trace


def check(trace: Path, boot: Boot) -> str:
    """What ``vfio-model check`` says of ``trace`` in a line.

    :raise SystemExit: when it finds differences, or hardly anything to compare.
    """
    command = [sys.executable, "-m", "deploy.cli", "check", "--json", *boot.check, str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"interop-guest: {boot.name}: check ended with {done.returncode}\n{done.stdout}{done.stderr}")
    report = json.loads(done.stdout)
    if report["translations_checked"] < ENOUGH:
        sys.exit(f"interop-guest: {boot.name}: hardly anything was compared: {done.stdout}")
    return json.dumps({key: value for key, value in report.items() if isinstance(value, int | str)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Every boot, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what tools/get-qemu --guest-ppc made")
    parser.add_argument("boots", nargs="*", help=", ".join(boot.name for boot in BOOTS))
    given = parser.parse_args(arguments)
    for boot in BOOTS:
        if not given.boots or boot.name in given.boots:
            start = time.monotonic()
            trace = record(given.folder.absolute(), boot)
            print(f"{boot.name}: booted in {time.monotonic() - start:.0f} s; {check(trace, boot)}", flush=True)


if __name__ == "__main__":
    main()
