"""A stream that is damaged at random on its way between two processes is refused, and the source goes on each time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from protocols.transport.loop import DEADLINE_SCALE_VARIABLE
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import pair, topology
from tests.processes.rig import until
from tests.processes.test_migration_failures import (
    FOREVER,
    IOVA,
    Change,
    _recorded,
    busy,
    nothing,
    still_works,
    through,
)

pytestmark = [pytest.mark.machine, pytest.mark.long]

POINTS = 10
"""Of each seed."""
SEEDS = (1, 2)
SECTIONS = 6000
"""About as many bytes at the end are sections."""


def damage(rng: random.Random, whole: int) -> tuple[str, Change, int | None]:
    """One of the things that happen to a stream of ``whole`` bytes, in words and as a proxy takes it."""
    at = rng.choice([rng.randrange(whole), whole - 1 - rng.randrange(min(SECTIONS, whole))])
    size = rng.choice([1, 2, 8, 100])
    how = rng.choice(["cut", "flip", "zero", "drop", "insert", "repeat"])
    if how == "cut":
        return f"cut at {at}", nothing, at
    bit, noise, done = 1 << rng.randrange(8), rng.randbytes(size), False

    def change(sent: int, data: bytes) -> bytes:
        nonlocal done
        here = at - sent
        if done or not 0 <= here < len(data):
            return data
        done = True
        before, hit, after = data[:here], data[here : here + size], data[here + size :]
        flipped = bytes([hit[0] ^ bit]) + hit[1:]
        zeros = bytes(len(hit)) if any(hit) else b"\1" * len(hit)
        altered = {"flip": flipped, "zero": zeros, "drop": b"", "insert": noise + hit, "repeat": hit + hit}
        return before + altered[how] + after

    return f"{how} {size} at {at}, bit {bit}", change, None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_stream_is_refused_and_the_source_goes_on(
    start_host: Callable[..., HostProcess], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEADLINE_SCALE_VARIABLE, "0.3")
    rng = random.Random(seed)
    with pair(start_host(topology=topology("spapr-v2"))) as both:
        busy(both)
        both.source.ask("stop")
        both.make_target(paused=True)
        whole = len(_recorded(both))
        both.source.ask("cont")
        for _ in range(POINTS):
            what, change, end = damage(rng, whole)
            both.source.ask("stop")
            info, _proxy = through(both, change, end)
            assert info["status"] == "failed", f"seed {seed}, of {whole}: {what}"
            assert both.source.state == "paused", what
            assert both.target.popen.wait(20) == 1 and "load of migration failed" in both.target.log.read_text(), what
            both.source.ask("cont")
            both.source.burst().start(IOVA, 64, 16, stride=4096, pattern=1, command=FOREVER)
            still_works(both.source)
            both.source.burst().stop()
            both.source.cpu.flush()
        info, _proxy = through(both, nothing)
        assert info["status"] == "completed"
        until("it runs there", lambda: both.target.state == "running")
        assert both.host.until(lambda status: len(status["mms"]) == 2)  # type: ignore[arg-type]
