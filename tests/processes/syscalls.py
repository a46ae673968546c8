"""Which system calls a process makes: by strace where it may attach, else by looking at ``/proc/PID/syscall`` again and
again.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.processes.rig import until

MESSAGES = {
    "read",
    "readv",
    "pread64",
    "write",
    "writev",
    "pwrite64",
    "ioctl",
    "futex",
    "socket",
    "connect",
    "accept4",
} | {f"{verb}{what}" for verb in ("send", "recv") for what in ("to", "from", "msg", "mmsg")}
"""What asking another process for something would need."""
_NUMBERS = {
    "x86_64": {0: "read", 1: "write", 16: "ioctl", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev"}
    | {41: "socket", 42: "connect", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 202: "futex"}
    | {288: "accept4", 299: "recvmmsg", 307: "sendmmsg"},
    "aarch64": {63: "read", 64: "write", 29: "ioctl", 67: "pread64", 68: "pwrite64", 65: "readv", 66: "writev"}
    | {198: "socket", 203: "connect", 206: "sendto", 207: "recvfrom", 211: "sendmsg", 212: "recvmsg", 98: "futex"}
    | {242: "accept4", 243: "recvmmsg", 269: "sendmmsg"},
}
SAMPLES = 20000


def calls_during(pid: int, work: Callable[[], None]) -> Counter[str]:
    """The calls that ``pid`` makes while ``work()`` runs; work is given time enough for it to be seen."""
    traced = _by_strace(pid, work) if shutil.which("strace") else None
    return traced if traced is not None else by_sampling(pid, work)


def _by_strace(pid: int, work: Callable[[], None]) -> Counter[str] | None:
    """None when strace may not attach here."""
    with tempfile.TemporaryFile() as output:
        strace = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=output)
        try:
            until("strace has attached", lambda: strace.poll() is not None or os.fstat(output.fileno()).st_size)
            if strace.poll() is not None:
                return None
            work()
        finally:
            strace.terminate()
            strace.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Counter(re.findall(r"^(?:\[pid +\d+\] )?(?:<\.\.\. )?([a-z_0-9]+)[ (]", text, re.MULTILINE))


def by_sampling(pid: int, work: Callable[[], None]) -> Counter[str]:
    """What the process is in, each time that one looks; and how many reads and writes the kernel has counted."""
    names = _NUMBERS.get(platform.machine(), {})
    before = _counted(pid)
    work()
    seen: Counter[str] = Counter()
    for _ in range(SAMPLES):
        number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
        seen[names.get(int(number), number) if number.lstrip("-").isdigit() else number] += 1
    work()
    seen.update({name: count - before[name] for name, count in _counted(pid).items() if count > before[name]})
    return seen


def _counted(pid: int) -> dict[str, int]:
    """``syscr`` and ``syscw`` of ``/proc/PID/io``: calls of the read and write families."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return {"read": int(fields["syscr"]), "write": int(fields["syscw"])}
