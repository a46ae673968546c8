"""svm: one command on its way through the buffer, a slice at a time.

::

    translate ──(every page allowed)──► move ──(end)──► done
      │    ▲                             │
      │    └──(success, or no room)──┐   │ not cached (any more)
      ▼                              │   ▼
    request pages ──(last in group)──► wait ──(any other response)──► failed

Translations of the rest of the buffer are asked for (ATS), those that allow the command go into the cache, and the
pages of the others are requested (PRI): one group at a time, its last request marked, as is one after which no more may
be outstanding. The group's response decides. Source: PCI Express Base Specification, 10.2 and 10.4.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import Final, Protocol

from vfio_model.devices.svm import regs
from vfio_model.memory.types import IOMMUAccessFlags
from vfio_model.pci.iommu_ops import Atc, AtcOutcome, AtsCompletion, AtsRequest, PageRequest, PageResponse
from vfio_model.pci.translation_caps import PAGE_REQUEST_GROUPS
from vfio_model.ranges import U64_MAX

MAX_ENTRIES: Final = 512
"""Translations of one request; a range that needs more is asked for in parts."""
PIECE: Final = 1 << 16
"""Bytes of one access at most; no access goes beyond a translation."""
SLICE: Final = 1 << 20
"""Bytes between two looks at the rest of the process."""
MAX_REPEATS: Final = 64
"""How often a page is requested that was said to be there and is not."""
_LATER: Final = (errno.ENOSPC, errno.EDEADLK)
"""A page request that cannot be taken now."""


class Phase(IntEnum):
    """Where a command is."""

    TRANSLATE = 1
    WAIT = 2
    MOVE = 3
    DONE = 4
    FAILED = 5


class Services(Protocol):
    """What a command needs of its device."""

    prgi: int
    """The page request group that is next, or open."""

    def cache(self, priv: bool) -> Atc | None:
        """The cache of requests with or without privilege; None: the device has no address space."""

    @property
    def page_requests_allocated(self) -> int:
        """How many page requests may be outstanding."""

    def pri_request_page(self, request: PageRequest) -> None:
        """:raise OSError: see :class:`~vfio_model.pci.services.IommuServices`."""


class Command:
    """Moves ``size`` bytes at ``address`` of ``pasid``: a pattern is written, or what is read goes into :attr:`crc`. A
    range that does not end within 64 bits is a failure."""

    def __init__(self, services: Services, pasid: int, address: int, size: int, *, write: bool, priv: bool) -> None:
        self._services, self._pasid = services, pasid
        self.address, self.size, self.write, self.priv = address, size, write, priv
        self.moved = 0
        self.crc = regs.CRC_START
        self.phase = Phase.TRANSLATE if address + size <= U64_MAX + 1 else Phase.FAILED
        self._cursor = address
        """How far the translations of this round have come."""
        self._group = 0
        self._wanted: tuple[int, int] = (0, 0)
        """The first page of the last group, and how often it was requested in a row."""
        self._buffer = memoryview(regs.pattern(PIECE + regs.PATTERN_PERIOD)) if write else memoryview(bytearray(PIECE))

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self.phase >= Phase.DONE

    @property
    def waits(self) -> bool:
        """Whether there is nothing to do until a response comes."""
        return self.phase is Phase.WAIT

    def end(self) -> None:
        """It fails, whatever it was doing."""
        self.phase = Phase.FAILED

    def go_on(self, moved: int, crc: int) -> None:
        """As one that has come so far."""
        self.moved, self.crc = moved, crc
        self._cursor = self.address + moved

    def advance(self) -> None:
        """One slice. A request may serve others meanwhile, who may end the command: look again after each."""
        try:
            if self.phase is Phase.TRANSLATE:
                self._translate()
            elif self.phase is Phase.MOVE:
                self._move()
        except OSError:
            self.end()

    # -- translations ------------------------------------------------------------------------------------------------

    def _translate(self) -> None:
        atc, start = self._services.cache(self.priv), self._cursor
        if atc is None:
            self.end()
            return
        end = self.address + self.size
        if start >= end:
            self.phase = Phase.MOVE
            return
        request = AtsRequest(start, end - start, no_write=not self.write, max_entries=MAX_ENTRIES)
        completion = atc.fill(request)
        if self.over:
            return
        bad, covered = self._refused(start, completion)
        if bad:
            self._request_pages(bad)
        else:
            self._cursor = covered

    def _refused(self, start: int, completion: AtsCompletion) -> tuple[list[int], int]:
        """The first address of each piece that is not as the command needs it, and where the last piece ends."""
        needed = IOMMUAccessFlags.RW if self.write else IOMMUAccessFlags.RO
        needed |= IOMMUAccessFlags.PRIV if self.priv else IOMMUAccessFlags.NONE
        bad, at = [], start
        for entry in completion.entries:
            if entry.perm & needed != needed:
                bad.append(at)
            at = (at & ~entry.addr_mask) + entry.addr_mask + 1
        return bad, at

    # -- pages -------------------------------------------------------------------------------------------------------

    def _request_pages(self, addresses: list[int]) -> None:
        """One group: as many of ``addresses`` as may be outstanding."""
        first, times = self._wanted
        self._wanted = addresses[0], times + 1 if addresses[0] == first else 1
        if self._wanted[1] > MAX_REPEATS:
            self.end()
            return
        group = addresses[: max(self._services.page_requests_allocated, 1)]
        for address in group:
            if not self._request(address, last=address == group[-1]) or self.over:
                return

    def _request(self, address: int, *, last: bool) -> bool:
        """Whether the request was taken. When there is no room for it, everything is looked at anew later."""
        services = self._services
        if last:
            self.phase, self._group = Phase.WAIT, services.prgi
            services.prgi = (services.prgi + 1) % PAGE_REQUEST_GROUPS
        request = PageRequest(
            address, self._pasid, self._group if last else services.prgi, last, not self.write, self.write, self.priv
        )
        try:
            services.pri_request_page(request)
        except OSError as error:
            if error.errno not in _LATER:
                raise
            if self.phase is Phase.WAIT:
                self.phase = Phase.TRANSLATE
            return False
        return True

    def respond(self, prgi: int, code: PageResponse) -> bool:
        """The response to group ``prgi``; whether it was awaited."""
        if not self.waits or prgi != self._group:
            return False
        if code == PageResponse.SUCCESS:
            self._cursor = max(self._cursor, self.address + self.moved)
            self.phase = Phase.TRANSLATE
        else:
            self.end()
        return True

    # -- data --------------------------------------------------------------------------------------------------------

    def _move(self) -> None:
        atc = self._services.cache(self.priv)
        stop = min(self.size, self.moved + SLICE)
        while self.moved < stop:
            at = self.address + self.moved
            size = min(PIECE, self.size - self.moved)
            first = self.moved % regs.PATTERN_PERIOD if self.write else 0
            view = self._buffer[first : first + size]
            done, outcome = (0, AtcOutcome.FAILED) if atc is None else atc.access(at, view, self.write)
            if self.over:
                return
            if outcome is AtcOutcome.MISS:
                self._cursor = at
                self._request_pages([at])
                return
            if outcome is not AtcOutcome.OK:
                self.end()
                return
            if not self.write:
                self.crc = regs.crc8(view[:done], self.crc)
            self.moved += done
        if self.moved == self.size:
            self.phase = Phase.DONE
