"""One DMA address followed through the live tables, step by step, for a person who asks why it fails.

Reads what a device would read, in the order in which it would, and says at each word where it is, what it holds and
what follows from it. The last step of a failing walk names the entry to blame. It takes no lane: the answer describes
the words as they were read, and may be out of date when it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vfio_model.host.hpa import Segment
from vfio_model.host.layout import (
    PE_BUS_MASTER,
    PE_STATE,
    PE_WINDOW0,
    PE_WINDOWS,
    TCE_LEAF,
    TCE_PERM,
    TCE_READ,
    TCE_WRITE,
)
from vfio_model.host.walk import Window, decode

Verdict = Literal["ok", "fault"]
_PERMISSIONS = {0: "none", TCE_READ: "read", TCE_WRITE: "write", TCE_PERM: "read and write"}


@dataclass(frozen=True, slots=True)
class Step:
    """``what`` was read, ``where`` (area and byte offset), the ``value`` found, what it means, and whether it lets
    pass.
    """

    what: str
    where: str
    value: int
    meaning: str
    verdict: Verdict = "ok"


def explain(
    pe: memoryview, domain: memoryview, segments: Iterable[Segment], iova: int, is_write: bool | None = None
) -> list[Step]:
    """The steps of a walk for ``iova``; ends at the first that fails.

    ``is_write`` None asks for any access. Without a ``fault`` in the last step the access goes through.
    """
    steps: list[Step] = []
    window = _pe(pe, domain, iova, steps)
    tce = _levels(domain, window, iova, steps) if window else None
    if window is not None and tce is not None and _permission(tce, is_write, steps):
        _memory(window, tce, iova, segments, steps)
    return steps


def _pe(pe: memoryview, domain: memoryview, iova: int, steps: list[Step]) -> Window | None:
    state, master = pe[PE_STATE], pe[PE_BUS_MASTER]
    steps.append(_step("PE state", "PE block", PE_STATE, state, "frozen" if state else "normal", not state))
    if state:
        return None
    meaning = "the device may master the bus" if master else "bus master is off, or the device is closed"
    steps.append(_step("bus master", "PE block", PE_BUS_MASTER, master, meaning, bool(master)))
    if not master:
        return None
    for slot in range(PE_WINDOWS):
        record = pe[PE_WINDOW0 + slot]
        if not record:
            steps.append(_step(f"window {slot}", "PE block", PE_WINDOW0 + slot, 0, "no window", True))
            continue
        window = decode(domain, PE_WINDOW0 + slot, record)
        inside = window.start <= iova <= window.last
        meaning = f"{window.start:#x}..{window.last:#x}, pages of {1 << window.page_shift:#x}, {window.levels} level(s)"
        meaning += "" if inside else f": does not hold {iova:#x}"
        steps.append(_step(f"window {slot}", "PE block", PE_WINDOW0 + slot, record, meaning, True))
        if inside:
            return window
    steps.append(Step("windows", "PE block", iova, f"no window holds {iova:#x}", "fault"))
    return None


def _levels(domain: memoryview, window: Window, iova: int, steps: list[Step]) -> int | None:
    index = (iova - window.start) >> window.page_shift
    table, shift = window.table, window.level_shift
    for level in range(window.levels - 1, 0, -1):
        number = index >> shift * level & (1 << shift) - 1
        entry: int = domain[table + number]
        if entry & TCE_LEAF:
            return _leaf(window, table + number, entry, shift * level, index, steps)
        meaning = f"next table at {entry & ~TCE_PERM:#x}" if entry else "no table below: nothing near was ever mapped"
        steps.append(_step(f"level {level} entry {number:#x}", "domain", table + number, entry, meaning, bool(entry)))
        if not entry:
            return None
        table = (entry & ~TCE_PERM) >> 3
    number = index & (1 << shift) - 1 if window.levels > 1 else index
    tce: int = domain[table + number]
    meaning = f"page {tce & -(1 << window.page_shift):#x}, {_PERMISSIONS[tce & TCE_PERM]}" if tce else "not mapped"
    steps.append(_step(f"TCE {index:#x}", "domain", table + number, tce, meaning, bool(tce)))
    return tce or None


def _leaf(window: Window, word: int, entry: int, bits: int, index: int, steps: list[Step]) -> int:
    size, address = 1 << bits + window.page_shift, entry & ~(TCE_LEAF | TCE_PERM)
    meaning = f"page {address:#x} of {size:#x} bytes, {_PERMISSIONS[entry & TCE_PERM]}"
    steps.append(_step(f"leaf {index >> bits:#x}", "domain", word, entry, meaning, True))
    return (entry & ~TCE_LEAF) | (index & (1 << bits) - 1) << window.page_shift


def _permission(tce: int, is_write: bool | None, steps: list[Step]) -> bool:
    need = TCE_PERM if is_write is None else TCE_WRITE if is_write else TCE_READ
    allowed = bool(tce & need)
    asked = {TCE_PERM: "any access", TCE_WRITE: "write", TCE_READ: "read"}[need]
    meaning = f"{asked} {'allowed' if allowed else 'refused'}: the TCE gives {_PERMISSIONS[tce & TCE_PERM]}"
    steps.append(Step("permission", "TCE", tce & TCE_PERM, meaning, "ok" if allowed else "fault"))
    return allowed


def _memory(window: Window, tce: int, iova: int, segments: Iterable[Segment], steps: list[Step]) -> None:
    page = 1 << window.page_shift
    hpa = (tce & -page) + (iova & page - 1)
    for segment in segments:
        offset = segment.hpa.to_offset(hpa)
        if 0 <= offset < segment.length:
            steps.append(Step("memory", "host-physical", hpa, f"segment {segment.id} + {offset:#x}"))
            return
    steps.append(Step("memory", "host-physical", hpa, "no segment lies there", "fault"))


def _step(what: str, area: str, word: int, value: int, meaning: str, passes: bool) -> Step:
    return Step(what, f"{area}+{word * 8:#x}", value, meaning, "ok" if passes else "fault")
