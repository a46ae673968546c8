"""``vfio-model check``."""

from __future__ import annotations

import re
import sys

import click
import msgspec

from deploy.check import check_trace
from deploy.check_report import CheckOptions, CheckReport
from deploy.quantity import parse_size
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.trace_options import GivenOptions

SHOWN = 20
"""Mismatches and malformed lines that are printed without --json."""


class SizeType(click.ParamType[int]):
    """``1GiB``, ``64K``, 0x10000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """To bytes."""
        if isinstance(value, int):
            return value
        try:
            return int(parse_size(str(value)))
        except (ValueError, ConfigError) as error:
            self.fail(str(error), param, ctx)


SIZE = SizeType()


def _page_mask(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(r"0[xX][0-9a-fA-F]+|[0-9]+", value):
        raise click.BadParameter("a bitmap of page sizes in bytes, as QEMU's pgsz: 0x1011000")
    return int(value, 0)


@click.command()
@click.argument("trace", type=click.Path())
@click.option("--ram", type=SIZE, help="RAM of the recorded machine (QEMU -m); default: 1 GiB or what the log shows.")
@click.option("--phbs", type=click.IntRange(1, 31), default=1, show_default=True, help="Host bridges, at least.")
@click.option("--ddw/--no-ddw", default=None, help="Dynamic DMA windows; default: what the log shows, else on.")
@click.option("--pgsz", callback=_page_mask, help="Page sizes that dynamic windows may have, a bitmap (QEMU pgsz).")
@click.option("--dma-win-addr", type=SIZE, help="Bus address of the default window; default: 0 or what the log shows.")
@click.option("--dma-win-size", type=SIZE, help="Its size; default: 1 GiB or what the log shows.")
@click.option("--dma64-win-addr", type=SIZE, help="Bus address of the 64-bit window; default: 0x800000000000000.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def command(
    trace: str,
    ram: int | None,
    phbs: int,
    ddw: bool | None,
    pgsz: int | None,
    dma_win_addr: int | None,
    dma_win_size: int | None,
    dma64_win_addr: int | None,
    as_json: bool,
) -> None:
    """Replay the QEMU trace TRACE (plain or gzip) through the model and report every difference.

    Record one with: qemu-system-ppc64 … -trace 'spapr_iommu_*' -trace 'spapr_pci_*' -D FILE, or qemu-system-x86_64 …
    -device intel-iommu -trace 'vtd_*' -D FILE. Of sPAPR translations, return codes and windows are compared; a
    translation is checked only against what earlier lines wrote. Of VT-d every line must come out of the model's unit
    again. Other events are counted and passed over. The options are of pseries machines. Exit status: 0 no difference,
    1 differences, 2 the file or part of it cannot be read.
    """
    given = GivenOptions(ddw, pgsz, dma_win_addr, dma_win_size, dma64_win_addr)
    report = check_trace(trace, CheckOptions(ram, phbs, given))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report.to_dict()), indent=2))
    else:
        _print(report)
    sys.exit(report.exit_code)


def _print(report: CheckReport) -> None:
    for error in report.errors:
        click.echo(f"error: {error}", err=True)
    for detail in report.details[:SHOWN]:
        click.echo(
            f"{report.path}:{detail['line']}: {detail['event']}: "
            f"recorded {detail['seen']}, the model says {detail['expected']}"
        )
    for broken in report.malformed[:SHOWN]:
        click.echo(f"{report.path}:{broken['line']}: not understood: {broken['reason']}")
    hidden = max(0, len(report.details) - SHOWN) + max(0, len(report.malformed) - SHOWN)
    if hidden:
        click.echo(f"… and {hidden} more (--json shows all)")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(
        f"{report.read_lines} lines: {report.events} events, {report.replayed} of them replayed, "
        f"{report.passed_over} passed over; {len(report.malformed)} lines not understood"
    )
    click.echo(
        f"{report.translations_checked} translations checked ({report.inferred} inferred), "
        f"{report.unchecked} unchecked, {report.mismatches} mismatches"
    )
