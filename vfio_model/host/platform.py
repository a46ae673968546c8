"""What POWER platforms say about the size and depth of a TCE table.

*powernv* (bare metal) has multi-level tables and keeps a user-space copy beside the hardware's; *pseries* (the host is
itself a guest) has one level and one copy, and takes ``levels`` of 0 to mean that level. Sources: the description of
the SPAPR TCE container in the kernel's ``Documentation/driver-api/vfio.rst``, and ``include/uapi/linux/vfio.h``,
``VFIO_IOMMU_SPAPR_TCE_CREATE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, ENOMEM
from typing import Literal

from vfio_model.ranges import align_up

PlatformName = Literal["powernv", "pseries"]

MAX_LEVELS = 5
_DEPTH_LIMIT = 55


@dataclass(frozen=True, slots=True)
class Geometry:
    """A TCE table: ``entries`` (a power of two) in ``levels`` levels of tables with ``2**level_shift`` entries each."""

    page_shift: int
    window_size: int
    levels: int
    level_shift: int

    @property
    def entries(self) -> int:
        """TCEs of the whole window."""
        return self.window_size >> self.page_shift

    @property
    def top_entries(self) -> int:
        """Entries of the topmost table that can be reached."""
        return max(1, self.entries >> (self.level_shift * (self.levels - 1)))


def table_geometry(platform: PlatformName, page_shift: int, window_size: int, levels: int, host_page: int) -> Geometry:
    """The table for a window; sizes in bytes.

    :raise OSError: EINVAL when the window is no power of two, holds no page, or is too deep; on *powernv* also when
        levels is not 1..5. ENOMEM on *pseries* for more than one level, before the window is looked at, as accounting
        fails there.
    """
    window_shift = window_size.bit_length() - 1
    if platform == "powernv" and not 1 <= levels <= MAX_LEVELS:
        raise OSError(EINVAL, f"levels {levels} is not 1..{MAX_LEVELS}")
    if platform == "pseries" and levels > 1:
        raise OSError(ENOMEM, f"levels {levels}: this platform has one")
    if window_size != 1 << max(window_shift, 0) or window_shift < page_shift:
        raise OSError(EINVAL, f"window size {window_size:#x} is not a power of two of at least one page")
    levels = max(levels, 1)
    per_level = -(-(window_shift - page_shift) // levels)
    level_shift = max(per_level, host_page.bit_length() - 1 - 3)
    if level_shift * levels + page_shift >= _DEPTH_LIMIT:
        raise OSError(EINVAL, f"{levels} levels of 2^{level_shift} entries and page shift {page_shift} are too deep")
    return Geometry(page_shift, window_size, levels, level_shift)


def table_pages(platform: PlatformName, geometry: Geometry, host_page: int) -> int:
    """Host pages that a table counts against the memlock limit, as if every level were full."""
    size = geometry.entries * 8
    if platform == "pseries":
        return align_up(size, host_page) // host_page
    direct = 8 << geometry.level_shift
    total = 0
    for _ in range(geometry.levels):
        total += align_up(size, direct)
        size = max(size // direct * 8, direct)
    return 2 * total // host_page
