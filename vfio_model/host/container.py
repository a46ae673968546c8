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
from collections.abc import Callable, Collection
from errno import EFAULT, EINVAL, ENODEV, ENOTTY
from typing import Protocol, TypeVar

from vfio_model.host.group import Domain, Group
from vfio_model.host.mm import Mm
from vfio_model.host.pending import Revocation
from vfio_model.uapi.containers import DRIVER_PROPERTIES, DRIVERS, IOMMU_TYPES, KIND_OF_TYPE, ContainerKind
from vfio_model.uapi.vfio import VFIO_API_VERSION, Ioctl, Struct

S = TypeVar("S", bound=Struct)

_GET_API_VERSION, _CHECK_EXTENSION, _SET_IOMMU = (
    int(Ioctl.VFIO_GET_API_VERSION),
    int(Ioctl.VFIO_CHECK_EXTENSION),
    int(Ioctl.VFIO_SET_IOMMU),
)


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
    """A container file. ``make_driver(kind)`` builds what SET_IOMMU asks for, which is one of ``kinds``."""

    def __init__(
        self, handle: int, kinds: Collection[ContainerKind], make_driver: Callable[[ContainerKind], IommuDriver]
    ) -> None:
        self.handle = handle
        self.groups: list[Group] = []
        self.driver: IommuDriver | None = None
        self._kinds, self._make_driver = kinds, make_driver
        self._kind: ContainerKind | None = None

    @property
    def spapr(self) -> bool:
        """Whether its type is one of the sPAPR driver's; before it has one, whether the host prefers them."""
        kind = next(iter(self._kinds)) if self._kind is None else self._kind
        return DRIVERS[kind] == "spapr"

    def ioctl(self, mm: Mm, cmd: int, arg: bytes, revocation: Revocation) -> bytes:
        """:raise OSError: ENOTTY for what is no ioctl of this container, EINVAL for one that needs a type first."""
        if cmd == _GET_API_VERSION:
            return pack_int(VFIO_API_VERSION)
        if cmd == _CHECK_EXTENSION:
            return pack_int(int(self._extension(unpack_int(arg))))
        if cmd == _SET_IOMMU:
            self._set_iommu(unpack_int(arg))
            return b""
        if self.driver is None:
            raise OSError(ENOTTY if cmd not in Ioctl.__members__.values() else EINVAL, "the container has no type yet")
        return self.driver.ioctl(mm, cmd, arg, revocation)

    def _extension(self, number: int) -> bool:
        """What VFIO_CHECK_EXTENSION answers: before there is a type any driver may say yes, then only the type's."""
        driver = DRIVERS[self._kind] if self._kind is not None and self.driver is not None else None
        asked = [kind for kind in self._kinds if driver in (None, DRIVERS[kind])]
        return any(number == IOMMU_TYPES[kind] or number in DRIVER_PROPERTIES[DRIVERS[kind]] for kind in asked)

    def _set_iommu(self, wanted: int) -> None:
        if not self.groups or self.driver is not None:
            raise OSError(EINVAL, "no group is attached" if not self.groups else "the container has a type already")
        if not self._extension(wanted):
            raise OSError(ENODEV, f"this host has no driver for IOMMU type {wanted}")
        kind = KIND_OF_TYPE.get(wanted)
        if kind is None:
            raise OSError(EINVAL, f"{wanted} is a property of a driver and no type")
        driver = self._make_driver(kind)
        for group in self.groups:
            try:
                driver.attach(group)
            except OSError:
                self._undo_attach(driver)
                raise
        self.driver, self._kind = driver, kind

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
