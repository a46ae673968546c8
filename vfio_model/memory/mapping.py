"""Mappings that outlive one DMA operation (``dma_memory_map``), and what is done when their translation goes.

A mapping record is {iova, last, direction, view, on_invalidate}. RAM is mapped in place (zero copy); everything else
gets a bounce buffer out of a budget per address space (QEMU's ``x-max-bounce-buffer-size``, 4096 bytes by default),
filled at map and written back at unmap. Whoever found the budget empty registers a *map client* and is called once
when bytes come back. One record serves QEMU-style maps, ATC maps and discarded RAM: an invalidation that overlaps it
rings ``on_invalidate`` once; the device answers by unmapping.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from vfio_model.memory.types import DMADirection

DEFAULT_BOUNCE_BUDGET = 4096
"""Bytes of bounce buffers per address space."""

_handles = itertools.count(1)

Spans = Sequence[tuple[int, int]]
"""Ranges of addresses, start and last inclusive."""


class DMAMapping:
    """``iova``..``last`` (inclusive) mapped for ``direction``. ``view`` is what the device reads or writes, item size
    1; what it may only read cannot be written through it.

    The mapping may be shorter than asked for. ``handle`` is unique in the process. ``on_invalidate(mapping)`` is
    called at most once, when part of the translation goes; ``invalidated`` says so afterwards.
    """

    __slots__ = ("bounce", "direction", "handle", "invalidated", "iova", "last", "on_invalidate", "release", "view")

    def __init__(
        self,
        iova: int,
        view: memoryview,
        direction: DMADirection,
        on_invalidate: Callable[[DMAMapping], None] | None = None,
        *,
        bounce: bool = False,
        release: Release | None = None,
    ) -> None:
        self.handle = next(_handles)
        self.iova = iova
        self.last = iova + len(view) - 1
        self.direction = direction
        self.view = view.toreadonly() if direction is DMADirection.TO_DEVICE else view
        self.on_invalidate = on_invalidate
        self.bounce = bounce
        self.invalidated = False
        self.release = release
        """Called once by unmap with (mapping, access_len): writes a bounce buffer back, returns budget."""

    @property
    def length(self) -> int:
        """Bytes mapped."""
        return len(self.view)

    def invalidate(self) -> None:
        """Ring the device, once."""
        if not self.invalidated:
            self.invalidated = True
            if self.on_invalidate is not None:
                self.on_invalidate(self)

    def unmap(self, access_len: int) -> None:
        """Give the mapping back; the first ``access_len`` bytes were accessed. A second call is a bug of the caller."""
        assert 0 <= access_len <= self.length, "access_len counts bytes of the mapping"
        release, self.release = self.release, None
        if release is not None:
            release(self, access_len)

    def __repr__(self) -> str:
        kind = "bounce" if self.bounce else "direct"
        return f"DMAMapping(#{self.handle} {self.iova:#x}..{self.last:#x} {self.direction.name} {kind})"


Release = Callable[[DMAMapping, int], None]


class MappingTable:
    """Live mappings by handle, found by the addresses under which this table knows them."""

    def __init__(self) -> None:
        self._live: dict[int, tuple[DMAMapping, Spans]] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[DMAMapping]:
        return iter([mapping for mapping, _ in self._live.values()])

    def add(self, mapping: DMAMapping, spans: Spans | None = None) -> None:
        """Keep ``mapping`` under ``spans``, by default its own iova range."""
        self._live[mapping.handle] = (mapping, ((mapping.iova, mapping.last),) if spans is None else spans)

    def remove(self, mapping: DMAMapping) -> None:
        """Forget ``mapping``; harmless when it is not here."""
        self._live.pop(mapping.handle, None)

    def get(self, handle: int) -> DMAMapping | None:
        """The live mapping with ``handle``."""
        found = self._live.get(handle)
        return found[0] if found is not None else None

    def overlapping(self, start: int, last: int) -> list[DMAMapping]:
        """Live mappings that share a byte with ``start``..``last`` (inclusive), oldest first."""
        return [
            mapping for mapping, spans in self._live.values() if any(lo <= last and start <= hi for lo, hi in spans)
        ]

    def invalidate(self, start: int, last: int) -> list[DMAMapping]:
        """Ring every overlapping mapping; returns those that are still live afterwards."""
        for mapping in self.overlapping(start, last):
            mapping.invalidate()
        return self.overlapping(start, last)


class BounceBudget:
    """Bytes for bounce buffers, and the clients that wait for them."""

    def __init__(self, limit: int = DEFAULT_BOUNCE_BUDGET) -> None:
        self.limit = limit
        self.used = 0
        self._clients: list[Callable[[], None]] = []

    def take(self, wanted: int) -> int:
        """Reserve up to ``wanted`` bytes; returns how many, 0 when the budget is empty."""
        granted = max(0, min(wanted, self.limit - self.used))
        self.used += granted
        return granted

    def give_back(self, count: int) -> None:
        """Return ``count`` bytes and call every waiting client once; a client that wants more registers again."""
        assert count <= self.used, "only what was taken comes back"
        self.used -= count
        self._wake()

    def map(
        self,
        iova: int,
        length: int,
        direction: DMADirection,
        on_invalidate: Callable[[DMAMapping], None] | None,
        begin: Callable[[bytearray], object],
        write: Callable[[int, memoryview], object],
    ) -> DMAMapping | None:
        """A bounce buffer of up to ``length`` bytes. ``begin(buffer)`` fills one for TO_DEVICE, and says something true
        when nothing decodes there; one for FROM_DEVICE goes to ``write(iova, bytes)`` at unmap. None when the budget is
        empty or nothing decodes.
        """
        size = self.take(length)
        if not size:
            return None
        buffer = bytearray(size)
        if begin(buffer):
            self.give_back(size)
            return None

        def release(mapping: DMAMapping, access_len: int) -> None:
            if direction is DMADirection.FROM_DEVICE:
                write(iova, memoryview(buffer)[:access_len])
            self.give_back(size)

        return DMAMapping(iova, memoryview(buffer), direction, on_invalidate, bounce=True, release=release)

    def register_client(self, client: Callable[[], None]) -> None:
        """Call ``client`` once when bytes are available: at once if they are now."""
        self._clients.append(client)
        if self.used < self.limit:
            self._wake()

    def unregister_client(self, client: Callable[[], None]) -> None:
        """Forget ``client``; harmless when it does not wait."""
        if client in self._clients:
            self._clients.remove(client)

    def _wake(self) -> None:
        clients, self._clients = self._clients, []
        for client in clients:
            client()
