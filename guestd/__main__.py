"""``python -m guestd``: the guest-machine process.

The first thing is to tie its death to its parent's, the second to take the role's lock; then the guest is built,
and only then the control socket answers: ``hello`` means that every device is there. SIGTERM ends it with status
0; a machine that cannot be built ends it with status 1 and one line that says why.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from guestd.config import load
from guestd.process import Surroundings, serve
from protocols.transport.kernel import die_with_parent as arm_death
from vfio_model.errors import VfioModelError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Runtime directory (mode 0700): sockets, lock and event log live there.",
)
@click.option(
    "--config",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file with the machine and its devices.",
)
@click.option(
    "--port",
    type=click.Path(path_type=Path),
    help="Socket that ioctls go to, if not hostd's own (an interposer's).",
)
@click.option("--notifier", type=click.Choice(["process", "inline"]), help="Where the notifier's hub runs.")
@click.option(
    "--clock",
    type=click.Choice(["step", "realtime"]),
    default="step",
    show_default=True,
    help="Virtual time moves by clock-step commands, or follows real time.",
)
@click.option("--die-with-parent", is_flag=True, help="End when the process that started this one ends.")
def main(
    directory: Path, config: Path, port: Path | None, notifier: str | None, clock: str, die_with_parent: bool
) -> None:
    """Run a guest machine: a pseries or q35 model with a virtual IOMMU, its devices in this and other processes.

    Everything is done over the control socket guestd.ctl in the runtime directory; see `vfio-model --help` for the
    commands that use it.
    """
    try:
        if die_with_parent:
            arm_death()
        guest = load(config)
        if port is not None:
            guest.port = str(port)
        if notifier is not None:
            guest.notifier = "inline" if notifier == "inline" else "process"
        serve(directory, guest, Surroundings(realtime=clock == "realtime"))
    except VfioModelError as error:
        print(f"guestd: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
