"""Replaying a log: machines that log for themselves replay without a mismatch, whatever they were made of."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest_drivers.qemu_log import LogTrace, log_of
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.trace_compare import ReplayReport
from vfio_model.guest_drivers.trace_events import TraceEvent, Xlate, parse_line
from vfio_model.guest_drivers.trace_replay import Replayer
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions, HCall, RtasToken
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import U64_MAX, Hva
from vfio_model.trace import NULL_TRACE, Trace

RAM_SIZE = 4 << 20
LIST = 0x10_0000
VIO = 0x7100_0003
HIGH = 1 << 59
SMALL = DmaOptions(dma_win_size=1 << 20)


def machine_of(dma: DmaOptions = SMALL, phbs: int = 1, trace: Trace = NULL_TRACE) -> PseriesMachine:
    """Never accelerated: a log holds no hypercall that the kernel answered, and its answers are QEMU's own."""
    ram = RAMBlock("ram", bytearray(RAM_SIZE), page_size=4096, hva=Hva(1 << 40))
    return PseriesMachine([ram], PseriesOptions(phbs=phbs, dma=dma), trace=trace)


def replay(lines: Iterable[str], dma: DmaOptions = SMALL) -> ReplayReport:
    machine = machine_of(dma)

    def provide(liobn: int) -> bool:
        if liobn not in machine.tables:
            if regs.is_pci_liobn(liobn):
                machine.add_phb(regs.liobn_phb(liobn))
            else:
                machine.add_vio_table(liobn)
        return True

    replayer = Replayer(DirectCpu(machine), options=lambda index: dma, provide=provide)
    for number, line in enumerate(lines, 1):
        event = parse_line(line)
        assert isinstance(event, TraceEvent), line
        replayer.feed(number, event)
    return replayer.finish()


class Recorder:
    """A guest that makes a log by doing things at random, sensible and not."""

    def __init__(self, rng: random.Random, dma: DmaOptions, phbs: int) -> None:
        self.rng, self.dma = rng, dma
        self.machine = machine_of(dma, phbs, LogTrace())
        self.machine.add_vio_table(VIO)
        self.last_tce: dict[int, int] = {}

    def step(self) -> None:
        kinds = [self.put, self.stuff, self.indirect, self.look, self.look, self.look, self.get]
        self.rng.choice([*kinds * 6, self.create, self.remove, self.query, self.reset, self.phb_reset])()

    def _where(self) -> tuple[int, int, int]:
        """(liobn, bus address, page size) in or near an open window."""
        table = self.rng.choice([table for table in self.machine.tables.values() if table.enabled])
        page = 1 << table.page_shift
        index = self.rng.choice([self.rng.randrange(12), table.nb_table - self.rng.randrange(1, 12)])
        return table.liobn, (table.bus_offset + max(index, -1) * page + self.rng.choice([0, 0, 0, 5])) & U64_MAX, page

    def put(self) -> None:
        liobn, ioba, page = self._where()
        self.machine.hcall(HCall.H_PUT_TCE, liobn, ioba, self.rng.randrange(1 << 20) * page | self.rng.randrange(4))

    def get(self) -> None:
        liobn, ioba, _ = self._where()
        self.machine.hcall(HCall.H_GET_TCE, liobn, ioba)

    def stuff(self) -> None:
        liobn, ioba, _ = self._where()
        value = self.rng.choice([0, 0x5003])
        self.machine.hcall(HCall.H_STUFF_TCE, liobn, ioba, value, self.rng.randrange(9))

    def indirect(self) -> None:
        liobn, ioba, page = self._where()
        first, perm = self.rng.randrange(1, 1 << 20) * page, self.rng.randrange(1, 4)
        tces = [first + i * page | perm for i in range(self.rng.randrange(9))]
        self.machine.write_memory(LIST, b"".join(tce.to_bytes(8, "big") for tce in tces))
        self.machine.hcall(HCall.H_PUT_TCE_INDIRECT, liobn, ioba, LIST, len(tces))

    def look(self) -> None:
        liobn, ioba, _ = self._where()
        table = self.machine.tables[liobn]
        table.translate(ioba - table.bus_offset if ioba >= table.bus_offset else 0)

    def _pe(self) -> tuple[int, list[int]]:
        index = self.rng.choice([buid - regs.BUID_BASE for buid in self.machine.phbs])
        buid = regs.phb_buid(index)
        return index, [0x800, buid >> 32, buid & 0xFFFF_FFFF]

    def query(self) -> None:
        self.machine.rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, self._pe()[1], self.rng.choice([5, 6]))

    def create(self) -> None:
        shift = self.rng.choice([12, 13, 16, 21])
        self.machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*self._pe()[1], shift, shift + self.rng.randrange(6)], 4)

    def remove(self) -> None:
        index, _ = self._pe()
        self.machine.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, [regs.pci_liobn(index, self.rng.randrange(2))], 1)

    def reset(self) -> None:
        self.machine.rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, self._pe()[1], 1)

    def phb_reset(self) -> None:
        self.machine.phb(self._pe()[0]).reset()


