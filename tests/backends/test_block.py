from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from protocols.transport.block import FileDisk, open_file
from vfio_model.backends.block import BlockBackend, MemoryDisk, open_memory, parse_size
from vfio_model.backends.opening import open_block
from vfio_model.errors import ConfigError

SIZE = 300 << 10
Open = Callable[..., BlockBackend]


@pytest.fixture(params=["memory", "file"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens a disk of SIZE zeroes."""

    def open_(*, read_only: bool = False) -> BlockBackend:
        if request.param == "memory":
            return MemoryDisk(SIZE, read_only=read_only)
        path = tmp_path / "disk"
        path.write_bytes(bytes(SIZE))
        disk = FileDisk(str(path), read_only=read_only)
        request.addfinalizer(disk.close)
        return disk

    return open_


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_against_a_bytearray(opened: Open, seed: int) -> None:
    rng, disk, shadow = random.Random(seed), opened(), bytearray(SIZE)
    for _ in range(200):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([1, 512, 4096, 70_000, 200_000]), SIZE - offset)
        match rng.randrange(3):
            case 0:
                data = rng.randbytes(length)
                disk.write(offset, data)
                shadow[offset : offset + length] = data
            case 1:
                disk.write_zeroes(offset, length)
                shadow[offset : offset + length] = bytes(length)
            case _:
                out = bytearray(length)
                disk.read(offset, out)
                assert out == shadow[offset : offset + length]
    disk.flush()
    out = bytearray(SIZE)
    disk.read(0, out)
    assert out == shadow


def test_discard_keeps_the_neighbours(opened: Open) -> None:
    disk = opened()
    disk.write(0, b"\x11" * SIZE)
    disk.discard(1000, 150_000)
    out = bytearray(SIZE)
    disk.read(0, out)
    assert out[:1000] == b"\x11" * 1000 and out[151_000:] == b"\x11" * (SIZE - 151_000)
    assert set(out[1000:151_000]) <= {0, 0x11}


def test_read_only_refuses_to_change(opened: Open) -> None:
    disk = opened(read_only=True)
    changes = (lambda: disk.write(0, b"x"), lambda: disk.discard(0, 512), lambda: disk.write_zeroes(0, 512))
    for change in changes:
        with pytest.raises(OSError, match=r"ead-only|Bad file") as raised:
            change()
        assert raised.value.errno in (errno.EROFS, errno.EBADF)
    disk.read(0, out := bytearray(b"x"))
    assert out == b"\0"


def test_file_has_one_writer_and_many_readers(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    writer = open_file(f"file:{path}")
    with pytest.raises(ConfigError, match="another process uses it"):
        open_file(str(path))
    writer.close()
    first, second = open_file(f"file:{path},ro"), open_file(f"{path},ro")
    assert first.size == second.size == SIZE
    first.close()
    second.close()
    second.close()


def test_file_that_shrinks_is_an_io_error(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    disk = FileDisk(str(path))
    path.write_bytes(b"short")
    with pytest.raises(OSError, match="shrunk"):
        disk.read(4096, bytearray(512))
    disk.close()


@pytest.mark.parametrize("name", ["missing", "empty", "directory"])
def test_what_is_no_disk_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError) as raised:
        FileDisk(str(tmp_path / name))
    assert str(tmp_path / name) in str(raised.value)


def test_forms() -> None:
    assert parse_size("64M", where="x") == 64 << 20 and parse_size("512", where="x") == 512
    for broken in ("", "0", "-1", "64MB", "1.5G", "9999999T"):
        with pytest.raises(ConfigError):
            parse_size(broken, where="x")
    disk = open_memory("mem:1G")
    assert disk is not None and disk.size == 1 << 30
    assert open_memory("/tmp/disk") is None
    assert open_block(object(), "").size == 64 << 20
    with pytest.raises(ConfigError, match="cannot be opened here"):
        open_block(object(), "/tmp/disk")
