"""A copy engine: jobs wait in a queue, one at a time moves by DMA, a piece per microsecond; it migrates in mid-copy.

A driver writes SOURCE, TARGET and LENGTH, then anything to SUBMIT. QUEUED counts the jobs that have not ended, DONE and
FAILED those that have. An interrupt tells that one has ended; writing IRQ takes it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from vfio_model.device_api import (
    PARENT,
    BarSpec,
    DeviceHost,
    Field,
    MemTxResult,
    PCIDevice,
    Prop,
    State,
    Type,
    VMStateDescription,
    VMStateError,
)

SOURCE, TARGET, LENGTH, SUBMIT, QUEUED, DONE, FAILED, IRQ = range(0, 0x40, 8)
KEPT = {SOURCE: "source", TARGET: "target", LENGTH: "length", DONE: "done", FAILED: "failed"}
PIECE = 4096
"""Bytes that move at a time."""
MAX_JOBS = 8
NS_PER_PIECE = 1000
MASK = (1 << 64) - 1


class Job(NamedTuple):
    """What is left of it."""

    source: int
    target: int
    length: int


JOB = VMStateDescription("copier/job", 1, tuple(Field(name, Type.U64) for name in Job._fields))


class Copier(PCIDevice):
    """Copies guest memory to guest memory."""

    VENDOR_ID, DEVICE_ID, INTERRUPT_PIN, MSI_VECTORS = 0x1234, 0xC091, 1, 1
    BARS = (BarSpec(0, 4096, access=(8, 8)),)
    PROPS = {"ns_per_piece": Prop(int, NS_PER_PIECE, "how long a piece of 4096 bytes takes, in ns")}
    VMSTATE = VMStateDescription(
        "copier",
        1,
        (
            PARENT,
            *(Field(name, Type.U64) for name in (*KEPT.values(), "remaining_ns")),
            Field("job_count"),
            Field("jobs", array="job_count", struct=JOB),
        ),
    )

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.pace_ns: int = self.props["ns_per_piece"]
        self.registers = dict.fromkeys(KEPT, 0)
        self.jobs: deque[Job] = deque()
        self.timer = host.clock.timer(self._move)

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A register."""
        return len(self.jobs) if offset == QUEUED else self.registers.get(offset, 0)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """A register; SUBMIT when the queue is full is lost, and counted."""
        if offset in (SOURCE, TARGET, LENGTH):
            self.registers[offset] = value
        elif offset == SUBMIT and len(self.jobs) < MAX_JOBS:
            self.jobs.append(Job(*(self.registers[each] for each in (SOURCE, TARGET, LENGTH))))
            self._go_on()
        elif offset == SUBMIT:
            self.registers[FAILED] += 1
        elif offset == IRQ:
            self.lower_irq()
        return MemTxResult.OK

    def _go_on(self) -> None:
        if self.jobs and not self.timer.pending:
            self.timer.mod(self.host.clock.now_ns + self.pace_ns)

    def _move(self) -> None:
        job = self.jobs[0]
        piece = bytearray(min(job.length, PIECE))
        result = self.dma.read(job.source, piece) or self.dma.write(job.target, piece)
        if not self.jobs or self.jobs[0] is not job:
            return  # it was reset while it waited for memory
        left = 0 if result else job.length - len(piece)
        if left:
            self.jobs[0] = Job(job.source + PIECE & MASK, job.target + PIECE & MASK, left)
        else:
            self.jobs.popleft()
            self.registers[FAILED if result else DONE] += 1
            self.raise_irq()
        self._go_on()

    def reset_enter(self) -> None:
        """No piece moves any more."""
        self.timer.cancel()
        super().reset_enter()

    def reset_hold(self) -> None:
        """Nothing is queued."""
        super().reset_hold()
        self.jobs.clear()
        self.registers = dict.fromkeys(KEPT, 0)

    def unrealize(self) -> None:
        """As when it is reset."""
        self.timer.cancel()

    # -- migration ---------------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """Registers, what is left of each job, and when the next piece would have moved."""
        return {
            **super().export_state(),
            **{name: self.registers[offset] for offset, name in KEPT.items()},
            "remaining_ns": self.timer.remaining_ns or 0,
            "job_count": len(self.jobs),
            "jobs": [job._asdict() for job in self.jobs],
        }

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """The queue has an end."""
        super().check_state(state, where=where)
        if state["job_count"] > MAX_JOBS:
            raise VMStateError(f"{state['job_count']} jobs in a queue of {MAX_JOBS}", where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same; the copy goes on when the device runs."""
        self.registers = {offset: state[name] for offset, name in KEPT.items()}
        self.jobs = deque(Job(**job) for job in state["jobs"])
        super().import_state(state)
        if self.jobs:
            self.timer.mod(self.host.clock.now_ns + state["remaining_ns"])
