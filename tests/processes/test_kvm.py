"""In-kernel acceleration among processes: unmaps hold, the host's death costs no entry, the guest's leaves nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes.disturbance import everything_is_released, kill_with_the_device, told
from tests.processes.rig import NIC, Live, until
from tests.processes.traffic import Traffic

ROUNDS = range(2)
POINTS = 3


def hcalls(live: Live) -> int:
    """How many hypercalls the host was asked."""
    return int(live.status("hostd")["counters"]["hcalls"])


def ioctls(live: Live) -> int:
    """How many ioctls the host has had."""
    return int(live.status("hostd")["counters"]["ioctls"])


def warm(live: Live) -> dict[str, Any]:
    """The census after some traffic: the host maps guest RAM when it first reads a list there."""
    traffic = Traffic(live, 0, background=False)
    traffic.run(30)
    finish_with_a_list(traffic)
    return live.census()


def finish_with_a_list(traffic: Traffic) -> None:
    """Every host that is compared has read a list."""
    while traffic.mapped:
        traffic.stuff()
    traffic.indirect()
    traffic.finish()


@pytest.mark.parametrize("background", [False, True])
def test_traffic_goes_by_hypercalls_and_nothing_lands_after_an_unmap(background: bool) -> None:
    with Live(kvm=True) as live:
        census = warm(live)
        traffic = Traffic(live, 1, background=background)
        before, calls = hcalls(live), ioctls(live)
        traffic.run(150)
        traffic.progress()
        assert hcalls(live) - before > 50
        assert ioctls(live) == calls, "the host maps and unmaps by itself"
        finish_with_a_list(traffic)
        live.settles(census)


@pytest.mark.parametrize("number", ROUNDS)
def test_the_host_dies_and_its_tables_are_rebuilt_from_what_it_shared(number: int) -> None:
    with Live(kvm=True) as live:
        census = warm(live)
        for seed in range(7000 + number * POINTS, 7000 + (number + 1) * POINTS):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                kill_with_the_device(live, "hostd", traffic, seed)
                traffic.works[NIC] = False
                traffic.adopt()
                traffic.run(10)
                until("the guest knows", lambda: live.status("guestd")["host"]["lost"])
                assert not live.status("guestd")["host"]["kvm"]
                live.revive("hostd")
                until("the device is back", lambda: live.device(NIC)["state"] == "running")
                assert live.status("guestd")["host"]["kvm"]
                before = hcalls(live)
                traffic.renewed(NIC)
                traffic.everywhere()
                assert live.locked_vm() == census["locked_vm"]
                traffic.run(20)
                assert hcalls(live) > before
                traffic.progress()
                finish_with_a_list(traffic)
                live.settles(census)


def test_a_guest_dies_and_the_host_frees_its_machine_and_tables() -> None:
    with Live(kvm=True) as live:
        census = warm(live)
        areas = live.status("hostd")["areas"]
        for seed in range(7100, 7100 + POINTS):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                kill_with_the_device(live, "guestd", traffic, seed)
                everything_is_released(live)
                until("the tables are unmapped", lambda: live.status("hostd")["areas"] == areas - 2)
                live.revive("guestd")
                new = Traffic(live, seed, background=seed % 2 == 0)
                new.everywhere()
                new.run(20)
                new.progress()
                finish_with_a_list(new)
                traffic.close()
                live.settles(census)
