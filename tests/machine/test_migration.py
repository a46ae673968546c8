"""Migrating a machine: all combinations of windows, old and damaged streams, devices, RAM; with a container too."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator, Mapping

import pytest

from tests.acceleration import accelerated
from tests.machine.boards import pseries
from tests.vfio.direct_chain import LIOBN0, LIOBN1, MIB, Chain
from tests.vfio.test_pci import Connection
from vfio_model.devices.dma_burst.device import DMABurstDevice
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev import regs as testdev
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.errors import VMStateError
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions, HCall
from vfio_model.iommu.spapr.vmstate import SPAPR_IOMMU, SPAPR_IOMMU_EX, export_table
from vfio_model.machine.migration import (
    Entry,
    MachineLoader,
    device_frames,
    entries,
    load_device_state,
    ram_views,
    save_device_state,
)
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.machine.vio import KINDS
from vfio_model.memory.ram import RAMBlock
from vfio_model.pci.device import PCIDevice
from vfio_model.ranges import Hva
from vfio_model.uapi.vfio import Ioctl, PciIrq
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vmstate.fields import Field, VMStateDescription, encode
from vfio_model.vmstate.ram import RamSender
from vfio_model.vmstate.stream import FrameKind, FrameReader, FrameWriter, Section

pytestmark = pytest.mark.machine

WINDOW = 16 << 12
SHAPES = ("default only", "64-bit only", "both", "none", "default removed, then recreated")


def chain(shape: str, *, connect: bool = True, kvm: bool = False) -> Chain:
    """A guest whose windows have ``shape``, each with a few mappings."""
    made = Chain(ram=2 * MIB, page_size=1 << 16, window=WINDOW, connect=connect, kvm=kvm)
    if shape in ("both", "64-bit only"):
        assert made.create_window(16, 18)[0] == 0
        assert made.put(1 << 59, 0x3_0003, LIOBN1) == 0
        assert made.put((1 << 59) + 0x2_0000, 0x5_0001, LIOBN1) == 0
    if shape != "default only" and shape != "both":
        assert made.remove_window(LIOBN0) == 0
    if shape == "default removed, then recreated":
        assert made.create_window(16, 17)[0] == 0
        assert made.put(0x1_0000, 0x4_0003) == 0
    if shape in ("default only", "both"):
        assert made.put(0x3000, 0x1_2003) == 0
        assert made.indirect(0x5000, [0x7003, 0, 0x9002]) == 0
    return made


def tables(machine: PseriesMachine) -> list[tuple[object, ...]]:
    """Everything a guest could find out about the windows."""
    return [
        (table.liobn, table.nb_table, table.page_shift, table.bus_offset, table.def_win, list(table.entries))
        for table in machine.tables.values()
    ]


@pytest.mark.parametrize("from_kvm", [False, True], ids=["from user", "from kvm"])
@pytest.mark.parametrize("to_kvm", [False, True], ids=["to user", "to kvm"])
@pytest.mark.parametrize("connect", [True, False], ids=["with a container", "alone"])
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_tces_and_liobns_arrive(shape: str, connect: bool, from_kvm: bool, to_kvm: bool) -> None:
    source, destination = chain(shape, kvm=from_kvm), chain("default only", connect=connect, kvm=to_kvm)
    load_device_state(destination.machine, save_device_state(source.machine))
    assert tables(destination.machine) == tables(source.machine)
    if connect:
        assert destination.host_windows() == source.host_windows()
        assert destination.host_view() == destination.guest_view() == source.host_view()
        assert destination.container is not None
        destination.container.close()
        assert destination.mm == 0


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SHAPES, SHAPES)))
def test_whatever_the_destination_had(before: str, after: str) -> None:
    source, destination = chain(after), chain(before)
    load_device_state(destination.machine, save_device_state(source.machine))
    assert tables(destination.machine) == tables(source.machine)
    assert destination.host_view() == destination.guest_view() == source.host_view()


def test_removing_the_last_window_remembers_the_default_one() -> None:
    source, destination = chain("64-bit only"), chain("default only")
    load_device_state(destination.machine, save_device_state(source.machine))
    assert destination.remove_window(LIOBN1) == 0
    assert [table.enabled for table in destination.machine.tables.values()] == [True, False]


def test_a_closed_table_sends_its_subsection_and_a_default_window_does_not() -> None:
    machine = pseries(dma=DmaOptions(dma_win_size=WINDOW))
    names = [SPAPR_IOMMU_EX.needed(export_table(table)) for table in machine.phb().dma.tables]
    assert names == [False, True]


# -- old and strange streams -----------------------------------------------------------------------------------------


def restreamed(machine: PseriesMachine, change: Mapping[tuple[str, int], Section | None]) -> bytes:
    """The stream of ``machine`` with some sections changed or left out."""
    writer = FrameWriter()
    frames = [writer.header(machine.TYPE)]
    for entry in entries(machine):
        description = entry.description
        section = Section(description.name, entry.instance, description.version, encode(description, entry.export()))
        section_or_none = change.get(entry.key, section)
        if section_or_none is not None:
            frames.append(writer.section(section_or_none))
    return b"".join((*frames, writer.end()))


def small(**options: object) -> PseriesMachine:
    ram = RAMBlock("ram", bytearray(MIB), page_size=1 << 16, hva=Hva(0x7F00_0000_0000))
    made = PseriesMachine([ram], PseriesOptions(dma=DmaOptions(dma_win_size=4 << 12), **options))  # type: ignore[arg-type]
    return accelerated(made, [ram])


def test_a_version_2_stream_of_one_table_loads() -> None:
    source, destination = small(), small()
    source.hcall(HCall.H_PUT_TCE, LIOBN0, 0x1000, 0x5003)
    old = encode(SPAPR_IOMMU, export_table(source.phb().dma.tables[0]), version=2)
    assert len(old) == len(encode(SPAPR_IOMMU, export_table(source.phb().dma.tables[0]))) - 1
    change = {("spapr_iommu", LIOBN0): Section("spapr_iommu", LIOBN0, 2, old), ("spapr_iommu", LIOBN1): None}
    load_device_state(destination, restreamed(source, change))
    assert tables(destination) == tables(source)
    assert destination.phb().dma.tables[0].def_win


@pytest.mark.parametrize(
    ("version", "instance", "name", "says"),
    [
        (4, LIOBN0, "spapr_iommu", "version 4; 2 to 3"),
        (1, LIOBN0, "spapr_iommu", "version 1; 2 to 3"),
        (3, LIOBN1, "spapr_iommu", "liobn is 0x80000000 in the stream and 0x80000001 here"),
        (3, 0x8000_0100, "spapr_iommu", "no such object"),
        (3, LIOBN0, "spapr_iommu_2", "no such object"),
    ],
)
def test_a_section_that_is_not_for_this_machine_is_named(version: int, instance: int, name: str, says: str) -> None:
    machine = small()
    data = encode(SPAPR_IOMMU, export_table(machine.phb().dma.tables[0]))
    change = {("spapr_iommu", LIOBN1): None, ("spapr_iommu", LIOBN0): Section(name, instance, version, data)}
    with pytest.raises(VMStateError, match=says) as caught:
        load_device_state(small(), restreamed(machine, change))
    assert f"section {name}, instance {instance:#x}" in str(caught.value)


def test_a_missing_and_a_doubled_section_are_refused() -> None:
    machine = small()
    with pytest.raises(VMStateError, match="no section spapr_iommu, instance 0x80000000"):
        load_device_state(small(), restreamed(machine, {("spapr_iommu", LIOBN0): None}))
    data = encode(SPAPR_IOMMU, export_table(machine.phb().dma.tables[0]))
    twice = {("spapr_iommu", LIOBN1): Section("spapr_iommu", LIOBN0, 3, data)}
    with pytest.raises(VMStateError, match="comes twice"):
        load_device_state(small(), restreamed(machine, twice))


def test_windows_that_overlap_are_refused() -> None:
    machine = small()
    state = {**export_table(machine.phb().dma.tables[0]), "liobn": LIOBN1}
    change = {("spapr_iommu", LIOBN1): Section("spapr_iommu", LIOBN1, 3, encode(SPAPR_IOMMU, state))}
    with pytest.raises(VMStateError, match="windows of pci@800000020000000 overlap"):
        load_device_state(small(), restreamed(machine, change))


def pieces(machine: PseriesMachine) -> bytes:
    """All there is to see of a small machine that could have changed."""
    return repr((tables(machine), machine.clock.now_ns, sorted(machine.irqs.high), [*machine.irqs.raised])).encode()


def test_a_truncated_stream_is_refused_at_every_byte_and_changes_nothing() -> None:
    source = small()
    source.hcall(HCall.H_PUT_TCE, LIOBN0, 0, 0x1003)
    stream = save_device_state(source)
    destination = small()
    before = pieces(destination)
    for length in range(len(stream)):
        with pytest.raises(VMStateError, match="the stream ends without its end"):
            load_device_state(destination, stream[:length])
        assert pieces(destination) == before
    load_device_state(destination, stream)
    assert tables(destination) == tables(source)


def test_a_stream_with_any_byte_altered_is_refused_and_changes_nothing() -> None:
    source = small()
    source.hcall(HCall.H_PUT_TCE, LIOBN0, 0, 0x1003)
    stream = save_device_state(source)
    destination = small()
    before = pieces(destination)
    for place, flip in itertools.product(range(len(stream)), (0x01, 0x80, 0xFF)):
        altered = bytearray(stream)
        altered[place] ^= flip
        with pytest.raises(VMStateError, match=r"byte [0-9]+"):
            load_device_state(destination, bytes(altered))
        assert pieces(destination) == before


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(VMStateError, match="1 bytes behind the end"):
        load_device_state(small(), save_device_state(small()) + b"\0")


def test_a_host_that_refuses_a_window_is_an_error_of_the_load() -> None:
    source, destination = chain("both"), chain("default only")
    destination.port.fail = refuse
    with pytest.raises(VMStateError, match=r"spapr_iommu, instance 0x80000001.*refused"):
        load_device_state(destination.machine, save_device_state(source.machine))


def refuse(cmd: int) -> None:
    if cmd == Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE:
        raise OSError(errno.ENOMEM, "the host has no memory left")


# -- devices ---------------------------------------------------------------------------------------------------------


def board() -> PseriesMachine:
    machine = small()
    bus = machine.phb().bus
    bus.plug(EduDevice, 1 << 3, dma_mask=(1 << 64) - 1)
    bus.plug(IOMMUTestDevice, 2 << 3)
    bus.plug(DMABurstDevice, 3 << 3)
    return machine


def brought_up(machine: PseriesMachine) -> tuple[int, int, int]:
    """CPU addresses of the three BARs, with memory decoding and bus mastering on."""
    bus = machine.phb().bus
    for number, devfn in enumerate((8, 16, 24)):
        bus.config_write(devfn, 0x10, 4, regs.PCI_MEM32_BUS + number * MIB)
        bus.config_write(devfn, 4, 2, 6)
    first, second, third = (regs.pci_mem32_window(0) + number * MIB for number in range(3))
    return first, second, third


def test_a_transfer_in_flight_is_done_at_the_destination_at_its_time() -> None:
    source, destination = board(), board()
    bar, _, _ = brought_up(source)
    source.hcall(HCall.H_PUT_TCE, LIOBN0, 0x1000, 0x5003)
    edu_source = source.phb().bus.devices[8]
    assert isinstance(edu_source, EduDevice)
    edu_source.buffer[:4] = b"data"
    for register, value in (
        (edu.DMA_SRC, edu.BUFFER_ADDRESS),
        (edu.DMA_DST, 0x1000),
        (edu.DMA_COUNT, 4),
        (edu.DMA_COMMAND, edu.DMA_RUN | edu.DMA_TO_RAM | edu.DMA_IRQ),
    ):
        source.mmio_write(bar + register, 8, value)
    source.clock_step(40_000_000)
    load_device_state(destination, save_device_state(source))
    assert destination.clock.now_ns == 40_000_000
    destination.clock_step(59_999_999)
    assert destination.read_memory(0x5000, 4) == bytes(4)
    destination.clock_step(1)
    assert destination.read_memory(0x5000, 4) == b"data"
    assert destination.irqs.level(regs.LSI_BASE + 1)
    assert destination.mmio_read(bar + edu.IRQ_STATUS, 4) == edu.IRQ_CAUSE_DMA


def test_a_pin_that_is_up_stays_up_and_is_counted_once() -> None:
    source, destination = board(), board()
    bar, _, _ = brought_up(source)
    source.mmio_write(bar + edu.IRQ_RAISE, 4, 0x10)
    load_device_state(destination, save_device_state(source))
    assert destination.irqs.high == source.irqs.high == {regs.LSI_BASE + 1}
    assert destination.irqs.raised == source.irqs.raised
    destination.mmio_write(bar + edu.IRQ_ACK, 4, 0x10)
    assert not destination.irqs.high


def test_an_armed_testdev_runs_at_the_destination() -> None:
    source, destination = board(), board()
    _, bar, _ = brought_up(source)
    source.hcall(HCall.H_PUT_TCE, LIOBN0, 0x2000, 0x6003)
    for register, value in (
        (testdev.IOVA_LO, 0x2000),
        (testdev.GPA_LO, 0x6000),
        (testdev.LENGTH, 8),
        (testdev.DOORBELL, testdev.DOORBELL_ARM),
    ):
        source.write_memory(bar + register, value.to_bytes(4, "little"))
    load_device_state(destination, save_device_state(source))
    destination.read_memory(bar + testdev.TRIGGER, 4)
    assert destination.read_memory(bar + testdev.RESULT, 4) == bytes(4)


def test_a_background_run_goes_on() -> None:
    source, destination = board(), board()
    brought_up(source)
    source.hcall(HCall.H_PUT_TCE, LIOBN0, 0, 0x5003)
    burst = source.phb().bus.devices[24]
    for register, value in ((0x10, 8), (0x18, 1000), (0x38, 0x1122), (0x40, 0x1 | 0x2 | 0x10)):
        burst.bar_write(0, register, 8, value)
    source.clock_step(3_000)
    there = destination.phb().bus.devices[24]
    load_device_state(destination, save_device_state(source))
    assert there.bar_read(0, 0x50, 8) == burst.bar_read(0, 0x50, 8)
    assert 0 < (there.bar_read(0, 0x50, 8) or 0) < 1000
    for machine in (source, destination):
        machine.clock_step(100_000)
    for register in (0x48, 0x50, 0x58):
        assert there.bar_read(0, register, 8) == burst.bar_read(0, register, 8)
    assert there.bar_read(0, 0x50, 8) == 1000


def test_message_interrupts_stay_with_their_functions() -> None:
    source, destination = board(), board()
    brought_up(source)
    config_addr, buid = 8 << 8, source.phb().buid
    change = (config_addr, buid >> 32, buid & 0xFFFF_FFFF, 3, 1, 0)
    assert source.rtas(regs.RtasToken.IBM_CHANGE_MSI, change, 4) == [0, 1, 1, 1]
    load_device_state(destination, save_device_state(source))
    query = (config_addr, buid >> 32, buid & 0xFFFF_FFFF, 0)
    token = regs.RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER
    assert destination.rtas(token, query, 3) == source.rtas(token, query, 3) == [0, regs.MSI_BASE, 1]
    other = (16 << 8, *change[1:])
    assert destination.rtas(regs.RtasToken.IBM_CHANGE_MSI, other, 4)[0] != 0, "the test device has no messages"


def test_another_device_is_refused() -> None:
    source, destination = small(), small()
    source.phb().bus.plug(EduDevice, 8)
    destination.phb().bus.plug(EduDevice, 8, dma_mask=0xFFFF)
    with pytest.raises(VMStateError, match="dma_mask is 0xfffffff in the stream and 0xffff here"):
        load_device_state(destination, save_device_state(source))
    with pytest.raises(VMStateError, match=r"section edu, instance 0x8.*no such object"):
        load_device_state(small(), save_device_state(source))
    with pytest.raises(VMStateError, match="no section edu, instance 0x8"):
        load_device_state(destination, save_device_state(small()))


class Forgetful(PCIDevice):
    """Says nothing about its state."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x9999


