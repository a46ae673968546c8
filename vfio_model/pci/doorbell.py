"""Registers of a device whose writes are signals: a hypervisor may ring an eventfd instead of carrying the write."""

from __future__ import annotations

from typing import NamedTuple


class Doorbell(NamedTuple):
    """A write of ``size`` bytes at ``offset`` of BAR ``bar``, of ``value`` alone if there is one. ``size`` 0 is any.

    What rings it is a call of ``bar_write`` with that size (4 for any) and value (0 without one); how often, is not
    known: several writes may be one ring.
    """

    bar: int
    offset: int
    size: int = 4
    value: int | None = None
