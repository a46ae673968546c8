"""hostd and one of its device processes: a SEQPACKET socketpair.

hostd speaks first: :class:`Setup`, answered by :class:`Ready` or :class:`Failed`. Whatever the guest wants from the
device travels on the vfio-user stream that came with Setup; this channel carries what the *host* needs. An EOF here
ends the process: it lives for one open.

Descriptors of Setup, in this order: vfio-user stream, lanes and dirty map (written by the device), PE block and domain
memory (read-only), hostd's pidfd, then one for each of ``segments``.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from protocols.codec import Codec
from protocols.fields import U16, U64, Message, Name, Props, Text

MAX_SEGMENTS = 200
"""Segments in one Setup: SCM_RIGHTS carries at most 253 descriptors."""

PageShift = Annotated[int, Meta(ge=0, le=51)]

SETUP_FDS = 6
"""Descriptors of Setup before those of the segments."""


class SegmentMap(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where segment ``id`` of ``length`` bytes, backed by pages of ``page_size``, lies in host-physical space.

    Backing page ``p`` (of ``1 << page_shift`` bytes) lies at ``base + ((p * multiplier + addend) mod 2**bits <<
    page_shift)``.
    """

    id: Name
    length: U64
    page_size: U64
    base: U64
    page_shift: PageShift
    pages: U64
    bits: PageShift
    multiplier: U64
    addend: U64


class Setup(Message, tag="setup", frozen=True):
    """Become device ``name``, of class ``model``, with requester id ``rid`` (bus << 8 | devfn)."""

    name: Name
    model: Name
    rid: U16
    props: Props
    segments: Annotated[list[SegmentMap], Meta(max_length=MAX_SEGMENTS)]


class AddSegment(Message, tag="add-segment", frozen=True):
    """A further segment, with its memfd; sent before the first TCE that points into it is stored."""

    segment: SegmentMap


class RemoveSegment(Message, tag="remove-segment", frozen=True):
    """Segment ``id`` is no longer mapped by anybody; the device drops its map and descriptor."""

    id: Name


class Quiesce(Message, tag="quiesce", frozen=True):
    """Where membarrier is missing: answer :class:`Quiet` from outside every DMA section."""

    seq: U64


class GiveBack(Message, tag="give-back", frozen=True):
    """End every mapping that overlaps ``iova``..``last`` (inclusive), then answer :class:`GaveBack`."""

    seq: U64
    iova: U64
    last: U64


class Quit(Message, tag="quit", frozen=True):
    """Stop DMA and exit."""


class Ready(Message, tag="ready", frozen=True):
    """Setup is done: memory mapped, membarrier registered, the vfio-user stream is served."""


class Failed(Message, tag="failed", frozen=True):
    """Setup did not work; the process exits."""

    reason: Text


class Quiet(Message, tag="quiet", frozen=True):
    """Answer to :class:`Quiesce`."""

    seq: U64


class GaveBack(Message, tag="gave-back", frozen=True):
    """Answer to :class:`GiveBack`."""

    seq: U64


ToDevice = Setup | AddSegment | RemoveSegment | Quiesce | GiveBack | Quit
ToHost = Ready | Failed | Quiet | GaveBack

TO_DEVICE: Codec[ToDevice] = Codec(ToDevice, "hostd to device", max_bytes=256 << 10)
TO_HOST: Codec[ToHost] = Codec(ToHost, "device to hostd", max_bytes=24 << 10)


def fd_count(message: ToDevice | ToHost) -> int:
    """How many descriptors go with ``message``."""
    if isinstance(message, Setup):
        return SETUP_FDS + len(message.segments)
    return 1 if isinstance(message, AddSegment) else 0