def test_a_device_that_does_not_say_what_migrates_blocks_it() -> None:
    machine = small()
    machine.phb().bus.plug(Forgetful, 8)
    with pytest.raises(VMStateError, match="function 0x8: Forgetful does not say"):
        save_device_state(machine)


def test_an_assigned_function_keeps_what_the_guest_configured_and_its_device_hears_of_it() -> None:
    source, destination = small(), small()
    connections = Connection(), Connection()
    for machine, connection in zip((source, destination), connections, strict=True):
        bus = machine.phb().bus
        bus.attach(VFIOPCIDevice(bus.host_for(8), connection, name="nic"), 8)
    bus = source.phb().bus
    before = bus.devices[8]
    assert before.msi is not None
    bus.config_write(8, 0x10, 4, 0x9000_0000)
    before.msi.set_message(regs.MSI_WINDOW, regs.MSI_BASE)
    bus.config_write(8, before.msi.offset + 2, 2, 0x11)
    bus.config_write(8, 4, 2, 6)
    load_device_state(destination, save_device_state(source))
    after, there = destination.phb().bus.devices[8], connections[1]
    assert bytes(after.config) == bytes(before.config)
    assert after.bar_range(0) == before.bar_range(0) is not None
    assert there.model.bus_master
    there.irqs[PciIrq.VFIO_PCI_MSI_IRQ_INDEX][1]()
    assert dict(destination.irqs.raised) == {regs.MSI_BASE + 1: 1}


