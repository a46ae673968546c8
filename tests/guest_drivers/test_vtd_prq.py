"""The page request queue as a driver serves it: groups, refusals, overflow, the end of a PASID."""

from __future__ import annotations

import pytest

from tests.guest_drivers.svm_rig import SVM, SvmRig
from vfio_model.devices.svm import regs as svm
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.process_tables import VMALLOC_BASE
from vfio_model.guest_drivers.svm_process import KIB, Process
from vfio_model.guest_drivers.vtd_prq import canonical
from vfio_model.iommu.vtd import regs
from vfio_model.pci.iommu_ops import PageRequest, PageResponse

PAGE = 4096
ENTRIES = 128
"""Of the smallest queue; one stays free."""
OTHER_SID = 0x20


class Open:
    """A process that has the device open; what the device is told of its requests."""

    def __init__(self, rig: SvmRig) -> None:
        self.rig, self.process = rig, rig.process()
        self.pasid = self.process.file.pasid
        self.page = self.process.mm.mmap(4 * PAGE)
        rig.cpu.clock_step(10_000)
        self.answers: list[tuple[int, PageResponse]] = []
        rig.device.pri_register_notifier(self.pasid, lambda prgi, code: self.answers.append((prgi, code)))

    def request(
        self,
        addr: int,
        prgi: int = 0,
        *,
        last: bool = True,
        read: bool = True,
        write: bool = False,
        priv: bool = False,
        exec: bool = False,
    ) -> None:
        self.rig.device.pri_request_page(PageRequest(addr, self.pasid, prgi, last, read, write, priv, exec))

    def handle(self) -> list[tuple[int, PageResponse]]:
        """The answers, once the driver has looked."""
        self.rig.sva.queue.handle()
        answers, self.answers = self.answers, []
        return answers


@pytest.fixture
def opened() -> Open:
    return Open(SvmRig(order=0))


def test_a_group_has_one_answer(opened: Open) -> None:
    for number in range(3):
        opened.request(opened.page + number * PAGE, 7, last=number == 2)
    assert opened.handle() == [(7, PageResponse.SUCCESS)]
    assert opened.process.mm.faults == 3
    assert opened.rig.sva.queue.requests == 3
    assert opened.handle() == []


def test_groups_may_be_mixed_and_wait_for_their_last_request(opened: Open) -> None:
    opened.request(opened.page, 1, last=False)
    opened.request(opened.page + PAGE, 2)
    assert opened.handle() == [(2, PageResponse.SUCCESS)]
    opened.request(opened.page + 2 * PAGE, 1)
    assert opened.handle() == [(1, PageResponse.SUCCESS)]
    assert opened.process.mm.faults == 3


def test_one_bad_page_is_the_group_s_answer(opened: Open) -> None:
    opened.request(opened.page, 4, last=False)
    opened.request(0xDEAD_0000, 4, last=False)
    opened.request(opened.page + PAGE, 4)
    assert opened.handle() == [(4, PageResponse.INVALID_REQUEST)]


def test_a_page_that_may_not_be_written(opened: Open) -> None:
    readable = opened.process.mm.mmap(PAGE, writable=False)
    opened.request(readable, 1, read=False, write=True)
    opened.request(readable, 2)
    assert opened.handle() == [(1, PageResponse.INVALID_REQUEST), (2, PageResponse.SUCCESS)]


@pytest.mark.parametrize(
    ("addr", "how"),
    [
        (1 << 47, {}),
        (0x1234 << 48, {}),
        (None, {"priv": True}),
        (None, {"exec": True}),
        (VMALLOC_BASE, {}),
    ],
    ids=["first that is not canonical", "not canonical", "privileged", "to execute", "the kernel's"],
)
def test_what_no_process_can_mean(opened: Open, addr: int | None, how: dict[str, bool]) -> None:
    opened.request(opened.page if addr is None else addr, 9, last=False, **how)
    opened.request(opened.page if addr is None else addr, 9, **how)
    assert opened.handle() == [(9, PageResponse.INVALID_REQUEST)]
    assert opened.process.mm.faults == 0


def test_a_stop_marker_is_not_answered(opened: Open) -> None:
    opened.request(opened.page, 9, read=False)
    assert opened.handle() == [] and opened.rig.sva.queue.requests == 1


def test_who_has_no_address_space_is_refused(opened: Open) -> None:
    opened.rig.sva.queue.forget(SVM, opened.pasid)
    opened.request(opened.page, 3)
    assert opened.handle() == [(3, PageResponse.INVALID_REQUEST)]


