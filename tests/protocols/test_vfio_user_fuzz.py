"""The targets of `make fuzz`, by hypothesis: bytes of any kind, and frames that are nearly right, from both sides."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.transport.loop import DEADLINE_SCALE_VARIABLE
from protocols.vfio_user.messages import COMMANDS, Role
from tests.fuzz.targets import TARGETS
from tests.protocols.fuzz import Fuzzer


@st.composite
def nearly_right(draw: st.DrawFn, side: Role) -> bytes:
    """Bytes of a target: frames of commands and replies that ``side`` may send, now and then cut or damaged."""
    fuzzer = Fuzzer(draw(st.integers(0, 1 << 32)))
    data = bytes((draw(st.integers(0, 255)),))
    for _ in range(draw(st.integers(0, 12))):
        number, spec = draw(st.sampled_from(sorted(COMMANDS.items())))
        is_reply = spec.sender is not side
        body = fuzzer.payload(spec.reply if is_reply else spec.request)
        if draw(st.integers(0, 4)) == 0:
            body = fuzzer.damage(body) if body else b"?"
        body = body[:2047]
        flags = int(is_reply) | draw(st.sampled_from([0, 0, 0, 0x10, 0x20, 0x80, 0x81]))
        wire_number = number if number < 32 else 0x80 | number & 3
        data += struct.pack("=BBHB", wire_number, flags, len(body), draw(st.integers(0, 3))) + body
    return data


@pytest.mark.parametrize("target", ["codec", "server", "client"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=400))
def test_any_bytes(target: str, data: bytes) -> None:
    TARGETS[target](data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(nearly_right(Role.CLIENT))
def test_a_server_bears_what_clients_say(data: bytes) -> None:
    TARGETS["server"](data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(nearly_right(Role.SERVER))
def test_a_client_bears_what_servers_say(data: bytes) -> None:
    TARGETS["client"](data)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(nearly_right(Role.CLIENT))
def test_a_device_serves_the_next_client_whatever_one_said(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEADLINE_SCALE_VARIABLE, "0.001")
        TARGETS["device"](data)
