"""The power management capability of a function that can be on (D0) or off (D3hot), and loses nothing when off.

PCI Bus Power Management Interface Specification 1.2, 3.2, "PCI Power Management Register Block Definition". As QEMU has
it, a function that is off decodes no BAR; its configuration space answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfio_model.pci.config_space import ConfigSpace, Field

CAP_ID_PM = 0x01
PM_SIZE = 8
CONTROL = 0x04
CONTROL_STATE = 0x0003
CONTROL_NO_SOFT_RESET = 0x0008
D0, D3HOT = 0, 3
VERSION_1_2 = 0x0003
"""In the capabilities register, which offers neither D1 nor D2 nor power management events."""


@dataclass(frozen=True, slots=True)
class PowerSpec:
    """``at``: as of :meth:`ConfigSpace.add_capability`."""

    at: int | None = None


class PowerCapability:
    """The capability, added to ``config``. ``on_change()`` is called when a guest has switched the function on or
    off."""

    def __init__(self, config: ConfigSpace, spec: PowerSpec, on_change: Callable[[], None]) -> None:
        self._config, self._on_change = config, on_change
        fields = (
            Field("capabilities", 0x02, 2, VERSION_1_2),
            Field("control", CONTROL, 2, CONTROL_NO_SOFT_RESET, CONTROL_STATE),
            Field("extensions", 0x06, 1),
            Field("data", 0x07, 1),
        )
        self.offset = config.add_capability(CAP_ID_PM, PM_SIZE, fields, prefix="power", at=spec.at)
        config.on_write("power.control", self._controlled)
        self._state = D0

    @property
    def on(self) -> bool:
        """Whether the function is in D0."""
        return self._state == D0

    def follow(self) -> None:
        """Take the state from configuration space, which was reset or loaded."""
        self._state = self._config.get("power.control") & CONTROL_STATE

    def _controlled(self) -> None:
        """A state that there is not is not entered: the one before stays."""
        control, before = self._config.get("power.control"), self._state
        if control & CONTROL_STATE not in (D0, D3HOT):
            self._config.set("power.control", control & ~CONTROL_STATE | before)
        self.follow()
        if self._state != before:
            self._on_change()
