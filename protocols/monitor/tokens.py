"""JSON tokens out of bytes that come in any pieces (RFC 8259; strings in single quotes too, as QMP allows).

What is no token is an ERROR token with what was read of it; after it everything up to the next structural or control
character is skipped, so that a peer which sent garbage is understood again from its next object on. A token is bounded:
one byte more is an OVERLONG token, and the rest of it is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import Final, NamedTuple

MAX_TOKEN: Final = 1 << 20
"""Bytes of one token."""
_STRUCTURAL: Final = frozenset(b"{}[]:,")
_SPACE: Final = frozenset(b" \t\r\n")
_PLAIN: Final = {quote: re.compile(rb"[^\\\x00-\x1f\xfe\xff" + bytes([quote]) + rb"]*") for quote in b"\"'"}
_SKIPPED: Final = re.compile(rb"[^\x00-\x1f\xfe\xff{}\[\]:,]*")
_WORD: Final = re.compile(rb"[a-z]*")
_DIGITS: Final = b"0123456789"
# What may follow in a number, by what was read so far; the states with "" may be its end.
_NUMBER: Final[dict[str, dict[str, str]]] = {
    "-": {"0": "0", "1-9": "int"},
    "0": {".": ".", "e": "e", "": ""},
    "int": {"0": "int", "1-9": "int", ".": ".", "e": "e", "": ""},
    ".": {"0": "frac", "1-9": "frac"},
    "frac": {"0": "frac", "1-9": "frac", "e": "e", "": ""},
    "e": {"0": "exp", "1-9": "exp", "+-": "e+"},
    "e+": {"0": "exp", "1-9": "exp"},
    "exp": {"0": "exp", "1-9": "exp", "": ""},
}
_CLASS: Final = {
    **{digit: "1-9" for digit in _DIGITS[1:]},
    ord("0"): "0",
    ord("."): ".",
    **{letter: "e" for letter in b"eE"},
    **{sign: "+-" for sign in b"+-"},
}


class Kind(Enum):
    """What a token is."""

    PUNCTUATION = auto()
    STRING = auto()
    NUMBER = auto()
    WORD = auto()
    ERROR = auto()
    OVERLONG = auto()


class Token(NamedTuple):
    """``text`` as it was sent (a string with its quotes); ``line`` and ``column`` of its first byte count from 1."""

    kind: Kind
    text: bytes
    line: int
    column: int

    @property
    def place(self) -> str:
        """``LINE:COLUMN``."""
        return f"{self.line}:{self.column}"


class Tokenizer:
    """Fed with :meth:`feed`; keeps an unfinished token."""

    def __init__(self) -> None:
        self._token = bytearray()
        self._reading = self._start
        self._quote = 0
        self._escaped = False
        self._number = ""
        self._data, self._at = b"", 0
        self._line, self._line_start, self._passed = 1, 0, 0
        """``_passed``: bytes before ``_data``; ``_line_start``: how many came before the present line."""
        self._place = (1, 1)

    def feed(self, data: bytes) -> Iterator[Token]:
        """The tokens that end in ``data``. All of it is read only when the iterator has been exhausted."""
        self._data, self._at = data, 0
        while self._at < len(data):
            token = self._reading()
            if token is not None:
                yield token
            elif len(self._token) > MAX_TOKEN:
                yield self._end(Kind.OVERLONG, skip=True)
        self._passed += len(data)

    # -- one step each: consume at least one byte, or change what is being read ----------------------------------

    def _start(self) -> Token | None:
        byte = self._data[self._at]
        self._place = (self._line, self._passed + self._at - self._line_start + 1)
        if byte in b"\"'":
            self._take()
            self._quote, self._escaped, self._reading = byte, False, self._string
        elif byte == ord("-") or byte in _DIGITS:
            self._take()
            self._number = "-" if byte == ord("-") else "0" if byte == ord("0") else "int"
            self._reading = self._in_number
        elif ord("a") <= byte <= ord("z"):
            self._reading = self._word
        elif byte in _SPACE:
            self._take()
            self._token.clear()
        else:
            self._take()
            return self._end(Kind.PUNCTUATION) if byte in _STRUCTURAL else self._end(Kind.ERROR, skip=True)
        return None

    def _string(self) -> Token | None:
        if not self._escaped:
            self._take_match(_PLAIN[self._quote])
            if self._at == len(self._data) or len(self._token) > MAX_TOKEN:
                return None
        byte = self._data[self._at]
        escaped, self._escaped = self._escaped, False
        self._take()
        if byte < 0x20 or byte >= 0xFE:
            return self._end(Kind.ERROR, skip=True)
        if byte == self._quote and not escaped:
            return self._end(Kind.STRING)
        self._escaped = byte == ord("\\") and not escaped
        return None

    def _in_number(self) -> Token | None:
        following = _NUMBER[self._number]
        state = following.get(_CLASS.get(self._data[self._at], "end"))
        if state is not None:
            self._take()
            self._number = state
            return None
        if "" in following and self._data[self._at] not in _DIGITS:
            return self._end(Kind.NUMBER)
        self._take()
        return self._end(Kind.ERROR, skip=True)

    def _word(self) -> Token | None:
        self._take_match(_WORD)
        return self._end(Kind.WORD) if self._at < len(self._data) else None

    def _skip(self) -> Token | None:
        found = _SKIPPED.match(self._data, self._at)
        assert found is not None, "the expression matches nothing at all"
        self._at = found.end()
        if self._at < len(self._data):
            self._reading = self._start
        return None

    # -- bytes ---------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        byte = self._data[self._at]
        self._token.append(byte)
        self._at += 1
        if byte == ord("\n"):
            self._line, self._line_start = self._line + 1, self._passed + self._at

    def _take_match(self, expression: re.Pattern[bytes]) -> None:
        """What matches holds no line end."""
        room = MAX_TOKEN + 1 - len(self._token)
        found = expression.match(self._data, self._at, self._at + room)
        assert found is not None, "the expressions match nothing at all"
        self._token += found.group()
        self._at = found.end()

    def _end(self, kind: Kind, *, skip: bool = False) -> Token:
        token = Token(kind, bytes(self._token), *self._place)
        self._token.clear()
        self._reading = self._skip if skip else self._start
        return token
