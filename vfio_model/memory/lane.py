"""Lanes: how a thread that moves DMA shows that it is in the middle of it.

A device process owns one area of :data:`LANES` lanes; each thread of it that does DMA owns one lane, which is one
counter word on a cache line of its own::

    words 0-7          header (:mod:`vfio_model.memory.layout`), magic ``vmLANES1``; 0 in its place: retired
    words 8 + 8*i      counter of lane i: odd while its thread is inside a DMA section, even outside
    words 9..15 + 8*i  zero

A **DMA section** is: :meth:`Lane.enter`; load the root of the translation; load the entry; check it; copy at most
:data:`SECTION_BYTES`; note the dirty page; :meth:`Lane.leave` in a ``finally``. Between enter and leave there is only
straight-line code: no system call, no message, no lock, no callback out of the module. A translated address is never
kept after the lane is even again. :mod:`vfio_model.memory.revoke` waits for lanes, and can do so without any fence on
this side: its ``membarrier`` runs one on every processor that a reader runs on.

What must not be broken: the counter only grows, by one, written by one thread. That a lane *changed* means that the
section that was seen is over, even when the thread is inside the next one: the next one loads the entries anew.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.memory.layout import HEADER_WORDS, check_header, magic, write_header

LANES = 16
LANE_WORDS = 8
LANES_WORDS = HEADER_WORDS + LANES * LANE_WORDS
LANES_SIZE = LANES_WORDS * 8
"""Bytes of a lane area."""
MAGIC_LANES = magic("vmLANES1")

SECTION_BYTES = 256 * 1024
"""The most that one DMA section copies, so that a revoke never waits long for a healthy device."""


def lane_word(index: int) -> int:
    """The word that holds the counter of lane ``index`` (0..LANES-1)."""
    assert 0 <= index < LANES, "a lane area has sixteen lanes"
    return HEADER_WORDS + index * LANE_WORDS


def init_lanes(words: memoryview) -> None:
    """Prepare a lane area: every lane even, then the header."""
    for index in range(LANES):
        words[lane_word(index)] = 0
    write_header(words, MAGIC_LANES, size=LANES_SIZE)


def retire_lanes(words: memoryview) -> None:
    """Their owner will do no DMA by these lanes any more, and is not in the middle of one: nobody needs to wait for
    them. Who cannot be told otherwise, because whoever introduced the two is gone, sees it here."""
    words[0] = 0


def lanes_retired(words: memoryview) -> bool:
    """Whether :func:`retire_lanes` was called."""
    return bool(words[0] != MAGIC_LANES)


def lane_counts(words: memoryview) -> memoryview:
    """The counters of all lanes, lane 0 first, as a view: to be released before what it shows."""
    return words[HEADER_WORDS:LANES_WORDS:LANE_WORDS]


def lanes_snapshot(words: memoryview) -> list[int]:
    """The counters of all lanes, lane 0 first."""
    return lane_counts(words).tolist()


class Lane:
    """One lane, held by the one thread that writes it. Hot code may bind :attr:`words` and :attr:`slot` as locals
    and add 1 itself, as :meth:`enter` and :meth:`leave` do."""

    __slots__ = ("slot", "words")

    def __init__(self, words: memoryview, index: int) -> None:
        self.words = words
        self.slot = lane_word(index)

    @classmethod
    def private(cls) -> Lane:
        """A lane in memory of its own, that nobody waits for: for tests and for one process alone."""
        words = memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_lanes(words)
        return cls(words, 0)

    @property
    def inside(self) -> bool:
        """Whether the thread is inside a DMA section."""
        return bool(self.words[self.slot] & 1)

    def enter(self) -> None:
        """Begin a DMA section. Sections do not nest."""
        assert not self.words[self.slot] & 1, "a DMA section inside a DMA section"
        self.words[self.slot] += 1

    def leave(self) -> None:
        """End the DMA section; always called in a ``finally``."""
        assert self.words[self.slot] & 1, "left a DMA section that was not entered"
        self.words[self.slot] += 1


class LaneArea:
    """The lanes of one process as the *waiting* side sees them (a :class:`vfio_model.memory.revoke.LaneSet`).

    ``alive`` says whether the process still lives; a dead one will not leave its section and cannot write any more.

    :raise RemoteProtocolError: when ``words`` is not a lane area of this layout.
    """

    def __init__(self, name: str, words: memoryview, alive: Callable[[], bool] = lambda: True) -> None:
        check_header(words, MAGIC_LANES, what=f"lanes of {name}")
        self.name = name
        self.alive = alive
        self._words = words

    def snapshot(self) -> list[int]:
        """The counters of all lanes, lane 0 first."""
        return lanes_snapshot(self._words)
