"""``guestd-system-ppc64`` and ``guestd-system-x86_64``: the guest machine where a tool expects a QEMU binary. As with
QEMU the program's name says what it emulates: what comes after the last dash.

Ends with status 0 on SIGTERM, SIGINT and QMP's ``quit``; with 1 and a message when the command line cannot be used or
the machine cannot be built.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from guestd.cmdline import ARCHES, Invocation, parse
from guestd.cmdline_help import HelpWanted
from guestd.process import Surroundings, serve
from protocols.transport.kernel import die_with_parent
from protocols.transport.runtime import make_runtime_directory
from vfio_model.errors import VfioModelError


def main() -> None:
    """The console script."""
    sys.exit(run(Path(sys.argv[0]).name, sys.argv[1:]))


def run(program: str, words: Sequence[str]) -> int:
    """Run the machine that ``words`` describe until it ends; the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        invocation = parse(words, arch_of(program))
        for warning in invocation.warnings:
            print(f"{program}: warning: {warning}", file=sys.stderr)
        if invocation.exit_with_parent:
            die_with_parent(number=signal.SIGTERM)
        _serve(invocation)
    except HelpWanted as help_:
        print(help_.text)
    except VfioModelError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def arch_of(program: str) -> str:
    """What ``program`` emulates; ppc64 for a name that does not say."""
    arch = program.rpartition("-")[2]
    return arch if arch in ARCHES else next(iter(ARCHES))


def _end(number: int, frame: FrameType | None) -> None:
    """Before and after the loop takes signals."""
    sys.exit(0)


def _serve(invocation: Invocation) -> None:
    own = invocation.directory is None
    directory = invocation.directory or make_runtime_directory()
    around = Surroundings(
        realtime=invocation.realtime, record=not own, patterns=invocation.patterns, log=invocation.log
    )
    try:
        serve(directory, invocation.config, around)
    finally:
        if own:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
