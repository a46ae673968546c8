"""What needs live processes: a guest, a host and an assigned device, against bare ZeroMQ round trips.

The time of a hypercall is taken by guestd around the hypercall itself (the answer to a batch of commands says it), so
that the operator's own round trip is not part of it. Guest and host run on two processors, and so do the two ends of
the bare round trip (:mod:`deploy.bench.placement`).
"""

from __future__ import annotations

import os
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy import assemble, live, shipped
from deploy.bench.echo import RoundTrips, echo
from deploy.bench.measure import Row, percentile
from deploy.bench.placement import opposite
from deploy.launcher import Launcher
from deploy.link import Link
from deploy.live import ControlCpu
from deploy.quantity import Size
from deploy.scenario import Scenario
from deploy.scenario_machine import Device, Pseries
from deploy.trace_file import recorded_events
from protocols.control import messages as control
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.errors import VfioModelError
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.guest_drivers.pci import MmioWindow, bring_up
from vfio_model.guest_drivers.trace_events import PutTce, StuffTce
from vfio_model.iommu.spapr import regs

LIOBN = 0x8000_0000
RAM = 1 << 30
PAGE = 4096
LIST_GPA = 0x10_0000
RECORDING = "pseries-ddw"
BARE = "bare ZeroMQ round trip"
_CHUNK = 256
ONE_AT_A_TIME = 600
ALONE = "one at a time, in turn with the limit"
PACKED = "back to back"
IN_KERNEL = ", in the kernel"
"""Behind the names of rows that were taken with in-kernel acceleration."""


@dataclass
class Bench:
    """The running system: the guest's control link, a CPU on it, the load generator, and the echo."""

    launcher: Launcher
    link: Link
    cpu: ControlCpu
    device: DmaBurstDriver
    trips: RoundTrips
    start_to_dma: float

    def timed(self, calls: Sequence[control.Command]) -> list[float]:
        """Carry the commands out; the seconds that guestd spent on each.

        :raise VfioModelError: when a hypercall fails.
        """
        seconds: list[float] = []
        for at in range(0, len(calls), _CHUNK):
            done = self.link.ask_batch(list(calls[at : at + _CHUNK]), 60.0)
            for answer in done.answers:
                if isinstance(answer, control.Failed) or (isinstance(answer, control.HcallDone) and answer.ret):
                    raise VfioModelError(f"a hypercall of the benchmark failed: {answer}")
            seconds += [ns / 1e9 for ns in done.elapsed_ns]
        return seconds


def _scenario(*, kvm: bool = False) -> Scenario:
    device = Device(id="load", model="dma-burst", attach="assigned", addr="02.0")
    return Scenario(
        name="bench",
        description="what hypercalls cost",
        machine=Pseries(ram=Size(RAM), page_size=Size(16 << 20), kvm=kvm),
        devices=[device],
        steps=[],
    )


def put(ioba: int, tce: int) -> control.Hcall:
    """H_PUT_TCE in the default window."""
    return control.Hcall(regs.HCall.H_PUT_TCE, [LIOBN, ioba, tce])


def _nothing(_directory: Path) -> None:
    """The files are as the scenario has them."""


@contextmanager
def running(scenario: Scenario, prepare: Callable[[Path], None] = _nothing) -> Iterator[Bench]:
    """Start everything, do one DMA, and end everything. ``prepare(directory)`` may change the daemons' files before."""
    began = time.perf_counter()
    with Launcher(scenario.name, live.connect) as launcher:
        daemons = assemble.daemons(scenario, launcher.directory)
        prepare(launcher.directory)
        launcher.start(daemons)
        link = Link(launcher.directory, "guestd", watch=launcher.check)
        cpu = ControlCpu(link)
        window = MmioWindow.pseries()
        function = next(iter(bring_up(cpu, regs.phb_buid(0), window)))
        driver = DmaBurstDriver(cpu, window.to_cpu(function.bars[0].address))
        cpu.hcall(regs.HCall.H_PUT_TCE, LIOBN, 0, 0x20_0003)
        driver.store(0, 64, pattern=0x55)
        if driver.result().completed != 1 or cpu.read_memory(0x20_0000, 1) != b"\x55":
            raise VfioModelError("the first DMA did not arrive")
        first = time.perf_counter() - began
        with echo(launcher.directory) as trips:
            guestd, hostd = (launcher.daemons[role].pid for role in ("guestd", "hostd"))
            with opposite(asking=(os.getpid(), guestd), answering=(trips.pid, hostd)):
                yield Bench(launcher, link, cpu, driver, trips, first)
        link.close()


def rows() -> Iterator[Row]:
    """Every figure of the live system."""
    with running(_scenario()) as bench:
        yield Row("start to first DMA", bench.start_to_dma, "2.5 s", 2.5, aim=1.0)
        yield from _puts(bench)
        yield from _indirect(bench)
        yield from _busy(bench)
        yield from _recorded_boot(bench)
    with running(_scenario(kvm=True)) as bench:
        yield from _puts(bench, IN_KERNEL)
        yield from _indirect(bench, IN_KERNEL)
        yield from _busy(bench, IN_KERNEL)


