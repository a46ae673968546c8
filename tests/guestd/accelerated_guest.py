"""guestd as the run's ``--kvm`` wants it: in this process beside a host of its own, or as processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from guestd.guest import Guest
from tests.acceleration import host_of, kvm
from tests.processes.conftest import HostProcess


class HostedGuest(Guest):
    """A guest whose host, should it have in-kernel acceleration, is in this process and has no devices."""

    def _accelerate(self) -> None:
        self.host.accelerate(self.machine, host_of([self.ram]))


@contextlib.contextmanager
def host_options(directory: Path) -> Iterator[tuple[str, ...]]:
    """Options for ``guestd-system-ppc64``: with ``--kvm`` a host process, started in ``directory``, has its tables."""
    if not kvm():
        yield ()
        return
    path = directory / "topology.json"
    path.write_text(json.dumps({"groups": []}))
    host = HostProcess(directory, "--topology", str(path))
    try:
        host.ready()
        yield ("-machine", "kvm-tce=on", "-runtime-dir", str(directory))
    finally:
        host.close()
