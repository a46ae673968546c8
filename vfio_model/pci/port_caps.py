"""Capabilities of bridges that are registers and nothing more: subsystem, advanced errors, access control, slot number,
power management. No hardware error ever happens here, so status registers stay zero.

PCI-to-PCI Bridge Architecture Specification, 13.3 ("Slot Numbering") and the subsystem capability of its appendix; PCI
Express Base Specification, 7.8.4 ("Advanced Error Reporting") and 7.7.11 ("Access Control Services"); PCI Power
Management Specification, 3.2. Reset values and write masks are QEMU's.
"""

from __future__ import annotations

from vfio_model.pci.config_space import ConfigSpace, Field

CAP_ID_PM, CAP_ID_SLOT, CAP_ID_SUBSYSTEM = 0x01, 0x04, 0x0D
CAP_ID_AER, CAP_ID_ACS = 0x01, 0x0D
SLOT_FIRST_IN_CHASSIS = 0x20
_AER_ERRORS = 0x03FF_F030
_AER_CORRECTABLE = 0xF1C1
_AER_ECRC_CAPABLE, _AER_ECRC_ENABLE = 0x0A0, 0x140
_AER_SEVERAL_HEADERS_CAPABLE, _AER_SEVERAL_HEADERS_ENABLE = 0x200, 0x400
_AER_MESSAGE = 0xF800_0000
"""Which message reports errors."""
ACS_SERVICES = 0x005F


def add_subsystem(config: ConfigSpace, vendor: int, device: int, place: tuple[int, int]) -> None:
    """Subsystem ids, which a type 1 header has no room for."""
    fields = Field("vendor", 4, 2, vendor), Field("device", 6, 2, device)
    config.add_capability(CAP_ID_SUBSYSTEM, 8, fields, prefix="subsystem", place=place)


def add_slot_number(config: ConfigSpace, chassis: int, place: tuple[int, int]) -> None:
    """Which chassis the secondary bus is; the guest may renumber it."""
    fields = Field("slots", 2, 1, SLOT_FIRST_IN_CHASSIS), Field("chassis", 3, 1, chassis, 0xFF)
    config.add_capability(CAP_ID_SLOT, 4, fields, prefix="slot", place=place)


def add_power_management(config: ConfigSpace, place: tuple[int, int]) -> None:
    """D0 alone: no state can be chosen."""
    fields = Field("capabilities", 2, 2, 3), Field("control", 4, 2), Field("data", 6, 2)
    config.add_capability(CAP_ID_PM, 8, fields, prefix="pm", place=place)


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
