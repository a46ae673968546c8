"""What the bench compares does what it says: nothing here looks at a time."""

from __future__ import annotations

import errno
import json
import os
import random
import socket

import numpy as np
import psutil
import pytest

from deploy.bench import atc, dma, emulated, mapped, nvme, pages, vfio_user, walks
from deploy.bench.measure import Row
from deploy.bench.report import show
from deploy.bench.stream_echo import echo
from deploy.inline.vfio_user import attached
from deploy.inline.vtd_guest import running
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Command
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.nvme.regs import NvmOpcode
from vfio_model.errors import VfioModelError
from vfio_model.memory.types import IOMMUAccessFlags
from vfio_model.vfio.vfio_user import DmaChange


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("with_descriptor", [False, True])
def test_an_echo_answers_keeps_no_descriptor_and_ends(with_descriptor: bool) -> None:
    read, write = os.pipe()
    with echo(48, 16, read if with_descriptor else None) as trips:
        before = open_descriptors(trips.pid)
        for _ in range(100):
            trips.once()
        assert open_descriptors(trips.pid) == before
    assert not psutil.pid_exists(trips.pid)
    os.close(read)
    os.close(write)


def test_the_bare_client_asks_what_ours_asks() -> None:
    memory = vfio_user.guest_memory()
    with vfio_user.served("edu") as (path, _), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        client = vfio_user.BareClient(sock)
        client.ask(Command.REGION_READ, wire.RegionAccess(edu.IDENTIFICATION, 0, 4), 36)
        client.ask(Command.DMA_MAP, wire.DmaMap(flags=3, size=4096), 16, memory)
        with pytest.raises(VfioModelError, match="not an answer"):
            client.ask(Command.DMA_MAP, wire.DmaMap(flags=3, size=4096), 16, memory)
        client.ask(Command.DMA_UNMAP, wire.DmaUnmap(size=4096), 40)
    os.close(memory)


def test_guestds_own_client_reads_maps_and_unmaps() -> None:
    memory = vfio_user.guest_memory()
    change = DmaChange(True, 0, 4096, 3, memory)
    with vfio_user.served("edu") as (path, pid), attached(path, "edu") as client:
        data = client.region_read(0, edu.IDENTIFICATION, 4)
        assert data == edu.IDENTIFICATION_VALUE.to_bytes(4, "little")
        assert client.dma_many([change]) == [0]
        assert client.dma_many([change]) == [errno.EEXIST]
    assert not psutil.pid_exists(pid)
    os.close(memory)


@pytest.mark.parametrize("view", [mapped.large(), mapped.paged()], ids=["large", "paged"])
def test_what_is_mapped_is_where_the_bare_copy_puts_it(view: mapped.Mapped) -> None:
    for number in random.Random(3).sample(range(len(view.iovas)), 50):
        data = number.to_bytes(8, "little")
        assert not view.dma.write(view.iovas[number], data)
        assert view.ram[view.places[number] :][:8] == data


def test_the_controller_of_the_bench_moves_what_it_is_told() -> None:
    controller, numbers = nvme.Controller(), random.Random(5)
    data = numbers.randbytes(nvme.SEQUENTIAL)
    first, second = 0x100_0000, 0x200_0000
    controller.ram[first : first + len(data)] = data
    controller.fill([nvme.Transfer(NvmOpcode.WRITE, 0, first, len(data))] * nvme.ENTRIES)
    for _ in range(3):
        controller.carry_out(nvme.ENTRIES - 1)  # the ends of both queues are passed
    controller.fill([nvme.Transfer(NvmOpcode.READ, n * 4096, second + n * 4096, 4096) for n in range(nvme.ENTRIES)])
    for _ in range(nvme.ENTRIES // 32):
        controller.carry_out(32)
    assert bytes(controller.ram[second : second + len(data)]) == data


def test_a_command_that_fails_ends_the_bench() -> None:
    controller = nvme.Controller()
    controller.fill([nvme.Transfer(NvmOpcode.READ, nvme.DISK, 0x100_0000, 4096)] * nvme.ENTRIES)
    with pytest.raises(VfioModelError, match="status"):
        controller.carry_out(1)


def test_rows_are_shown_with_what_was_judged(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("slow", 2.0, "limit", 1.0, aim=1.5), Row("fast", 1.0, "limit", 1.0, aim=1.5), Row("plain", 1.0)]
    show(rows, 3.0, as_json=False)
    assert "1 of 2 aims met; not: slow" in capsys.readouterr().out
    show(rows, 3.0, as_json=True)
    shown = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["name"], row["ratio"], row["met"]) for row in shown] == [
        ("slow", 2.0, False),
        ("fast", 1.0, True),
        ("plain", None, None),
    ]


@pytest.mark.parametrize("compiled", [True, False])
def test_the_caching_device_of_the_bench_writes_where_the_assigned_path_does(compiled: bool) -> None:
    view = dma.assigned()
    device = atc.CachingDevice(view, compiled=compiled)
    iovas = [view.start + page * dma.PAGE for page in random.Random(5).sample(range(dma.RAM_BYTES // dma.PAGE), 20)]
    device.fill(iovas)
    asked, read = device.asked, bytearray(8)
    for number, iova in enumerate(iovas, 1):
        plain, own = number.to_bytes(8, "little"), (number << 32).to_bytes(8, "little")
        assert not device.plain.write(iova + 8, plain)
        assert not view.impl.read(iova + 8, read) and read == plain
        assert device.atc.access(iova + 16, memoryview(own), True)[0] == 8
        assert not view.impl.read(iova + 16, read) and read == own
    assert device.asked == asked == 2 * len(iovas)


def test_the_devices_of_the_bench_ask_for_pages_and_follow_invalidations() -> None:
    with running(pages.PageAsker, 2) as (guest, pids):
        first, second = pages.cards_of(guest, 2)
        before = guest.cpu.read_memory(pages.DATA, 1)
        assert pages.fault(guest, first, pages.IOVA + pages.PAGE) > 0
        assert before == b"\0" and guest.cpu.read_memory(pages.DATA, 1) == b"\x55", "its byte"
        assert guest.requests.requests == 1
        pages.invalidate(guest, second)
        guest.driver.map(second.domain, pages.IOVA, pages.DATA + pages.PAGE, pages.PAGE)
        pages.invalidate(guest, second)
        second.do(pages.FILL)
        assert guest.cpu.read_memory(pages.DATA + pages.PAGE, 1) == b"\x55"
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_emulated_device_of_the_bench_is_translated() -> None:
    view = emulated.emulated()
    for number, (iova, place) in enumerate(zip(view.iovas, view.places, strict=True)):
        data = number.to_bytes(8, "little")
        assert not view.device.write(iova, data) and view.machine.read_memory(place, 8) == data
    view.driver.unmap(view.domain, view.iovas[0], emulated.PAGE)
    assert view.device.write(view.iovas[0], b"x"), "what the guest takes away is away"


@pytest.mark.parametrize("count", [1 << 9, walks.PAGES])
def test_the_tables_of_the_bench_map_every_page_once(count: int) -> None:
    region = walks._region(walks._tables(count))
    pieces = region.translate_many(np.arange(count, dtype=np.uint64) * np.uint64(4096), IOMMUAccessFlags.RO, 0)
    assert pieces is not None and all(pieces[2])
    assert sorted(pieces[1].tolist()) == [page * 4096 for page in range(count)]
