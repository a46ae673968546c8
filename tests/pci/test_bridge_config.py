"""Configuration space of every bridge: what stock QEMU shows (``bridge_config.txt``), byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pci.hierarchy import SLOT, Board, ExpressEndpoint, number

BUS_NUMBERS = 0x18
FLR = {"x3130-upstream": {0x98: 0x8000}, "xio3130-downstream": {0x98: 0x8000}}
OTHERWISE = {("ioh3420", 0x70): 1}
"""A message is pending: the guest let the slot interrupt, and gave it a command."""

Dwords = tuple[int, int, int]


def _expected() -> dict[str, dict[int, Dwords]]:
    models: dict[str, dict[int, Dwords]] = {}
    rows: dict[int, Dwords] = {}
    for line in (Path(__file__).parent / "bridge_config.txt").read_text().splitlines():
        words = line.split()
        if len(words) == 1:
            rows = models[line] = {}
        else:
            offset, reset, zeros, ones = (int(word, 16) for word in words)
            rows[offset] = reset, zeros, ones
    return models


EXPECTED = _expected()


def _place(model: str) -> tuple[Board, int]:
    """A board with ``model``, reset, and the number of its bus."""
    board = Board()
    numbers = dict(chassis=1, slot=2, port=3)
    if model in ("pcie-root-port", "ioh3420"):
        board.bridge(model, **numbers)
    elif model == "occupied":
        board.bridge("pcie-root-port", chassis=1).secondary.plug(ExpressEndpoint, 0)
    elif model == "pxb-pcie":
        board.expander(bus_nr=8)
    elif "3130" in model:
        port = board.bridge("pcie-root-port", chassis=1)
        upstream = board.bridge("x3130-upstream", port.secondary, 0)
        if model == "xio3130-downstream":
            board.bridge(model, upstream.secondary, 0, chassis=2, slot=1, port=2)
        board.root.reset()
        number(port, 1, 3)
        if model == "xio3130-downstream":
            number(upstream, 2, 3)
            return board, 2
        return board, 1
    else:
        board.bridge(model, **(dict(chassis_nr=1) if model == "pci-bridge" else {}))
    board.root.reset()
    return board, 0


@pytest.mark.parametrize("model", EXPECTED)
def test_configuration_space_is_as_qemu_s(model: str) -> None:
    board, bus = _place(model)
    devfn = 0 if bus else SLOT
    size = 256 if model in ("pci-bridge", "i82801b11-bridge", "pxb-pcie") else 4096
    seen = [[board.read(bus, devfn, offset) for offset in range(0, size, 4)]]
    for value in 0, 0xFFFF_FFFF:
        for offset in range(0, size, 4):
            if offset != BUS_NUMBERS:
                board.write(bus, devfn, offset, value & ~FLR.get(model, {}).get(offset, 0))
        seen.append([board.read(bus, devfn, offset) for offset in range(0, size, 4)])
    wrong = []
    for index, dwords in enumerate(zip(*seen, strict=True)):
        offset = 4 * index
        free = 0, 0, 0xFFFF_FFFF if offset >= 0x40 else 0
        expected = EXPECTED[model].get(offset, free)
        if (model, offset) in OTHERWISE:
            expected = *expected[:2], OTHERWISE[model, offset]
        if dwords != expected:
            wrong.append((f"{offset:#x}", [f"{dword:08x}" for dword in (*dwords, *expected)]))
    assert wrong == []
    if size == 256:
        assert board.read(bus, devfn, 0x100) == 0xFFFF_FFFF


def test_the_expectations_are_of_every_model() -> None:
    assert len(EXPECTED) == 9 and all(rows[0] != 0 for rows in EXPECTED.values())
