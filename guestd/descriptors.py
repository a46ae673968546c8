"""Descriptors that monitors' clients pass (SCM_RIGHTS), by the names that ``getfd`` gives them.

One set for all monitors, where QEMU has one for each.
"""

from __future__ import annotations

import os
import socket
from collections import deque

from protocols.monitor.messages import CommandFailed
from protocols.transport.unix import close_fds
from protocols.transport.uri import given_socket
from vfio_model.errors import ConfigError


class Descriptors:
    """All of them are closed by :meth:`close`."""

    def __init__(self) -> None:
        self.passed: deque[int] = deque()
        """Those that came with the client whose command is carried out, oldest first."""
        self._named: dict[str, int] = {}

    def getfd(self, arguments: dict[str, object]) -> object:
        """Name the descriptor that came with the command; one that had the name is closed.

        :raise CommandFailed: none came, or it is no name.
        """
        name = str(arguments["fdname"])
        if not self.passed:
            raise CommandFailed("No file descriptor supplied via SCM_RIGHTS")
        fd = self.passed.popleft()
        if name[:1].isdigit():
            os.close(fd)
            raise CommandFailed("Parameter 'fdname' expects a name not starting with a digit")
        if name in self._named:
            os.close(self._named[name])
        self._named[name] = fd
        return {}

    def closefd(self, arguments: dict[str, object]) -> object:
        """:raise CommandFailed: there is none of that name."""
        name = str(arguments["fdname"])
        if name not in self._named:
            raise CommandFailed(f"File descriptor named '{name}' not found")
        os.close(self._named.pop(name))
        return {}

    def take(self, name_or_number: str) -> socket.socket:
        """The connection that was passed under a name, which is free then, or that this process has got by number.

        :raise ConfigError: there is none, or it is no connected stream socket.
        """
        if name_or_number.isdecimal():
            return given_socket(int(name_or_number))
        fd = self._named.pop(name_or_number, None)
        if fd is None:
            raise ConfigError(f"File descriptor named '{name_or_number}' not found")
        try:
            return given_socket(fd)
        except ConfigError:
            os.close(fd)
            raise

    def close(self) -> None:
        """Harmless twice."""
        close_fds(list(self._named.values()))
        self._named.clear()