@given(st.integers(0, 1 << 32), st.booleans(), st.integers(1, 3))
def test_what_a_machine_logs_replays_without_a_mismatch(seed: int, ddw: bool, phbs: int) -> None:
    dma = DmaOptions(ddw=ddw, dma_win_size=1 << 20)
    recorder = Recorder(random.Random(seed), dma, phbs)
    for _ in range(120):
        recorder.step()
    lines = log_of(recorder.machine)
    report = replay(lines, dma)
    assert report.mismatches == []
    looks = sum(isinstance(parse_line(line), Xlate) for line in lines)
    assert report.unchecked == 0
    assert report.translations_checked >= looks


@pytest.mark.parametrize(
    "dma",
    [
        DmaOptions(dma_win_addr=0x8000_0000, dma_win_size=1 << 21),
        DmaOptions(dma_win_size=1 << 20, dma64_win_addr=1 << 44, pgsz=1 << 12 | 1 << 16),
    ],
)
def test_other_window_options_replay_too(dma: DmaOptions) -> None:
    for seed in range(5):
        recorder = Recorder(random.Random(seed), dma, 2)
        for _ in range(200):
            recorder.step()
        assert replay(log_of(recorder.machine), dma).mismatches == []


def put(ioba: int, tce: int, liobn: int = 0x8000_0000) -> str:
    return f"spapr_iommu_pci_put liobn={liobn:#x} ioba={ioba:#x} tce={tce:#x} ret=0"


def xlate(offset: int, translated: int, perm: int = 3, liobn: int = 0x8000_0000, mask: int = 0xFFF) -> str:
    return f"spapr_iommu_xlate liobn={liobn:#x} {offset:#x} -> {translated:#x} perm={perm} mask={mask:#x}"


def new_table(liobn: int = 0x8000_0000) -> str:
    return f"spapr_iommu_new_table liobn={liobn:#x} table=0x0 fd=-1"


def indirect(ioba: int, last_index: int, last_tce: int, ret: int = 0, liobn: int = 0x8000_0000) -> str:
    fields = f"ioba={ioba:#x} tcelist={LIST:#x} iobaN={last_index:#x} tceN={last_tce:#x} ret={ret}"
    return f"spapr_iommu_pci_indirect liobn={liobn:#x} {fields}"


def stuff(after: int, value: int, npages: int, ret: int = 0) -> str:
    return f"spapr_iommu_pci_stuff liobn=0x80000000 ioba={after:#x} tcevalue={value:#x} npages={npages} ret={ret}"


CREATE = (
    "spapr_iommu_ddw_create buid=0x800000020000000 addr=0x800, page size=0x10000, requested=0x100000, "
    "start addr=0x800000000000000, liobn=0x80000001"
)


def wrong_lines(*lines: str) -> list[int]:
    return [wrong.line for wrong in replay(lines).mismatches]


def test_a_translation_is_compared_with_earlier_lines_only() -> None:
    assert wrong_lines(new_table(), xlate(0x1000, 0x5000), put(0x1000, 0x5003)) == [2]
    assert wrong_lines(new_table(), put(0x1000, 0x5003), xlate(0x1234, 0x5000)) == []


