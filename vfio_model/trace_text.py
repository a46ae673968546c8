"""Trace events as QEMU's log backend prints them, and what such a line says.

The formats are those of QEMU's ``hw/ppc/trace-events`` and ``hw/i386/trace-events``, so that what reads QEMU's log
reads ours, and the other way round; any other event is written as ``name field=value …``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from string import Formatter
from typing import Final

_PUT = "liobn={liobn:#x} ioba={ioba:#x} tce={tce:#x} ret={ret}"
_GET = "liobn={liobn:#x} ioba={ioba:#x} ret={ret} tce={tce:#x}"
_STUFF = "liobn={liobn:#x} ioba={ioba:#x} tcevalue={tcevalue:#x} npages={npages} ret={ret}"
_INDIRECT = "liobn={liobn:#x} ioba={ioba:#x} tcelist={tcelist:#x} iobaN={iobaN:#x} tceN={tceN:#x} ret={ret}"
_PE = "buid={buid:#x} addr={cfgaddr:#x}"

SPAPR: Final[dict[str, str]] = {
    "spapr_iommu_pci_put": _PUT,
    "spapr_iommu_put": _PUT,
    "spapr_iommu_pci_get": _GET,
    "spapr_iommu_get": _GET,
    "spapr_iommu_pci_stuff": _STUFF,
    "spapr_iommu_stuff": _STUFF,
    "spapr_iommu_pci_indirect": _INDIRECT,
    "spapr_iommu_indirect": _INDIRECT,
    "spapr_iommu_xlate": "liobn={liobn:#x} {ioba:#x} -> {tce:#x} perm={perm} mask={pgsize:#x}",
    "spapr_iommu_new_table": "liobn={liobn:#x} table={table:#x} fd={fd}",
    "spapr_iommu_ddw_query": f"{_PE}, {{wa}} windows available, max window size={{win_size:#x}}, mask={{pgmask:#x}}",
    "spapr_iommu_ddw_create": (
        f"{_PE}, page size={{pg_size:#x}}, requested={{req_size:#x}}, start addr={{start:#x}}, liobn={{liobn:#x}}"
    ),
    "spapr_iommu_ddw_remove": "liobn={liobn:#x}",
    "spapr_iommu_ddw_reset": _PE,
}

_CONTEXT = "bus {bus:#x} devfn {devfn:#x} high {high:#x} low {low:#x}"
_PAGE = "sid {sid:#x} iova {iova:#x} slpte {slpte:#x} domain {domain:#x}"

VTD: Final[dict[str, str]] = {
    "vtd_reg_read": "addr {addr:#x} size {size:#x}",
    "vtd_reg_write": "addr {addr:#x} size {size:#x} value {value:#x}",
    "vtd_reg_write_gcmd": "status {status:#x} value {value:#x}",
    "vtd_reg_write_fectl": "value {value:#x}",
    "vtd_reg_dmar_root": "addr {addr:#x} scalable {scalable}",
    "vtd_dmar_enable": "enable {enable}",
    "vtd_reset_exit": "",
    "vtd_context_cache_reset": "",
    "vtd_pasid_cache_reset": "",
    "vtd_switch_address_space": (
        "Device {bus:02x}:{slot:02x}.{function:x} switching address space (iommu enabled={enabled})"
    ),
    "vtd_inv_qi_enable": "enabled {enabled}",
    "vtd_inv_qi_setup": "addr {addr:#x} size {size}",
    "vtd_inv_qi_head": "read head {head}",
    "vtd_inv_qi_tail": "write tail {tail}",
    "vtd_inv_qi_fetch": "",
    "vtd_inv_desc": "invalidate desc type {type} high {high:#x} low {low:#x}",
    "vtd_inv_desc_iotlb_global": "iotlb invalidate global",
    "vtd_inv_desc_iotlb_domain": "iotlb invalidate whole domain {domain:#x}",
    "vtd_inv_desc_iotlb_pages": "iotlb invalidate domain {domain:#x} addr {addr:#x} mask {mask:#x}",
    "vtd_inv_desc_cc_global": "context invalidate globally",
    "vtd_inv_desc_cc_device": "context invalidate device {bus:02x}:{slot:02x}.{function:02x}",
    "vtd_inv_desc_wait_sw": "wait invalidate status write addr {addr:#x} data {data:#x}",
    "vtd_iotlb_cc_hit": f"IOTLB context hit {_CONTEXT} gen {{gen}}",
    "vtd_iotlb_cc_update": f"IOTLB context update {_CONTEXT} gen {{old}} -> gen {{gen}}",
    "vtd_iotlb_page_hit": f"IOTLB page hit {_PAGE}",
    "vtd_iotlb_page_update": f"IOTLB page update {_PAGE}",
    "vtd_dmar_translate": ("dev {bus:02x}:{slot:02x}.{function:02x} iova {iova:#x} -> gpa {gpa:#x} mask {mask:#x}"),
    "vtd_ir_remap_msi_req": "addr {addr:#x} data {data:#x}",
    "vtd_ir_remap_msi": "(addr {addr:#x}, data {data:#x}) -> (addr {remapped_addr:#x}, data {remapped_data:#x})",
    "vtd_reg_write_iectl": "value {value:#x}",
    "vtd_reg_ics_clear_ip": "",
    "vtd_reg_ir_root": "addr {addr:#x} size {size:#x}",
    "vtd_ir_enable": "enable {enable}",
    "vtd_ir_irte_get": "index {index} low {low:#x} high {high:#x}",
    "vtd_ir_remap": "index {index} trigger {trigger} vector {vector} deliver {deliver} dest {dest:#x} mode {mode}",
    "vtd_irq_generate": "addr {addr:#x} data {data:#x}",
    "vtd_dmar_fault": "sid {sid:#x} fault {fault} addr {addr:#x} write {write}",
    "vtd_frr_new": "index {index} high {high:#x} low {low:#x}",
    "vtd_fsts_ppf": "FSTS PPF bit set to {ppf}",
    "vtd_fsts_clear_ip": "",
    "vtd_warn_invalid_qi_tail": "tail {tail:#x}",
    "vtd_inv_desc_cc_domain": "context invalidate domain {domain:#x}",
    "vtd_inv_desc_cc_devices": "context invalidate devices sid {sid:#x} fmask {fmask:#x}",
    "vtd_inv_desc_iec": "granularity {granularity:#x} index {index:#x} mask {mask:#x}",
    "vtd_inv_desc_pasid_cache_gsi": "",
    "vtd_inv_desc_pasid_cache_dsi": "Domain selective PC invalidation domain {domain:#x}",
    "vtd_inv_desc_pasid_cache_psi": "PASID selective PC invalidation domain {domain:#x} pasid {pasid:#x}",
    "vtd_inv_desc_wait_irq": "{msg}",
    "vtd_inv_desc_wait_write_fail": "write fail for wait desc hi {hi:#x} lo {lo:#x}",
}

FORMATS: Final[dict[str, str]] = SPAPR | VTD
"""By event: its text behind the name, in the syntax of :meth:`str.format`."""
_HEXADECIMAL_FROM: Final = 4096


def line(event: str, fields: Mapping[str, object]) -> str:
    """One event, without a line feed."""
    known = FORMATS.get(event)
    if known is not None:
        return f"{event} {known.format_map(fields)}"
    return " ".join([event, *(f"{name}={_plain(value)}" for name, value in fields.items())])


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= _HEXADECIMAL_FROM:
        return f"{value:#x}"
    return re.sub(r"\s+", " ", str(value))


def fields_of(event: str, text: str) -> dict[str, int | str] | None:
    """What ``text``, the line behind the name of ``event``, says; None when it has not the form.

    :raise KeyError: for an event that is not in :data:`FORMATS`.
    """
    pattern, bases = _reader(event)
    match = pattern.fullmatch(text)
    if match is None:
        return None
    pairs = zip(bases, match.groups(), strict=True)
    return {name: value if base is None else int(value, base) for (name, base), value in pairs}


@cache
def _reader(event: str) -> tuple[re.Pattern[str], tuple[tuple[str, int | None], ...]]:
    """The pattern of ``event``, and for each of its groups the field and its base (None: a word)."""
    pattern, bases = "", []
    for text, name, spec, _ in Formatter().parse(FORMATS[event]):
        pattern += re.escape(text)
        if name is None:
            continue
        base = 16 if spec and spec.endswith("x") else 10 if name in _DECIMAL else None
        pattern += r"(?:0x)?([0-9a-fA-F]{1,16})" if base == 16 else r"(-?\d{1,20})" if base == 10 else r"(\S+)"
        bases.append((name, base))
    return re.compile(pattern), tuple(bases)


_DECIMAL: Final = frozenset(
    ("ret", "npages", "perm", "fd", "wa", "scalable", "enable", "enabled", "size", "head", "tail", "gen", "old")
)
