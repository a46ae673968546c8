"""How a kernel enables what lets a function share address spaces: PASID, page requests, translation requests.

PCI Express Base Specification, 10.5 and 7.8.9. Linux's order is PASID first, then PRI, then ATS; PASID cannot be
changed while ATS is enabled.
"""

from __future__ import annotations

from vfio_model.guest_drivers.pci import ConfigAccess, DriverError
from vfio_model.pci.config_space import EXTENDED_NEXT_SHIFT, FIRST_EXTENDED
from vfio_model.pci.translation_caps import (
    ATS_ENABLE,
    CAP_ID_ATS,
    CAP_ID_PASID,
    CAP_ID_PRI,
    PASID_CONTROL,
    PASID_ENABLE,
    PASID_EXEC,
    PASID_PRIV,
    PRI_ENABLE,
    PRI_RESET,
    STU_UNIT_SHIFT,
)

PRI_ALLOCATION = 32
"""Page requests that Linux lets a function have outstanding."""
_MOST = 512


def find_extended_capability(config: ConfigAccess, devfn: int, cap_id: int) -> int | None:
    """The offset of the first extended capability ``cap_id``, or None."""
    offset = FIRST_EXTENDED
    for _ in range(_MOST):  # a broken list can be a ring
        header = config.read(devfn, offset, 4)
        if header in (0, 0xFFFF_FFFF):
            return None
        if header & 0xFFFF == cap_id:
            return offset
        offset = header >> EXTENDED_NEXT_SHIFT
        if not offset:
            return None
    return None


def _capability(config: ConfigAccess, devfn: int, cap_id: int, what: str) -> int:
    found = find_extended_capability(config, devfn, cap_id)
    if found is None:
        raise DriverError(f"function {devfn:#x} has no {what} capability")
    return found


def enable_pasid(config: ConfigAccess, devfn: int) -> None:
    """With every permission that the function has.

    :raise DriverError: it has no such capability.
    """
    at = _capability(config, devfn, CAP_ID_PASID, "PASID")
    permissions = config.read(devfn, at + 4, 2) & (PASID_EXEC | PASID_PRIV)
    config.write(devfn, at + 6, 2, PASID_ENABLE | permissions & PASID_CONTROL)


def enable_pri(config: ConfigAccess, devfn: int, allocation: int = PRI_ALLOCATION) -> None:
    """At most ``allocation`` page requests may be outstanding, and no more than the function can have.

    :raise DriverError: it has no such capability.
    """
    at = _capability(config, devfn, CAP_ID_PRI, "page request")
    config.write(devfn, at + 4, 2, PRI_RESET)
    config.write(devfn, at + 12, 4, min(allocation, config.read(devfn, at + 8, 4)))
    config.write(devfn, at + 4, 2, PRI_ENABLE)


def enable_ats(config: ConfigAccess, devfn: int, page_shift: int = STU_UNIT_SHIFT) -> None:
    """No translation, and no invalidation, is smaller than ``1 << page_shift`` bytes.

    :raise DriverError: it has no such capability.
    """
    at = _capability(config, devfn, CAP_ID_ATS, "ATS")
    config.write(devfn, at + 6, 2, ATS_ENABLE | page_shift - STU_UNIT_SHIFT)


def disable(config: ConfigAccess, devfn: int) -> None:
    """All three off, in the opposite order."""
    for cap_id, control in ((CAP_ID_ATS, 6), (CAP_ID_PRI, 4), (CAP_ID_PASID, 6)):
        at = find_extended_capability(config, devfn, cap_id)
        if at is not None:
            config.write(devfn, at + control, 2, 0)
