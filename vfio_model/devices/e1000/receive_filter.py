"""Which frames an 82540EM takes (manual 3.2.1 "Packet Address Filtering", 9.3 "802.1q VLAN Packet Filtering")."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from vfio_model.devices.e1000.regs import (
    FCAH,
    FCAL,
    FCT,
    MTA,
    RAH,
    RAH_AS_SHIFT,
    RAH_AV,
    RAL,
    RCTL,
    RCTL_MO_SHIFT,
    RECEIVE_ADDRESSES,
    VET,
    VFTA,
    Rctl,
)
from vfio_model.devices.e1000.statistics import BROADCAST
from vfio_model.devices.register_file import RegisterFile

_HASH_SHIFTS: Final = (4, 3, 2, 0)
"""By RCTL.MO: how far the last two bytes of the address, little-endian, are shifted for the 12 bits that count."""
_SOURCE: Final = 1
"""RAH.AS: the entry is compared with the source address."""


class Match(IntEnum):
    """How a frame passed the filters."""

    NONE = 0
    EXACT = 1
    """By its address, or as a broadcast."""
    INEXACT = 2
    """By the multicast hash, or because everything is taken: software has to look again."""


class ReceiveFilter:
    """The filters that ``registers`` describe."""

    def __init__(self, registers: RegisterFile) -> None:
        self._registers = registers

    def is_tagged(self, frame: bytes) -> bool:
        """Whether ``frame`` is an 802.1q packet: its EtherType is the one in VET."""
        return len(frame) >= 18 and int.from_bytes(frame[12:14], "big") == self._registers[VET]

    def match(self, frame: bytes) -> Match:
        """Whether ``frame`` (14 bytes at least) is taken, and how."""
        if self._vlan(frame) and not self._paused(frame):
            return self._address(frame)
        return Match.NONE

    def _vlan(self, frame: bytes) -> bool:
        control = self._registers[RCTL]
        if not control & Rctl.VFE or not self.is_tagged(frame):
            return True
        tag = int.from_bytes(frame[14:16], "big")
        identifier = tag & 0xFFF
        if not self._registers[VFTA + (identifier >> 5) * 4] >> (identifier & 31) & 1:
            return False
        return not control & Rctl.CFIEN or bool(tag >> 12 & 1) == bool(control & Rctl.CFI)

    def _paused(self, frame: bytes) -> bool:
        """Whether ``frame`` is a PAUSE frame that RCTL.DPF discards."""
        registers = self._registers
        if not registers[RCTL] & Rctl.DPF or int.from_bytes(frame[12:14], "big") != registers[FCT]:
            return False
        return int.from_bytes(frame[:6], "little") == registers[FCAH] << 32 | registers[FCAL]

    def _address(self, frame: bytes) -> Match:
        control = self._registers[RCTL]
        group = frame[0] & 1
        if self._exact(frame) or (group and control & Rctl.BAM and frame[:6] == BROADCAST):
            return Match.EXACT
        everything = control & (Rctl.MPE if group else Rctl.UPE)
        return Match.INEXACT if everything or (group and self._hashed(frame)) else Match.NONE

    def _exact(self, frame: bytes) -> bool:
        registers = self._registers
        destination = int.from_bytes(frame[:6], "little")
        for each in range(0, RECEIVE_ADDRESSES * 8, 8):
            high = registers[RAH + each]
            if high & RAH_AV:
                address = (high & 0xFFFF) << 32 | registers[RAL + each]
                select = high >> RAH_AS_SHIFT & 3
                if address == (destination if select != _SOURCE else int.from_bytes(frame[6:12], "little")):
                    return True
        return False

    def _hashed(self, frame: bytes) -> bool:
        offset = self._registers[RCTL] >> RCTL_MO_SHIFT & 3
        value = int.from_bytes(frame[4:6], "little") >> _HASH_SHIFTS[offset] & 0xFFF
        return bool(self._registers[MTA + (value >> 5) * 4] >> (value & 31) & 1)
