"""``vfio-model explain``: how a device's DMA address is translated in a running guest, step by step, through both
stages.

Stage 1 is guestd's vIOMMU (IOVA to guest-physical), stage 2 the host's table that an assigned device's process walks
(IOVA to host-physical). Both daemons read their *live* tables and answer with the steps that they took; nothing is
computed here but the comparison: the first step that fails is named, and where one stage lets through what the other
refuses it is said, for that is how a lost or late invalidation looks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.markup import escape

from deploy import runtime_dir
from deploy.link import Link
from protocols.control.messages import DeviceList, Explain
from vfio_model.errors import ConfigError, RemoteProtocolError

T = TypeVar("T")


class ExplainStep(msgspec.Struct):
    """One thing that a walk looked at: ``what``, the ``value`` found there, and whether the walk can go on."""

    what: str
    value: str = ""
    ok: bool = True


class Stage(msgspec.Struct):
    """One stage's answer. ``result`` is the address it gives, in bytes; None when a step fails."""

    steps: list[ExplainStep]
    result: int | None = None
    perm: str = ""
    page_size: int = 0
    """Of the stage's DMA window, in bytes; 0 when the walk did not come to one."""

    @property
    def failing(self) -> ExplainStep | None:
        """The first step that fails."""
        return next((step for step in self.steps if not step.ok), None)


class DeviceInfo(msgspec.Struct):
    """A device of the guest, as guestd lists it. ``host`` is the host's name of an assigned one; ``bars`` index to
    address.
    """

    id: str
    model: str
    address: str
    attach: str = "emulated"
    host: str = ""
    bars: dict[str, int] = {}


class Explanation(msgspec.Struct):
    """Both stages. ``host`` is None for a device that does not use the host's table."""

    device: str
    iova: int
    guest: Stage
    host: Stage | None = None
    fails: str = "none"
    """``none``, ``stage-1`` or ``stage-2``: the first stage that refuses the address."""
    entry: str = ""
    """The step that fails, in words."""
    disagreement: str = ""


def explain(guest: Link, host: Link, device: DeviceInfo, iova: int) -> Explanation:
    """Ask both daemons. :raise CommandFailed: when one cannot answer."""
    stage1 = _stage(guest, device.address, iova)
    stage2 = _stage(host, device.host, iova) if device.attach == "assigned" else None
    return compare(Explanation(device.id, iova, stage1, stage2))


def compare(found: Explanation) -> Explanation:
    """Fill in what follows from both stages: which one fails where, and whether they disagree."""
    stage1, stage2 = found.guest, found.host
    for name, stage in (("stage-1", stage1), ("stage-2", stage2)):
        if stage is not None and stage.failing is not None and found.fails == "none":
            found.fails, found.entry = name, _words(stage.failing)
    if stage2 is not None and (stage1.failing is None) != (stage2.failing is None):
        found.disagreement = (
            "the guest has no mapping here, the host still has one: the device reaches memory that the guest took back"
            if stage2.failing is None
            else "the guest has a mapping here, the host has none: the device is refused what the guest allows"
        )
    return found


def _stage(link: Link, address: str, iova: int) -> Stage:
    return _converted(link, link.document(Explain(address, int(iova))), Stage)


def _converted(link: Link, document: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"{link.role}: {error}") from error


def devices(guest: Link) -> list[DeviceInfo]:
    """The guest's devices."""
    return _converted(guest, guest.document(DeviceList()).get("devices", []), list[DeviceInfo])


def choose_device(known: list[DeviceInfo], name: str) -> DeviceInfo:
    """The device whose id or address (``02.0``, ``00:02.0``) is ``name``. :raise ConfigError: when there is none."""
    for device in known:
        if name == device.id or device.address.endswith(name):
            return device
    have = ", ".join(f"{device.id} at {device.address}" for device in known) or "none"
    raise ConfigError(f"the guest has no device {name}", hint=f"it has: {have}")


def choose_run(directory: str | None) -> Path:
    """The runtime directory to look into: the one given, or the only run of this user.

    :raise ConfigError: when there is none, or more than one.
    """
    if directory is not None:
        if runtime_dir.read_run_file(Path(directory)) is None:
            raise ConfigError("no run is described there", where=directory, hint="vfio-model ps lists the running ones")
        return Path(directory)
    runs = [path for path, run in runtime_dir.find_runs() if any(map(runtime_dir.is_same, run.processes))]
    if not runs:
        raise ConfigError("no guest is running", hint="start one with vfio-model run SCENARIO --keep")
    if len(runs) > 1:
        raise ConfigError(f"{len(runs)} guests are running", hint="choose one with --dir: " + ", ".join(map(str, runs)))
    return runs[0]


def ask(directory: Path, name: str, iova: int) -> Explanation:
    """Explain ``iova`` for the device ``name`` of the run in ``directory``. Errors as the functions above."""
    guest, host = Link(directory, "guestd"), Link(directory, "hostd")
    try:
        return explain(guest, host, choose_device(devices(guest), name), iova)
    finally:
        guest.close()
        host.close()


def show(found: Explanation, console: Console) -> None:
    """Print both walks; the step that fails is marked."""
    console.print(f"{found.device}: iova {found.iova:#x}", highlight=False)
    for title, stage in (("stage 1, the guest's vIOMMU", found.guest), ("stage 2, the host's table", found.host)):
        if stage is None:
            console.print(f"  {title}: not used by this device")
            continue
        console.print(f"  {title}")
        for number, step in enumerate(stage.steps, 1):
            mark = "[green]ok  [/]" if step.ok else "[red]FAIL[/]"
            console.print(f"    {number}. {mark} {escape(_words(step))}", highlight=False)
        if stage.failing is None and stage.result is not None:
            console.print(f"    = {stage.result:#x} {escape(stage.perm)}", highlight=False)
    if found.disagreement:
        console.print(f"[yellow]the stages disagree[/]: {escape(found.disagreement)}", highlight=False)
    verdict = f"fails in {found.fails}: {found.entry}" if found.fails != "none" else "translates"
    console.print(escape(verdict), highlight=False)


def _words(step: ExplainStep) -> str:
    return f"{step.what}: {step.value}" if step.value else step.what
