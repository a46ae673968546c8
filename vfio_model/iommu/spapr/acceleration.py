"""In-kernel acceleration of the TCE hypercalls, as the guest's side sees it.

A table's entries live in this process, or *in the kernel*: in memory that the host stores into when it answers the
table's hypercalls by itself, and that is mapped here, so that a translation asks nobody. The host answers H_TOO_HARD
where it would rather not; then, and for tables that live here, the hypercall is carried out here
(:mod:`vfio_model.iommu.spapr.hcalls`).

The host tells nobody but the VFIO containers that are linked to the table. A table with any other follower is therefore
never given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vfio_model.errors import PeerLost
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.hvcall import HCall, HReturn

ACCELERATED = (HCall.H_PUT_TCE, HCall.H_STUFF_TCE, HCall.H_PUT_TCE_INDIRECT)
"""What the host may answer by itself."""
TOO_HARD = int(HReturn.H_TOO_HARD)
_ARGS = 4


class InKernelTable(Protocol):
    """A table that lives in the kernel."""

    @property
    def entries(self) -> memoryview:
        """Its words (format ``Q``), shared with the host."""

    @property
    def fd(self) -> int:
        """Its file, as VFIO's side quotes it."""

    def hcall(self, nr: int, args: Sequence[int], followers: int) -> int:
        """The host's answer to a hypercall about this table, H_TOO_HARD included.

        ``followers`` is how many followers the host has to serve with it.

        :raise OSError: the request failed on its way. :raise PeerLost: the host is gone; the entries are still there.
        """

    def close(self) -> None:
        """Give it back. Its entries must not be touched any more."""


class Accelerator(Protocol):
    """Who makes tables that live in the kernel."""

    def takes(self, window_size: int, *, need_vfio: bool) -> bool:
        """Whether a window of ``window_size`` bytes should live in the kernel."""

    def create(self, liobn: int, page_shift: int, bus_offset: int, nb_table: int) -> InKernelTable | None:
        """An empty table in the kernel; None when the host makes none."""


class Accelerated(Protocol):
    """A table, as an accelerated hypercall sees it."""

    @property
    def kernel(self) -> InKernelTable | None:
        """Where it lives, if in the kernel."""

    def served_followers(self) -> int | None:
        """How many followers it has; None when the host does not serve all of them."""


Handler = Callable[[Sequence[int]], tuple[int, list[int]]]


def accelerated(
    nr: int,
    tables: Mapping[int, Accelerated],
    slow: Handler,
    failed: Callable[[OSError], int],
    trace: Trace = NULL_TRACE,
) -> Handler:
    """The handler of hypercall ``nr`` that asks the host first and is ``slow`` where the host finds it too hard.

    ``failed`` makes a return code of a request that failed on its way.
    """

    def handler(args: Sequence[int]) -> tuple[int, list[int]]:
        table = tables.get(args[0])
        kernel = table.kernel if table is not None else None
        followers = table.served_followers() if table is not None and kernel is not None else None
        if kernel is None or followers is None:
            return slow(args)
        try:
            ret = kernel.hcall(nr, args[:_ARGS], followers)
        except PeerLost:
            ret = TOO_HARD
        except OSError as error:
            ret = failed(error)
        if trace.enabled:
            trace("kvm_hcall", nr=nr, liobn=args[0], ioba=args[1], ret=ret)
        return slow(args) if ret == TOO_HARD else (ret, [])

    return handler
