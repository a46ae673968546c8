"""JSON documents one after another in a stream of bytes, without separators; errors are documents too.

After an error the rest of the broken document is passed over: until its brackets are closed, or one is closed that
was never opened, or something comes that is no token. Depth and size are bounded.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocols.monitor.tokens import Kind, Token, Tokenizer

MAX_DEPTH: Final = 256
MAX_DOCUMENT: Final = 1 << 20
"""Bytes of the tokens of one document."""
_INT64_MIN: Final = -(1 << 63)
_UINT64_MAX: Final = (1 << 64) - 1
_WORDS: Final = {b"true": True, b"false": False, b"null": None}
_ESCAPE: Final = re.compile(r"\\(?:u(.{0,4})|(.))", re.DOTALL)
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", **{each: each for each in "\"'\\/"}}
_HEX4: Final = re.compile(r"[0-9a-fA-F]{4}")


@dataclass(frozen=True, slots=True)
class Document:
    """A whole value."""

    value: object


@dataclass(frozen=True, slots=True)
class Malformed:
    """What could not be read, and where, for a person."""

    reason: str


class _Bad(Exception):
    """``reason`` without the place."""


@dataclass(slots=True)
class _Frame:
    """An object or array that is not closed yet. ``expects`` is what may come next in it."""

    value: dict[str, object] | list[object]
    expects: str
    key: str = ""


class JsonStream:
    """Fed with :meth:`feed`; :meth:`next` gives what is complete."""

    def __init__(self) -> None:
        self._tokens = Tokenizer()
        self._waiting: deque[bytes] = deque()
        self._iterator: Iterator[Token] = iter(())
        self._reset()

    def _reset(self) -> None:
        self._frames: list[_Frame] = []
        self._braces = self._brackets = self._size = 0
        self._skipping = False

    def feed(self, data: bytes) -> None:
        """Take ``data``."""
        self._waiting.append(data)

    def next(self) -> Document | Malformed | None:
        """The next value or error; None when more bytes are needed."""
        while True:
            for token in self._iterator:
                found = self._take(token)
                if found is not None:
                    return found
            if not self._waiting:
                return None
            self._iterator = self._tokens.feed(self._waiting.popleft())

    # -- tokens --------------------------------------------------------------------------------------------------

    def _take(self, token: Token) -> Document | Malformed | None:
        if token.kind in (Kind.ERROR, Kind.OVERLONG):
            was_skipping = self._skipping
            self._reset()
            return None if was_skipping else _no_token(token)
        self._size += len(token.text)
        if token.kind is Kind.PUNCTUATION:
            self._count(token.text)
        if self._skipping:
            self._end_skipping()
            return None
        if self._braces + self._brackets > MAX_DEPTH or self._size > MAX_DOCUMENT:
            limit = "token size" if self._size > MAX_DOCUMENT else "nesting depth"
            self._reset()
            return Malformed(f"JSON {limit} limit exceeded")
        try:
            return self._parse(token)
        except _Bad as error:
            self._frames.clear()
            self._skipping = True
            self._end_skipping()
            return Malformed(f"{token.place}: JSON parse error, {error}")

    def _count(self, text: bytes) -> None:
        self._braces += {b"{": 1, b"}": -1}.get(text, 0)
        self._brackets += {b"[": 1, b"]": -1}.get(text, 0)

    def _end_skipping(self) -> None:
        if self._braces < 0 or self._brackets < 0 or (self._braces == 0 and self._brackets == 0):
            self._reset()

    # -- grammar -------------------------------------------------------------------------------------------------

    def _parse(self, token: Token) -> Document | None:
        frame = self._frames[-1] if self._frames else None
        expects = frame.expects if frame is not None else "value"
        if frame is not None and token.text == _CLOSING[type(frame.value)] and expects in _MAY_CLOSE:
            self._frames.pop()
            return self._value(frame.value)
        if frame is None or "value" in expects:
            return self._open_or_value(token)
        if "key" in expects:
            if token.kind is not Kind.STRING:
                raise _Bad("expecting key")
            frame.key, frame.expects = _string(token.text), "':'"
        elif expects == "':'":
            if token.text != b":":
                raise _Bad("expecting ':'")
            if frame.key in frame.value:
                raise _Bad("duplicate key")
            frame.expects = "value"
        else:
            if token.text != b",":
                raise _Bad(f"expected {expects}")
            frame.expects = "key" if isinstance(frame.value, dict) else "value"
        return None

    def _open_or_value(self, token: Token) -> Document | None:
        if token.text == b"{":
            self._frames.append(_Frame({}, "key or }"))
            return None
        if token.text == b"[":
            self._frames.append(_Frame([], "value or ]"))
            return None
        return self._value(_scalar(token))

    def _value(self, value: object) -> Document | None:
        if not self._frames:
            self._reset()
            return Document(value)
        frame = self._frames[-1]
        if isinstance(frame.value, dict):
            frame.value[frame.key] = value
            frame.expects = "',' or '}'"
        else:
            frame.value.append(value)
            frame.expects = "',' or ']'"
        return None


_CLOSING: Final[dict[type, bytes]] = {dict: b"}", list: b"]"}
_MAY_CLOSE: Final = frozenset(("key or }", "value or ]", "',' or '}'", "',' or ']'"))


def _no_token(token: Token) -> Malformed:
    if token.kind is Kind.OVERLONG:
        return Malformed("JSON token size limit exceeded")
    return Malformed(f"{token.place}: JSON parse error, stray '{token.text[:80].decode(errors='replace')}'")


def _scalar(token: Token) -> object:
    if token.kind is Kind.STRING:
        return _string(token.text)
    if token.kind is Kind.NUMBER:
        return _number(token.text)
    if token.kind is Kind.WORD:
        if token.text not in _WORDS:
            raise _Bad(f"invalid keyword '{token.text[:80].decode()}'")
        return _WORDS[token.text]
    raise _Bad("expecting value")


def _number(text: bytes) -> int | float:
    """An integer where it fits 64 bits, signed or unsigned."""
    if len(text) <= 20 and not set(text) & set(b".eE"):
        value = int(text)
        if _INT64_MIN <= value <= _UINT64_MAX:
            return value
    return float(text)


def _string(text: bytes) -> str:
    try:
        body = text[1:-1].decode()
    except UnicodeDecodeError:
        raise _Bad("invalid UTF-8 sequence in string") from None
    if "\\" not in body:
        return body
    joined = _ESCAPE.sub(_unescape, body)
    try:  # two escapes may be the halves of one character
        return joined.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        half = next(char for char in joined if 0xD800 <= ord(char) <= 0xDFFF)
        raise _Bad(f"\\u{ord(half):04x} is not a valid Unicode character") from None


def _unescape(found: re.Match[str]) -> str:
    digits, letter = found.groups()
    if digits is not None:
        if not _HEX4.fullmatch(digits):
            raise _Bad(f"\\u{digits} is not a valid Unicode character")
        return chr(int(digits, 16))
    if letter not in _ESCAPED:
        raise _Bad("invalid escape sequence in string")
    return _ESCAPED[letter]
