"""The command line of the host's side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from hostd.container import ContainerOptions, ContainerServer
from hostd.daemon import DaemonContext, arm, run
from hostd.device_shell import OnStuck
from hostd.model_name import find_class, read_props
from hostd.notifier import serve_notifier
from hostd.serve import Announce, serve_device
from hostd.topology_file import read_topology
from protocols.transport.runtime import check_private
from vfio_model.errors import ConfigError, PeerLost
from vfio_model.host.hpa import Placement

_DIRECTORY = click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(path_type=Path),
    help="Runtime directory, mode 0700: sockets, lock and trace of this role go there.",
)
_DIE = click.option(
    "--die-with-parent", is_flag=True, help="End (SIGKILL) when the process that started this one ends."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Host-side processes of vfio-model: VFIO containers, the notifier, device servers."""


@cli.command()
@_DIRECTORY
@click.option(
    "--topology",
    type=click.Path(path_type=Path),
    help="JSON file with groups and devices of the host; without it, one group 26 with an edu at 0000:01:00.0.",
)
@_DIE
@click.option(
    "--on-stuck",
    type=click.Choice(["kill", "warn", "stop-guest"]),
    default="kill",
    show_default=True,
    help="What happens to a device that stays in one DMA section past the deadline while an unmap waits for it. "
    "A device that is stopped or traced by its user is only warned about.",
)
@click.option("--deadline", type=click.FloatRange(min=0.05), default=5.0, show_default=True, help="Seconds until then.")
@click.option("--hpa", type=click.Choice(["contiguous", "scatter"]), help="How memory lies in the host-physical space.")
@click.option(
    "--fault",
    type=click.Choice(["skip-revoke-wait", "no-membarrier"]),
    help="Inject a fault: skip-revoke-wait answers an unmap while DMA through the old entry may still be under way; "
    "no-membarrier goes on as on a kernel without membarrier(2), where an unmap asks each device.",
)
def container(
    directory: Path,
    topology: Path | None,
    die_with_parent: bool,
    on_stuck: OnStuck,
    deadline: float,
    hpa: Placement | None,
    fault: str | None,
) -> None:
    """The host: mms, VFIO containers and groups, IOMMU tables, one process per assigned device.

    Serves hostd.sock (open files), hostd.zmq (ioctls) and hostd.ctl (control) in the runtime directory. SIGTERM ends it
    in order.
    """
    arm(die_with_parent)
    host = read_topology(topology, hpa)
    options = ContainerOptions(on_stuck, deadline, fault == "skip-revoke-wait", fault == "no-membarrier")

    def serve(context: DaemonContext) -> Callable[[], None]:
        return ContainerServer(context.loop, context.directory, host, context.trace, options, context.lock).close

    run(check_private(directory), "hostd", serve)


@cli.command()
@_DIRECTORY
@_DIE
def notifier(directory: Path, die_with_parent: bool) -> None:
    """The notifier: tells every process that caches translations what is no longer true.

    Serves notifier.sock, notifier.zmq and notifier.ctl in the runtime directory. SIGTERM ends it in order.
    """
    arm(die_with_parent)
    run(check_private(directory), "notifier", serve_notifier)


@cli.command()
@click.option("--model", required=True, help="Device model: a name, for example edu, or path/to/file.py:Class.")
@click.option("--socket", "path", help="Where to listen for vfio-user clients (a path of at most 107 bytes).")
@click.option("--fd", type=int, help="Instead: a socket that listens, or the connection to one client.")
@click.option("--prop", "props", multiple=True, metavar="K=V", help="A property of the model; may be repeated.")
@click.option("--props", "props_json", default="{}", metavar="JSON", help="Properties as one JSON object.")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Runtime directory for the trace; none: no trace."
)
@click.option("--announce", type=click.Choice(["text", "json", "nothing"]), default="text", hidden=True)
@_DIE
def device(
    model: str,
    path: str | None,
    fd: int | None,
    props: tuple[str, ...],
    props_json: str,
    directory: Path | None,
    announce: Announce,
    die_with_parent: bool,
) -> None:
    """A remote emulated device: a vfio-user server in the foreground.

    Its DMA goes through a cache of the guest's translations, or through what the client maps, or by message.
    """
    arm(die_with_parent)
    values = read_props(find_class(model), props, props_json)
    serve_device(model, socket=path, fd=fd, announce=announce, directory=directory, **values)


def main() -> None:
    """Entry point: errors that a person can act on are one line and exit status 2."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ConfigError, PeerLost) as error:
        click.echo(f"hostd: {error}", err=True)
        sys.exit(2)
