"""Two peers, one program: where do they differ, and what is the shortest program that shows it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.interop.execution import Execution, Outcome, expectations
from tests.interop.operations import Call, DeviceTest, Edu, Indirect, Program, QtestRtas, Reset, Rtas
from tests.interop.peers import Peer, signed
from tests.interop.places import POOL
from tests.interop.shadow import Expected, Shadow
from tests.interop.variants import Variant
from vfio_model.iommu.spapr.regs import RTAS_TOKENS, HCall
from vfio_model.ranges import U64_MAX

_SHRINK_RUNS = 400
_CHUNK = 1 << 20


_RTAS_NAMES = {int(token): name for name, token in RTAS_TOKENS.items()}


def rtas_name(token: int) -> str:
    """The call's name in the device tree."""
    return _RTAS_NAMES.get(token, "unknown")


def hcall_name(operation: Call | Indirect) -> str:
    """The call's name in LoPAPR."""
    nr = HCall.H_PUT_TCE_INDIRECT if isinstance(operation, Indirect) else operation.nr
    return HCall(nr).name if nr in set(HCall) else "unknown"


@dataclass
class Tally:
    """How much was compared."""

    operations: int = 0
    good: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    returns: Counter[str] = field(default_factory=Counter)
    """Return codes of the hypercalls of the TCE family and of others, and RTAS statuses."""
    each: Counter[str] = field(default_factory=Counter)
    """The same by the call's name."""
    entries: int = 0
    """Table entries read back."""
    ram: int = 0
    """Bytes of RAM compared whole, at the end of runs."""

    def merge(self, other: Tally) -> None:
        """Add what ``other`` counted."""
        self.operations += other.operations
        self.good += other.good
        self.kinds.update(other.kinds)
        self.returns.update(other.returns)
        self.each.update(other.each)
        self.entries += other.entries
        self.ram += other.ram

    def add(self, program: Program, outcomes: Sequence[Outcome], expected: Sequence[Expected]) -> None:
        """Count ``program``; resets count as operations, but neither as good nor as bad."""
        for operation, outcome, known in zip(program, outcomes, expected, strict=True):
            self.operations += 1
            self.kinds[type(operation).__name__] += 1
            match operation:
                case Rtas() | QtestRtas():
                    self.returns[f"H_RTAS {signed(outcome.ret)}"] += 1
                    self.returns[f"RTAS {outcome.rtas_status}"] += 1
                    name = operation.name if isinstance(operation, QtestRtas) else rtas_name(operation.token)
                    self.each[f"{name} {outcome.rtas_status}"] += 1
                    self.good += outcome.ret == 0 and outcome.rtas_status == 0
                case Call() | Indirect():
                    self.returns[f"hcall {outcome.ret}"] += 1
                    self.each[f"{hcall_name(operation)} {outcome.ret}"] += 1
                    self.good += outcome.ret == 0
                case Edu():
                    self.good += known.good
                case DeviceTest():
                    self.returns[f"testdev {outcome.ret:#x}"] += 1
                    self.good += outcome.ret == 0
                case Reset():
                    pass
                case _:
                    self.good += 1


@dataclass(frozen=True)
class Difference:
    """Operation number ``at`` of ``program`` had two outcomes, by the peers' names."""

    program: Program
    at: int
    what: str
    outcomes: dict[str, object]

    def __str__(self) -> str:
        lines = [f"  {number:3} {operation}" for number, operation in enumerate(self.program[: self.at + 1])]
        seen = [f"  {name:>8}: {outcome}" for name, outcome in self.outcomes.items()]
        return "\n".join([f"after {self.at} operations they differ at {self.what}", *lines, *seen])


class Comparison:
    """Programs on ``left`` and ``right``, both of which are a ``variant``."""

    def __init__(self, variant: Variant, left: Peer, right: Peer, tally: Tally) -> None:
        self._variant, self._peers, self.tally = variant, (left, right), tally
        self._executions = tuple(Execution(peer, variant) for peer in self._peers)

    def run(self, program: Program, probes: Sequence[int] = ()) -> Difference | None:
        """Run it on both, then read every entry back that it touched, and ``probes`` (indices) in each window."""
        expected = expectations(self._variant, program)
        left, right = (execution.run(program, expected) for execution in self._executions)
        difference = self._compare(program, left, right)
        if difference is None:
            self.tally.add(program, left, expected)
            difference = self._compare_tables(program, probes)
        return difference

    def _compare(self, program: Program, left: list[Outcome], right: list[Outcome]) -> Difference | None:
        for at, (one, other) in enumerate(zip(left, right, strict=True)):
            if one != other:
                return self._difference(program, at, repr(program[at]), one, other)
        return None

    def _difference(self, program: Program, at: int, what: str, one: object, other: object) -> Difference:
        return Difference(program, at, what, {self._peers[0].name: one, self._peers[1].name: other})

    def _compare_tables(self, program: Program, probes: Sequence[int]) -> Difference | None:
        shadow = Shadow(self._variant)
        for operation in program:
            shadow.apply(operation)
        reads = [
            Call(HCall.H_GET_TCE, (liobn, window.bus + (index << window.shift) & U64_MAX))
            for liobn, window in shadow.windows().items()
            for index in sorted({*window.tces, *(probe % window.entries for probe in probes)})
        ]
        for start in range(0, len(reads), 64):
            part = reads[start : start + 64]
            left, right = (execution.calls(part) for execution in self._executions)
            for read, one, other in zip(part, left, right, strict=True):
                if one != other:
                    return self._difference(program, len(program) - 1, f"the entry that {read} gives", one, other)
        self.tally.entries += len(reads)
        return None

    def compare_ram(self) -> str | None:
        """Where the first differing byte of the whole pool is, or None."""
        for gpa in range(POOL.start, POOL.last, _CHUNK):
            one, other = (peer.read_many([(gpa, _CHUNK)])[0] for peer in self._peers)
            if one != other:
                at = next(i for i in range(_CHUNK) if one[i] != other[i])
                return f"{gpa + at:#x}"
        self.tally.ram += POOL.size
        return None

    # -- shrinking -----------------------------------------------------------------------------------------------

    def shrink(self, found: Difference) -> Difference:
        """A shorter program that shows a difference too, by leaving parts out; nothing is left that can go alone."""
        best = found
        size = max(found.at // 2, 1)
        budget = _SHRINK_RUNS
        while budget and size:
            before = len(best.program[: best.at + 1])
            start = 1  # the reset stays
            while start <= best.at and budget:
                kept = best.program[: best.at + 1]
                shorter = kept[:start] + kept[start + size :]
                budget -= 1
                again = self._difference_of(shorter)
                if again is not None:
                    best = again
                else:
                    start += size
            if size > 1 or best.at + 1 == before:
                size //= 2
        return best

    def _difference_of(self, program: Program) -> Difference | None:
        if any(known.hazard for known in expectations(self._variant, program)):
            return None
        return Comparison(self._variant, *self._peers, Tally()).run(program)
