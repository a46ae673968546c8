"""What a device asks of the IOMMU in front of it, and hears from it: extensions of vfio-user between our processes.

Translations of untranslated requests (``ats``), which is how the DMA of any device finds guest RAM; and the services
of an IOMMU for devices (``iommu``): address translation services, page requests, PASIDs, as the PCI Express Base
Specification has them in "Address Translation Services" (chapter 10). A payload with a tail says what is wrong with it
by ``wrong``, for the protocol state.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

import msgspec
from msgspec import Struct

from protocols.vfio_user.payload import Payload, layout

MAX_TRANSLATIONS: Final = 4096
"""Entries in one reply."""


@layout("QQII", 24)
class TranslateRequest(Payload, frozen=True):
    """X_TRANSLATE: an ATS translation request for ``length`` bytes from ``iova``. ``flags``: 1 no-write; 2 PASID
    valid."""

    iova: int = 0
    length: int = 0
    flags: int = 0
    pasid: int = 0


class TranslationEntry(Struct, frozen=True, array_like=True):
    """``iova`` (page start) → ``translated`` (GPA), over ``mask`` + 1 bytes, with ``perm`` (1 read, 2 write; 0:
    none)."""

    iova: int
    translated: int
    mask: int
    perm: int


_ENTRY = struct.Struct("=QQQI4x")


@layout("II", 8, tail=True)
class TranslateReply(Payload, frozen=True):
    """Reply to X_TRANSLATE: ``count`` entries of 32 bytes in ``data``, in order of their IOVA; fewer than asked is
    legal."""

    count: int = 0
    reserved: int = 0
    data: bytes = b""

    @classmethod
    def of(cls, entries: list[TranslationEntry]) -> TranslateReply:
        """The reply that carries ``entries``."""
        return cls(len(entries), 0, b"".join(_ENTRY.pack(*msgspec.structs.astuple(entry)) for entry in entries))

    def entries(self) -> list[TranslationEntry]:
        """What :meth:`of` was given."""
        return [TranslationEntry(*values) for values in _ENTRY.iter_unpack(self.data)]


@layout("QII", 16)
class IommuSetup(Payload, frozen=True):
    """X_IOMMU: the function has an IOMMU with services for devices; bytes of its smallest page, bits of an address.

    With the descriptor of the gate: the area that says whether translated requests are let through.
    """

    min_page_size: int = 0
    addr_width: int = 0
    reserved: int = 0


class PasidService(IntEnum):
    """What X_PASID begins or ends for a PASID."""

    INVALIDATIONS = 0
    PAGE_RESPONSES = 1


@layout("IIII", 16)
class PasidControl(Payload, frozen=True):
    """X_PASID: from now on (``on`` 1), or not any more (0), the device is told of ``service`` of ``pasid``."""

    pasid: int = 0
    service: int = 0
    on: int = 0
    reserved: int = 0


class AtsFlags(IntFlag):
    """Of requests and completions."""

    NO_WRITE = 1
    PRIV = 2
    EXEC = 4


@layout("QQIIII", 32)
class AtsQuery(Payload, frozen=True):
    """X_ATS: translate ``length`` bytes from ``addr`` in ``pasid`` (all ones: requests without one), in at most
    ``max_entries`` pieces.
    """

    addr: int = 0
    length: int = 0
    pasid: int = 0
    flags: int = 0
    max_entries: int = 0
    reserved: int = 0


@layout("QIIII", 24, tail=True)
class AtsAnswer(Payload, frozen=True):
    """Reply to X_ATS: ``count`` entries as in :class:`TranslateReply`, ``errors`` of them without a permission that was
    asked for; ``complete`` 0: the range goes on. ``stamp`` goes with every use of an entry by X_TRANSLATED.
    """

    stamp: int = 0
    count: int = 0
    errors: int = 0
    complete: int = 1
    reserved: int = 0
    data: bytes = b""

    @classmethod
    def of(cls, stamp: int, entries: list[TranslationEntry], errors: int, *, complete: bool) -> AtsAnswer:
        """The reply that carries ``entries``."""
        return cls(stamp, len(entries), errors, int(complete), 0, TranslateReply.of(entries).data)

    def entries(self) -> list[TranslationEntry]:
        """What :meth:`of` was given."""
        return TranslateReply(self.count, 0, self.data).entries()

    def wrong(self, request: Payload) -> str:
        """Why it is no answer to ``request``; empty when it is one."""
        assert isinstance(request, AtsQuery), "the command's payload"
        if len(self.data) != _ENTRY.size * self.count or self.count > min(MAX_TRANSLATIONS, request.max_entries):
            return f"{self.count} translations in {len(self.data)} bytes, {request.max_entries} were asked for"
        if self.errors > self.count or self.complete > 1:
            return f"{self.errors} of {self.count} translations wrong, complete {self.complete}"
        return ""


@layout("QQQQIIII", 48, tail=True)
class TranslatedAccess(Payload, frozen=True):
    """X_TRANSLATED and its reply: a request with the translated address ``address``, from the entry for ``first`` to
    ``last`` (inclusive) of ``pasid`` in an answer with ``stamp``.

    ``write`` 1: ``data`` are the ``count`` bytes; else they are in the reply. ESTALE: that was invalidated since.
    """

    address: int = 0
    first: int = 0
    last: int = 0
    stamp: int = 0
    pasid: int = 0
    count: int = 0
    write: int = 0
    reserved: int = 0
    data: bytes = b""

    def excess(self, max_data: int) -> str:
        """Why it is no request; empty when it is one."""
        if self.count > max_data or self.write > 1 or len(self.data) != (self.count if self.write else 0):
            return f"a translated access of {self.count} bytes with {len(self.data)} bytes of data"
        return ""

    def wrong(self, request: Payload) -> str:
        """Why it is no answer to ``request``; empty when it is one."""
        assert isinstance(request, TranslatedAccess), "the command's payload"
        if self.count != request.count or len(self.data) != (0 if request.write else request.count):
            return f"{len(self.data)} bytes of data answer a translated access of {request.count}"
        return ""


class PageFlags(IntFlag):
    """Of a page request."""

    LAST = 1
    READ = 2
    WRITE = 4
    PRIV = 8
    EXEC = 16


@layout("QIIII", 24)
class PageQuery(Payload, frozen=True):
    """X_PAGE_REQUEST: a page request message; the reply says that it is in the queue, or why it is not."""

    addr: int = 0
    pasid: int = 0
    prgi: int = 0
    flags: int = 0
    reserved: int = 0


@layout("IIII", 16)
class PageAnswer(Payload, frozen=True):
    """X_PAGE_RESPONSE: the response ``code`` to group ``prgi`` of ``pasid``. Wants no reply."""

    pasid: int = 0
    prgi: int = 0
    code: int = 0
    reserved: int = 0
