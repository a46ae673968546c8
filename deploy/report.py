"""The verdict of a run: a text that a person reads, and a folder of files that a program reads.

The text ends with ``PASS <name>`` or ``FAIL <name>: reason``. The folder holds ``verdict.json`` (this schema),
``events.jsonl`` (the merged log of all processes), ``timeline.json`` (opens in Perfetto) and the processes' own logs.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy import events, timeline
from deploy.events import Log
from deploy.quantity import show_size


class StepResult(msgspec.Struct):
    """One step. ``seconds`` is wall time; ``reason`` says why it failed; ``facts`` are what it counted or saw."""

    index: int
    action: str
    ok: bool
    seconds: float
    text: str = ""
    reason: str = ""
    facts: dict[str, int | str | bool | float] = {}


class ProcessPart(msgspec.Struct):
    """What one process did: memory in bytes, CPU in seconds, events written, times started afresh, how it ended."""

    role: str
    pid: int
    events: int = 0
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    restarts: int = 0
    ended: str = "in order"


class Totals(msgspec.Struct):
    """Over the whole run. Pages as the guest mapped them; DMA tries and what became of them."""

    pages_mapped: int = 0
    pages_unmapped: int = 0
    bytes_mapped: int = 0
    windows_created: int = 0
    translations_checked: int = 0
    mismatches: int = 0
    dma_moved: int = 0
    dma_refused: int = 0
    bytes_moved: int = 0
    messages_lost: int = 0


class Verdict(msgspec.Struct):
    """The outcome of a run."""

    name: str
    description: str
    passed: bool
    reason: str = ""
    seconds: float = 0.0
    start_seconds: float = 0.0
    first_dma_seconds: float | None = None
    totals: Totals = msgspec.field(default_factory=Totals)
    steps: list[StepResult] = []
    processes: list[ProcessPart] = []
    findings: list[str] = []
    leftovers: list[str] = []
    torn_log_lines: int = 0

    @property
    def last_line(self) -> str:
        """``PASS name`` or ``FAIL name: reason``; the reason's first line."""
        reason = self.reason.splitlines()[0] if self.reason else "see above"
        return f"PASS {self.name}" if self.passed else f"FAIL {self.name}: {reason}"


def show(verdict: Verdict, console: Console, folder: Path | None = None) -> None:
    """Print the verdict and where its report is; the last line is :attr:`Verdict.last_line`."""
    console.print(f"[italic]{escape(verdict.description)}[/]", highlight=False)
    console.print(_steps(verdict))
    console.print(_totals(verdict) if verdict.steps else "")
    console.print(_processes(verdict))
    for finding in verdict.findings:
        console.print(f"[yellow]finding[/]: {escape(finding)}", highlight=False)
    if not verdict.passed and "\n" in verdict.reason:
        console.print(escape(verdict.reason), highlight=False)
    if folder is not None:
        console.print(f"report   {folder}", highlight=False, markup=False, soft_wrap=True)
    style = "bold green" if verdict.passed else "bold red"
    console.print(f"[{style}]{escape(verdict.last_line)}[/]", highlight=False, soft_wrap=True)


def _steps(verdict: Verdict) -> Table:
    view = Table(box=None, pad_edge=False)
    view.add_column("STEP", justify="right")
    view.add_column("ACTION")
    view.add_column("SECONDS", justify="right")
    view.add_column("OUTCOME", overflow="fold")
    view.add_row("", "start", f"{verdict.start_seconds:.3f}", "every process answers" if verdict.steps else "")
    for step in verdict.steps:
        text = escape(step.text) if step.ok else f"[red]{escape(step.reason)}[/]"
        view.add_row(str(step.index), step.action, f"{step.seconds:.3f}", text)
    return view


def _totals(verdict: Verdict) -> str:
    total = verdict.totals
    lines = [
        f"mapped   {total.pages_mapped:,} pages ({show_size(total.bytes_mapped)}) in "
        f"{1 + total.windows_created} window(s); unmapped {total.pages_unmapped:,}",
        f"moved    {total.dma_moved:,} DMA, {show_size(total.bytes_moved)}; refused {total.dma_refused:,}",
        f"checked  {total.translations_checked:,} translations, {total.mismatches} mismatch(es)",
        f"took     {verdict.seconds:.2f} s"
        + (f", first DMA after {verdict.first_dma_seconds:.2f} s" if verdict.first_dma_seconds is not None else ""),
    ]
    return "\n" + "\n".join(lines) + "\n"


def _processes(verdict: Verdict) -> Table:
    view = Table(box=None, pad_edge=False)
    view.add_column("PROCESS")
    for heading in ("PID", "CPU s", "PEAK MiB", "EVENTS", "RESTARTS"):
        view.add_column(heading, justify="right")
    view.add_column("ENDED")
    for part in verdict.processes:
        numbers = (str(part.pid), f"{part.cpu_seconds:.2f}", f"{part.peak_rss / (1 << 20):.1f}", f"{part.events:,}")
        view.add_row(part.role, *numbers, str(part.restarts), escape(part.ended))
    return view


def default_folder(name: str) -> Path:
    """Where the report of a run that starts now goes when the operator names no place: under the working directory."""
    return Path("vfio-model-report") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def write(folder: Path, verdict: Verdict, log: Log, logs: list[Path]) -> None:
    """Write the report; ``logs`` are the processes' own output, which are copied when they are not empty.

    :raise OSError: when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdict.json").write_bytes(msgspec.json.format(msgspec.json.encode(verdict), indent=2) + b"\n")
    events.write(folder / "events.jsonl", log.records)
    timeline.write(folder / "timeline.json", log)
    for path in logs:
        if path.is_file() and path.stat().st_size:
            shutil.copyfile(path, folder / path.name)
