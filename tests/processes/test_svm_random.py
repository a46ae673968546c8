"""The same random life as in one process, with the device in another one: a q35 guest here, its driver, a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.config import DeviceConfig, GuestConfig
from guestd.guest import Guest
from guestd.machine_config import IntelIommuConfig, Q35Config
from hostd.serve import device_server
from protocols.transport.loop import Loop
from tests.guest_drivers.svm_life import Life
from tests.processes.ats_rig import DirectPc
from vfio_model.devices.svm import regs
from vfio_model.devices.svm.device import SvmDevice
from vfio_model.guest_drivers.pc import enable_ecam, mmio_window
from vfio_model.guest_drivers.pci import bring_up_bus, find_function
from vfio_model.guest_drivers.svm_kernel import SvmKernel
from vfio_model.guest_drivers.svm_process import Process
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.trace import ListTrace

RAM = 64 << 20
STEPS = 150
BUFFER = 16 << 20
ROUNDS, MOST_ROUNDS = 4, 60


class ServingPc(DirectPc):
    """A CPU of a machine whose loop runs when time passes."""

    def __init__(self, machine: Q35Machine, loop: Loop) -> None:
        super().__init__(machine)
        self._loop = loop
        self.clock_step = self._step

    def _step(self, ns: int = 0) -> int:
        turns = iter(range(2))
        self._loop.serve_until(lambda: next(turns, None) is None, 0.002, "the device", "its turn")
        return 0


@pytest.fixture
def kernel(runtime_dir: Path) -> Iterator[SvmKernel]:
    loop = Loop()
    with device_server(SvmDevice, socket=runtime_dir / "svm.sock") as served:
        iommu = IntelIommuConfig(scalable_mode=True, fsts=True, pasid_bits=8, device_iotlb=True, svm=True)
        device = DeviceConfig(id="svm", attach="remote", addr="03.0", socket=str(served.path), reconnect_ms=0)
        config = GuestConfig(machine=Q35Config(ram=RAM, iommu=iommu), devices=[device], notifier="inline")
        guest = Guest(config, runtime_dir, loop, ListTrace())
        try:
            guest.start()
            assert isinstance(guest.machine, Q35Machine)
            cpu = ServingPc(guest.machine, loop)
            access = enable_ecam(cpu)
            functions = bring_up_bus(access, mmio_window())
            function = find_function(functions, regs.VENDOR_ID, regs.DEVICE_ID)
            yield SvmKernel.boot(cpu, access, function.devfn, function.bars[0].address, RAM, order=0)
        finally:
            guest.close()
            loop.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_cache_is_coherent_with_the_tables(seed: int, kernel: SvmKernel) -> None:
    life = Life(seed, kernel, None)
    life.run(STEPS)
    assert len(life.done) == 7, "each kind of step was taken"


@pytest.mark.parametrize("level", [1, 2], ids=["4 KiB", "2 MiB"])
def test_a_buffer_goes_while_the_device_writes(level: int, kernel: SvmKernel) -> None:
    """Nothing is written once ``munmap`` has returned, whatever its memory is then."""
    process = Process(kernel.cpu, kernel.frames, kernel.driver)
    process.open()
    driver, mm = kernel.driver, process.mm
    interrupted = rounds = 0
    while rounds < ROUNDS or (not interrupted and rounds < MOST_ROUNDS):
        rounds += 1
        start = mm.mmap(BUFFER, level=level)
        mm.write(start, b"\xff" * BUFFER)
        driver.put(regs.ADDRESS, start)
        driver.put(regs.SIZE, BUFFER)
        driver.start(regs.COMMAND_WRITE)
        while mm.read(start, 1) == b"\xff":
            kernel.cpu.clock_step()
        mm.munmap(start, BUFFER)
        kernel.frames.check()
        while not driver.done:
            if not kernel.sva.queue.handle():
                kernel.cpu.clock_step()
        interrupted += driver.status != regs.STATUS_OK
        kernel.frames.check()
    assert interrupted
    process.exit()
