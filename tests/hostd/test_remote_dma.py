"""DMA of a remote device by message."""

from __future__ import annotations

import errno

from hostd.remote_dma import MessageDma
from protocols.vfio_user.messages import Command, DmaAccess, Payload
from vfio_model.memory.types import MemTxResult

TAKES = 4096


def test_no_message_is_longer_than_the_client_takes() -> None:
    memory = bytearray(3 * TAKES)

    def call(command: Command, payload: Payload) -> Payload:
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


def asked(hole: int, number: int) -> tuple[MessageDma, list[tuple[int, int]]]:
    """Of a client that refuses with errno ``number`` what touches the page at ``hole``; which (address, bytes) it was
    asked to read.
    """
    reads: list[tuple[int, int]] = []

    def ask(command: Command, payload: Payload) -> Payload:
        assert isinstance(payload, DmaAccess) and command is Command.DMA_READ
        reads.append((payload.address, payload.count))
        if payload.address < hole + 4096 and hole < payload.address + payload.count:
            raise OSError(number, "refused")
        return DmaAccess(payload.address, payload.count, b"m" * payload.count)

    return MessageDma(ask), reads


def test_a_read_that_is_refused_delivers_what_lies_before() -> None:
    dma, reads = asked(0x5000, errno.EFAULT)
    out = bytearray(b"?" * 0x6000)
    assert dma.read(0x1800, out) is MemTxResult.DECODE_ERROR
    assert out == b"m" * 0x3800 + bytes(0x2800)
    assert reads == [
        (0x1800, 0x6000), (0x1800, 0x800), (0x2000, 0x1000), (0x3000, 0x1000), (0x4000, 0x1000), (0x5000, 0x1000),
    ]  # fmt: skip


def test_a_client_that_does_not_answer_is_not_asked_again() -> None:
    dma, reads = asked(0x3000, errno.ENODEV)
    out = bytearray(b"?" * 0x4000)
    assert dma.read(0, out) is MemTxResult.DECODE_ERROR
    assert out == bytes(0x4000) and len(reads) == 1


def test_a_read_within_a_page_is_refused_once() -> None:
    dma, reads = asked(0x3000, errno.EFAULT)
    assert dma.read(0x3100, bytearray(0xF00)) is MemTxResult.DECODE_ERROR
    assert len(reads) == 1