@pytest.mark.parametrize("bypass", [False, True])
def test_a_vio_device_keeps_its_window_and_its_bypass(bypass: bool) -> None:
    source, destination = small(), small()
    for machine in (source, destination):
        machine.vio.add(KINDS["llan"])
    unit = regs.VIO_UNIT_BASE
    source.hcall(HCall.H_PUT_TCE, unit, 0x4000, 0x8003)
    source.rtas(regs.RtasToken.SET_TCE_BYPASS, (unit, int(bypass)), 1)
    load_device_state(destination, save_device_state(source))
    dma = destination.vio.devices[unit].dma
    assert dma is not None
    assert dma.bypass == bypass
    assert destination.hcall(HCall.H_GET_TCE, unit, 0x4000) == (0, [0x8003])


def test_several_bridges_keep_their_windows_apart() -> None:
    source, destination = small(phbs=3), small(phbs=3)
    for index in range(3):
        source.hcall(HCall.H_PUT_TCE, regs.pci_liobn(index, 0), 0, (index + 1) << 12 | 3)
    load_device_state(destination, save_device_state(source))
    assert tables(destination) == tables(source)


# -- RAM -------------------------------------------------------------------------------------------------------------


def ram_stream(machine: PseriesMachine, writes: list[tuple[int, bytes]]) -> Iterator[bytes]:
    """A first pass, a pass for each write that comes meanwhile, a final one that finds nothing, and the sections."""
    writer = FrameWriter()
    sender = RamSender(writer, ram_views(machine))
    yield writer.header(machine.TYPE)
    yield sender.blocks()
    yield from sender.everything()
    yield sender.end_pass(final=False)
    for gpa, data in writes:
        machine.write_memory(gpa, data)
        yield from sender.run(0, gpa, len(data))
        yield sender.end_pass(final=False)
    yield sender.end_pass(final=True)
    yield from device_frames(machine, writer)


