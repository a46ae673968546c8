"""Extended capabilities of a function that caches translations: ATS, PRI and PASID.

PCI Express Base Specification, 10.5 (ATS and page request capabilities) and 7.8.9 ("Process Address Space ID"). All are
disabled at reset. Write masks are QEMU's: the smallest translation unit has four bits that can be set, and a PASID
capability takes every enable bit, whether the permission is supported or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.errors import ConfigError
from vfio_model.pci.config_space import ConfigSpace, Field

CAP_ID_ATS, ATS_SIZE = 0x0F, 8
CAP_ID_PRI, PRI_SIZE = 0x13, 16
CAP_ID_PASID, PASID_SIZE = 0x1B, 8
_VERSION = 1

ATS_PAGE_ALIGNED = 1 << 5
ATS_ENABLE = 0x8000
ATS_STU = 0x000F
STU_UNIT_SHIFT = 12

PRI_ENABLE, PRI_RESET = 1, 2
PRI_ERRORS = 0x0003
"""Response failure, unexpected page request group index."""
PRI_STOPPED = 0x0100
PRI_PASID_REQUIRED = 0x8000

PASID_EXEC, PASID_PRIV = 2, 4
PASID_WIDTH_SHIFT = 8
PASID_ENABLE = 1
PASID_CONTROL = 7
MAX_PASID_WIDTH = 20
PAGE_REQUEST_GROUPS = 512
"""Page request group indices have 9 bits."""


def _check(holds: bool, what: str, where: str) -> None:
    if not holds:
        raise ConfigError(what, where=where)


@dataclass(frozen=True, slots=True)
class AtsSpec:
    """``queue_depth`` (1 to 32) invalidations can be outstanding; ``page_aligned``: untranslated addresses are aligned
    to 4096 bytes.

    :raise ConfigError: when there is no such depth.
    """

    queue_depth: int = 32
    page_aligned: bool = True

    def __post_init__(self) -> None:
        _check(1 <= self.queue_depth <= 32, f"queue_depth is {self.queue_depth}, not 1 to 32", "AtsSpec")


@dataclass(frozen=True, slots=True)
class PriSpec:
    """At most ``max_requests`` page requests can be outstanding. ``pasid_required``: a response carries the PASID of
    its request.

    :raise ConfigError: when there is no such number.
    """

    max_requests: int = 256
    pasid_required: bool = True

    def __post_init__(self) -> None:
        _check(1 <= self.max_requests < 1 << 32, f"max_requests is {self.max_requests}, not 1 to 2**32 - 1", "PriSpec")


@dataclass(frozen=True, slots=True)
class PasidSpec:
    """PASIDs of ``width`` bits (1 to 20); whether requests can ask for execute permission or privileged mode.

    :raise ConfigError: when there is no such width.
    """

    width: int = MAX_PASID_WIDTH
    exec: bool = False
    priv: bool = False

    def __post_init__(self) -> None:
        _check(1 <= self.width <= MAX_PASID_WIDTH, f"width is {self.width}, not 1 to {MAX_PASID_WIDTH}", "PasidSpec")


class AtsCapability:
    """The capability, added to ``config``; ``offset`` as for :meth:`ConfigSpace.add_extended_capability`."""

    def __init__(self, config: ConfigSpace, spec: AtsSpec, offset: int | None = None) -> None:
        self.spec, self._config = spec, config
        capability = spec.queue_depth & 31 | (ATS_PAGE_ALIGNED if spec.page_aligned else 0)
        fields = Field("capability", 4, 2, capability), Field("control", 6, 2, writable=ATS_ENABLE | ATS_STU)
        self.offset = config.add_extended_capability(
            CAP_ID_ATS, _VERSION, ATS_SIZE, fields, prefix="ats", offset=offset
        )

    @property
    def enabled(self) -> bool:
        """Whether the function may cache translations."""
        return bool(self._config.get("ats.control") & ATS_ENABLE)

    @property
    def translation_unit(self) -> int:
        """Bytes of the smallest translation unit: no completion, no invalidation is smaller."""
        return 1 << (self._config.get("ats.control") & ATS_STU) + STU_UNIT_SHIFT


class PriCapability:
    """The capability, added to ``config``; ``offset`` as for :meth:`ConfigSpace.add_extended_capability`."""

    def __init__(self, config: ConfigSpace, spec: PriSpec, offset: int | None = None) -> None:
        self.spec, self._config = spec, config
        status = PRI_STOPPED | (PRI_PASID_REQUIRED if spec.pasid_required else 0)
        fields = (
            Field("control", 4, 2, writable=PRI_ENABLE | PRI_RESET),
            Field("status", 6, 2, status, w1c=PRI_ERRORS, volatile=PRI_STOPPED),
            Field("max_requests", 8, 4, spec.max_requests),
            Field("allocated", 12, 4, writable=0xFFFF_FFFF),
        )
        self.offset = config.add_extended_capability(
            CAP_ID_PRI, _VERSION, PRI_SIZE, fields, prefix="pri", offset=offset
        )
        config.on_write("pri.control", self._controlled)

    def _controlled(self) -> None:
        """The reset bit reads zero; an interface is stopped while it is disabled."""
        self._config.set("pri.control", self._config.get("pri.control") & ~PRI_RESET)
        status = self._config.get("pri.status") & ~PRI_STOPPED
        self._config.set("pri.status", status | (0 if self.enabled else PRI_STOPPED))

    @property
    def enabled(self) -> bool:
        """Whether the function may request pages."""
        return bool(self._config.get("pri.control") & PRI_ENABLE)

    @property
    def allocated(self) -> int:
        """How many requests the guest lets be outstanding; 0 while it is disabled."""
        return self._config.get("pri.allocated") if self.enabled else 0

    def failed(self, *, unexpected_group: bool = False) -> None:
        """Note an error in the status register: a response failure, or a response to no request."""
        self._config.set("pri.status", self._config.get("pri.status") | (2 if unexpected_group else 1))


class PasidCapability:
    """The capability, added to ``config``; ``offset`` as for :meth:`ConfigSpace.add_extended_capability`."""

    def __init__(self, config: ConfigSpace, spec: PasidSpec, offset: int | None = None) -> None:
        self.spec, self._config = spec, config
        permissions = (PASID_EXEC if spec.exec else 0) | (PASID_PRIV if spec.priv else 0)
        fields = (
            Field("capability", 4, 2, permissions | spec.width << PASID_WIDTH_SHIFT),
            Field("control", 6, 2, writable=PASID_CONTROL),
        )
        self.offset = config.add_extended_capability(
            CAP_ID_PASID, _VERSION, PASID_SIZE, fields, prefix="pasid", offset=offset
        )

    @property
    def enabled(self) -> bool:
        """Whether requests may carry a PASID."""
        return bool(self._config.get("pasid.control") & PASID_ENABLE)
