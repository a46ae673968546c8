"""Whether a run's machines have in-kernel acceleration: the switch ``--kvm``, for the whole suite.

Whoever builds a pseries machine for a test asks :func:`kvm`, unless the test states a value itself. A test that asked
bears the mark ``machine``; one that does not bear it fails, in every run. So ``pytest --kvm -m machine`` is every test
that the switch can influence.

Expectations are the same with the switch and without, but where a test names the difference beside :func:`kvm`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vfio_model.host.host import Host
from vfio_model.host.topology import HostTopology
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.ram import RAMBlock
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.kvm import KvmAccelerator, KvmPort

HOST_PAGE = 1 << 16


class Switch:
    """What the run was told, and whether a test has asked since :attr:`asked` was reset."""

    on = False
    asked = False


def kvm(stated: bool | None = None) -> bool:
    """``machine.kvm`` of a machine whose test states ``stated``; None: it leaves that to the run."""
    if stated is not None:
        return stated
    Switch.asked = True
    return Switch.on


def accelerate(machine: PseriesMachine, port: KvmPort, *, trace: Trace = NULL_TRACE) -> KvmAccelerator:
    """The host behind ``port`` has the machine's tables from now on; it knows the machine's RAM already."""
    made = KvmAccelerator(machine.system, HOST_PAGE, trace)
    made.on_change = machine.relocate_tables
    machine.accelerate(made)
    made.connect(port)
    return made


def host_of(blocks: Iterable[RAMBlock]) -> DirectPort:
    """A host for a machine that has none: it has no device, and knows the machine's RAM."""
    port = DirectPort(Host(HostTopology(())))
    for block in blocks:
        port.declare_memory(block)
    return port


def accelerated(machine: PseriesMachine, blocks: Iterable[RAMBlock]) -> PseriesMachine:
    """``machine``, which has no host, as the run wants it."""
    if kvm():
        accelerate(machine, host_of(blocks))
    return machine


def answered_otherwise(table: SpaprTceTable, name: str, ioba: int, *rest: Any) -> bool:
    """Whether the kernel's answer to ``put``, ``stuff`` or ``indirect`` is not that of the machine's process: for an
    address that is not a page's, entries that leave the window, and a permission to stuff.
    """
    count = {"put": 1, "stuff": rest[-1], "indirect": len(rest[-1]) if name == "indirect" else 0}[name]
    leaves = table.index(ioba) + count > table.nb_table
    return ioba % (1 << table.page_shift) != 0 or leaves or (name == "stuff" and rest[0] & 3 != 0)


def locked_in_kernel(machine: PseriesMachine, host_page: int = HOST_PAGE) -> int:
    """Pages that the machine's tables in the kernel count as locked: their entries, and one with pointers to these
    pages, which is enough for tables of 2 MiB.
    """
    return sum(-(-table.nb_table * 8 // host_page) + 1 for table in machine.tables.values() if table.kernel)
