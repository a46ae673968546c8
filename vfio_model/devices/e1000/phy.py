"""The PHY of an 82540EM, a Marvell M88E1011 (manual 13.4.7.1 "PHY Registers"; 0 to 15 are IEEE 802.3 clause 22).

Its cable leads to a partner that can do everything, and is always plugged in. Autonegotiation takes
:data:`NEGOTIATION_NS`; while it runs the link is down::

    down (power down, reset) ──► negotiating ──NEGOTIATION_NS──► link up
                                     ▲                              │ restart, reset
                                     └──────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from vfio_model.clock import VirtualClock

NEGOTIATION_NS: Final = 500_000_000
ADDRESS: Final = 1
"""The PHY's address on the management bus."""
REGISTERS: Final = 32


class PhyRegister(NamedTuple):
    """A register: its number, its value after a reset, which bits may be written and which reading clears."""

    name: str
    number: int
    reset: int
    writable: int = 0
    clear_on_read: int = 0


PCTRL, PSTATUS, ANA, LPA, ANE, GCON, GSTATUS, PSSTAT, PINTS = 0, 1, 4, 5, 6, 9, 10, 17, 19

TABLE: Final = (
    PhyRegister("PCTRL", PCTRL, 0x1140, 0x7DC0),
    PhyRegister("PSTATUS", PSTATUS, 0x7949),
    PhyRegister("PID", 2, 0x0141),
    PhyRegister("EPID", 3, 0x0C20),
    PhyRegister("ANA", ANA, 0x0DE1, 0xBFFF),
    PhyRegister("LPA", LPA, 0x0000),
    PhyRegister("ANE", ANE, 0x0004, clear_on_read=0x0002),
    PhyRegister("NPT", 7, 0x2001, 0xBFFF),
    PhyRegister("LPN", 8, 0x0000),
    PhyRegister("GCON", GCON, 0x0E00, 0xFF00),
    PhyRegister("GSTATUS", GSTATUS, 0x0000),
    PhyRegister("ESTATUS", 15, 0x3000),
    PhyRegister("PSCON", 16, 0x0068, 0xFFFF),
    PhyRegister("PSSTAT", PSSTAT, 0x0000),
    PhyRegister("PINTE", 18, 0x0000, 0xFFFF),
    PhyRegister("PINTS", PINTS, 0x0000, clear_on_read=0xFFFF),
    PhyRegister("EPSCON1", 20, 0x0D60, 0xFFFF),
    PhyRegister("PREC", 21, 0x0000, clear_on_read=0xFFFF),
    PhyRegister("PAGE", 29, 0x0000, 0xFFFF),
    PhyRegister("CONTROL", 30, 0x0000, 0xFFFF),
)
_BY_NUMBER: Final = {register.number: register for register in TABLE}


class Pctrl:
    """22.2.4.1 "Control register (Register 0)"."""

    SPEED_HIGH = 1 << 6
    DUPLEX = 1 << 8
    RESTART = 1 << 9
    POWER_DOWN = 1 << 11
    NEGOTIATE = 1 << 12
    SPEED_LOW = 1 << 13
    LOOPBACK = 1 << 14
    RESET = 1 << 15


class Pstatus:
    """22.2.4.2 "Status register (Register 1)"."""

    LINK = 1 << 2
    NEGOTIATED = 1 << 5


_PINTS_LINK = 1 << 10
_PINTS_NEGOTIATED = 1 << 11
_PARTNER = 0xCDE1
"""What the partner says in LPA: acknowledged, pause both ways, 100 and 10 Mb/s."""
_PARTNER_GIGABIT = 0x7C00
"""GSTATUS: this side is master, both receivers work, the partner can do 1000 Mb/s in both duplexes."""
_GCON_1000_FULL, _GCON_1000_HALF = 1 << 9, 1 << 8
_ANA_SPEEDS = ((1 << 8, 1, True), (1 << 7, 1, False), (1 << 6, 0, True), (1 << 5, 0, False))
"""Abilities in ANA by preference: bit, speed, full duplex."""