def test_ram_comes_in_passes_and_the_last_word_counts() -> None:
    source, destination = small(), small()
    source.write_memory(0x1234, b"first")
    destination.write_memory(0x8_0000, b"stale")
    loader = MachineLoader(destination)
    for piece in ram_stream(source, [(0x1234, b"later"), (0x4000, bytes(16))]):
        for at in range(0, len(piece), 1000):
            loader.feed(piece[at : at + 1000])
    assert loader.complete and loader.ram is not None and loader.ram.passes == 4
    loader.load()
    assert destination.ram[0].view == source.ram[0].view


def test_ram_of_another_size_is_refused() -> None:
    stream = b"".join(ram_stream(small(), []))
    other = pseries()
    with pytest.raises(VMStateError, match="the RAM is not this machine's: ram 0x4000000"):
        MachineLoader(other).feed(stream)


THING = VMStateDescription("thing", 3, (Field("number"),))


def early_stream(machine: PseriesMachine, *sections: Section) -> bytes:
    """RAM, among it what is said early, and everything else."""
    writer = FrameWriter()
    sender = RamSender(writer, ram_views(machine))
    thing = Entry(THING, 4, lambda: {"number": 7}, lambda _: None)
    frames = [writer.header(machine.TYPE), sender.blocks(), *map(writer.early, sections), sender.end_pass(final=True)]
    return b"".join([*frames, *device_frames(machine, writer, [thing])])


