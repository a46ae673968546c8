"""Where this unit differs from QEMU's ``intel-iommu`` on purpose, as data.

A quirk that can be *selected* (``quirks=qemu``, or its name) makes the unit do what QEMU does; the others are listed so
that a comparison can leave them out and say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vfio_model.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Quirk:
    """One difference from QEMU of ``versions``. ``selectable``: whether the unit can do as QEMU does."""

    name: str
    versions: str
    here: str
    there: str
    reason: str
    selectable: bool = False


NO_FAULT_ON_HIT: Final = "no-fault-on-hit"
IOTLB_BY_SOURCE: Final = "iotlb-by-source"
COMPATIBILITY_FORMAT: Final = "compatibility-format"
SVT_BUS_SWAPPED: Final = "svt-bus-swapped"
FPD_WHEN_PRESENT: Final = "fpd-when-present"
FS1GP_IGNORED: Final = "fs1gp-ignored"
FLAGS_SET_ONCE: Final = "flags-set-once"
ALL_ONES_UNREADABLE: Final = "all-ones-unreadable"
PASID_CHECKED_ONCE: Final = "pasid-checked-once"
PASS_THROUGH_LINGERS: Final = "pass-through-lingers"
GOES_ON_AFTER_FAULT: Final = "goes-on-after-fault"
PLATFORM_WITHOUT_SOURCE: Final = "platform-without-source"
WAIT_INTERRUPT_ANYWAY: Final = "wait-interrupt-anyway"
ALL: Final = "qemu"
"""Selects every selectable quirk."""

QUIRKS: Final = (
    Quirk(
        NO_FAULT_ON_HIT,
        "2.2 to 11.1",
        "an access that a cached translation does not permit is walked again, and its fault is recorded",
        "it is blocked, and no fault is recorded",
        "a fault is recorded for every blocked request (7.1), whatever is cached",
        selectable=True,
    ),
    Quirk(
        IOTLB_BY_SOURCE,
        "2.2 to 11.1",
        "cached translations are tagged with the domain: a device that is moved to another domain does not use those "
        "of the old one",
        "they are tagged with the requester ID, and a changed context entry goes on with the old ones until they are "
        "invalidated",
        "the tags of 6.2.4",
        selectable=True,
    ),
    Quirk(
        COMPATIBILITY_FORMAT,
        "2.7 to 11.1",
        "GCMD.CFI sets GSTS.CFIS, without which, or with EIME, compatibility format interrupts are blocked (0x25) "
        "while interrupt remapping is on",
        "CFI has no effect, and these interrupts pass",
        "5.1.2.1, Interrupt Requests in Intel 64 Compatibility Format",
        selectable=True,
    ),
    Quirk(
        SVT_BUS_SWAPPED,
        "2.7 to 11.1",
        "an interrupt remapping entry with SVT=2 has the first bus in SID bits 15:8 and the last in 7:0",
        "the last bus is in 15:8 and the first in 7:0",
        "9.9, Source Identifier",
        selectable=True,
    ),
    Quirk(
        FPD_WHEN_PRESENT,
        "11.1",
        "FPD of a PASID directory entry or PASID entry counts even if the entry is not present or not valid",
        "it counts in good entries only",
        "hardware looks at FPD irrespective of the present bit (9.5, 9.6)",
        selectable=True,
    ),
    Quirk(
        FS1GP_IGNORED,
        "11.1",
        "without 1 GiB first-stage pages (fs1gp=off) a leaf of that size has a reserved bit set",
        "it translates",
        "9.7, Page Size bit of a first-stage page-directory-pointer entry",
        selectable=True,
    ),
    Quirk(
        PASS_THROUGH_LINGERS,
        "11.1",
        "a PASID-cache invalidation ends the pass-through of a function whose PASID entry is gone",
        "it does if the entry differs from the one that was first found present, and the invalidation names the domain "
        "of that; else the next context-cache invalidation does",
        "6.5.2.4, PASID-cache Invalidate Descriptor",
        selectable=True,
    ),
    Quirk(
        FLAGS_SET_ONCE,
        "10.0 to 11.1",
        "a write sets the accessed and the dirty flag of its first-stage leaf, whichever is set, and whatever is "
        "cached",
        "a walk sets both if neither is set, else none of them, and a cached translation sets none: the leaf of a page "
        "that was read first never becomes dirty",
        "3.6.2, Accessed and Dirty Flags: before a write the dirty flag is set",
        selectable=True,
    ),
    Quirk(
        ALL_ONES_UNREADABLE,
        "2.2 to 11.1",
        "a paging entry of all ones has reserved bits set (0xc, 0x72)",
        "it counts as one that cannot be read (0x7 and 0x70, 0x3 and 0x73 at the top)",
        "7.1, Fault Conditions: reserved fields of a paging entry",
        selectable=True,
    ),
    Quirk(
        PASID_CHECKED_ONCE,
        "11.1",
        "each walk looks whether PASID directory and table entry are present and good",
        "that is looked at when a context entry is cached; later walks use a PASID table entry that is not present, "
        "and with FPD in context or directory entry any entry, zeroes for one that cannot be read",
        "what is not present does not translate (9.5, 9.6)",
        selectable=True,
    ),
    Quirk(
        WAIT_INTERRUPT_ANYWAY,
        "2.2 to 11.1",
        "a wait descriptor whose status cannot be written is an error (IQE) and nothing more",
        "it is an error, and its completion interrupt is sent all the same",
        "6.5.2.8: the interrupt says that the wait is complete",
        selectable=True,
    ),
    Quirk(
        GOES_ON_AFTER_FAULT,
        "2.2 to 11.1",
        "an access that spans pages ends at the first one that is blocked: nothing behind it moves, the rest of a read "
        "is zero, and there is one fault",
        "it goes on with the next page, which moves or has a fault of its own",
        "a device that was told of a failed request makes no more of them",
        selectable=True,
    ),
    Quirk(
        PLATFORM_WITHOUT_SOURCE,
        "11.1",
        "interrupts of the I/O APIC have its source ID, which entries verify and faults show",
        "they have none: 0xffff, and every entry takes them",
        "5.1.5, Interrupt Source Verification",
        selectable=True,
    ),
    Quirk(
        "message-requester",
        "11.1",
        "an interrupt request is its function's, however the write came about",
        "only message interrupts of PCI devices are: other writes to the interrupt range have no source (0xffff, every "
        "entry takes them), those of iommu-testdev source 0",
        "5.1.5, Interrupt Source Verification",
    ),
    Quirk(
        "page-request-descriptor",
        "11.1",
        "the page request descriptor has its exec bit, and no private data",
        "the exec bit is never set, and the last 16 bytes are whatever was in memory",
        "7.4.1, Page Request Descriptor",
    ),
)


def selected(names: Iterable[str]) -> frozenset[str]:
    """The quirks that ``names`` select: names of quirks, or :data:`ALL`.

    :raise ConfigError: for a name that selects nothing.
    """
    can = [each.name for each in QUIRKS if each.selectable]
    chosen: set[str] = set()
    for name in names:
        if name == ALL:
            chosen |= set(can)
        elif name in can:
            chosen.add(name)
        else:
            raise ConfigError(f"no quirk {name!r} can be selected", hint=f"known: {', '.join([ALL, *can])}")
    return frozenset(chosen)
