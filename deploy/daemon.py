"""One daemon as the launcher sees it: a command in its own session, a pidfd, a log file.

The child gets ``PR_SET_PDEATHSIG`` before its command is exec'd, so that it ends with the operator's command even if
it hangs in its own start-up. A dead child is looked at without being reaped: as long as it is a zombie, its pid and
its process group are nobody else's, and killing the group at the end cannot hit a stranger.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.runtime_dir import ProcessEntry, start_ticks, state

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


def _die_with(parent: int) -> Callable[[], None]:
    def arm() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the launcher holds signals while it starts us
        if os.getppid() != parent:  # it died before the arming
            os._exit(1)

    return arm


class Daemon:
    """A started process. ``role`` names it; ``log`` is where its stdout and stderr go."""

    def __init__(self, role: str, argv: Sequence[str], directory: Path, env: Mapping[str, str] | None = None) -> None:
        self.role = role
        self.log = directory / f"{role}.log"
        self.expected_end = False
        """True once somebody has killed it on purpose: its end is not an error then."""
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                env=dict(env) if env is not None else None,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.entry = ProcessEntry(role, self.pid, start_ticks(self.pid) or 0)
        self._status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the process has ended; it stays a zombie until :meth:`close`."""
        if self._status is None:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if result is not None:
                self._status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        return self._status is not None

    @property
    def how(self) -> str:
        """How it ended, in words; ``running`` when it did not."""
        if not self.ended or self._status is None:
            return "running"
        return f"killed by {signal.Signals(-self._status).name}" if self._status < 0 else f"exit status {self._status}"

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most ``seconds``."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        deadline = time.monotonic() + seconds
        while not self.ended:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send ``number`` to the process; nothing happens when it has ended."""
        if not self.ended:
            signal.pidfd_send_signal(self.pidfd, number)

    @property
    def stopped(self) -> bool:
        """Whether job control or a tracer holds it: it would answer nothing."""
        return state(self.pid) in ("T", "t")

    def last_lines(self, count: int = 5) -> list[str]:
        """The last ``count`` lines of its log that are not empty."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    def close(self) -> None:
        """Kill what is left of its process group, reap it and give the descriptor back."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        os.close(self.pidfd)
