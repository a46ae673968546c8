"""Structs of one ioctl in one message: executed in order up to the first that fails, in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import EBADF, EINVAL

from vfio_model.host.container import IommuDriver
from vfio_model.host.mm import Mm
from vfio_model.host.pending import CALL, Batch, Revocation, Work

_TOGETHER = 1 << 10
"""Structs that a container's type may be given at once."""
_TOGETHER_COST = 1 << 5
"""What one of them costs then, in entries."""


class StructBatch:
    """Structs of ``size`` bytes each, ``view``, for ioctl ``cmd`` of process ``mm``. ``driver`` may take many at once;
    ``one(struct)`` is the ioctl itself.
    """

    def __init__(
        self,
        mm: Mm,
        cmd: int,
        size: int,
        view: memoryview,
        driver: IommuDriver | None,
        one: Callable[[bytes, Revocation], object],
    ) -> None:
        self._mm, self._cmd, self._size, self._view, self._driver, self._one = mm, cmd, size, view, driver, one
        self._done = self._errno = 0
        self._reason = ""

    @property
    def result(self) -> Batch:
        """When it is over."""
        return Batch(self._done, self._errno, self._reason)

    def carry_out(self, revocation: Revocation) -> Work:
        """Many at once where that can be, else one by one."""
        for part in self._parts():
            count = len(part) // self._size
            if not revocation.stopped and self._together(part, count, revocation):
                yield from revocation.rest()
                self._done += count
            else:
                yield from self._one_by_one(part, revocation)
            if self._errno:
                return
            if revocation.spend(count * _TOGETHER_COST):
                yield

    def _parts(self) -> Iterator[memoryview]:
        step = self._size * _TOGETHER
        return (self._view[at : at + step] for at in range(0, len(self._view), step))

    def _together(self, part: memoryview, count: int, revocation: Revocation) -> bool:
        driver = self._driver
        return driver is not None and driver.ioctl_many(self._mm, self._cmd, part, count, revocation)

    def _one_by_one(self, part: memoryview, revocation: Revocation) -> Work:
        for at in range(0, len(part), self._size):
            try:
                if revocation.stopped:
                    raise OSError(EBADF, "the file was closed meanwhile")
                self._one(bytes(part[at : at + self._size]), revocation)
                yield from revocation.rest()
            except OSError as error:
                self._errno, self._reason = error.errno or EINVAL, error.strerror or ""
                return
            self._done += 1
            if revocation.spend(CALL):
                yield
