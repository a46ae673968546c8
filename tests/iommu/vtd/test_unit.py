"""A whole VT-d unit: what a guest writes into registers, queue and tables, and what a function below it sees."""

from __future__ import annotations

import errno

import pytest

from tests.iommu.vtd.rig import Bus
from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.unit import IntelIommu
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.iommu_ops import PageRequest, PageResponse
from vfio_model.ranges import Hva

ROOT, CONTEXT, QUEUE, STATUS, PRQ, IRT = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
TABLES, DATA = 0x10_0000, 0x8_0000
DEVFN, DID = 0x18, 5
IOVA = 0x7F12_3456_7ABC
SVM = VtdOptions(scalable_mode=True, fsts=True, pasid_bits=20, device_iotlb=True, svm=True)


class Guest:
    """Registers, memory, and a function 00:03.0."""

    def __init__(self, options: VtdOptions = VtdOptions()) -> None:
        root = MemoryRegion("system", 1 << 64)
        self.system = AddressSpace("system", root)
        block = RAMBlock("ram", bytearray(4 << 20), page_size=4096, hva=Hva(0x7F00_0000_0000))
        root.add_subregion(0, RAMRegion("ram", block))
        self.messages: list[tuple[int, int]] = []
        self.unit = IntelIommu(options, self.system, lambda address, data: self.messages.append((address, data)))
        root.add_subregion(regs.BASE, self.unit.mmio)
        self.unit.reset()
        self.bus = Bus("pcie.0", 0)
        self.function = self.unit.ops.get_address_space(self.bus, DEVFN)
        self.wide = False
        self.tail = 0

    def load(self, addr: int, size: int = 8) -> int:
        data = bytearray(size)
        assert self.system.read(addr, data) == MemTxResult.OK
        return int.from_bytes(data, "little")

    def store(self, addr: int, *quads: int) -> None:
        self.system.write(addr, b"".join(quad.to_bytes(8, "little") for quad in quads))

    def get(self, register: int, size: int = 8) -> int:
        return self.load(regs.BASE + register, size)

    def put(self, register: int, value: int, size: int = 8) -> None:
        self.system.write(regs.BASE + register, value.to_bytes(size, "little"))

    def map(self, top: int, iova: int, leaf: int, flags: int = 3) -> int:
        """Four levels below ``top``; where the leaf entry is."""
        table = top
        for level in (39, 30, 21):
            slot = table + (iova >> level & 0x1FF) * 8
            following = table + 0x1000
            self.store(slot, following | flags)
            table = following
        slot = table + (iova >> 12 & 0x1FF) * 8
        self.store(slot, leaf)
        return slot

    def start(self, *, scalable: bool = False) -> None:
        """The root table takes effect, the queue and translation go on."""
        self.wide = scalable
        self.put(regs.RTADDR, ROOT | (regs.RTADDR_SMT if scalable else 0))
        self.put(regs.IQA, QUEUE | (regs.IQA_DW if scalable else 0))
        self.put(regs.GCMD, regs.GCMD_SRTP, 4)
        self.put(regs.GCMD, regs.GCMD_QIE, 4)
        self.put(regs.GCMD, regs.GCMD_QIE | regs.GCMD_TE, 4)

    def submit(self, *descriptors: tuple[int, ...]) -> None:
        """Through the queue; all of them are executed."""
        size = 32 if self.wide else 16
        for each in descriptors:
            self.store(QUEUE + self.tail * size, *(*each, 0, 0, 0)[: size // 8])
            self.tail += 1
        self.put(regs.IQT, self.tail * size)
        assert self.get(regs.IQH) == self.tail * size

    def faults(self) -> tuple[int, int, int]:
        """FSTS and the record, which is then cleared."""
        found = self.get(regs.FSTS, 4), self.get(regs.FRCD + 8), self.get(regs.FRCD)
        self.put(regs.FRCD + 8, regs.FRCD_F)
        self.put(regs.FSTS, regs.FSTS_PFO, 4)
        return found


def legacy() -> tuple[Guest, int]:
    """``IOVA`` is mapped; where its leaf is."""
    guest = Guest()
    guest.store(ROOT, CONTEXT | 1)
    guest.store(CONTEXT + DEVFN * 16, TABLES | 1, DID << 8 | 2)
    leaf = guest.map(TABLES, IOVA, DATA | 3)
    guest.start()
    return guest, leaf


def test_legacy_mode_from_the_tables_to_the_byte() -> None:
    guest, leaf = legacy()
    assert guest.function.write(IOVA, b"abcd") == MemTxResult.OK
    assert guest.load(DATA | 0xABC, 4) == int.from_bytes(b"abcd", "little")
    guest.store(leaf, 0)
    guest.submit((DID << 16 | 0x32, IOVA & ~0xFFF), (0x1_0000_0025, STATUS))
    assert guest.load(STATUS, 4) == 1
    assert guest.function.write(IOVA, b"abcd") == MemTxResult.DECODE_ERROR
    assert guest.faults() == (2, 0x8000_0005_0000_0018, IOVA & ~0xFFF)
    assert guest.function.read(IOVA, bytearray(4)) == MemTxResult.DECODE_ERROR
    assert guest.faults() == (2, 0xC000_0006_0000_0018, IOVA & ~0xFFF)


def test_an_invalidation_of_another_page_or_domain_leaves_what_is_cached() -> None:
    guest, leaf = legacy()
    guest.function.write(IOVA, b"a")
    guest.store(leaf, 0)
    guest.submit((DID << 16 | 0x32, 0x1000), (DID + 1 << 16 | 0x22,))
    assert guest.function.write(IOVA, b"b") == MemTxResult.OK
    guest.submit((DID << 16 | 0x22,))
    assert guest.function.write(IOVA, b"c") == MemTxResult.DECODE_ERROR


def test_a_fault_is_a_message_to_software() -> None:
    guest, _ = legacy()
    guest.put(regs.FEDATA, 0x21, 4)
    guest.put(regs.FEADDR, 0xFEE0_1000, 4)
    guest.put(regs.FECTL, 0, 4)
    guest.function.write(0, b"a")
    assert guest.messages == [(0xFEE0_1000, 0x21)]


def test_interrupts_of_a_function_are_remapped() -> None:
    guest, _ = legacy()
    guest.store(IRT + 0x12 * 16, 0x100_0031_0001, 0x4_0018)
    guest.put(regs.IRTA, IRT | 7)
    guest.put(regs.GCMD, regs.GCMD_QIE | regs.GCMD_TE | regs.GCMD_SIRTP | regs.GCMD_IRE, 4)
    assert guest.function.write(0xFEE0_0258, bytes(4)) == MemTxResult.OK
    assert guest.messages == [(0xFEE0_1000, 0x4031)]
    other = guest.unit.ops.get_address_space(guest.bus, DEVFN + 8)
    assert other.write(0xFEE0_0258, bytes(4)) == MemTxResult.ERROR
    assert guest.faults() == (2, 0x8000_0026_0000_0020, 0x12 << 48)


def scalable(options: VtdOptions = SVM) -> Guest:
    """PASID 5 of the function has a first-level table with nothing in it."""
    guest = Guest(options)
    guest.store(ROOT, CONTEXT | 1)
    guest.store(CONTEXT + DEVFN * 32, 0x7000 | 0x1D, 0)
    guest.store(0x7000, 0x9000 | 1)
    guest.store(0x9000 + 5 * 64, 0x49, 1, TABLES)
    guest.store(0x9000, 0x49, 1, TABLES)
    guest.put(regs.PQA, PRQ)
    guest.start(scalable=True)
    return guest


def test_a_page_request_its_response_and_the_translation_that_it_brought() -> None:
    guest = scalable()
    ops = guest.unit.ops
    answers: list[tuple[int, PageResponse]] = []
    ops.pri_register_notifier(guest.bus, DEVFN, 5, lambda prgi, code: answers.append((prgi, code)))
    ops.pri_request_page(guest.bus, DEVFN, PageRequest(0xC_0FFE_E000, 5, 7, True, False, True))
    assert [guest.load(PRQ + 8 * i) for i in range(4)] == [0x5_0018_0101, 0xC_0FFE_E03E, 0, 0]
    guest.map(TABLES, 0xC_0FFE_E000, DATA | 7, flags=7)
    guest.submit((0x5_0018_0019, 0x38), (0x1_0000_0025, STATUS))
    assert answers == [(7, PageResponse.SUCCESS)]
    space = guest.unit.translation.space(guest.bus, DEVFN, 5).address_space
    assert space.write(0xC_0FFE_E008, b"abcd") == MemTxResult.OK
    assert guest.load(DATA | 8, 4) == int.from_bytes(b"abcd", "little")


def test_a_page_request_of_a_function_that_may_make_none_is_a_fault() -> None:
    guest = scalable()
    guest.store(CONTEXT + DEVFN * 32, 0x7000 | 0xD, 0)
    with pytest.raises(OSError) as caught:
        guest.unit.ops.pri_request_page(guest.bus, DEVFN, PageRequest(0x1000, 5, 7, True, False, True))
    assert caught.value.errno == errno.EPERM
    assert guest.faults()[1] == 0x8000_0547_8000_0018
    assert guest.get(regs.PQT) == 0


def test_without_page_requests_there_is_no_queue_for_them() -> None:
    guest = scalable(VtdOptions(scalable_mode=True, fsts=True, pasid_bits=20, device_iotlb=True))
    with pytest.raises(OSError) as caught:
        guest.unit.ops.pri_request_page(guest.bus, DEVFN, PageRequest(0x1000, 5, 7, True, False, True))
    assert caught.value.errno == errno.EPERM


def test_a_fault_with_a_pasid_says_so() -> None:
    guest = scalable()
    space = guest.unit.translation.space(guest.bus, DEVFN, 5).address_space
    assert space.write(0xC_0FFE_E000, b"a") == MemTxResult.DECODE_ERROR
    assert guest.faults() == (2, 0x8000_0571_8000_0018, 0xC_0FFE_E000)


def memory(guest: Guest) -> bytes:
    data = bytearray(4 << 20)
    guest.system.read(0, data)
    return bytes(data)


def test_a_migrated_unit_translates_and_goes_on_with_its_queue() -> None:
    source, leaf = legacy()
    source.submit((0x12,), (0x1_0000_0025, STATUS))
    target = Guest()
    target.system.write(0, memory(source))
    assert target.unit.import_state(source.unit.export_state()) is None
    target.tail = source.tail
    assert target.function.write(IOVA, b"abcd") == MemTxResult.OK
    target.store(leaf, 0)
    target.submit((DID << 16 | 0x32, IOVA & ~0xFFF))
    assert target.function.write(IOVA, b"abcd") == MemTxResult.DECODE_ERROR


def test_a_reset_unit_translates_nothing() -> None:
    guest, _ = legacy()
    guest.unit.reset()
    assert guest.function.write(DATA, b"abcd") == MemTxResult.OK
    assert guest.load(DATA, 4) == int.from_bytes(b"abcd", "little")
    assert guest.get(regs.GSTS, 4) == 0
