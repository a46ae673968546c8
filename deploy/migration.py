"""A ``migrate`` step: the guest moves to a guestd that is started for it, with devices of its own, and the other ends.

Of every assigned device the host has two, in groups of their own; a guest has the one or the other of each. The new
guestd, and the servers of its remote devices, bear their numbers in their roles: ``guestd-2``, ``card-2``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from deploy import assemble
from deploy.launcher import Launcher
from deploy.link import CommandFailed, Link
from deploy.scenario import Scenario
from deploy.scenario_steps import Migrate
from protocols.control import messages as control
from vfio_model.errors import DeadlineExceeded

_LOOK_SECONDS: Final = 0.02
_END_SECONDS: Final = 10.0
_OVER: Final = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Moved:
    """How it ended. ``link``: the control connection to where the guest is now, when it has moved."""

    text: str
    link: Link | None = None


class Mover:
    """Where the guest of ``scenario`` is. ``on_wait`` is called now and then, and may raise."""

    def __init__(self, scenario: Scenario, launcher: Launcher, on_wait: Callable[[], None]) -> None:
        self._scenario, self._launcher, self._on_wait = scenario, launcher, on_wait
        self._number, self._attempts = 1, 1
        self.copy = 0
        """Which of the host's devices it has."""

    def role(self, role: str) -> str:
        """What the process that is meant by ``role`` is called at present."""
        numbered = assemble.numbered(role, self._number)
        return numbered if numbered in self._launcher.daemons else role

    def link(self, role: str) -> Link:
        """A control connection of its own to what ``role`` means at present."""
        directory = self._launcher.directory
        moved = role == "guestd" and self._number > 1
        return Link(directory / self.role(role) if moved else directory, role)

    def move(self, wanted: Migrate, source: Link) -> Moved:
        """Try to move the guest that ``source`` leads to."""
        self._attempts += 1
        number, copy = self._attempts, 1 - self.copy
        directory = self._launcher.directory
        specs = assemble.destination(self._scenario, directory, number, copy)
        self._launcher.start(specs)
        roles = [spec.role for spec in specs]
        for role in roles:
            self._launcher.daemons[role].expected_end = True
        info = self._migrated(wanted, source, f"unix:{directory / assemble.stream(number)}")
        if info["status"] != "completed":
            self._end(roles)
            return Moved(f"the migration has ended as {info['status']}: {info.get('error-desc', '')}")
        left = [self.role(role) for role in ("guestd", *assemble.remote_ids(self._scenario))]
        self._number, self.copy = number, copy
        for role in roles:
            self._launcher.daemons[role].expected_end = False
        self._end(left)
        ram = msgspec.convert(info["ram"], dict[str, float])
        text = f"moved to guestd-{number}: {int(ram['transferred']) >> 10} KiB, stood still for {info['downtime']} ms"
        return Moved(text, Link(directory / f"guestd-{number}", "guestd", watch=self._on_wait))

    def _migrated(self, wanted: Migrate, source: Link, uri: str) -> dict[str, object]:
        deadline = time.monotonic() + wanted.seconds
        try:
            _ask(source, "migrate", {"uri": uri})
        except CommandFailed as error:
            return {"status": "failed", "error-desc": error.reason}
        while (info := _ask(source, "query-migrate", {}))["status"] not in _OVER:
            if time.monotonic() > deadline:
                _ask(source, "migrate_cancel", {})
                raise DeadlineExceeded("guestd", "migrate", wanted.seconds)
            self._on_wait()
            time.sleep(_LOOK_SECONDS)
        return info

    def _end(self, roles: list[str]) -> None:
        for role in roles:
            self._launcher.end_one(role, _END_SECONDS)


def _ask(link: Link, name: str, arguments: dict[str, object]) -> dict[str, object]:
    """:raise CommandFailed: it cannot be done."""
    return link.document(control.Qmp(name, msgspec.json.encode(arguments)))
