"""Each process is stopped past its deadline at random points of running traffic, and continued later.

Who waits gives up with an error that names peer, request and time; nobody else notices; nothing that was taken away is
reached by the one that wakes up late.
"""

from __future__ import annotations

import signal
import time

import pytest

from deploy.link import Link
from protocols.control import messages as control
from tests.processes.disturbance import ROUNDS, seeds, strike, told
from tests.processes.rig import CARD, NIC, SCALE, Live, Target, in_section, target, until
from tests.processes.test_kill import lost
from tests.processes.traffic import GPA, HAMMERED, IOVA, LIOBN, PAGE, PAGES, READ, SIZE, WRITE, Traffic
from vfio_model.errors import DeadlineExceeded
from vfio_model.iommu.spapr import regs

pytestmark = pytest.mark.machine

ALL_ONES = (1 << 64) - 1
MOST_IN_ONE_CALL = 12
"""Entries that one hypercall of the traffic changes."""
LONGER_THAN_A_DEADLINE = 5.5 * SCALE


def stop(victim: Target) -> None:
    """SIGSTOP."""
    victim.signal(signal.SIGSTOP)


def replug(live: Live, traffic: Traffic, name: str) -> None:
    """``device_del`` and ``device_add``."""
    live.unplug(name)
    live.plug(name)
    traffic.renewed(name)


@pytest.mark.parametrize("number", ROUNDS)
def test_a_stopped_assigned_device_is_lost_to_the_guest_and_harmless_when_it_wakes_up(number: int) -> None:
    with Live() as live:
        census = live.census()
        for seed in seeds(11000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid(NIC)) as victim:
                    strike(traffic, seed, lambda: stop(victim))
                    if not victim.dead():
                        victim.stopped()
                    if not victim.dead() and in_section(victim.pid):
                        revoke(traffic)
                    if victim.dead():
                        given_up_with_its_host(live, traffic)
                    else:
                        given_up_alone(live, traffic, victim)
                        replug(live, traffic, NIC)
                traffic.everywhere()
                traffic.run(10)
                traffic.progress()
                traffic.finish()
                live.settles(census)


def revoke(traffic: Traffic) -> None:
    """Map every page, and unmap all: whoever is inside a DMA section is waited for. The mappings are adopted later."""
    for page in range(PAGES):
        traffic.hcall(regs.HCall.H_PUT_TCE, LIOBN, IOVA + page * PAGE, GPA + page * PAGE | READ)
    traffic.hcall(regs.HCall.H_STUFF_TCE, LIOBN, IOVA, 0, PAGES)


def given_up_with_its_host(live: Live, traffic: Traffic) -> None:
    """It was stopped inside a DMA section, and an unmap waited for it as long as the guest waits for a host that lives.
    The guest has then killed the device and connected anew.
    """
    until("the host is back", lambda: live.device(NIC)["state"] == "running")
    reason = live.status("guestd")["host"]["reason"]
    assert "VFIO_IOMMU_" in reason or (live.kvm and "H_" in reason), (
        "what was asked: a hypercall, or what it stands for"
    )
    traffic.adopt()
    traffic.renewed(NIC)


def given_up_alone(live: Live, traffic: Traffic, victim: Target) -> None:
    """It was stopped between two sections: only who asks it notices."""
    victim.stopped()
    assert live.cpu.mmio_read(live.bars[NIC], 8) == ALL_ONES
    lost(live, NIC, "did not answer")
    traffic.works[NIC] = False
    traffic.adopt()
    traffic.run(10)
    traffic.progress()
    victim.signal(signal.SIGCONT)
    victim.gone()
    traffic.run(5)
    until("the host has buried it", lambda: not live.status("hostd")["devices"])


@pytest.mark.parametrize("number", ROUNDS)
def test_a_stopped_remote_device_is_lost_to_the_guest_and_harmless_when_it_wakes_up(number: int) -> None:
    with Live(reconnects=False) as live:
        census = live.census()
        for seed in seeds(12000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid(CARD)) as victim:
                    strike(traffic, seed, lambda: stop(victim))
                    if not victim.dead():
                        victim.stopped()
                    assert live.cpu.mmio_read(live.bars[CARD], 8) == ALL_ONES
                    lost(live, CARD, "did not answer", "its process died", "ended the connection")
                    traffic.works[CARD] = False
                    traffic.adopt()
                    traffic.run(10)
                    traffic.progress()
                    victim.signal(signal.SIGCONT)
                    traffic.run(10)
                    if victim.dead():
                        live.revive(CARD)
                replug(live, traffic, CARD)
                traffic.run(10)
                traffic.progress()
                traffic.finish()
                live.settles(census)


