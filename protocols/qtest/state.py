"""The qtest protocol of one connection, without I/O: lines of text in, lines of text out (QEMU's ``system/qtest.c``).

::

    command  = name *(SP word) LF           reply = ("OK" / "FAIL" / "ERR") [SP text] LF      one for each, in order
    IRQ SP ("raise" / "lower") SP number LF             at any time once interrupts are intercepted

====================================  =================================  =====================================
``inb|inw|inl PORT``                  ``OK 0x%04x``                      I/O ports, below 0x10000
``outb|outw|outl PORT VALUE``         ``OK``
``readb|readw|readl|readq ADDR``      ``OK 0x%016x``                     the machine's byte order
``writeb|writew|writel|writeq A V``   ``OK``
``read ADDR LEN``                     ``OK 0x`` and two digits a byte
``write ADDR LEN 0x…``                ``OK``
``memset ADDR LEN BYTE``              ``OK``
``b64read ADDR LEN``                  ``OK`` and base64
``b64write ADDR LEN BASE64``          ``OK``
``clock_step [NS]``                   ``OK`` and the new time in ns      without NS to the next timer
``clock_set NS``                      ``OK`` and the new time in ns      absolute, never backwards
``irq_intercept_in|_out PATH``        ``OK``                             ``IRQ`` lines from now on
``rtas NAME NARGS ARGS NRET RETS``    ``OK`` and 0 or H_PARAMETER        cells in guest memory, status in RETS
``hcall NR ARG…``                     ``OK RET R4 … R9``, each 0x%016x   ours; the registers after the call
``endianness``                        ``OK big`` or ``OK little``
====================================  =================================  =====================================

``rtas`` and ``hcall`` are there on machines that have such calls. An empty line has no reply, and words too many do not
matter. Where QEMU ends with a failed assertion (a word that is missing, or no number) the reply is ``FAIL`` and the
reason, and nothing else happens.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol

from protocols.qtest.arguments import (
    MAX_READ,
    MAX_SET,
    MAX_WRITE,
    U64,
    CommandFailed,
    base64_data,
    hex_data,
    length,
    signed,
    unsigned,
)

MAX_LINE: Final = 2 * MAX_WRITE + 256
"""Bytes of one command; a longer line is refused as a whole."""
PORTS: Final = 0x10000
MAX_TIME_NS: Final = (1 << 63) - 1
HCALL_OUTPUTS: Final = 6
_MEMSET_PIECE = 1 << 20
_SIZES: Final = {"b": 1, "w": 2, "l": 4, "q": 8}

Words = list[str]
Log = Callable[[Literal["R", "S"], str], None]
"""``(kind, line)``: what was received and sent, without its line feed."""


class Machine(Protocol):
    """What qtest drives. Any method may raise :class:`~protocols.qtest.arguments.CommandFailed`."""

    big_endian: bool
    paravirtual: bool
    """Whether it has ``rtas`` and ``hcall``."""

    @property
    def now_ns(self) -> int:
        """Virtual time."""

    def next_deadline_ns(self) -> int | None:
        """When the next timer fires; None without one."""

    def advance_to(self, now_ns: int) -> int:
        """Let time pass until ``now_ns``, which is later than now; the new time."""

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes of memory."""

    def write(self, gpa: int, data: bytes) -> None:
        """Store ``data``."""

    def port_read(self, port: int, size: int) -> int:
        """A load from an I/O port."""

    def port_write(self, port: int, size: int, value: int) -> None:
        """A store to one."""

    def rtas(self, name: str, args: tuple[int, int], rets: tuple[int, int]) -> int:
        """An RTAS call by name; (number of cells, address) of arguments and of return cells. A hypercall's return."""

    def hcall(self, nr: int, args: Sequence[int]) -> tuple[int, Sequence[int]]:
        """A hypercall: the signed return code, the outputs from R4 on."""

    def resolve(self, path: str) -> str:
        """The whole path of the device that ``path``, or the end of one, names."""

    def intercept(self, path: str, *, outputs: bool) -> bool:
        """Whether the device at the whole ``path`` has interrupt lines of that direction, which :meth:`QtestState.irq`
        then hears.
        """


