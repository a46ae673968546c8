"""A q35 guest in this process, its VT-d unit driven as Linux does, and devices with ATC, PRI and PASID in processes of
their own."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from guestd.config import DeviceConfig, GuestConfig
from guestd.function_iommu import FunctionIommu
from guestd.guest import Guest
from guestd.machine_config import IntelIommuConfig, Q35Config
from hostd.serve import ServedDevice, device_server
from protocols.transport.loop import Loop
from vfio_model.guest_drivers.pc import enable_ecam, mmio_window
from vfio_model.guest_drivers.pci import bring_up_bus
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_tables import PageAllocator, Stage
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.memory.types import PCI_NO_PASID, MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, PCIDevice
from vfio_model.pci.express import ExpressSpec
from vfio_model.pci.iommu_ops import Atc, AtcOutcome, AtsRequest, PageRequest, PageResponse
from vfio_model.pci.translation_caps import ATS_ENABLE, PASID_ENABLE, PRI_ENABLE, AtsSpec, PasidSpec, PriSpec
from vfio_model.trace import ListTrace
from vfio_model.vmstate.fields import VMStateDescription

PAGE = 0x1000
RAM = 64 << 20
TABLES, TABLES_END = 0x10_0000, 0x80_0000
DATA = 0x100_0000
IOVA = 0x7F12_3456_7000
NO_PASID = (1 << 20) - 1
"""In the register: requests without one."""
SECONDS = 20.0
Dma = Literal["shared", "mapped", "message"]

PASID, ADDR, LENGTH, VALUE, COMMAND, RESULT, COUNT, RESPONSES = range(0, 64, 8)
OPEN, CLOSE, FILL, WRITE, READ, BURST, STOP, HANG, ASK_PAGE, PLAIN_WRITE, PLAIN_READ = range(1, 12)
ERROR, BUSY = 1 << 63, (1 << 64) - 1
OUTCOMES = list(AtcOutcome)
OK, MISS, FAILED = (OUTCOMES.index(one) for one in (AtcOutcome.OK, AtcOutcome.MISS, AtcOutcome.FAILED))


class AtsProbe(PCIDevice):
    """1b36:00fc: one cache of translations, told what to do with it."""

    VENDOR_ID, DEVICE_ID = 0x1B36, 0x00FC
    EXPRESS = ExpressSpec()
    BARS = (BarSpec(0, PAGE, access=(8, 8)),)
    ATS, PRI, PASID = AtsSpec(), PriSpec(), PasidSpec(priv=True)
    VMSTATE = VMStateDescription("ats-probe", 1, (PARENT,))

    def realize(self) -> None:
        self.regs = dict.fromkeys(range(0, 64, 8), 0)
        self.atc: Atc | None = None
        self.running = False

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        return self.regs.get(offset, 0)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        self.regs[offset] = value
        if offset == COMMAND:
            self.regs[RESULT] = BUSY
            try:
                self.regs[RESULT] = self._do(value)
            except OSError as error:
                self.regs[RESULT] = ERROR | (error.errno or errno.EIO)
        return MemTxResult.OK

    @property
    def _pasid(self) -> int:
        return PCI_NO_PASID if self.regs[PASID] == NO_PASID else self.regs[PASID]

    def _do(self, command: int) -> int:
        if command == OPEN:
            self.atc = self.open_atc(self._pasid)
            if self._pasid != PCI_NO_PASID:
                self.pri_register_notifier(self._pasid, self._responded)
            return 0
        if command == PLAIN_READ:
            return int(self.dma.read(self.regs[ADDR], bytearray(8)))
        if command == PLAIN_WRITE:
            return int(self.dma.write(self.regs[ADDR], self.regs[VALUE].to_bytes(8, "little")))
        if command == STOP:
            self.running = False
            return 0
        assert self.atc is not None, "OPEN comes first"
        if command == CLOSE:
            self.atc.close()
        elif command == FILL:
            done = self.atc.fill(AtsRequest(self.regs[ADDR], self.regs[LENGTH]))
            return done.errors << 32 | len(done.entries)
        elif command in (WRITE, READ):
            return self._access(command == WRITE)
        elif command == BURST:
            self.running = True
            self.run_when_idle(self._burst)
        elif command == HANG:
            self.run_when_idle(self._hang)
        elif command == ASK_PAGE:
            self.run_when_idle(self._ask_page)
        return 0

    def _access(self, is_write: bool) -> int:
        assert self.atc is not None, "OPEN comes first"
        data = bytearray(self.regs[VALUE].to_bytes(8, "little"))
        moved, outcome = self.atc.access(self.regs[ADDR], memoryview(data), is_write)
        self.regs[VALUE] = int.from_bytes(data, "little")
        return OUTCOMES.index(outcome) << 32 | moved

    def _burst(self) -> bool:
        """Write LENGTH bytes again and again; the translation is asked for when it has gone."""
        assert self.atc is not None, "OPEN comes first"
        data = memoryview(bytearray(self.regs[VALUE].to_bytes(8, "little") * (self.regs[LENGTH] // 8)))
        for _ in range(16):
            outcome = self.atc.access(self.regs[ADDR], data, True)[1]
            if outcome is AtcOutcome.OK:
                self.regs[COUNT] += 1
            elif outcome is AtcOutcome.MISS:
                with contextlib.suppress(OSError):
                    self.atc.fill(AtsRequest(self.regs[ADDR], self.regs[LENGTH]))
        return self.running

    def _hang(self) -> bool:
        """Get stuck in the middle of a section."""
        self.atc._atc._cache.lane.enter()  # type: ignore[union-attr]
        while True:
            time.sleep(0.001)

    def _ask_page(self) -> bool:
        request = PageRequest(self.regs[ADDR], self._pasid, 7, last=True, is_read=True, is_write=True)
        try:
            self.pri_request_page(request)
        except OSError as error:
            self.regs[RESULT] = ERROR | (error.errno or errno.EIO)
        return False

    def _responded(self, prgi: int, code: PageResponse) -> None:
        self.regs[RESPONSES] += 1 << 32
        self.regs[RESPONSES] = self.regs[RESPONSES] & ~0xFFFF_FFFF | prgi << 8 | int(code)


class DirectPc:
    """A CPU of ``machine``."""

    big_endian = False

    def __init__(self, machine: Q35Machine) -> None:
        self.read_memory, self.write_memory = machine.read_memory, machine.write_memory
        self.mmio_read, self.mmio_write = machine.mmio_read, machine.mmio_write
        self.port_read, self.port_write = machine.port_read, machine.port_write
        self.clock_step = machine.clock_step


class Card:
    """Device ``number`` as its driver has it; ``served`` is its process."""

    def __init__(self, rig: AtsRig, number: int, served: ServedDevice) -> None:
        self.number, self.served = number, served
        self.devfn = (number + 2) << 3
        self._rig = rig
        (self.function,) = (each for each in rig.functions if each.devfn == self.devfn)
        self.bar = self.function.bars[0].address

    def enable(self) -> None:
        """ATS, PRI and PASID, as a driver does."""
        device = self._rig.guest.devices[f"card{self.number}"][1]
        assert device.ats is not None and device.pri is not None and device.pasid is not None
        write = self._rig.config.write
        write(self.devfn, device.pasid.offset + 6, 2, PASID_ENABLE)
        write(self.devfn, device.ats.offset + 6, 2, ATS_ENABLE)
        write(self.devfn, device.pri.offset + 12, 4, 64)
        write(self.devfn, device.pri.offset + 4, 2, PRI_ENABLE)

    def get(self, register: int) -> int:
        return self._rig.cpu.mmio_read(self.bar + register, 8)

    def put(self, **values: int) -> None:
        for name, value in values.items():
            self._rig.cpu.mmio_write(self.bar + globals()[name.upper()], 8, value)

    def do(self, command: int, **values: int) -> int:
        """The result of ``command``."""
        self.put(**values, command=command)
        deadline = time.monotonic() + SECONDS
        while (result := self.get(RESULT)) == BUSY:  # a read is answered in the middle of a command
            assert time.monotonic() < deadline, f"command {command} does not end"
        return result

    def write(self, addr: int, value: int) -> int:
        """The outcome of a translated write."""
        return self.do(WRITE, addr=addr, value=value) >> 32


class AtsRig:
    """``count`` devices; PASID n of card m is a first-stage domain of its own. Everything ends with the ``with``."""

    def __init__(self, directory: Path, served: list[ServedDevice], dma: Dma, reconnect_ms: int) -> None:
        self.loop, self.trace = Loop(), ListTrace()
        devices = [
            DeviceConfig(
                id=f"card{number}",
                attach="remote",
                addr=f"{number + 2:02x}.0",
                socket=str(one.path),
                dma=dma,
                reconnect_ms=reconnect_ms,
            )
            for number, one in enumerate(served)
        ]
        iommu = IntelIommuConfig(scalable_mode=True, fsts=True, pasid_bits=20, device_iotlb=True, svm=True)
        config = GuestConfig(machine=Q35Config(ram=RAM, iommu=iommu), devices=devices, notifier="inline")
        self.guest = Guest(config, directory, self.loop, self.trace)
        try:
            self._bring_up(served)
        except BaseException:
            self.close()
            raise

    def _bring_up(self, served: list[ServedDevice]) -> None:
        self.guest.start()
        machine = self.guest.machine
        assert isinstance(machine, Q35Machine)
        self.machine = machine
        self.cpu = DirectPc(machine)
        self.config = enable_ecam(self.cpu)
        self.functions = bring_up_bus(self.config, mmio_window())
        self.pages = PageAllocator(self.cpu, TABLES, TABLES_END)
        self.driver = VtdDriver(self.cpu, self.pages, scalable=True, device_tlb=True)
        self.driver.start()
        self.cards = [Card(self, number, one) for number, one in enumerate(served)]
        for card in self.cards:
            card.enable()

    def domain(self, card: Card, pasid: int | None) -> Domain:
        """A new first-stage domain for requests of ``card`` with ``pasid``."""
        domain = self.driver.domain(Stage.FIRST)
        if pasid is None:
            self.driver.attach(domain, card.devfn)
        else:
            self.driver.attach_pasid(domain, card.devfn, pasid)
        return domain

    def armed(self, card: Card) -> None:
        """Return when the device follows the ring, if it is to follow one."""
        publisher = self.guest.remote.publisher
        if publisher is None:
            return
        self.until(lambda: len(publisher.status()["subscribers"]) == len(self.cards))  # type: ignore[arg-type]
        card.get(COUNT)

    def function(self, card: Card) -> FunctionIommu:
        """What serves the requests of ``card`` to the IOMMU."""
        services = self.guest.remote.links[f"card{card.number}"]._services
        assert services is not None and services.function is not None
        return services.function

    def until(self, condition: Callable[[], Any]) -> None:
        """Serve, and look again, until it is so."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            self.loop.run_once(0.001)

    def word(self, gpa: int) -> int:
        return int.from_bytes(self.cpu.read_memory(gpa, 8), "little")

    def close(self) -> None:
        self.guest.close()
        self.loop.close()


@contextlib.contextmanager
def running(directory: Path, count: int = 1, *, dma: Dma = "shared", reconnect_ms: int = 0) -> Iterator[AtsRig]:
    """A guest with ``count`` cards."""
    with contextlib.ExitStack() as stack:
        served = [
            stack.enter_context(device_server(AtsProbe, socket=directory / f"card{number}.sock"))
            for number in range(count)
        ]
        rig = AtsRig(directory, served, dma, reconnect_ms)
        try:
            yield rig
        finally:
            rig.close()
