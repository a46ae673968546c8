"""Ends a run whose operator has gone.

Started as ``python -I -S watcher.py DIR`` with a pipe on stdin that only the operator's command holds open. Each line
on it is ``PID START_TICKS``: a process group that the command leads. A last line ``done`` means that the command has
cleaned up itself. When the pipe closes without it (the command was killed), the groups are killed and the directory
is removed. Only the standard library's lightest parts are imported: it must be ready before anything is worth
killing.
"""

import os
import signal
import sys
import time

TRIES = 200
PAUSE_SECONDS = 0.02


def _start_ticks(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return -1


def _members(sessions: set[int]) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.getsid(int(name)) in sessions:
                    found.append(int(name))
            except OSError:
                continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return


def _remove(directory: str) -> bool:
    for root, folders, files in os.walk(directory, topdown=False):
        for name in files + folders:
            path = os.path.join(root, name)
            try:
                if os.path.isdir(path) and not os.path.islink(path):
                    os.rmdir(path)
                else:
                    os.unlink(path)
            except OSError:
                continue
    try:
        os.rmdir(directory)
    except OSError:
        return not os.path.exists(directory)
    return True


def _clean_up(leaders: list[tuple[int, int]], directory: str) -> None:
    """Until the directory is gone: a process that is dying, or one that nobody told us of, may still write to it."""
    for _ in range(TRIES):
        # A leader that has gone may have left members; its id is not given to anybody else while one lives. A leader
        # with another start time is somebody else's process.
        sessions = {pid for pid, ticks in leaders if _start_ticks(pid) in (ticks, -1)}
        members = _members(sessions)
        for pid in members:
            _kill(pid)
        if _remove(directory) and not members:
            return
        time.sleep(PAUSE_SECONDS)


def main() -> None:
    """Wait for the end of stdin, then clean up unless ``done`` was said."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    leaders: list[tuple[int, int]] = []
    for line in sys.stdin:
        if line.strip() == "done":
            return
        pid, ticks = line.split()
        leaders.append((int(pid), int(ticks)))
    _clean_up(leaders, sys.argv[1])


if __name__ == "__main__":
    main()
