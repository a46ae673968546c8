"""Whatever a guest writes into an e1000, into its rings and onto its wire: no exception, and an end to all work."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devices.e1000_driver import EOP, MS, RS, RX_RING, TX_BUFFERS, TX_RING, Nic, legacy
from vfio_model.devices.e1000 import regs
from vfio_model.testing.bench import RAM_SIZE
from vfio_model.vmstate.fields import encode

KNOWN = sorted({offset for register in regs.REGISTERS for offset in register.offsets()[:2]})
OFFSETS = st.sampled_from(KNOWN) | st.integers(0, regs.MEMORY_SIZE - 8)
VALUES = st.integers(0, 2**32 - 1) | st.sampled_from(
    [0, 1, 2, 7, 8, 127, 128, 0x1000, 0xFFFF, 0xFFFFFFFF, TX_RING, RX_RING]
)
SIZES = st.sampled_from([1, 2, 4, 4, 4, 8])
FRAMES = st.binary(max_size=100) | st.integers(0, 17000).map(lambda size: b"\xff" * 6 + bytes(size))
STEPS = st.one_of(
    st.tuples(st.just("write"), OFFSETS, SIZES, VALUES),
    st.tuples(st.just("read"), OFFSETS, SIZES, st.just(0)),
    st.tuples(st.just("io"), st.integers(0, 60), st.sampled_from([1, 2, 4]), VALUES),
    st.tuples(st.just("frame"), FRAMES, st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 600 * MS), st.just(0), st.just(0)),
    st.tuples(st.just("reset"), st.just(0), st.just(0), st.just(0)),
)


def play(nic: Nic, steps: list[tuple[str, object, int, int]]) -> None:
    device = nic.device
    for kind, what, size, value in steps:
        if kind == "frame":
            assert isinstance(what, bytes)
            nic.wire.deliver(what)
            del nic.wire.waiting[16:]
            continue
        assert isinstance(what, int)
        if kind == "write":
            assert not device.bar_write(0, what, size, value & (1 << size * 8) - 1)
        elif kind == "read":
            read = device.bar_read(0, what, size)
            assert read is not None and 0 <= read < 1 << size * 8
        elif kind == "io":
            device.bar_write(1, what, size, value & (1 << size * 8) - 1)
            device.bar_read(1, what, size)
        elif kind == "wait":
            nic.idle(what)
        else:
            device.reset()
            device.config_write(4, 2, 4)
            nic.up()


def settled(nic: Nic) -> None:
    """All work ends: slices of the background and timers are few, and the state is one that can migrate."""
    for _ in range(2000):
        due = nic.host.clock.next_expiry_ns()
        if due is None:
            break
        nic.host.clock.advance_to(due)
    assert nic.host.clock.next_expiry_ns() is None
    assert nic.device.VMSTATE is not None
    state = nic.device.export_state()
    nic.device.check_state(state, where="e1000")
    encode(nic.device.VMSTATE, state)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_registers(steps: list[tuple[str, object, int, int]]) -> None:
    nic = Nic().up()
    play(nic, steps)
    settled(nic)


RANDOM_DESCRIPTORS = st.lists(
    st.tuples(
        st.integers(0, RAM_SIZE) | st.integers(0, 2**64 - 1),
        st.integers(0, 2**16) | st.integers(0, 2**20 - 1),
        st.integers(0, 2),
        st.integers(0, 255),
        st.binary(min_size=4, max_size=4),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(RANDOM_DESCRIPTORS, st.integers(0, 63), st.lists(STEPS, max_size=6))
def test_transmit_descriptors(
    descriptors: list[tuple[int, int, int, int, bytes]], first: int, steps: list[tuple[str, object, int, int]]
) -> None:
    nic = Nic().up()
    nic.write(regs.TDT, first)
    nic.idle()
    nic.tx_tail = first
    for address, length, kind, command, rest in descriptors:
        middle = length | kind << 20 | command << 24
        nic.post(address.to_bytes(8, "little") + middle.to_bytes(4, "little") + rest)
    nic.kick()
    play(nic, steps)
    settled(nic)
    assert all(14 <= len(frame) <= 16288 + 4 + 65535 for frame in nic.wire.sent)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=64 * 16, max_size=64 * 16), st.lists(FRAMES, max_size=20), st.integers(0, 2**32 - 1))
def test_receive_descriptors(ring: bytes, frames: list[bytes], rctl: int) -> None:
    nic = Nic().up()
    nic.ram[RX_RING : RX_RING + len(ring)] = ring
    nic.write(regs.RCTL, rctl | regs.Rctl.EN)
    for frame in frames:
        nic.wire.deliver(frame)
    settled(nic)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([8, 16, 64, 256]), st.lists(st.integers(1, 300), max_size=12))
def test_every_frame_is_sent_once_in_order(count: int, bursts: list[int]) -> None:
    nic = Nic(tx=count).up()
    sent: list[bytes] = []
    for burst in bursts:
        frames = [
            b"\x02" * 12 + number.to_bytes(4, "big") * 16
            for number in range(len(sent), len(sent) + min(burst, count - 1))
        ]
        where = nic.post(
            *(legacy(nic.place(frame, TX_BUFFERS + at * 128), len(frame), EOP | RS) for at, frame in enumerate(frames))
        )
        nic.kick()
        while not all(map(nic.done, where)):
            nic.idle()
        sent += frames
        assert nic.read(regs.TDH) == nic.tx_tail
    assert nic.wire.sent == sent


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([8, 16, 64]), st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12))
def test_every_frame_arrives_once_in_order(count: int, bursts: list[tuple[int, bool]]) -> None:
    nic = Nic(rx=count).up()
    given_: list[bytes] = []
    got: list[bytes] = []
    for size, poll in bursts:
        for _ in range(size):
            given_.append(b"\xff" * 6 + len(given_).to_bytes(4, "big") * 20)
            nic.wire.deliver(given_[-1])
        if poll:
            got += [each.frame for each in nic.poll()]
    got += [each.frame for each in nic.poll()]
    assert got == given_
