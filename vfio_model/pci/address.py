"""PCI addresses: domain, bus, device and function, as people write them.

``02.0`` (slot and function, as QEMU's ``addr=``), ``01:00.0`` and ``0000:01:00.0`` (as lspci prints them). The
*requester id*, by which an IOMMU and a trace know a function, is bus << 8 | devfn (PCI Express Base Specification,
"Transaction ID").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfio_model.errors import ConfigError

SLOTS = 32
FUNCTIONS = 8

_PATTERN = re.compile(
    r"(?:(?:(?P<domain>[0-9a-f]{1,8}):)?(?P<bus>[0-9a-f]{1,2}):)?(?P<slot>[0-9a-f]{1,2})(?:\.(?P<function>[0-9a-f]))?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, order=True)
class PCIAddress:
    """One function of one device. ``slot`` is 0..31, ``function`` 0..7, ``bus`` 0..255."""

    bus: int
    slot: int
    function: int
    domain: int = 0

    @classmethod
    def parse(cls, text: str, *, where: str = "") -> PCIAddress:
        """Read ``SLOT[.FN]``, ``BUS:SLOT.FN`` or ``DOMAIN:BUS:SLOT.FN``, all in hexadecimal.

        :raise ConfigError: when ``text`` is none of these, or a part is out of range; ``where`` names its place.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                f"{text!r} is not a PCI address", where=where, hint="write it as 02.0, 01:00.0 or 0000:01:00.0"
            )
        slot, function = int(match["slot"], 16), int(match["function"] or "0", 16)
        if slot >= SLOTS or function >= FUNCTIONS:
            raise ConfigError(
                f"PCI address {text!r}: slot {slot:#x}, function {function}",
                where=where,
                hint="slots go to 1f, functions to 7",
            )
        return cls(int(match["bus"] or "0", 16), slot, function, int(match["domain"] or "0", 16))

    @classmethod
    def of(cls, bus: int, devfn: int, domain: int = 0) -> PCIAddress:
        """The function ``devfn`` (slot << 3 | function) of ``bus``."""
        return cls(bus, devfn >> 3, devfn & 7, domain)

    @property
    def devfn(self) -> int:
        """slot << 3 | function, 0..255."""
        return self.slot << 3 | self.function

    @property
    def requester_id(self) -> int:
        """bus << 8 | devfn: 16 bits."""
        return self.bus << 8 | self.devfn

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}.{self.function}"
