"""A machine moves while a device works on a process's addresses: the command goes on there, and so does the process."""

from __future__ import annotations

import pytest

from tests.guest_drivers.svm_rig import OPTIONS, SVM, SvmRig
from tests.machine.q35_boards import ram_block
from vfio_model.devices.svm import regs
from vfio_model.devices.svm.device import SvmDevice
from vfio_model.machine.migration import load_device_state, save_device_state
from vfio_model.machine.q35.machine import Q35Machine, Q35Options

PAGE, PAGES = 4096, 600
SLICE_NS = 1000
TURNS = 2000


def move(rig: SvmRig) -> SvmDevice:
    """The machine goes elsewhere; the device there."""
    source = rig.machine
    target = Q35Machine([ram_block(source.ram[0].size)], Q35Options(iommu=OPTIONS))
    device = target.root_bus.plug(SvmDevice, SVM)
    assert isinstance(device, SvmDevice)
    target.ram[0].view[:] = source.ram[0].view
    load_device_state(target, save_device_state(source))
    rig.cpu.move(target)
    return device


@pytest.mark.parametrize("slices", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("present", [True, False], ids=["present", "missing"])
def test_a_command_goes_on(slices: int, present: bool) -> None:
    """Wherever it is: before it began, between its translations, waiting for pages, in the middle of its data."""
    rig = SvmRig(16 << 20)
    process = rig.process()
    start = process.mm.mmap(PAGES * PAGE)
    if present:
        process.mm.write(start, b"\xff" * (PAGES * PAGE))
    driver = rig.driver
    driver.put(regs.ADDRESS, start)
    driver.put(regs.SIZE, PAGES * PAGE)
    driver.start(regs.COMMAND_WRITE)
    if slices:
        rig.cpu.clock_step(slices * SLICE_NS)
    device = move(rig)
    assert device.busy and not driver.done
    for _ in range(TURNS):
        if driver.done:
            break
        if not rig.sva.queue.handle():
            rig.cpu.clock_step(SLICE_NS)
    assert driver.done and driver.status == regs.STATUS_OK
    process.check_pattern(start, PAGES * PAGE)
    process.exit()
    rig.frames.check()


def test_what_is_unmapped_there_is_invalidated_there() -> None:
    rig = SvmRig(16 << 20)
    process = rig.process()
    start = process.mm.mmap(4 * PAGE)
    process.write_and_check(start, 4 * PAGE)
    device = move(rig)
    rig.cpu.clock_step(5 * SLICE_NS)
    assert device.cached == 0
    process.write_and_check(start, 4 * PAGE)
    process.mm.munmap(start, 2 * PAGE)
    assert not process.device_write(start, PAGE)
    process.write_and_check(start + 2 * PAGE, 2 * PAGE)
    process.exit()
    rig.frames.check()
    child = rig.process()
    child.exit()
