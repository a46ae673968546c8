"""guestd's vfio-user client in this process, for whoever measures what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from guestd.remote import VfioUserDevice, capabilities
from protocols.transport.loop import Loop
from protocols.transport.vfio_user import connect

Client = VfioUserDevice


@contextmanager
def attached(path: str, name: str) -> Iterator[Client]:
    """The device that is served at ``path``, as a guest's that maps its memory for it.

    :raise PeerLost: nobody serves there, or does not negotiate.
    """
    with (
        closing(Loop()) as loop,
        closing(VfioUserDevice(name, connect(path, name, capabilities(ats=False)), loop)) as device,
    ):
        yield device
