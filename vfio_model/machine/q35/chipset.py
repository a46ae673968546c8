"""The functions that are part of a q35 machine: memory controller hub, LPC bridge, AHCI, SMBus.

They are there so that firmware and kernels find their configuration space as on QEMU. The hub's ECAM and PAM
registers and the LPC bridge's interrupt routes and chipset configuration work. What does not: SMRAM and TSEG hide no
memory; the LPC bridge's ACPI registers decode no ports; the registers of AHCI and of the SMBus controller read zero.

Intel 3 Series Express Chipset Family datasheet; Intel I/O Controller Hub 9 datasheet. As on QEMU, registers that are
not named here keep what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from vfio_model.machine.q35 import regs
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.config_space import Field
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice
from vfio_model.pci.msi import CONTROL_64BIT, MsiCapability
from vfio_model.ranges import U32_MAX
from vfio_model.vmstate.fields import VMStateDescription

INTEL = 0x8086
SATA_CAPABILITY, SATA_CAPABILITY_ID = 0xA8, 0x12
MSI_OFFSET = 0x80


def _kept(name: str, offset: int, width: int, reset: int) -> Field:
    """A register that keeps what is written until a reset."""
    return Field(name, offset, width, reset, (1 << 8 * width) - 1)


class Mch(PCIDevice):
    """The memory controller hub. ``on_pciexbar()`` and ``on_pam(number, value)`` are told when those registers may have
    changed."""

    VENDOR_ID, DEVICE_ID, CLASS_ID = INTEL, 0x29C0, 0x0600
    VMSTATE = VMStateDescription("mch", 1, (PARENT,))

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.on_pciexbar: Callable[[], None] = lambda: None
        self.on_pam: Callable[[int, int], None] = lambda number, value: None
        for field in (
            _kept("ext_tseg", regs.EXT_TSEG, 2, regs.EXT_TSEG_MBYTES),
            _kept("pciexbar", regs.PCIEXBAR, 8, regs.PCIEXBAR_RESET),
            _kept("smbase", regs.SMBASE, 1, 0),
            Field("smram", regs.SMRAM, 1, regs.SMRAM_RESET, regs.SMRAM_WRITABLE),
            Field("esmramc", regs.ESMRAMC, 1, regs.ESMRAMC_RESET, regs.ESMRAMC_WRITABLE),
        ):
            self.config.add(field)
        self.config.on_write("ext_tseg", self._tseg_written)
        self.config.on_write("pciexbar", lambda: self.on_pciexbar())

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Some registers have rules of their own."""
        smram, esmramc, smbase = (self.config.get(name) for name in ("smram", "esmramc", "smbase"))
        self.config.write(offset, size, value)
        self._lock_smram(smram, esmramc)
        if offset <= regs.SMBASE < offset + size:
            self._smbase_written(smbase)
        if offset < regs.PAM + regs.PAM_REGISTERS and offset + size > regs.PAM:
            self._show_pam()

    def _lock_smram(self, smram: int, esmramc: int) -> None:
        """D_LCK closes SMRAM, and takes all but D_CLS from software until a reset."""
        new = self.config.get("smram")
        if smram & regs.SMRAM_LOCK:
            new = smram & ~regs.SMRAM_CLOSED | new & regs.SMRAM_CLOSED
            self.config.set("esmramc", esmramc)
        self.config.set("smram", new & ~regs.SMRAM_OPEN if new & regs.SMRAM_LOCK else new)

    def _smbase_written(self, old: int) -> None:
        """QEMU's own register: asked with all ones it says that RAM at SMBASE can be had; then it can be locked."""
        new = self.config.get("smbase")
        if old == regs.SMBASE_LOCK:
            new = old
        elif old == regs.SMBASE_IN_RAM:
            new = regs.SMBASE_LOCK if new & regs.SMBASE_LOCK else old
        elif new == regs.SMBASE_QUERY:
            new = regs.SMBASE_IN_RAM
        elif new & regs.SMBASE_LOCK:
            new = regs.SMBASE_LOCK
        self.config.set("smbase", new)

    def _tseg_written(self) -> None:
        if self.config.get("ext_tseg") == regs.EXT_TSEG_QUERY:
            self.config.set("ext_tseg", regs.EXT_TSEG_MBYTES)

    def _show_pam(self) -> None:
        for number in range(regs.PAM_REGISTERS):
            self.on_pam(number, self.config.read(regs.PAM + number, 1))

    def reset_hold(self) -> None:
        """PAM registers stay as they are."""
        super().reset_hold()
        self.on_pciexbar()

    def import_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`PCIDevice`."""
        super().import_state(state)
        self.on_pciexbar()
        self._show_pam()


class Ich9Lpc(PCIDevice):
    """The LPC bridge. ``on_rcba`` is told of a new chipset configuration base."""

    VENDOR_ID, DEVICE_ID, CLASS_ID, REVISION = INTEL, 0x2918, 0x0601, 2
    VMSTATE = VMStateDescription("ICH9LPC", 1, (PARENT,))

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.on_rcba: Callable[[], None] = lambda: None
        self.config.multifunction = True
        self.config.add(Field("pmbase", regs.PMBASE, 4, regs.PMBASE_RESET, regs.PMBASE_WRITABLE))
        self.config.add(_kept("acpi_cntl", regs.ACPI_CNTL, 1, 0))
        for n, offset in enumerate(regs.PIRQ_ROUTE):
            self.config.add(_kept(f"pirq{n}_rout", offset, 1, regs.PIRQ_UNROUTED))
        self.config.add(_kept("rcba", regs.RCBA, 4, 0))
        self.config.on_write("rcba", lambda: self.on_rcba())

    def config_write(self, offset: int, size: int, value: int) -> None:
        """SMI_LOCK of GEN_PMCON_1 cannot be taken back."""
        locked = self.config.read(regs.GEN_PMCON_1, 1) & regs.SMI_LOCK
        self.config.write(offset, size, value)
        if locked:
            self.config.write(regs.GEN_PMCON_1, 1, self.config.read(regs.GEN_PMCON_1, 1) | locked)

    def route(self, pirq: int) -> int:
        """PIRQn_ROUT of ``pirq`` (0..7)."""
        return self.config.get(f"pirq{pirq}_rout")

    def reset_hold(self) -> None:
        """See :class:`PCIDevice`."""
        super().reset_hold()
        self.on_rcba()

    def import_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`PCIDevice`."""
        super().import_state(state)
        self.on_rcba()


