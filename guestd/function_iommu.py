"""What the guest's IOMMU does for a remote function that caches translations by itself: the guest's end of X_PASID,
X_ATS, X_TRANSLATED, X_PAGE_REQUEST and X_PAGE_RESPONSE.

Everything is asked of the guest's side of the function (:class:`vfio_model.pci.services.IommuServices`), so that what
the guest has enabled decides, whatever the device's process believes. Invalidations go into the ring that the process
follows; the guest's wait descriptor completes when :meth:`FunctionIommu.flush` has returned: no cache uses any more
what they took away, or its process was killed, which is a time-out for the guest.

Nothing here waits but that flush. A request with a translated address that has left its DMA section is carried out only
if nothing was invalidated since its translation.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from protocols.transport.shm import MappedMemory, create_memory
from protocols.vfio_user.iommu_messages import (
    MAX_TRANSLATIONS,
    AtsAnswer,
    AtsFlags,
    AtsQuery,
    IommuSetup,
    PageAnswer,
    PageFlags,
    PageQuery,
    PasidControl,
    PasidService,
    TranslatedAccess,
    TranslationEntry,
)
from protocols.vfio_user.messages import Empty, Payload
from vfio_model.memory.ats_gate import AREA_SIZE, init_gate, set_gate
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.ring import RecordFlags, pasid_flags
from vfio_model.memory.types import PCI_NO_PASID, IOMMUNotifierFlag
from vfio_model.pci.iommu_ops import AtsRequest, PageRequest
from vfio_model.pci.services import IommuServices
from vfio_model.pci.translation_caps import MAX_PASID_WIDTH
from vfio_model.ranges import U64_MAX

MAX_FOLLOWED: Final = 64
"""PASIDs of one function whose invalidations are followed at a time."""
MAX_PASIDS: Final = 1024
"""PASIDs that one function may ever speak of: the IOMMU keeps something for each."""
RECENT: Final = 256
"""Invalidations that are remembered for requests that are on their way."""
_PERMISSIONS: Final = 0x3F


class AtsInvalidations(Protocol):
    """Where invalidations go: a :class:`~guestd.notifier.Publisher`, or a ring whose readers are in this process."""

    def append(self, as_id: int, iova: int, last: int, flags: int) -> None:
        """Queue the invalidation of ``iova``..``last`` (inclusive) of ``as_id``; ``flags`` as in the ring."""

    def flush_ats(self) -> OSError | None:
        """Return when nobody uses what is queued any more; ETIMEDOUT when somebody had to be killed for that."""

    def want_revoke(self) -> None:
        """A right was taken away without an invalidation: the next flush waits for those who use it."""


class FunctionIommu:
    """For ``function``, whose translations are known as ``as_id`` in ``invalidations``, or to nobody: then each of its
    translated requests comes here. ``post(answer)`` sends a page response, without waiting.
    """

    def __init__(
        self,
        function: IommuServices,
        invalidations: AtsInvalidations | None,
        as_id: int,
        post: Callable[[PageAnswer], None],
    ) -> None:
        """:raise OSError: ENODEV: there is no IOMMU with services for devices."""
        info = function.get_iotlb_info()
        self._function, self._invalidations, self._as_id, self._post = function, invalidations, as_id, post
        self.setup = IommuSetup(info.min_page_size, info.addr_width)
        """What the device is told."""
        self.gate: MappedMemory = create_memory("ats-gate", AREA_SIZE, exclusive=True)
        init_gate(self.gate.words)
        self._notifiers: dict[int, IOMMUNotifier] = {}
        self._listening: set[int] = set()
        self._met: set[int] = set()
        self._stamp = 0
        """Invalidations so far."""
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=RECENT)
        """PASID, first and last address of the newest of them."""
        self._lets_through = False
        self._open = False
        self._closed = False
        self._unwatch = function.watch_translated_requests(self._lets)
        function.on_rights_change = self._rights_changed
        self._rights_changed()

    # -- what the device asks ----------------------------------------------------------------------------------------

    def serve(self, request: Payload) -> Payload:
        """The answer. :raise OSError: a refusal."""
        if isinstance(request, AtsQuery | PageQuery | PasidControl):
            self._meet(request.pasid)
        match request:
            case AtsQuery():
                return self._translate(request)
            case TranslatedAccess():
                return self._access(request)
            case PageQuery():
                return self._page_request(request)
            case PasidControl():
                return self._control(request)
        raise OSError(errno.ENOTSUP, type(request).__name__)

    def _meet(self, pasid: int) -> None:
        if pasid in self._met:
            return
        if pasid >= 1 << MAX_PASID_WIDTH and pasid != PCI_NO_PASID:
            raise OSError(errno.EINVAL, f"PASID {pasid:#x}")
        if len(self._met) >= MAX_PASIDS:
            raise OSError(errno.ENOSPC, f"{MAX_PASIDS} PASIDs are enough")
        self._met.add(pasid)

    def _translate(self, query: AtsQuery) -> AtsAnswer:
        request = AtsRequest(
            query.addr,
            query.length,
            no_write=bool(query.flags & AtsFlags.NO_WRITE),
            pasid=query.pasid,
            priv=bool(query.flags & AtsFlags.PRIV),
            exec=bool(query.flags & AtsFlags.EXEC),
            max_entries=min(query.max_entries, MAX_TRANSLATIONS),
        )
        stamp = self._stamp
        completion = self._function.ats_request_translation(request)
        self._look_again()
        entries = [
            TranslationEntry(entry.iova, entry.translated_addr, entry.addr_mask, int(entry.perm) & _PERMISSIONS)
            for entry in completion.entries
        ]
        return AtsAnswer.of(stamp, entries, completion.errors, complete=completion.complete)

    def _access(self, access: TranslatedAccess) -> TranslatedAccess:
        """By the translated space, which says what it finds wrong to whom it concerns. A translated request bears no
        PASID."""
        if self._invalidated(access):
            raise OSError(errno.ESTALE, "an invalidation came since the translation")
        space = self._function.translated_space(PCI_NO_PASID)
        data = bytearray(access.count)
        if access.write:
            result = space.write(access.address, access.data)
        else:
            result = space.read(access.address, data)
        if result:
            raise OSError(errno.EFAULT, f"a translated request to {access.address:#x}")
        return msgspec.structs.replace(access, data=b"" if access.write else bytes(data))

    def _invalidated(self, access: TranslatedAccess) -> bool:
        """Whether what it was translated by is, or may be, no longer true."""
        missed = self._stamp - access.stamp
        if not 0 <= missed <= len(self._recent):
            return True
        recent = itertools.islice(reversed(self._recent), missed)
        return any(one[0] == access.pasid and one[1] <= access.last and access.first <= one[2] for one in recent)

    def _page_request(self, query: PageQuery) -> Empty:
        flags = query.flags
        self._function.pri_request_page(
            PageRequest(
                query.addr,
                query.pasid,
                query.prgi,
                last=bool(flags & PageFlags.LAST),
                is_read=bool(flags & PageFlags.READ),
                is_write=bool(flags & PageFlags.WRITE),
                priv=bool(flags & PageFlags.PRIV),
                exec=bool(flags & PageFlags.EXEC),
            )
        )
        return Empty()

    def _control(self, control: PasidControl) -> Empty:
        pasid, on = control.pasid, bool(control.on)
        if control.service == PasidService.INVALIDATIONS:
            self._follow(pasid) if on else self._unfollow(pasid)
        elif control.service == PasidService.PAGE_RESPONSES:
            self._listen(pasid) if on else self._unlisten(pasid)
        else:
            raise OSError(errno.EINVAL, f"service {control.service}")
        return Empty()

    # -- invalidations -----------------------------------------------------------------------------------------------

    def _follow(self, pasid: int) -> None:
        known = self._notifiers.pop(pasid, None)
        if known is not None:  # unless a reset has forgotten it, for nothing
            self._function.drop_iotlb_notifier(pasid, known)
        if len(self._notifiers) >= MAX_FOLLOWED:
            raise OSError(errno.ENOSPC, f"{MAX_FOLLOWED} PASIDs are followed already")
        flags = pasid_flags(pasid, RecordFlags.ATS)

        def invalidated(_notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
            last = min(entry.last, U64_MAX)
            self._stamp += 1
            self._recent.append((pasid, entry.iova, last))
            if self._invalidations is not None:
                self._invalidations.append(self._as_id, entry.iova, last, flags)

        notifier = IOMMUNotifier(invalidated, IOMMUNotifierFlag.DEVIOTLB_UNMAP, 0, U64_MAX, flush=self.flush)
        self._function.register_iotlb_notifier(pasid, notifier)
        self._notifiers[pasid] = notifier

    def _unfollow(self, pasid: int) -> None:
        notifier = self._notifiers.pop(pasid, None)
        if notifier is not None:
            self._function.drop_iotlb_notifier(pasid, notifier)

    def flush(self) -> OSError | None:
        """See :meth:`AtsInvalidations.flush_ats`."""
        return None if self._closed or self._invalidations is None else self._invalidations.flush_ats()

    # -- the gate ----------------------------------------------------------------------------------------------------

    def _lets(self, through: bool) -> None:
        """The IOMMU says whether translated requests pass. What it takes away is over when followers have flushed."""
        self._lets_through = through
        self._set_gate()

    def _rights_changed(self) -> None:
        """What the guest has enabled has changed. What was taken away is over when this returns."""
        before = self._open
        self._set_gate()
        if before and not self._open:
            self.flush()

    def _look_again(self) -> None:
        """A request got through: what was missing before is there now, which nothing has to announce."""
        if not self._lets_through:
            self._unwatch()
            self._unwatch = self._function.watch_translated_requests(self._lets)

    def _set_gate(self) -> None:
        before = self._open
        self._open = self._lets_through and self._function.may_translate and not self._closed
        if self.gate.fd >= 0:
            set_gate(self.gate.words, self._open)
        if before and not self._open and self._invalidations is not None:
            self._invalidations.want_revoke()

    # -- page responses ----------------------------------------------------------------------------------------------

    def _listen(self, pasid: int) -> None:
        self._function.pri_register_notifier(pasid, lambda prgi, code: self._post(PageAnswer(pasid, prgi, int(code))))
        self._listening.add(pasid)

    def _unlisten(self, pasid: int) -> None:
        if pasid in self._listening:
            self._listening.remove(pasid)
            self._function.pri_unregister_notifier(pasid)

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The device is gone: nothing is followed for it. Harmless twice."""
        if self._closed:
            return
        self._closed = True
        self._unwatch()
        self._function.on_rights_change = lambda: None
        for pasid in list(self._notifiers):
            self._unfollow(pasid)
        for pasid in list(self._listening):
            with contextlib.suppress(OSError):
                self._unlisten(pasid)
        self._set_gate()
        self.gate.close()
