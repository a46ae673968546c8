"""What QEMU's unit remembers of a function's PASID entry (quirk ``pass-through-lingers``), as it was seen to do.

This unit caches no PASID entries. QEMU's remembers one for each function and PASID, from the first event that finds it
present, and does not replace it when it changes: an invalidation shows what the tables say now only if that differs
from what is remembered, and belongs to the remembered domain.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vfio_model.iommu.vtd.ports import Granularity

Words = tuple[int, ...]
"""A PASID entry: 8 words."""
_ZERO: Final[Words] = (0,) * 8


class Outcome(NamedTuple):
    """What is remembered then, and whether the function's space is switched to what the tables say."""

    remembered: Words | None
    switched: bool


def invalidated(known: Words | None, now: Words | None, granularity: Granularity, did: int, same: bool) -> Outcome:
    """After an invalidation of ``granularity`` and ``did``; of everything if contexts were invalidated. ``known`` and
    ``now`` are None for an entry that is not known, or not there; ``same``: whether a selective one means the PASID."""
    everything = granularity is Granularity.GLOBAL
    if now is None:
        return Outcome(_ZERO if known is not None and everything else None, known is not None)
    named = known or now
    meant = everything or (named[1] & 0xFFFF == did and (same or granularity is Granularity.DOMAIN))
    if known is None:
        return Outcome(now if meant else None, meant)
    return Outcome(known, meant and known != now)
