"""``python -m tests.fuzz [TARGET ...] [--seconds N] [--random]``: fuzz, by atheris where it is installed.

Without it (or with ``--random``) the bytes are mutations of good messages, from a seed that is printed. A finding is an
exception: atheris writes its input to a file and says which; the other way says the seed and the round.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import time

os.environ.setdefault("VFIO_MODEL_DEADLINE_SCALE", "0.001")  # nobody answers a fuzzed device


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz")
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--random", action="store_true", help="random bytes, even where atheris is")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    from tests.fuzz.targets import TARGETS  # noqa: PLC0415  after the environment is set

    guided = not options.random and importlib.util.find_spec("atheris") is not None
    for name in options.targets or list(TARGETS):
        if name not in TARGETS:
            parser.error(f"no target {name!r}: {', '.join(TARGETS)}")
        print(f"fuzz {name}: {options.seconds} s, {'atheris' if guided else 'random bytes'}", flush=True)
        if guided:
            command = [sys.executable, "-m", "tests.fuzz.guided", name, f"-max_total_time={options.seconds}"]
            if subprocess.run(command, check=False).returncode:
                return 1
        else:
            by_chance(name, options.seconds, options.seed)
    return 0


def by_chance(name: str, seconds: float, seed: int | None) -> None:
    """Mutations of good messages until the time is up."""
    from tests.fuzz.targets import TARGETS  # noqa: PLC0415
    from tests.protocols.fuzz import Fuzzer  # noqa: PLC0415

    seed = random.randrange(1 << 32) if seed is None else seed
    fuzzer, deadline, rounds = Fuzzer(seed), time.monotonic() + seconds, 0
    good = fuzzer.vfio_user()
    while time.monotonic() < deadline:
        rounds += 1
        data = bytes((fuzzer.random.randrange(256),))
        for _ in range(fuzzer.random.randrange(8)):
            frame, fds = next(good)
            body = frame[16:]
            data += frame[2:3] + frame[8:9] + (len(body) % 2048).to_bytes(2, sys.byteorder) + bytes((fds,)) + body
        try:
            TARGETS[name](fuzzer.damage(data) if rounds & 1 else data)
        except BaseException:
            print(f"seed {seed}, round {rounds}: {data.hex()}", file=sys.stderr)
            raise
    print(f"{rounds} rounds, seed {seed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
