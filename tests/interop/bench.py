"""``python -m tests.interop.bench``: what our devices cost a stock QEMU, and a stock Linux in it.

Its rows are those of ``vfio-model bench`` (:mod:`deploy.bench.measure`). QEMU has to be there (``tools/get-qemu``); it
runs without KVM, so that what a guest does is slow on both sides of a ratio.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from deploy.bench.measure import Row
from deploy.bench.placement import opposite
from deploy.bench.report import show
from deploy.bench.stream_echo import Trips, echo
from deploy.bench.vfio_user import ECHO_FD, guest_memory
from protocols.vfio_user.messages import HEADER_SIZE, DmaMap
from tests.interop.pc import Function, PcQemu, vfio_user
from tests.interop.pc_guest import boot
from tests.interop.pc_iommus import PAGE, READ, WRITE, Vtd
from tests.interop.served import Served, qemu_folder
from vfio_model.devices.edu import regs as edu

SLOT = 2
PAGES = 512
ROUNDS = 15
IOVA, RAM = 0x800_0000, 0x400_0000
DISK = 64 << 20
OURS, QEMUS = "ours", "qemu"


# -- a vIOMMU's maps


def replays(where: Path) -> Iterator[Row]:
    """QEMU unmaps and maps again all that a domain holds: 512 pages, scattered, a DMA_MAP with a descriptor each."""
    with ExitStack() as stack:
        served = stack.enter_context(Served("edu", where / "edu"))
        pc = stack.enter_context(PcQemu([*Vtd.options, *vfio_user(served.socket, SLOT)]))
        memory = guest_memory()
        stack.callback(os.close, memory)
        trips = stack.enter_context(echo(HEADER_SIZE + DmaMap.SIZE, HEADER_SIZE, memory))
        function = Function(pc, SLOT)
        function.bring_up()
        iommu = Vtd(pc, SLOT << 3)
        iommu.enable()
        for number in range(PAGES):
            iommu.map(IOVA + number * PAGE, RAM + number * 2 * PAGE, READ | WRITE)
        stack.enter_context(opposite(asking=(os.getpid(), pc.pid), answering=(served.pid, trips.pid)))
        mine, bare = [], []
        for _ in range(ROUNDS):
            mine.append(_timed(lambda: _replay(iommu, function)))
            bare.append(_timed(lambda: _trips(trips)))
        _check(pc, function)
    yield Row(
        f"QEMU: a domain of {PAGES} pages mapped again",
        statistics.median(mine),
        f"{ECHO_FD}, {PAGES} times",
        statistics.median(bare),
        given_ratio=statistics.median(m / b for m, b in zip(mine, bare, strict=True)),
        note="intel-iommu,caching-mode=on; with the unmaps before",
    )


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _replay(iommu: Vtd, function: Function) -> None:
    """The device's answer comes when it has taken all maps."""
    iommu.invalidate_contexts()
    function.load(edu.IDENTIFICATION)


def _trips(trips: Trips) -> None:
    for _ in range(PAGES):
        trips.once()


def _check(pc: PcQemu, function: Function) -> None:
    """The device reaches both ends of the domain."""
    last, data = PAGES - 1, bytes(range(64))
    pc.write(RAM, data)
    for source, target, way in (
        (IOVA, edu.BUFFER_ADDRESS, 0),
        (edu.BUFFER_ADDRESS, IOVA + last * PAGE, edu.DMA_TO_RAM),
    ):
        for register, value in ((edu.DMA_SRC, source), (edu.DMA_DST, target), (edu.DMA_COUNT, len(data))):
            function.store(register, value, 8)
        function.store(edu.DMA_COMMAND, edu.DMA_RUN | way)
        pc.wait("edu's transfer", lambda: not function.load(edu.DMA_COMMAND) & edu.DMA_RUN)
    assert pc.read(RAM + last * 2 * PAGE, len(data)) == data, "what edu read arrived where it wrote it"


# -- a disk


