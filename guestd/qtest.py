"""qtest: a socket on which a test is the machine's CPU and its clock (``-qtest``).

guestd connects out, or listens when the endpoint says ``server``, for one client after another. All that came is
carried out in one turn of the loop, and answered in one piece. A command may wait for devices and for the host; what is
served in waits is served meanwhile, the next command is not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import IO, Final

from guestd.config import QtestConfig
from guestd.machines.board import Paravirtual
from guestd.operations import ELSEWHERE, Operations, RunState
from guestd.posted_writes import burst
from guestd.qmp_qom import find
from protocols.monitor import messages as monitor
from protocols.qtest.arguments import CommandFailed
from protocols.qtest.state import QtestState
from protocols.transport.loop import Loop
from protocols.transport.unix import ByteConnection
from protocols.transport.unix_listener import ByteListener
from vfio_model.errors import ConfigError, InternalGuestError, PeerLost, VfioModelError
from vfio_model.iommu.spapr.regs import RTAS_TOKENS, HReturn

LOOK_NS: Final = 1_000_000
"""How often it is looked whether a machine that was about to leave has left."""


class QtestMachine:
    """The guest as qtest sees it. A guest that cannot go on can still be read, and one that is elsewhere, too: what is
    left of its RAM.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations, self._clock = operations, operations.guest.clock
        self._board = operations.guest.board
        self._machine = operations.guest.machine
        self.paravirtual = self._board.calls is not None
        self.big_endian: bool = self._machine.big_endian

    @property
    def now_ns(self) -> int:
        """Virtual time, with the steps that a stopped machine owes."""
        return self._clock.now_ns

    def next_deadline_ns(self) -> int | None:
        """The next timer of this process; those of device processes are not known here."""
        return self._clock.virtual.next_expiry_ns()

    def advance_to(self, now_ns: int) -> int:
        """Returns when every device has taken the step."""
        self._check()
        try:
            return self._clock.step(now_ns - self._clock.now_ns)
        except InternalGuestError as error:
            raise self._failed(error) from error
        except (VfioModelError, OSError) as error:
            raise CommandFailed(f"FAIL {error}") from error

    def read(self, gpa: int, size: int) -> bytes:
        """Zeros where nothing answers."""
        return self._machine.read_memory(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        """What nobody takes is lost."""
        self._check()
        try:
            with burst():
                self._machine.write_memory(gpa, data)
        except InternalGuestError as error:
            raise self._failed(error) from error

    def port_read(self, port: int, size: int) -> int:
        """What the machine has there."""
        try:
            return self._board.port_read(port, size)
        except InternalGuestError as error:
            raise self._failed(error) from error

    def port_write(self, port: int, size: int, value: int) -> None:
        """What nobody takes is lost."""
        self._check()
        try:
            self._board.port_write(port, size, value)
        except InternalGuestError as error:
            raise self._failed(error) from error

    def rtas(self, name: str, args: tuple[int, int], rets: tuple[int, int]) -> int:
        """H_PARAMETER for a name that the platform does not have."""
        self._check()
        token = RTAS_TOKENS.get(name)
        if token is None:
            return int(HReturn.H_PARAMETER)
        try:
            return self._calls.rtas_in_memory(int(token), args, rets)
        except InternalGuestError as error:
            raise self._failed(error) from error

    def hcall(self, nr: int, args: Sequence[int]) -> tuple[int, Sequence[int]]:
        """A hypercall of the guest."""
        self._check()
        try:
            return self._calls.hcall(nr, *args)
        except InternalGuestError as error:
            raise self._failed(error) from error

    @property
    def _calls(self) -> Paravirtual:
        calls = self._board.calls
        assert calls is not None, "the commands are there with the calls"
        return calls

    def resolve(self, path: str) -> str:
        """:raise CommandFailed: there is nothing at ``path``."""
        try:
            return find(self._operations.guest, path).path
        except monitor.CommandFailed as error:
            raise CommandFailed("FAIL Unknown device") from error

    def intercept(self, path: str, *, outputs: bool) -> bool:
        """The machine's interrupt lines are inputs; other devices have neither."""
        return path == self._board.IRQ_INPUTS and not outputs

    def _check(self) -> None:
        """:raise CommandFailed: the guest cannot go on, or the machine has left, or is still to come."""
        try:
            self._operations.check()
        except InternalGuestError as error:
            raise CommandFailed(f"FAIL {error}") from error
        if self._operations.state in ELSEWHERE:
            raise CommandFailed(f"FAIL the machine is not here: {self._operations.state}")

    def _failed(self, error: InternalGuestError) -> CommandFailed:
        self._operations.fail(error)
        return CommandFailed(f"FAIL {error}")


class QtestLog:
    """``-qtest-log``: what was received and sent, with the seconds since the client came."""

    def __init__(self, to: str) -> None:
        """``to``: a file, or empty for stderr.

        :raise ConfigError: when the file cannot be written.
        """
        self._file: IO[str]
        try:
            self._file = open(to, "w", encoding="latin-1") if to else sys.stderr  # noqa: SIM115 -- closed by close()
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", where=f"-qtest-log {to}") from error
        self._began = time.monotonic()

    def opened(self) -> None:
        """A client came."""
        self._began = time.monotonic()
        self._file.write("[I 0.000000] OPENED\n")
        self._file.flush()

    def line(self, kind: str, text: str) -> None:
        """One line in either direction."""
        self._file.write(f"[{kind} +{time.monotonic() - self._began:.6f}] {text}\n")

    def flush(self) -> None:
        """After a turn."""
        self._file.flush()

    def closed(self) -> None:
        """The client went."""
        self._file.write(f"[I +{time.monotonic() - self._began:.6f}] CLOSED\n")
        self._file.flush()

    def close(self) -> None:
        """Harmless twice."""
        if self._file is not sys.stderr:
            self._file.close()


class QtestServer:
    """Serves qtest on ``loop``; made before the loop runs.

    :raise ConfigError: when nobody listens there, or one cannot listen or log.
    """

    def __init__(self, endpoint: QtestConfig, operations: Operations, loop: Loop) -> None:
        self._machine, self._operations, self._loop = QtestMachine(operations), operations, loop
        self._log = None if endpoint.log in ("none", "/dev/null") else QtestLog(endpoint.log)
        self._connection: ByteConnection | None = None
        self._listener: ByteListener | None = None
        self._state: QtestState | None = None
        self._irqs = operations.guest.machine.irqs
        if endpoint.server:
            self._listener = ByteListener(endpoint.path)
            loop.register(self._listener, self._accept)
        else:
            try:
                self._serve(ByteConnection.connect(endpoint.path, "qtest"))
            except PeerLost as error:
                why = f"Failed to connect to '{endpoint.path}': {error.doing.rpartition(': ')[2]}"
                raise ConfigError(f'{why}\nFailed to initialize device for qtest: "unix:{endpoint.path}"') from error
        self._irqs.listeners.append(self._irq)

    def _accept(self) -> None:
        """One client at a time: whoever comes next waits until this one has gone."""
        assert self._listener is not None, "it has called"
        connection = self._listener.accept("qtest")
        if connection is not None:
            self._loop.unregister(self._listener)
            self._serve(connection)

    def _serve(self, connection: ByteConnection) -> None:
        self._state = QtestState(self._machine, log=self._log.line if self._log is not None else None)
        self._connection = connection
        self._loop.register(connection, self._readable)
        if self._log is not None:
            self._log.opened()

    def _readable(self) -> None:
        connection, state = self._connection, self._state
        assert connection is not None and state is not None, "registered while there is one"
        if self._operations.state is RunState.FINISH_MIGRATE:
            self._loop.unregister(connection)
            self._loop.call_later(LOOK_NS, lambda: self._look_again(connection))
            return
        try:
            data = connection.receive()
            if data is None:
                return
            answer = state.receive(data)
            if answer:
                connection.send(answer)
        except PeerLost:
            self._gone()
            return
        if self._log is not None:
            self._log.flush()

    def _look_again(self, connection: ByteConnection) -> None:
        """A machine that is about to leave does nothing; where it is then, its client is heard."""
        if connection is self._connection:
            self._loop.register(connection, self._readable)

    def _irq(self, number: int, level: bool) -> None:
        lines = self._operations.guest.board.IRQ_LINES
        if self._connection is None or self._state is None or (lines is not None and number >= lines):
            return
        data = self._state.irq(number, level)
        if data:
            try:
                self._connection.send(data)
            except PeerLost:
                self._loop.call_soon(self._gone)

    def _gone(self) -> None:
        if self._connection is None:
            return
        self._loop.unregister(self._connection)
        self._connection.close()
        self._connection = self._state = None
        if self._log is not None:
            self._log.closed()
        if self._listener is not None:
            self._loop.register(self._listener, self._accept)

    def close(self) -> None:
        """Harmless twice."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.unregister(listener)
            listener.close()
        self._gone()
        if self._irq in self._irqs.listeners:
            self._irqs.listeners.remove(self._irq)
        if self._log is not None:
            self._log.close()
            self._log = None
