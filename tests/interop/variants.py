"""The machines that programs run on, each as QEMU's command line names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vfio_model.iommu.spapr.quirks import OVERLAPPING_WINDOWS
from vfio_model.iommu.spapr.regs import DmaOptions

RAM_SIZE = 256 << 20
EDU_SLOT, TESTDEV_SLOT = 2, 3


@dataclass(frozen=True)
class Variant:
    """One pseries machine of ``phbs`` bridges. ``properties``: what QEMU's ``spapr-pci-host-bridge`` is given, by
    name; ``dma``: the same as the model has it.
    """

    name: str
    properties: Mapping[str, str] = field(default_factory=dict)
    dma: DmaOptions = field(default_factory=DmaOptions)
    phbs: int = 1
    vio: tuple[int, ...] = ()
    """Units of VIO devices with a window."""
    length: int = 250
    """Operations of a program."""
    for_guestd: tuple[str, ...] = ()
    """Options that guestd alone is given."""

    def arguments(self) -> list[str]:
        """Options for QEMU and for guestd alike: the machine and its devices."""
        found = ["-machine", "pseries", "-m", str(RAM_SIZE >> 20), "-nodefaults", "-display", "none"]
        for name, value in self.properties.items():
            found += ["-global", f"spapr-pci-host-bridge.{name}={value}"]
        for index in range(self.phbs):
            bus = "pci.0"
            if index:
                found += ["-device", f"spapr-pci-host-bridge,index={index},id=pci.{index}"]
                bus = f"pci.{index}.0"
            found += ["-device", f"edu,bus={bus},addr={EDU_SLOT:02x}.0,dma_mask={(1 << 64) - 1:#x}"]
            found += ["-device", f"iommu-testdev,bus={bus},addr={TESTDEV_SLOT:02x}.0"]
        for unit in self.vio:
            found += ["-device", f"spapr-vscsi,reg={unit:#x}"]
        return found


def _sizes(*shifts: int) -> int:
    return sum(1 << shift for shift in shifts)


VARIANTS: tuple[Variant, ...] = (
    Variant("default"),
    Variant("two-phbs", phbs=2),
    Variant("ddw-off", {"ddw": "off"}, DmaOptions(ddw=False)),
    Variant("pgsz-4k-64k", {"pgsz": f"{_sizes(12, 16):#x}"}, DmaOptions(pgsz=_sizes(12, 16))),
    Variant("pgsz-16m", {"pgsz": f"{_sizes(24):#x}"}, DmaOptions(pgsz=_sizes(24))),
    Variant("small-window", {"dma_win_size": "0x1000000"}, DmaOptions(dma_win_size=0x100_0000)),
    Variant(
        "moved-windows",
        {"dma_win_addr": "0x80000000", "dma_win_size": "0x80000000", "dma64_win_addr": "0x1000000000000"},
        DmaOptions(dma_win_addr=0x8000_0000, dma_win_size=0x8000_0000, dma64_win_addr=1 << 48),
    ),
    Variant("odd-window", {"dma_win_size": "0x30005000"}, DmaOptions(dma_win_size=0x3000_5000), length=1000),
    Variant("vio", vio=(0x2000, 0x7100_0005)),
    Variant(
        "overlapping-windows",
        dma=DmaOptions(quirks=frozenset((OVERLAPPING_WINDOWS,))),
        for_guestd=("-machine", f"quirks={OVERLAPPING_WINDOWS}"),
    ),
    Variant("three-phbs-and-vio", phbs=3, vio=(0x2000,), length=600),
)
