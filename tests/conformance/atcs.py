"""The implementations of a device's cache of translations that :mod:`tests.conformance.test_atc` runs over: in the
process of the IOMMU, and in a process of the device's own with a subscription at the notifier and without.

The IOMMU is a table with hooks; everything between it and the cache is the real thing, the wire included.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from guestd.function_iommu import FunctionIommu
from hostd.remote_iommu import RemoteIommu
from protocols.transport.shm import map_memory
from protocols.vfio_user.iommu_messages import PageAnswer
from protocols.vfio_user.messages import COMMANDS, Command, Payload
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iotlb import IOMMUTLBEntry, IOMMUTLBEvent
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.lane import LANES_SIZE, Lane, LaneArea, init_lanes
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.revoke import NoFence, Revoke
from vfio_model.memory.ring import RingReader, RingWriter, init_ring, ring_size
from vfio_model.memory.types import (
    PCI_NO_PASID,
    DMADirection,
    IOMMUAccessFlags,
    IOMMUNotifierFlag,
    MemTxResult,
    ReadBuffer,
    WriteBuffer,
)
from vfio_model.pci.config_space import COMMAND, COMMAND_MASTER
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.express import ExpressSpec
from vfio_model.pci.iommu_ops import (
    Atc,
    AtsCompletion,
    AtsGate,
    AtsRequest,
    IommuPort,
    IotlbInfo,
    PageRequest,
    PageResponseFn,
    PCIIOMMUOps,
    RequesterBus,
)
from vfio_model.pci.iommu_port import BusIommuPort
from vfio_model.pci.translation_caps import ATS_ENABLE, PASID_ENABLE, PRI_ENABLE, AtsSpec, PasidSpec, PriSpec
from vfio_model.ranges import Hva
from vfio_model.testing.bench import Host

PAGE = 0x1000
RAM_SIZE = 1 << 23
SHARED = RAM_SIZE // 2
"""Bytes of RAM, from 0, that a device in its own process has mapped."""
AS_ID = 77
PASID = 5
NONE, RO, RW = IOMMUAccessFlags.NONE, IOMMUAccessFlags.RO, IOMMUAccessFlags.RW


class Mapping(NamedTuple):
    gpa: int
    mask: int
    perm: IOMMUAccessFlags


class Bus:
    name, number = "fake", 0


class TableIommu(PCIIOMMUOps):
    """``tables[pasid][iova]``; ``before`` and ``after`` run once, around the next translation."""

    def __init__(self, system: AddressSpace) -> None:
        self.system = system
        self.tables: dict[int, dict[int, Mapping]] = {}
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.asked = 0
        self.blocked = False
        self.faults: list[int] = []
        self.notifiers: list[tuple[int, IOMMUNotifier]] = []
        self.gates: list[AtsGate] = []
        self.pages: list[PageRequest] = []
        self.responses: dict[int, PageResponseFn] = {}
        self.refusal = 0

    # -- what the guest does

    def map(self, iova: int, gpa: int, perm: IOMMUAccessFlags = RW, *, size: int = PAGE, pasid: int = PASID) -> None:
        self.tables.setdefault(pasid, {})[iova] = Mapping(gpa, size - 1, perm)

    def unmap(self, iova: int, *, pasid: int = PASID) -> OSError | None:
        """As a guest does it: the entry, the device-TLB invalidation, the wait descriptor."""
        gone = self.tables[pasid].pop(iova)
        return self.invalidate(iova, iova + gone.mask, pasid=pasid)

    def invalidate(self, first: int, last: int, *, pasid: int = PASID) -> OSError | None:
        self.tell(first, last, pasid=pasid)
        return self.flush()

    def tell(self, first: int, last: int, *, pasid: int = PASID) -> None:
        entry = IOMMUTLBEntry(None, first, 0, last - first, NONE, pasid)
        for wanted, notifier in tuple(self.notifiers):
            if wanted == pasid:
                notifier.deliver(IOMMUTLBEvent(IOMMUNotifierFlag.DEVIOTLB_UNMAP, entry))

    def flush(self) -> OSError | None:
        errors = [notifier.flush() for _, notifier in tuple(self.notifiers)]
        return next((error for error in errors if error is not None), None)

    def block(self, blocked: bool) -> None:
        """The context entry forbids translated requests, or allows them again."""
        self.blocked = blocked
        for gate in self.gates:
            gate(not blocked)
        self.flush()

    # -- PCIIOMMUOps

    def get_address_space(self, bus: RequesterBus, devfn: int) -> AddressSpace:
        return self.system

    def get_iotlb_info(self, bus: RequesterBus, devfn: int) -> IotlbInfo:
        return IotlbInfo(48, PAGE)

    def register_iotlb_notifier(self, bus: RequesterBus, devfn: int, pasid: int, notifier: IOMMUNotifier) -> None:
        if self.refusal:
            raise OSError(self.refusal, "no device-TLB")
        self.notifiers.append((pasid, notifier))

    def unregister_iotlb_notifier(self, bus: RequesterBus, devfn: int, pasid: int, notifier: IOMMUNotifier) -> None:
        self.notifiers.remove((pasid, notifier))

    def ats_request_translation(self, bus: RequesterBus, devfn: int, request: AtsRequest) -> AtsCompletion:
        self.asked += 1
        before, self.before = self.before, lambda: None
        after, self.after = self.after, lambda: None
        before()
        completion = self._translate(request)
        after()
        return completion

    def _translate(self, request: AtsRequest) -> AtsCompletion:
        wanted = RO if request.no_write else RW
        wanted |= IOMMUAccessFlags.EXEC if request.exec else NONE
        wanted |= IOMMUAccessFlags.PRIV if request.priv else NONE
        entries: list[IOMMUTLBEntry] = []
        addr, stop, errors = request.addr, request.addr + request.length, 0
        while addr < stop and len(entries) < request.max_entries:
            entry = self._piece(request.pasid, addr)
            errors += entry.perm & wanted != wanted
            entries.append(entry)
            addr = (addr | entry.addr_mask) + 1
        return AtsCompletion(entries, errors, addr >= stop)

    def _piece(self, pasid: int, addr: int) -> IOMMUTLBEntry:
        for iova, (gpa, mask, perm) in self.tables.get(pasid, {}).items():
            if iova <= addr <= iova + mask:
                return IOMMUTLBEntry(self.system, iova, gpa, mask, perm, pasid)
        return IOMMUTLBEntry(self.system, 0, 0, PAGE - 1, NONE, pasid)

    def translated_space(self, bus: RequesterBus, devfn: int, pasid: int) -> DMAImpl:
        assert pasid == PCI_NO_PASID, "a translated request bears no PASID"
        return _Translated(self)

    def watch_translated_requests(self, bus: RequesterBus, devfn: int, fn: AtsGate) -> Callable[[], None]:
        fn(not self.blocked)
        self.gates.append(fn)
        return lambda: self.gates.remove(fn)

    def pri_register_notifier(self, bus: RequesterBus, devfn: int, pasid: int, fn: PageResponseFn) -> None:
        self.responses[pasid] = fn

    def pri_unregister_notifier(self, bus: RequesterBus, devfn: int, pasid: int) -> None:
        self.responses.pop(pasid, None)

    def pri_request_page(self, bus: RequesterBus, devfn: int, request: PageRequest) -> None:
        if len(self.pages) == 3:
            raise OSError(errno.ENOSPC, "the queue is full")
        self.pages.append(request)


class _Translated:
    """System memory, unless the IOMMU blocks."""

    def __init__(self, iommu: TableIommu) -> None:
        self._iommu = iommu

    def _passes(self, address: int) -> bool:
        if self._iommu.blocked:
            self._iommu.faults.append(address)
        return not self._iommu.blocked

    def read(self, address: int, out: WriteBuffer) -> MemTxResult:
        return self._iommu.system.read(address, out) if self._passes(address) else MemTxResult.DECODE_ERROR

    def write(self, address: int, data: ReadBuffer) -> MemTxResult:
        return self._iommu.system.write(address, data) if self._passes(address) else MemTxResult.DECODE_ERROR

    def read_many(self, iovas: object, size: int, out: WriteBuffer) -> MemTxResult:
        raise NotImplementedError

    def write_many(self, iovas: object, size: int, data: ReadBuffer) -> MemTxResult:
        raise NotImplementedError

    def map(self, iova: int, length: int, direction: DMADirection, on_invalidate: object = None) -> None:
        raise NotImplementedError


class Function(PCIDevice):
    """One that caches translations."""

    VENDOR_ID, DEVICE_ID = 0x1B36, 0x00FD
    EXPRESS = ExpressSpec()
    ATS, PRI, PASID = AtsSpec(), PriSpec(), PasidSpec(priv=True)

    def enable(self) -> None:
        """What a driver does before the device may be used."""
        self.config_write(COMMAND, 2, COMMAND_MASTER)
        assert self.ats is not None and self.pri is not None and self.pasid is not None
        self.config_write(self.pasid.offset + 6, 2, PASID_ENABLE)
        self.config_write(self.ats.offset + 6, 2, ATS_ENABLE)
        self.config_write(self.pri.offset + 12, 4, 64)
        self.config_write(self.pri.offset + 4, 2, PRI_ENABLE)


class Rig:
    """A guest with a function behind an IOMMU. :meth:`open` makes the cache under test."""

    armed = True
    mapped = True
    """Whether accesses to shared RAM are copies of the device's own."""

    def __init__(self) -> None:
        self.ram = memoryview(bytearray(RAM_SIZE))
        root = MemoryRegion("system", 1 << 64)
        root.add_subregion(0, RAMRegion("ram", RAMBlock("ram", self.ram, page_size=PAGE, hva=Hva(0x7F00_0000_0000))))
        self.iommu = TableIommu(AddressSpace("system", root))
        host = Host()
        host.iommu = BusIommuPort(self.iommu, Bus(), 0)
        self.function = Function(host)
        self.function.realize()
        self.function.enable()
        lanes = memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_lanes(lanes)
        self.lanes, self.lane = LaneArea("device", lanes), Lane(lanes, 0)

    @property
    def port(self) -> IommuPort:
        """What a device class in that process has."""
        raise NotImplementedError

    def open(self, pasid: int = PASID, *, priv: bool = False) -> Atc:
        raise NotImplementedError

    def close(self) -> None:
        """The end of the test."""


