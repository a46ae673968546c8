"""``/dev/vfio/vfio``: a container before and after it has a type.

::

    ┌──────────┐ first group   ┌──────────┐ SET_IOMMU   ┌───────┐
    │ no group │ ────────────► │ no type  │ ──────────► │ typed │
    └──────────┘ ◄──────────── └──────────┘             └───┬───┘
          ▲      last group leaves                          │
          └──────────────── last group leaves: all state lost

What the type adds is an :class:`IommuDriver`. A container whose file is closed lives on while groups are in it.

Sources: ``include/uapi/linux/vfio.h`` (``VFIO_SET_IOMMU``, ``VFIO_GROUP_UNSET_CONTAINER``: "all state lost, effectively
also returning the container to an initial state") and the kernel's ``Documentation/driver-api/vfio.rst``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import EFAULT, EINVAL, ENODEV, ENOTTY
from typing import Protocol, TypeVar

from vfio_model.host.group import Domain, Group
from vfio_model.host.mm import Mm
from vfio_model.host.pending import Revocation
from vfio_model.uapi.vfio import VFIO_API_VERSION, Ioctl, IommuType, Struct

S = TypeVar("S", bound=Struct)

OFFERED = frozenset({IommuType.VFIO_SPAPR_TCE_v2_IOMMU})
"""What SET_IOMMU takes."""
EXTENSIONS = OFFERED | {IommuType.VFIO_EEH}
"""What CHECK_EXTENSION says yes to."""
_GET_API_VERSION, _CHECK_EXTENSION, _SET_IOMMU = (
    int(Ioctl.VFIO_GET_API_VERSION),
    int(Ioctl.VFIO_CHECK_EXTENSION),
    int(Ioctl.VFIO_SET_IOMMU),
)
KNOWN = frozenset(
    {IommuType.VFIO_TYPE1_IOMMU, IommuType.VFIO_SPAPR_TCE_IOMMU, IommuType.VFIO_TYPE1v2_IOMMU, IommuType.VFIO_EEH}
)
"""Numbers that exist and that no container of this host can have as its type."""


class IommuDriver(Domain, Protocol):
    """What a container's type does. Operations that take a right away put their end on the revocation."""

    def attach(self, group: Group) -> None:
        """Take ``group`` in and give it the windows there are. :raise OSError: when it does not fit."""

    def detach(self, group: Group, revocation: Revocation) -> None:
        """Take every window away from ``group``."""

    def release(self, revocation: Revocation) -> None:
        """Drop everything; no group is left."""

    def ioctl(self, mm: Mm, cmd: int, arg: bytes, revocation: Revocation) -> bytes:
        """One ioctl. :raise OSError: as documented for it."""

    def ioctl_many(self, mm: Mm, cmd: int, args: memoryview, count: int, revocation: Revocation) -> bool:
        """Do all ``count`` structs at once if nothing can fail or needs care; False: nothing was done, do them
        singly.
        """


class VfioContainer:
    """A container file. ``make_driver(type)`` builds what SET_IOMMU asks for."""

    def __init__(self, handle: int, make_driver: Callable[[IommuType], IommuDriver]) -> None:
        self.handle = handle
        self.groups: list[Group] = []
        self.driver: IommuDriver | None = None
        self._make_driver = make_driver

    def ioctl(self, mm: Mm, cmd: int, arg: bytes, revocation: Revocation) -> bytes:
        """:raise OSError: ENOTTY for what is no ioctl of this container, EINVAL for one that needs a type first."""
        if cmd == _GET_API_VERSION:
            return pack_int(VFIO_API_VERSION)
        if cmd == _CHECK_EXTENSION:
            return pack_int(int(unpack_int(arg) in EXTENSIONS))
        if cmd == _SET_IOMMU:
            self._set_iommu(unpack_int(arg))
            return b""
        if self.driver is None:
            raise OSError(ENOTTY if cmd not in Ioctl.__members__.values() else EINVAL, "the container has no type yet")
        return self.driver.ioctl(mm, cmd, arg, revocation)

    def _set_iommu(self, wanted: int) -> None:
        if not self.groups or self.driver is not None:
            raise OSError(EINVAL, "no group is attached" if not self.groups else "the container has a type already")
        if wanted not in OFFERED:
            raise OSError(EINVAL if wanted in KNOWN else ENODEV, f"IOMMU type {wanted} is not served by this host")
        driver = self._make_driver(IommuType(wanted))
        for group in self.groups:
            try:
                driver.attach(group)
            except OSError:
                self._undo_attach(driver)
                raise
        self.driver = driver

    def _undo_attach(self, driver: IommuDriver) -> None:
        revocation = Revocation()
        driver.release(revocation)
        assert not revocation.actions, "a container without windows has nothing to revoke"

    def attach(self, group: Group) -> None:
        """``VFIO_GROUP_SET_CONTAINER``. :raise OSError: as the type's attach does."""
        if self.driver is not None:
            self.driver.attach(group)
        self.groups.append(group)
        group.container = self

    def detach(self, group: Group, revocation: Revocation) -> None:
        """``VFIO_GROUP_UNSET_CONTAINER``; when the last group goes, so does the type and all its state."""
        if self.driver is not None:
            self.driver.detach(group, revocation)
        self.groups.remove(group)
        group.container = None
        if self.driver is not None and not self.groups:
            self.driver.release(revocation)
            self.driver = None


def pack_int(value: int) -> bytes:
    """A non-negative int as the result of an ioctl that returns one."""
    return struct.pack("=I", value)


def unpack_int(arg: bytes) -> int:
    """The argument of an ioctl that takes an int. :raise OSError: EFAULT when it is too short."""
    if len(arg) < 4:
        raise OSError(EFAULT, "the argument is shorter than an int")
    value: int = struct.unpack_from("=I", arg)[0]
    return value


def copy_in(kind: type[S], arg: bytes) -> S:
    """The struct that a caller passed. :raise OSError: as :func:`fields_in`."""
    return kind(*fields_in(kind, arg))


def fields_in(kind: type[Struct], arg: bytes) -> tuple[int, ...]:
    """The fields of the struct that a caller passed, argsz first.

    :raise OSError: EFAULT when there are fewer bytes than the struct has, EINVAL when its argsz says so.
    """
    if len(arg) < kind.SIZE:
        raise OSError(EFAULT, f"{kind.__name__}: {len(arg)} bytes of {kind.SIZE} can be read")
    fields = kind.FORMAT.unpack_from(arg)
    if fields[0] < kind.SIZE:
        raise OSError(EINVAL, f"{kind.__name__}: argsz {fields[0]} is below {kind.SIZE}")
    return fields
