"""Variants one after another: for each QEMU and guestd side by side, programs until there are enough operations."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.interop.pc import PcQemu
from tests.interop.qmp import QmpError
from tests.interop.qtest import QTestError
from tests.interop.vtd.generator import Generator
from tests.interop.vtd.operations import Operation
from tests.interop.vtd.topology import BEHIND_BRIDGES, BYPASSED
from tests.interop.vtd.variants import Variant

OPERATIONS: Final = 24_000
LENGTH: Final = 400
"""Operations of a program."""
MOST_ABORTS: Final = 3
_SHRINK_RUNS: Final = 300
_SVM: Final = "scalable-mode=on,fsts=on,device-iotlb=on,pasid-bits=8,svm=on"
_EVERYTHING: Final = f"{_SVM},caching-mode=on,snoop-control=on,stale-tm=on,eim=on"
_RESET: Final = "system_reset"

VARIANTS: Final = (
    Variant("default"),
    Variant("caching-mode", "caching-mode=on"),
    Variant("39-bit", "aw-bits=39", levels=(3,)),
    Variant("no-intremap", "intremap=off"),
    Variant("device-iotlb", "device-iotlb=on"),
    Variant("snoop-control", "snoop-control=on"),
    Variant("scalable", "scalable-mode=on", mode="scalable"),
    Variant("first-stage", "scalable-mode=on,fsts=on", mode="scalable", first_stage=True, levels=(4,)),
    Variant("legacy-on-scalable", "scalable-mode=on"),
    Variant("scalable-39-bit", "scalable-mode=on,aw-bits=39", mode="scalable", levels=(3,)),
    Variant("svm", _SVM, mode="scalable", first_stage=True, levels=(4,)),
    Variant("no-1g-pages", "scalable-mode=on,fsts=on,fs1gp=off", mode="scalable", first_stage=True, levels=(4,)),
    Variant("stale-tm", "device-iotlb=on,stale-tm=on,eim=on"),
    Variant("bridges", topology=BEHIND_BRIDGES),
    Variant("scalable-bridges", "scalable-mode=on", mode="scalable", topology=BEHIND_BRIDGES),
    Variant("bypass", topology=BYPASSED),
    Variant("no-translation", "dma-translation=off"),
    Variant("everything", _EVERYTHING, mode="scalable", first_stage=True, levels=(4,), topology=BEHIND_BRIDGES),
)


def guestd_binary() -> Path:
    """The console script beside this interpreter.

    :raise AssertionError: when it is not installed.
    """
    found = Path(sys.executable).with_name("guestd-system-x86_64")
    assert found.exists(), f"{found} is missing: pip install --editable . makes it"
    return found


def _arguments(variant: Variant, *, ours: bool) -> list[str]:
    properties = "".join(f",{part}" for part in (variant.properties, "quirks=qemu" if ours else "") if part)
    unit = f"intel-iommu{properties}"
    return ["-device", unit, *variant.topology.devices]


class Aborted(Exception):
    """QEMU ended by an assertion of its own: a program means nothing to it from there on."""


class Machine:
    """One of the two, as programs are run on it."""

    def __init__(self, name: str, pc: PcQemu) -> None:
        self.name, self._pc = name, pc

    def run(self, program: Sequence[Operation]) -> list[tuple[str, ...]]:
        """What each operation's commands were answered.

        :raise Aborted: it ended by an assertion.
        """
        try:
            return self._run(program)
        except (OSError, QTestError, QmpError) as error:
            if why := self._pc.aborted():
                raise Aborted(why) from error
            raise

    def _run(self, program: Sequence[Operation]) -> list[tuple[str, ...]]:
        answers: list[str] = []
        qtest = self._pc.qtest
        pending = 0
        for operation in program:
            for command in operation.commands:
                if command == _RESET:
                    answers += qtest.answers()[-pending:] if pending else []
                    pending = 0
                    self._pc.qmp.ask(_RESET, until="RESET")
                    answers.append("")
                else:
                    qtest.send(command)
                    pending += 1
        answers += qtest.answers()[-pending:] if pending else []
        found, at = [], 0
        for operation in program:
            found.append(tuple(answers[at : at + len(operation.commands)]))
            at += len(operation.commands)
        return found


@dataclass(frozen=True)
class Difference:
    """Operation ``at`` of ``program`` was answered in two ways."""

    variant: Variant
    program: tuple[Operation, ...]
    at: int
    answers: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"  {number:3} {operation}" for number, operation in enumerate(self.program[: self.at + 1])]
        commands = self.program[self.at].commands
        for number, command in enumerate(commands):
            said = {name: answers[number] for name, answers in self.answers.items()}
            if len(set(said.values())) > 1:
                lines.append(f"    {command}: " + ", ".join(f"{name} {_short(text)}" for name, text in said.items()))
        return "\n".join([f"variant {self.variant.name}: they differ at operation {self.at}", *lines])


def _short(text: str) -> str:
    return text if len(text) <= 64 else f"{text[:30]}... ({len(text)} characters)"


@dataclass
class Campaign:
    """What to do, and what came of it."""

    seed: int
    operations: int = OPERATIONS
    done: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    """Reasons in fault records, and error bits of the status register, that QEMU showed."""
    left_out: Counter[str] = field(default_factory=Counter)
    """As :attr:`.generator.Generator.left_out`."""
    aborts: list[str] = field(default_factory=list)
    """Assertions by which QEMU ended, and in which variant."""
    differences: list[Difference] = field(default_factory=list)

    @classmethod
    def from_environment(cls) -> Campaign:
        """As the environment says."""
        seed = os.environ.get("VFIO_MODEL_INTEROP_SEED") or str(random.SystemRandom().randrange(1 << 32))
        return cls(int(seed), int(os.environ.get("VFIO_MODEL_INTEROP_OPERATIONS") or OPERATIONS))

    def run(self, variants: Sequence[Variant] = VARIANTS) -> None:
        """All of it; the next variant after a difference."""
        for variant in variants:
            rng = random.Random(f"{self.seed} {variant.name}")
            until = self.done + -(-self.operations // len(variants))
            self._variant(variant, rng, until, tour=True)
            while self.done < until and not self._differs(variant):
                self._variant(variant, rng, until, tour=False)

    def _differs(self, variant: Variant) -> bool:
        return any(found.variant is variant for found in self.differences)

    def _variant(self, variant: Variant, rng: random.Random, until: int, *, tour: bool) -> None:
        """Programs until there are enough, they differ, or QEMU ends: then the rest is for another pair."""
        with contextlib.suppress(Aborted), ExitStack() as stack:
            machines = open_pair(variant, stack)
            while self.done < until:
                generator = Generator(variant, rng)
                program = generator.tour() if tour else generator.program(LENGTH)
                tour = False
                self.left_out += generator.left_out
                try:
                    found = compare(variant, machines, program)
                except Aborted as error:
                    self.aborts.append(f"{variant.name}: {error}")
                    assert len(self.aborts) <= MOST_ABORTS, f"QEMU ends too often: {self.aborts}"
                    raise
                if isinstance(found, Difference):
                    self.differences.append(shrink(machines, found, generator.prologue))
                    return
                self._count(program, found)

    def _count(self, program: Sequence[Operation], answers: Sequence[tuple[str, ...]]) -> None:
        self.done += len(program)
        for operation, said in zip(program, answers, strict=True):
            self.kinds[operation.kind] += 1
            if operation.kind == "faults":
                status, record = int(said[0], 0), int(said[2], 0)
                if record >> 63:
                    self.seen[f"reason {record >> 32 & 0xFF:#x}"] += 1
                for bit, name in ((0, "PFO"), (4, "IQE")):
                    self.seen[name] += status >> bit & 1

    def report(self) -> list[str]:
        """For a reader of the log."""
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kinds.items()))
        seen = ", ".join(f"{name} {count}" for name, count in sorted(self.seen.items()))
        return [
            f"VT-d: VFIO_MODEL_INTEROP_SEED={self.seed}, {self.done} operations: {kinds}",
            f"faults that were looked at: {seen}",
            f"left out: {', '.join(f'{name} {count}' for name, count in sorted(self.left_out.items()))}",
            *(f"QEMU ended in {abort}" for abort in self.aborts),
            f"differences: {len(self.differences)}",
        ]


def open_pair(variant: Variant, stack: ExitStack) -> tuple[Machine, Machine]:
    """QEMU and guestd, until ``stack`` ends."""
    qemu = stack.enter_context(PcQemu(_arguments(variant, ours=False)))
    ours = stack.enter_context(PcQemu(_arguments(variant, ours=True), binary=guestd_binary()))
    return Machine("QEMU", qemu), Machine("guestd", ours)


def compare(
    variant: Variant, machines: Sequence[Machine], program: Sequence[Operation]
) -> Difference | list[tuple[str, ...]]:
    """Run ``program`` on both: the first difference, or what both answered."""
    left, right = (machine.run(program) for machine in machines)
    for at, (one, other) in enumerate(zip(left, right, strict=True)):
        if one != other:
            answers = {machines[0].name: one, machines[1].name: other}
            return Difference(variant, tuple(program), at, answers)
    return left


def shrink(machines: Sequence[Machine], found: Difference, kept: int) -> Difference:
    """A shorter program that shows a difference, too: parts behind the first ``kept`` operations are left out."""
    best, budget = found, _SHRINK_RUNS
    size = max(best.at // 2, 1)
    while budget and size:
        start, shorter = kept, False
        while start <= best.at and budget:
            whole = best.program[: best.at + 1]
            budget -= 1
            try:
                again = compare(found.variant, machines, whole[:start] + whole[start + size :])
            except Aborted:
                return best
            if isinstance(again, Difference):
                best, shorter = again, True
            else:
                start += size
        if size > 1 or not shorter:
            size //= 2
    return best
