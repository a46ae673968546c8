"""All variants one after another: for each a pair of peers, programs until there are enough operations, a comparison.

It goes on with the next variant after a difference, so that one run shows what there is.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.interop.comparison import Comparison, Tally
from tests.interop.peers import GuestdPeer, ModelPeer, Peer, QemuPeer, closing, qemu_binary
from tests.interop.programs import Generator
from tests.interop.qmp import QmpError
from tests.interop.qtest import QTestError
from tests.interop.variants import VARIANTS, Variant
from vfio_model.iommu.spapr.quirks import QUIRKS

OPERATIONS = 30_000
PROBES = 16
"""Entries of each window that are read back although no operation named them."""


def guestd_binary() -> str:
    """The console script beside this interpreter.

    :raise AssertionError: when it is not installed.
    """
    found = Path(sys.executable).with_name("guestd-system-ppc64")
    assert found.exists(), f"{found} is missing: pip install --editable . makes it"
    return str(found)


def _guestd(variant: Variant) -> Peer:
    return GuestdPeer([guestd_binary()], variant)


PEERS: dict[str, Callable[[Variant], Peer]] = {"guestd": _guestd, "model": ModelPeer}


@dataclass
class Campaign:
    """What to do, and what came of it."""

    seed: int
    operations: int
    peer: str
    tally: Tally = field(default_factory=Tally)
    differences: list[str] = field(default_factory=list)
    qemu_version: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    """Operations not made, since they run into a quirk, by its name."""

    @classmethod
    def from_environment(cls) -> Campaign:
        """As the environment says."""
        seed = os.environ.get("VFIO_MODEL_INTEROP_SEED") or str(random.SystemRandom().randrange(1 << 32))
        operations = os.environ.get("VFIO_MODEL_INTEROP_OPERATIONS") or str(OPERATIONS)
        return cls(int(seed), int(operations), os.environ.get("VFIO_MODEL_INTEROP_PEER") or "guestd")

    def run(self) -> None:
        """All of it.

        :raise AssertionError: when QEMU is not there.
        """
        assert shutil.which(qemu_binary()), f"{qemu_binary()} is missing: tools/get-qemu fetches it"
        for variant in VARIANTS:
            self._run_variant(variant)

    def _run_variant(self, variant: Variant) -> None:
        rng = random.Random(f"{self.seed} {variant.name}")
        generator = Generator(variant, rng)
        tally = Tally()
        share = -(-self.operations // len(VARIANTS))
        with ExitStack() as stack:
            qemu = stack.enter_context(closing(QemuPeer([qemu_binary()], variant)))
            other = stack.enter_context(closing(PEERS[self.peer](variant)))
            self.qemu_version = qemu.version
            comparison = Comparison(variant, qemu, other, tally)
            while tally.operations < share:
                program = generator.program(variant.length)
                try:
                    found = comparison.run(program, [rng.randrange(1 << 30) for _ in range(PROBES)])
                except (OSError, QTestError, QmpError) as error:
                    lines = "\n".join(f"  {number:3} {operation}" for number, operation in enumerate(program))
                    raise AssertionError(f"variant {variant.name}: {error!r} in the program\n{lines}") from error
                if found is not None:
                    self.differences.append(f"variant {variant.name}: {comparison.shrink(found)}")
                    break
            else:
                where = comparison.compare_ram()
                if where is not None:
                    self.differences.append(f"variant {variant.name}: RAM differs at {where} after all programs")
        self.tally.merge(tally)
        self.left_out.update(generator.left_out)

    def report(self) -> list[str]:
        """What a reader of the log wants to know."""
        tally = self.tally
        share = 100 * tally.good / max(tally.operations, 1)
        counted = ", ".join(f"{name} {count}" for name, count in sorted(tally.returns.items()))
        each = ", ".join(f"{name} {count}" for name, count in sorted(tally.each.items()))
        lines = [
            f"QEMU {self.qemu_version} and {self.peer}, VFIO_MODEL_INTEROP_SEED={self.seed}",
            f"{tally.operations} operations, {share:.0f} % of them good: "
            + ", ".join(f"{name} {count}" for name, count in sorted(tally.kinds.items())),
            f"returned: {counted}",
            f"by call: {each}",
            f"read back: {tally.entries} table entries, {tally.ram >> 20} MiB of RAM",
            f"differences: {len(self.differences)}",
        ]
        for quirk in QUIRKS:
            if self.left_out[quirk.name]:
                lines.append(
                    f"left out {self.left_out[quirk.name]} times: {quirk.name} ({quirk.peer} {quirk.versions})"
                )
                lines += [f"  there: {quirk.there}", f"  here: {quirk.here}", f"  because {quirk.reason}"]
        return lines
