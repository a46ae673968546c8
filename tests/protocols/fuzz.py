"""Seeded mutation of messages, for every socket of ours.

At least half of what :class:`Fuzzer` makes passes framing and schema: valid messages with wild values, which reach the
code behind the decoder. The rest is cut, flipped or random. The same seed gives the same bytes, so that a failure can
be repeated. Also here: hypothesis strategies made from the message schemas.

Used by the tests of the codecs, and against live processes.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as schema

from protocols.codec import Codec
from protocols.control import messages as control
from protocols.monitor.commands import COMMANDS
from protocols.notifier import messages as notifier
from protocols.port import device, files, messages
from protocols.vfio_user.messages import COMMANDS as VFIO_USER
from protocols.vfio_user.messages import Capabilities, DeviceFeature, Header, MigData, Payload, Role, Version

_EDGES = [(1 << bits) + step for bits in (12, 16, 31, 32, 63, 64) for step in (-4096, -1, 0)]
WILD = (0, 1, 2, 7, *(edge for edge in _EDGES if 0 <= edge < 1 << 64))
"""Integers that break arithmetic which was not thought through."""
_PATHS = ("/dev/vfio/vfio", "/dev/vfio/26", "/dev/vfio/4294967296", "../../etc/passwd")
WILD_TEXT = (*_PATHS, "a", "ram", "\0", "é" * 20, "x" * 200)


@dataclass(frozen=True)
class FuzzChannel:
    """Messages that a client may send on one socket; ``fds(message)`` is how many descriptors it should have."""

    codec: Codec[Any]
    fds: Any = None


CHANNELS: dict[str, FuzzChannel] = {
    "hostd.zmq": FuzzChannel(messages.REQUESTS),
    "hostd.zmq reply": FuzzChannel(messages.RESPONSES),
    "hostd.sock": FuzzChannel(files.REQUESTS, files.fd_count),
    "hostd.sock reply": FuzzChannel(files.RESPONSES, files.fd_count),
    "device": FuzzChannel(device.TO_DEVICE, device.fd_count),
    "device reply": FuzzChannel(device.TO_HOST, device.fd_count),
    "notifier.sock": FuzzChannel(notifier.TO_HUB, notifier.fd_count),
    "notifier.sock reply": FuzzChannel(notifier.FROM_HUB, notifier.fd_count),
    "notifier.zmq": FuzzChannel(notifier.ROUTER_TO_HUB),
    "notifier.zmq reply": FuzzChannel(notifier.ROUTER_FROM_HUB),
    "ctl": FuzzChannel(control.REQUESTS),
    "ctl reply": FuzzChannel(control.RESPONSES),
}


class Fuzzer:
    """Endless mutated messages from ``seed``."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, kind: schema.Type, depth: int = 0) -> Any:
        """A value that ``kind`` accepts, wild where it can be."""
        match kind:
            case schema.IntType():
                low = kind.ge if kind.ge is not None else 0
                high = kind.le if kind.le is not None else (1 << 64) - 1
                allowed = [number for number in (*WILD, low, high) if low <= number <= high]
                return self.random.choice([*allowed, self.random.randint(low, high)])
            case schema.FloatType():
                return self.random.choice([0.0, -1.5, 1e300])
            case schema.BoolType():
                return self.random.random() < 0.5
            case schema.StrType():
                return self.random.choice(WILD_TEXT)[: kind.max_length or 200].ljust(kind.min_length or 0, "x")
            case schema.BytesType():
                length = self.random.choice([0, 1, 8, 16, 24, 32, 40, self.random.randrange(300)])
                return self.random.randbytes(max(kind.min_length or 0, min(length, kind.max_length or length)))
            case schema.ListType():
                most = 1 if depth > 3 else 4
                count = max(kind.min_length or 0, self.random.randrange(most))
                return [self.value(kind.item_type, depth + 1) for _ in range(count)]
            case schema.DictType():
                return {self.value(kind.key_type): self.value(kind.value_type) for _ in range(self.random.randrange(3))}
            case schema.UnionType():
                return self.value(self.random.choice(kind.types), depth)
            case schema.StructType():
                return kind.cls(*(self.value(field.type, depth + 1) for field in kind.fields))
        raise AssertionError(f"no values for {kind}")

    def message(self, codec: Codec[Any]) -> Any:
        """A message of ``codec``'s schema with wild values."""
        return self.value(schema.type_info(codec.schema))

    def damage(self, data: bytes) -> bytes:
        """``data`` cut, grown, flipped, or something else altogether."""
        match self.random.randrange(5):
            case 0:
                return data[: self.random.randrange(len(data) + 1)]
            case 1:
                return data + self.random.randbytes(self.random.randrange(1, 20))
            case 2:
                return self.random.randbytes(self.random.randrange(1, 100))
            case 3:
                return b"\x91" * self.random.randrange(1, 5000)
        changed = bytearray(data)
        for _ in range(self.random.randrange(1, 4)):
            changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def stream(self, channel: str) -> Iterator[tuple[bytes, int]]:
        """(bytes, descriptors to send with them) for ever; two of three pass the decoder."""
        kind = CHANNELS[channel]
        while True:
            message = self.message(kind.codec)
            data = msgspec.msgpack.encode(message)
            fds = kind.fds(message) if kind.fds else 0
            if self.random.random() < 2 / 3:
                yield data, fds
            else:
                yield self.damage(data), self.random.choice([fds, fds, 0, 1, 3])

    def payload(self, kind: type[Payload]) -> bytes:
        """The bytes of a vfio-user payload with wild values and a tail that fits its ``count``, if it has one."""
        if kind is Version:
            return Version(0, self.random.randrange(3), Capabilities(max_msg_fds=16)).pack()
        values = [self._code(code) for code in kind.FORMAT.format.lstrip("=") if code in "HIQ"]
        names = kind.__struct_fields__
        tail = b""
        if kind.TAIL:
            tail = self.random.randbytes(self.random.choice([0, 1, 4, 8, 64]))
            length = "size" if kind is MigData else "count"
            if length in names and self.random.random() < 0.8:
                values[names.index(length)] = len(tail) or self.random.choice([1, 4, 8])
            if kind is DeviceFeature and self.random.random() < 0.8:
                values[names.index("flags")] = self.random.randrange(11) | self.random.randrange(8) << 16
        return kind.FORMAT.pack(*values) + tail

    def _code(self, code: str) -> int:
        bits = {"H": 16, "I": 32, "Q": 64}[code]
        return self.random.choice([*[number for number in WILD if number < 1 << bits], self.random.getrandbits(bits)])

    def vfio_user(self, sender: Role = Role.CLIENT) -> Iterator[tuple[bytes, int]]:
        """(frame, descriptors) of vfio-user for ever; the first is a good VERSION when a client sends."""
        commands = [(number, spec) for number, spec in VFIO_USER.items() if spec.sender is sender]
        if sender is Role.CLIENT:
            body = Version(0, 0, Capabilities(max_msg_fds=16)).pack()
            yield Header(0, 1, 16 + len(body), 0, 0).pack() + body, 0
        while True:
            number, spec = self.random.choice(commands)
            body = self.payload(spec.request)
            fds = self.random.randrange(min(spec.fds, 4) + 1)
            frame = (
                Header(self.random.getrandbits(16), number, 16 + len(body), self.random.choice([0, 0, 0x10]), 0).pack()
                + body
            )
            if self.random.random() < 2 / 3:
                yield frame, fds
            else:
                yield self._broken_frame(frame), self.random.choice([fds, 0, 2])

    def qmp(self) -> Iterator[bytes]:
        """What a monitor's client may send, for ever: commands of the table with wild arguments, and broken ones."""
        while True:
            name = self.random.choice([*COMMANDS, "nope"])
            members = COMMANDS[name].members if name in COMMANDS else ()
            arguments = {member.name: self._json(2) for member in members if self.random.random() < 0.8}
            if self.random.random() < 0.5:
                arguments |= {member.name: "a" for member in members if member.type == "string"}
            if self.random.random() < 0.2:
                arguments[self.random.choice(WILD_TEXT)] = self._json(1)
            command: dict[str, object] = {"execute": name, "arguments": arguments}
            if self.random.random() < 0.5:
                command["id"] = self._json(3)
            data = json.dumps(command).encode()
            yield data if self.random.random() < 2 / 3 else self.damage(data)

    def _json(self, depth: int) -> object:
        kind = self.random.randrange(7 if depth else 5)
        if kind == 5:
            return [self._json(depth - 1) for _ in range(self.random.randrange(3))]
        if kind == 6:
            return {self.random.choice(WILD_TEXT): self._json(depth - 1) for _ in range(self.random.randrange(3))}
        return self.random.choice([None, True, -1.5, self.random.choice(WILD), self.random.choice(WILD_TEXT)])

    def _broken_frame(self, frame: bytes) -> bytes:
        """A frame whose size field is still true in most cases, so that the stream goes on."""
        changed = bytearray(self.damage(frame).ljust(16, b"\0"))
        if self.random.random() < 0.8:
            struct.pack_into("=I", changed, 4, len(changed))
        return bytes(changed)


