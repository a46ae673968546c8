"""What a function asks of its IOMMU beside DMA: translations (ATS), pages (PRI), news of invalidations.

The checks are QEMU's, in its order: a function that may not master the bus, or that names a PASID while PASID is
disabled, gets EPERM; then the capability in question has to be enabled; without an IOMMU the answer is ENODEV.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Protocol

from vfio_model.memory.dma import BLOCKED, DMASpace
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.types import PCI_NO_PASID
from vfio_model.pci.config_space import ConfigSpace
from vfio_model.pci.iommu_ops import (
    Atc,
    AtcOutcome,
    AtsCompletion,
    AtsGate,
    AtsRequest,
    IommuPort,
    IotlbInfo,
    PageRequest,
    PageResponseFn,
)
from vfio_model.pci.translation_caps import (
    CAP_ID_ATS,
    CAP_ID_PASID,
    CAP_ID_PRI,
    MAX_PASID_WIDTH,
    PAGE_REQUEST_GROUPS,
    AtsCapability,
    AtsSpec,
    PasidCapability,
    PasidSpec,
    PriCapability,
    PriSpec,
)


class ServiceHost(Protocol):
    """What the services need of a ``DeviceHost``."""

    @property
    def iommu(self) -> IommuPort | None:
        """See ``DeviceHost``."""


class IommuServices:
    """A part of every :class:`~vfio_model.pci.device.PCIDevice`: its methods towards the IOMMU, and the capabilities
    that let it use them."""

    ATS: AtsSpec | None = None
    """The function may cache translations."""
    PRI: PriSpec | None = None
    """The function may ask for pages that are not there."""
    PASID: PasidSpec | None = None
    """The function's requests may name a process address space."""

    def _init_services(self, host: ServiceHost, config: ConfigSpace) -> None:
        self._iommu_host = host
        self._may_master = False
        """Bus mastering as of the last change, which no reset in progress lets through."""
        self._iotlb_notifiers: list[tuple[int, IOMMUNotifier]] = []
        self._page_listeners: set[int] = set()
        self._translated: dict[int, DMASpace] = {}
        self._atcs: list[CheckedAtc] = []
        self.on_rights_change: Callable[[], None] = lambda: None
        """Called when bus mastering or ATS was given or taken away."""
        self.ats = AtsCapability(config, self.ATS, self._service_offset(CAP_ID_ATS)) if self.ATS is not None else None
        if self.ats is not None:
            config.on_write("ats.control", self._ats_controlled)
        self.pri = PriCapability(config, self.PRI, self._service_offset(CAP_ID_PRI)) if self.PRI is not None else None
        self.pasid = (
            PasidCapability(config, self.PASID, self._service_offset(CAP_ID_PASID)) if self.PASID is not None else None
        )
        if self.pasid is not None:
            config.on_write("pasid.control", self._renew_atcs)

    def _service_offset(self, cap_id: int) -> int | None:
        """Where the extended capability lies, for a function whose list is not made here."""
        return None

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def ats_enabled(self) -> bool:
        """Whether the guest has enabled ATS."""
        return self.ats is not None and self.ats.enabled

    @property
    def pri_enabled(self) -> bool:
        """Whether the guest has enabled page requests."""
        return self.pri is not None and self.pri.enabled

    @property
    def pasid_enabled(self) -> bool:
        """Whether the guest has enabled PASIDs."""
        return self.pasid is not None and self.pasid.enabled

    @property
    def page_requests_allocated(self) -> int:
        """How many page requests may be outstanding: 0 while PRI is disabled."""
        return self.pri.allocated if self.pri is not None else 0

    @property
    def may_translate(self) -> bool:
        """Whether the function may ask for translations and use them."""
        return self._may_master and self.ats_enabled

    def _allow_mastering(self, allowed: bool) -> None:
        self._may_master = allowed
        if not allowed:
            self._block_translated()
        self._renew_atcs()
        self.on_rights_change()

    def _block_translated(self) -> None:
        for space in self._translated.values():
            space.bind(BLOCKED)
        self._translated.clear()

    def _ats_controlled(self) -> None:
        if not self.ats_enabled:
            self._block_translated()
            self._close_atcs()
        self._renew_atcs()
        self.on_rights_change()

    def _renew_atcs(self) -> None:
        for atc in self._atcs:
            atc.renew()

    def _close_atcs(self) -> None:
        for atc in list(self._atcs):
            atc.close()

    def _forget_services(self) -> None:
        """Nothing is registered any more, nothing translated goes out: a reset, or the function is taken out."""
        self._allow_mastering(False)
        self._close_atcs()
        port = self._iommu_host.iommu
        notifiers, self._iotlb_notifiers = self._iotlb_notifiers, []
        listeners, self._page_listeners = self._page_listeners, set()
        if port is not None:
            for pasid, notifier in notifiers:
                with contextlib.suppress(OSError):  # an IOMMU that has gone has forgotten it already
                    port.unregister_iotlb_notifier(pasid, notifier)
            for pasid in listeners:
                with contextlib.suppress(OSError):
                    port.pri_unregister_notifier(pasid)

    def _check_pasid(self, pasid: int) -> None:
        if pasid == PCI_NO_PASID:
            return
        if not self.pasid_enabled:
            raise OSError(errno.EPERM, "a request with PASID while PASID is disabled")
        if not 0 <= pasid < 1 << MAX_PASID_WIDTH:
            raise OSError(errno.EINVAL, f"PASID {pasid:#x}")

    def _check_request(self, pasid: int) -> None:
        if not self._may_master:
            raise OSError(errno.EPERM, "a request of a function that may not master the bus")
        self._check_pasid(pasid)

    def _check_ats(self) -> None:
        if not self.ats_enabled:
            raise OSError(errno.EPERM, "ATS is disabled")

    def _port(self) -> IommuPort:
        port = self._iommu_host.iommu
        if port is None:
            raise OSError(errno.ENODEV, "no IOMMU")
        return port

    # -- translations ------------------------------------------------------------------------------------------------

    def get_iotlb_info(self) -> IotlbInfo:
        """What a cache of translations has to know.

        :raise OSError: ENODEV.
        """
        return self._port().get_iotlb_info()

    def register_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """Tell ``notifier`` of invalidations in the space of ``pasid`` (``PCI_NO_PASID``: of requests without), until
        it is unregistered or the function is reset.

        :raise OSError: EPERM; ENODEV; ENOTSUP when the IOMMU does not invalidate caches of devices.
        """
        self._check_pasid(pasid)
        self._port().register_iotlb_notifier(pasid, notifier)
        self._iotlb_notifiers.append((pasid, notifier))

    def unregister_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """The opposite, of one that is registered.

        :raise OSError: EPERM, ENODEV.
        """
        self._check_pasid(pasid)
        self._port().unregister_iotlb_notifier(pasid, notifier)
        self._iotlb_notifiers.remove((pasid, notifier))

    def drop_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """As :meth:`unregister_iotlb_notifier`, whatever the guest has enabled. Harmless when it is not registered."""
        if (pasid, notifier) in self._iotlb_notifiers:
            self._iotlb_notifiers.remove((pasid, notifier))
            if self._iommu_host.iommu is not None:
                self._iommu_host.iommu.unregister_iotlb_notifier(pasid, notifier)

    def watch_translated_requests(self, fn: AtsGate) -> Callable[[], None]:
        """See :meth:`PCIIOMMUOps.watch_translated_requests`.

        :raise OSError: ENODEV.
        """
        return self._port().watch_translated_requests(fn)

    def ats_request_translation(self, request: AtsRequest) -> AtsCompletion:
        """Ask for translations.

        :raise OSError: EPERM; ENOSPC when ``request`` wants no entries; ENODEV.
        """
        self._check_request(request.pasid)
        if not request.max_entries:
            raise OSError(errno.ENOSPC, "no room for a translation")
        self._check_ats()
        return self._port().ats_request_translation(request)

    def translated_space(self, pasid: int) -> DMASpace:
        """Where requests with translated addresses go. Blocked for good once the function may not master the bus, or
        ATS is disabled.

        :raise OSError: EPERM, ENODEV.
        """
        self._check_request(pasid)
        self._check_ats()
        space = self._translated.get(pasid)
        if space is None:
            space = self._translated[pasid] = DMASpace(self._port().translated_space(pasid))
        return space

    def open_atc(self, pasid: int, *, priv: bool = False) -> Atc:
        """An empty cache of translations of ``pasid``. Its accesses fail while the function may not master the bus; a
        reset closes it, and so does disabling ATS.

        :raise OSError: as :meth:`register_iotlb_notifier`.
        """
        self._check_pasid(pasid)
        atc = CheckedAtc(self._port().open_atc(pasid, priv=priv), self._atcs.remove, self._check_atc, pasid)
        self._atcs.append(atc)
        return atc

    def _check_atc(self, pasid: int) -> None:
        self._check_request(pasid)
        self._check_ats()

    # -- pages -------------------------------------------------------------------------------------------------------

    def pri_register_notifier(self, pasid: int, fn: PageResponseFn) -> None:
        """Tell ``fn`` of the responses to page requests of ``pasid``, until it is unregistered or the function is
        reset.

        :raise OSError: EPERM, ENODEV.
        """
        self._check_request(pasid)
        self._port().pri_register_notifier(pasid, fn)
        self._page_listeners.add(pasid)

    def pri_unregister_notifier(self, pasid: int) -> None:
        """The opposite; nothing is checked, nothing happens without an IOMMU."""
        self._page_listeners.discard(pasid)
        if self._iommu_host.iommu is not None:
            self._iommu_host.iommu.pri_unregister_notifier(pasid)

    def pri_request_page(self, request: PageRequest) -> None:
        """Ask for a page; the response comes to the notifier.

        :raise OSError: EPERM, ENODEV; EINVAL: no such group or PASID; what :meth:`PCIIOMMUOps.pri_request_page` says.
        """
        self._check_request(request.pasid)
        if not self.pri_enabled:
            raise OSError(errno.EPERM, "page requests are disabled")
        if not 0 <= request.prgi < PAGE_REQUEST_GROUPS:
            raise OSError(errno.EINVAL, f"page request group {request.prgi:#x}")
        self._port().pri_request_page(request)