@pytest.mark.parametrize("number", ROUNDS)
def test_nobody_waits_for_a_stopped_notifier(number: int) -> None:
    with Live(caches=True) as live:
        census = live.census()
        for seed in seeds(13000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid("notifier")) as victim:
                    strike(traffic, seed, lambda: stop(victim))
                    victim.stopped()
                    traffic.adopt()
                    traffic.run(30)
                    replug(live, traffic, CARD)
                    traffic.run(20)
                    traffic.progress()
                    assert live.device(CARD)["state"] == live.device(NIC)["state"] == "running"
                    victim.signal(signal.SIGCONT)
                    until("the card has subscribed", lambda: live.census()["subscribers"] == ["subscribed"])
                    traffic.run(20)
                    traffic.progress()
                traffic.finish()
                live.settles(census)


@pytest.mark.parametrize("number", ROUNDS)
def test_a_stopped_host_is_given_up_with_its_devices_and_rebuilt_when_it_wakes_up(number: int) -> None:
    with Live() as live:
        census = live.census()
        for seed in seeds(14000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid("hostd")) as victim, target(live.pid(NIC)) as device:
                    strike(traffic, seed, lambda: stop(victim))
                    victim.stopped()
                    traffic.hcall(regs.HCall.H_STUFF_TCE, LIOBN, IOVA, 0, PAGES)
                    traffic.released(list(traffic.mapped))
                    device.gone()
                    lost(live, NIC, "hostd", "its process died", "ended the connection")
                    host = live.status("guestd")["host"]
                    asked = "H_" if live.kvm else "VFIO_IOMMU_"
                    assert host["lost"] and f"hostd did not answer {asked}" in host["reason"], host
                    traffic.works[NIC] = False
                    traffic.adopt()
                    traffic.run(10)
                    traffic.progress()
                    victim.signal(signal.SIGCONT)
                until("the device is back", lambda: live.device(NIC)["state"] == "running")
                traffic.renewed(NIC)
                traffic.everywhere()
                traffic.run(10)
                traffic.progress()
                traffic.finish()
                live.settles(census)


def anywhere(traffic: Traffic, written: list[int]) -> None:
    """The assigned device goes on: it writes to one of ``written``, of which one call at most was under way."""
    for where in written:
        traffic.ram.write(where, bytes(SIZE))
    until("the assigned device goes on", lambda: any(traffic.ram.read(where, SIZE) == HAMMERED for where in written))
    traffic.late[NIC].add(bytes(SIZE))
    for page, _ in traffic.mapped.values():
        traffic.allowed[page, NIC].add(bytes(SIZE))


@pytest.mark.parametrize("number", ROUNDS)
def test_a_stopped_guest_stops_nobody_else_and_goes_on(number: int) -> None:
    with Live() as live:
        census = live.census()
        for seed in seeds(15000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid("guestd")) as victim:
                    strike(traffic, seed, lambda: stop(victim))
                    victim.stopped()
                    since = time.monotonic()
                    link = Link(live.directory, "guestd")
                    with pytest.raises(DeadlineExceeded, match="guestd did not answer ping within"):
                        link.ask(control.Ping(), 0.5)
                    link.close()
                    assert live.locked_vm() == census["locked_vm"]
                    written = [GPA + page * PAGE for page, perm in traffic.mapped.values() if perm & WRITE]
                    if traffic.background and len(written) > MOST_IN_ONE_CALL:
                        anywhere(traffic, written)
                    until("its deadline has passed", lambda: time.monotonic() > since + LONGER_THAN_A_DEADLINE)  # noqa: B023
                    victim.signal(signal.SIGCONT)
                live.link("guestd").ask(control.Ping())
                if live.device(CARD)["state"] == "lost":
                    lost(live, CARD, "ended the connection", "while sending")
                    replug(live, traffic, CARD)
                traffic.adopt()
                traffic.run(10)
                traffic.progress()
                traffic.finish()
                live.settles(census)
