"""What a unit looks at to translate an address, entry by entry, read from the tables as they are; for a person.

Nothing is reported, marked or cached by it. Sources as in :mod:`.structures` and :mod:`.walk`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vfio_model.iommu.vtd.lookup import Lookup
from vfio_model.iommu.vtd.ports import RID
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.structures import RID_PASID, Binding, Context, Reason, TableType
from vfio_model.iommu.vtd.walk import ADDRESS_BITS, LARGE, PRESENT, READ, WRITE, Walk, page_mask

_PERMS = ("no access", "r", "w", "rw")
_ROOT_REASONS = (Reason.ROOT_NOT_PRESENT, Reason.ROOT_UNREADABLE, Reason.ROOT_RESERVED)
_KINDS = {
    TableType.FIRST: "first-stage tables",
    TableType.SECOND: "second-stage tables",
    TableType.NESTED: "first-stage tables behind second-stage ones",
    TableType.PASS_THROUGH: "pass-through",
}


class Step(NamedTuple):
    """One thing that was looked at: what, what was found there, and whether the walk goes on."""

    what: str
    value: str
    ok: bool = True


class Explained(NamedTuple):
    """The steps; ``page``: how the walk of the page tables ended, None where it did not come to that. ``passed``: the
    address is the memory's own."""

    steps: list[Step]
    page: Walk | None = None
    passed: bool = False


def explain(lookup: Lookup, space: VtdSpace, iova: int) -> Explained:
    """How requests of ``space`` to ``iova`` are translated now."""
    if not lookup.enabled:
        return Explained([Step("translation", "off")], passed=True)
    steps, context = _entries(lookup, space)
    binding = _bound(lookup, space, context, steps) if context is not None else None
    if not space.translated:  # as the tables said when they were last looked at
        return Explained([step._replace(ok=True) for step in steps], passed=True)
    if binding is None or binding.type is TableType.PASS_THROUGH:
        return Explained(steps, passed=binding is not None)
    if space.pasid == RID and INTERRUPT_FIRST <= iova <= INTERRUPT_LAST:
        steps.append(Step("interrupt range", "a write here is an interrupt message", ok=False))
        return Explained(steps)
    steps += _page_entries(lookup, binding, iova)
    page = lookup.walker.walk(binding, iova, 0)
    if page.reason:
        steps.append(Step("page", _words(page.reason), ok=False))
    else:
        size = page_mask(page.level) + 1
        steps.append(Step("page", f"{page.page:#x}, {size:#x} bytes, {_PERMS[page.perm]}"))
    steps.append(Step("IOTLB", _cached(lookup, space, binding, iova, page)))
    return Explained(steps, None if page.reason else page)


def _words(reason: Reason) -> str:
    return f"{reason.name.lower().replace('_', ' ')} (fault reason {reason:#x})"


def _hex(*words: int | None) -> str:
    return " ".join("not memory" if word is None else f"{word:#x}" for word in words)


def _entries(lookup: Lookup, space: VtdSpace) -> tuple[list[Step], Context | None]:
    """Root and context entry."""
    structures, word, bus, devfn = lookup.structures, lookup.memory.word, space.bus.number, space.devfn
    reason, _, context = structures.context(bus, devfn)
    at = structures.root + bus * 16
    table, size = word(at), 16
    if structures.scalable:
        at, size = at + (8 if devfn >= 0x80 else 0), 32
        table = word(at)
    failed = reason in _ROOT_REASONS
    mode = "scalable" if structures.scalable else "legacy"
    value = f"{mode} mode, bus {bus:02x}, at {at:#x}: {_hex(table)}" + (f": {_words(reason)}" if failed else "")
    steps = [Step("root entry", value, ok=not failed)]
    if failed or table is None:
        return steps, None
    at = (table & ADDRESS_BITS) + (devfn & 0x7F if structures.scalable else devfn) * size
    value = f"{devfn >> 3:02x}.{devfn & 7}, at {at:#x}: {_hex(word(at), word(at + 8))}"
    if context is None:
        value += f": {_words(reason)}"
    cached = space.context
    value += ", not cached" if cached is None else ", cached" if cached == context else ", cached as it was before"
    steps.append(Step("context entry", value, ok=context is not None))
    return steps, context


def _bound(lookup: Lookup, space: VtdSpace, context: Context, steps: list[Step]) -> Binding | None:
    """What translates, by the PASID table in scalable mode."""
    structures, word = lookup.structures, lookup.memory.word
    reason, _, binding = structures.binding(context, space.pasid)
    if context.scalable:
        pasid = RID_PASID if space.pasid == RID else space.pasid
        at = (context.lo & ADDRESS_BITS) + (pasid >> 6 & 0x3FFF) * 8
        directory = word(at)
        present = directory is not None and bool(directory & PRESENT)
        value = f"PASID {pasid:#x}, at {at:#x}: {_hex(directory)}" + ("" if present else f": {_words(reason)}")
        steps.append(Step("PASID directory entry", value, ok=present))
        if not present or directory is None:
            return None
        at = (directory & ADDRESS_BITS) + (pasid & 63) * 64
        value = f"at {at:#x}: {_hex(word(at), word(at + 8), word(at + 16))}" + (f": {_words(reason)}" if reason else "")
        steps.append(Step("PASID entry", value, ok=binding is not None))
    if binding is not None:
        steps.append(Step("domain", f"{binding.did}: {_KINDS[binding.type]}"))
    return binding


def _page_entries(lookup: Lookup, binding: Binding, iova: int) -> Iterator[Step]:
    """The entry of each level, as far as the tables go."""
    first = binding.type is not TableType.SECOND
    level, table = (binding.first_levels, binding.first_root) if first else (binding.second_levels, binding.second_root)
    bits = PRESENT if first else READ | WRITE
    if not first and iova >> binding.second_width:
        return
    while level:
        at = table + (iova >> 9 * level & 0xFF8)
        if binding.type is TableType.NESTED:
            behind = lookup.walker.second(binding, at, READ)
            if behind.reason:
                return
            at = behind.page | at & page_mask(behind.level)
        entry = lookup.memory.word(at)
        if entry is None or not entry & bits:
            yield Step(f"level {level} entry", f"at {at:#x}: {_hex(entry)}: nothing is mapped")
            return
        leaf = level == 1 or bool(entry & LARGE)
        yield Step(f"level {level} entry", f"at {at:#x}: {entry:#x}: {'a page' if leaf else 'a table'}")
        if leaf:
            return
        table, level = entry & ADDRESS_BITS, level - 1


def _cached(lookup: Lookup, space: VtdSpace, binding: Binding, iova: int, page: Walk) -> str:
    known = lookup.cached(space, binding, iova)
    if known is None:
        return "not cached"
    size = page_mask(known.level) + 1
    text = f"{known.page:#x}, {size:#x} bytes, {_PERMS[known.perm]}"
    same = not page.reason and (known.level, known.page, known.perm) == (page.level, page.page, page.perm)
    return f"{text}, as in the tables" if same else f"{text}: not as in the tables, until it is invalidated"
