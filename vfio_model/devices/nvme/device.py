"""nvme: the PCI function around a controller: its registers, their reset, interrupts and properties.

::

            CC.EN := 1, settings good                CC.SHN := 1 or 2
    disabled ───────────────────────► ready ──────────────────────► shut down (CSTS.SHST = 2), still ready
       ▲   ╲  settings bad              │ an entry of a queue cannot be reached
       │    ╲────────► failed ◄─────────┘
       └───────────────────────────────── CC.EN := 0 (or a PCI reset) from anywhere

Section references are to NVM Express Base Specification 1.4.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from vfio_model.backends.opening import open_block
from vfio_model.devices.nvme import migration, regs
from vfio_model.devices.nvme.controller import Controller, Identity, Limits
from vfio_model.devices.nvme.engine import Engine
from vfio_model.devices.nvme.host_memory import HostMemory
from vfio_model.devices.nvme.interrupts import Interrupts
from vfio_model.devices.nvme.namespace import BLOCK_SHIFTS, Namespace
from vfio_model.devices.nvme.queues import CompletionQueue, Queues, SubmissionQueue
from vfio_model.devices.register_file import RegisterFile
from vfio_model.errors import ConfigError
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.device import DeviceHost, PCIDevice, Prop
from vfio_model.pci.express import ExpressSpec
from vfio_model.pci.msix import MsixSpec
from vfio_model.pci.power import PowerSpec
from vfio_model.ranges import U32_MAX
from vfio_model.vmstate.fields import State

MODEL, FIRMWARE = "vfio-model NVMe", "1.0"
SERIAL_SIZE = 20
MAX_MDTS = 16
DEFAULT_VECTORS = 65


class NvmeDevice(PCIDevice):
    """An NVM Express controller with one namespace, whose identity is that of QEMU's ``nvme`` (1b36:0010)."""

    VENDOR_ID = regs.VENDOR_ID
    DEVICE_ID = regs.DEVICE_ID
    REVISION = regs.REVISION
    CLASS_ID = regs.CLASS_ID
    CLASS_PROG = regs.CLASS_PROG
    INTERRUPT_PIN = 1
    BARS = (BarSpec(0, regs.BAR_SIZE, BarType.MEM64),)
    MSIX = MsixSpec(DEFAULT_VECTORS, 0, regs.MSIX_TABLE, regs.MSIX_PBA)
    EXPRESS = ExpressSpec(flr=True, at=regs.EXPRESS_CAPABILITY)
    POWER = PowerSpec(at=regs.POWER_CAPABILITY)
    PROPS = {
        "drive": Prop(str, "", "the namespace: mem:SIZE, file:PATH[,ro]; 64 MiB in memory unless given"),
        "serial": Prop(str, "vfio-model", "serial number, at most 20 characters"),
        "logical_block_size": Prop(int, 512, "bytes of a block, 512 or 4096, until the namespace is formatted"),
        "max_ioqpairs": Prop(int, 64, f"pairs of I/O queues, 1 to {regs.MAX_QUEUES - 1}"),
        "msix_qsize": Prop(int, DEFAULT_VECTORS, f"MSI-X vectors, 1 to {regs.MAX_VECTORS}"),
        "mdts": Prop(int, 7, "largest transfer, as log2 of 4 KiB pages; 0 is no limit"),
    }
    VMSTATE = migration.NVME

    def __init__(self, host: DeviceHost, **props: object) -> None:
        vectors = props.get("msix_qsize", DEFAULT_VECTORS)
        if isinstance(vectors, int):
            _check("msix_qsize", vectors, 1, regs.MAX_VECTORS)
            self.MSIX = MsixSpec(vectors, 0, regs.MSIX_TABLE, regs.MSIX_PBA)
        super().__init__(host, **props)
        self._make_controller()
        self._cc = 0
        """The configuration that was acted upon."""
        registers = self.registers = RegisterFile(regs.REGISTERS)
        registers.on_write(regs.INTMS, lambda _, value: self._set_mask(self.controller.interrupts.mask | value))
        registers.on_write(regs.INTMC, lambda _, value: self._set_mask(self.controller.interrupts.mask & ~value))
        registers.on_write(regs.CC, self._configure)
        registers.on_read(regs.CSTS, lambda value: value | (regs.CSTS_CFS if self.controller.failed else 0))

    def _make_controller(self) -> None:
        limits = Limits(
            _check("max_ioqpairs", self.props["max_ioqpairs"], 1, regs.MAX_QUEUES - 1),
            self.MSIX.vectors,
            _check("mdts", self.props["mdts"], 0, MAX_MDTS),
        )
        serial = str(self.props["serial"])
        if len(serial) > SERIAL_SIZE or not serial.isascii() or not serial.isprintable():
            raise ConfigError(f"serial {serial!r} is not {SERIAL_SIZE} printable ASCII characters at most")
        nqn = f"nqn.2026-11.org.vfio-model:{serial}"
        identity = Identity(self.VENDOR_ID, self.SUBSYSTEM_VENDOR_ID, serial, MODEL, FIRMWARE, nqn)
        queues, host = Queues(), self.host
        self.controller = Controller(
            identity, limits, HostMemory(self.dma), Interrupts(self, queues), queues, host.clock, host.trace
        )
        self.engine = Engine(self.controller, self.dma, self.run_when_idle)

    def realize(self) -> None:
        """:raise ConfigError: when the disk cannot be opened or holds no whole number of blocks."""
        block = self.props["logical_block_size"]
        assert isinstance(block, int), "checked against PROPS"
        shift = block.bit_length() - 1
        if shift not in BLOCK_SHIFTS or block != 1 << shift:
            raise ConfigError(f"logical_block_size is {block}", hint="512 or 4096")
        disk = open_block(self.host, str(self.props["drive"]))
        if disk.size < 4096 or disk.size & 4095:
            disk.close()
            raise ConfigError(f"a disk of {disk.size} bytes", where="drive", hint="a multiple of 4096 bytes")
        identifier = uuid.uuid5(uuid.NAMESPACE_URL, self.controller.identity.nqn).bytes
        self.controller.namespaces[1] = Namespace(1, disk, shift, identifier)

    def unrealize(self) -> None:
        """Stop, and give the disk back."""
        self._disable()
        for namespace in self.controller.namespaces.values():
            namespace.disk.close()

    @property
    def vectors(self) -> int:
        """How many interrupt vectors a completion queue may choose from now."""
        return self.controller.limits.vectors if self.uses_msi else 1

    # -- registers -----------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A register or part of one; 0 where there is none. Doorbells read as 0."""
        return self.registers.read(offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """Registers, or whole doorbells; anything else is ignored."""
        if offset < regs.DOORBELLS:
            self.registers.write(offset, size, value)
        elif offset < regs.MSIX_TABLE and size >= 4 and not offset & 3:
            for at in range(0, size, 4):
                self.engine.ring((offset + at - regs.DOORBELLS) >> 2, value >> 8 * at & U32_MAX)
        return MemTxResult.OK

    def _set_mask(self, mask: int) -> None:
        self.registers[regs.INTMS] = self.registers[regs.INTMC] = mask
        self.controller.interrupts.set_mask(mask)

    # -- life of the controller (sections 7.3, "Resets", and 7.6, "Controller Initialization and Shutdown Processing")

    def _configure(self, _offset: int, _value: int) -> None:
        """CC was written."""
        old, new = self._cc, self.registers[regs.CC]
        if regs.CC_EN.of(old):
            new = new & ~regs.CC_WHILE_DISABLED | old & regs.CC_WHILE_DISABLED
        self._cc = self.registers[regs.CC] = new
        self.controller.entry_sizes = regs.CC_IOSQES.of(new), regs.CC_IOCQES.of(new)
        if not regs.CC_EN.of(new):
            if regs.CC_EN.of(old):
                self._disable()
        elif not regs.CC_EN.of(old):
            self._enable(new)
        if regs.CC_SHN.of(new) and not regs.CC_SHN.of(old):
            self._shut_down()

    def _enable(self, cc: int) -> None:
        trace, registers = self.host.trace, self.registers
        page_shift = regs.MIN_PAGE_SHIFT + regs.CC_MPS.of(cc)
        aqa = registers[regs.AQA]
        sq_size, cq_size = regs.AQA_ASQS.of(aqa) + 1, regs.AQA_ACQS.of(aqa) + 1
        if regs.CC_CSS.of(cc) or regs.CC_AMS.of(cc) or page_shift > regs.MAX_PAGE_SHIFT or min(sq_size, cq_size) < 2:
            self.controller.failed = True
            if trace.enabled:
                trace("pci_nvme_err_startfail", cc=cc, aqa=aqa)
            return
        controller = self.controller
        controller.memory.page_size = 1 << page_shift
        cq = CompletionQueue(0, self._address(regs.ACQ), cq_size)
        controller.queues.add_completion(cq)
        controller.queues.add_submission(SubmissionQueue(0, self._address(regs.ASQ), sq_size, cq))
        registers[regs.CSTS] = regs.CSTS_RDY
        if trace.enabled:
            trace("pci_nvme_mmio_start_success")

    def _address(self, offset: int) -> int:
        return self.registers[offset] | self.registers[offset + 4] << 32

    def _disable(self) -> None:
        """A controller level reset. The admin queue's registers stay (section 7.3.2)."""
        self.engine.stop()
        self.controller.reset()
        self.registers[regs.CSTS] = 0
        self.registers[regs.INTMS] = self.registers[regs.INTMC] = 0
        if self.host.trace.enabled:
            self.host.trace("pci_nvme_mmio_stopped")

    def _shut_down(self) -> None:
        for namespace in self.controller.namespaces.values():
            try:
                namespace.disk.flush()
            except OSError:
                self.controller.health.media_errors += 1
        csts = self.registers[regs.CSTS] & ~regs.CSTS_SHST.at(0x3)
        self.registers[regs.CSTS] = csts | regs.CSTS_SHST.at(regs.SHST_COMPLETE)
        if self.host.trace.enabled:
            self.host.trace("pci_nvme_mmio_shutdown_cleared")

    # -- PCI reset and migration ---------------------------------------------------------------------------------

    def reset_enter(self) -> None:
        """Commands that wait are gone."""
        self._disable()
        super().reset_enter()

    def reset_hold(self) -> None:
        """Registers go to their reset values, those of the admin queue too."""
        super().reset_hold()
        self.registers.reset()
        self._cc = 0

    def export_state(self) -> State:
        """Registers, queues and settings. Nothing is in flight between two accesses; the disk is not migrated."""
        return {**super().export_state(), **migration.export(self.registers, self.controller)}

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """See :func:`migration.check`."""
        super().check_state(state, where=where)
        migration.check(self.registers, self.controller, state, where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same; commands that waited are carried out when the device runs."""
        migration.load(self.registers, self.controller, state)
        self._cc = self.registers[regs.CC]
        super().import_state(state)
        self.controller.interrupts.update_pin()
        self.engine.resume()


def _check(name: str, value: object, low: int, high: int) -> int:
    assert isinstance(value, int), "checked against PROPS"
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}", hint=f"{low} to {high}")
    return value
