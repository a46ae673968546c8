"""What stock QEMU's bridges have in configuration space, as ``tests/pci/bridge_config.txt``; this writes it anew::

    python -m tests.interop.bridge_config > tests/pci/bridge_config.txt

For each model: every dword after power-on, after zeros were written everywhere, and after ones were (bus numbers and
function level reset apart). A dword of the header that is always zero, and one behind it that keeps whatever is
written, is left out.
"""

from __future__ import annotations

from tests.interop.pc import CONFIG_ADDRESS, CONFIG_DATA, PcQemu

ECAM = 0xB000_0000
BUS_NUMBERS = 0x18
_PCIEXBAR = 0x8000_0060
_PORT = ("-device", "pcie-root-port,id=r,addr=4,chassis=1")
_SWITCH = (*_PORT, "-device", "x3130-upstream,id=u,bus=r")
MODELS = {
    "pcie-root-port": (("-device", "pcie-root-port,addr=4,chassis=1,slot=2,port=3"), 0, 4096),
    "ioh3420": (("-device", "ioh3420,addr=4,chassis=1,slot=2,port=3"), 0, 4096),
    "pcie-pci-bridge": (("-device", "pcie-pci-bridge,addr=4"), 0, 4096),
    "pci-bridge": (("-device", "pci-bridge,addr=4,chassis_nr=1"), 0, 256),
    "i82801b11-bridge": (("-device", "i82801b11-bridge,addr=4"), 0, 256),
    "pxb-pcie": (("-device", "pxb-pcie,addr=4,bus_nr=8"), 0, 256),
    "occupied": ((*_PORT, "-device", "nvme,bus=r,serial=1"), 0, 4096),
    "x3130-upstream": (_SWITCH, 1, 4096),
    "xio3130-downstream": ((*_SWITCH, "-device", "xio3130-downstream,bus=u,chassis=2,slot=1,port=2"), 2, 4096),
}
"""Options, how many bridges lie above, bytes."""
KEPT = {"x3130-upstream": {0x98: 0x8000}, "xio3130-downstream": {0x98: 0x8000}}
"""Bits that are not written: those that begin a function level reset."""


def read(qemu: PcQemu, bus: int, size: int) -> list[int]:
    """Every dword of the first function there."""
    at = ECAM + (bus << 20 | (0 if bus else 0x20) << 12)
    raw = qemu.read(at, size)
    return [int.from_bytes(raw[where : where + 4], "little") for where in range(0, size, 4)]


def fill(qemu: PcQemu, bus: int, size: int, value: int, kept: dict[int, int]) -> None:
    """``value`` into every dword."""
    at = ECAM + (bus << 20 | (0 if bus else 0x20) << 12)
    for where in range(0, size, 4):
        if where != BUS_NUMBERS:
            qemu.store(at + where, 4, value & ~kept.get(where, 0))


def main() -> None:
    """See the module."""
    for model, (options, above, size) in MODELS.items():
        with PcQemu(options) as qemu:
            qemu.outl(CONFIG_ADDRESS, _PCIEXBAR)
            qemu.outl(CONFIG_DATA, ECAM | 1)
            if above:
                qemu.store(ECAM + (0x20 << 12) + BUS_NUMBERS, 4, 0x0003_0100)
            if above > 1:
                qemu.store(ECAM + (1 << 20) + BUS_NUMBERS, 4, 0x0003_0201)
            seen = [read(qemu, above, size)]
            for value in 0, 0xFFFF_FFFF:
                fill(qemu, above, size, value, KEPT.get(model, {}))
                seen.append(read(qemu, above, size))
        print(model)
        for index, dwords in enumerate(zip(*seen, strict=True)):
            free = (0, 0, 0xFFFF_FFFF if index >= 0x10 else 0)
            if dwords != free:
                print(f"{4 * index:03x} " + " ".join(f"{dword:08x}" for dword in dwords))


if __name__ == "__main__":
    main()
