"""The hypercalls that both sides of the platform answer: return codes, opcodes and limits.

A guest's H_*_TCE are served by the machine model (:mod:`vfio_model.iommu.spapr`) or, with in-kernel acceleration, by
the host (:mod:`vfio_model.host.kvm`). Sources: LoPAPR ("Hypervisor Call Functions") and Linux
``arch/powerpc/include/asm/hvcall.h``.
"""

from __future__ import annotations

from enum import IntEnum


class HReturn(IntEnum):
    """Hypercall return codes (LoPAPR "Hypervisor Call Return Codes"); signed."""

    H_SUCCESS = 0
    H_BUSY = 1
    H_HARDWARE = -1
    H_FUNCTION = -2
    H_PRIVILEGE = -3
    H_PARAMETER = -4
    H_RESOURCE = -16
    H_P2 = -55
    H_P3 = -56
    H_P4 = -57
    H_P5 = -58
    H_TOO_HARD = 9999
    """Internal to the host: "let user space do it". A guest never sees it."""


class HCall(IntEnum):
    """Hypercall opcodes."""

    H_GET_TCE = 0x1C
    H_PUT_TCE = 0x20
    H_RTAS = 0xF000
    """QEMU's own: the RTAS blob calls back with the address of the argument buffer."""
    H_STUFF_TCE = 0x138
    H_PUT_TCE_INDIRECT = 0x13C


def hcall_name(nr: int) -> str:
    """The name of an opcode, for a person."""
    try:
        return HCall(nr).name
    except ValueError:
        return f"hcall({nr:#x})"


MULTI_TCE = frozenset({HCall.H_STUFF_TCE, HCall.H_PUT_TCE_INDIRECT})
"""The calls that exist only where ``hcall-multi-tce`` is advertised."""
INDIRECT_MAX_TCES = 512
"""Entries in the list page of one H_PUT_TCE_INDIRECT."""
INDIRECT_LIST_ALIGN = 4096