class PluggedRig(Rig):
    """The device is in the process of its IOMMU."""

    mapped = False

    @property
    def port(self) -> IommuPort:
        port = self.function.host.iommu
        assert port is not None
        return port

    def open(self, pasid: int = PASID, *, priv: bool = False) -> Atc:
        return self.function.open_atc(pasid, priv=priv)


class Ring:
    """The invalidations of a guest whose readers are in this process."""

    def __init__(self, rig: Rig) -> None:
        self.words = memoryview(bytearray(ring_size(16))).cast("Q")
        init_ring(self.words, 16)
        self.writer = RingWriter(self.words)
        self._rig, self._wanted = rig, False
        self.revokes: list[Revoke] = []
        """Those that a section held up."""

    def append(self, as_id: int, iova: int, last: int, flags: int) -> None:
        self.writer.append(as_id, iova, last, flags)

    def want_revoke(self) -> None:
        self._wanted = True

    def flush_ats(self) -> OSError | None:
        wanted, self._wanted = self._wanted, False
        if self.writer.publish() or wanted:
            revoke = Revoke(NoFence(), [self._rig.lanes])
            if not revoke.start():
                self.revokes.append(revoke)
                return OSError(errno.ETIMEDOUT, "a section is open")
        return None


class RemoteRig(Rig):
    """The device is in a process of its own: messages, the ring, the gate, RAM as far as it is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(self)
        self.soon: list[Callable[[], None]] = []
        self.in_access = False
        self.answers: list[PageAnswer] = []
        self.guest = FunctionIommu(self.function, self.ring, AS_ID, self._respond)
        self.calls: list[Command] = []
        gate = map_memory(os.dup(self.guest.gate.fd))
        ram: IovaMaps[None] = IovaMaps()
        ram.add(IovaMap(0, SHARED, READ | WRITE, self.ram[:SHARED], None))
        self.remote = RemoteIommu(
            self._call, self.guest.setup, gate, ram, lambda: self.in_access, self.soon.append, limit=PAGE
        )
        if self.armed:
            self.arm()

    def arm(self) -> None:
        self.remote.arm(RingReader(self.ring.words), self.lane, AS_ID)

    def _respond(self, answer: PageAnswer) -> None:
        self.answers.append(answer)
        self.remote.page_response(PageAnswer.unpack(answer.pack()))

    def _call(self, command: Command, payload: Payload) -> Payload:
        """There and back, as bytes."""
        assert not self.lane.inside, "nobody waits for anything inside a DMA section"
        self.calls.append(command)
        spec = COMMANDS[command]
        answer = self.guest.serve(spec.request.unpack(payload.pack()))
        return spec.reply.unpack(answer.pack())

    @property
    def port(self) -> IommuPort:
        return self.remote

    def open(self, pasid: int = PASID, *, priv: bool = False) -> Atc:
        return self.remote.open_atc(pasid, priv=priv)

    def run_soon(self) -> None:
        due, self.soon[:] = list(self.soon), []
        for callback in due:
            callback()

    def close(self) -> None:
        self.remote.close()
        self.run_soon()
        self.guest.close()


class MessageRig(RemoteRig):
    """The same without a subscription: every translated request is a message."""

    armed = mapped = False


RIGS: dict[str, type[Rig]] = {"plugged": PluggedRig, "remote": RemoteRig, "by-message": MessageRig}
