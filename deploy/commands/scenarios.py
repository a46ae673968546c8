"""``vfio-model scenarios``."""

from __future__ import annotations

import click
import msgspec

from deploy import shipped


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of {name, description}.")
def command(as_json: bool) -> None:
    """List the scenarios that come with vfio-model.

    Each can be run by name; a scenario of your own is run by the path of its YAML file.
    """
    found = shipped.scenarios()
    if as_json:
        listed = [{"name": each.name, "description": each.description} for each in found]
        click.echo(msgspec.json.format(msgspec.json.encode(listed), indent=2))
        return
    width = max(len(each.name) for each in found)
    for each in found:
        click.echo(f"{each.name:{width}}  {each.description}")
