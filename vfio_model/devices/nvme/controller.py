"""nvme: the controller as commands see it: its queues, features, events, logs and namespace.

A command's handler takes the controller and the command and gives an *outcome*: a status, with dword 0 of the
completion above its 16 bits; or None when the command waits (an asynchronous event request). Commands are carried out
one at a time, each to its end.

Writing to memory may reach the controller's own registers: whoever goes on after a DMA looks whether :attr:`epoch` is
still the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from vfio_model.clock import VirtualClock
from vfio_model.devices.nvme.events import AsyncEvents
from vfio_model.devices.nvme.features import FeatureId, FeatureValues
from vfio_model.devices.nvme.host_memory import HostMemory
from vfio_model.devices.nvme.interrupts import Interrupts
from vfio_model.devices.nvme.logs import ErrorLog, Health
from vfio_model.devices.nvme.namespace import Namespace
from vfio_model.devices.nvme.queues import Queues
from vfio_model.devices.nvme.regs import Command
from vfio_model.trace import Trace

RESULT_SHIFT = 16
"""An outcome is ``status | dword 0 << RESULT_SHIFT``."""
MAX_RANGE = 65536 * 4096
"""Bytes of the largest range of blocks: a command's length has 16 bits."""


class Identity(NamedTuple):
    """What Identify Controller says of who this is."""

    vendor_id: int
    subsystem_vendor_id: int
    serial: str
    model: str
    firmware: str
    nqn: str


class Limits(NamedTuple):
    """How much there is of what."""

    io_queues: int
    """Pairs of I/O queues."""
    vectors: int
    """Interrupt vectors."""
    mdts: int
    """Largest transfer: log2 of 4 KiB pages; 0 is no limit."""


class Controller:
    """State that commands read and change."""

    def __init__(
        self,
        identity: Identity,
        limits: Limits,
        memory: HostMemory,
        interrupts: Interrupts,
        queues: Queues,
        clock: VirtualClock,
        trace: Trace,
    ) -> None:
        self.identity, self.limits = identity, limits
        self.memory, self.interrupts, self.queues = memory, interrupts, queues
        self.clock, self.trace = clock, trace
        self.namespaces: dict[int, Namespace] = {}
        self.max_transfer = 4096 << limits.mdts if limits.mdts else MAX_RANGE
        """Bytes of the largest data transfer."""
        self.features = FeatureValues()
        self.features.queues_default = (limits.io_queues - 1) * 0x10001
        self.events = AsyncEvents()
        self.errors = ErrorLog()
        self.health = Health()
        self.entry_sizes = (0, 0)
        """CC.IOSQES and CC.IOCQES."""
        self.timestamp_base = 0
        """What the timestamp was, in milliseconds, when the virtual clock stood at 0."""
        self.timestamp_set = False
        self.failed = False
        """CSTS.CFS: nothing but a reset helps."""
        self.epoch = 0
        """Changes whenever the controller is reset."""

    def reset(self) -> None:
        """A controller level reset: queues, waiting requests and settings are gone."""
        self.epoch += 1
        self.failed = False
        self.queues.clear()
        self.events.clear()
        self.features.reset()
        self.health.critical_warning = 0
        self.timestamp_set, self.timestamp_base = False, -(self.clock.now_ns // 1_000_000)
        for namespace in self.namespaces.values():
            namespace.write_cache = bool(self.features.get(FeatureId.VOLATILE_WRITE_CACHE))
        self.interrupts.reset()


Outcome = int | None
Handler = Callable[[Controller, Command], Outcome]
Handlers = Mapping[int, Handler]


def result(dword0: int) -> int:
    """Success, with ``dword0`` in the completion."""
    return dword0 << RESULT_SHIFT
