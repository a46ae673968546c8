"""Interposer rules: which message, which action, how often."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.interpose import (
    AnswerError,
    AnswerSuccess,
    AnswerTooHard,
    Deliver,
    Interposer,
    Kill,
    Rule,
    Seen,
    decode_rules,
    seen,
    seen_command,
)
from protocols.notifier.messages import Flush
from protocols.port.messages import Hcall, Ioctl, Ping
from vfio_model.errors import ConfigError
from vfio_model.uapi import vfio
from vfio_model.uapi.hvcall import HCall


def unmap(iova: int = 0, size: int = 4096, count: int = 1) -> Ioctl:
    one = struct.pack("=IIQQ", 24, 0, iova, size)
    return Ioctl(1, 0, 2, 3, vfio.Ioctl.VFIO_IOMMU_UNMAP_DMA, count, one * count)


@pytest.mark.parametrize(
    ("rule", "actions"),
    [
        (Rule(action="drop"), [AnswerSuccess()]),
        (Rule(action="lose"), []),
        (Rule(action="delay", seconds=0.5), [Deliver(500_000_000)]),
        (Rule(action="duplicate"), [Deliver(), Deliver()]),
        (Rule(action="fail", errno="ENOSPC"), [AnswerError(errno.ENOSPC)]),
        (Rule(action="kill", role="hostd"), [Kill("hostd"), Deliver()]),
    ],
)
def test_each_action(rule: Rule, actions: list[object]) -> None:
    interposer = Interposer([rule])
    assert interposer.decide(seen(unmap())) == actions
    assert interposer.decide(seen(unmap())) == [Deliver()]


def hcall(nr: int, *args: int) -> Hcall:
    return Hcall(1, 0, 2, 3, nr, [0x8000_0000, *args, 0, 0, 0][:4], 1)


@pytest.mark.parametrize(
    ("rule", "message", "refers"),
    [
        (Rule(action="drop", ioctl="UNMAP_DMA"), hcall(HCall.H_PUT_TCE, 0x3000, 0), True),
        (Rule(action="drop", ioctl="UNMAP_DMA"), hcall(HCall.H_PUT_TCE, 0x3000, 0x5003), False),
        (Rule(action="drop", ioctl="MAP_DMA"), hcall(HCall.H_PUT_TCE, 0x3000, 0x5003), True),
        (Rule(action="drop", ioctl="UNMAP_DMA"), hcall(HCall.H_STUFF_TCE, 0x3000, 0, 16), True),
        (Rule(action="fail", ioctl="MAP_DMA"), hcall(HCall.H_PUT_TCE_INDIRECT, 0x3000, 0x10000, 16), True),
        (Rule(action="fail", ioctl="UNMAP_DMA"), hcall(HCall.H_PUT_TCE_INDIRECT, 0x3000, 0x10000, 16), True),
        (Rule(action="drop", ioctl="UNMAP_DMA", iova=0x4000), hcall(HCall.H_STUFF_TCE, 0x3000, 0, 2), True),
        (Rule(action="drop", ioctl="UNMAP_DMA", iova=1 << 30), hcall(HCall.H_STUFF_TCE, 0x3000, 0, 2), False),
        (Rule(action="drop", ioctl="UNMAP_DMA", armed=False), hcall(HCall.H_PUT_TCE, 0x3000, 0), False),
        (Rule(action="drop", ioctl="SET_IOMMU"), hcall(HCall.H_PUT_TCE, 0x3000, 0), False),
        (Rule(action="drop", kind="notify"), hcall(HCall.H_PUT_TCE, 0x3000, 0), False),
        (Rule(action="drop"), hcall(HCall.H_PUT_TCE, 0x3000, 0), True),
    ],
)
def test_a_hypercall_whose_ioctl_a_rule_awaits_is_referred_back(rule: Rule, message: Hcall, refers: bool) -> None:
    interposer = Interposer([rule])
    assert interposer.decide(seen(message)) == ([AnswerTooHard()] if refers else [Deliver()])
    assert interposer.counters() == [{"matched": 0, "acted": 0}], "the rule counts the ioctl, which comes next"


def test_a_rule_that_has_acted_awaits_nothing() -> None:
    interposer = Interposer([Rule(action="drop", ioctl="UNMAP_DMA")])
    assert interposer.decide(seen(unmap())) == [AnswerSuccess()]
    assert interposer.decide(seen(hcall(HCall.H_PUT_TCE, 0x3000, 0))) == [Deliver()]


def test_a_rule_about_hypercalls_acts_on_them() -> None:
    interposer = Interposer([Rule(action="fail", kind="hcall")])
    assert interposer.decide(seen(hcall(HCall.H_PUT_TCE, 0x3000, 0))) == [AnswerError(errno.EIO)]


def test_without_rules_everything_is_delivered() -> None:
    interposer = Interposer()
    assert interposer.idle and interposer.decide(seen(Ping(1))) == [Deliver()]


@pytest.mark.parametrize("name", ["UNMAP_DMA", "IOMMU_UNMAP_DMA", "VFIO_IOMMU_UNMAP_DMA"])
def test_an_ioctl_by_its_name_long_or_short(name: str) -> None:
    if name == "IOMMU_UNMAP_DMA":
        assert name in seen(unmap()).names
    interposer = Interposer([Rule(action="lose", ioctl=name, count=0)])
    assert interposer.decide(seen(unmap())) == []
    assert interposer.decide(seen(Ioctl(1, 0, 2, 3, vfio.Ioctl.VFIO_IOMMU_MAP_DMA, 1, b""))) == [Deliver()]
    assert interposer.decide(seen(Ping(1))) == [Deliver()]


def test_a_number_with_two_meanings_has_both_names() -> None:
    names = seen(Ioctl(1, 0, 2, 3, vfio.Ioctl.VFIO_IOMMU_DIRTY_PAGES, 1, b"")).names
    assert {"REGISTER_MEMORY", "DIRTY_PAGES"} <= set(names)


def test_kinds_and_commands() -> None:
    interposer = Interposer(
        [Rule(action="lose", kind="flush", count=0), Rule(action="lose", command="DMA_UNMAP", count=0)]
    )
    assert interposer.decide(seen(Flush(1, 0))) == []
    assert interposer.decide(seen_command(3)) == []
    assert interposer.decide(seen_command(9)) == [Deliver()]
    assert interposer.decide(seen_command(0x1234)) == [Deliver()]


def test_an_address_chooses_the_message_whose_structures_cover_it() -> None:
    interposer = Interposer([Rule(action="drop", ioctl="UNMAP_DMA", iova=0x5000, count=0)])
    assert interposer.decide(seen(unmap(0x4000))) == [Deliver()]
    assert interposer.decide(seen(unmap(0x4000, 0x2000))) == [AnswerSuccess()]
    assert seen(unmap(0x1000, 0x1000, count=3)).ranges == ((0x1000, 0x1FFF),) * 3


def test_a_rule_that_is_not_armed_waits() -> None:
    interposer = Interposer([Rule(action="lose", armed=False)])
    assert interposer.decide(seen(Ping(1))) == [Deliver()]
    interposer.arm()
    assert interposer.decide(seen(Ping(1))) == []
    assert interposer.counters() == [{"matched": 1, "acted": 1}]


def test_rules_add_up_in_their_order() -> None:
    interposer = Interposer(
        [Rule(action="delay", seconds=1), Rule(action="duplicate"), Rule(action="kill", role="edu0")]
    )
    assert interposer.decide(Seen("ping")) == [Kill("edu0"), Deliver(10**9), Deliver(10**9)]
    interposer.rules = [Rule(action="lose"), Rule(action="drop")]
    assert interposer.decide(Seen("ping")) == []


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 5))
def test_nth_every_and_count_against_a_list(nth: int, every: int, count: int) -> None:
    interposer = Interposer([Rule(action="lose", nth=nth, every=every, count=count)])
    acted = [number for number in range(1, 40) if interposer.decide(Seen("x")) == []]
    expected = list(range(nth, 40, every))
    assert acted == (expected[:count] if count else expected)


def test_rules_come_as_json() -> None:
    assert decode_rules(b'[{"action":"drop","ioctl":"UNMAP_DMA","nth":3}]') == [
        Rule(action="drop", ioctl="UNMAP_DMA", nth=3)
    ]
    for bad in (
        b"{}",
        b"[{}]",
        b'[{"action":"explode"}]',
        b'[{"action":"drop","nht":1}]',
        b'[{"action":"drop","nth":0}]',
    ):
        with pytest.raises(ConfigError, match="interposer rules"):
            decode_rules(bad)
    with pytest.raises(ConfigError, match="no errno is called 'EWRONG'"):
        decode_rules(b'[{"action":"fail","errno":"EWRONG"}]')