def _strategy(kind: schema.Type) -> st.SearchStrategy[Any]:
    match kind:
        case schema.IntType():
            return st.integers(kind.ge if kind.ge is not None else 0, kind.le if kind.le is not None else (1 << 64) - 1)
        case schema.FloatType():
            return st.floats(allow_nan=False)
        case schema.BoolType():
            return st.booleans()
        case schema.StrType():
            return st.text(
                st.characters(codec="utf-8"), min_size=kind.min_length or 0, max_size=min(kind.max_length or 20, 20)
            )
        case schema.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=min(kind.max_length or 40, 40))
        case schema.ListType():
            least = kind.min_length or 0
            return st.lists(_strategy(kind.item_type), min_size=least, max_size=max(least, 3))
        case schema.DictType():
            return st.dictionaries(_strategy(kind.key_type), _strategy(kind.value_type), max_size=2)
        case schema.UnionType():
            return st.one_of([_strategy(each) for each in kind.types])
        case schema.StructType():
            return st.builds(kind.cls, *(_strategy(field.type) for field in kind.fields))
    raise AssertionError(f"no strategy for {kind}")


def strategy_for(message_schema: Any) -> st.SearchStrategy[Any]:
    """Valid messages of a codec's schema."""
    return _strategy(schema.type_info(message_schema))
