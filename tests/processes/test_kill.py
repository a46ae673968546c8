"""Each process is killed at random points of running traffic: what dies, goes on, comes back, and what is left."""

from __future__ import annotations

import pytest

from tests.processes.disturbance import (
    ROUNDS,
    everything_is_released,
    kill,
    kill_with_the_device,
    seeds,
    strike,
    told,
)
from tests.processes.rig import CARD, NIC, Live, target, until
from tests.processes.traffic import Traffic

pytestmark = pytest.mark.machine

DIED = "its process died", "it ended the connection", "while sending"


def lost(live: Live, name: str, *words: str) -> None:
    """The guest has lost the device, and says which and why."""
    device = until(f"{name} is lost to the guest", lambda: (found := live.device(name))["state"] == "lost" and found)
    assert name in device["reason"] or "hostd" in device["reason"]
    assert any(word in device["reason"] for word in words), (
        f"what happened to {name} is not named: {device['reason']!r}"
    )


@pytest.mark.parametrize("number", ROUNDS)
def test_an_assigned_device_dies_alone_and_comes_back_under_the_same_mappings(number: int) -> None:
    with Live() as live:
        census = live.census()
        for seed in seeds(1000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid(NIC)) as victim:
                    strike(traffic, seed, lambda: kill(victim))
                    victim.gone()
                lost(live, NIC, *DIED)
                traffic.works[NIC] = False
                traffic.adopt()
                traffic.run(10)
                traffic.progress()
                until("the host has buried it", lambda: not live.status("hostd")["devices"])
                assert live.locked_vm() == census["locked_vm"]
                live.unplug(NIC)
                live.plug(NIC)
                traffic.renewed(NIC)
                traffic.everywhere()
                traffic.run(10)
                traffic.progress()
                traffic.finish()
                live.settles(census)


@pytest.mark.parametrize("number", ROUNDS)
def test_a_remote_device_dies_alone_and_comes_back(number: int) -> None:
    with Live() as live:
        census = live.census()
        for seed in seeds(2000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid(CARD)) as victim:
                    strike(traffic, seed, lambda: kill(victim))
                    victim.gone()
                lost(live, CARD, *DIED)
                traffic.works[CARD] = False
                traffic.adopt()
                traffic.run(10)
                traffic.progress()
                live.revive(CARD)
                until("the guest has it back, reset", lambda: live.device(CARD)["state"] == "running")
                traffic.renewed(CARD)
                traffic.run(10)
                traffic.progress()
                traffic.finish()
                live.settles(census)


@pytest.mark.parametrize("number", ROUNDS)
def test_the_notifier_dies_and_those_with_a_ring_go_on(number: int) -> None:
    with Live(caches=True) as live:
        census = live.census()
        for seed in seeds(3000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                with target(live.pid("notifier")) as victim:
                    strike(traffic, seed, lambda: kill(victim))
                    victim.gone()
                traffic.adopt()
                traffic.run(30)
                traffic.progress()
                assert live.device(CARD)["state"] == "running"
                until("guestd has noticed", lambda: not live.status("guestd")["notifier"]["connected"])
                live.revive("notifier")
                until("guestd has a notifier again", lambda: live.status("guestd")["notifier"]["connected"])
                traffic.run(10)
                live.unplug(CARD)
                live.plug(CARD)
                traffic.run(20)
                traffic.progress()
                traffic.finish()
                live.settles(census)


@pytest.mark.parametrize("number", ROUNDS)
def test_the_host_dies_with_its_devices_and_its_mappings_are_rebuilt(number: int) -> None:
    with Live() as live:
        census = live.census()
        for seed in seeds(4000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                kill_with_the_device(live, "hostd", traffic, seed)
                lost(live, NIC, "hostd is gone", *DIED)
                traffic.works[NIC] = False
                traffic.adopt()
                traffic.run(10)
                traffic.progress()
                assert until("the guest knows", lambda: live.status("guestd")["host"]["lost"])
                live.revive("hostd")
                until("the device is back", lambda: live.device(NIC)["state"] == "running")
                traffic.renewed(NIC)
                traffic.everywhere()
                assert live.locked_vm() == census["locked_vm"]
                traffic.run(10)
                traffic.progress()
                traffic.finish()
                live.settles(census)


@pytest.mark.parametrize("number", ROUNDS)
def test_a_guest_dies_and_the_host_takes_back_what_it_had(number: int) -> None:
    with Live() as live:
        census, without_guest = live.census(), {}
        for seed in seeds(5000, number):
            with told(seed):
                traffic = Traffic(live, seed, background=seed % 2 == 0)
                kill_with_the_device(live, "guestd", traffic, seed)
                everything_is_released(live)
                until("the notifier has forgotten it", lambda: not any(live.status("notifier").values()))
                until("the card has let go", lambda: live.fds(CARD) < census["fds"][CARD])
                without_guest = without_guest or live.census()
                live.settles(without_guest)
                abandoned = {at: traffic.ram.read(at, 1 << 20) for at in range(0, len(traffic.ram.map), 1 << 20)}
                live.revive("guestd")
                new = Traffic(live, seed, background=seed % 2 == 0)
                new.everywhere()
                new.run(20)
                new.progress()
                new.finish()
                for at, before in abandoned.items():
                    assert traffic.ram.read(at, 1 << 20) == before, (
                        "somebody writes to the memory of a guest that is dead"
                    )
                traffic.close()
                live.settles(census)
