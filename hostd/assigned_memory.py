"""The shared memory of an assigned device: what Setup brings, mapped as far as the device may use it.

The host's tables and the PE block are mapped read-only (they could not be mapped otherwise: they are sealed against
it); lanes, the dirty map and guest RAM writable. Segments come and go by messages of hostd; one that a TCE points at is
announced before the TCE is stored, so an unknown host-physical address means that the announcement is waiting to be
read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from protocols.port.device import SETUP_FDS, SegmentMap, Setup
from protocols.transport.kernel import Pidfd
from protocols.transport.shm import TABLE_SEALS, MappedMemory, map_memory
from protocols.transport.unix import close_fds
from vfio_model.errors import RemoteProtocolError
from vfio_model.host.dma import AssignedImpl, Segments
from vfio_model.host.hpa import HpaMap
from vfio_model.host.layout import DIRTY_BYTES, PE_MAGIC, PE_WORDS
from vfio_model.memory.lane import LANES_SIZE, MAGIC_LANES, Lane
from vfio_model.memory.layout import check_header


class AssignedMemory:
    """What one device process has mapped. ``fds`` are those of Setup but the stream, all taken over.

    :raise RemoteProtocolError: when one of them is not what it should be.
    """

    def __init__(self, setup: Setup, fds: list[int]) -> None:
        lanes, dirty, pe, domain, host, *segments = fds
        self.host = Pidfd(host)
        """hostd's process."""
        self.segments = Segments()
        self._segment_memory: dict[str, tuple[HpaMap, MappedMemory]] = {}
        self._areas: list[MappedMemory] = []
        pending = [lanes, dirty, pe, domain, *segments]
        try:
            self._lanes = self._map(pending, writable=True, size=LANES_SIZE, what="lanes")
            self._dirty = self._map(pending, writable=True, size=DIRTY_BYTES, what="dirty map")
            self._pe = self._map(pending, writable=False, size=PE_WORDS * 8, what="PE block")
            self._domain = self._map(pending, writable=False, size=8, what="domain")
            check_header(self._lanes.words, MAGIC_LANES, what="lanes")
            check_header(self._pe.words, PE_MAGIC, what="PE block")
            for segment in setup.segments:
                self.add(segment, pending.pop(0))
        except RemoteProtocolError:
            close_fds(pending)
            raise

    def _map(self, pending: list[int], *, writable: bool, size: int, what: str) -> MappedMemory:
        seals = {} if writable else {"required_seals": TABLE_SEALS}
        memory = map_memory(pending.pop(0), writable=writable, size=size, what=what, **seals)
        self._areas.append(memory)
        return memory

    def implementation(self, gate: Callable[[], None] | None, on_unknown_hpa: Callable[[], None]) -> AssignedImpl:
        """The DMA of the one thread that does any: lane 0."""
        lane = Lane(self._lanes.words, 0)
        return AssignedImpl(
            self._pe.words,
            self._domain.words,
            self.segments,
            lane,
            gate,
            on_unknown_hpa=on_unknown_hpa,
            dirty=self._dirty.view,
        )

    def add(self, segment: SegmentMap, fd: int) -> None:
        """Map ``segment``; ``fd`` is taken over.

        :raise RemoteProtocolError: when it is no sealed memfd of that size.
        """
        memory = map_memory(fd, writable=True, size=segment.length, what=f"segment {segment.id}")
        place = HpaMap(
            segment.base, segment.page_shift, segment.pages, segment.bits, segment.multiplier, segment.addend
        )
        self._segment_memory[segment.id] = (place, memory)
        self.segments.add(place, memory.view[: segment.length])

    def remove(self, segment_id: str) -> None:
        """Unmap a segment; harmless when it is not here. What the DMA path still holds of it keeps the bytes mapped."""
        known = self._segment_memory.pop(segment_id, None)
        if known is not None:
            self.segments.remove(known[0])
            with contextlib.suppress(BufferError):
                known[1].close()


def setup_fds(fds: list[int], segments: int) -> tuple[int, list[int]]:
    """The stream and the rest of Setup's descriptors."""
    assert len(fds) == SETUP_FDS + segments, "the channel counts descriptors"
    return fds[0], fds[1:]
