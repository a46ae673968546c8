"""How the rows of a bench are shown: as a table, or as JSON."""

from __future__ import annotations

import platform
from typing import Any

import click
import msgspec
from rich.table import Table

from deploy.bench.measure import Row
from deploy.console import output


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _aim(row: Row) -> str:
    if row.aim is None:
        return ""
    return f"{'≥' if row.at_least else '≤'} {row.aim:g}"


def _table(rows: list[Row]) -> Table:
    drawn = Table(title="ratios are judged, absolute times are those of this machine in this run")
    for heading in ("what", "time", "limit", "limit's time", "ratio", "aim", "met", "p99", "note"):
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        limit = "" if row.limit_seconds is None else _time(row.limit_seconds)
        met = {True: "yes", False: "NO", None: ""}[row.met]
        p99 = f"{row.extra['p99_us']:g} us" if "p99_us" in row.extra else ""
        drawn.add_row(row.name, _time(row.seconds), row.limit, limit, ratio, _aim(row), met, p99, row.note)
    return drawn


def _json(row: Row) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": row.name,
        "seconds": row.seconds,
        "limit": row.limit,
        "limit_seconds": row.limit_seconds,
        "ratio": row.ratio,
        "aim": row.aim,
        "aim_is": "at least" if row.at_least else "at most",
        "met": row.met,
        "note": row.note,
    }
    return value | row.extra


def show(rows: list[Row], seconds: float, *, as_json: bool) -> None:
    """Print ``rows``, which took ``seconds``."""
    if as_json:
        document = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "seconds": round(seconds, 1),
            "rows": [_json(row) for row in rows],
        }
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
        return
    output().print(_table(rows))
    judged = [row for row in rows if row.met is not None]
    missed = [row.name for row in judged if not row.met]
    click.echo(
        f"{len(judged) - len(missed)} of {len(judged)} aims met" + (f"; not: {', '.join(missed)}" if missed else "")
    )
