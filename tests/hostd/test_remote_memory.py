"""DMA_MAP and DMA_UNMAP of a remote device's client, against a dict of bytes."""

from __future__ import annotations

import errno
import os
import random

import pytest

from hostd.remote_memory import RemoteMemory
from protocols.transport.shm import create_memory
from protocols.vfio_user.messages import DmaMap, DmaUnmap

PAGE = 4096


def raised(memory: RemoteMemory, request: DmaMap, fds: list[int]) -> int | None:
    with pytest.raises(OSError) as refused:
        memory.add(request, fds)
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)
    return refused.value.errno


def test_a_file_is_mapped_once_and_sliced() -> None:
    with create_memory("ram", 16 * PAGE) as file:
        memory = RemoteMemory()
        memory.add(DmaMap(32, 3, 0, 0x10000, PAGE), [os.dup(file.fd)])
        memory.add(DmaMap(32, 3, 8 * PAGE, 0x20000, PAGE), [os.dup(file.fd)])
        low, high = memory.maps.segment(0x10010), memory.maps.segment(0x20000)
        assert low is not None and high is not None and low[0] == 0x10000
        assert low[1].obj is high[1].obj
        high[1][0] = 7
        assert file.view[8 * PAGE] == 7
        del low, high
        memory.close()
        assert len(memory) == 0


def test_refusals_close_the_descriptor() -> None:
    with create_memory("ram", 4 * PAGE) as file:
        memory = RemoteMemory()
        memory.add(DmaMap(32, 3, 0, PAGE, 2 * PAGE), [os.dup(file.fd)])
        for request, number in (
            (DmaMap(32, 3, 0, 0, 0), errno.EINVAL),
            (DmaMap(32, 7, 0, 0, PAGE), errno.EINVAL),
            (DmaMap(32, 3, 0, (1 << 64) - PAGE, 2 * PAGE), errno.EINVAL),
            (DmaMap(32, 3, 3 * PAGE, 16 * PAGE, 2 * PAGE), errno.EINVAL),
            (DmaMap(32, 3, 0, 2 * PAGE, PAGE), errno.EEXIST),
        ):
            assert raised(memory, request, [os.dup(file.fd)]) == number
        null = os.open("/dev/null", os.O_RDWR)
        assert raised(memory, DmaMap(32, 3, 0, 0x100000, PAGE), [null]) == errno.EPERM
        memory.close()


def test_an_unmap_takes_what_lies_inside_and_cuts_nothing() -> None:
    rng = random.Random(1)
    with create_memory("ram", 64 * PAGE) as file:
        memory = RemoteMemory()
        live: dict[int, int] = {}
        for _ in range(300):
            start, pages = rng.randrange(64), rng.randrange(1, 5)
            if rng.random() < 0.6:
                overlap = any(at < start + pages and start < at + size for at, size in live.items())
                request = DmaMap(32, rng.choice([1, 3]), 0, start * PAGE, pages * PAGE)
                if overlap:
                    assert raised(memory, request, [os.dup(file.fd)]) == errno.EEXIST
                else:
                    memory.add(request, [os.dup(file.fd)])
                    live[start] = pages
                continue
            pages *= 4
            touched = {at: size for at, size in live.items() if at < start + pages and start < at + size}
            cut = any(at < start or at + size > start + pages for at, size in touched.items())
            if cut:
                with pytest.raises(OSError):
                    memory.remove(*memory.touched(DmaUnmap(24, 0, start * PAGE, pages * PAGE)))
            else:
                gone = memory.remove(*memory.touched(DmaUnmap(24, 0, start * PAGE, pages * PAGE)))
                assert gone == PAGE * sum(touched.values())
                live = {at: size for at, size in live.items() if at not in touched}
        assert len(memory) == len(live)
        memory.close()


def test_a_look_for_files_that_shrank_does_not_go_through_all_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done after every request, and there may be 65535 maps."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 2 * PAGE)
    memory = RemoteMemory()
    memory.add(DmaMap(32, 3, 0, 0, 2 * PAGE), [fd])
    assert memory.guarded
    with monkeypatch.context() as patch:
        patch.setattr(memory, "maps", None)
        assert memory.shrunk() == []
    memory.close()
