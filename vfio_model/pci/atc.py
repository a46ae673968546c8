"""The cache of translations (ATC) that a device with ATS manages, wherever the device runs.

Which process it is in shows in two functions alone: how translations are asked for, and how a request with a translated
address travels when the bytes are not mapped here. Entries, permissions and invalidations are the same code
(:mod:`vfio_model.memory.atc_cache`).

A request of the second kind leaves the DMA section with the address: it carries the *stamp* of its translation, and
whoever carries it out refuses it when that was invalidated since. Translated requests bear no PASID.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from vfio_model.memory.atc_cache import TranslationCache
from vfio_model.memory.atc_entries import PAGE_SHIFT, GuestRam, Hit
from vfio_model.memory.atc_path import Path
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.lane import SECTION_BYTES
from vfio_model.memory.ring import HEAD, RingReader
from vfio_model.memory.types import PCI_NO_PASID, IOMMUAccessFlags, MemTxResult
from vfio_model.pci.iommu_ops import AtcOutcome, AtsCompletion, AtsRequest

Access = Callable[[int, memoryview, bool], tuple[int, AtcOutcome]]
Ask = Callable[[AtsRequest], tuple[AtsCompletion, int]]
"""The completion of a request, and the stamp that its translations have."""


class Translated(NamedTuple):
    """A translation on its way out of its DMA section: ``address`` is in what ``first``..``last`` (inclusive) of
    ``pasid`` translates to, as of ``stamp``."""

    address: int
    first: int
    last: int
    pasid: int
    stamp: int


Through = Callable[[Translated, memoryview, bool], MemTxResult | None]
"""``through(translated, view, is_write)``: move ``view`` by a translated request; None when what translated it was
invalidated since."""

MAX_ASKS: Final = 64
"""How often one request is asked again because an invalidation came between."""
_SMALLEST: Final = (1 << PAGE_SHIFT) - 1


class DeviceAtc:
    """An :class:`~vfio_model.pci.iommu_ops.Atc` over ``cache``. ``ram`` is guest RAM as far as it is mapped here."""

    def __init__(
        self,
        cache: TranslationCache,
        ram: GuestRam | None,
        ask: Ask,
        through: Through,
        on_close: Callable[[DeviceAtc], None],
        *,
        pasid: int = PCI_NO_PASID,
        priv: bool = False,
    ) -> None:
        self.pasid, self.priv = pasid, priv
        self._cache, self._ram = cache, ram
        self._ask, self._through, self._on_close = ask, through, on_close
        self.closed = False
        self._path: Path[AtcOutcome] | None = None
        self.access: Access
        """See ``Atc``; the same as long as this lives."""
        self._show: Callable[[TranslationCache], None]
        if cache.compiled:
            path = self._path = Path(None, None, self._access, MemTxResult.OK, AtcOutcome.OK)
            self.access, self._show = path.access, lambda cache: cache.show(path)
        else:
            self.access, self._show = _in_python(self._access)
        self._show(cache)

    @property
    def entries(self) -> int:
        """See ``Atc``."""
        return len(self._cache.entries)

    def follow(self, cache: TranslationCache, ram: GuestRam | None) -> None:
        """Go on with ``cache``, which hears of invalidations in another way; what the one before held is forgotten, and
        so is what it waits for.
        """
        self._cache.flush()
        self._cache, self._ram = cache, ram
        if not self.closed:
            self._show(cache)

    def invalidate(self) -> None:
        """Forget everything, also answers that are on their way."""
        self._cache.flush()

    def fill(self, request: AtsRequest) -> AtsCompletion:
        """See ``Atc``."""
        request = request._replace(pasid=self.pasid, priv=self.priv)
        for _ in range(MAX_ASKS):
            if self.closed:
                break
            cache = self._cache
            since = cache.sample()
            try:
                completion, stamp = self._ask(request)
                good = [] if self.closed else _good(request, completion)
                spans = [(entry.iova & ~entry.addr_mask, entry.iova | entry.addr_mask) for entry in good]
                keep = partial(self._keep, cache, good, stamp)
                if cache.complete(since, spans, keep) is not None and cache is self._cache:
                    return completion
            finally:
                cache.forget_request(since)
        else:
            raise OSError(errno.EAGAIN, f"invalidations overtook a translation {MAX_ASKS} times")
        raise OSError(errno.ENODEV, "the cache is closed")

    def _keep(self, cache: TranslationCache, good: list[IOMMUTLBEntry], stamp: int) -> bool:
        for entry in good:
            cache.entries.insert_whole(entry, self._ram, stamp)
        return True

    def _access(self, addr: int, view: memoryview, is_write: bool) -> tuple[int, AtcOutcome]:
        if self.closed:
            return 0, AtcOutcome.FAILED
        cache = self._cache
        moved, entry = cache.move(addr, view, is_write)
        if moved:
            return moved, AtcOutcome.OK
        if entry is None:
            return 0, AtcOutcome.MISS
        if entry.perm & IOMMUAccessFlags.UNTRANSLATED_ONLY:
            return 0, AtcOutcome.UNTRANSLATED_ONLY
        if not cache.entries.allows(entry, is_write):
            return 0, AtcOutcome.MISS
        part = view[: entry.stop - addr]
        found = Translated(entry.address + addr - entry.start, entry.start, entry.stop - 1, self.pasid, entry.stamp)
        result = self._through(found, part, is_write)
        if result is None:
            cache.entries.drop(entry.start, entry.stop - 1)
            return 0, AtcOutcome.MISS
        return (0, AtcOutcome.FAILED) if result else (len(part), AtcOutcome.OK)

    def close(self) -> None:
        """See ``Atc``."""
        if not self.closed:
            self.closed = True
            self._cache.flush()
            if self._path is not None:
                self._path.forget()
            self._on_close(self)


def _in_python(slow: Access) -> tuple[Access, Callable[[TranslationCache], None]]:
    """Hits that lie in one entry, as the compiled variant serves them, and how to say of which cache."""
    words: memoryview
    head: memoryview
    gate: memoryview
    ring: RingReader
    readable: Callable[[int], Hit | None]
    writable: Callable[[int], Hit | None]
    slot, ok = 0, AtcOutcome.OK

    def show(cache: TranslationCache) -> None:
        nonlocal words, slot, head, ring, gate, readable, writable
        words, slot, ring, gate = cache.lane.words, cache.lane.slot, cache.ring, cache.gate
        head, readable, writable = ring.words, cache.entries.readable.get, cache.entries.writable.get

    def access(addr: int, view: memoryview, is_write: bool) -> tuple[int, AtcOutcome]:
        words[slot] += 1
        try:
            if head[HEAD] == ring.seen and gate[0]:
                hit = writable(addr >> PAGE_SHIFT) if is_write else readable(addr >> PAGE_SHIFT)
                size = len(view)
                if hit is not None and addr + size <= hit[1] and 0 < size <= SECTION_BYTES:
                    at = addr - hit[0]
                    if is_write:
                        hit[2][at : at + size] = view
                    else:
                        view[:] = hit[2][at : at + size]
                    return size, ok
        finally:
            words[slot] += 1
        return slow(addr, view, is_write)

    return access, show


def _good(request: AtsRequest, completion: AtsCompletion) -> list[IOMMUTLBEntry]:
    """What gives everything that was asked for: the rest counts as errors, and is not cached."""
    wanted = IOMMUAccessFlags.RO if request.no_write else IOMMUAccessFlags.RW
    if request.exec:
        wanted |= IOMMUAccessFlags.EXEC
    wanted |= required(request.priv)
    return [one for one in completion.entries if one.perm & wanted == wanted and one.addr_mask >= _SMALLEST]


def required(priv: bool) -> IOMMUAccessFlags:
    """The permissions that every use of a cache with or without privilege needs."""
    return IOMMUAccessFlags.PRIV if priv else IOMMUAccessFlags.NONE
