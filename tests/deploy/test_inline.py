"""All roles in one process: the same outcomes as with processes, the same messages at every hop, nothing kept."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from deploy import run, shipped, yaml_lines
from deploy.events import Log, Record
from deploy.inline.system import InlineSystem, check
from deploy.report import Verdict
from deploy.runner import BURST_PATTERN, Runner
from deploy.scenario import Scenario
from deploy.scenario_machine import Pseries
from deploy.scenario_steps import At, Migrate
from tests import acceleration
from vfio_model.devices.edu import regs as edu
from vfio_model.errors import ConfigError, InternalGuestError
from vfio_model.guest_drivers.pci import MmioWindow, bring_up
from vfio_model.iommu.spapr import regs

pytestmark = pytest.mark.machine

MASK = "props: {dma_mask: 0xffffffffffffffff}"
HEAD = "name: mine\nmachine: {ram: 64MiB}\ndevices:\n"
ASSIGNED = f"  - {{id: nic, model: edu, attach: assigned, addr: 02.0, {MASK}}}\n"
EVERY_KIND = (
    ASSIGNED
    + f"  - {{id: cache, model: edu, attach: remote, addr: 03.0, {MASK}}}\n"
    + f"  - {{id: local, model: edu, attach: emulated, addr: 04.0, {MASK}}}\n"
)
SWAPPED_ONE = 1 << 24
"""1 in a register of a device behind VFIO, which is little-endian, as the big-endian machine stores it."""
MAP, UNMAP = "  - map: {iova: 0x3000, gpa: 0x200000}\n", "  - unmap: {iova: 0x3000}\n"


def scenario(steps: str = "", devices: str = ASSIGNED, more: str = "") -> Scenario:
    listed = f"steps:\n{steps}" if steps else ""
    parsed = yaml_lines.parse(f"{HEAD}{devices}{more}{listed}", "mine.yaml", Scenario)
    parsed.machine.kvm = acceleration.kvm()
    return parsed


def needs_processes(name: str) -> bool:
    return any(isinstance(step.action[1], At | Migrate) for step in shipped.load_scenario(name).steps)


def ran(name: str, folder: Path | None = None, *, inline: bool = True, kvm: bool | None = None) -> Verdict:
    chosen = shipped.load_scenario(name)
    if isinstance(chosen.machine, Pseries):
        chosen.machine.kvm = acceleration.kvm(kvm)
    return run.run(chosen, Path(), folder, lambda *_: None, inline=inline)


@contextmanager
def stepped(steps: str, devices: str = ASSIGNED, more: str = "") -> Iterator[tuple[InlineSystem, Runner, str]]:
    """A system after its steps, and what went wrong in them."""
    parsed = scenario(steps, devices, more)
    with closing(InlineSystem(parsed)) as system:
        system.bring_up()
        runner = Runner(parsed, system, Path())
        yield system, runner, runner.run()


# -- shipped scenarios -----------------------------------------------------------------------------------------------


SINGLE = [name for name in shipped.scenario_names() if not needs_processes(name)]
CASES = [
    (name, kvm)
    for name in SINGLE
    for kvm in ([False, True] if isinstance(shipped.load_scenario(name).machine, Pseries) else [False])
]


@pytest.mark.parametrize(("name", "kvm"), CASES, ids=[f"{name}-{'kvm' if kvm else 'user'}" for name, kvm in CASES])
def test_a_shipped_scenario_passes_in_one_process(name: str, kvm: bool, tmp_path: Path) -> None:
    verdict = ran(name, tmp_path, kvm=kvm)
    assert verdict.last_line == f"PASS {name}", verdict.reason
    assert [part.pid for part in verdict.processes] == [os.getpid()] and verdict.leftovers == []
    assert {path.name for path in tmp_path.iterdir()} == {"verdict.json", "events.jsonl", "timeline.json"}


@pytest.mark.parametrize("name", [name for name in shipped.scenario_names() if needs_processes(name)])
def test_a_shipped_scenario_that_needs_processes_is_refused_by_the_step_s_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"steps\[\d+\].(kill|migrate): .*run it without --inline"):
        ran(name)


BURST = "  - {{id: nic, model: dma-burst, attach: {attach}, addr: 02.0}}\n"
START = "  - burst: {device: nic, iova: 0x3000, pages: 2}\n"


@pytest.mark.parametrize("attach", ["assigned", "remote", "emulated"])
@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ("  - map: {iova: 0x3000, gpa: 0x200000, pages: 2}\n" + START + "  - burst: {device: nic, do: goes-on}\n", ""),
        (MAP + START + "  - burst: {device: nic, do: stop}\n", " refused"),
        ("  - burst: {device: nic, do: goes-on, seconds: 0.01}\n", "it has stopped writing"),
    ],
)
def test_a_burst_goes_on_until_it_is_refused_or_stopped(attach: str, steps: str, why: str) -> None:
    with stepped(steps, BURST.format(attach=attach)) as (system, _, reason):
        assert reason.endswith(why) and bool(reason) == bool(why), reason
        if not why:
            assert system.cpu.read_memory(0x201000, 64) == BURST_PATTERN.to_bytes(8, "little") * 8


def test_only_a_dma_burst_writes_without_pause() -> None:
    with pytest.raises(ConfigError, match="use a dma-burst"), stepped(START):
        pass


HOPS = ("port_", "spapr_", "vfio_iommu", "vfio_listener", "ats_")


def counted(folder: Path) -> Counter[tuple[str, str]]:
    """How often each event of mapping and messages was written, by role and event."""
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    records = [msgspec.json.decode(line, type=Record) for line in lines]
    return Counter((record.role, record.event) for record in records if record.event.startswith(HOPS))


@pytest.mark.parametrize("kvm", [False, True], ids=["user", "kvm"])
@pytest.mark.parametrize("name", ["linux-ddw-boot", "lost-unmap"])
def test_both_modes_count_the_same_pages_dma_and_messages(name: str, kvm: bool, tmp_path: Path) -> None:
    inline = ran(name, tmp_path / "inline", kvm=kvm)
    live = ran(name, tmp_path / "live", inline=False, kvm=kvm)
    assert inline.passed and live.passed, live.reason
    assert inline.totals == live.totals
    assert counted(tmp_path / "inline") == counted(tmp_path / "live")


def test_the_lost_unmap_is_named_with_its_mapping_dma_and_hop() -> None:
    text = "\n".join(ran("lost-unmap").findings)
    for said in ("UNMAP_DMA of iova 0x3000", "in the interposer", "to gpa 0x200000", "nic, a write of 64 bytes"):
        assert said in text


# -- devices of every kind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["nic", "cache", "local"])
def test_dma_passes_while_a_page_is_mapped_and_never_after(device: str) -> None:
    dma = f"device: {device}, iova: 0x3000, gpa: 0x200000"
    both = f"  - dma: {{{dma}}}\n  - dma: {{{dma}, direction: read}}\n"
    neither = f"  - dma: {{{dma}, expect: refused}}\n  - dma: {{{dma}, direction: read, expect: refused}}\n"
    explained = f"  - explain: {{device: {device}, iova: 0x3000, fails: stage-1}}\n"
    with stepped(neither + MAP + both + UNMAP + explained + neither, EVERY_KIND) as (_, runner, reason):
        assert reason == ""
        assert (runner.totals.dma_moved, runner.totals.dma_refused) == (2, 4)


def test_a_remote_device_caches_and_follows_the_ring() -> None:
    dma = "  - dma: {device: cache, iova: 0x3000, gpa: 0x200000}\n"
    with stepped(MAP + dma * 3 + UNMAP, EVERY_KIND) as (system, _, reason):
        assert reason == ""
        asked = [each for each in system.log().named("ats_translate") if each.number("iova") == 0x3000]
        assert len(asked) == 1 and asked[0].role == "guestd"
        notifier = system.status("guestd")["notifier"]
        assert isinstance(notifier, dict) and notifier["subscribers"] == ["cache"] and notifier["records"] > 1


def test_an_interrupt_of_a_device_beside_the_machine_arrives_once_after_the_command() -> None:
    with stepped(MAP, EVERY_KIND) as (system, _, _):
        window = MmioWindow.pseries()
        functions = {each.devfn: each for each in bring_up(system.cpu, regs.phb_buid(0), window)}
        for name, devfn in (("nic", 2 << 3), ("cache", 3 << 3)):
            bar = window.to_cpu(functions[devfn].bars[0].address)
            system.cpu.mmio_write(bar + edu.IRQ_RAISE, 4, SWAPPED_ONE)
            assert system.guest.device_status(name)["irqs"] == 1
            system.cpu.mmio_write(bar + edu.IRQ_ACK, 4, SWAPPED_ONE)
            assert system.guest.devices[name][1].intx_level is False


def test_time_reaches_the_devices_beside_the_machine() -> None:
    with stepped("", EVERY_KIND) as (system, _, _):
        assert system.cpu.clock_step(1_000_000) == 1_000_000
        assert {unit.around.clock.now_ns for unit in system.guest.units} == {1_000_000}


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_failed_map_is_the_hypercall_s_error() -> None:
    rule = "interpose:\n  - {action: fail, ioctl: MAP_DMA, errno: ENOMEM}\n"
    refused = "  - map: {iova: 0x3000, gpa: 0x200000, expect: H_RESOURCE}\n"
    with stepped(refused, more=rule) as (system, _, reason):
        assert reason == ""
        assert system.status("interposer") == {"rules": [{"matched": 1, "acted": 1}]}
        assert [each.fields["errno"] for each in system.log().named("port_return") if each.fields["errno"]] == [12]


def test_a_doubled_unmap_arrives_twice_and_is_answered_once() -> None:
    rule = "interpose:\n  - {action: duplicate, ioctl: UNMAP_DMA, iova: 0x3000, armed: false}\n"
    with stepped(f"{MAP}  - arm: {{}}\n{UNMAP}  - find_lost: {{expect: 0}}\n", more=rule) as (system, _, reason):
        assert reason == ""
        assert twice(system.log()) == 1


def twice(log: Log) -> int:
    return sum(count == 2 for count in Counter(each.number("seq") for each in log.named("port_recv")).values())


@pytest.mark.parametrize(
    ("steps", "more", "where"),
    [
        ("  - kill: {role: hostd}\n", "", r"steps\[0\].kill"),
        ("  - migrate: {}\n", "", r"steps\[0\].migrate"),
        (MAP + "  - stop: {device: nic}\n", "", r"steps\[1\].stop"),
        ("  - wait: {role: hostd, until: gone}\n", "", r"steps\[0\].wait"),
        ("", "interpose:\n  - {action: lose, ioctl: MAP_DMA}\n", r"interpose\[0\]"),
        ("", "interpose:\n  - {action: kill, role: hostd}\n", r"interpose\[0\]"),
    ],
)
def test_what_needs_processes_is_refused_before_the_run(steps: str, more: str, where: str) -> None:
    with pytest.raises(ConfigError, match=f"{where}: .*run it without --inline"):
        check(scenario(steps, more=more))


def test_a_device_that_gets_maps_needs_processes() -> None:
    devices = "  - {id: nic, model: edu, attach: remote, dma: mapped, addr: 02.0}\n"
    with pytest.raises(ConfigError, match=r"devices\[0\].dma: .*run it without --inline"):
        check(scenario("", devices))


def test_a_role_that_is_not_there_cannot_be_asked() -> None:
    with stepped("") as (system, _, _), pytest.raises(ConfigError, match="no notifier to ask"):
        system.status("notifier")


def test_a_start_that_is_refused_is_a_verdict() -> None:
    small = scenario(more="host: {memlock: 64K}\n")
    verdict = run.run(small, Path(), None, lambda *_: None, inline=True)
    assert verdict.reason.startswith("guestd: device nic: ") and "ENOMEM" in verdict.reason
    expected = scenario(more="host: {memlock: 64K}\nstart_fails: {role: guestd, message: ENOMEM}\n")
    assert run.run(expected, Path(), None, lambda *_: None, inline=True).passed


def test_a_device_inside_a_section_is_said_at_once_and_not_waited_for() -> None:
    with stepped(MAP) as (system, _, reason):
        assert reason == ""
        (unit,) = system.host.units.values()
        unit.lane.enter()
        with pytest.raises(InternalGuestError, match="inside a DMA section"):
            system.cpu.hcall(regs.HCall.H_PUT_TCE, regs.pci_liobn(0, 0), 0x3000, 0)
        unit.lane.leave()


# -- the end ---------------------------------------------------------------------------------------------------------


def given_back() -> None:
    with stepped(MAP, EVERY_KIND) as (system, _, reason):
        assert reason == ""
        mm, groups = system.host.port.mm, system.host.host.groups.values()
        assert mm.locked_vm > 0
    assert mm.locked_vm == 0 and system.guest.units == []
    assert all(group.handle is None and not group.open_devices for group in groups)


def test_everything_is_given_back_at_the_end() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    given_back()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_each_record_bears_the_role_that_would_have_written_it() -> None:
    with stepped(MAP + "  - dma: {device: cache, iova: 0x3000, gpa: 0x200000}\n", EVERY_KIND) as (system, _, _):
        log = system.log()
    roles = {"port_send": "guestd", "port_recv": "hostd", "dma": "operator", "edu_dma": "cache"}
    for event, role in roles.items():
        assert {record.role for record in log.named(event)} == {role}
    assert [record.ns for record in log.records] == sorted({record.ns for record in log.records})