class _Quiet(PCIDevice):
    """A function whose registers all read zero and keep nothing. ``KEPT``: its register in configuration space that a
    reset leaves alone, as QEMU does."""

    KEPT: ClassVar[str]

    def reset_hold(self) -> None:
        """All but that one."""
        kept = self.config.get(self.KEPT)
        super().reset_hold()
        self.config.set(self.KEPT, kept)

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """Zero."""
        return 0


class Ich9Ahci(_Quiet):
    """The SATA controller, in AHCI mode."""

    VENDOR_ID, DEVICE_ID, CLASS_ID, REVISION = INTEL, 0x2922, 0x0106, 2
    CLASS_PROG, INTERRUPT_PIN = 1, 1
    KEPT = "map"
    BARS = (BarSpec(4, 32, BarType.IO, access=(1, 4)), BarSpec(5, 4096, access=(1, 8)))
    VMSTATE = VMStateDescription("ich9_ahci", 1, (PARENT,))

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.config.multifunction = True
        self.config.add_capability(
            SATA_CAPABILITY_ID,
            8,
            (Field("revision", 2, 2, 0x0010), Field("bar", 4, 4, 0x48)),
            prefix="sata",
            place=(SATA_CAPABILITY, 0),
        )

    def _make_msi(self) -> MsiCapability | None:
        self.config.add(Field("capability_pointer", 0x34, 1, MSI_OFFSET))
        self.config.add(Field("map", 0x90, 1, 0x40, 0xFF))
        return MsiCapability(self.config, 1, layout=CONTROL_64BIT, place=(MSI_OFFSET, SATA_CAPABILITY))


class Ich9Smbus(_Quiet):
    """The SMBus controller."""

    VENDOR_ID, DEVICE_ID, CLASS_ID, REVISION = INTEL, 0x2930, 0x0C05, 2
    INTERRUPT_PIN = 1
    KEPT = "hostc"
    BARS = (BarSpec(4, 64, BarType.IO, access=(1, 4)),)
    VMSTATE = VMStateDescription("ich9_smb", 1, (PARENT,))

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.config.multifunction = True
        self.config.add(Field("hostc", 0x40, 4, 0, U32_MAX & ~0x8))
