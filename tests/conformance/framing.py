"""A device behind vfio-user framing, as guestd connects to it."""

from __future__ import annotations

import socket

from guestd.remote import VfioUserDevice, capabilities
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.unix import StreamConnection
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.vfio_user.messages import Role


def client_of(stream: int, loop: Loop, name: str, process: Pidfd, *, lives_for_us: bool = False) -> VfioUserDevice:
    """The user of the device at the other end of ``stream``, which is taken over with ``process``."""
    connection = StreamConnection(socket.socket(fileno=stream), name)
    endpoint = VfioUserEndpoint(connection, Role.CLIENT, capabilities(ats=False))
    return VfioUserDevice(name, endpoint, loop, process=process, lives_for_us=lives_for_us)