AtcAccess = Callable[[int, memoryview, bool], tuple[int, AtcOutcome]]


def _refused(addr: int, view: memoryview, is_write: bool, /) -> tuple[int, AtcOutcome]:
    return 0, AtcOutcome.FAILED


class CheckedAtc:
    """An :class:`~vfio_model.pci.iommu_ops.Atc` that a function may use as long as ``check(pasid)`` raises nothing."""

    def __init__(
        self, atc: Atc, on_close: Callable[[CheckedAtc], None], check: Callable[[int], None], pasid: int
    ) -> None:
        self._atc, self._on_close, self._check, self._pasid = atc, on_close, check, pasid
        self._closed = False
        self.access: AtcAccess = _refused
        """See ``Atc``; FAILED when the function may not."""
        self.renew()

    def renew(self) -> None:
        """What the function may do has changed: that is looked at here, not at each access."""
        try:
            self._check(self._pasid)
        except OSError:
            self.access = _refused
        else:
            self.access = self._atc.access

    @property
    def entries(self) -> int:
        """See ``Atc``."""
        return self._atc.entries

    def fill(self, request: AtsRequest) -> AtsCompletion:
        """See ``Atc``; EPERM when the function may not."""
        self._check(self._pasid)
        return self._atc.fill(request)

    def close(self) -> None:
        """See ``Atc``."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            with contextlib.suppress(OSError):  # an IOMMU that has gone has forgotten it already
                self._atc.close()
