"""QMP without a socket: negotiation, what arguments are refused with which words, JSON in any pieces, and garbage."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.monitor.commands import COMMANDS
from protocols.monitor.json_stream import MAX_DEPTH, Document, JsonStream, Malformed
from protocols.monitor.messages import Command, CommandFailed
from protocols.monitor.schema import Arg, ListOf, Struct, check
from protocols.monitor.state import MonitorState, Phase
from protocols.monitor.tokens import MAX_TOKEN
from tests.protocols.fuzz import Fuzzer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
RESYNCHRONIZE = b"\xff"
"""What no token may hold: a client that has lost its place sends it."""


def read(*pieces: bytes) -> list[object]:
    """The values, and the reasons of the errors, in ``pieces``."""
    stream, found = JsonStream(), []
    for piece in pieces:
        stream.feed(piece)
        while (each := stream.next()) is not None:
            found.append(each.value if isinstance(each, Document) else each)
    return [each.reason.split(": JSON parse error, ")[-1] if isinstance(each, Malformed) else each for each in found]


@pytest.fixture
def state() -> MonitorState:
    return MonitorState(COMMANDS, "1")


def say(state: MonitorState, text: bytes | str) -> list[dict[str, object] | Command]:
    """What comes of ``text``: messages that are sent at once, decoded, and commands."""
    state.feed(text if isinstance(text, bytes) else text.encode())
    found: list[dict[str, object] | Command] = []
    while (each := state.next()) is not None:
        found.append(json.loads(each) if isinstance(each, bytes) else each)
    return found


def refusal(state: MonitorState, text: bytes | str) -> tuple[object, object]:
    """The class and the words of the only answer to ``text``."""
    (answer,) = say(state, text)
    assert isinstance(answer, dict)
    error = answer["error"]
    assert isinstance(error, dict)
    return error["class"], error["desc"]


# -- JSON ----------------------------------------------------------------------------------------------------------


@given(st.lists(JSON, max_size=4), st.integers(1, 7))
def test_documents_come_out_as_they_were_in_whatever_pieces(values: list[object], step: int) -> None:
    data = b" ".join(json.dumps(value).encode() for value in values) + b" "
    assert read(*(data[at : at + step] for at in range(0, len(data), step))) == values
    raw = " ".join(json.dumps(value, ensure_ascii=False) for value in values).encode() + b" "
    if b"\xfe" not in raw and b"\xff" not in raw:
        assert read(raw) == values


def test_nothing_has_to_stand_between_objects() -> None:
    assert read(b'{"a":1}{"b":[]}[{}]"x"') == [{"a": 1}, {"b": []}, [{}], "x"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"{'a':'it\\'s'}", [{"a": "it's"}]),
        (b'"\\ud83d\\ude00"', ["\U0001f600"]),
        (b'"\\ud83d"', ["\\ud83d is not a valid Unicode character"]),
        (b'"\\u12g4"', ["\\u12g4 is not a valid Unicode character"]),
        (b'"\\q"', ["invalid escape sequence in string"]),
        (b'"\x80"', ["invalid UTF-8 sequence in string"]),
        (b'\x01garbage{"a":1}', ["stray '\x01'", {"a": 1}]),
        (b'@@@ "abc" {"a":1}', ["stray '@'", {"a": 1}]),
        (b'{"a": query-name}{}', ["invalid keyword 'query'", "expecting value", {}]),
        (b'{"a":tru}{}', ["invalid keyword 'tru'", {}]),
        (b"]]]", ["expecting value"] * 3),
        (b'{"a":1,}{}', ["expecting key", {}]),
        (b'{"a":1,"a":2}{}', ["duplicate key", {}]),
        (b'{"a":1 "b":2}{}', ["expected ',' or '}'", {}]),
        (b"[1 2]{}", ["expected ',' or ']'", {}]),
        (b'{"a":1]}{}', ["expected ',' or '}'", "expecting value", {}]),
        (b'{"a" 5}{}', ["expecting ':'", {}]),
        (b"{5:6}{}", ["expecting key", {}]),
        (b"[1,]{}", ["expecting value", {}]),
        (b'{"a":01}', ["stray '01'", "expecting value"]),
        (b'{"a":1e}{}', ["stray '1e}'", {}]),
        (b"18446744073709551616 ", [float(1 << 64)]),
        (b"-0 ", [0]),
    ],
)
def test_what_is_wrong_is_said_and_passed_over(text: bytes, found: list[object]) -> None:
    assert read(text) == found
    assert read(*(bytes([byte]) for byte in text)) == found


def test_an_error_names_line_and_column() -> None:
    stream = JsonStream()
    stream.feed(b"{}\n {]")
    assert stream.next() == Document({})
    assert stream.next() == Malformed("2:3: JSON parse error, expecting key")


def test_depth_and_size_are_bounded() -> None:
    assert read(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) != ["JSON nesting depth limit exceeded"]
    assert read(b"[" * (MAX_DEPTH + 1)) == ["JSON nesting depth limit exceeded"]
    huge = b'"' + b"a" * (MAX_TOKEN + 5) + b'"'
    assert read(huge, b"{}") == ["JSON token size limit exceeded", {}]
    many = b"[" + b'"abcdefg",' * (MAX_TOKEN // 10 + 1)
    assert "JSON token size limit exceeded" in read(many)


# -- the protocol --------------------------------------------------------------------------------------------------


def test_nothing_but_the_negotiation_comes_first(state: MonitorState) -> None:
    greeting = json.loads(state.greeting())["QMP"]
    assert greeting["capabilities"] == [] and set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}
    expecting = "Expecting capabilities negotiation with 'qmp_capabilities'"
    assert refusal(state, '{"execute":"query-status"}') == ("CommandNotFound", expecting)
    assert refusal(state, '{"execute":"nope"}') == ("CommandNotFound", expecting)
    assert state.event("STOP", {}, 0) == b""
    enable = '{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
    assert refusal(state, enable) == ("GenericError", "Parameter 'null' does not accept value 'oob'")
    assert say(state, '{"execute":"qmp_capabilities","id":7}') == [{"return": {}, "id": 7}]
    again = "Capabilities negotiation is already complete, command ignored"
    assert refusal(state, '{"execute":"qmp_capabilities"}') == ("CommandNotFound", again)
    assert say(state, '{"execute":"query-status"}') == [Command("query-status", {}, {})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"execute":5}', "QMP input member 'execute' must be a string"),
        ('{"execute":"stop","arguments":[]}', "QMP input member 'arguments' must be an object"),
        ('{"execute":"stop","arguments":null}', "QMP input member 'arguments' must be an object"),
        ('{"exec-oob":"stop"}', "QMP input member 'exec-oob' is unexpected"),
        ('{"execute":"stop","arguments":{"x":1}}', "Parameter 'x' is unexpected"),
        ('{"execute":"device_del"}', "Parameter 'id' is missing"),
        ('{"execute":"device_del","arguments":{"id":5}}', "Invalid parameter type for 'id', expected: string"),
        (
            '{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":1}]}}',
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        (
            '{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":"x"}}',
            "Parameter 'max-bandwidth' expects uint64",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_the_words_of_qemu(state: MonitorState, text: str, words: str) -> None:
    state.phase = Phase.COMMANDS
    assert refusal(state, text) == ("GenericError", words)


def test_every_answer_repeats_the_id(state: MonitorState) -> None:
    state.phase = Phase.COMMANDS
    ((command),) = say(state, '{"execute":"stop","id":{"a":[1,null]}}')
    assert isinstance(command, Command)
    assert json.loads(state.reply(command, 5)) == {"return": 5, "id": {"a": [1, None]}}
    failed = json.loads(state.fail(command, CommandFailed("no", "DeviceNotFound")))
    assert failed == {"id": {"a": [1, None]}, "error": {"class": "DeviceNotFound", "desc": "no"}}
    assert say(state, '{"id":null}')[0] == {
        "id": None,
        "error": {"class": "GenericError", "desc": "QMP input lacks member 'execute'"},
    }


def test_messages_are_lines_and_events_bear_the_time(state: MonitorState) -> None:
    state.phase = Phase.COMMANDS
    line = state.event("RESET", {"guest": False}, 5_000_001_999)
    assert line.endswith(b"\r\n") and b"\n" not in line[:-2]
    stamp = {"seconds": 5, "microseconds": 1}
    assert json.loads(line) == {"timestamp": stamp, "event": "RESET", "data": {"guest": False}}
    assert "data" not in json.loads(state.event("STOP", {}, 0))


def test_lists_of_structs_are_checked_member_by_member() -> None:
    struct = Struct((Arg("list", ListOf(Struct((Arg("n", "uint64"),)))),))
    assert check(struct, {"list": [{"n": 1}]}) == {"list": [{"n": 1}]}
    for wrong in ({"list": {}}, {"list": [5]}, {"list": [{"n": -1}]}, {"list": [{"n": True}]}, {"list": [{"m": 1}]}):
        with pytest.raises(CommandFailed):
            check(struct, wrong)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_client_sends_is_answered_and_it_is_understood_again(seed: int, state: MonitorState) -> None:
    state.phase = Phase.COMMANDS
    understood = 0
    for data in islice(Fuzzer(seed).qmp(), 300):
        understood += sum(isinstance(each, Command) for each in say(state, data))
        answers = say(state, RESYNCHRONIZE + b'{"execute":"query-status"}')
        assert answers[-1] == Command("query-status", {}, {})
    assert understood >= 50
