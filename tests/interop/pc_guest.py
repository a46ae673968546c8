"""A stock Linux on a stock QEMU PC, without KVM: what its own drivers make of the devices that it is given."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.interop.linux import DONE, initramfs

RAM = "512M"
DEADLINE_S = 300
"""No time is checked, by the guest either (``no_timer_check``): the machine may be busy."""
MACHINE = (
    "-machine", "q35,memory-backend=ram", "-object", f"memory-backend-memfd,id=ram,size={RAM},share=on", "-m", RAM,
    "-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-no-reboot",
)  # fmt: skip


class GuestFailed(AssertionError):
    """The guest did not do all of it; the message ends with its console."""


def boot(
    folder: Path,
    where: Path,
    devices: Sequence[str],
    drivers: Sequence[str],
    script: str,
    *,
    programs: Sequence[str] = (),
    kernel: str = "",
) -> tuple[str, float]:
    """Boot with ``devices`` (QEMU's options), load ``drivers``, run ``script``; what the console said, and how many
    seconds it took. ``folder`` is what ``tools/get-qemu --guest-x86`` made, ``where`` is for files, ``kernel`` more of
    the kernel's command line.

    :raise GuestFailed: when the guest does not come to the script's end.
    """
    guest = folder / "guest/x86_64"
    image, console = where / "initramfs", where / "console"
    image.write_bytes(initramfs(guest, drivers, script, programs))
    command: list[str | Path] = [
        folder / "bin/qemu-system-x86_64", *MACHINE, *devices, "-serial", f"file:{console}",
        "-kernel", guest / "vmlinuz", "-initrd", image,
        "-append", f"console=ttyS0 panic=-1 quiet no_timer_check {kernel}",
    ]  # fmt: skip
    start = time.monotonic()
    said = ""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S, check=False)
        said = done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as late:
        said = f"after {DEADLINE_S} s: {(late.stderr or b'').decode(errors='replace')}"
    seconds = time.monotonic() - start
    text = console.read_text(errors="replace") if console.exists() else ""
    image.unlink()
    if DONE not in text:
        raise GuestFailed(f"the guest did not finish; QEMU said: {said}\n{text[-6000:]}")
    return text, seconds
