"""``vfio-model run``."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from deploy import report, run, shipped
from deploy.console import StepProgress, output
from deploy.launcher import Terminated, signals_as_exceptions
from deploy.scenario_machine import Pseries
from vfio_model.errors import ConfigError
from vfio_model.vfio.kinds import CONTAINER_KINDS, ContainerKind


@click.command()
@click.argument("scenario")
@click.option("--report", "folder", type=click.Path(path_type=Path, file_okay=False), help="Where the report goes.")
@click.option("--no-report", is_flag=True, help="Write no report.")
@click.option("--keep", is_flag=True, help="Leave everything running after the last step, until Ctrl-C.")
@click.option("--inline", is_flag=True, help="Run all roles in one process with one log, for debugging.")
@click.option("--kvm", is_flag=True, help="With in-kernel acceleration, whatever the scenario says.")
@click.option(
    "--container",
    type=click.Choice(CONTAINER_KINDS),
    help="The kind of VFIO container, whatever the scenario says; the host then has that kind only.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON, without progress.")
def command(
    scenario: str,
    folder: Path | None,
    no_report: bool,
    keep: bool,
    inline: bool,
    kvm: bool,
    container: ContainerKind | None,
    as_json: bool,
) -> int:
    """Run SCENARIO: a shipped one by name (see `vfio-model scenarios`), your own by the path of its YAML file.

    Starts the processes in a private runtime directory, runs the steps, prints a verdict, writes a report folder
    (verdict, merged events, a timeline for ui.perfetto.dev) under ./vfio-model-report, and leaves nothing else
    behind. Exit status 0 when the verdict is PASS, 1 when it is FAIL, 2 when the scenario is wrong.
    """
    chosen = shipped.load_scenario(scenario)
    if kvm:
        if not isinstance(chosen.machine, Pseries):
            raise ConfigError("--kvm is for pseries machines: they have TCE tables", where=scenario)
        chosen.machine.kvm = True
    if container is not None:
        chosen.use_container(container)
    beside = shipped.scenario_path(scenario).parent
    if not no_report:
        folder = folder or report.default_folder(chosen.name)
    try:
        with signals_as_exceptions(), StepProgress(silent=as_json) as progress:
            verdict = run.run(chosen, beside, folder if not no_report else None, progress, keep=keep, inline=inline)
    except Terminated as ended:
        return 128 + ended.number
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(verdict), indent=2))
    else:
        report.show(verdict, output(), None if no_report else folder)
    return 0 if verdict.passed else 1
