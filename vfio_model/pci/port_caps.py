"""Capabilities of bridges that are registers and nothing more: subsystem, advanced errors, access control, slot number,
power management. No hardware error ever happens here, so status registers stay zero.

PCI-to-PCI Bridge Architecture Specification, 13.3 ("Slot Numbering") and the subsystem capability of its appendix; PCI
Express Base Specification, 7.8.4 ("Advanced Error Reporting") and 7.7.11 ("Access Control Services"); PCI Power
Management Specification, 3.2. Reset values and write masks are QEMU's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.errors import ConfigError
from vfio_model.pci.config_space import ConfigSpace, Field
from vfio_model.pci.device import Prop
from vfio_model.pci.power import CAP_ID_PM, PM_SIZE, VERSION_1_2
from vfio_model.ranges import U32_MAX, U64_MAX

CAP_ID_SLOT, CAP_ID_SUBSYSTEM = 0x04, 0x0D
CAP_ID_VENDOR = 0x09
CAP_ID_AER, CAP_ID_ACS = 0x01, 0x0D
SLOT_FIRST_IN_CHASSIS = 0x20
_AER_ERRORS = 0x03FF_F030
_AER_CORRECTABLE = 0xF1C1
_AER_ECRC_CAPABLE, _AER_ECRC_ENABLE = 0x0A0, 0x140
_AER_SEVERAL_HEADERS_CAPABLE, _AER_SEVERAL_HEADERS_ENABLE = 0x200, 0x400
_AER_MESSAGE = 0xF800_0000
"""Which message reports errors."""
ACS_SERVICES = 0x005F
RESERVE_SIZE, RESERVE_TYPE = 0x20, 1
RESERVE_PROPS: Mapping[str, Prop] = {
    "bus-reserve": Prop(int, U32_MAX, "buses that firmware is to leave free behind it; all ones: as it likes"),
    "io-reserve": Prop(int, U64_MAX, "bytes of I/O space, the same"),
    "mem-reserve": Prop(int, U64_MAX, "bytes of memory space"),
    "pref32-reserve": Prop(int, U64_MAX, "bytes of prefetchable memory below 4 GiB"),
    "pref64-reserve": Prop(int, U64_MAX, "bytes of prefetchable memory"),
}


def add_subsystem(config: ConfigSpace, vendor: int, device: int, place: tuple[int, int]) -> None:
    """Subsystem ids, which a type 1 header has no room for."""
    fields = Field("vendor", 4, 2, vendor), Field("device", 6, 2, device)
    config.add_capability(CAP_ID_SUBSYSTEM, 8, fields, prefix="subsystem", place=place)


def add_slot_number(config: ConfigSpace, chassis: int, place: tuple[int, int]) -> None:
    """Which chassis the secondary bus is; the guest may renumber it."""
    fields = Field("slots", 2, 1, SLOT_FIRST_IN_CHASSIS), Field("chassis", 3, 1, chassis, 0xFF)
    config.add_capability(CAP_ID_SLOT, 4, fields, prefix="slot", place=place)


def add_reserve(config: ConfigSpace, props: Mapping[str, Any], first: int) -> None:
    """What firmware is to leave free behind the bridge, if that is said: QEMU's vendor-specific capability
    (``docs/pcie_pci_bridge.txt``), which is the first, before the one at ``first``.

    :raise ConfigError: they contradict each other, or are too large.
    """
    asked = {name: props[name] for name in RESERVE_PROPS}
    if all(value == RESERVE_PROPS[name].default for name, value in asked.items()):
        return
    if U64_MAX not in (asked["pref32-reserve"], asked["pref64-reserve"]):
        raise ConfigError("PCI resource reserve cap: PREF32 and PREF64 conflict")
    for name in "mem-reserve", "pref32-reserve":
        if U32_MAX < asked[name] < U64_MAX:
            raise ConfigError(f"PCI resource reserve cap: {name} must be less than 4G")
    places = {"bus-reserve": (4, 4), "io-reserve": (8, 8), "mem-reserve": (16, 4)}
    places |= {"pref32-reserve": (20, 4), "pref64-reserve": (24, 8)}
    fields = [Field("length", 2, 1, RESERVE_SIZE), Field("type", 3, 1, RESERVE_TYPE)]
    fields += [Field(name, at, size, asked[name] & (1 << 8 * size) - 1) for name, (at, size) in places.items()]
    place = config.free_capability, first
    config.set("cap_ptr", config.add_capability(CAP_ID_VENDOR, RESERVE_SIZE, fields, prefix="reserve", place=place))


def add_power_management(config: ConfigSpace, place: tuple[int, int]) -> None:
    """D0 alone: no state can be chosen."""
    fields = Field("capabilities", 2, 2, VERSION_1_2), Field("control", 4, 2), Field("data", 6, 2)
    config.add_capability(CAP_ID_PM, PM_SIZE, fields, prefix="pm", place=place)


def add_aer(config: ConfigSpace, *, several_headers: bool, root: bool = False) -> None:
    """Advanced error reporting at 0x100. ``root``: with the registers of a root port."""
    capable = _AER_ECRC_CAPABLE | (_AER_SEVERAL_HEADERS_CAPABLE if several_headers else 0)
    enable = _AER_ECRC_ENABLE | (_AER_SEVERAL_HEADERS_ENABLE if several_headers else 0)
    fields = (
        Field("uncorrectable_status", 0x04, 4, w1c=_AER_ERRORS),
        Field("uncorrectable_mask", 0x08, 4, 0x0240_0000, _AER_ERRORS),
        Field("uncorrectable_severity", 0x0C, 4, 0x0046_2030, _AER_ERRORS),
        Field("correctable_status", 0x10, 4, w1c=_AER_CORRECTABLE),
        Field("correctable_mask", 0x14, 4, 0xE000, _AER_CORRECTABLE),
        Field("control", 0x18, 4, capable, enable),
        Field("root_command", 0x2C, 4, writable=7 if root else 0),
        Field("root_status", 0x30, 4, w1c=0x7F if root else 0, volatile=_AER_MESSAGE if root else 0),
    )
    config.add_extended_capability(CAP_ID_AER, 2, 0x48, fields, prefix="aer")


def add_acs(config: ConfigSpace) -> None:
    """Access control services, behind the others."""
    fields = Field("capability", 4, 2, ACS_SERVICES), Field("control", 6, 2, writable=ACS_SERVICES)
    config.add_extended_capability(CAP_ID_ACS, 1, 8, fields, prefix="acs")
