"""Messages to bytes and back: msgpack by msgspec, with the size limit of the channel.

A codec stands for one direction of one channel: a union of tagged messages. Decoding never lets anything but
:class:`RemoteProtocolError` out, whatever the bytes are; encoding refuses what the peer would refuse, as
:class:`LocalProtocolError`. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from vfio_model.errors import LocalProtocolError, RemoteProtocolError

M = TypeVar("M")

DEFAULT_MAX_BYTES = 1 << 20


class Codec(Generic[M]):
    """Encoder and decoder of the messages of ``schema`` (a Struct, or a union of tagged ones).

    ``what`` names the channel and direction in errors; ``max_bytes`` bounds one encoded message.
    """

    __slots__ = ("_decoder", "_encoder", "max_bytes", "schema", "what")

    def __init__(self, schema: Any, what: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.schema, self.what, self.max_bytes = schema, what, max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(schema)

    def encode(self, message: M) -> bytes:
        """The bytes of ``message``.

        :raise LocalProtocolError: when a value cannot be written (an integer above 64 bits) or the result is too long.
        """
        try:
            data = self._encoder.encode(message)
        except (OverflowError, TypeError, ValueError, msgspec.MsgspecError) as error:
            raise LocalProtocolError(f"{self.what}: cannot encode {type(message).__name__}: {error}") from error
        if len(data) > self.max_bytes:
            raise LocalProtocolError(
                f"{self.what}: {type(message).__name__} takes {len(data)} bytes, the limit is {self.max_bytes}"
            )
        return data

    def decode(self, data: bytes | bytearray | memoryview) -> M:
        """The message in ``data``, every bound of its schema checked.

        :raise RemoteProtocolError: for anything else; the text says what is wrong and where.
        """
        if len(data) > self.max_bytes:
            raise RemoteProtocolError(f"{self.what}: {len(data)} bytes, the limit is {self.max_bytes}")
        try:
            message: M = self._decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise RemoteProtocolError(f"{self.what}: {error}") from error
        return message
