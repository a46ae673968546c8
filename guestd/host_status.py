"""What hostd says of this guest as its client: asked at hostd's control socket, served while waiting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec

from protocols.control import messages as control
from protocols.transport.loop import Loop
from protocols.transport.zmq import DealerClient
from vfio_model.errors import DeadlineExceeded, RemoteProtocolError

SECONDS: Final = 1.0


class Mm(msgspec.Struct):
    """A client of hostd. ``locked_vm`` in pages of the host, ``memlock`` in bytes; None without limit."""

    pid: int
    locked_vm: int
    memlock: int | None = None


class _Status(msgspec.Struct):
    mms: list[Mm] = []


def own_mm(directory: Path, loop: Loop, *, seconds: float = SECONDS) -> Mm | str:
    """This process as hostd in ``directory`` accounts for it, or why that cannot be said."""
    client = DealerClient(directory / "hostd.ctl", hwm=4)
    answers: list[bytes] = []

    def readable() -> None:
        while (data := client.receive()) is not None:
            answers.append(data)

    loop.register(client, readable, served=True)
    try:
        client.send(control.REQUESTS.encode(control.Request(1, 0, control.Status())))
        loop.serve_until(lambda: bool(answers), seconds, "hostd", "its status")
        status = _decode(answers[0])
    except (DeadlineExceeded, RemoteProtocolError, msgspec.MsgspecError) as error:
        return str(error)
    finally:
        loop.unregister(client)
        client.close()
    return next((mm for mm in status.mms if mm.pid == os.getpid()), "hostd does not know this process")


def _decode(data: bytes) -> _Status:
    response: Any = control.RESPONSES.decode(data)
    document = getattr(getattr(response, "answer", None), "json", b"{}")
    return msgspec.json.decode(document, type=_Status)