def _in_turn(bench: Bench, batches: Sequence[Sequence[control.Command]]) -> tuple[list[list[float]], list[float]]:
    """The times of each small batch, and of one bare round trip behind each.

    A guest's hypercalls come one at a time, and find the host asleep. So does the bare round trip then find its peer:
    both pay for waking a process up, which on an idle core is most of either.
    """
    times, bare = [], []
    for batch in batches:
        times.append(bench.timed(batch))
        bare.append(bench.trips.once())
    return times, bare


def _back_to_back(bench: Bench, batches: Sequence[Sequence[control.Command]]) -> tuple[list[list[float]], list[float]]:
    """The times of large batches, and bare round trips without a pause: what processes pay that stay awake."""
    bare: list[float] = []
    times = []
    for batch in batches:
        bare += bench.trips.times(100)
        times.append(bench.timed(batch))
    return times, bare + bench.trips.times(100)


def _row(name: str, seconds: list[float], bare: list[float], *, aim: float | None = None, note: str = "") -> Row:
    extra = {"p99_us": round(percentile(seconds, 99) * 1e6, 1)}
    return Row(name, statistics.median(seconds), BARE, statistics.median(bare), aim, note=note, extra=extra)


def _map_and_unmap(number: int) -> list[control.Command]:
    ioba = 0x300_0000 + number % 512 * PAGE
    return [put(ioba, 0x40_0003), put(ioba, 0)]


def _puts(bench: Bench, where: str = "") -> Iterator[Row]:
    times, bare = _in_turn(bench, [_map_and_unmap(number) for number in range(ONE_AT_A_TIME)])
    yield _row(f"H_PUT_TCE, end to end{where}", [pair[0] for pair in times], bare, note=ALONE)
    yield _row(f"unmap with revoke, device idle{where}", [pair[1] for pair in times], bare, aim=2.0, note=ALONE)
    times, bare = _back_to_back(bench, [[call for n in range(128) for call in _map_and_unmap(n)]] * 8)
    yield _row(f"H_PUT_TCE, end to end{where}", [each for batch in times for each in batch[::2]], bare, note=PACKED)
    yield _row(
        f"unmap with revoke, device idle{where}", [each for batch in times for each in batch[1::2]], bare, note=PACKED
    )


def _indirect(bench: Bench, where: str = "") -> Iterator[Row]:
    page_list = b"".join(struct.pack(">Q", (0x400_0000 + i * PAGE * 3) | 3) for i in range(512))
    bench.cpu.write_memory(LIST_GPA, page_list)
    bench.cpu.flush()
    call = control.Hcall(regs.HCall.H_PUT_TCE_INDIRECT, [LIOBN, 0x100_0000, LIST_GPA, 512])
    clear = control.Hcall(regs.HCall.H_STUFF_TCE, [LIOBN, 0x100_0000, 0, 512])
    lists, puts = [], []
    for _ in range(8):
        lists += bench.timed([call, clear] * 16)[::2]
        puts += bench.timed([put(0x200_0000, 0x30_0003), put(0x200_0000, 0)] * 16)[::2]
    yield Row(
        f"H_PUT_TCE_INDIRECT of 512{where}",
        statistics.median(lists),
        "one H_PUT_TCE",
        statistics.median(puts),
        aim=2.0,
        extra={"p99_us": round(percentile(lists, 99) * 1e6, 1)},
    )


def _busy(bench: Bench, where: str = "") -> Iterator[Row]:
    command = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
    bench.device.start(0, 4096, 1 << 20, command=command)
    bench.cpu.flush()  # stores are posted, and what follows goes past this CPU
    times, bare = _in_turn(bench, [_map_and_unmap(number) for number in range(ONE_AT_A_TIME)])
    done = bench.device.stop()
    if done.failed or not done.completed:
        raise VfioModelError(f"the busy device did not stay busy: {done}")
    yield _row(f"unmap with revoke, device busy{where}", [pair[1] for pair in times], bare, note=ALONE)


def _recorded_boot(bench: Bench) -> Iterator[Row]:
    """The boot's puts and stuffs in their order; only the stuffs are counted."""
    calls: list[control.Command] = []
    stuffs: list[bool] = []
    cleared = 0
    for _, event in recorded_events(shipped.recording(RECORDING, Path())):
        if isinstance(event, StuffTce):
            start = event.ioba_after - event.npages * PAGE  # the log names the address behind the last entry
            calls.append(control.Hcall(regs.HCall.H_STUFF_TCE, [event.liobn, start, event.value, event.npages]))
            cleared += event.npages
        elif isinstance(event, PutTce):
            calls.append(control.Hcall(regs.HCall.H_PUT_TCE, [event.liobn, event.ioba, event.tce]))
        else:
            continue
        stuffs.append(isinstance(event, StuffTce))
    times, bare = _in_turn(bench, [[call] for call in calls])
    total = sum(each for (each,), is_stuff in zip(times, stuffs, strict=True) if is_stuff)
    yield Row(
        f"the recorded boot's {cleared:,} cleared TCEs",
        total,
        f"the bare round trips of its {sum(stuffs)} calls",
        statistics.median(bare) * sum(stuffs),
        aim=1.5,
        note=f"{ALONE}; what was never mapped stays in guestd",
    )
