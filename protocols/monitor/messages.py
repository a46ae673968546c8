"""What goes over a QMP socket (QEMU's ``docs/interop/qmp-spec.rst``): one JSON object a line, CR LF at its end.

A client sends ``{"execute": NAME, "arguments": {…}, "id": …}``. The server sends a greeting, a return or an error for
each command, in order, and events at any time after the negotiation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal

from vfio_model.errors import VfioModelError

ErrorClass = Literal["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"]
QEMU_VERSION: Final = {"major": 11, "minor": 1, "micro": 0}
"""The version of QEMU whose interface this follows."""
END: Final = b"\r\n"


class CommandFailed(VfioModelError):
    """A command could not be carried out; the peer is told ``reason`` under ``error_class``."""

    def __init__(self, reason: str, error_class: ErrorClass = "GenericError") -> None:
        self.reason, self.error_class = reason, error_class
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Command:
    """A command that was asked for, with its checked arguments. ``given`` holds the ``id`` if there was one, which
    every answer repeats.
    """

    name: str
    arguments: dict[str, object]
    given: dict[str, object]


def line(message: dict[str, object]) -> bytes:
    """``message`` as it is sent."""
    return json.dumps(message).encode() + END


def greeting(version: str) -> bytes:
    """The first thing a client reads; ``version`` of this program."""
    return line({"QMP": {"version": version_document(version), "capabilities": []}})


def version_document(version: str) -> dict[str, object]:
    """What ``query-version`` returns."""
    return {"qemu": dict(QEMU_VERSION), "package": f"vfio-model {version}"}


def success(value: object, given: dict[str, object]) -> bytes:
    """The answer to a command that was carried out."""
    return line({"return": value, **given})


def failure(error: CommandFailed, given: dict[str, object]) -> bytes:
    """The answer to one that was not."""
    return line({**given, "error": {"class": error.error_class, "desc": error.reason}})


def event(name: str, data: dict[str, object], wall_ns: int) -> bytes:
    """Something happened at ``wall_ns`` (nanoseconds since the epoch)."""
    seconds, rest = divmod(wall_ns, 1_000_000_000)
    stamp = {"seconds": seconds, "microseconds": rest // 1000}
    return line({"timestamp": stamp, "event": name, **({"data": data} if data else {})})
