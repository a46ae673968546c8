"""The IOMMU in front of a remote device, as the device's process reaches it: by messages, a ring, and one word.

A translation is asked for by message (X_ATS) and cached here (:class:`vfio_model.pci.atc.DeviceAtc`). While the
subscription at the notifier stands and guest RAM is mapped, an access that hits is a copy in a DMA section, like any
other. What is not mapped, and everything without a subscription, goes by X_TRANSLATED with the stamp of its
translation: the guest machine refuses it when it has invalidated since.

The client goes, and everything here is over: caches fail, page requests are not answered any more.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Final, TypeVar

from protocols.transport.shm import MappedMemory
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
)
from protocols.vfio_user.messages import Command, Payload
from vfio_model.memory.atc_cache import PrivateRing, TranslationCache
from vfio_model.memory.atc_entries import GuestRam
from vfio_model.memory.ats_gate import gate_of
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iotlb import IOMMUTLBEntry, IOMMUTLBEvent
from vfio_model.memory.lane import Lane
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.ring import RecordFlags, RingReader
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag, MemTxResult
from vfio_model.pci.atc import DeviceAtc, Translated, required
from vfio_model.pci.iommu_ops import (
    Atc,
    AtsCompletion,
    AtsGate,
    AtsRequest,
    IotlbInfo,
    PageRequest,
    PageResponse,
    PageResponseFn,
)
from vfio_model.ranges import U64_MAX

Ask = Callable[[Command, Payload], Payload]
"""Ask the client and wait, serving it meanwhile; raises ``OSError`` with its errno, ENODEV when it is gone."""

_PERMISSIONS: Final = 0x3F
C = TypeVar("C", bound=TranslationCache)


class _Hearing(TranslationCache):
    """Caches nothing, and tells ``notifier`` of what a cache would drop; of everything, at first."""

    _heard: tuple[tuple[int, int], ...] = ((0, U64_MAX),)

    def listen(self, notifier: IOMMUNotifier) -> None:
        """Outside of a section, because what is told may do anything."""
        self.forget_request(self.sample())
        heard, self._heard = self._heard, ()
        for first, last in heard:
            entry = IOMMUTLBEntry(None, first, 0, last - first, IOMMUAccessFlags.NONE, self.pasid)
            notifier.deliver(IOMMUTLBEvent(IOMMUNotifierFlag.DEVIOTLB_UNMAP, entry))

    def drop(self, iova: int, last: int) -> None:
        """See :class:`TranslationCache`."""
        self._heard = (*self._heard, (iova, last))


class RemoteIommu:
    """An :class:`~vfio_model.pci.iommu_ops.IommuPort` over ``ask``. ``gate`` (its own from now on) is the area of
    :mod:`vfio_model.memory.ats_gate`; ``ram`` is guest RAM as far as it is mapped here; ``in_access()``: the client
    waits for an answer of ours. What answers page requests is called by ``soon``, outside of any wait.

    :raise RemoteProtocolError: when the gate is none.
    """

    def __init__(
        self,
        ask: Ask,
        setup: IommuSetup,
        gate: MappedMemory,
        ram: GuestRam,
        in_access: Callable[[], bool],
        soon: Callable[[Callable[[], None]], None],
        *,
        limit: int,
    ) -> None:
        self._gate_word = gate_of(gate.words)
        self._ask, self._gate, self._ram, self._in_access, self._soon = ask, gate, ram, in_access, soon
        self._info = IotlbInfo(setup.addr_width, setup.min_page_size)
        self._limit = limit
        self._atcs: list[DeviceAtc] = []
        self._followed: dict[int, int] = {}
        """How often the invalidations of a PASID are wanted."""
        self._notifiers: dict[tuple[int, IOMMUNotifier], _Hearing] = {}
        self._responses: dict[int, PageResponseFn] = {}
        self._subscription: tuple[RingReader, Lane, int] | None = None
        self._closed = False

    # -- the subscription --------------------------------------------------------------------------------------------

    def arm(self, ring: RingReader, lane: Lane, as_id: int) -> None:
        """Invalidations of ``as_id`` arrive by ``ring``, for sections of ``lane``."""
        self._subscription = ring, lane, as_id
        self._renew()

    def disarm(self) -> None:
        """They do not, any more."""
        self._subscription = None
        self._renew()

    def _renew(self) -> None:
        for atc in self._atcs:
            atc.follow(self._cache(TranslationCache, atc.pasid, atc.priv), self._mapped)
        for pasid, notifier in self._notifiers:
            self._notifiers[pasid, notifier] = self._cache(_Hearing, pasid, False)

    @property
    def _mapped(self) -> GuestRam | None:
        return None if self._subscription is None else self._ram

    def _cache(self, kind: type[C], pasid: int, priv: bool) -> C:
        if self._subscription is None:
            ring, lane, as_id = PrivateRing().reader, Lane.private(), 0
        else:
            ring, lane, as_id = self._subscription
            ring = RingReader(ring.words)
        gate, needed = self._gate_word, required(priv)
        return kind(ring, lane, as_id=as_id, pasid=pasid, kind=RecordFlags.ATS, required=needed, gate=gate)

    def hear(self) -> None:
        """Tell those who registered for invalidations; at top level."""
        for (_, notifier), hearing in list(self._notifiers.items()):
            hearing.listen(notifier)

    def forget(self) -> None:
        """Guest RAM goes: nothing that is cached is used any more."""
        for atc in self._atcs:
            atc.invalidate()

    # -- translation (vfio_model.pci.iommu_ops.IommuPort) ------------------------------------------------------------

    def get_iotlb_info(self) -> IotlbInfo:
        """See ``IommuPort``."""
        return self._info

    def ats_request_translation(self, request: AtsRequest) -> AtsCompletion:
        """See ``IommuPort``."""
        return self._translate(request)[0]

    def _translate(self, request: AtsRequest) -> tuple[AtsCompletion, int]:
        flags = AtsFlags(0)
        flags |= AtsFlags.NO_WRITE if request.no_write else 0
        flags |= AtsFlags.PRIV if request.priv else 0
        flags |= AtsFlags.EXEC if request.exec else 0
        most = min(request.max_entries, MAX_TRANSLATIONS)
        answer = self._call(Command.X_ATS, AtsQuery(request.addr, request.length, request.pasid, int(flags), most))
        assert isinstance(answer, AtsAnswer), "the protocol state checked what answers what"
        entries = [
            IOMMUTLBEntry(
                None, one.iova, one.translated, one.mask, IOMMUAccessFlags(one.perm & _PERMISSIONS), request.pasid
            )
            for one in answer.entries()
        ]
        return AtsCompletion(entries, answer.errors, bool(answer.complete)), answer.stamp

    def translated_space(self, pasid: int) -> DMAImpl:
        """:raise OSError: ENODEV; see ``IommuPort``."""
        raise OSError(errno.ENODEV, "a process of its own makes translated requests through an ATC")

    def watch_translated_requests(self, fn: AtsGate) -> Callable[[], None]:
        """Says how it is now; what changes is looked at in each section."""
        fn(bool(self._gate_word[0]))
        return lambda: None

    def open_atc(self, pasid: int, *, priv: bool = False) -> Atc:
        """See ``IommuPort``."""
        self._follow(pasid)
        atc = DeviceAtc(
            self._cache(TranslationCache, pasid, priv),
            self._mapped,
            self._translate,
            self._through,
            self._left,
            pasid=pasid,
            priv=priv,
        )
        self._atcs.append(atc)
        return atc

    def _left(self, atc: DeviceAtc) -> None:
        if atc in self._atcs:
            self._atcs.remove(atc)
            self._unfollow(atc.pasid)

    def _through(self, found: Translated, view: memoryview, is_write: bool) -> MemTxResult | None:
        done = 0
        while done < len(view):
            part = view[done : done + self._limit]
            data = bytes(part) if is_write else b""
            request = TranslatedAccess(
                found.address + done,
                found.first,
                found.last,
                found.stamp,
                found.pasid,
                len(part),
                int(is_write),
                0,
                data,
            )
            try:
                answer = self._call(Command.X_TRANSLATED, request)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    return None
                return MemTxResult.DECODE_ERROR
            assert isinstance(answer, TranslatedAccess), "the protocol state checked what answers what"
            if not is_write:
                part[:] = answer.data
            done += len(part)
        return MemTxResult.OK

    # -- invalidations -----------------------------------------------------------------------------------------------

    def register_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """See ``IommuPort``. It hears between other things, not before an invalidation is acknowledged: what is used
        by translated requests belongs into an ATC."""
        self._follow(pasid)
        self._notifiers[pasid, notifier] = self._cache(_Hearing, pasid, False)

    def unregister_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """See ``IommuPort``."""
        if self._notifiers.pop((pasid, notifier), None) is not None:
            self._unfollow(pasid)

    def _follow(self, pasid: int) -> None:
        if not self._followed.get(pasid):
            self._call(Command.X_PASID, PasidControl(pasid, PasidService.INVALIDATIONS, 1))
        self._followed[pasid] = self._followed.get(pasid, 0) + 1

    def _unfollow(self, pasid: int) -> None:
        self._followed[pasid] -= 1
        if not self._followed[pasid]:
            del self._followed[pasid]
            self._end(pasid, PasidService.INVALIDATIONS)

    def _end(self, pasid: int, service: PasidService) -> None:
        if not self._closed:
            self._call(Command.X_PASID, PasidControl(pasid, service, 0))

    # -- page requests -----------------------------------------------------------------------------------------------

    def pri_register_notifier(self, pasid: int, fn: PageResponseFn) -> None:
        """See ``IommuPort``."""
        self._call(Command.X_PASID, PasidControl(pasid, PasidService.PAGE_RESPONSES, 1))
        self._responses[pasid] = fn

    def pri_unregister_notifier(self, pasid: int) -> None:
        """See ``IommuPort``."""
        if self._responses.pop(pasid, None) is not None:
            self._end(pasid, PasidService.PAGE_RESPONSES)

    def pri_request_page(self, request: PageRequest) -> None:
        """See ``IommuPort``.

        :raise OSError: EDEADLK inside a region access besides: the response may need what the client waits for.
        """
        if self._in_access():
            raise OSError(errno.EDEADLK, "a page request inside a region access")
        flags = PageFlags(0)
        flags |= PageFlags.LAST if request.last else 0
        flags |= PageFlags.READ if request.is_read else 0
        flags |= PageFlags.WRITE if request.is_write else 0
        flags |= PageFlags.PRIV if request.priv else 0
        flags |= PageFlags.EXEC if request.exec else 0
        self._call(Command.X_PAGE_REQUEST, PageQuery(request.addr, request.pasid, request.prgi, int(flags)))

    def page_response(self, answer: PageAnswer) -> None:
        """X_PAGE_RESPONSE: the device hears of it when it is not in the middle of something."""
        try:
            code = PageResponse(answer.code)
        except ValueError:
            code = PageResponse.RESPONSE_FAILURE

        def tell() -> None:
            fn = self._responses.get(answer.pasid)
            if fn is not None and not self._closed:
                fn(answer.prgi, code)

        self._soon(tell)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _call(self, command: Command, payload: Payload) -> Payload:
        if self._closed:
            raise OSError(errno.ENODEV, "the client is gone")
        return self._ask(command, payload)

    def close(self) -> None:
        """The client is gone. Harmless twice."""
        self._closed = True
        self._subscription = None
        for atc in list(self._atcs):
            atc.close()
        self._notifiers.clear()
        self._responses.clear()
        self._soon(self._gate_unused)

    def _gate_unused(self) -> None:
        self._gate_word = memoryview(b"\0")
        with contextlib.suppress(BufferError):  # a closed cache that the device keeps; the memory goes with it
            self._gate.close()
