"""The PCI Express capability (PCI Express Base Specification, 7.5.3, "PCI Express Capability Structure"), version 2.

Reset values and write masks are those of QEMU's functions: no payload size or power management can be chosen, errors
can be enabled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from vfio_model.errors import ConfigError
from vfio_model.pci.config_space import ConfigSpace, Field

CAP_ID_EXPRESS = 0x10
EXPRESS_SIZE = 0x3C
_VERSION = 2
_TYPE_SHIFT = 4
_TYPE = 0xF0
_SLOT_IMPLEMENTED = 0x0100

DEVCAP_EXTENDED_TAG, DEVCAP_ROLE_BASED_ERRORS, DEVCAP_FLR = 1 << 5, 1 << 15, 1 << 28
DEVCTL_ERRORS = 0x000F
DEVCTL_FLR = 0x8000
DEVSTA_ERRORS = 0x000F
DEVCAP2_END_END_PREFIXES = 3 << 20
"""Up to four end-to-end prefixes, and support for them."""
DEV2_ARI_FORWARDING = 1 << 5
DEVCTL2_PREFIX_BLOCKING = 0x8000

LINK_WIDTH_SHIFT = 4
SPEED_5GT = 2
LNKCAP_ASPM_L0S = 1 << 10
LNKCAP_REPORTS_LINK = 3 << 20
"""Data link layer active reporting and bandwidth notification."""
LNKCAP_PORT_SHIFT = 24
LNK_SPEED_WIDTH = 0x3FF
LNKSTA_ACTIVE = 0x2000

SLTCAP_SLOT = 0x20019
"""Attention button, both indicators, interlock."""
SLTCAP_HOTPLUG = 0x0060
"""Surprise, hot-plug capable."""
SLTCAP_POWER_CONTROLLER = 0x0002
SLTCAP_NUMBER_SHIFT = 19
SLTCTL_WRITABLE = 0x03F9
SLTCTL_INDICATORS_OFF = 0x03C0
SLTCTL_POWER_OFF = 0x0400
SLTCTL_EVENTS = 0x001F
"""Which events interrupt: bit for bit those of the status register."""
SLTCTL_INTERRUPT = 0x0020
SLTCTL_INTERLOCK = 0x0800
"""Toggles the interlock; reads zero."""
SLTSTA_EVENTS = 0x011F
SLTSTA_COMMAND_COMPLETED = 0x0010
SLTSTA_PRESENT = 0x0040
SLTSTA_INTERLOCK = 0x0080
ROOTCTL_ERRORS = 0x0007
ROOTSTA_PME = 0x0001_0000


class PortType(IntEnum):
    """Device/Port Type."""

    ENDPOINT = 0
    LEGACY_ENDPOINT = 1
    ROOT_PORT = 4
    UPSTREAM_PORT = 5
    DOWNSTREAM_PORT = 6
    PCIE_TO_PCI_BRIDGE = 7
    PCI_TO_PCIE_BRIDGE = 8
    ROOT_COMPLEX_ENDPOINT = 9
    ROOT_COMPLEX_EVENT_COLLECTOR = 10


@dataclass(frozen=True, slots=True)
class ExpressSpec:
    """A function of ``type``; an endpoint that is plugged into a root complex shows itself as part of that.

    ``flr``: function level reset. ``speed`` (1: 2.5 GT/s … 6: 64 GT/s) and ``width`` (lanes) of the link, ``port``
    its number; ``reports_link``: whether it tells when the link is up. ``slot``: number of the slot behind the port,
    None for none; what it can: ``hotplug``, ``power_controller``. ``at``, ``place``: as of
    :meth:`ConfigSpace.add_capability`.

    :raise ConfigError: when there is no such link.
    """

    type: PortType = PortType.ENDPOINT
    flr: bool = False
    ari_forwarding: bool = False
    speed: int = 1
    width: int = 1
    port: int = 0
    reports_link: bool = False
    slot: int | None = None
    hotplug: bool = True
    power_controller: bool = True
    at: int | None = None
    place: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.speed <= 6 or self.width not in (0, 1, 2, 4, 8, 12, 16, 32):
            raise ConfigError(f"speed {self.speed}, width {self.width}", where="ExpressSpec", hint="1 to 6; 1 to 32")

    @property
    def link(self) -> int:
        """Speed and width as in the link registers."""
        return self.speed | self.width << LINK_WIDTH_SHIFT

    @property
    def idle_link(self) -> int:
        """The same as the status shows it while nothing is behind; 2.5 GT/s and one lane for a port that states
        nothing."""
        return self.link or 1 | 1 << LINK_WIDTH_SHIFT

    @property
    def power_off(self) -> int:
        """The slot control register's power controller bit, if there is a power controller."""
        return SLTCTL_POWER_OFF if self.slot is not None and self.power_controller else 0

    @property
    def slot_capabilities(self) -> int:
        """The slot capabilities register."""
        if self.slot is None:
            return 0
        power = SLTCAP_POWER_CONTROLLER if self.power_controller else 0
        return SLTCAP_SLOT | (SLTCAP_HOTPLUG if self.hotplug else 0) | power | self.slot << SLTCAP_NUMBER_SHIFT

    @property
    def is_root_port(self) -> bool:
        """Whether it has root registers."""
        return self.type in (PortType.ROOT_PORT, PortType.ROOT_COMPLEX_EVENT_COLLECTOR)


