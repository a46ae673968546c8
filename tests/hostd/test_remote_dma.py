"""DMA of a remote device by message."""

from __future__ import annotations

from hostd.remote_dma import MessageDma
from protocols.vfio_user.messages import Command, DmaAccess, Payload
from vfio_model.memory.types import MemTxResult

TAKES = 4096


def test_no_message_is_longer_than_the_client_takes() -> None:
    memory = bytearray(3 * TAKES)

    def call(command: Command, payload: Payload) -> Payload | None:
        assert isinstance(payload, DmaAccess) and payload.count <= TAKES
        end = payload.address + payload.count
        if command is Command.DMA_READ:
            return DmaAccess(payload.address, payload.count, bytes(memory[payload.address : end]))
        memory[payload.address : end] = payload.data
        return DmaAccess(payload.address, payload.count)

    dma = MessageDma(call)
    dma.limit = TAKES
    data = bytes(range(256)) * 40
    assert dma.write(1, data) is MemTxResult.OK
    out = bytearray(len(data))
    assert dma.read(1, out) is MemTxResult.OK
    assert out == data
