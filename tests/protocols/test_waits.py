"""The table of waits is sound, and the check would notice if it were not."""

from __future__ import annotations

from protocols.waits import WAITS, Kind, Party, Wait, circles, deadlocks, may_wait, served_by


def test_plain_and_pending_waits_form_no_circle() -> None:
    assert circles(wait for wait in WAITS if wait.kind is not Kind.SERVED) == []


def test_every_circle_contains_a_served_edge() -> None:
    assert circles(WAITS) != []
    assert deadlocks(WAITS) == []


def test_the_check_notices_a_plain_circle() -> None:
    bad = Wait(Party.CONTAINER, Party.GUESTD, Kind.PLAIN, "asks the guest")
    assert (Wait(Party.GUESTD, Party.CONTAINER, Kind.PLAIN, "ioctl"), bad) in deadlocks((*WAITS, bad)) or (
        bad,
        Wait(Party.GUESTD, Party.CONTAINER, Kind.PLAIN, "ioctl"),
    ) in deadlocks((*WAITS, bad))
    assert deadlocks([Wait(Party.DEVICE, Party.DEVICE, Kind.PLAIN, "peer to peer")])


def test_a_served_edge_that_becomes_plain_is_a_deadlock() -> None:
    broken = [wait._replace(kind=Kind.PLAIN) if wait.what == "DMA message" else wait for wait in WAITS]
    assert any(any(wait.what == "DMA message" for wait in circle) for circle in deadlocks(broken))


def test_what_nobody_may_wait_for() -> None:
    assert not may_wait(Party.CONTAINER, Party.GUESTD, "")
    assert not may_wait(Party.CONTAINER, Party.NOTIFIER, "")
    assert not may_wait(Party.NOTIFIER, Party.CONTAINER, "")
    assert not may_wait(Party.NOTIFIER, Party.GUESTD, "")
    assert not may_wait(Party.DEVICE, Party.DEVICE, "")
    assert may_wait(Party.GUESTD, Party.CONTAINER, "ioctl")


def test_the_guest_serves_its_devices_in_every_wait() -> None:
    assert {wait.what.split(",")[0] for wait in served_by(Party.GUESTD)} == {
        "ATS translation",
        "DMA message",
        "interrupt",
        "page request",
    }
