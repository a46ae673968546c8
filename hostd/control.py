"""The control socket of a daemon of the host's side: who are you, how are you, explain, quit."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from protocols.control import messages as control
from protocols.transport.channel import RouterChannel
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from protocols.transport.zmq import RouterServer

Status = Callable[[], dict[str, object]]
Explain = Callable[[str, int], dict[str, object]]
COMMANDS_PER_TURN = 64


class ControlServer:
    """Serves ``<role>.ctl`` in ``directory``. ``explain`` is None for a role that has nothing to explain.

    :attr:`on_quit` is called when somebody asks the role to end.
    """

    def __init__(
        self, loop: Loop, directory: Path, role: str, lock: RoleLock | None, status: Status, explain: Explain | None
    ) -> None:
        self._loop, self._role, self._status, self._explain = loop, role, status, explain
        self.on_quit: Callable[[], None] = loop.stop
        server = RouterServer(directory / f"{role}.ctl", lock=lock)
        self._channel: RouterChannel[control.ToRole, control.FromRole] = RouterChannel(
            server, control.REQUESTS, control.RESPONSES, control.Refused
        )
        loop.register(self._channel, self._readable)

    def _readable(self) -> None:
        for _ in range(COMMANDS_PER_TURN):
            received = self._channel.receive()
            if received is None:
                return
            peer, request = received
            self._channel.send(peer, control.Response(request.seq, self._answer(request.command)))

    def _answer(self, command: control.Command | control.Batch) -> control.Answer | control.BatchDone:
        if not isinstance(command, control.Batch):
            return self._one(command)
        answers: list[control.Answer] = []
        for single in command.commands:
            answers.append(self._one(single))
            if isinstance(answers[-1], control.Failed):
                break
        return control.BatchDone(answers)

    def _one(self, command: control.Command) -> control.Answer:
        if isinstance(command, control.Hello):
            return control.Welcome(self._role, os.getpid(), _version())
        if isinstance(command, control.Ping):
            return control.Ok()
        if isinstance(command, control.Status):
            return control.Document(msgspec.json.encode(self._status()))
        if isinstance(command, control.Quit):
            self._loop.call_later(0, self.on_quit)
            return control.Ok()
        if isinstance(command, control.Explain) and self._explain is not None:
            try:
                return control.Document(msgspec.json.encode(self._explain(command.address, command.iova)))
            except LookupError:
                return control.Failed("LookupError", f"the host has no device {command.address}")
        return control.Failed("NotImplementedError", f"{self._role} does not know {type(command).__name__}")

    def close(self) -> None:
        """Harmless twice."""
        self._loop.unregister(self._channel)
        self._channel.close()


def _version() -> str:
    try:
        return version("vfio-model")
    except PackageNotFoundError:
        return "unknown"
