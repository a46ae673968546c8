"""``info mtree``: the memory regions as QEMU prints them: the tree of each address space, then the regions that only
aliases show; with ``-f`` the flat views, spaces that show the same under one head.
"""

from __future__ import annotations

from collections.abc import Iterable

from guestd.guest import Guest
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.flatview import FlatRange
from vfio_model.memory.region import AliasRegion, MemoryRegion, RAMRegion
from vfio_model.ranges import U64_MAX


def mtree(guest: Guest) -> list[str]:
    """The lines of ``info mtree``."""
    found: list[str] = []
    aliased: dict[int, MemoryRegion] = {}
    for space in guest.board.address_spaces():
        found.append(f"address-space: {space.name}")
        if space.root is not None:
            found += _tree(space.root, 0, 1, aliased)
        found.append("")
    shown: set[int] = set()
    while fresh := [region for key, region in aliased.items() if key not in shown]:
        for region in fresh:
            shown.add(id(region))
            found.append(f"memory-region: {region.name}")
            found += [*_tree(region, 0, 1, aliased), ""]
    return found


def _tree(region: MemoryRegion, base: int, depth: int, aliased: dict[int, MemoryRegion]) -> list[str]:
    start = base + region.offset
    head = f"{'  ' * depth}{_span(start, start + region.size - 1)} (prio {region.priority}, {_type(region)}): "
    disabled = "" if region.enabled else " [disabled]"
    if isinstance(region, AliasRegion):
        target, first = region.target, region.target_offset
        aliased.setdefault(id(target), target)
        return [f"{head}alias {region.name} @{target.name} {_span(first, first + region.size - 1)}{disabled}"]
    lines = [f"{head}{region.name}{disabled}"]
    for child in sorted(region.subregions, key=lambda child: (child.offset, -child.priority)):
        lines += _tree(child, start, depth + 1, aliased)
    return lines


def flat(guest: Guest) -> list[str]:
    """The lines of ``info mtree -f``."""
    groups: list[tuple[list[FlatRange], list[AddressSpace]]] = []
    for space in guest.board.address_spaces():
        ranges = space.view.ranges
        group = next((spaces for known, spaces in groups if known == ranges), None)
        if group is None:
            groups.append((ranges, [space]))
        else:
            group.append(space)
    found: list[str] = []
    for number, (ranges, spaces) in enumerate(groups):
        found.append(f"FlatView #{number}")
        found += [f' AS "{space.name}", root: {_root(space)}' for space in spaces]
        found.append(f" Root memory region: {_root(spaces[0])}")
        found += list(_flat_lines(ranges)) or ["  No rendered FlatView"]
        found.append("")
    return found


def _flat_lines(ranges: Iterable[FlatRange]) -> Iterable[str]:
    for each in ranges:
        offset = f" @{each.offset:016x}" if each.offset else ""
        kind = "rom" if each.readonly else _type(each.region)
        yield f"  {_span(each.start, each.last)} (prio {each.region.priority}, {kind}): {each.region.name}{offset}"


def _root(space: AddressSpace) -> str:
    return space.root.name if space.root is not None else "(none)"


def _span(first: int, last: int) -> str:
    return f"{first & U64_MAX:016x}-{min(last, U64_MAX):016x}"


def _type(region: MemoryRegion) -> str:
    if isinstance(region, RAMRegion):
        return "ramd" if region.ram_device else "rom" if region.readonly else "ram"
    return "i/o" if region.terminates else "container"
