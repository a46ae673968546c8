"""An assigned device asks nobody: it walks the host's table itself, cannot write it, and sends no message to do DMA."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes.rig import NIC, GuestRam, Live, target, until
from tests.processes.syscalls import MESSAGES, by_sampling, calls_during
from tests.processes.traffic import GPA, HAMMERED, IOVA, LIOBN, PAGE, PAGES, SIZE, Traffic
from vfio_model.iommu.spapr import regs

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def system() -> Iterator[tuple[Live, GuestRam]]:
    """The assigned device writes pages 0 to PAGES of the pool for ever."""
    with Live(scale=1) as live:
        traffic = Traffic(live, 1, background=True)
        for page in range(PAGES):
            traffic.hcall(regs.HCall.H_PUT_TCE, LIOBN, IOVA + page * PAGE, GPA + page * PAGE | 3)
        yield live, traffic.ram
        traffic.close()


def written_again(ram: GuestRam, times: int = 3) -> None:
    """Every page is cleared and written again, so many times."""
    for _ in range(times):
        for page in range(PAGES):
            ram.write(GPA + page * PAGE, bytes(SIZE))
        until("the device has written every page", lambda: all(_whole(ram, page) for page in range(PAGES)))


def _whole(ram: GuestRam, page: int) -> bool:
    return ram.read(GPA + page * PAGE, SIZE) == HAMMERED


@pytest.mark.parametrize("stopped", [["guestd"], ["guestd", "hostd", "notifier", "card"]], ids=["guest", "everybody"])
def test_dma_goes_on_while_others_are_stopped(system: tuple[Live, GuestRam], stopped: list[str]) -> None:
    live, ram = system
    with ExitStack() as stack:
        for role in stopped:
            process = stack.enter_context(target(live.pid(role)))
            process.signal(signal.SIGSTOP)
            process.stopped()
        written_again(ram)


def test_the_host_table_is_mapped_read_only(system: tuple[Live, GuestRam]) -> None:
    live, _ = system
    maps = [line.split(maxsplit=5) for line in Path(f"/proc/{live.pid(NIC)}/maps").read_text().splitlines()]
    modes = {name: {line[1] for line in maps if len(line) > 5 and f"/memfd:{name}" in line[5]} for name in MAPPED}
    assert modes == MAPPED


MAPPED = {"domain": {"r--s"}, "pe": {"r--s"}, "ram": {"rw-s"}, "lanes": {"rw-s"}}


@pytest.mark.parametrize("name", ["domain", "pe"])
def test_nobody_but_the_host_can_map_a_table_writable(system: tuple[Live, GuestRam], name: str) -> None:
    live, _ = system
    paths = Path(f"/proc/{live.pid(NIC)}/fd").iterdir()
    path = next(path for path in paths if f"/memfd:{name}" in os.readlink(path))
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)


@pytest.mark.parametrize("look", [calls_during, by_sampling], ids=["strace", "sampling"])
def test_a_dma_burst_sends_and_receives_nothing(system: tuple[Live, GuestRam], look: Callable[..., object]) -> None:
    live, ram = system
    calls = look(live.pid(NIC), lambda: written_again(ram, 20))
    assert isinstance(calls, dict) and calls, "nothing was seen at all"
    assert not MESSAGES & calls.keys(), f"messages while DMA runs: {calls}"
