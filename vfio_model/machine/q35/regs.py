"""Facts of the q35 machine: where things are, and what their registers hold.

Intel 3 Series Express Chipset Family datasheet (MCH: "DRAM Controller Registers (D0:F0)"); Intel I/O Controller Hub 9
datasheet (LPC bridge, "Chipset Configuration Registers", I/O APIC); where the platform may choose, QEMU's
``-machine q35``.
"""

from __future__ import annotations

from typing import NamedTuple

from vfio_model.ranges import U32_MAX, Range

GIB = 1 << 30
ABOVE_4G = 4 * GIB
LARGE_RAM = 0xB000_0000
"""RAM of so many bytes is split at :data:`LOW_RAM_SPLIT`; less of it is all below 4 GiB."""
LOW_RAM_SPLIT = 2 * GIB

IO_SIZE = 1 << 16
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
CONFIG_ENABLE = 1 << 31
RESET_CONTROL = 0xCF9
RESET_CPU = 0x04
RESET_CONTROL_KEPT = 0x0A

# -- MCH, 00:00.0

PCIEXBAR = 0x60
PCIEXBAR_RESET = 0xB000_0000
PCIEXBAR_ENABLE = 1
PCIEXBAR_BUSES = {0: 256, 1: 128, 2: 64}
"""Length field (bits 2:1) -> buses; 3 is reserved, and then all stays as it was."""
PCIEXBAR_ADDRESS = (1 << 36) - 1
"""Address bits that the register has."""
ECAM_BUS_SHIFT = 20
PAM = 0x90
PAM_REGISTERS = 7
PAM_RAM = 3
"""Either bit: accesses go to RAM; read and write enable are not told apart, as QEMU shows it to programs."""
PAM_BASE = 0xC_0000
PAM_UNIT = 0x4000
BIOS_BASE, BIOS_AREA = 0xF_0000, 0x1_0000
"""What PAM 0 decides about."""
SMBASE, SMBASE_QUERY, SMBASE_IN_RAM, SMBASE_LOCK = 0x9C, 0xFF, 0x01, 0x02
SMRAM, SMRAM_RESET = 0x9D, 0x02
SMRAM_LOCK, SMRAM_CLOSED, SMRAM_OPEN = 0x10, 0x20, 0x40
SMRAM_WRITABLE = 0x78
ESMRAMC, ESMRAMC_RESET, ESMRAMC_WRITABLE = 0x9E, 0x38, 0x87
EXT_TSEG, EXT_TSEG_QUERY, EXT_TSEG_MBYTES = 0x50, 0xFFFF, 64

# -- ICH9 LPC bridge, 00:1f.0

LPC_DEVFN, AHCI_DEVFN, SMBUS_DEVFN = 0xF8, 0xFA, 0xFB
PMBASE, PMBASE_RESET, PMBASE_WRITABLE = 0x40, 0x0001, 0xFF87
ACPI_CNTL = 0x44
PIRQ_ROUTE = (0x60, 0x61, 0x62, 0x63, 0x68, 0x69, 0x6A, 0x6B)
"""PIRQA to PIRQH."""
PIRQ_UNROUTED = 0x80
PIRQ_LINE = 0x0F
GEN_PMCON_1 = 0xA0
SMI_LOCK = 0x10
"""Once set, it stays."""
RCBA, RCBA_ENABLE = 0xF0, 1
RCBA_ADDRESS = U32_MAX & ~0x3FFF

CHIPSET_CONFIG_SIZE = 0x4000


class PinRoute(NamedTuple):
    """``offset`` of a DnnIR register in the chipset configuration, of device ``slot``; four bits for each pin, of which
    three are the PIRQ's number."""

    slot: int
    offset: int
    reset: int


PIN_ROUTES = (
    PinRoute(31, 0x3140, 0x3210),
    PinRoute(29, 0x3144, 0x3210),
    PinRoute(28, 0x3146, 0x3210),
    PinRoute(27, 0x3148, 0x3210),
    PinRoute(26, 0x314C, 0x3210),
    PinRoute(25, 0x3150, 0x3210),
)
PCI_BRIDGE_SLOT = 30
"""Its pins are PIRQE to PIRQH, in order."""
FIRST_FREE_PIRQ = 4
"""The other slots rotate over PIRQE to PIRQH."""

# -- interrupts

IOAPIC_BASE, IOAPIC_SIZE, IOAPIC_PINS = 0xFEC0_0000, 0x1000, 24
IOAPIC_SID = 0xFF00
"""The requester id of its messages, bus ff, 00.0."""
PIRQ_GSI = 16
"""GSI of PIRQA."""
MESSAGES = Range.sized(0xFEE0_0000, 0x10_0000)
MESSAGE_LINES = 0x100
"""A message with vector v is line ``MESSAGE_LINES + v`` of the machine's interrupt lines; below are GSIs."""
