"""The EEPROM of an 82540EM: 64 words behind a Microwire bus (manual 5.3 "Microwire EEPROM", 5.6 "EEPROM Address Map").

Software drives the bus by hand through EECD (13.4.3 "EEPROM/Flash Control and Data Register") or lets the controller
read a word through EERD (13.4.4 "EEPROM Read Register"). On the bus, as a 93C46 in its 16-bit organisation::

    CS up ─► start bit 1, opcode (2 bits), address (6 bits), most significant bit first, taken at each rising clock
             10 READ   a zero, then words from the address on, a bit for each rising clock
             01 WRITE  16 bits; 00 with 11…/00…/01…/10…: enable, disable, write all, erase all; 11 ERASE
    CS down: a write that is complete happens, if writing was enabled; CS up again shows ready (1)
"""

from __future__ import annotations

import re
from typing import Final

from vfio_model.errors import ConfigError

WORDS: Final = 64
CHECKSUM_WORD: Final = 0x3F
CHECKSUM: Final = 0xBABA
"""What all words add up to modulo 65536 (5.6.35 "Checksum Word Calculation")."""
ADDRESS_BITS: Final = 6
_COMMAND_BITS = 3 + ADDRESS_BITS
_READ, _WRITE, _ERASE = 0b110, 0b101, 0b111
_EXTENDED = 0b100
_WRITE_DISABLE, _WRITE_ALL, _ERASE_ALL, _WRITE_ENABLE = 0b00, 0b01, 0b10, 0b11

_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}")

_WORDS_OF_5_6: Final = {
    0x04: 0xFFFF,  # ID LED settings: the default
    0x0A: 0x440B,  # initialization control 1: signature 01b, full duplex, power management, load the identifiers
    0x0F: 0x3040,  # initialization control 2: pause both ways, no flash
    0x2F: 0x0602,  # LED configuration defaults
}


class Eecd:
    """Bits of EECD."""

    SK = 1 << 0
    CS = 1 << 1
    DI = 1 << 2
    DO = 1 << 3
    FWE_DISABLED = 1 << 4
    REQ = 1 << 6
    GNT = 1 << 7
    PRES = 1 << 8


EECD_WRITABLE: Final = Eecd.SK | Eecd.CS | Eecd.DI | Eecd.REQ | 3 << 4


def parse_mac(text: str) -> bytes:
    """The 6 bytes of an address as people write it.

    :raise ConfigError: when it is none.
    """
    if not _MAC.fullmatch(text):
        what = f"Property 'e1000.mac' doesn't take value '{text}'"
        raise ConfigError(what, hint="an Ethernet address, 52:54:00:12:34:56")
    return bytes.fromhex(text.replace(":", "").replace("-", ""))


def image(mac: bytes, device: int, vendor: int, subsystem: int, subsystem_vendor: int) -> list[int]:
    """The words of an EEPROM with the address ``mac`` (6 bytes) and these PCI identifiers."""
    words = [0] * WORDS
    words[:3] = (int.from_bytes(mac[at : at + 2], "little") for at in (0, 2, 4))
    for at, word in _WORDS_OF_5_6.items():
        words[at] = word
    words[0x0B:0x0F] = subsystem, subsystem_vendor, device, vendor
    words[CHECKSUM_WORD] = (CHECKSUM - sum(words)) & 0xFFFF
    return words


class Eeprom:
    """Its words, and the state of the bus."""

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self.release()

    def release(self) -> None:
        """Nobody drives the bus, nothing may be written; the words stay.

        ``lines`` are SK, CS, DI and the request as software drives them (:class:`Eecd`), ``shifted`` the ``bits`` bits
        since CS rose, a start bit first, ``out`` what DO shows. While ``reading``, ``shifted`` is the word and ``bits``
        the place in it.
        """
        self.write_enabled = self.reading = False
        self.lines = self.shifted = self.bits = 0
        self.out = 1

    @property
    def mac(self) -> bytes:
        """The address in the first three words."""
        return b"".join(word.to_bytes(2, "little") for word in self.words[:3])

    def eecd(self) -> int:
        """The value of EECD."""
        grant = Eecd.GNT if self.lines & Eecd.REQ else 0
        data = Eecd.DO if self.out else 0
        return self.lines | grant | data | Eecd.PRES

    def drive(self, lines: int) -> None:
        """Software wrote EECD."""
        old, self.lines = self.lines, lines & EECD_WRITABLE
        if not lines & Eecd.CS:
            if old & Eecd.CS:
                self._deselected()
        elif not old & Eecd.CS:
            self.shifted = self.bits = 0
            self.reading, self.out = False, 1
        elif self.lines & Eecd.SK and not old & Eecd.SK:
            self._clocked(1 if lines & Eecd.DI else 0)

    def _clocked(self, bit: int) -> None:
        if self.reading:
            self._shift_out()
        elif self.bits or bit:
            self.shifted = (self.shifted << 1 | bit) & 0xFFFF_FFFF
            self.bits = min(self.bits + 1, 32)
            if self.bits == _COMMAND_BITS and self.shifted >> ADDRESS_BITS == _READ:
                self.reading, self.bits, self.out = True, 0, 0
                self.shifted &= WORDS - 1

    def _shift_out(self) -> None:
        word = self.words[self.shifted]
        self.out = word >> (15 - self.bits) & 1
        self.bits += 1
        if self.bits == 16:
            self.bits, self.shifted = 0, (self.shifted + 1) % WORDS

    def _deselected(self) -> None:
        if not self.reading:
            if self.bits == _COMMAND_BITS:
                self._command(self.shifted >> ADDRESS_BITS, self.shifted & WORDS - 1, None)
            elif self.bits == _COMMAND_BITS + 16:
                command = self.shifted >> 16
                self._command(command >> ADDRESS_BITS, command & WORDS - 1, self.shifted & 0xFFFF)
        self.reading, self.bits, self.shifted = False, 0, 0

    def _command(self, opcode: int, address: int, data: int | None) -> None:
        extended = address >> ADDRESS_BITS - 2 if opcode == _EXTENDED else None
        if extended in (_WRITE_ENABLE, _WRITE_DISABLE):
            self.write_enabled = extended == _WRITE_ENABLE
        elif self.write_enabled:
            if opcode == _WRITE and data is not None:
                self.words[address] = data
            elif opcode == _ERASE and data is None:
                self.words[address] = 0xFFFF
            elif extended == _WRITE_ALL and data is not None:
                self.words[:] = [data] * WORDS
            elif extended == _ERASE_ALL and data is None:
                self.words[:] = [0xFFFF] * WORDS
