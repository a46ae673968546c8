"""``vfio-model ps``."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from deploy import ps
from deploy.console import output
from deploy.link import Link


def ping(directory: Path, role: str, seconds: float) -> bool:
    """Whether the main loop of ``role`` answers within ``seconds``."""
    link = Link(directory, role)
    try:
        return link.ping(seconds)
    finally:
        link.close()


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list; sizes in bytes, times in seconds.")
def command(as_json: bool) -> None:
    """List the processes of every running scenario: memory, CPU, open files, uptime, health.

    Health is "ok" when the process's main loop answers within a second, else "no answer", "stopped" or "gone". The
    processes of assigned devices appear below the hostd that started them.
    """
    rows = ps.collect(ping)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
    elif rows:
        output().print(ps.table(rows))
    else:
        click.echo("no scenario is running")
