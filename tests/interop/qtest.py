"""A client of the qtest protocol: it listens, the machine connects. One line a command, one line an answer, in order.

Commands may be *pipelined*: :meth:`QTest.send` queues, :meth:`QTest.answers` sends what is queued and collects.
Asynchronous ``IRQ`` lines are kept in :attr:`QTest.irqs`.
"""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Callable
from pathlib import Path

_TIMEOUT_S = 60.0
_LOOK_S = 0.5
_CHUNK = 1 << 18


class QTestError(Exception):
    """The machine answered FAIL or ERR, or went away."""


def accept(listener: socket.socket, alive: Callable[[], bool]) -> socket.socket:
    """The connection that comes to ``listener`` while the process that makes it is ``alive``.

    :raise QTestError: when none comes.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    listener.settimeout(_LOOK_S)
    while time.monotonic() < deadline:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if not alive():
                break
            continue
        connection.settimeout(_TIMEOUT_S)
        return connection
    raise QTestError("the machine did not connect")


class QTest:
    """A qtest connection, open after :meth:`accept`."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._socket: socket.socket | None = None
        self._queue: list[str] = []
        self._waiting = 0
        self._input = b""
        self.irqs: list[tuple[int, bool]] = []
        """(line, whether it went up), in order, once ``irq_intercept_in`` asked for them."""

    def accept(self, alive: Callable[[], bool]) -> None:
        """Wait for the machine to connect, while it is ``alive``.

        :raise QTestError: when it does not.
        """
        self._socket = accept(self._listener, alive)
        self._listener.close()

    def close(self) -> None:
        """Hang up."""
        self._listener.close()
        if self._socket is not None:
            self._socket.close()

    def send(self, command: str) -> None:
        """Queue one command."""
        self._queue.append(command)
        self._waiting += 1

    def answers(self) -> list[str]:
        """What the machine answered to everything sent since the last time, without its ``OK``.

        :raise QTestError: when an answer is no OK, or the machine went away.
        """
        assert self._socket is not None, "a machine has connected"
        wanted, self._waiting = self._waiting, 0
        text = "".join(command + "\n" for command in self._queue)
        self._queue.clear()
        found: list[str] = []
        data = text.encode()
        # never more on its way than the peer's answers leave room for: it does not read while it cannot write
        for at in range(0, len(data), _CHUNK):
            self._socket.sendall(data[at : at + _CHUNK])
        while len(found) < wanted:
            line = self._line()
            if line.startswith("IRQ "):
                _, way, number = line.split()
                self.irqs.append((int(number), way == "raise"))
                continue
            if line != "OK" and not line.startswith("OK "):
                raise QTestError(line)
            found.append(line[3:])
        return found

    def ask(self, command: str) -> str:
        """One command and its answer."""
        self.send(command)
        return self.answers()[-1]

    def _line(self) -> str:
        assert self._socket is not None, "a machine has connected"
        while b"\n" not in self._input:
            data = self._socket.recv(1 << 20)
            if not data:
                raise QTestError("the machine closed the connection")
            self._input += data
        line, _, self._input = self._input.partition(b"\n")
        return line.decode()

    # -- memory --------------------------------------------------------------------------------------------------

    def write(self, gpa: int, data: bytes) -> None:
        """Queue a store of ``data``."""
        if data:
            self.send(f"b64write {gpa:#x} {len(data):#x} {base64.b64encode(data).decode()}")

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes at ``gpa``, after everything queued."""
        return self.read_many([(gpa, size)])[0]

    def read_many(self, spans: list[tuple[int, int]]) -> list[bytes]:
        """The bytes of each ``(gpa, size)``, after everything queued."""
        for gpa, size in spans:
            self.send(f"b64read {gpa:#x} {size:#x}")
        return [base64.b64decode(answer) for answer in self.answers()[-len(spans) :]] if spans else []