def test_an_entry_of_a_table_whose_start_is_not_in_the_log_is_unchecked_until_written() -> None:
    report = replay([xlate(0x1000, 0x5000), xlate(0x1000, 0x5000), put(0x1000, 0x7003), xlate(0x1000, 0x7000)])
    assert (report.unchecked, report.inferred, report.translations_checked) == (1, 1, 2)
    assert report.mismatches == []


def test_a_stuff_is_replayed_from_behind() -> None:
    assert wrong_lines(new_table(), stuff(0x5000, 0x9003, 4), xlate(0x1000, 0x9000), xlate(0x4FFF, 0x9000)) == []
    assert wrong_lines(new_table(), stuff(0x5000, 0x9003, 4), xlate(0x0, 0x9000), xlate(0x5000, 0x9000)) == [3, 4]


def test_a_stuff_that_failed_at_the_end_leaves_its_entries_in_doubt() -> None:
    failed = stuff(1 << 20, 0x9003, 3, ret=-4)
    old, new, other = xlate(0xF_F000, 0, 0), xlate(0xF_F000, 0x9000), xlate(0xF_F000, 0x8000)
    for seen in (old, new):
        report = replay([new_table(), failed, seen])
        assert (report.mismatches, report.inferred) == ([], 1)
    assert wrong_lines(new_table(), failed, other) == [3]
    assert wrong_lines(new_table(), failed, old, new) == [4], "the entry cannot say two things"
    assert wrong_lines(new_table(), failed, xlate(0xF_D000, 0x9000)) == [3], "three pages reach back two entries"


def test_an_indirect_is_a_list_of_consecutive_pages_whose_last_entry_is_known() -> None:
    lines = [new_table(), indirect(0x2000, 3, 0x2_0003), xlate(0x2000, 0x1_D000), xlate(0x5000, 0x2_0000)]
    report = replay(lines)
    assert (report.mismatches, report.translations_checked, report.inferred) == ([], 2, 1)
    assert wrong_lines(*lines[:2], xlate(0x3000, 0x77000)) == [3]
    assert wrong_lines(*lines[:2], xlate(0x5000, 0x77000)) == [3]


def test_a_list_that_most_of_its_entries_contradict_was_not_of_consecutive_pages() -> None:
    head = [new_table(), indirect(0x2000, 3, 0x2_0003)]
    scattered = [xlate(0x2000, 0x77000), xlate(0x3000, 0x99000), xlate(0x2008, 0x77000)]
    report = replay([*head, *scattered])
    assert (report.mismatches, report.inferred) == ([], 3)
    assert report.notes == ["line 2: the list was not of consecutive pages"]
    assert wrong_lines(*head, *scattered, xlate(0x3000, 0x55000)) == [6], "but an entry says one thing"
    assert wrong_lines(*head, *scattered, xlate(0x5000, 0x55000)) == [6], "and the last one is in the log"


def test_an_indirect_that_ran_out_of_the_window_wrote_the_entries_before() -> None:
    lines = [new_table(), indirect(0xF_E000, 1, 0x9003, ret=-4), xlate(0xF_E000, 0x7000), xlate(0xF_F000, 0x8000)]
    assert wrong_lines(*lines) == []


def test_a_second_new_table_is_a_reset_unless_a_call_made_it() -> None:
    assert wrong_lines(new_table(), put(0, 0x5003), new_table(), xlate(0, 0, 0)) == []
    assert wrong_lines(new_table(), put(0, 0x5003), new_table(), xlate(0, 0x5000)) == [4]
    lines = (new_table(), put(0, 0x5003), new_table(0x8000_0001), CREATE, xlate(0, 0x5000))
    assert wrong_lines(*lines) == []
    ours = xlate(0, 0, 0, liobn=0x8000_0001, mask=0xFFFF)
    reset = "spapr_iommu_ddw_reset buid=0x800000020000000 addr=0x800"
    assert wrong_lines(*lines, ours, new_table(), reset, xlate(0, 0, 0)) == []


