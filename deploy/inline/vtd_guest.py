"""A q35 guest in this process, its VT-d unit driven as Linux does, and devices in processes of their own: for whoever
measures what they cost one another."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from guestd.config import DeviceConfig, GuestConfig
from guestd.guest import Guest
from guestd.machine_config import IntelIommuConfig, Q35Config
from hostd.serve import device_server
from protocols.transport.loop import Loop
from vfio_model.errors import VfioModelError
from vfio_model.guest_drivers.pc import enable_ecam, mmio_window
from vfio_model.guest_drivers.pci import bring_up_bus
from vfio_model.guest_drivers.translation_services import enable_ats, enable_pasid, enable_pri
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_invalidation import QueuedInvalidation
from vfio_model.guest_drivers.vtd_prq import PageRequestQueue
from vfio_model.guest_drivers.vtd_tables import PageAllocator, Stage
from vfio_model.iommu.vtd import regs
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import NULL_TRACE

RAM = 64 << 20
_TABLES, _TABLES_END = 0x10_0000, 0x80_0000
_FIRST_SLOT = 2
_SECONDS = 20.0


class Pc:
    """A CPU of ``machine`` that knows how long its last write to the invalidation queue's tail took."""

    big_endian = False

    def __init__(self, machine: Q35Machine) -> None:
        self.read_memory, self.write_memory = machine.read_memory, machine.write_memory
        self.mmio_read, self._mmio_write = machine.mmio_read, machine.mmio_write
        self.port_read, self.port_write = machine.port_read, machine.port_write
        self.clock_step = machine.clock_step
        self.tail_seconds = 0.0

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        began = time.perf_counter()
        self._mmio_write(gpa, size, value)
        if gpa == regs.BASE + regs.IQT:
            self.tail_seconds = time.perf_counter() - began


class VtdGuest:
    """A guest with a device at each of ``sockets``; function n is at :meth:`devfn`, its BAR at ``bars[n]``."""

    def __init__(self, directory: Path, sockets: list[Path]) -> None:
        self.loop = Loop()
        devices = [
            DeviceConfig(
                id=f"card{number}",
                attach="remote",
                addr=f"{number + _FIRST_SLOT:02x}.0",
                socket=str(path),
                reconnect_ms=0,
            )
            for number, path in enumerate(sockets)
        ]
        iommu = IntelIommuConfig(scalable_mode=True, fsts=True, pasid_bits=20, device_iotlb=True, svm=True)
        config = GuestConfig(machine=Q35Config(ram=RAM, iommu=iommu), devices=devices, notifier="inline")
        self._guest = Guest(config, directory, self.loop, NULL_TRACE)
        try:
            self._bring_up(len(sockets))
        except BaseException:
            self.close()
            raise

    def _bring_up(self, count: int) -> None:
        self._guest.start()
        machine = self._guest.machine
        assert isinstance(machine, Q35Machine), "as configured"
        self.cpu = Pc(machine)
        config = enable_ecam(self.cpu)
        functions = {function.devfn: function for function in bring_up_bus(config, mmio_window())}
        self.bars = [functions[self.devfn(number)].bars[0].address for number in range(count)]
        pages = PageAllocator(self.cpu, _TABLES, _TABLES_END)
        self.driver = VtdDriver(self.cpu, pages, scalable=True, device_tlb=True)
        self.driver.start()
        invalidation = self.driver.invalidation
        assert isinstance(invalidation, QueuedInvalidation), "scalable mode has the queue"
        self.invalidation = invalidation
        self.requests = PageRequestQueue(self.cpu, self.driver.registers, invalidation, pages)
        for number in range(count):
            enable_pasid(config, self.devfn(number))
            enable_pri(config, self.devfn(number))
            enable_ats(config, self.devfn(number))

    @staticmethod
    def devfn(number: int) -> int:
        """Of device ``number``."""
        return number + _FIRST_SLOT << 3

    def domain(self, number: int, pasid: int) -> Domain:
        """A new address space, which is device ``number``'s under ``pasid``."""
        domain = self.driver.domain(Stage.FIRST)
        self.driver.attach_pasid(domain, self.devfn(number), pasid)
        return domain

    @property
    def subscribers(self) -> int:
        """Devices that follow invalidations by the ring."""
        publisher = self._guest.remote.publisher
        names = [] if publisher is None else publisher.status()["subscribers"]
        assert isinstance(names, list), "a list of names"
        return len(names)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Serve the devices until it is so. :raise VfioModelError: it does not happen."""
        deadline = time.monotonic() + _SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise VfioModelError(f"{what}: not within {_SECONDS:g} s")
            self.loop.run_once(0.01)

    def close(self) -> None:
        """The end."""
        self._guest.close()
        self.loop.close()


@contextmanager
def running(model: type[PCIDevice], count: int) -> Iterator[tuple[VtdGuest, list[int]]]:
    """A guest with ``count`` devices, and the pids of their processes."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp")))
        served = [
            stack.enter_context(device_server(model, socket=directory / f"card{number}.sock"))
            for number in range(count)
        ]
        guest = VtdGuest(directory, [Path(os.fspath(one.path)) for one in served])
        stack.callback(guest.close)
        yield guest, [one.process.pid or 0 for one in served]
