"""Runs a program on one peer, and says of each operation what could be seen of it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.interop.operations import (
    Call,
    DeviceTest,
    Edu,
    Fill,
    Indirect,
    Operation,
    Program,
    QtestRtas,
    Register,
    Reset,
    Rtas,
    Switched,
)
from tests.interop.peers import Peer
from tests.interop.places import ARENA, BATCH, EDU_BAR, POOL, SLOT, TESTDEV_BAR, bar_gpa
from tests.interop.shadow import Expected, Shadow
from tests.interop.variants import EDU_SLOT, RAM_SIZE, TESTDEV_SLOT, Variant
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.iommu_testdev import regs as testdev
from vfio_model.iommu.spapr.regs import HCall, RtasToken, config_addr, pci_liobn, phb_buid
from vfio_model.ranges import U32_MAX

_RETS = 16
"""Return cells that are looked at, whatever the call was told: it must leave the others alone."""
_UNTOUCHED = 0xA5A5_A5A5
_MARGIN = 16
"""Bytes looked at on each side of what a DMA may touch."""


@dataclass(frozen=True)
class Outcome:
    """What came of one operation: a return code and values, or bytes."""

    ret: int
    values: tuple[int, ...] = ()
    data: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        values = ", ".join(f"{value:#x}" for value in self.values)
        data = "".join(f" {part[:48].hex()}{'...' if len(part) > 48 else ''}" for part in self.data)
        return f"{self.ret} [{values}]{data}"

    @property
    def rtas_status(self) -> int:
        """The signed status of an RTAS call."""
        return (self.values[0] ^ 1 << 31) - (1 << 31)


def expectations(variant: Variant, program: Program) -> list[Expected]:
    """What the shadow says of each operation."""
    shadow = Shadow(variant)
    return [shadow.apply(operation) for operation in program]


class Execution:
    """Of programs on ``peer``, which is a ``variant``."""

    def __init__(self, peer: Peer, variant: Variant) -> None:
        self._peer, self._variant = peer, variant

    def prepare(self) -> None:
        """Bring about one and the same state, whatever ran before: a reset touches neither RAM nor edu's registers."""
        self._other(Reset(), Expected())
        self._peer.clear(POOL.start, POOL.size)
        for index in range(self._variant.phbs):
            dma = self._variant.dma
            entry = (pci_liobn(index, 0), dma.dma_win_addr)
            self.calls([Call(HCall.H_PUT_TCE, (*entry, POOL.start | 3))])
            self._edu(Edu(index, to_ram=False, iova=dma.dma_win_addr, length=edu.BUFFER_SIZE, offset=0))
            for offset in (edu.STATUS, edu.INVERSION, edu.FACTORIAL, edu.DMA_SRC, edu.DMA_DST, edu.DMA_COUNT):
                self._other(Register(index, "edu", offset, 4, 0), Expected())
            self._other(Register(index, "edu", edu.IRQ_ACK, 4, U32_MAX), Expected())

    def run(self, program: Program, expected: Sequence[Expected]) -> list[Outcome]:
        """The outcome of each operation, from :meth:`prepare` on."""
        self.prepare()
        found: list[Outcome] = []
        batch: list[Call | Indirect | Rtas] = []
        for operation, known in zip(program, expected, strict=True):
            if isinstance(operation, Call | Indirect | Rtas):
                batch.append(operation)
                if len(batch) < BATCH:
                    continue
                found += self.calls(batch)
                batch = []
                continue
            found += self.calls(batch)
            batch = []
            found.append(self._other(operation, known))
        return found + self.calls(batch)

    def calls(self, batch: Sequence[Call | Indirect | Rtas]) -> list[Outcome]:
        """Hypercalls in one go; each has its own place for what it keeps in RAM."""
        if not batch:
            return []
        wanted, spans = [], []
        for at, operation in enumerate(batch):
            arena = ARENA + at * SLOT
            match operation:
                case Call(nr=nr, args=args):
                    wanted.append((nr, *args))
                case Indirect(skew=skew, tces=tces):
                    self._peer.write(arena + skew, struct.pack(f">{len(tces)}Q", *tces))
                    call = (HCall.H_PUT_TCE_INDIRECT, operation.liobn, operation.ioba, arena + skew, operation.npages)
                    wanted.append(call)
                case Rtas(token=token, args=args, nret=nret):
                    cells = (token, operation.told, nret, *args, *[_UNTOUCHED] * _RETS)
                    self._peer.write(arena, struct.pack(f">{len(cells)}I", *cells))
                    spans.append((arena + 4 * (3 + operation.told), 4 * _RETS))
                    wanted.append((HCall.H_RTAS, arena | operation.above << 60))
        answers = self._peer.calls(wanted)
        rets = iter(self._peer.read_many(spans))
        return [
            Outcome(ret, struct.unpack(f">{_RETS}I", next(rets)) if isinstance(operation, Rtas) else outputs)
            for operation, (ret, outputs) in zip(batch, answers, strict=True)
        ]

    def _other(self, operation: Operation, known: Expected) -> Outcome:
        peer = self._peer
        match operation:
            case Reset():
                peer.reset()
                return self._bring_up()
            case Fill(gpa=gpa, data=data, times=times):
                peer.write(gpa, data * times)
                return Outcome(0)
            case Register(phb=phb, offset=offset, size=size, value=value):
                at = bar_gpa(phb, EDU_BAR if operation.device == "edu" else TESTDEV_BAR) + offset
                if value is None:
                    return Outcome(0, (peer.load(at, size),))
                peer.store(at, size, value)
                if (operation.device, offset) == ("edu", edu.FACTORIAL):  # another thread of QEMU's computes it
                    while peer.load(at - offset + edu.STATUS, 4) & edu.STATUS_COMPUTING:
                        pass
                return Outcome(0)
            case Edu():
                self._edu(operation)
                return Outcome(0, (), self._touched(known))
            case DeviceTest():
                return Outcome(self._testdev(operation), (), self._touched(known))
            case QtestRtas(below=below) if below:
                return self._at_the_end_of_ram(operation)
            case QtestRtas(name=name, args=args, nret=nret):
                cells = (*args, *[_UNTOUCHED] * _RETS)
                peer.write(ARENA, struct.pack(f">{len(cells)}I", *cells))
                rets = ARENA + 4 * len(args)
                ret = peer.rtas(name, (len(args), ARENA), (nret, rets))
                (data,) = peer.read_many([(rets, 4 * _RETS)])
                return Outcome(ret, struct.unpack(f">{_RETS}I", data))
            case Switched():
                return self._switched(operation)
        raise AssertionError(operation)

    def _at_the_end_of_ram(self, operation: QtestRtas) -> Outcome:
        """A call whose return cells are partly there. The status counts as untouched where it is not."""
        peer, args, rets = self._peer, operation.args, RAM_SIZE - operation.below
        tail = (RAM_SIZE - 4 * _RETS, 4 * _RETS)
        peer.write(tail[0], struct.pack(">I", _UNTOUCHED) * _RETS)
        peer.write(ARENA, struct.pack(f">{len(args)}I", *args))
        ret = peer.rtas(operation.name, (len(args), ARENA), (operation.nret, rets))
        (data,) = peer.read_many([tail])
        status = int.from_bytes(data[rets - tail[0] :][:4], "big") if operation.below >= 4 else _UNTOUCHED
        return Outcome(ret, (status,), (data,))

    def _switched(self, operation: Switched) -> Outcome:
        """What the edu's registers show meanwhile and afterwards. A DMA into its buffer leaves that its own state."""
        base = bar_gpa(operation.phb, EDU_BAR)
        buid = phb_buid(operation.phb)
        values: list[int] = []
        self._edu(Edu(operation.phb, to_ram=False, iova=operation.iova, length=64, offset=0))
        for command in (operation.command, 0x6):
            args = (config_addr(0, EDU_SLOT << 3, 0x04), buid >> 32, buid & U32_MAX, 2, command)
            (outcome,) = self.calls([Rtas(RtasToken.IBM_WRITE_PCI_CONFIG, args, 1)])
            values.append(outcome.values[0])
            self._peer.store(base + edu.INVERSION, 4, command)
            values += [self._peer.load(base + offset, 4) for offset in (edu.IDENTIFICATION, edu.INVERSION)]
            if command & 0x2:
                self._edu(Edu(operation.phb, to_ram=False, iova=operation.iova, length=128, offset=32))
        return Outcome(0, tuple(values))

    def _touched(self, known: Expected) -> tuple[bytes, ...]:
        spans = [(gpa - _MARGIN, size + 2 * _MARGIN) for gpa, size in known.spans]
        return tuple(self._peer.read_many(spans))

    def _bring_up(self) -> Outcome:
        """What firmware does: place the BARs, and switch decoding and bus mastering on."""
        batch: list[Call | Indirect | Rtas] = []
        for index in range(self._variant.phbs):
            buid = phb_buid(index)
            for slot, bar in ((EDU_SLOT, EDU_BAR), (TESTDEV_SLOT, TESTDEV_BAR)):
                for register, size, value in ((0x10, 4, bar), (0x04, 2, 0x6)):
                    place = config_addr(0, slot << 3, register)
                    args = (place, buid >> 32, buid & U32_MAX, size, value)
                    batch.append(Rtas(RtasToken.IBM_WRITE_PCI_CONFIG, args, 1))
        outcomes = self.calls(batch)
        return Outcome(0, tuple(outcome.values[0] for outcome in outcomes))

    def _edu(self, operation: Edu) -> None:
        base = bar_gpa(operation.phb, EDU_BAR)
        inside = edu.BUFFER_ADDRESS + operation.offset
        src, dst = (inside, operation.iova) if operation.to_ram else (operation.iova, inside)
        command = edu.DMA_RUN | (edu.DMA_TO_RAM if operation.to_ram else 0)
        command |= edu.DMA_IRQ if operation.interrupt else 0
        for offset, value in (
            (edu.DMA_SRC, src),
            (edu.DMA_DST, dst),
            (edu.DMA_COUNT, operation.length),
            (edu.DMA_COMMAND, command),
        ):
            self._peer.store(base + offset, 8, value)
        self._peer.settle(base + edu.DMA_COMMAND, edu.DMA_RUN)

    def _testdev(self, operation: DeviceTest) -> int:
        """The result register; its registers are little-endian on a big-endian machine."""
        base = bar_gpa(operation.phb, TESTDEV_BAR)
        for offset, value in (
            (testdev.IOVA_LO, operation.iova & U32_MAX),
            (testdev.IOVA_HI, operation.iova >> 32),
            (testdev.LENGTH, operation.length),
            (testdev.GPA_LO, operation.gpa & U32_MAX),
            (testdev.GPA_HI, operation.gpa >> 32),
            (testdev.ATTRIBUTES, operation.attributes),
            (testdev.DOORBELL, testdev.DOORBELL_ARM if operation.armed else 0),
        ):
            self._peer.store(base + offset, 4, _swapped(value))
        self._peer.load(base + testdev.TRIGGER, 4)
        return _swapped(self._peer.load(base + testdev.RESULT, 4))


def _swapped(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")
