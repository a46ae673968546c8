"""The control connection to one daemon: a command out, an answer back, with a deadline.

Every request bears a cause id that no other operator uses, so that the logs of all processes can be followed from it.
While an answer is awaited ``watch`` is called, which is where the launcher notices that a process has died.
"""

from __future__ import annotations

import itertools
import os
import select
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from protocols.control.messages import (
    REQUESTS,
    RESPONSES,
    Answer,
    Batch,
    BatchDone,
    Command,
    Document,
    Failed,
    Hello,
    Ping,
    Quit,
    Refused,
    Request,
    Status,
)
from protocols.transport.zmq import DealerClient, Sent
from vfio_model.errors import DeadlineExceeded, RemoteProtocolError, VfioModelError
from vfio_model.trace import NULL_TRACE, Trace

ANSWER_SECONDS = 10.0
_WATCH_SECONDS = 0.05
_CAUSES = itertools.count((os.getpid() << 32) + 1)


class CommandFailed(VfioModelError):
    """A daemon could not carry a command out. ``role``, ``kind`` (its error's class name) and ``reason``."""

    def __init__(self, role: str, command: str, failed: Failed) -> None:
        self.role, self.kind, self.reason = role, failed.kind, failed.reason
        super().__init__(f"{role}: {command}: {failed.reason} ({failed.kind})")


def _nothing() -> None:
    return None


class Link:
    """A control connection to ``role`` of the run in ``directory``. ``seconds`` is the deadline of a command."""

    def __init__(
        self,
        directory: Path,
        role: str,
        *,
        seconds: float = ANSWER_SECONDS,
        watch: Callable[[], None] = _nothing,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self.role, self.seconds = role, seconds
        self._path = directory / f"{role}.ctl"
        self._watch, self._trace = watch, trace
        self._seq = itertools.count(1)
        self._open()

    def _open(self) -> None:
        self._socket = DealerClient(self._path)
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)

    def reconnect(self) -> None:
        """Drop what was asked and begin afresh, as after a restart of the daemon."""
        self._socket.close()
        self._open()

    def ask(self, command: Command, seconds: float | None = None) -> Answer:
        """The answer to ``command``.

        :raise CommandFailed: when the daemon could not carry it out.
        :raise DeadlineExceeded: when it did not answer within ``seconds``.
        """
        answer = self._exchange(command, self.seconds if seconds is None else seconds)
        if isinstance(answer, BatchDone):
            raise RemoteProtocolError(f"{self.role}: a batch's answer to a single command")
        return self._checked(command, answer)

    def ask_many(self, commands: list[Command], seconds: float | None = None) -> list[Answer]:
        """The answers to ``commands``, carried out in one message. Errors as :meth:`ask`, for the first that failed."""
        answer = self._exchange(Batch(commands), self.seconds if seconds is None else seconds)
        answers = answer.answers if isinstance(answer, BatchDone) else [answer]
        return [self._checked(command, each) for command, each in zip(commands, answers, strict=False)]

    def ask_batch(self, commands: list[Command], seconds: float | None = None) -> BatchDone:
        """As :meth:`ask_many`, with the daemon's own time for each command; what failed is in the answers."""
        answer = self._exchange(Batch(commands), self.seconds if seconds is None else seconds)
        if not isinstance(answer, BatchDone):
            raise RemoteProtocolError(f"{self.role}: a single answer to a batch")
        return answer

    def document(self, command: Command) -> dict[str, object]:
        """The JSON object that answers ``command``. Errors as :meth:`ask`."""
        answer = self.ask(command)
        if not isinstance(answer, Document):
            raise RemoteProtocolError(f"{self.role}: {type(answer).__name__} in answer to {_name(command)}")
        try:
            return msgspec.json.decode(answer.json, type=dict[str, object])
        except msgspec.MsgspecError as error:
            raise RemoteProtocolError(f"{self.role}: {error} in answer to {_name(command)}") from error

    def status(self) -> dict[str, object]:
        """What the daemon says of itself."""
        return self.document(Status())

    def hello(self, seconds: float) -> bool:
        """Whether the daemon has answered within ``seconds``."""
        return self._answers(Hello(), seconds)

    def ping(self, seconds: float) -> bool:
        """Whether the daemon's main loop has answered within ``seconds``."""
        return self._answers(Ping(), seconds)

    def quit(self) -> None:
        """Ask the daemon to end; waits for its word, not for its end."""
        self._answers(Quit(), 0.5)

    def close(self) -> None:
        """Give the socket back. Harmless twice."""
        self._socket.close()

    def _answers(self, command: Command, seconds: float) -> bool:
        try:
            self.ask(command, seconds)
        except DeadlineExceeded:
            return False
        return True

    def _checked(self, command: Command, answer: Answer) -> Answer:
        if isinstance(answer, Failed):
            raise CommandFailed(self.role, _name(command), answer)
        return answer

    def _exchange(self, command: Command | Batch, seconds: float) -> Answer | BatchDone:
        seq, cause, name = next(self._seq), next(_CAUSES), _name(command)
        if self._trace.enabled:
            self._trace.cause = cause
            self._trace("control_send", role=self.role, seq=seq, command=name)
        if self._socket.send(REQUESTS.encode(Request(seq, cause, command))) is not Sent.OK:
            raise DeadlineExceeded(self.role, name, 0)
        answer = self._await(seq, name, seconds)
        if self._trace.enabled:
            self._trace("control_return", role=self.role, seq=seq, answer=_name(answer))
        return answer

    def _await(self, seq: int, name: str, seconds: float) -> Answer | BatchDone:
        deadline = time.monotonic() + seconds
        while True:
            data = self._socket.receive()
            if data is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(self.role, name, seconds)
                self._poll.poll(min(left, _WATCH_SECONDS) * 1000)
                self._watch()
                continue
            message = RESPONSES.decode(data)
            if isinstance(message, Refused):
                raise RemoteProtocolError(f"{self.role} refused us: {message.reason}")
            if message.seq == seq:
                return message.answer  # earlier ones answer requests whose deadline has passed


def _name(message: object) -> str:
    return str(getattr(type(message), "__struct_config__").tag)  # noqa: B009  (mypy does not know it)
