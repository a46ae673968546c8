"""Codecs: what is sent arrives, and no bytes whatever bring anything but RemoteProtocolError."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.codec import Codec
from protocols.control import messages as control
from protocols.notifier import messages as notifier
from protocols.port import device, files, messages
from tests.protocols.fuzz import CHANNELS, strategy_for
from vfio_model.errors import LocalProtocolError, RemoteProtocolError

EVERY_CODEC: list[Codec[Any]] = [channel.codec for channel in CHANNELS.values()]


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=lambda codec: codec.what)
@given(data=st.data())
def test_a_message_within_its_bounds_comes_back_as_it_was(codec: Codec[Any], data: st.DataObject) -> None:
    message = data.draw(strategy_for(codec.schema))
    assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=lambda codec: codec.what)
@given(junk=st.binary(max_size=200))
def test_junk_is_a_remote_protocol_error(codec: Codec[Any], junk: bytes) -> None:
    try:
        codec.decode(junk)
    except RemoteProtocolError as error:
        assert codec.what in str(error)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        msgspec.msgpack.encode(["ioctl", 1, 2, 3]),
        msgspec.msgpack.encode(["ioctl", -1, 0, 0, 0, 0, 1, b""]),
        msgspec.msgpack.encode(["ioctl", 1, 0, 0, 0, 1 << 32, 1, b""]),
        msgspec.msgpack.encode(["ioctl", 1, 0, 0, 0, 0, 0, b""]),
        msgspec.msgpack.encode(["ioctl", 1, 0, 0, 0, 0, 1, "text"]),
        msgspec.msgpack.encode(["ioctl", 1, 0, 0, 0, 0, 1, b"", 9]),
        msgspec.msgpack.encode(["unknown", 1]),
        msgspec.msgpack.encode({"seq": 1}),
        msgspec.msgpack.encode(["ping", 1]) + b"x",
        b"\x92\xa4\xff\xff\xff\xff\x01",
    ],
)
def test_what_is_not_quite_a_message_is_refused(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="port request"):
        messages.REQUESTS.decode(raw)


def test_a_message_above_the_limit_is_refused_on_both_sides() -> None:
    long = messages.Ioctl(1, 0, 0, 0, 0, 1, bytes(messages.MAX_ARG + 4096))
    with pytest.raises(LocalProtocolError, match="the limit is"):
        messages.REQUESTS.encode(long)
    with pytest.raises(RemoteProtocolError, match="the limit is"):
        messages.REQUESTS.decode(msgspec.msgpack.encode(long))


def test_an_integer_above_64_bits_is_our_own_bug() -> None:
    with pytest.raises(LocalProtocolError):
        messages.REQUESTS.encode(messages.Ping(1 << 64))


def test_the_largest_64_bit_numbers_pass() -> None:
    most = (1 << 64) - 1
    publish = notifier.Publish(0, [notifier.Record(most, most, most, (1 << 32) - 1)])
    assert notifier.TO_HUB.decode(notifier.TO_HUB.encode(publish)) == publish
    response = control.Response(1, control.HcallDone(-4, [most]))
    assert control.RESPONSES.decode(control.RESPONSES.encode(response)) == response


def test_descriptor_counts_are_part_of_the_protocol() -> None:
    assert files.fd_count(files.DeclareMemory(0, 4096, "ram", 0, 4096)) == 1
    assert files.fd_count(files.DeviceFd(1, 2, "edu", 3)) == 2
    assert files.fd_count(files.Done()) == 0
    segment = device.SegmentMap("ram", 4096, 4096, 0, 12, 1, 0, 1, 0)
    assert device.fd_count(device.Setup("edu0", "edu", 8, {}, [segment] * 3)) == device.SETUP_FDS + 3
