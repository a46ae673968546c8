"""Fuzz in the other direction: a remote device that says anything to its guest is not plugged, or lost; that is all."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import msgspec
import pytest

from deploy.link import CommandFailed
from protocols.control import messages as control
from protocols.transport.unix import StreamConnection, close_fds
from protocols.transport.unix_listener import StreamListener
from protocols.vfio_user.messages import HEADER_SIZE, Capabilities, Extensions, Role
from protocols.vfio_user.state import CommandReceived, VfioUserState
from tests.processes.disturbance import told
from tests.processes.rig import Live
from tests.processes.senders import wait_readable
from tests.processes.traffic import Traffic
from tests.protocols.fuzz import Fuzzer
from vfio_model.errors import PeerLost, RemoteProtocolError

pytestmark = pytest.mark.machine

SEED = 20260711
CLIENTS = 40
FRAMES = 30
"""The most that one connection sees."""


class BadDevice(threading.Thread):
    """Serves :data:`CLIENTS` clients: a good handshake, then fuzz as a device may send it, then EOF."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__(name="bad device", daemon=True)
        self._listener = StreamListener(path)
        self._fuzzer = Fuzzer(seed)
        self.sent = self.passed = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Every client, one after the other."""
        try:
            for _ in range(CLIENTS):
                wait_readable(self._listener)
                stream = self._listener.accept("guestd")
                assert stream is not None
                try:
                    self._serve(stream)
                except PeerLost:
                    pass  # it had enough
                finally:
                    stream.close()
        except Exception as error:  # noqa: BLE001  (told to the test's own thread)
            self.error = error
        finally:
            self._listener.close()

    def _serve(self, stream: StreamConnection) -> None:
        capabilities = Capabilities(max_msg_fds=16, extensions=Extensions(ats=True, clock=True, notifier=True))
        server, judge = VfioUserState(Role.SERVER, capabilities), VfioUserState(Role.CLIENT, capabilities)
        while (frame := stream.receive()) is None:
            wait_readable(stream)
        hello = server.receive(frame.header, frame.body, frame.fds)
        assert isinstance(hello, CommandReceived)
        reply = server.accept(hello)
        judge.version()
        judge.receive(reply[:HEADER_SIZE], reply[HEADER_SIZE:], [])
        stream.send(reply)
        for data, _ in islice(self._fuzzer.vfio_user(Role.SERVER), FRAMES):
            self.sent += 1
            stream.send(data)
            if not self._passes(judge, data):
                return
            self.passed += 1
            while (answer := stream.receive()) is not None:
                close_fds(answer.fds)

    @staticmethod
    def _passes(judge: VfioUserState, data: bytes) -> bool:
        try:
            event = judge.receive(data[:HEADER_SIZE], data[HEADER_SIZE:], [])
        except RemoteProtocolError:
            return False
        if isinstance(event, CommandReceived) and not event.no_reply:
            judge.reply_error(event, 5)
        return True


def test_a_device_that_talks_nonsense_costs_only_itself() -> None:
    with Live(scale=1, caches=True) as live, told(SEED):
        census = live.census()
        path = live.directory / "bad.sock"
        device = BadDevice(path, SEED)
        device.start()
        traffic = Traffic(live, SEED, background=True)
        config = {"id": "bad", "addr": "05.0", "attach": "remote", "socket": str(path)}
        for _ in range(CLIENTS):
            with pytest.raises(CommandFailed, match=r"device bad: .*bad"):
                live.link("guestd").ask(control.DeviceAdd(msgspec.json.encode(config)))
            traffic.run(3)
        device.join()
        if device.error is not None:
            raise device.error
        assert 2 * device.passed >= device.sent, f"{device.passed} of {device.sent} frames got through"
        traffic.progress()
        traffic.finish()
        live.settles(census)
