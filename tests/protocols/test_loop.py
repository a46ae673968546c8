"""The event loop: waits serve what is served and nothing else; deadlines name who did not answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from protocols.transport import unix
from protocols.transport.kernel import EventFd
from protocols.transport.loop import DEADLINE_SCALE_VARIABLE, Loop, deadline_scale
from vfio_model.errors import ConfigError, DeadlineExceeded

pytestmark = pytest.mark.usefixtures("no_leak")


def then(*calls: Callable[[], object]) -> Callable[[], None]:
    """A callback that makes ``calls`` in order."""

    def callback() -> None:
        for call in calls:
            call()

    return callback


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def bells() -> Iterator[tuple[EventFd, EventFd]]:
    both = EventFd(), EventFd()
    yield both
    for bell in both:
        bell.close()


def test_a_wait_serves_what_is_served_and_leaves_the_rest_for_the_top_level(
    loop: Loop, bells: tuple[EventFd, EventFd]
) -> None:
    request, translation = bells
    log: list[str] = []
    loop.register(request, then(lambda: log.append("request"), request.drain))
    loop.register(translation, then(lambda: log.append("translation"), translation.drain), served=True)
    loop.call_soon(lambda: log.append("soon"))
    loop.call_later(0, lambda: log.append("timer"))
    loop.call_later(0, lambda: log.append("served timer"), served=True)
    request.ring()
    translation.ring()
    loop.serve_until(lambda: "translation" in log, 10, "device", "region access")
    assert sorted(log) == ["served timer", "translation"]
    loop.run_once(1)
    loop.run_once(0)
    assert sorted(log[2:]) == ["request", "soon", "timer"]
    loop.unregister(request)
    loop.unregister(translation)


def test_a_wait_inside_a_wait_serves_as_well(loop: Loop, bells: tuple[EventFd, EventFd]) -> None:
    outer, inner = bells
    log: list[str] = []

    def on_outer() -> None:
        outer.drain()
        inner.ring()
        loop.serve_until(lambda: "inner" in log, 10, "hostd", "ioctl")
        log.append(f"outer at depth {loop.depth}")

    loop.register(outer, on_outer, served=True)
    loop.register(inner, then(lambda: log.append("inner"), inner.drain), served=True)
    outer.ring()
    loop.serve_until(lambda: len(log) == 2, 10, "device", "region access")
    assert log == ["inner", "outer at depth 1"] and loop.depth == 0


def test_a_deadline_names_peer_request_and_seconds(loop: Loop) -> None:
    with pytest.raises(DeadlineExceeded, match=r"hostd did not answer VFIO_IOMMU_UNMAP_DMA within 0\.001 s"):
        loop.serve_until(lambda: False, 0.001, "hostd", "VFIO_IOMMU_UNMAP_DMA")
    assert loop.depth == 0


def test_one_environment_variable_stretches_every_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEADLINE_SCALE_VARIABLE, "0.001")
    loop = Loop()
    with pytest.raises(DeadlineExceeded) as caught:
        loop.serve_until(lambda: False, 2, "hostd", "ping")
    assert caught.value.seconds == pytest.approx(0.002)
    loop.close()
    for bad in ("0", "-1", "fast", "inf", "nan"):
        monkeypatch.setenv(DEADLINE_SCALE_VARIABLE, bad)
        with pytest.raises(ConfigError, match=DEADLINE_SCALE_VARIABLE):
            deadline_scale()


def test_timers_run_in_order_and_cancelled_ones_do_not(loop: Loop) -> None:
    log: list[int] = []
    loop.call_later(20_000_000, lambda: log.append(2))
    loop.call_later(1000, lambda: log.append(1))
    loop.call_later(10_000_000, lambda: log.append(0)).cancel()
    loop.call_later(30_000_000, loop.stop)
    loop.run()
    assert log == [1, 2]


def test_what_a_callback_unregisters_is_not_called_any_more(loop: Loop, bells: tuple[EventFd, EventFd]) -> None:
    first, second = bells
    log: list[str] = []

    def once(name: str, other: EventFd) -> None:
        log.append(name)
        loop.unregister(first)
        loop.unregister(second)

    loop.register(first, lambda: once("first", second))
    loop.register(second, lambda: once("second", first))
    first.ring()
    second.ring()
    loop.run_once(1)
    loop.run_once(0)
    assert len(log) == 1


@pytest.mark.parametrize("served", [True, False])
def test_an_outbox_is_emptied_inside_waits(loop: Loop, served: bool) -> None:
    left, right = unix.seqpacket_pair()
    loop.register(left, lambda: None, served=served)
    sent = 0
    while not left.wants_write:
        left.send(bytes(4000))
        sent += 1
    got: list[unix.Packet] = []

    def take() -> None:
        if (packet := right.receive()) is not None:
            got.append(packet)

    loop.register(right, take, served=True)
    loop.serve_until(lambda: len(got) == sent, 10, "peer", "reading")
    assert not left.wants_write
    loop.run_once(0)
    for connection in (left, right):
        loop.unregister(connection)
        connection.close()


def test_eof_calls_the_callback(loop: Loop) -> None:
    left, right = unix.seqpacket_pair()
    log: list[str] = []
    loop.register(left, lambda: log.append("eof"))
    right.close()
    loop.run_once(1)
    assert log
    loop.unregister(left)
    left.close()


def test_a_signal_is_handled_at_the_top_level_and_the_old_handler_comes_back(loop: Loop) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    log: list[str] = []
    loop.on_signal(signal.SIGUSR1, then(lambda: log.append("signal"), loop.stop))
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(DeadlineExceeded):
        loop.serve_until(lambda: bool(log), 0.001, "nobody", "nothing")
    loop.run()
    assert log == ["signal"]
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_idle_callbacks_run_before_the_loop_blocks(loop: Loop) -> None:
    log: list[str] = []
    loop.on_idle(lambda: log.append("idle"))
    loop.run_once(0)
    assert log == []
    loop.run_once(0.001)
    assert log == ["idle"]


def test_a_source_is_registered_once(loop: Loop, bells: tuple[EventFd, EventFd]) -> None:
    loop.register(bells[0], lambda: None)
    with pytest.raises(ValueError, match="registered already"):
        loop.register(bells[0], lambda: None)
    loop.unregister(bells[0])
    loop.unregister(bells[0])


def test_a_stop_before_the_run_ends_it(loop: Loop) -> None:
    loop.stop()
    loop.run()
    loop.call_soon(loop.stop)
    loop.run()


def test_an_answer_that_comes_alone_needs_no_turn(loop: Loop, bells: tuple[EventFd, EventFd]) -> None:
    calls: list[str] = []
    loop.register(bells[0], then(lambda: calls.append("answer")), served=True)
    loop.register(bells[1], then(lambda: calls.append("other")), served=True)
    assert not loop.wakes_fd(bells[0].fd, 1)
    bells[0].ring()
    assert loop.wakes_fd(bells[0].fd, 1)
    bells[1].ring()
    assert not loop.wakes_fd(bells[0].fd, 1), "what else has come is served first"
    assert not calls


def test_what_is_expected_is_still_a_turn_like_any_other(loop: Loop, bells: tuple[EventFd, EventFd]) -> None:
    calls: list[str] = []
    loop.register(bells[0], then(bells[0].drain, lambda: calls.append("rung")))
    loop.expect()
    loop.run_once(0.001)
    loop.expect()
    bells[0].ring()
    loop.run_once(1.0)
    loop.run_once(0.0)
    assert calls == ["rung"]
