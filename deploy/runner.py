"""Runs a scenario's steps against a running system and keeps the score.

A step ends with a :class:`deploy.report.StepResult`; the first that fails ends the run. What a guest's kernel would
do goes through a CPU (:mod:`vfio_model.guest_drivers`), what an operator would do through
:class:`deploy.system.System`. Nothing here knows whether the system is live.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy import scenario_steps as schema
from deploy.explain import Explanation
from deploy.lost import find_lost
from deploy.probe import LENGTH, Prober
from deploy.quantity import show_size
from deploy.replay_step import PendingSignal, ReplayStep
from deploy.report import StepResult, Totals
from deploy.scenario import Scenario
from deploy.scenario_machine import Pseries
from deploy.scenario_steps import Step
from deploy.system import System
from deploy.vtd_steps import VtdSteps
from vfio_model.devices.dma_burst import regs as dma_burst
from vfio_model.errors import ConfigError, VfioModelError
from vfio_model.guest_drivers import svm_program
from vfio_model.guest_drivers.pseries_ddw import PseriesDdw
from vfio_model.iommu.spapr import regs
from vfio_model.pci.address import PCIAddress

LIST_GPA = 0x10000
"""Where guest drivers put their TCE lists."""
BURST_PATTERN = 0x5A5A_A5A5_5A5A_A5A5
_LOOK_SECONDS = 0.02


@dataclass
class Outcome:
    """What a step did: ``text`` for the table; ``reason`` is why it failed, empty when it did not."""

    text: str = ""
    reason: str = ""
    facts: dict[str, int | str | bool | float] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]
"""Told the action, how much is done and how much there is (0: not known)."""


def _silent(action: str, done: int, total: int) -> None:
    return None


class Runner:
    """One run of ``scenario`` on ``system``. ``beside`` is the scenario file's folder, for relative trace names."""

    def __init__(self, scenario: Scenario, system: System, beside: Path, progress: Progress = _silent) -> None:
        self._scenario, self._system, self._beside, self._progress = scenario, system, beside, progress
        self.totals = Totals()
        self.findings: list[str] = []
        self.results: list[StepResult] = []
        self.first_dma_ns: int | None = None
        """CLOCK_MONOTONIC when the first DMA had gone through."""
        self._probers: dict[str, Prober] = {}
        self._pending: list[PendingSignal] = []
        self._vtd = VtdSteps(scenario, system)
        self._svm_commands = 0
        """Of svm devices, that were counted."""
        self._handlers: dict[str, Callable[[Any], Outcome]] = {
            "replay": self._replay,
            "linux_ddw": self._linux_ddw,
            "dma": self._dma,
            "map": self._map,
            "unmap": self._unmap,
            "hcall": self._hcall,
            "rtas": self._rtas,
            "kill": lambda at: self._signal(at, signal.SIGKILL),
            "stop": lambda at: self._signal(at, signal.SIGSTOP),
            "cont": lambda at: self._signal(at, signal.SIGCONT),
            "expect": self._expect,
            "wait": self._wait,
            "explain": self._explain,
            "find_lost": self._find_lost,
            "arm": self._arm,
            "burst": self._burst,
            "migrate": self._migrate,
            "svm": self._svm,
            "vtd": lambda step: Outcome(self._vtd.vtd(step)),
            "domain": lambda step: Outcome(self._vtd.domain(step)),
        }

    def run(self) -> str:
        """Run every step; why the run failed, or an empty string."""
        for index, step in enumerate(self._scenario.steps):
            result = self._run_step(index, step)
            self.results.append(result)
            if not result.ok:
                return f"step {index} ({result.action}): {result.reason}"
        return ""

    def _run_step(self, index: int, step: Step) -> StepResult:
        name, action = step.action
        kind = self._scenario.kind
        if isinstance(step.only, list) and kind not in step.only:
            return StepResult(index, name, True, 0.0, f"not with a {kind} container")
        self._progress(name, 0, 0)
        began = time.monotonic()
        self._system.trace("step_begin", seq=index, step=name)
        try:
            outcome = self._handlers[name](action)
        except ConfigError:
            raise
        except VfioModelError as error:
            outcome = Outcome(reason=str(error))
        except OSError as error:
            outcome = Outcome(reason=f"{type(error).__name__}: {error}")
        seconds = time.monotonic() - began
        self._system.trace("step_end", seq=index, step=name, ok=not outcome.reason, reason=outcome.reason)
        self._count_dma()
        ok = not outcome.reason
        return StepResult(index, name, ok, round(seconds, 4), outcome.text, outcome.reason, outcome.facts)

    def _count_dma(self) -> None:
        probers = self._probers.values()
        self.totals.dma_moved = sum(prober.counts.moved for prober in probers)
        self.totals.dma_refused = sum(prober.counts.refused for prober in probers)
        self.totals.bytes_moved = sum(prober.counts.bytes_moved for prober in probers)
        moments = [prober.first_moved_ns for prober in probers if prober.first_moved_ns is not None]
        self.first_dma_ns = min(moments, default=None)

    def prober(self, device: str) -> Prober:
        """The prober of ``device``, made at first use."""
        if device not in self._probers:
            driver = self._system.driver(device)
            self._probers[device] = Prober(device, driver, self._system.cpu, self._system.trace)
        return self._probers[device]

    def _replay(self, replay: schema.Replay) -> Outcome:
        step = ReplayStep(
            replay, self._scenario.pseries, self._beside, self._system, self.prober, self._pending, self._progress
        )
        reason = step.run()
        self._pending.clear()
        step.add_to(self.totals)
        return Outcome(step.text(), reason, step.facts())

    def _linux_ddw(self, wanted: schema.LinuxDdw) -> Outcome:
        device = next(device for device in self._scenario.devices if device.id == wanted.device)
        ram = self._scenario.machine.ram
        driver = PseriesDdw(
            self._system.cpu,
            PCIAddress.parse(device.addr).devfn,
            ram_size=ram,
            list_gpa=LIST_GPA,
            phb_index=self._scenario.pseries.phb_on(device.bus).index,
        )
        got = driver.enable()
        if got is None:
            reason = "" if wanted.expect == "refused" else "Linux got no window and stays with the default one"
            return Outcome("refused; Linux stays with the default window", reason)
        window = got.window
        pages = ram // window.page_size if got.direct else 0
        self.totals.windows_created += 1
        self.totals.pages_mapped += pages
        self.totals.bytes_mapped += pages * window.page_size
        text = f"window at {window.bus_offset:#x}, pages of {window.page_size >> 10} KiB, {pages} mapped"
        if wanted.expect == "refused":
            return Outcome(text, f"expected to be refused, got a {text}")
        if wanted.page_size is not None and wanted.page_size != window.page_size:
            return Outcome(text, f"expected pages of {int(wanted.page_size)} bytes, got {window.page_size}")
        return Outcome(text)

    def _map(self, pages: schema.MapPages) -> Outcome:
        if pages.device:
            text = self._vtd.map(pages)
            for offset in range(0, pages.pages * pages.page_size, pages.page_size):
                self._mapped(pages.iova + offset, pages.gpa + offset, pages.page_size, pages.perm)
            return Outcome(text)
        perm = ("r" in pages.perm) * regs.TcePerm.READ | ("w" in pages.perm) * regs.TcePerm.WRITE
        for number in range(pages.pages):
            offset = number * pages.page_size
            tce = pages.gpa + offset | perm
            ret, _ = self._system.cpu.hcall(regs.HCall.H_PUT_TCE, pages.liobn, pages.iova + offset, tce)
            if (said := _return_name(ret)) != pages.expect:
                return Outcome(reason=f"H_PUT_TCE at {pages.iova + offset:#x} returned {said}, expected {pages.expect}")
            if ret == 0:
                self._mapped(pages.iova + offset, pages.gpa + offset, pages.page_size, pages.perm)
        return Outcome(f"{pages.pages} page(s) at {pages.iova:#x} to {pages.gpa:#x}, {pages.expect}")

    def _mapped(self, iova: int, gpa: int, size: int, perm: str) -> None:
        self.totals.pages_mapped += 1
        self.totals.bytes_mapped += size
        self._system.trace("map_pages", iova=iova, gpa=gpa, size=size, perm=perm)

    def _unmap(self, pages: schema.UnmapPages) -> Outcome:
        if pages.device:
            text = self._vtd.unmap(pages)
            self.totals.pages_unmapped += pages.pages
            self._system.trace("unmap_pages", iova=pages.iova, pages=pages.pages)
            return Outcome(text)
        ret, _ = self._system.cpu.hcall(regs.HCall.H_STUFF_TCE, pages.liobn, pages.iova, 0, pages.pages)
        if (said := _return_name(ret)) != pages.expect:
            return Outcome(reason=f"H_STUFF_TCE at {pages.iova:#x} returned {said}, expected {pages.expect}")
        self.totals.pages_unmapped += pages.pages
        self._system.trace("unmap_pages", iova=pages.iova, pages=pages.pages)
        return Outcome(f"{pages.pages} page(s) at {pages.iova:#x}, {said}")

    def _dma(self, dma: schema.Dma) -> Outcome:
        prober = self.prober(dma.device)
        if dma.direction == "read":
            moved = self._with_stage(dma, lambda iova, gpa: prober.load_moves(dma.iova, dma.gpa, iova, gpa))
        else:
            self._with_stage(dma, lambda iova, gpa: bool(prober.fill(iova, gpa)))
            moved = prober.store_moves(dma.iova, dma.gpa)
        text = f"{dma.device}: a {dma.direction} at {dma.iova:#x} {'moved' if moved else 'was refused'}"
        return Outcome(text, "" if moved == (dma.expect == "ok") else f"{text}, expected {dma.expect}")

    def _with_stage(self, dma: schema.Dma, use: Callable[[int, int], bool]) -> bool:
        """Call ``use(iova, gpa)`` while the last page of the default window of the device's bridge is mapped to RAM's
        last page; on a PC in its domain, or where its address is its own.
        """
        cpu, machine = self._system.cpu, self._scenario.machine
        if not isinstance(machine, Pseries):
            return self._vtd.with_stage(dma.device, int(machine.ram), use)
        phb = machine.phb_on(next(device.bus for device in self._scenario.devices if device.id == dma.device))
        liobn, iova, gpa = regs.pci_liobn(phb.index, 0), machine.end_of_default_window(phb) - 4096, machine.ram - 4096
        ret, _ = cpu.hcall(regs.HCall.H_PUT_TCE, liobn, iova, gpa | regs.TcePerm.RW)
        if ret:
            raise ConfigError(
                f"a page to look into the device's buffer cannot be mapped at {iova:#x}: {_return_name(ret)}"
            )
        try:
            return use(iova, gpa)
        finally:
            cpu.hcall(regs.HCall.H_PUT_TCE, liobn, iova, 0)

    def _hcall(self, call: schema.Hcall) -> Outcome:
        number = call.name if isinstance(call.name, int) else _number(regs.HCall, call.name, "hypercall")
        ret, outs = self._system.cpu.hcall(number, *call.args)
        said = _return_name(ret)
        text = f"{call.name}: {said}" + (f", {', '.join(map(hex, outs))}" if outs else "")
        return Outcome(text, "" if said == call.expect else f"{call.name} returned {said}, expected {call.expect}")

    def _rtas(self, call: schema.Rtas) -> Outcome:
        token = call.name
        if isinstance(token, str):
            token = _number(regs.RtasToken, token.upper().replace(",", "_").replace("-", "_"), "RTAS call")
        rets = self._system.cpu.rtas(token, call.args, call.nret)
        status = regs.rtas_status(rets)
        text = f"{call.name}: status {status}, {rets[1:]}"
        return Outcome(text, "" if status == call.expect else f"{text}, expected {call.expect}")

    def _signal(self, at: schema.At, number: signal.Signals) -> Outcome:
        if at.at is not None:
            self._pending.append(PendingSignal(at.at, at, number))
            return Outcome(f"{number.name} for {at.role or at.device} after {at.at} calls of the next replay")
        return Outcome(f"{number.name} sent to {self._system.signal(at, number)}")

    def _expect(self, wanted: schema.Expect) -> Outcome:
        deadline = time.monotonic() + wanted.within
        while True:
            value = self._reported(wanted)
            late = time.monotonic() >= deadline
            if _holds(wanted, value) or late:
                break
            self._progress("expect", 0, 0)
            time.sleep(_LOOK_SECONDS)
        where = f"{wanted.role}: {wanted.key} is {value!r}"
        return Outcome(where, "" if _holds(wanted, value) else f"{where}, expected {_bounds(wanted)}")

    def _reported(self, wanted: schema.Expect) -> object:
        value: object = self._system.status(wanted.role)
        for word in wanted.key.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        return value

    def _wait(self, wait: schema.Wait) -> Outcome:
        came = self._system.wait(wait)
        text = f"{wait.role} is {wait.until}"
        return Outcome(text, "" if came else f"{wait.role} was not {wait.until} within {wait.seconds:g} s")

    def _explain(self, wanted: schema.Explain) -> Outcome:
        found = self._system.explain(wanted.device, wanted.iova)
        text = f"{wanted.device} at {wanted.iova:#x}: " + (
            f"fails in {found.fails}, {found.entry}" if found.fails != "none" else f"translates{_pages(found)}"
        )
        if found.disagreement:
            self.findings.append(f"{wanted.device} at {wanted.iova:#x}: {found.disagreement}")
        ok = wanted.fails in (None, found.fails) or (wanted.fails == "any" and found.fails != "none")
        return Outcome(text, "" if ok else f"{text}; expected to fail: {wanted.fails}")

    def _find_lost(self, wanted: schema.FindLost) -> Outcome:
        lost = find_lost(self._system.log())
        self.totals.messages_lost = len(lost)
        self.findings += [each.text() for each in lost]
        text = f"{len(lost)} message(s) lost" + (f": {lost[0].text().splitlines()[0]}" if lost else "")
        if len(lost) != wanted.expect:
            return Outcome(text, f"{text}; expected {wanted.expect}")
        if wanted.stale_dma and not any(each.stale_dma for each in lost):
            return Outcome(text, f"{text}; no DMA is in the logs that used the mapping afterwards")
        return Outcome(text)

    def _burst(self, burst: schema.Burst) -> Outcome:
        driver = self._system.burst(burst.device)
        if burst.do == "start":
            command = dma_burst.COMMAND_WRITE | dma_burst.COMMAND_BACKGROUND | dma_burst.COMMAND_FOREVER
            pages = burst.pages
            driver.start(burst.iova, LENGTH, pages, stride=4096, span=pages, pattern=BURST_PATTERN, command=command)
            return Outcome(f"{burst.device} writes to {pages} page(s) at {burst.iova:#x} from now on")
        before = now = driver.result()
        deadline = time.monotonic() + burst.seconds
        while now.completed == before.completed and time.monotonic() < deadline:
            self._progress("burst", 0, 0)
            now = driver.result()
        if burst.do == "stop":
            driver.stop()
        text = f"{burst.device}: {now.completed} writes, {now.failed} refused"
        if now.completed == before.completed:
            return Outcome(text, f"{text}; it has stopped writing")
        return Outcome(text, text if now.failed else "")

    def _migrate(self, wanted: schema.Migrate) -> Outcome:
        moved, text = self._system.migrate(wanted)
        return Outcome(text, "" if moved == (wanted.expect == "completed") else f"{text}, expected {wanted.expect}")

    def _svm(self, wanted: schema.Svm) -> Outcome:
        kernel = self._system.svm(wanted.device)
        result = svm_program.run(wanted.test, kernel.cpu, kernel.frames, kernel.driver)
        done = self._system.log().named("svm_done")
        cached = max((each.number("cached") or 0 for each in done[self._svm_commands :]), default=0)
        commands, self._svm_commands = len(done) - self._svm_commands, len(done)
        facts: dict[str, int | str | bool | float] = {
            "commands": commands,
            "page_requests": result.page_requests,
            "page_faults": result.page_faults,
            "invalidations": result.invalidations,
            "most_cached": cached,
        }
        text = (
            f"{result.name}: as expected; {commands} command(s), {result.page_requests:,} page request(s), "
            f"{result.invalidations:,} invalidation(s), at most {cached} translation(s) cached"
        )
        return Outcome(text, result.reason and f"{result.name}: {result.reason}", facts)

    def _arm(self, _: schema.Arm) -> Outcome:
        self._system.arm()
        return Outcome("the interposer's rules act from now on")


def _return_name(ret: int) -> str:
    try:
        return regs.HReturn(ret).name
    except ValueError:
        return str(ret)


def _number(names: Any, name: str, what: str) -> int:
    try:
        return int(names[name])
    except KeyError:
        raise ConfigError(f"no {what} is called {name}", hint="known: " + ", ".join(names.__members__)) from None


def _holds(wanted: schema.Expect, value: object) -> bool:
    if wanted.equals is not None and value != wanted.equals:
        return False
    if wanted.at_least is not None and not (isinstance(value, int) and value >= wanted.at_least):
        return False
    return wanted.at_most is None or (isinstance(value, int) and value <= wanted.at_most)


def _bounds(wanted: schema.Expect) -> str:
    parts = [f"{wanted.equals!r}"] if wanted.equals is not None else []
    parts += [f"at least {wanted.at_least}"] if wanted.at_least is not None else []
    parts += [f"at most {wanted.at_most}"] if wanted.at_most is not None else []
    return " and ".join(parts) or "anything"


def _pages(found: Explanation) -> str:
    """The page sizes of both stages, in words."""
    host = "" if found.host is None else f", the host's {show_size(found.host.page_size)}"
    return f"; the guest's page is {show_size(found.guest.page_size)}{host}"
