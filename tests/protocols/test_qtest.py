"""The qtest protocol: one reply for each line, as QEMU gives it, and nothing that a client sends ends it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from protocols.qtest.arguments import MAX_READ, CommandFailed
from protocols.qtest.state import HCALL_OUTPUTS, MAX_LINE, QtestState
from tests.protocols.fuzz import WILD, Fuzzer


class FakeMachine:
    """4 KiB of memory that repeats, one timer, and a list of calls."""

    big_endian = True
    paravirtual = True

    def __init__(self) -> None:
        self.memory = bytearray(4096)
        self.now_ns = 0
        self.deadline: int | None = None
        self.calls: list[tuple[object, ...]] = []
        self.during: list[bytes] = []
        self.state: QtestState | None = None

    def next_deadline_ns(self) -> int | None:
        return self.deadline

    def advance_to(self, now_ns: int) -> int:
        assert now_ns > self.now_ns
        self.now_ns = now_ns
        if self.state is not None:
            self.during.append(self.state.irq(7, True))
        return now_ns

    def read(self, gpa: int, size: int) -> bytes:
        at = gpa % 4096
        return (bytes(self.memory[at:]) + bytes(self.memory) * (size // 4096 + 1))[:size]

    def write(self, gpa: int, data: bytes) -> None:
        at = gpa % 4096
        part = data[: 4096 - at]
        self.memory[at : at + len(part)] = part

    def port_read(self, port: int, size: int) -> int:
        return (1 << size * 8) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        self.calls.append(("port", port, size, value))

    def rtas(self, name: str, args: tuple[int, int], rets: tuple[int, int]) -> int:
        self.calls.append((name, args, rets))
        return 0 if name == "known" else -4

    def hcall(self, nr: int, args: Sequence[int]) -> tuple[int, Sequence[int]]:
        self.calls.append((nr, *args))
        return -4, [1, 2]

    def resolve(self, path: str) -> str:
        return path

    def intercept(self, path: str, *, outputs: bool) -> bool:
        if path == "/nowhere":
            raise CommandFailed("FAIL Unknown device")
        return path != "/deaf" and not outputs


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def qtest(machine: FakeMachine) -> QtestState:
    return QtestState(machine)


def ask(qtest: QtestState, *lines: str) -> list[str]:
    return qtest.receive("".join(f"{line}\n" for line in lines).encode("latin-1")).decode("latin-1").splitlines()


CONVERSATIONS = {
    "sized accesses have the machine's byte order": [
        ("writel 0x10 0x11223344", "OK"),
        ("read 0x10 8", "OK 0x1122334400000000"),
        ("readl 0x10", "OK 0x0000000011223344"),
        ("readw 17", "OK 0x0000000000002233"),
        ("writeb 0x20 0x1ff", "OK"),
        ("readw 0x20", "OK 0x000000000000ff00"),
        ("writeq 0x30 -2", "OK"),
        ("readq 060", "OK 0xfffffffffffffffe"),
    ],
    "hexadecimal data is cut, filled up, and never refused but for its length": [
        ("write 0x40 4 0x0102", "OK"),
        ("write 0x44 2 0x01020304", "OK"),
        ("read 0x40 8", "OK 0x0102000001020000"),
        ("write 0 4 0x123", "OK"),
        ("read 0 4", "OK 0x12000000"),
        ("write 0 3 0xzz11", "OK"),
        ("read 0 4", "OK 0xff110000"),
        ("write 0 4 zzzz", "OK"),
        ("read 0 4", "OK 0xff000000"),
        ("write 0 0 0x", "ERR invalid argument size"),
    ],
    "memset and base64": [
        ("memset 0x60 8 0x1ab", "OK"),
        ("read 0x60 9", "OK 0xabababababababab00"),
        ("memset 0x60 0 1", "OK"),
        ("b64write 0x80 9 aGVsbG8=", "OK"),
        ("b64read 0x80 5", "OK aGVsbG8="),
        ("b64write 0x80 1 WFla", "OK"),
        ("b64read 0x80 3", "OK WGVs"),
        ("b64read 0 0", "OK "),
        ("b64write 0 5 !!", "ERR invalid argument size"),
    ],
    "ports": [("inb 0", "OK 0x00ff"), ("inl 0xffff", "OK 0xffffffff"), ("outw 0x10 5", "OK")],
    "time only goes forward": [
        ("clock_step 5", "OK 5"),
        ("clock_step 0", "FAIL could not advance time"),
        ("clock_step -5", "FAIL could not advance time"),
        ("clock_step 0x7fffffffffffffff", "FAIL could not advance time"),
        ("clock_set 3", "FAIL 5"),
        ("clock_set 5", "OK 5"),
        ("clock_set 10", "OK 10"),
        ("clock_step", "FAIL cannot advance clock to the next deadline because there is no pending deadline"),
    ],
    "calls": [
        ("rtas known 1 0x1000 2 0x2000", "OK 0"),
        ("rtas unknown 0 0 0 0", "OK 18446744073709551612"),
        ("hcall 0x20 0x80000000 0", "OK 0xfffffffffffffffc 0x" + " 0x".join(f"{n:016x}" for n in (1, 2, 0, 0, 0, 0))),
    ],
    "interception": [
        ("irq_intercept_in /nowhere", "FAIL Unknown device"),
        ("irq_intercept_in /deaf", "FAIL No intercepts installed"),
        ("irq_intercept_in /machine", "OK"),
        ("irq_intercept_in /machine", "OK"),
        ("irq_intercept_in /deaf", "FAIL IRQ intercept already enabled"),
    ],
    "what QEMU would end with a failed assertion is refused, and the next command is carried out": [
        ("readb", "FAIL readb takes 1 argument"),
        ("read 0", "FAIL read takes 2 arguments"),
        ("readb  0x0", "FAIL not a number: ''"),
        ("readb 0x10zz", "FAIL not a number: '0x10zz'"),
        ("readb 18446744073709551616", "FAIL out of range: '18446744073709551616'"),
        ("read 0 0", f"FAIL length 0: 1 to {MAX_READ} bytes can be transferred"),
        ("outb 0x1ffff 1", "FAIL port 0x1ffff is above 0xffff"),
        ("hcall", "FAIL hcall takes 1 argument"),
        ("  readb 0", "FAIL Unknown command ''"),
        ("READB 0", "FAIL Unknown command 'READB'"),
        ("endianness or not", "OK big"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation(qtest: QtestState, name: str) -> None:
    for line, reply in CONVERSATIONS[name]:
        assert (line, ask(qtest, line)) == (line, [reply])


def test_calls_reach_the_machine_with_their_arguments(machine: FakeMachine, qtest: QtestState) -> None:
    ask(qtest, "outl 0x3f8 -1", "rtas known 3 0x1000 2 0x2000", "hcall 4 5 0x6 07", "hcall 9")
    assert machine.calls == [("port", 0x3F8, 4, 0xFFFFFFFF), ("known", (3, 0x1000), (2, 0x2000)), (4, 5, 6, 7), (9,)]


def test_a_step_without_a_number_goes_to_the_next_timer(machine: FakeMachine, qtest: QtestState) -> None:
    machine.deadline = 1234
    assert ask(qtest, "clock_step") == ["OK 1234"]


def test_the_other_byte_order(machine: FakeMachine) -> None:
    machine.big_endian = False
    assert ask(QtestState(machine), "endianness", "writel 0 1", "read 0 4") == ["OK little", "OK", "OK 0x01000000"]


def test_an_empty_line_has_no_reply(qtest: QtestState) -> None:
    assert ask(qtest, "", "endianness") == ["OK big"]


def test_lines_may_come_in_pieces_and_together(qtest: QtestState) -> None:
    assert qtest.receive(b"endian") == b""
    assert qtest.receive(b"ness\nreadb 0\nrea") == b"OK big\nOK 0x0000000000000000\n"
    assert qtest.receive(b"db 1\n") == b"OK 0x0000000000000000\n"


def test_interrupts_are_silent_until_they_are_intercepted(qtest: QtestState) -> None:
    assert qtest.irq(3, True) == b""
    ask(qtest, "irq_intercept_in /machine")
    assert qtest.irq(3, True) == b"IRQ raise 3\n" and qtest.irq(3, False) == b"IRQ lower 3\n"


def test_an_interrupt_that_a_command_causes_comes_before_its_reply(machine: FakeMachine, qtest: QtestState) -> None:
    machine.state = qtest
    ask(qtest, "irq_intercept_in /machine")
    assert ask(qtest, "clock_step 1") == ["IRQ raise 7", "OK 1"]
    assert machine.during == [b""]


def test_a_line_without_end_is_refused_as_a_whole(qtest: QtestState) -> None:
    piece = b"x" * (8 << 20)
    for _ in range(MAX_LINE // len(piece) + 2):
        assert qtest.receive(piece) == b""
    assert qtest.receive(b"yz\nendianness\n").decode().splitlines() == [
        f"FAIL a command has at most {MAX_LINE} bytes",
        "OK big",
    ]


def test_both_directions_are_logged(machine: FakeMachine) -> None:
    logged: list[tuple[str, str]] = []
    qtest = QtestState(machine, log=lambda kind, line: logged.append((kind, line)))
    ask(qtest, "endianness", "bad")
    assert logged == [("R", "endianness"), ("S", "OK big"), ("R", "bad"), ("S", "FAIL Unknown command 'bad'")]


def _commands(seed: int) -> list[bytes]:
    """Commands with wild arguments, two of three whole."""
    fuzzer = Fuzzer(seed)
    pick = fuzzer.random
    numbers = [f"{number:#x}" for number in WILD] + ["-1", "07", "08", "x", "", "0x", "99999999999999999999"]
    names = ["read", "write", "memset", "b64read", "b64write", "clock_step", "clock_set", "rtas", "hcall", "endianness"]
    names += [
        "irq_intercept_in",
        "irq_intercept_out",
        *(f"{verb}{size}" for verb in ("read", "write") for size in "bwlq"),
    ]
    made = []
    for _ in range(400):
        words = [pick.choice(numbers) for _ in range(pick.randrange(6))]
        name = pick.choice(names)
        if name in ("read", "write", "memset", "b64read", "b64write") and len(words) > 1:
            words[1] = pick.choice(["0", "1", "16", "4097", words[1]])
        if name.startswith("irq"):
            words[:1] = [pick.choice(["/machine", "/deaf", "/nowhere"])]
        line = " ".join([name, *words]).encode()
        made.append(line if pick.random() < 2 / 3 else fuzzer.damage(line).replace(b"\n", b" "))
    return made


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_every_line_has_one_reply(machine: FakeMachine, seed: int) -> None:
    qtest, lines = QtestState(machine), _commands(seed)
    good = 0
    for line in lines:
        replies = qtest.receive(line + b"\n").decode("latin-1").split("\n")[:-1]
        assert len(replies) == (1 if line else 0), line
        assert all(reply.split(" ")[0] in ("OK", "FAIL", "ERR") for reply in replies)
        good += bool(replies) and replies[0].startswith("OK")
    assert good >= len(lines) // 8


@pytest.mark.parametrize("seed", range(4))
def test_where_the_stream_is_cut_makes_no_difference(seed: int) -> None:
    stream = b"\n".join(_commands(seed)) + b"\n"
    whole = QtestState(FakeMachine()).receive(stream)
    pieces, cuts = QtestState(FakeMachine()), random.Random(seed)
    got, at = b"", 0
    while at < len(stream):
        end = at + cuts.randrange(1, 50)
        got += pieces.receive(stream[at:end])
        at = end
    assert got == whole


def test_registers_that_nobody_set_are_zero(qtest: QtestState) -> None:
    (reply,) = ask(qtest, "hcall 1")
    assert len(reply.split()) == 2 + HCALL_OUTPUTS


def test_all_of_a_large_ram_can_be_set_at_once(machine: FakeMachine, qtest: QtestState) -> None:
    assert ask(qtest, "memset 0 0x10000001 0x5a") == ["OK"]
    assert ask(qtest, f"memset 0 {1 << 40:#x} 0x5a")[0].startswith("FAIL length")
