"""The runtime directory of one set of processes: a short private path, and one lock for each role.

A second live ZeroMQ bind on an ipc path *steals* it, and the socket file is readable by others under a usual umask: so
the directory is 0700 and a role takes ``<role>.lock`` (flock, gone with the process) before it binds anything.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from pathlib import Path

from vfio_model.errors import ConfigError


def make_runtime_directory() -> Path:
    """A new private directory ``/tmp/vm-XXXXXXXX``: short, because a socket path has 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))


def check_private(directory: str | os.PathLike[str]) -> Path:
    """``directory``, when it is ours and nobody else can enter it.

    :raise ConfigError: when it is missing, somebody else's, or not 0700.
    """
    where = os.fspath(directory)
    try:
        status = os.stat(where)
    except OSError as error:
        raise ConfigError(f"no runtime directory ({error.strerror})", where=where) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError("not a directory of this user", where=where)
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"mode {stat.S_IMODE(status.st_mode):o} lets others in", where=where, hint=f"chmod 700 {where}"
        )
    return Path(where)


class RoleLock:
    """Exclusive right to be ``role`` in ``directory``, for as long as the process lives or until :meth:`close`.

    :raise ConfigError: when another process has it.
    """

    def __init__(self, directory: str | os.PathLike[str], role: str) -> None:
        self.path = check_private(directory) / f"{role}.lock"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(f"{role} is already running there", where=str(self.path)) from error

    def close(self) -> None:
        """Let another process have it. Harmless twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
