"""``vfio-model``: the operator's command.

Exit status: 0 when all is as it should be, 1 when a run, a check or a translation failed, 2 when what was asked makes
no sense (usage, a file that is wrong or missing), 130 after Ctrl-C. An error says what, where, and what to do; never
a traceback for something that a person wrote. Each subcommand is imported when it is used: ``--help`` and ``ps`` are
quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version

import click

from vfio_model.errors import ConfigError, VfioModelError


@dataclass(frozen=True)
class Lazy:
    """Where a subcommand lives (``module:attribute``), and what the list of commands says of it."""

    target: str
    short_help: str


COMMANDS = {
    "run": Lazy("deploy.commands.run:command", "Run a scenario against live processes and print a verdict."),
    "serve": Lazy("deploy.commands.serve:command", "Serve a device model by vfio-user: QEMU attaches it."),
    "new-device": Lazy(
        "deploy.commands.new_device:command", "Make a device of your own: a package that works, with its test."
    ),
    "scenarios": Lazy("deploy.commands.scenarios:command", "List the scenarios that come with vfio-model."),
    "check": Lazy(
        "deploy.commands.check:command", "Replay a QEMU trace through the model and report every difference."
    ),
    "explain": Lazy("deploy.commands.explain:command", "Show how a running guest's device address is translated."),
    "ps": Lazy("deploy.commands.ps:command", "List the processes of running scenarios and their health."),
    "bench": Lazy("deploy.commands.bench:command", "Measure, as ratios to limits taken in the same run."),
}


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are invoked, not when help lists them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every subcommand, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand."""
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        module, _, attribute = lazy.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), lazy.target
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of subcommands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.short_help) for name, lazy in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("vfio-model"), prog_name="vfio-model")
def cli() -> None:
    """A userspace model of device passthrough, made of real processes.

    Start with `vfio-model run linux-ddw-boot`. Every command has --json.
    """


def main() -> None:
    """The console script: errors as one sentence, exit status as the module's head says."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run the command line ``arguments``; the exit status."""
    try:
        result = cli.main(args=arguments, prog_name="vfio-model", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except ConfigError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except VfioModelError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except BrokenPipeError:
        # Whoever read our output has left; nothing can be said there any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()
