"""Looking before sleeping: what is there at once is found, vain looking is given up, and taken up again."""

from __future__ import annotations

from protocols.transport.halt_polling import SELDOM, VAIN, HaltPoll


class Source:
    """Something comes when it has been looked for so many times."""

    def __init__(self) -> None:
        self.looks = 0
        self.comes_after: int | None = None

    def look(self) -> str:
        self.looks += 1
        return "here" if self.comes_after is not None and self.looks > self.comes_after else ""

    def looks_of(self, poll: HaltPoll[str]) -> int:
        before = self.looks
        poll()
        return self.looks - before


def test_what_comes_in_a_moment_is_found() -> None:
    source = Source()
    source.comes_after = 3
    assert HaltPoll(source.look, processors=2)() == "here"
    assert source.looks == 4


def test_what_does_not_come_is_given_up() -> None:
    source = Source()
    assert HaltPoll(source.look, processors=2)() == ""
    assert source.looks > 1


def test_with_one_processor_there_is_one_look() -> None:
    source = Source()
    poll = HaltPoll(source.look, processors=1)
    assert [source.looks_of(poll) for _ in range(2 * SELDOM)] == [1] * 2 * SELDOM


def test_after_vain_attempts_few_are_made() -> None:
    source = Source()
    poll = HaltPoll(source.look, processors=2)
    counts = [source.looks_of(poll) for _ in range(VAIN + 2 * SELDOM)]
    assert min(counts[:VAIN]) > 1
    assert sum(count > 1 for count in counts[VAIN:]) == 2


def test_an_attempt_that_finds_something_makes_up_for_the_vain_ones() -> None:
    source = Source()
    poll = HaltPoll(source.look, processors=2)
    for _ in range(VAIN + SELDOM - 1):
        poll()
    source.comes_after = source.looks + 2
    assert poll() == "here", "the seldom attempt"
    source.comes_after = None
    assert [source.looks_of(poll) > 1 for _ in range(VAIN + 1)] == [True] * VAIN + [False]
