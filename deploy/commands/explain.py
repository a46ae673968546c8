"""``vfio-model explain``."""

from __future__ import annotations

import click
import msgspec

from deploy import explain
from deploy.console import output
from deploy.quantity import parse_size


def address(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """An I/O virtual address: decimal, 0x…, or with a suffix."""
    try:
        return int(parse_size(value))
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


@click.command()
@click.argument("device")
@click.argument("iova", callback=address)
@click.option("--dir", "directory", help="The run's directory, when several are running (see `vfio-model ps`).")
@click.option("--json", "as_json", is_flag=True, help="Print both walks as JSON.")
def command(device: str, iova: int, directory: str | None, as_json: bool) -> int:
    """Show how IOVA is translated for DEVICE (an id or a PCI address) in a running guest.

    Both stages are walked in the live tables, step by step: the guest's vIOMMU, and for an assigned device the host's
    table that its process reads. The entry that fails is named. Exit status 1 when the address does not translate.
    """
    found = explain.ask(explain.choose_run(directory), device, iova)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        explain.show(found, output())
    return 0 if found.fails == "none" else 1