class Phy:
    """``on_link()`` is called when the link goes up or down."""

    def __init__(self, clock: VirtualClock, on_link: Callable[[], None]) -> None:
        self._clock, self._on_link = clock, on_link
        self.timer = clock.timer(self._negotiated)
        self.values = [0] * REGISTERS
        self.link = False
        self.power_on()

    def _defaults(self) -> None:
        for register in TABLE:
            self.values[register.number] = register.reset

    def power_on(self) -> None:
        """As after power-on, long enough ago that negotiation is over."""
        self.timer.cancel()
        self._defaults()
        self._settle()
        self.values[PSTATUS] |= Pstatus.LINK

    # -- registers -----------------------------------------------------------------------------------------------

    def read(self, number: int) -> int:
        """Register ``number`` (0..31)."""
        value = self.values[number]
        if number == PSTATUS:
            # A link that went down shows it until this was read (clause 22.2.4.2.13).
            self.values[PSTATUS] = value & ~Pstatus.LINK | (Pstatus.LINK if self.link else 0)
        elif number in _BY_NUMBER:
            self.values[number] &= ~_BY_NUMBER[number].clear_on_read
        return value

    def write(self, number: int, value: int) -> None:
        """The same; bits that cannot be written stay as they are."""
        register = _BY_NUMBER.get(number)
        if register is None:
            return
        old = self.values[number]
        if number == PCTRL and value & Pctrl.RESET:
            # Bits of the control register that choose the link survive a software reset and take effect by it.
            self.values[PCTRL] = value & register.writable
            self.restart()
            return
        self.values[number] = old & ~register.writable | value & register.writable
        if number == PCTRL:
            woken = old & Pctrl.POWER_DOWN and not value & Pctrl.POWER_DOWN
            if value & Pctrl.POWER_DOWN:
                self._down()
            elif woken or (value & Pctrl.RESTART and value & Pctrl.NEGOTIATE):
                self.restart()

    def reset(self) -> None:
        """The hardware reset: defaults, and negotiation from the start."""
        self._defaults()
        self.restart()

    @property
    def loopback(self) -> bool:
        """Whether what is sent comes back."""
        return bool(self.values[PCTRL] & Pctrl.LOOPBACK)

    # -- the link ------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """The link goes down, and comes back when it has been negotiated."""
        self._down()
        if not self.values[PCTRL] & Pctrl.POWER_DOWN:
            self.timer.mod(self._clock.now_ns + NEGOTIATION_NS)

    def _down(self) -> None:
        self.timer.cancel()
        self.values[PSTATUS] &= ~(Pstatus.LINK | Pstatus.NEGOTIATED)
        self.values[LPA] = self.values[GSTATUS] = self.values[PSSTAT] = 0
        if self.link:
            self.link = False
            self.values[PINTS] |= _PINTS_LINK
            self._on_link()

    def _negotiated(self) -> None:
        self._settle()
        self.values[PINTS] |= _PINTS_LINK | _PINTS_NEGOTIATED
        self._on_link()

    def _settle(self) -> None:
        self.link = True
        if self.values[PCTRL] & Pctrl.NEGOTIATE:
            self.values[PSTATUS] |= Pstatus.NEGOTIATED
            self.values[LPA] = _PARTNER
            self.values[ANE] |= 0x0003
            self.values[GSTATUS] = _PARTNER_GIGABIT
        speed, full = self.resolved
        pause = 0x000C if self.values[ANA] & 0x0400 else 0
        self.values[PSSTAT] = speed << 14 | full << 13 | 0x0C00 | pause

    def restore(self, values: list[int], link: bool, negotiation_ns: int) -> None:
        """After a migration: registers, link, and how long negotiation still takes (0: it does not run)."""
        self.timer.cancel()
        self.values, self.link = list(values), link
        if negotiation_ns:
            self.timer.mod(self._clock.now_ns + negotiation_ns)

    @property
    def resolved(self) -> tuple[int, bool]:
        """What the link runs at: speed (0: 10, 1: 100, 2: 1000 Mb/s) and whether it is full duplex."""
        control = self.values[PCTRL]
        if not control & Pctrl.NEGOTIATE:
            speed = 2 * bool(control & Pctrl.SPEED_HIGH) | bool(control & Pctrl.SPEED_LOW)
            return min(speed, 2), bool(control & Pctrl.DUPLEX)
        if self.values[GCON] & (_GCON_1000_FULL | _GCON_1000_HALF):
            return 2, bool(self.values[GCON] & _GCON_1000_FULL)
        for ability, speed, full in _ANA_SPEEDS:
            if self.values[ANA] & ability:
                return speed, full
        return 0, False
