"""e1000: behaviour, put together: the registers that belong to no unit, resets, the link, migration.

::

    power on, CTRL.RST ──► registers at their reset values, address from the EEPROM, units idle
    CTRL.PHY_RST, PHY reset or restart ──► link down ──► (negotiation) ──► link up: LSC

What is sent while the link is down is lost, and so is what comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.backends.net import NetBackend, NoNet
from vfio_model.backends.opening import open_net
from vfio_model.devices.e1000 import eeprom, phy, regs
from vfio_model.devices.e1000.eeprom import Eeprom, parse_mac
from vfio_model.devices.e1000.interrupts import Delay, Interrupts
from vfio_model.devices.e1000.phy import Phy
from vfio_model.devices.e1000.regs import Ctrl, CtrlExt, Interrupt, Mdic, Status
from vfio_model.devices.e1000.ring import Ring, RingRegisters
from vfio_model.devices.e1000.rx import Receiver
from vfio_model.devices.e1000.state import VMSTATE, check_state, export_state, import_state
from vfio_model.devices.e1000.statistics import Statistics
from vfio_model.devices.e1000.tx import Transmitter
from vfio_model.devices.register_file import OnRead, RegisterFile
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.device import DeviceHost, PCIDevice, Prop
from vfio_model.vmstate.fields import State

_RX_RING = RingRegisters(regs.RDBAL, regs.RDBAH, regs.RDLEN, regs.RDH, regs.RDT)
_TX_RING = RingRegisters(regs.TDBAL, regs.TDBAH, regs.TDLEN, regs.TDH, regs.TDT)


class E1000Device(PCIDevice):
    """QEMU's ``e1000``: an 82540EM (8086:100e)."""

    VENDOR_ID = regs.VENDOR_ID
    DEVICE_ID = regs.DEVICE_ID
    REVISION = regs.REVISION
    CLASS_ID = regs.CLASS_ID
    INTERRUPT_PIN = 1
    BARS = (BarSpec(0, regs.MEMORY_SIZE), BarSpec(1, regs.IO_SIZE, BarType.IO, access=(1, 4)))
    PROPS = {
        "mac": Prop(str, regs.MAC_DEFAULT, "its Ethernet address, six hexadecimal bytes"),
        "netdev": Prop(str, "", "the network it is on"),
    }
    VMSTATE = VMSTATE

    def __init__(self, host: DeviceHost, **props: object) -> None:
        """:raise ConfigError: for an address that is none."""
        super().__init__(host, **props)
        self.mac = parse_mac(str(self.props["mac"]))
        self.net: NetBackend = NoNet()
        self.registers = registers = RegisterFile(regs.REGISTERS)
        self.eeprom = Eeprom(
            eeprom.image(self.mac, self.DEVICE_ID, self.VENDOR_ID, self.SUBSYSTEM_ID, self.SUBSYSTEM_VENDOR_ID)
        )
        self.phy = Phy(host.clock, self._link_changed)
        self.statistics = Statistics(registers)
        self.interrupts = Interrupts(registers, host.clock, self.raise_irq, self.lower_irq)
        self.rx_delay = Delay(registers, host.clock, regs.RDTR, regs.RADV, self._received)
        self.tx_delay = Delay(registers, host.clock, regs.TIDV, regs.TADV, self._transmitted)
        self.rx = Receiver(
            registers,
            Ring(registers, _RX_RING, self.dma),
            self.dma,
            self.interrupts,
            self.rx_delay,
            self.statistics,
            host.trace,
        )
        self.tx = Transmitter(
            registers,
            Ring(registers, _TX_RING, self.dma),
            self.dma,
            self.interrupts,
            self.tx_delay,
            self.statistics,
            host.trace,
            self._send,
            self.run_when_idle,
        )
        self.io_address = 0
        self._connect()
        self._load_address()

    def _connect(self) -> None:
        registers = self.registers
        registers.on_read(regs.STATUS, lambda _: self.status)
        registers.on_read(regs.EECD, lambda _: self.eeprom.eecd())
        for low in regs.WIDE_STATISTICS:
            registers.on_read(low + 4, self._high_word(low))
        for offset, writer in {
            regs.CTRL: self._write_ctrl,
            regs.CTRL_EXT: self._write_ctrl_ext,
            regs.EECD: lambda _, value: self.eeprom.drive(value),
            regs.EERD: self._write_eerd,
            regs.MDIC: self._write_mdic,
            regs.RCTL: self._receive_again,
            regs.RDT: self._receive_again,
            regs.RDTR: self._write_rdtr,
            regs.TCTL: lambda _offset, _value: self.tx.run(),
            regs.TDT: self._write_tdt,
        }.items():
            registers.on_write(offset, writer)

    def realize(self) -> None:
        """Plug the cable in."""
        self.net = open_net(self.host, str(self.props["netdev"]), self._on_frame)

    def unrealize(self) -> None:
        """Pull it out; nothing is pending."""
        self.net.close()
        self._stop()
        self.registers[regs.TCTL] = 0

    # -- registers -----------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A register, or through the I/O window the one that IOADDR names."""
        if bar == 0:
            return self.registers.read(offset, size)
        at = offset & 3
        if offset - at == regs.IOADDR:
            return self.io_address >> at * 8 & (1 << size * 8) - 1
        if offset - at == regs.IODATA and self.io_address < regs.MEMORY_SIZE:
            return self.registers.read((self.io_address & ~3) + at, size)
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """The same."""
        at = offset & 3
        if bar == 0:
            self.registers.write(offset, size, value)
        elif offset == regs.IOADDR and size == 4:
            self.io_address = value
        elif offset - at == regs.IODATA and self.io_address < regs.MEMORY_SIZE:
            self.registers.write((self.io_address & ~3) + at, size, value)
        return MemTxResult.OK

    @property
    def link_up(self) -> bool:
        """Whether frames come and go: the PHY has a link, and the MAC looks at it (CTRL.SLU)."""
        return self.phy.link and bool(self.registers[regs.CTRL] & Ctrl.SLU)

    @property
    def status(self) -> int:
        """STATUS: what the link runs at, as negotiated or as CTRL forces it."""
        control = self.registers[regs.CTRL]
        speed, full = self.phy.resolved
        shown = control >> 8 & 3 if control & Ctrl.FRCSPD else speed
        if control & Ctrl.FRCDPLX:
            full = bool(control & Ctrl.FD)
        lines = (Status.FD if full else 0) | (Status.LU if self.link_up else 0)
        return lines | shown << regs.STATUS_SPEED_SHIFT | speed << regs.STATUS_ASDV_SHIFT

    def _high_word(self, low: int) -> OnRead:
        """The reader of the high word of the counter at ``low``, which clears both."""

        def read(value: int) -> int:
            self.registers[low] = 0
            return value

        return read

    def _write_ctrl(self, _offset: int, value: int) -> None:
        if value & Ctrl.PHY_RST:
            self.phy.reset()
        if value & Ctrl.RST:
            self._reset_controller()

    def _write_ctrl_ext(self, _offset: int, value: int) -> None:
        if value & CtrlExt.EE_RST:
            self._load_address()

    def _write_eerd(self, _offset: int, value: int) -> None:
        if value & regs.EERD_START:
            address = value >> regs.EERD_ADDRESS_SHIFT & 0xFF
            word = self.eeprom.words[address % eeprom.WORDS]
            kept = address << regs.EERD_ADDRESS_SHIFT | regs.EERD_DONE
            self.registers[regs.EERD] = word << regs.EERD_DATA_SHIFT | kept

    def _write_mdic(self, _offset: int, value: int) -> None:
        number, address = value >> 16 & 31, value >> 21 & 31
        result = value & ~(Mdic.ERROR | 0xFFFF) | Mdic.READY
        operation = value & (Mdic.READ | Mdic.WRITE)
        if address != phy.ADDRESS or operation not in (Mdic.READ, Mdic.WRITE):
            result |= Mdic.ERROR
        elif operation == Mdic.READ:
            result |= self.phy.read(number)
        else:
            result |= value & 0xFFFF
            self.phy.write(number, value & 0xFFFF)
        self.registers[regs.MDIC] = result
        if value & Mdic.INTERRUPT:
            self.interrupts.cause(Interrupt.MDAC)

    def _receive_again(self, _offset: int, _value: int) -> None:
        self.rx.ring.tail_written()
        if self.rx.enabled and self.rx.ring.owned:
            self.net.resume()

    def _write_rdtr(self, _offset: int, value: int) -> None:
        if value & regs.RDTR_FPD and self.rx_delay.waiting:
            self.rx_delay.flush()

    def _write_tdt(self, _offset: int, _value: int) -> None:
        self.tx.ring.tail_written()
        self.tx.run()

    # -- frames and their interrupts -----------------------------------------------------------------------------

    def _on_frame(self, frame: bytes) -> bool:
        return not self.link_up or self.rx.offer(frame)

    def _send(self, frame: bytes) -> None:
        if self.phy.loopback or self.registers[regs.RCTL] & regs.Rctl.LBM:
            self.rx.offer(frame)
        elif self.link_up:
            self.net.send(frame)

    def _received(self) -> None:
        self.interrupts.cause(Interrupt.RXT0)

    def _transmitted(self) -> None:
        self.interrupts.cause(Interrupt.TXDW)

    def _link_changed(self) -> None:
        self.interrupts.cause(Interrupt.LSC)

    # -- reset ---------------------------------------------------------------------------------------------------

    def _load_address(self) -> None:
        mac = self.eeprom.mac
        self.registers[regs.RAL] = int.from_bytes(mac[:4], "little")
        self.registers[regs.RAH] = regs.RAH_AV | int.from_bytes(mac[4:], "little")

    def _stop(self) -> None:
        self.rx_delay.cancel()
        self.tx_delay.cancel()
        self.interrupts.throttle.cancel()
        self.phy.timer.cancel()

    def _reset_controller(self) -> None:
        """CTRL.RST: everything but configuration space, PHY and EEPROM."""
        self.rx_delay.cancel()
        self.tx_delay.cancel()
        self.registers.reset()
        self.rx.ring.forget()
        self.tx.reset()
        self.interrupts.reset()
        self._load_address()

    def reset_enter(self) -> None:
        """Timers stop."""
        self._stop()
        super().reset_enter()

    def reset_hold(self) -> None:
        """As after power-on; the EEPROM keeps what it holds."""
        super().reset_hold()
        self._reset_controller()
        self.phy.power_on()
        self.eeprom.release()
        self.io_address = 0

    # -- migration -----------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """Registers, EEPROM, PHY, timers, and what is being sent."""
        return {**super().export_state(), **export_state(self)}

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """See :mod:`vfio_model.devices.e1000.state`."""
        super().check_state(state, where=where)
        check_state(self, state, where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same; what was being sent goes on."""
        import_state(self, state)
        super().import_state(state)
        self.run_when_idle(self._go_on)

    def _go_on(self) -> bool:
        self.tx.run()
        self._receive_again(0, 0)
        return False
