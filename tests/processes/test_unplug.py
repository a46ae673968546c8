"""``device_del`` and ``device_add``: the group of the last device leaves the container, and comes back."""

from __future__ import annotations

import pytest

from tests.processes.rig import Live

pytestmark = pytest.mark.machine


def test_the_last_device_of_a_group_takes_it_out_of_the_container_and_memory_is_unlocked() -> None:
    with Live() as live:
        before = live.status("hostd")
        assert before["locked_vm"] > 0
        (name,) = [each["id"] for each in live.status("guestd")["devices"] if each["attach"] == "assigned"]
        live.unplug(name)
        gone = live.status("hostd")
        in_kernel = 33 if live.kvm else 0  # the default window's table
        assert gone["locked_vm"] == in_kernel and gone["devices"] == []
        assert all(file["path"] not in ("/dev/vfio/vfio", "/dev/vfio/26") for file in gone["files"])
        live.plug(name)
        again = live.status("hostd")
        assert again["locked_vm"] == before["locked_vm"]
        assert sorted(file["path"] for file in again["files"]) == sorted(file["path"] for file in before["files"])