def test_tables_that_vfio_moves_keep_their_contents() -> None:
    lines = [new_table(), put(0, 0x5003), new_table(0x8000_0001), CREATE]
    moved = [new_table(), new_table(0x8000_0001), xlate(0, 0x5000)]
    assert wrong_lines(*lines, *moved) == []


def test_a_table_in_the_kernel_changes_without_lines_so_nothing_of_it_is_checked() -> None:
    in_kernel = new_table().replace("fd=-1", "fd=23")
    report = replay([in_kernel, put(0, 0x5003), xlate(0, 0x9000), xlate(0, 0x5000)])
    assert (report.mismatches, report.unchecked, report.translations_checked) == ([], 2, 0)
    vfio_came = [new_table(0x8000_0001), CREATE, new_table(), new_table(0x8000_0001)]
    report = replay([in_kernel, *vfio_came, xlate(0, 0x9000), put(0, 0x5003), xlate(0, 0x5000)])
    assert (report.mismatches, report.unchecked, report.translations_checked) == ([], 1, 1)


def test_translations_of_another_window_may_come_between_a_table_and_its_call() -> None:
    lines = (new_table(), put(0, 0x5003), new_table(0x8000_0001), xlate(0, 0x5000), CREATE, xlate(0, 0x5000))
    assert wrong_lines(*lines) == []


def test_windows_that_differ_are_mismatches_at_their_line() -> None:
    query = "spapr_iommu_ddw_query buid=0x800000020000000 addr=0x0, {} windows available, max window size=0x1, mask={}"
    assert wrong_lines(query.format(1, "0x107")) == []
    assert wrong_lines(query.format(2, "0x107"), query.format(1, "0x3")) == [1, 2]
    assert wrong_lines(CREATE.replace("start addr=0x8", "start addr=0x4")) == [1]
    assert wrong_lines(CREATE.replace("liobn=0x80000001", "liobn=0x80000000")) == [1]
    assert wrong_lines(CREATE.replace("page size=0x10000", "page size=0x20000")) == [1]
    assert wrong_lines(CREATE.replace("page size=0x10000", "page size=0x10001")) == [1]
    assert wrong_lines("spapr_iommu_ddw_remove liobn=0x80000001") == [1]


def test_the_default_window_is_restored_when_the_last_one_goes() -> None:
    lines = [
        *(new_table(), put(0, 0x5003), new_table(0x8000_0001), CREATE),
        *("spapr_iommu_ddw_remove liobn=0x80000000", "spapr_iommu_ddw_remove liobn=0x80000001"),
        *(new_table(), "spapr_iommu_ddw_reset buid=0x800000020000000 addr=0x0", xlate(0, 0, 0)),
        *(put(0, 0x6003), xlate(0, 0x6000)),
    ]
    assert wrong_lines(*lines) == []


def test_events_of_windows_that_the_log_does_not_show_are_passed_over() -> None:
    report = replay([new_table(), put(HIGH, 0x5003, 0x8000_0001), xlate(0, 0x5000, liobn=0x8000_0001)])
    assert (report.passed_over, report.events, report.mismatches) == (2, 1, [])


def test_return_codes_are_compared() -> None:
    assert wrong_lines(put(1 << 20, 0x5003)) == [1]
    assert wrong_lines(put(0, 0x5003).replace("ret=0", "ret=-4")) == [1]
    assert wrong_lines(put(1 << 20, 0x5003).replace("ret=0", "ret=-4")) == []


def test_a_hook_hears_of_each_event_after_it_took_effect() -> None:
    machine = machine_of()
    seen: list[tuple[int, int]] = []
    replayer = Replayer(
        DirectCpu(machine), on_event=lambda line, event: seen.append((line, machine.translate(0x8000_0000, 0)[0]))
    )
    for number, line in enumerate((new_table(), put(0, 0x5003), put(0, 0x6003)), 1):
        event = parse_line(line)
        assert isinstance(event, TraceEvent)
        replayer.feed(number, event)
    replayer.finish()
    assert seen == [(1, 0), (2, 0x5000), (3, 0x6000)]
