"""Where this platform differs from QEMU's pseries machine on purpose, as data.

A quirk that can be *selected* (``quirks: qemu``, or its name) makes the platform do what the peer does; the others are
listed so that a comparison with the peer can leave them out and say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vfio_model.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Quirk:
    """One difference. ``versions``: of which versions of ``peer`` it is known; ``selectable``: whether the platform can
    do as the peer does.
    """

    name: str
    peer: str
    versions: str
    here: str
    there: str
    reason: str
    selectable: bool = False


OVERLAPPING_WINDOWS: Final = "overlapping-windows"
PGSZ_AS_GIVEN: Final = "pgsz-as-given"
QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        OVERLAPPING_WINDOWS,
        "QEMU",
        "2.7 to 11.1",
        "ibm,create-pe-dma-window answers HW_ERROR when the new window would lie on the one at the 64-bit address",
        "both windows are opened at the same bus address; devices see the second table's",
        "a bus address has one meaning, and a host could not map both",
        selectable=True,
    ),
    Quirk(
        PGSZ_AS_GIVEN,
        "QEMU",
        "2.7 to 11.1",
        "windows of 16M pages are offered when all RAM is backed by pages at least that large, whatever pgsz says",
        "the pages that pgsz says are offered",
        "RAM on huge pages is there to be mapped by them; the default pgsz has 16M anyway",
        selectable=True,
    ),
    Quirk(
        "window-too-large",
        "QEMU",
        "11.1",
        "ibm,create-pe-dma-window answers HW_ERROR when a window has 2**32 TCEs or more, no memory is left, or "
        "it would go beyond the last bus address",
        "the process can end: the number of TCEs has 32 bits, and memory that is not there is fatal; what lies beyond "
        "the last bus address has entries that no device can reach",
        "a guest must not be able to end the process; a window is usable as a whole",
    ),
    Quirk(
        "refused-by-the-host",
        "QEMU",
        "11.1",
        "a TCE or window that the host of an assigned device refuses is undone, and the call answers H_RESOURCE, "
        "H_HARDWARE or HW_ERROR",
        "the process ends",
        "a guest must not be able to end the process",
    ),
    Quirk(
        "window-of-no-bridge",
        "QEMU",
        "11.1",
        "ibm,remove-pe-dma-window of a VIO device's LIOBN is a PARAM_ERROR",
        "the process ends: the table's parent is no host bridge",
        "a guest must not be able to end the process",
    ),
    Quirk(
        "message-of-no-interrupt",
        "QEMU",
        "11.1",
        "a DMA write to the message page whose data are no interrupt of the machine is heard by nobody",
        "the process ends",
        "a guest must not be able to end the process",
    ),
    Quirk(
        "dma-goes-on-after-a-fault",
        "QEMU",
        "11.1",
        "a DMA over several pages ends at the first that it may not reach",
        "it leaves that page out and goes on with the next",
        "a bus ends a burst at its first error; who reads the data could not tell which part of it is good",
    ),
)
PEERS: Final = {"qemu": "QEMU"}
"""Words that select every selectable quirk of a peer."""


def selected(names: Iterable[str]) -> frozenset[str]:
    """The quirks that ``names`` select: names of quirks, or of a peer (:data:`PEERS`).

    :raise ConfigError: for a name that selects nothing.
    """
    chosen: set[str] = set()
    for name in names:
        found = {
            each.name for each in QUIRKS if each.selectable and (each.name == name or PEERS.get(name) == each.peer)
        }
        if not found:
            known = ", ".join([*PEERS, *(each.name for each in QUIRKS if each.selectable)])
            raise ConfigError(f"no quirk {name!r} can be selected", hint=f"known: {known}")
        chosen |= found
    return frozenset(chosen)