class QtestState:
    """One connection to ``machine``."""

    def __init__(self, machine: Machine, *, log: Log | None = None) -> None:
        self._machine, self._log = machine, log
        self._order: Literal["big", "little"] = "big" if machine.big_endian else "little"
        self._line = bytearray()
        self._too_long = False
        self._out: list[str] = []
        self._working = False
        self._intercepted = ""
        self._commands: dict[str, Callable[[Words], str]] = {
            "read": self._read,
            "write": self._write,
            "memset": self._memset,
            "b64read": self._b64read,
            "b64write": self._b64write,
            "clock_step": self._clock_step,
            "clock_set": self._clock_set,
            "irq_intercept_in": lambda words: self._intercept(words, outputs=False),
            "irq_intercept_out": lambda words: self._intercept(words, outputs=True),
            "endianness": lambda words: f"OK {self._order}",
        }
        if machine.paravirtual:
            self._commands |= {"rtas": self._rtas, "hcall": self._hcall}
        for letter, size in _SIZES.items():
            self._commands |= self._sized(letter, size)

    def _sized(self, letter: str, size: int) -> dict[str, Callable[[Words], str]]:
        """The commands of one access size."""
        machine, order, mask = self._machine, self._order, (1 << size * 8) - 1

        def load(words: Words) -> str:
            (word,) = _words(words, 1)
            return f"OK 0x{int.from_bytes(machine.read(unsigned(word), size), order):016x}"

        def store(words: Words) -> str:
            gpa, value = map(unsigned, _words(words, 2))
            machine.write(gpa, (value & mask).to_bytes(size, order))
            return "OK"

        def port_in(words: Words) -> str:
            (word,) = _words(words, 1)
            return f"OK 0x{machine.port_read(_port(word), size) & mask:04x}"

        def port_out(words: Words) -> str:
            port, value = _words(words, 2)
            machine.port_write(_port(port), size, unsigned(value) & mask)
            return "OK"

        memory: dict[str, Callable[[Words], str]] = {f"read{letter}": load, f"write{letter}": store}
        return memory if letter == "q" else {**memory, f"in{letter}": port_in, f"out{letter}": port_out}

    # -- lines ---------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> bytes:
        """Carry out every command that ``data`` completes; what is to be sent."""
        *lines, rest = data.split(b"\n")
        self._working = True
        try:
            for line in lines:
                if self._line or self._too_long:
                    line = bytes(self._line) + line
                    self._line.clear()
                self._line_came(line)
        finally:
            self._working = False
        if len(self._line) + len(rest) > MAX_LINE:
            self._line.clear()
            self._too_long = True
        else:
            self._line += rest
        return self._taken()

    def irq(self, number: int, level: bool) -> bytes:
        """Interrupt ``number`` went up or down: what is to be sent now; nothing while a command is at work, whose
        reply follows it.
        """
        if not self._intercepted:
            return b""
        self._say(f"IRQ {'raise' if level else 'lower'} {number}")
        return b"" if self._working else self._taken()

    def _taken(self) -> bytes:
        if not self._out:
            return b""
        text = "\n".join(self._out)
        self._out.clear()
        return text.encode("latin-1") + b"\n"

    def _say(self, line: str) -> None:
        self._out.append(line)
        if self._log is not None:
            self._log("S", line)

    def _line_came(self, line: bytes) -> None:
        if self._too_long or len(line) > MAX_LINE:
            self._too_long = False
            self._say(f"FAIL a command has at most {MAX_LINE} bytes")
            return
        text = line.decode("latin-1")
        if self._log is not None:
            self._log("R", text)
        if not text:
            return
        words = text.split(" ")
        command = self._commands.get(words[0])
        try:
            reply = command(words) if command is not None else f"FAIL Unknown command '{words[0][:80]}'"
        except CommandFailed as failed:
            reply = failed.reply
        self._say(reply)

    # -- memory --------------------------------------------------------------------------------------------------

    def _read(self, words: Words) -> str:
        gpa, size = _words(words, 2)
        return "OK 0x" + self._machine.read(unsigned(gpa), length(size, MAX_READ, least=1)).hex()

    def _write(self, words: Words) -> str:
        gpa, size, data = _words(words, 3)
        return self._store(unsigned(gpa), hex_data(data, length(size, MAX_WRITE)))

    def _store(self, gpa: int, data: bytes) -> str:
        if data:
            self._machine.write(gpa, data)
        return "OK"

    def _memset(self, words: Words) -> str:
        gpa_word, size_word, value = _words(words, 3)
        gpa, size, byte = unsigned(gpa_word), length(size_word, MAX_SET), unsigned(value) & 0xFF
        piece = bytes((byte,)) * min(size, _MEMSET_PIECE)
        for at in range(0, size, _MEMSET_PIECE):
            self._machine.write(gpa + at & U64, piece[: size - at])
        return "OK"

    def _b64read(self, words: Words) -> str:
        gpa, size = _words(words, 2)
        return "OK " + base64.b64encode(self._machine.read(unsigned(gpa), length(size, MAX_READ))).decode()

    def _b64write(self, words: Words) -> str:
        gpa, size, data = _words(words, 3)
        return self._store(unsigned(gpa), base64_data(data, length(size, MAX_WRITE)))

    # -- time, interrupts, calls ---------------------------------------------------------------------------------

    def _clock_step(self, words: Words) -> str:
        before = self._machine.now_ns
        if len(words) > 1:
            target = before + signed(words[1])
        else:
            deadline = self._machine.next_deadline_ns()
            if deadline is None:
                why = "cannot advance clock to the next deadline because there is no pending deadline"
                raise CommandFailed(f"FAIL {why}")
            target = deadline
        if not before < target <= MAX_TIME_NS:
            raise CommandFailed("FAIL could not advance time")
        return f"OK {self._machine.advance_to(target)}"

    def _clock_set(self, words: Words) -> str:
        target = signed(_words(words, 1)[0])
        now = self._machine.now_ns
        if target > now:
            now = self._machine.advance_to(target)
        return f"{'OK' if now == target else 'FAIL'} {now}"

    def _intercept(self, words: Words, *, outputs: bool) -> str:
        path = self._machine.resolve(_words(words, 1)[0])
        possible = self._machine.intercept(path, outputs=outputs)
        if self._intercepted:
            return "OK" if path == self._intercepted else "FAIL IRQ intercept already enabled"
        if not possible:
            return "FAIL No intercepts installed"
        self._intercepted = path
        return "OK"

    def _rtas(self, words: Words) -> str:
        name, *numbers = _words(words, 5)
        nargs, args, nret, rets = map(unsigned, numbers)
        return f"OK {self._machine.rtas(name, (nargs & 0xFFFFFFFF, args), (nret & 0xFFFFFFFF, rets)) & U64}"

    def _hcall(self, words: Words) -> str:
        nr, *args = [unsigned(word) for word in [*_words(words, 1), *words[2:]]]
        ret, outputs = self._machine.hcall(nr, args)
        registers = [*outputs, *args[len(outputs) :], *[0] * HCALL_OUTPUTS]
        values = [ret, *registers[:HCALL_OUTPUTS]]
        return "OK " + " ".join(f"0x{value & U64:016x}" for value in values)


def _words(words: Words, count: int) -> Words:
    """The ``count`` words behind the command.

    :raise CommandFailed: when there are fewer.
    """
    if len(words) <= count:
        raise CommandFailed(f"FAIL {words[0]} takes {count} argument{'s' if count > 1 else ''}")
    return words[1 : 1 + count]


def _port(word: str) -> int:
    port = unsigned(word)
    if port >= PORTS:
        raise CommandFailed(f"FAIL port {port:#x} is above {PORTS - 1:#x}")
    return port
