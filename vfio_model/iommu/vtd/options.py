"""What an Intel VT-d unit can do, as a person chooses it, and the capabilities that follow.

Names and defaults are those of QEMU's ``intel-iommu`` device; ``dma_drain``, ``nested``, ``pass_through``,
``invalidation`` and ``quirks`` are the model's own. Source of CAP and ECAP: Intel VT-d specification, "Capability
Register" and "Extended Capability Register" (11.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from vfio_model.errors import ConfigError
from vfio_model.iommu.vtd import quirks as known
from vfio_model.iommu.vtd import regs
from vfio_model.pci.translation_caps import MAX_PASID_WIDTH
from vfio_model.ranges import U64_MAX

_SAGAW: Final = {39: 2, 48: 4, 57: 8}
_DOMAIN_BITS_16: Final = 6
_LARGE_2M_1G: Final = 3
_IRO: Final = 0xF
_MHMV: Final = 15


@dataclass(frozen=True, slots=True)
class VtdOptions:
    """A unit's options.

    ``fsts``: first-stage instead of second-stage translation; ``nested``: both, one behind the other, and each alone.
    ``pasid_bits``: width of PASIDs, 0 for none. ``svm``: page requests. ``invalidation``: ``sync`` completes a wait
    descriptor when it is fetched, ``async`` later. ``quirks``: names of :mod:`.quirks`, ``qemu`` for all of them.

    :raise ConfigError: for a combination that there is not, in QEMU's words.
    """

    aw_bits: int = 48
    caching_mode: bool = False
    device_iotlb: bool = False
    intremap: bool = True
    eim: bool = False
    scalable_mode: bool = False
    fsts: bool = False
    pasid_bits: int = 0
    svm: bool = False
    dma_drain: bool = True
    dma_translation: bool = True
    snoop_control: bool = False
    stale_tm: bool = False
    fs1gp: bool = True
    nested: bool = False
    pass_through: bool = True
    invalidation: Literal["sync", "async"] = "sync"
    quirks: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        complaint = self._complaint()
        if complaint:
            raise ConfigError(complaint, where="intel-iommu")
        object.__setattr__(self, "quirks", known.selected(self.quirks))

    def _complaint(self) -> str:
        rules = (
            (self.eim and not self.intremap, "eim=on cannot be selected without intremap=on"),
            (self.fsts and not self.scalable_mode, "fsts is only available in scalable mode"),
            (self.nested and not self.scalable_mode, "nested is only available in scalable mode"),
            (not self._width_supported(), self._width_complaint()),
            (self.scalable_mode and not self.dma_drain, "Need to set dma_drain for scalable mode"),
            (self.pasid and not self.scalable_mode, "Need to set scalable mode for PASID"),
            (
                not 0 <= self.pasid_bits <= MAX_PASID_WIDTH,
                f"PASID width {self.pasid_bits} exceeds Max PASID Width {MAX_PASID_WIDTH} allowed in PCI spec",
            ),
            (self.svm and not self.device_iotlb, "Need to set device IOTLB for svm"),
            (self.svm and not self.first_stage, "Need to set fsts for svm"),
            (self.svm and not self.pasid, "Need to set PASID support for svm"),
            (self.invalidation not in ("sync", "async"), f"invalidation={self.invalidation}: sync and async are known"),
        )
        return next((text for wrong, text in rules if wrong), "")

    def _width_supported(self) -> bool:
        return self.aw_bits == 48 if self.fsts else self.aw_bits in (39, 48)

    def _width_complaint(self) -> str:
        if self.fsts:
            return "Scalable mode(fsts=on): supported value for aw-bits is: 48"
        mode = "Scalable mode(fsts=off)" if self.scalable_mode else "Legacy mode"
        return f"{mode}: supported values for aw-bits are: 39, 48"

    @property
    def pasid(self) -> bool:
        """Whether requests may have PASIDs."""
        return self.pasid_bits > 0

    @property
    def first_stage(self) -> bool:
        """Whether there is first-stage translation."""
        return self.fsts or self.nested

    @property
    def second_stage(self) -> bool:
        """Whether there is second-stage translation in scalable mode."""
        return not self.fsts or self.nested

    @property
    def address_mask(self) -> int:
        """Bits of a page address that the unit has."""
        return (1 << self.aw_bits) - 1 & ~regs.PAGE

    def has(self, quirk: str) -> bool:
        """Whether ``quirk`` was chosen."""
        return quirk in self.quirks

    @property
    def cap(self) -> int:
        """The Capability Register."""
        fields = (
            regs.CAP_ND.put(_DOMAIN_BITS_16),
            regs.CAP_MGAW.put(self.aw_bits - 1),
            regs.CAP_FRO.put(regs.FRCD // 16),
            regs.CAP_SLLPS.put(_LARGE_2M_1G),
            regs.CAP_PSI,
            regs.CAP_MAMV.put(regs.MAMV),
            regs.CAP_ESRTPS,
            regs.CAP_CM if self.caching_mode else 0,
            regs.CAP_SAGAW.put(self._sagaw()) if self.dma_translation else 0,
            regs.CAP_DWD | regs.CAP_DRD if self.dma_drain else 0,
            regs.CAP_FS1GP if self.first_stage and self.fs1gp else 0,
        )
        return sum(fields) & U64_MAX

    def _sagaw(self) -> int:
        """39 bits always; 48 when the unit is that wide."""
        return sum(value for width, value in _SAGAW.items() if width <= self.aw_bits)

    @property
    def ecap(self) -> int:
        """The Extended Capability Register."""
        fields = (
            regs.ECAP_QI,
            regs.ECAP_IRO.put(_IRO),
            regs.ECAP_PT if self.pass_through else 0,
            regs.ECAP_IR | regs.ECAP_MHMV.put(_MHMV) if self.intremap else 0,
            regs.ECAP_EIM if self.eim else 0,
            regs.ECAP_DT if self.device_iotlb else 0,
            regs.ECAP_SC if self.snoop_control else 0,
            self._scalable_ecap() if self.scalable_mode else 0,
        )
        return sum(fields)

    def _scalable_ecap(self) -> int:
        fields = (
            regs.ECAP_SMTS,
            regs.ECAP_FSTS if self.first_stage else 0,
            regs.ECAP_SSTS if self.second_stage else 0,
            regs.ECAP_SRS if not self.fsts else 0,
            regs.ECAP_NEST if self.nested else 0,
            regs.ECAP_PASID | regs.ECAP_PSS.put(self.pasid_bits - 1) if self.pasid else 0,
            regs.ECAP_PRS | regs.ECAP_PDS | regs.ECAP_NWFS if self.svm else 0,
        )
        return sum(fields)
