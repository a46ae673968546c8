"""Guest memory for a machine in this process that is only looked at."""

from __future__ import annotations

import mmap
import os


def sparse_ram(size: int) -> memoryview:
    """Zeroed memory that costs what is touched; it goes when the machine that holds it goes."""
    fd = os.memfd_create("check-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        return memoryview(mmap.mmap(fd, size))
    finally:
        os.close(fd)