def test_what_is_said_early_goes_to_its_object_in_order() -> None:
    machine, said, loaded = small(), list[bytes](), list[object]()
    thing = Entry(THING, 4, lambda: {"number": 0}, loaded.append, early=said.append)
    loader = MachineLoader(small(), extra=[thing])
    loader.feed(early_stream(machine, Section("thing", 4, 3, b"one"), Section("thing", 4, 3, b"two")))
    assert said == [b"one", b"two"] and loader.complete and not loaded
    loader.load()
    assert loaded == [{"number": 7}]


@pytest.mark.parametrize(("name", "instance"), [("thing", 5), ("other", 4), ("virtual-clock", 0)])
def test_what_nobody_takes_early_is_refused(name: str, instance: int) -> None:
    thing = Entry(THING, 4, lambda: {"number": 0}, lambda _: None, early=lambda _: None)
    loader = MachineLoader(small(), extra=[thing])
    with pytest.raises(VMStateError, match="before the machine stands"):
        loader.feed(early_stream(small(), Section(name, instance, 1, b"x")))


def test_sections_before_the_final_pass_are_refused() -> None:
    machine = small()
    writer = FrameWriter()
    sender = RamSender(writer, ram_views(machine))
    loader = MachineLoader(small())
    loader.feed(writer.header(machine.TYPE) + sender.blocks() + sender.end_pass(final=False))
    with pytest.raises(VMStateError, match="before the final pass"):
        loader.feed(b"".join(device_frames(machine, writer)))


def test_frames_cannot_be_dropped_or_exchanged() -> None:
    frames = list(ram_stream(small(), []))
    for wrong in (frames[:3] + frames[4:], [*frames[:2], frames[3], frames[2], *frames[4:]], frames[1:]):
        reader = FrameReader("pseries")
        with pytest.raises(VMStateError, match="checksum"):
            list(reader.feed(b"".join(wrong)))
    assert [frame.kind for frame in FrameReader("pseries").feed(frames[0])] == [FrameKind.HEADER]