@dataclass(frozen=True, slots=True)
class Load:
    """``count`` direct reads of ``size`` bytes by each of ``tasks`` processes."""

    name: str
    size: int
    count: int
    tasks: int = 1

    @property
    def what(self) -> str:
        """For people."""
        size = f"{self.size >> 10} KiB" if self.size < 1 << 20 else f"{self.size >> 20} MiB"
        at_once = "one at a time" if self.tasks == 1 else f"{self.tasks} at a time"
        return f"{size} direct reads, {at_once}"


LOADS = (Load("single", 4096, 2000), Load("parallel", 4096, 200, 32), Load("sequential", 1 << 20, 64))
TURNS = 3
SCRIPT = """\
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/nvme0n1 ] && [ -b /dev/nvme1n1 ] && break; sleep 1; done
disk() { for c in /sys/class/nvme/*; do grep -q "^$1 *$" $c/serial && echo /dev/${c##*/}n1; done; }
load() {
    dev=$(disk $2)
    [ -b "$dev" ] || fail no disk $2
    read from _ < /proc/uptime
    n=0
    while [ $n -lt $5 ]; do
        dd if=$dev of=/dev/null bs=$3 count=$4 iflag=direct status=none || fail dd &
        n=$((n + 1))
    done
    wait
    read to _ < /proc/uptime
    echo "bench: $1 $2 $from $to"
}
"""


def disks(where: Path) -> Iterator[Row]:
    """Our NVMe model and QEMU's under the same Linux, in the same boot, in turn; both read files."""
    for name in (OURS, QEMUS):
        with (where / name).open("wb") as file:
            for _ in range(DISK >> 20):
                file.write(os.urandom(1 << 20))
    steps = [
        f"load {load.name} {name} {load.size} {load.count} {load.tasks}"
        for load in LOADS
        for _ in range(TURNS)
        for name in (OURS, QEMUS)
    ]
    with Served("nvme", where / "nvme", drive=f"file:{where / OURS}", serial=OURS) as served:
        drive = f"driver=raw,node-name=disk,file.driver=file,file.filename={where / QEMUS}"
        devices = [
            *vfio_user(served.socket, SLOT),
            "-blockdev", drive, "-device", f"nvme,drive=disk,serial={QEMUS},addr={SLOT + 1:x}",
        ]  # fmt: skip
        said, _ = boot(qemu_folder(), where, devices, ("nvme",), SCRIPT + "\n".join(steps) + "\n")
    yield from (_compared(load, said) for load in LOADS)


def _compared(load: Load, said: str) -> Row:
    times: dict[str, list[float]] = {OURS: [], QEMUS: []}
    for name, start, end in re.findall(rf"bench: {load.name} (\w+) ([\d.]+) ([\d.]+)", said):
        times[name].append((float(end) - float(start)) / (load.count * load.tasks))
    mine, theirs = times[OURS], times[QEMUS]
    assert len(mine) == len(theirs) == TURNS, f"every load ran:\n{said}"
    seconds = statistics.median(mine)
    speed = f"{1 / seconds:,.0f} IOPS" if load.size < 1 << 20 else f"{load.size / seconds / 1e9:.2f} GB/s"
    return Row(
        f"Linux in QEMU, our nvme: {load.what}",
        seconds,
        "QEMU's own nvme, same guest",
        statistics.median(theirs),
        given_ratio=statistics.median(m / t for m, t in zip(mine, theirs, strict=True)),
        note=f"{speed}; TCG",
    )


PARTS = {"replay": replays, "disk": disks}


@click.command()
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="Measure this part alone (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON; times in seconds.")
def command(only: tuple[str, ...], as_json: bool) -> None:
    """Measure our devices in stock QEMU. Takes about a minute."""
    began = time.monotonic()
    rows: list[Row] = []
    for part in only or PARTS:
        click.echo(f"{part} ...", err=True)
        where = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
        try:
            rows += PARTS[part](where)
        finally:
            shutil.rmtree(where)
    show(rows, time.monotonic() - began, as_json=as_json)


if __name__ == "__main__":
    command()
