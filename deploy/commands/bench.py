"""``vfio-model bench``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import click

from deploy.bench import atc, dma, emulated, huge, live, mapped, nvme, pages, vfio_user, walks
from deploy.bench.measure import Row
from deploy.bench.report import show
from deploy.console import StepProgress

PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "64B": lambda: dma.small(64),
    "4K": lambda: dma.small(4096),
    "scattered": dma.scattered,
    "batch": dma.batches,
    "walks": walks.rows,
    "emulated": emulated.rows,
    "atc": atc.rows,
    "pages": pages.rows,
    "mapped": mapped.rows,
    "vfio-user": vfio_user.rows,
    "nvme": nvme.rows,
    "live": live.rows,
    "huge": huge.rows,
}


@click.command()
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="Measure this part alone (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON; times in seconds.")
def command(only: tuple[str, ...], as_json: bool) -> None:
    """Measure DMA, translation, hypercalls, revocation, vfio-user and NVMe, as ratios to limits that the same run
    measures.

    Each figure and its limit are timed in turn; the ratio is the median of the rounds' ratios. Takes about a minute.
    """
    chosen = only or tuple(PARTS)
    rows: list[Row] = []
    began = time.monotonic()
    with StepProgress(silent=as_json) as progress:
        for number, part in enumerate(chosen):
            progress(part, number, len(chosen))
            rows += PARTS[part]()
        progress("done", len(chosen), len(chosen))
    show(rows, time.monotonic() - began, as_json=as_json)
