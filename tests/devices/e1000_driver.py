"""A driver for the e1000, as a guest's kernel has one, on a bench with a cable that records or leads to a hub."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vfio_model.backends.block import BlockBackend
from vfio_model.backends.net import Hub, HubPort, NetBackend, OnFrame
from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.device import E1000Device
from vfio_model.devices.e1000.regs import Rctl, Tctl
from vfio_model.errors import ConfigError
from vfio_model.testing.bench import Bench, Host

TX_RING, RX_RING, TX_BUFFERS, RX_BUFFERS = 0x10000, 0x20000, 0x40000, 0x80000
BUFFER = 2048
EOP, IFCS, IC, TSE, RS, DEXT, VLE, IDE = 1, 2, 4, 4, 8, 0x20, 0x40, 0x80
DD = 1
MS = 1_000_000


class Wire:
    """A back end that keeps what is sent, and offers what a test gives it."""

    def __init__(self, on_frame: OnFrame) -> None:
        self.sent: list[bytes] = []
        self.waiting: list[bytes] = []
        self.closed = False
        self._on_frame = on_frame

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    def deliver(self, *frames: bytes) -> None:
        self.waiting += frames
        self.resume()

    def resume(self) -> None:
        while self.waiting and self._on_frame(self.waiting[0]):
            self.waiting.pop(0)

    def close(self) -> None:
        self.closed = True


class NetHost(Host):
    """Opens ``wire`` and ports of one hub for all."""

    hub = Hub()

    def __init__(self) -> None:
        super().__init__()
        self.wire: Wire | None = None
        self.port: HubPort | None = None

    def open_block(self, text: str) -> BlockBackend:
        raise ConfigError("a network card has no disk")

    def open_net(self, text: str, on_frame: OnFrame) -> NetBackend:
        if text == "hub":
            self.port = self.hub.join(on_frame)
            return self.port
        self.wire = Wire(on_frame)
        return self.wire


@dataclass
class Received:
    frame: bytes
    status: int
    errors: int
    checksum: int
    special: int


class Nic(Bench):
    """The device, its driver and its wire."""

    HOST = NetHost
    host: NetHost
    device: E1000Device

    def __init__(self, netdev: str = "wire", *, tx: int = 64, rx: int = 64, **props: object) -> None:
        super().__init__(E1000Device, netdev=netdev, **props)
        self.tx_count, self.rx_count = tx, rx
        self.tx_tail = self.tx_clean = self.rx_next = 0

    @property
    def wire(self) -> Wire:
        assert self.host.wire is not None
        return self.host.wire

    # -- setting up ----------------------------------------------------------------------------------------------

    def up(self, *, rctl: int = Rctl.EN | Rctl.BAM | Rctl.SECRC, tctl: int = Tctl.EN | Tctl.PSP) -> Nic:
        for base, length, head, tail, address, count in (
            (regs.TDBAL, regs.TDLEN, regs.TDH, regs.TDT, TX_RING, self.tx_count),
            (regs.RDBAL, regs.RDLEN, regs.RDH, regs.RDT, RX_RING, self.rx_count),
        ):
            self.write(base, address)
            self.write(base + 4, 0)
            self.write(length, count * 16)
            self.write(head, 0)
            self.write(tail, 0)
        for index in range(self.rx_count):
            self.put_rx(index, RX_BUFFERS + index * BUFFER)
        self.write(regs.TCTL, tctl)
        self.write(regs.RCTL, rctl)
        self.write(regs.RDT, self.rx_count - 1)
        return self

    def put_rx(self, index: int, address: int) -> None:
        at = RX_RING + index * 16
        self.ram[at : at + 16] = struct.pack("<QQ", address, 0)

    # -- sending -------------------------------------------------------------------------------------------------

    def post(self, *descriptors: bytes) -> list[int]:
        """Put descriptors into the ring, without telling the device; where they are."""
        places = []
        for raw in descriptors:
            at = TX_RING + self.tx_tail * 16
            self.ram[at : at + 16] = raw
            places.append(at)
            self.tx_tail = (self.tx_tail + 1) % self.tx_count
        return places

    def kick(self) -> None:
        self.write(regs.TDT, self.tx_tail)

    def transmit(self, *descriptors: bytes) -> list[int]:
        places = self.post(*descriptors)
        self.kick()
        return places

    def place(self, data: bytes, at: int = TX_BUFFERS) -> int:
        self.ram[at : at + len(data)] = data
        return at

    def send(self, frame: bytes, command: int = EOP | IFCS | RS) -> int:
        (where,) = self.transmit(legacy(self.place(frame), len(frame), command))
        return where

    def done(self, where: int) -> bool:
        return bool(self.ram[where + 12] & DD)

    # -- receiving -----------------------------------------------------------------------------------------------

    def poll(self, *, give_back: bool = True) -> list[Received]:
        """What has come; its buffers go back."""
        found: list[Received] = []
        parts = b""
        while True:
            at = RX_RING + self.rx_next * 16
            address, size, checksum, status, errors, special = struct.unpack("<QHHBBH", self.ram[at : at + 16])
            if not status & DD:
                break
            parts += self.ram[address : address + size]
            if status & 2:
                found.append(Received(parts, status, errors, checksum, special))
                parts = b""
            self.put_rx(self.rx_next, address)
            last, self.rx_next = self.rx_next, (self.rx_next + 1) % self.rx_count
            if give_back:
                self.write(regs.RDT, last)
        return found

    def idle(self, ns: int = MS) -> None:
        self.host.clock.advance(ns)


def legacy(address: int, length: int, command: int, *, cso: int = 0, css: int = 0, special: int = 0) -> bytes:
    return struct.pack("<QHBBBBH", address, length, cso, command, 0, css, special)


def data(address: int, length: int, command: int, *, options: int = 0, special: int = 0) -> bytes:
    return struct.pack("<QIBBH", address, length | 1 << 20 | (command | DEXT) << 24, 0, options, special)


def context(
    *,
    ip: tuple[int, int, int] = (14, 24, 33),
    tu: tuple[int, int, int] = (34, 50, 0),
    command: int = 0,
    paylen: int = 0,
    hdrlen: int = 0,
    mss: int = 0,
) -> bytes:
    last = paylen | (command | DEXT) << 24
    return struct.pack("<BBHBBHIBBH", *ip, *tu, last, 0, hdrlen, mss)
