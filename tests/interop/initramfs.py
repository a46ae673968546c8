"""An initramfs in the "newc" format of cpio (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import lzma
import stat
from collections.abc import Sequence
from pathlib import Path

_MAGIC = "070701"
_DIRECTORIES = ("bin", "dev", "proc", "sys", "lib", "lib/modules")
_CONSOLE = (5, 1)


class Initramfs:
    """Entries in the order in which they were added; :meth:`archive` ends it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        for name in _DIRECTORIES:
            self._add(name, stat.S_IFDIR | 0o755)
        self._add("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE)

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """A regular file."""
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def archive(self) -> bytes:
        """The archive."""
        self._add("TRAILER!!!", 0)
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        links, owner, mtime, checksum = 1, 0, 0, 0
        numbers = (self._inode, mode, owner, owner, links, mtime, len(data), 0, 0, *device, len(name) + 1, checksum)
        header = _MAGIC + "".join(f"{number:08X}" for number in numbers)
        self._parts += [_padded(header.encode() + name.encode() + b"\0"), _padded(data)]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def modules(tree: Path, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """The modules ``wanted`` below ``tree`` (lib/modules/VERSION) and what they need, in the order of loading: names
    and contents, uncompressed. What is built into the kernel is left out.

    :raise KeyError: when a module is not there.
    """
    needs: dict[str, list[str]] = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    built_in = {_name(path) for path in (tree / "modules.builtin").read_text().split()}
    by_name = {_name(path): path for path in needs}
    order: list[str] = []
    for name in wanted:
        if name not in built_in:
            path = by_name[name]
            order += [each for each in (*reversed(needs[path]), path) if each not in order]
    return [(f"{_name(path)}.ko", _plain(tree / path)) for path in order]


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0]


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
