"""``vfio-model ps``."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from deploy import live, ps
from deploy.console import output
from deploy.link import Link
from deploy.ps import Health
from vfio_model.errors import VfioModelError


def ask(directory: Path, role: str, seconds: float) -> Health:
    """Ask ``role`` on its control socket; hostd also which devices its children are."""
    if not (directory / f"{role}.ctl").exists():
        return Health(alive=None)
    link = Link(directory, role, seconds=seconds)
    try:
        if not link.ping(seconds):
            return Health(alive=False)
        return Health(True, live.device_pids(link) if role == "hostd" else {})
    except VfioModelError:
        return Health(alive=False)
    finally:
        link.close()


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list; sizes in bytes, times in seconds.")
def command(as_json: bool) -> None:
    """List the processes of every running scenario: memory, CPU, open files, uptime, health.

    Health is "ok" when the process's main loop answers within a second, else "no answer", "stopped" or "gone". The
    processes of assigned devices appear below the hostd that started them.
    """
    rows = ps.collect(ask)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
    elif rows:
        output().print(ps.table(rows))
    else:
        click.echo("no scenario is running")
