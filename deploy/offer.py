"""Offers a device server of one's own to the hostd of a run: a device class from a test or a notebook is then what
the guest opens in place of the topology's model. See ``docs/devices.md``.
"""

from __future__ import annotations

import select
import socket
from pathlib import Path

from protocols.port import files
from protocols.transport.channel import FdChannel
from protocols.transport.unix import SeqpacketConnection
from vfio_model.errors import DeadlineExceeded, RemoteProtocolError

ANSWER_SECONDS = 5.0

Offered = FdChannel[files.Response, files.Request]
"""The offer stands while this is open."""


def offer(directory: Path, name: str, control: socket.socket, pidfd: int) -> Offered:
    """Offer the server at the other end of ``control`` as host device ``name``. ``control`` is closed: it is hostd's.

    :raise OSError: as hostd refuses it: ENODEV, its topology has no such device; EBUSY, somebody was before us.
    :raise PeerLost: when no hostd runs in ``directory``.
    """
    connection = SeqpacketConnection.connect(directory / "hostd.sock", "hostd")
    channel: Offered = FdChannel(connection, files.RESPONSES, files.REQUESTS, files.fd_count)
    try:
        channel.send(files.AttachDevice(name), (control.fileno(), pidfd))
        answer = _answer(channel)
        if isinstance(answer, files.OpenError):
            raise OSError(answer.errno, answer.reason)
        if not isinstance(answer, files.Done):
            raise RemoteProtocolError(f"hostd: {type(answer).__name__} in answer to AttachDevice")
    except BaseException:
        channel.close()
        raise
    control.close()
    return channel


def _answer(channel: Offered) -> files.Response:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while (received := channel.receive()) is None:
        if not poll.poll(ANSWER_SECONDS * 1000):
            raise DeadlineExceeded("hostd", "AttachDevice", ANSWER_SECONDS)
    return received[0]
