"""The fuzzer keeps its promise: at least half passes the schema, everything is repeatable, nothing breaks a decoder."""

from __future__ import annotations

from itertools import islice

import pytest

from protocols.vfio_user.messages import HEADER_SIZE, Capabilities, Role
from protocols.vfio_user.state import CommandReceived, VfioUserState
from tests.protocols.fuzz import CHANNELS, Fuzzer
from vfio_model.errors import RemoteProtocolError


@pytest.mark.parametrize("channel", CHANNELS)
def test_at_least_half_passes_the_schema(channel: str) -> None:
    passed = 0
    for data, _ in islice(Fuzzer(1).stream(channel), 300):
        try:
            CHANNELS[channel].codec.decode(data)
        except RemoteProtocolError:
            continue
        passed += 1
    assert passed >= 150


def test_a_seed_gives_the_same_bytes_again() -> None:
    assert list(islice(Fuzzer(7).stream("ctl"), 50)) == list(islice(Fuzzer(7).stream("ctl"), 50))


@pytest.mark.parametrize("seed", range(8))
def test_vfio_user_frames_bring_events_or_remote_protocol_errors(seed: int) -> None:
    passed = total = 0
    state = VfioUserState(Role.SERVER, Capabilities(max_msg_fds=16))
    for frame, fds in islice(Fuzzer(seed).vfio_user(), 400):
        total += 1
        if len(frame) < HEADER_SIZE:
            continue
        try:
            event = state.receive(frame[:HEADER_SIZE], frame[HEADER_SIZE:], list(range(100, 100 + fds)))
        except RemoteProtocolError:
            continue
        passed += 1
        assert isinstance(event, CommandReceived)
        if event.command == 1:
            state.accept(event)
        elif not event.no_reply:
            state.reply_error(event, 5)
    assert passed >= total // 2
