"""The board for a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from guestd.machine_config import MachineConfig, PseriesConfig, Q35Config
from guestd.machines.board import Board, Parts
from guestd.machines.pseries import PseriesBoard
from guestd.machines.q35 import Q35Board
from vfio_model.machine.phb import EehPort
from vfio_model.memory.address_space import AddressSpace

RAM_IDS: Final[dict[type, str]] = {PseriesConfig: "ppc_spapr.ram", Q35Config: "pc.ram"}
"""What QEMU calls the RAM of a machine of that configuration."""


def build_board(config: MachineConfig, parts: Parts, eeh: Callable[[AddressSpace], EehPort | None]) -> Board:
    """The machine of ``config``, without devices; ``eeh`` as for :class:`~guestd.machines.pseries.PseriesBoard`.

    :raise ConfigError: when it cannot be.
    """
    if isinstance(config, Q35Config):
        return Q35Board(config, parts)
    return PseriesBoard(config, parts, eeh)
