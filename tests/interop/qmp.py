"""As much of a QMP client as starting, resetting and asking a machine takes: it listens, the machine connects."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.interop.qtest import accept


class QmpError(Exception):
    """The machine answered with an error, or went away."""


class Qmp:
    """A monitor connection, open after :meth:`accept`."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._socket: socket.socket | None = None
        self._text = ""
        self._decoder = json.JSONDecoder()
        self.version: dict[str, Any] = {}
        """``QMP.version`` of the greeting."""

    def accept(self, alive: Callable[[], bool]) -> None:
        """Wait for the machine while it is ``alive``, and leave the negotiation mode."""
        self._socket = accept(self._listener, alive)
        self._listener.close()
        self.version = self._message()["QMP"]["version"]
        self.ask("qmp_capabilities")

    def close(self) -> None:
        """Hang up."""
        self._listener.close()
        if self._socket is not None:
            self._socket.close()

    def ask(self, command: str, until: str | None = None, **arguments: Any) -> Any:
        """The ``return`` of ``command``; with ``until``, wait for that event as well, which may come first.

        :raise QmpError: when the machine refuses.
        """
        assert self._socket is not None, "a machine has connected"
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        answer: dict[str, Any] | None = None
        seen = until is None
        while answer is None or not seen:
            message = self._message()
            if "error" in message:
                raise QmpError(f"{command}: {message['error']}")
            if "return" in message:
                answer = message
            seen = seen or message.get("event") == until
        return answer["return"]

    def _message(self) -> dict[str, Any]:
        assert self._socket is not None, "a machine has connected"
        while True:
            self._text = self._text.lstrip()
            try:
                message, end = self._decoder.raw_decode(self._text)
            except json.JSONDecodeError:
                data = self._socket.recv(1 << 16)
                if not data:
                    raise QmpError("the machine closed the connection") from None
                self._text += data.decode()
                continue
            self._text = self._text[end:]
            assert isinstance(message, dict), "QMP messages are objects"
            return message
