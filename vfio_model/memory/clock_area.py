"""The guest's virtual clock in shared memory: one word that the guest machine writes, one tick word for each
device process.

Clock area (magic ``vmCLOCK1``)::

    words 0-7   header (:mod:`vfio_model.memory.layout`)
    word 8      virtual time in ns; only the guest machine writes it, everybody else maps it read-only

Tick area of one device process (magic ``vmTICKS1``)::

    words 0-7   header, written by the guest machine word 8      the virtual time that this device has taken: all
    its timers due by then have run; only the device writes it

A step: the guest machine stores the time, rings the device's *step* eventfd, and waits until the tick word has
reached it; the device rings the *done* eventfd after each store into its tick word. Time never goes backwards.
"""

from __future__ import annotations

from vfio_model.memory.layout import HEADER_SIZE, HEADER_WORDS, check_header, magic, write_header

MAGIC_CLOCK = magic("vmCLOCK1")
MAGIC_TICKS = magic("vmTICKS1")
AREA_SIZE = HEADER_SIZE + 8
"""Bytes of either area."""
TIME_WORD = HEADER_WORDS


def init_clock(words: memoryview, now_ns: int) -> None:
    """Prepare a clock area at ``now_ns``."""
    words[TIME_WORD] = now_ns
    write_header(words, MAGIC_CLOCK, size=AREA_SIZE)


def init_ticks(words: memoryview, now_ns: int) -> None:
    """Prepare a tick area of a device that starts at ``now_ns``."""
    words[TIME_WORD] = now_ns
    write_header(words, MAGIC_TICKS, size=AREA_SIZE)


def check_clock(words: memoryview) -> None:
    """:raise RemoteProtocolError: when ``words`` is not a clock area."""
    check_header(words, MAGIC_CLOCK, what="clock area")


def check_ticks(words: memoryview) -> None:
    """:raise RemoteProtocolError: when ``words`` is not a tick area."""
    check_header(words, MAGIC_TICKS, what="tick area")


def read_time(words: memoryview) -> int:
    """Virtual time in ns, of either kind of area."""
    now: int = words[TIME_WORD]
    return now


def write_time(words: memoryview, now_ns: int) -> None:
    """Store ``now_ns``; by the one writer of the area."""
    words[TIME_WORD] = now_ns
