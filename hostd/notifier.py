"""``hostd notifier``: the hub of invalidations as a process of its own.

What it decides is in :mod:`protocols.notifier.hub`, its sockets are in :mod:`protocols.transport.notifier`, which a
guest machine uses directly when the hub runs inline; here is the process around them.
"""

from __future__ import annotations

from collections.abc import Callable

from hostd.control import ControlServer
from hostd.daemon import DaemonContext
from protocols.transport.notifier import NotifierServer


def serve_notifier(context: DaemonContext) -> Callable[[], None]:
    """Open the notifier's sockets; returns what closes them."""
    server = NotifierServer(context.loop, context.directory, context.lock)
    control = ControlServer(context.loop, context.directory, "notifier", context.lock, lambda: status(server), None)

    def close() -> None:
        control.close()
        server.close()

    return close


def status(server: NotifierServer) -> dict[str, object]:
    """What a person wants to know about the hub."""
    return server.hub.status()
