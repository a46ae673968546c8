"""A PCI device of the guest whose behaviour is at the other end of a :class:`~vfio_model.vfio.region.DeviceConnection`.

What the guest sees is put together as ``vfio-pci`` does it: identity, BAR sizes and the MSI capability are read
from the device once; BAR addresses, the message's address and data, and the interrupt line are the guest side's
own, because the device's have no meaning there; the command and status registers are both: emulated here, and
written through, so that the device knows whether it may be a bus master. BAR accesses go to the device's regions.

INTx is signalled once and masks itself; the first BAR access after it takes the pin down and unmasks, and a device
that still wants service signals again (QEMU's ``vfio_intx_eoi``). A device that is gone reads as all ones, writes
to it are lost, its pin is down: a surprise removal. :meth:`VFIOPCIDevice.reconnect` puts a freshly opened device
in its place, under the configuration that the guest had given to the old one.

What takes bus mastering away (the command register, unplugging) returns when the device has taken it: no DMA of its
lands after that. What a device refuses (a reset, its interrupts) is traced and costs nobody else anything.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vfio_model.errors import PeerLost
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BARS, BarSpec, BarType
from vfio_model.pci.config_space import (
    CAPABILITY_POINTER,
    CLASS_DEVICE,
    COMMAND,
    COMMAND_MASTER,
    CONFIG_SIZE,
    DEVICE_ID,
    INTERRUPT_PIN,
    REVISION_ID,
    STATUS,
    STATUS_CAP_LIST,
    SUBSYSTEM_ID,
    SUBSYSTEM_VENDOR_ID,
    VENDOR_ID,
)
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice
from vfio_model.pci.msi import CAP_ID_MSI, CONTROL_MULTIPLE_CAPABLE_SHIFT
from vfio_model.uapi.vfio import PciIrq, PciRegion
from vfio_model.vfio.region import DeviceConnection
from vfio_model.vmstate.fields import VMStateDescription

_CONFIG: Final = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
_INTX: Final = int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX)
_MSI: Final = int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX)
_MAX_CAPABILITIES = 48
"""More than fit into configuration space: where a list with a loop ends."""


class DeviceFacts:
    """What a device says about itself: its configuration space and BARs."""

    def __init__(self, connection: DeviceConnection) -> None:
        """:raise OSError: when the device is not one that can be shown as a PCI function (a broken BAR or MSI size)."""
        raw = b"".join(connection.region_read(_CONFIG, offset, 64) for offset in range(0, CONFIG_SIZE, 64))
        self._raw = raw
        self.bars = tuple(self._bars(connection))

    def word(self, offset: int) -> int:
        """The 16-bit register at ``offset``."""
        return int.from_bytes(self._raw[offset : offset + 2], "little")

    def byte(self, offset: int) -> int:
        """The 8-bit register at ``offset``."""
        return self._raw[offset]

    def _bars(self, connection: DeviceConnection) -> list[BarSpec]:
        found: list[BarSpec] = []
        index = 0
        while index < BARS:
            size = connection.get_region_info(index).size
            low = self._raw[0x10 + 4 * index]
            kind = BarType.IO if low & 1 else BarType.MEM64 if low & 6 == 4 else BarType.MEM32
            if size:
                try:
                    found.append(BarSpec(index, size, kind, bool(low & 8) and kind is not BarType.IO))
                except AssertionError as error:
                    raise OSError(errno.EINVAL, f"BAR {index} of {size} bytes: {error}") from error
            index += 2 if kind is BarType.MEM64 and size else 1
        return found

    @property
    def msi_vectors(self) -> int:
        """How many messages the MSI capability offers; 0 without one."""
        if not self.word(STATUS) & STATUS_CAP_LIST:
            return 0
        at = self._raw[CAPABILITY_POINTER] & 0xFC
        for _ in range(_MAX_CAPABILITIES):
            if at < 0x40:
                break
            if self._raw[at] == CAP_ID_MSI:
                return 1 << min(self.word(at + 2) >> CONTROL_MULTIPLE_CAPABLE_SHIFT & 7, 5)
            at = self._raw[at + 1] & 0xFC
        return 0


class VFIOPCIDevice(PCIDevice):
    """``connection`` as a function of the guest's bus. ``name`` is the guest's id of it, for the trace."""

    VMSTATE = VMStateDescription("vfio-pci", 1, (PARENT,))

    def __init__(self, host: DeviceHost, connection: DeviceConnection, *, name: str) -> None:
        """:raise OSError: as :class:`DeviceFacts`. :raise PeerLost: the device went away meanwhile."""
        facts = DeviceFacts(connection)
        self.VENDOR_ID, self.DEVICE_ID = facts.word(VENDOR_ID), facts.word(DEVICE_ID)
        self.REVISION, self.CLASS_ID = facts.byte(REVISION_ID), facts.word(CLASS_DEVICE)
        self.SUBSYSTEM_VENDOR_ID, self.SUBSYSTEM_ID = facts.word(SUBSYSTEM_VENDOR_ID), facts.word(SUBSYSTEM_ID)
        self.INTERRUPT_PIN = facts.byte(INTERRUPT_PIN) if facts.byte(INTERRUPT_PIN) <= 4 else 0
        self.BARS = facts.bars
        self.MSI_VECTORS = facts.msi_vectors
        self.name = name
        self.connection = connection
        self.dead: PeerLost | None = None
        """Why the device is gone; None while it answers."""
        self.irqs = 0
        """Interrupts that the device has signalled."""
        self._vectors_set = -1
        super().__init__(host)
        if self.msi is not None:
            self.config.on_write("msi.control", self._irqs_written)

    # -- life ----------------------------------------------------------------------------------------------------

    def realize(self) -> None:
        """Let the device signal its pin."""
        with self._surviving():
            self._set_irqs()

    def unrealize(self) -> None:
        """Stop the device's DMA, then close the device file."""
        with self._surviving():
            if self.dead is None:
                command = self.config.get("command") & ~COMMAND_MASTER
                self.connection.region_write(_CONFIG, COMMAND, command.to_bytes(2, "little"))
                self._settle()
        with self._surviving():
            self.connection.close()

    def lost(self, error: PeerLost) -> None:
        """The device is gone; whoever notices says so. Harmless twice."""
        if self.dead is None:
            self.dead = error
            self.host.trace("vfio_device_lost", name=self.name, reason=str(error))
            self.lower_irq()

    def reconnect(self, connection: DeviceConnection) -> None:
        """Go on with ``connection``, a device of the same kind that was just opened (and therefore reset).

        :raise PeerLost: it is gone again.
        """
        self.connection, self.dead = connection, None
        self._vectors_set = -1
        with self._surviving():
            self._set_irqs()
            self._forward(COMMAND, 2)
        if self.dead is not None:
            raise self.dead
        self.host.trace("vfio_device_reconnected", name=self.name)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except PeerLost as error:
            self.lost(error)

    @contextlib.contextmanager
    def _bearing(self, what: str) -> Iterator[None]:
        """Go on when the device refuses ``what``, or is gone."""
        try:
            with self._surviving():
                yield
        except OSError as error:
            self.host.trace("vfio_device_refused", name=self.name, what=what, reason=str(error))

    # -- configuration -------------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """All ones once the device is gone."""
        return (1 << size * 8) - 1 if self.dead is not None else super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Emulated, and written through where the device needs to know."""
        if self.dead is not None:
            return
        mastering = self.bus_master
        super().config_write(offset, size, value)
        if offset < COMMAND + 2 and offset + size > COMMAND:
            with self._surviving():
                self._forward(COMMAND, 2)
                if mastering and not self.bus_master:
                    self._settle()

    def _settle(self) -> None:
        """Return when the device has taken what was written to it: an answer of any kind comes after that."""
        with contextlib.suppress(OSError):
            self.connection.region_read(_CONFIG, COMMAND, 2)

    def _forward(self, offset: int, size: int) -> None:
        value = self.config.read(offset, size)
        self.connection.region_write(_CONFIG, offset, value.to_bytes(size, "little"))

    # -- BARs ----------------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """From the device's region, little-endian; all ones when it is gone, an error when it refuses."""
        if self.dead is None:
            try:
                self._end_of_interrupt()
                return int.from_bytes(self.connection.region_read(bar, offset, size), "little")
            except PeerLost as error:
                self.lost(error)
            except OSError:
                return None
        return (1 << size * 8) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """To the device's region; lost when the device is gone."""
        if self.dead is None:
            try:
                self.connection.region_write(bar, offset, value.to_bytes(size, "little"))
                self._end_of_interrupt()
            except PeerLost as error:
                self.lost(error)
            except OSError:
                return MemTxResult.ERROR
        return MemTxResult.OK

    # -- interrupts ----------------------------------------------------------------------------------------------

    def _signalled(self, vector: int) -> None:
        self.irqs += 1
        self.raise_irq(vector)

    def _end_of_interrupt(self) -> None:
        if self._intx:
            self.lower_irq()
            self.connection.unmask_irq(_INTX)

    def _irqs_written(self) -> None:
        with self._bearing("interrupts"):
            self._set_irqs()

    def _set_irqs(self) -> None:
        """Point the device's interrupts at this function: as many messages as the guest allocated, or the pin."""
        vectors = self.msi.allocated if self.msi is not None and self.msi.enabled else 0
        if vectors == self._vectors_set:
            return
        before, self._vectors_set = self._vectors_set, vectors
        if before > 0:
            self.connection.set_irqs(_MSI, ())
        elif before == 0 and self.INTERRUPT_PIN:
            self.connection.set_irqs(_INTX, ())
            self.lower_irq()
        if vectors:
            handlers = [functools.partial(self._signalled, vector) for vector in range(vectors)]
            self.connection.set_irqs(_MSI, handlers)
        elif self.INTERRUPT_PIN:
            self.connection.set_irqs(_INTX, (functools.partial(self._signalled, 0),))

    # -- migration -----------------------------------------------------------------------------------------------

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Configuration space as the guest left it; the device hears of what concerns it. Its own state is its own
        stream.
        """
        super().import_state(state)
        if self.dead is None:
            with self._bearing("migrated state"):
                self._set_irqs()
                self._forward(COMMAND, 2)

    # -- reset ---------------------------------------------------------------------------------------------------

    def reset_hold(self) -> None:
        """Reset the device behind the connection too; its DMA has stopped with it."""
        super().reset_hold()
        if self.dead is None:
            with self._bearing("reset"):
                self.connection.reset()
            with self._bearing("interrupts"):
                self._set_irqs()
                self._forward(COMMAND, 2)
