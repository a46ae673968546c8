"""A machine that comes: it listens, reads, loads, and runs when the source says so.

Until then nobody may look at it as a guest: its RAM is a mixture. After any error it is of no more use, and the process
ends, unless whoever asked for the migration wants to look at what is left (``exit-on-error`` off).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from guestd.migration_state import FAILED, GO, LOADED, MAX_ANSWER, Progress, Settings, Status, incoming, run_state
from guestd.operations import Operations, RunState
from protocols.transport.unix import ByteConnection
from protocols.transport.uri import Listener
from vfio_model.errors import PeerLost, VfioModelError, VMStateError
from vfio_model.machine.migration import MachineLoader
from vfio_model.trace import Trace

GO_SECONDS: Final = 30.0
"""How long the source may take to say that it has let go."""
_READS: Final = 16
"""Pieces that are read in one turn."""


class Incoming:
    """Listens, by ``listen()``, from the start on.

    :raise ConfigError: when one cannot listen there. :raise VMStateError: a device cannot be migrated to.
    """

    def __init__(
        self,
        operations: Operations,
        settings: Settings,
        trace: Trace,
        listen: Callable[[], Listener],
        *,
        exit_on_error: bool = True,
    ) -> None:
        self._operations, self._guest, self._loop = operations, operations.guest, operations.loop
        self._trace, self._exit_on_error = trace, exit_on_error
        self.progress = Progress(operations, settings)
        self.error: Exception | None = None
        incoming(self._guest)
        self._listener = listen()
        self._loop.register(self._listener, self._accept)
        self._connection: ByteConnection | None = None
        self._loader: MachineLoader | None = None
        self._stood = False
        self._after = b""
        """What came behind the stream."""
        self.progress.to(Status.SETUP)

    def _accept(self) -> None:
        connection = self._listener.accept("the source")
        if connection is None:
            return
        self._stop_listening()
        self._connection = connection
        try:
            self._guest.memory.discard()
            extra = [run_state(self._was), *incoming(self._guest)]
            self._loader = MachineLoader(self._guest.machine, extra=extra)
        except (VfioModelError, OSError) as error:
            self._fail(error)
            return
        self.progress.to(Status.ACTIVE)
        self._loop.register(connection, self._readable)

    def _readable(self) -> None:
        connection = self._connection
        assert connection is not None, "registered with it"
        try:
            for _ in range(_READS):
                data = None if connection.closed else connection.receive()
                if data is None:
                    return
                self._take(data)
        except PeerLost:
            self._fail(VMStateError("the source has ended the stream"))
        except (VfioModelError, OSError) as error:
            self._fail(error)

    def _was(self, state: str) -> None:
        """The machine stood where it comes from: so it will here."""
        self._stood = state != RunState.RUNNING

    def _take(self, data: bytes) -> None:
        loader = self._loader
        assert loader is not None, "made at the connection"
        if loader.complete:
            self._after += data
            if not GO.startswith(self._after):
                raise VMStateError(f"{len(self._after)} bytes behind the end")
            if self._after == GO:
                self._run()
            return
        loader.feed(data)
        if loader.complete:
            self._load(loader)

    def _load(self, loader: MachineLoader) -> None:
        self._guest.states.hold()
        loader.load()
        self._trace("migration_loaded", windows=len(self._guest.board.windows()))
        assert self._connection is not None, "the stream came over it"
        self._connection.send(LOADED)
        self._loop.call_later(int(GO_SECONDS * 1e9), self._late)

    def _late(self) -> None:
        if self.progress.under_way:
            self._fail(VMStateError("the source does not say whether it has let go"))

    def _run(self) -> None:
        operations = self._operations
        self._close()
        self.progress.to(Status.COMPLETED)
        operations.state = RunState.PAUSED
        if operations.autostart and not self._stood:
            operations.cont()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._trace("migration_failed", reason=str(error))
        if self._connection is not None and not self._connection.closed:
            reason = str(error).replace("\n", " ").encode(errors="replace")
            try:
                self._connection.send((FAILED + reason)[: MAX_ANSWER - 1] + b"\n")
            except PeerLost:
                self._trace("migration_source_gone")
        self._close()
        self.progress.to(Status.FAILED)
        if self._exit_on_error:
            self._operations.fatal = VMStateError(f"load of migration failed: {error}")
            self._loop.call_soon(self._loop.stop)

    def _stop_listening(self) -> None:
        self._loop.unregister(self._listener)
        self._listener.close()

    def _close(self) -> None:
        if self._connection is not None and not self._connection.closed:
            self._loop.unregister(self._connection)
            self._connection.close()

    def close(self) -> None:
        """Stop listening, close the stream. Harmless twice."""
        self._stop_listening()
        self._close()

    def info(self) -> dict[str, object]:
        """``MigrationInfo``."""
        found: dict[str, object] = {"status": str(self.progress.status)}
        if self.error is not None:
            found["error-desc"] = str(self.error)
        return found
