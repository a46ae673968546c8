"""What of an e1000 migrates: registers, EEPROM, PHY, the timers that run, the packet that is being sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from vfio_model.devices.e1000.eeprom import WORDS, Eeprom
from vfio_model.devices.e1000.interrupts import Delay, Interrupts
from vfio_model.devices.e1000.phy import REGISTERS as PHY_REGISTERS
from vfio_model.devices.e1000.phy import Phy
from vfio_model.devices.e1000.regs import REGISTERS
from vfio_model.devices.e1000.rx import Receiver
from vfio_model.devices.e1000.tx import LARGEST_SEGMENTED, Transmitter
from vfio_model.devices.register_file import RegisterFile, fields_of
from vfio_model.errors import VMStateError
from vfio_model.pci.device import PARENT
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

_TIMERS = ("rx_quiet_ns", "rx_absolute_ns", "tx_quiet_ns", "tx_absolute_ns", "throttle_ns", "negotiation_ns")
_EEPROM_BUS = ("lines", "shifted", "bits", "write_enabled", "reading", "out")

EEPROM = VMStateDescription(
    "e1000/eeprom",
    1,
    (
        Field("words", Type.U16, array=WORDS),
        *(Field(name) for name in ("lines", "shifted", "bits")),
        *(Field(name, Type.BOOL) for name in ("write_enabled", "reading", "out")),
    ),
)
TRANSMIT = VMStateDescription(
    "e1000/transmit",
    1,
    (
        Field("checksum_context", array=10),
        Field("segmentation_context", array=10),
        Field("packet_size"),
        Field("packet", Type.U8, array="packet_size"),
        *(Field(name, Type.BOOL) for name in ("gathering", "segmenting", "spoiled", "tse", "tagged")),
        Field("options", Type.U8),
        Field("tag", Type.U16),
        Field("next_segment"),
    ),
)
VMSTATE = VMStateDescription(
    "e1000",
    1,
    (
        PARENT,
        *fields_of(REGISTERS),
        Field("io_address"),
        Field("eeprom", struct=EEPROM),
        Field("phy", Type.U16, array=PHY_REGISTERS),
        Field("link", Type.BOOL),
        Field("pin", Type.BOOL),
        *(Field(name, Type.U64) for name in _TIMERS),
        Field("transmit", struct=TRANSMIT),
    ),
)


class Parts(Protocol):
    """The parts of the device that have state."""

    registers: RegisterFile
    eeprom: Eeprom
    phy: Phy
    interrupts: Interrupts
    rx_delay: Delay
    tx_delay: Delay
    rx: Receiver
    tx: Transmitter
    io_address: int


def export_state(device: Parts) -> State:
    """What :data:`VMSTATE` says, but for the parent."""
    timers = (
        *device.rx_delay.remaining(),
        *device.tx_delay.remaining(),
        device.interrupts.throttle.remaining_ns or 0,
        device.phy.timer.remaining_ns or 0,
    )
    return {
        **device.registers.export_state(),
        "io_address": device.io_address,
        "eeprom": {"words": list(device.eeprom.words), **{name: getattr(device.eeprom, name) for name in _EEPROM_BUS}},
        "phy": list(device.phy.values),
        "link": device.phy.link,
        "pin": device.interrupts.up,
        **dict(zip(_TIMERS, timers, strict=True)),
        "transmit": device.tx.export_state(),
    }


def check_state(device: Parts, state: Mapping[str, Any], *, where: str) -> None:
    """Whether the device can be in ``state``.

    :raise VMStateError: it cannot.
    """
    device.registers.check_state(state, where=where)
    bus, transmit = state["eeprom"], state["transmit"]
    if bus["bits"] > 32 or (bus["reading"] and (bus["bits"] > 15 or bus["shifted"] >= WORDS)):
        raise VMStateError("an EEPROM in the middle of nothing", where=where)
    if transmit["packet_size"] > LARGEST_SEGMENTED:
        raise VMStateError(f"a packet of {transmit['packet_size']} bytes", where=where)


def import_state(device: Parts, state: Mapping[str, Any]) -> None:
    """Take a checked ``state``."""
    device.registers.import_state(state)
    device.rx.ring.forget()
    device.io_address = state["io_address"]
    device.eeprom.words = list(state["eeprom"]["words"])
    for name in _EEPROM_BUS:
        setattr(device.eeprom, name, state["eeprom"][name])
    device.phy.restore(state["phy"], state["link"], state["negotiation_ns"])
    device.interrupts.restore(state["pin"], state["throttle_ns"])
    device.rx_delay.restore(state["rx_quiet_ns"], state["rx_absolute_ns"])
    device.tx_delay.restore(state["tx_quiet_ns"], state["tx_absolute_ns"])
    device.tx.import_state(state["transmit"])