def test_an_overflow_is_served_and_forgotten(opened: Open) -> None:
    """What was lost is asked for again by the device; incomplete groups are dropped."""
    opened.request(opened.page, 500, last=False)
    for number in range(ENTRIES - 2):
        opened.request(opened.page, number)
    with pytest.raises(OSError):
        opened.request(opened.page, 499)
    status = opened.rig.vtd.registers
    assert status.read(regs.PRS) & regs.PRS_PRO
    assert len(opened.handle()) == ENTRIES - 2
    assert not status.read(regs.PRS) and opened.rig.sva.queue.overflows == 1
    opened.request(opened.page + PAGE, 500)
    assert opened.handle() == [(500, PageResponse.SUCCESS)]


def test_a_device_gets_over_an_overflow() -> None:
    rig = SvmRig(order=0)
    process = rig.process()
    start = process.mm.mmap(4 * PAGE)
    rig.cpu.clock_step(10_000)
    for _ in range(ENTRIES - 1):
        rig.device.pri_request_page(PageRequest(start, process.file.pasid, 300, False, True, False))
    for register, value in ((svm.ADDRESS, start), (svm.SIZE, 4 * PAGE), (svm.COMMAND, svm.COMMAND_WRITE)):
        rig.driver.put(register, value)
    rig.cpu.clock_step(10_000)
    assert rig.vtd.registers.read(regs.PRS) & regs.PRS_PRO and rig.device.busy
    for _ in range(20):
        rig.sva.queue.handle()
        rig.cpu.clock_step(1000)
    assert rig.sva.queue.overflows == 1 and not rig.device.busy
    process.check_pattern(start, 4 * PAGE)
    process.exit()


def test_the_queue_goes_round(opened: Open) -> None:
    for number in range(3 * ENTRIES):
        opened.request(opened.page, number % 512)
        assert opened.handle() == [(number % 512, PageResponse.SUCCESS)]


def test_a_pasid_is_another_s_only_when_nothing_of_it_is_queued() -> None:
    """What the device asked for under the old process is answered before; and is no fault of the new one."""
    rig = SvmRig()
    first = Open(rig)
    for number in range(5):
        first.request(first.page + number * PAGE % (4 * PAGE), number)
    first.process.exit()
    assert rig.sva.queue.requests == 5 and {code for _, code in first.answers} <= {
        PageResponse.SUCCESS,
        PageResponse.INVALID_REQUEST,
    }
    second = Open(rig)
    assert second.pasid == first.pasid
    faults = second.process.mm.faults
    assert second.handle() == [] and second.process.mm.faults == faults
    second.process.exit()
    rig.frames.check()


def test_pasids_run_out() -> None:
    rig = SvmRig()
    bonds = [rig.sva.bind(OTHER_SID, rig.mm()) for _ in range(255)]
    with pytest.raises(OSError, match="256 PASIDs are in use"):
        rig.sva.bind(OTHER_SID, rig.mm())
    rig.sva.unbind(bonds[99])
    assert rig.sva.bind(OTHER_SID, rig.mm()).pasid == bonds[99].pasid == 100


def test_canonical_addresses() -> None:
    assert [canonical(address) for address in (0, (1 << 47) - 1, 1 << 47, (1 << 64) - (1 << 47), (1 << 64) - 1)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert not canonical((1 << 64) - (1 << 47) - 1)


def test_the_driver_s_interface(opened: Open) -> None:
    process, driver = opened.process, opened.rig.driver
    with pytest.raises(OSError, match="is open"):
        driver.open(process.mm)
    with pytest.raises(OSError, match="ioctl"):
        process.file.ioctl(0x4940)
    with pytest.raises(OSError, match="read at 0x10"):
        process.file.ioctl(0x4008_4940, 0x10)
    own = opened.page
    process.mm.write(own, b"for the kernel")
    kernel = process.kernel_buffer(own, 4 * KIB)
    assert kernel == VMALLOC_BASE
    process.close()
    again = Process(opened.rig.cpu, opened.rig.frames, driver)
    again.open()
    again.exit()


def test_a_device_that_says_nothing_is_an_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_model.guest_drivers.svm.TRIES", 10)
    opened.rig.driver.put(svm.SIZE, 1)
    opened.rig.cpu.mmio_write(opened.rig.config._base + (SVM << 12) + 4, 2, 2)  # no bus master
    with pytest.raises(DriverError, match="message does not come"):
        opened.rig.driver.run(svm.COMMAND_WRITE)


def test_a_device_that_goes_is_an_error(opened: Open) -> None:
    opened.process.mm.write(opened.page, b"x")
    opened.rig.cpu.mmio_write(opened.rig.config._base + (SVM << 12) + 4, 2, 0)
    with pytest.raises(DriverError, match="the device is gone"):
        opened.process.device_write(opened.page, 1)