def _fields(spec: ExpressSpec) -> tuple[Field, ...]:
    flr = DEVCAP_FLR if spec.flr else 0
    ari = DEV2_ARI_FORWARDING if spec.ari_forwarding else 0
    fast = spec.speed if spec.speed > 1 else 0
    speeds = ((1 << fast) - 1) << 1 if fast > SPEED_5GT else 0
    slot = spec.slot is not None
    reports = LNKCAP_REPORTS_LINK if spec.reports_link else 0
    capabilities = _VERSION | spec.type << _TYPE_SHIFT | (_SLOT_IMPLEMENTED if slot else 0)
    return (
        Field("capabilities", 0x02, 2, capabilities),
        Field("device_capabilities", 0x04, 4, DEVCAP_EXTENDED_TAG | DEVCAP_ROLE_BASED_ERRORS | flr),
        Field("device_control", 0x08, 2, writable=DEVCTL_ERRORS | (DEVCTL_FLR if spec.flr else 0)),
        Field("device_status", 0x0A, 2, w1c=DEVSTA_ERRORS),
        Field("link_capabilities", 0x0C, 4, spec.link | LNKCAP_ASPM_L0S | reports | spec.port << LNKCAP_PORT_SHIFT),
        Field("link_control", 0x10, 2),
        Field("link_status", 0x12, 2, spec.idle_link, volatile=LNK_SPEED_WIDTH | LNKSTA_ACTIVE),
        Field("slot_capabilities", 0x14, 4, spec.slot_capabilities),
        Field(
            "slot_control",
            0x18,
            2,
            SLTCTL_INDICATORS_OFF | spec.power_off if slot else 0,
            SLTCTL_WRITABLE | spec.power_off | SLTCTL_INTERLOCK if slot else 0,
        ),
        Field(
            "slot_status",
            0x1A,
            2,
            w1c=SLTSTA_EVENTS if slot else 0,
            volatile=SLTSTA_PRESENT | SLTSTA_INTERLOCK if slot else 0,
        ),
        Field("root_control", 0x1C, 2, writable=ROOTCTL_ERRORS if spec.is_root_port else 0),
        Field("root_capabilities", 0x1E, 2),
        Field("root_status", 0x20, 4, w1c=ROOTSTA_PME if spec.is_root_port else 0),
        Field("device_capabilities_2", 0x24, 4, DEVCAP2_END_END_PREFIXES | ari),
        Field("device_control_2", 0x28, 2, writable=DEVCTL2_PREFIX_BLOCKING | ari),
        Field("device_status_2", 0x2A, 2),
        Field("link_capabilities_2", 0x2C, 4, speeds),
        Field("link_control_2", 0x30, 2, fast),
        Field("link_status_2", 0x32, 2),
        Field("slot_capabilities_2", 0x34, 4),
        Field("slot_control_2", 0x38, 2),
        Field("slot_status_2", 0x3A, 2),
    )


class ExpressCapability:
    """The capability, added to ``config``. ``on_flr()`` resets the function."""

    def __init__(self, config: ConfigSpace, spec: ExpressSpec, on_flr: Callable[[], None]) -> None:
        self.spec = spec
        self._config, self._on_flr = config, on_flr
        self.offset = config.add_capability(
            CAP_ID_EXPRESS, EXPRESS_SIZE, _fields(spec), prefix="express", at=spec.at, place=spec.place
        )
        if spec.flr:
            config.on_write("express.device_control", self._device_controlled)
        if spec.slot is not None:
            config.on_write("express.slot_control", self._slot_controlled)

    @property
    def type(self) -> PortType:
        """What the function is, where it is plugged."""
        return PortType((self._config.get("express.capabilities") & _TYPE) >> _TYPE_SHIFT)

    def plugged_into(self, *, root_complex: bool) -> None:
        """An endpoint shows where it is: on a root bus it is integrated into the root complex."""
        if self.spec.type is PortType.ENDPOINT:
            type_ = PortType.ROOT_COMPLEX_ENDPOINT if root_complex else PortType.ENDPOINT
            word = self._config.get("express.capabilities") & ~_TYPE
            self._config.set("express.capabilities", word | type_ << _TYPE_SHIFT)

    @property
    def link(self) -> int:
        """Speed and width of the link now."""
        return self._config.get("express.link_status") & LNK_SPEED_WIDTH

    def populated(self, link: int | None, *, occupied: bool, detected: bool = False) -> None:
        """What is behind the port has changed: ``link`` is its speed and width, None for the port's own; whether there
        is anything, and whether the port says so. The slot's power follows."""
        seen = occupied and detected
        active = LNKSTA_ACTIVE if seen else 0
        self._config.set("express.link_status", (self.spec.idle_link if link is None else link) | active)
        if self.spec.slot is not None:
            status = self._config.get("express.slot_status") & ~SLTSTA_PRESENT
            self._config.set("express.slot_status", status | (SLTSTA_PRESENT if seen else 0))
            control = self._config.get("express.slot_control") & ~SLTCTL_POWER_OFF
            self._config.set("express.slot_control", control | (0 if occupied else self.spec.power_off))

    @property
    def slot_interrupt(self) -> bool:
        """Whether an event of the slot waits that is to interrupt."""
        control, status = self._config.get("express.slot_control"), self._config.get("express.slot_status")
        return bool(control & SLTCTL_INTERRUPT and control & status & SLTCTL_EVENTS)

    def _device_controlled(self) -> None:
        control = self._config.get("express.device_control")
        if control & DEVCTL_FLR:
            self._config.set("express.device_control", control & ~DEVCTL_FLR)
            self._on_flr()

    def _slot_controlled(self) -> None:
        """Every write of the slot control register is a command, and is done at once."""
        control, status = self._config.get("express.slot_control"), self._config.get("express.slot_status")
        if control & SLTCTL_INTERLOCK:
            self._config.set("express.slot_control", control & ~SLTCTL_INTERLOCK)
            status ^= SLTSTA_INTERLOCK
        self._config.set("express.slot_status", status | SLTSTA_COMMAND_COMPLETED)
