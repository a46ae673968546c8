"""What devices of other processes say of their states while the guest runs, among the passes over RAM.

A device that has PRE_COPY is asked at the end of each pass. The destination keeps what it said until it stands too:
nothing but RAM changes there before everything has come. A device that was reset, or rested, in between is not in
PRE_COPY any more; it says everything when it stands, as one that never was, and what it has said is forgotten.

Source: ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_STATE_PRE_COPY").
"""

from __future__ import annotations

from collections.abc import Iterator

from guestd.guest import Guest
from guestd.migration_state import functions
from vfio_model.errors import PeerLost
from vfio_model.trace import Trace
from vfio_model.uapi.migration import MigrationFlags
from vfio_model.vfio.migration import DEVICE_STATE, MigratingDevice, PreCopy, migrating, migration_flags
from vfio_model.vmstate.stream import FrameWriter, Section


class DevicePreCopy:
    """Of ``guest``; between :meth:`start` and :meth:`stand` or :meth:`abandon`."""

    def __init__(self, guest: Guest, writer: FrameWriter, trace: Trace) -> None:
        self._guest, self._writer, self._trace = guest, writer, trace
        self._saving: dict[int, PreCopy] = {}
        self.sent = 0
        """Bytes, of all devices."""

    def start(self) -> None:
        """Those that have PRE_COPY go there, unless they rest.

        :raise OSError: one refuses. :raise PeerLost: one is gone. :raise VMStateError: one cannot be migrated.
        """
        if self._guest.states.resting:
            return
        for instance, device in functions(self._guest):
            connection = migrating(device)
            if MigrationFlags.VFIO_MIGRATION_PRE_COPY in migration_flags(connection):
                self._saving[instance] = PreCopy(connection)
                self._trace("migration_precopy", name=connection.name)

    def frames(self) -> Iterator[bytes]:
        """A round of each. :raise PeerLost: one is gone."""
        for instance, saving in list(self._saving.items()):
            parts = saving.read()
            while (part := self._next(instance, parts)) is not None:
                self.sent += len(part)
                yield self._writer.early(Section(DEVICE_STATE.name, instance, DEVICE_STATE.version, part))

    def _next(self, instance: int, parts: Iterator[bytes]) -> bytes | None:
        try:
            return next(parts, None)
        except OSError as error:
            self._forget(instance, str(error))
            return None

    def _forget(self, instance: int, reason: str) -> None:
        saving = self._saving.pop(instance)
        self._trace("migration_precopy_broken", name=saving.device.name, reason=reason)

    def waiting(self) -> int:
        """Bytes that they could say, as far as they tell."""
        return sum(saving.waiting() for saving in self._saving.values())

    def check(self) -> list[MigratingDevice]:
        """Those that are in PRE_COPY still, and go on from there when they stand; the others are forgotten."""
        for instance, saving in list(self._saving.items()):
            if not saving.goes_on:
                self._forget(instance, "it left PRE_COPY")
        return [saving.device for saving in self._saving.values()]

    def stand(self) -> dict[int, int]:
        """They stand: how much was read of each, by instance."""
        found = {instance: saving.sent for instance, saving in self._saving.items()}
        self._saving.clear()
        return found

    def abandon(self) -> None:
        """They run as before. Harmless twice."""
        while self._saving:
            _, saving = self._saving.popitem()
            try:
                saving.leave()
            except (OSError, PeerLost) as error:
                self._trace("vfio_device_refused", name=saving.device.name, what="RUNNING", reason=str(error))
