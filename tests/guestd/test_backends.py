"""Disks and networks of the devices in guestd: by name, on hubs, on sockets, while the machine stands and after."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestd.config import DeviceConfig, GuestConfig
from guestd.guest import Guest
from guestd.machine_config import PseriesConfig
from protocols.transport.loop import Loop
from tests.acceleration import kvm
from tests.guestd.accelerated_guest import HostedGuest
from vfio_model.devices.e1000.device import E1000Device
from vfio_model.errors import ConfigError
from vfio_model.trace import ListTrace

pytestmark = pytest.mark.machine

FRAME = b"\xff" * 6 + bytes(60)
Start = Callable[..., Guest]


def card(name: str, slot: int, **props: str) -> DeviceConfig:
    return DeviceConfig(id=name, model="e1000", addr=f"{slot:02x}.0", props=dict(props))


@pytest.fixture
def start(tmp_path: Path, loop: Loop) -> Iterator[Start]:
    guests: list[Guest] = []

    def make(*devices: DeviceConfig, **names: dict[str, str]) -> Guest:
        config = GuestConfig(machine=PseriesConfig(ram=1 << 24, kvm=kvm()), devices=list(devices), **names)
        guests.append(HostedGuest(config, tmp_path, loop, ListTrace()))
        guests[-1].start()
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


def listen(guest: Guest, name: str) -> list[bytes]:
    """What the card ``name`` gets from now on."""
    heard: list[bytes] = []

    def offer(frame: bytes) -> bool:
        heard.append(frame)
        return True

    nic(guest, name).rx.offer = offer  # type: ignore[method-assign]
    return heard


def nic(guest: Guest, name: str) -> E1000Device:
    device = guest.devices[name][1]
    assert isinstance(device, E1000Device)
    return device


def turn(loop: Loop, until: Callable[[], object]) -> None:
    for _ in range(2000):
        if until():
            return
        loop.run_once(0.005)
    raise AssertionError("it never came")


def test_cards_on_one_hub_hear_each_other(start: Start) -> None:
    guest = start(card("a", 1, netdev="n0"), card("b", 2, netdev="hub:7"), card("c", 3), netdevs={"n0": "hub:7"})
    heard, silence = listen(guest, "b"), listen(guest, "c")
    nic(guest, "a").net.send(FRAME)
    assert heard == [FRAME] and silence == []
    guest.remove_device("a")
    nic(guest, "b").net.send(FRAME)
    assert heard == [FRAME]


def test_a_card_on_a_socket_and_a_hub_with_an_uplink(start: Start, loop: Loop, tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as far,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as up,
    ):
        far.bind(str(tmp_path / "far"))
        up.bind(str(tmp_path / "up"))
        guest = start(
            card("a", 1, netdev="n0"),
            card("b", 2, netdev="hub:0"),
            netdevs={"n0": f"unix:{tmp_path}/near@{tmp_path}/far", "n1": f"unix:{tmp_path}/down@{tmp_path}/up"},
            uplinks={"n1": "hub:0"},
        )
        a, b = listen(guest, "a"), listen(guest, "b")
        nic(guest, "a").net.send(FRAME)
        nic(guest, "b").net.send(FRAME[::-1])
        assert far.recv(2000) == FRAME and up.recv(2000) == FRAME[::-1]
        far.sendto(b"to a" + FRAME, str(tmp_path / "near"))
        up.sendto(b"to b" + FRAME, str(tmp_path / "down"))
        turn(loop, lambda: a and b)
        assert (a, b) == ([b"to a" + FRAME], [b"to b" + FRAME])
    guest.close()
    assert not (tmp_path / "near").exists() and not (tmp_path / "down").exists()


def test_what_comes_while_the_machine_stands_is_heard_when_it_goes_on(start: Start, loop: Loop) -> None:
    guest = start(card("a", 1, netdev="hub:0"), card("b", 2, netdev="hub:0"))
    heard = listen(guest, "b")
    guest.clock.freeze()
    for number in range(3):
        nic(guest, "a").net.send(FRAME + bytes((number,)))
    loop.run_once(0.01)
    assert heard == []
    guest.clock.thaw()
    turn(loop, lambda: len(heard) == 3)
    assert heard == [FRAME + bytes((number,)) for number in range(3)]


def test_cards_without_an_address_get_the_next_ones(start: Start) -> None:
    guest = start(card("a", 1), card("b", 2, mac="52:54:00:12:34:57"), card("c", 3))
    assert [nic(guest, name).mac.hex(":")[-2:] for name in "abc"] == ["56", "57", "58"]


def test_a_disk_by_name(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    disk = DeviceConfig(id="d", model="nvme", addr="01.0", props={"drive": "d0", "serial": "x"})
    guest = start(disk, drives={"d0": f"file:{path}"})
    with pytest.raises(ConfigError, match="another process uses it"):
        guest.add_device(DeviceConfig(id="e", model="nvme", addr="02.0", props={"drive": f"{path}", "serial": "y"}))
    guest.remove_device("d")
    guest.add_device(disk)


def test_names_that_are_nobodys_or_somebody_elses(start: Start) -> None:
    guest = start(card("a", 1, netdev="n0"), netdevs={"n0": "hub:0", "n1": "hub:1"}, uplinks={"n1": "hub:0"})
    for name, message in (
        ("n9", "Property 'e1000.netdev' can't find value 'n9'"),
        ("n0", "Property 'e1000.netdev' can't take value 'n0', it's in use"),
        ("n1", "Property 'e1000.netdev' can't take value 'n1', it's in use"),
    ):
        with pytest.raises(ConfigError, match=message):
            guest.add_device(card("b", 2, netdev=name))
    guest.remove_device("a")
    guest.add_device(card("b", 2, netdev="n0"))


def test_an_uplink_is_a_network() -> None:
    with pytest.raises(ValueError, match="no netdev n1"):
        GuestConfig(uplinks={"n1": "hub:0"})
