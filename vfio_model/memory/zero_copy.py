"""How an emulated address space maps memory for a device (``address_space_map``).

RAM is shown in place, as far as the translation stays contiguous. When the device wants to hear of invalidations, the
mapping is kept in the table of every address space on the way, and an UNMAP notifier sits on every IOMMU on the way;
if an IOMMU refuses the notifier, the mapping is not shown in place. Everything that is not ordinary RAM gets a bounce
buffer.
"""

from __future__ import annotations

from vfio_model.memory.dma import OnInvalidate
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.mapping import DMAMapping, Release
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.space import Space
from vfio_model.memory.translation import Step, Translation, translate
from vfio_model.memory.types import DMADirection, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX


def map_range(
    space: Space, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None
) -> DMAMapping | None:
    """See :meth:`AddressSpace.map`."""
    is_write = direction is DMADirection.FROM_DEVICE
    length = min(length, U64_MAX - iova + 1)
    first = translate(space, iova, is_write, length) if length > 0 else None
    if first is None:
        return None
    if first.direct and not (is_write and first.readonly):
        mapping = _map_direct(space, iova, length, direction, on_invalidate, first)
        if mapping is not None:
            return mapping
    return _map_bounce(space, iova, first.length, direction, on_invalidate)


def _map_direct(
    space: Space,
    iova: int,
    length: int,
    direction: DMADirection,
    on_invalidate: OnInvalidate | None,
    first: Translation,
) -> DMAMapping | None:
    assert isinstance(first.region, RAMRegion), "only RAM is shown in place"
    is_write = direction is DMADirection.FROM_DEVICE
    parts = [first]
    size = first.length
    while size < length:
        part = translate(space, iova + size, is_write, length - size)
        if part is None or part.region is not first.region or part.offset != first.offset + size:
            break
        if is_write and part.readonly:
            break
        parts.append(part)
        size += part.length
    view = first.region.block.view[first.offset : first.offset + size]
    mapping = DMAMapping(iova, view, direction, on_invalidate)
    if on_invalidate is not None:
        try:
            mapping.release = _follow(mapping, parts)
        except OSError:
            return None
    if is_write:
        mapping.release = _noted(first.region, first.offset, mapping.release)
    return mapping


def _noted(region: RAMRegion, offset: int, then: Release | None) -> Release:
    """What was written in place is logged when it is given back."""

    def release(mapping: DMAMapping, access_len: int) -> None:
        if region.block.dirty is not None:
            region.block.dirty.mark(offset, access_len)
        if then is not None:
            then(mapping, access_len)

    return release


def _map_bounce(
    space: Space, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None
) -> DMAMapping | None:
    size = space.bounce.take(length)
    if not size:
        return None
    buffer = memoryview(bytearray(size))
    if direction is DMADirection.TO_DEVICE:
        space.read(iova, buffer)

    def release(mapping: DMAMapping, access_len: int) -> None:
        if direction is DMADirection.FROM_DEVICE:
            space.write(iova, buffer[:access_len])
        space.mappings.remove(mapping)
        space.bounce.give_back(size)

    mapping = DMAMapping(iova, buffer, direction, on_invalidate, bounce=True, release=release)
    space.mappings.add(mapping)
    return mapping


class _Follower:
    """Sits in the mapping tables and on the IOMMUs of one mapping in place."""

    def __init__(self, mapping: DMAMapping) -> None:
        self.mapping = mapping
        self.hit = False
        self.spaces: list[Space] = []
        self.notifiers: list[tuple[IOMMUMemoryRegion, IOMMUNotifier]] = []

    def note(self, notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        """An UNMAP overlaps: only noted, until the flush."""
        self.hit = True

    def flush(self) -> OSError | None:
        """Ring the device if an UNMAP was noted."""
        if self.hit:
            self.hit = False
            self.mapping.invalidate()
        return None

    def start(self, parts: list[Translation]) -> None:
        """:raise OSError: an IOMMU on the way refuses the notifier; nothing is left registered."""
        steps = [(step, part.length) for part in parts for step in part.steps]
        try:
            for (space, iommu), spans in _spans(steps).items():
                if iommu is not None:
                    self._watch(iommu, spans)
                else:
                    space.mappings.add(self.mapping, spans)
                    self.spaces.append(space)
        except OSError:
            self.stop(self.mapping, 0)
            raise

    def _watch(self, iommu: IOMMUMemoryRegion, spans: list[tuple[int, int]]) -> None:
        for start, last in spans:
            notifier = IOMMUNotifier(self.note, IOMMUNotifierFlag.UNMAP, start, last, flush=self.flush)
            iommu.register_notifier(notifier)
            self.notifiers.append((iommu, notifier))

    def stop(self, mapping: DMAMapping, access_len: int) -> None:
        """The mapping is given back."""
        for space in self.spaces:
            space.mappings.remove(mapping)
        for iommu, notifier in self.notifiers:
            iommu.unregister_notifier(notifier)


def _spans(
    steps: list[tuple[Step, int]],
) -> dict[tuple[Space, IOMMUMemoryRegion | None], list[tuple[int, int]]]:
    """Per space, and per IOMMU, the ranges (inclusive) that a mapping covers there; neighbours joined."""
    spans: dict[tuple[Space, IOMMUMemoryRegion | None], list[tuple[int, int]]] = {}

    def add(key: tuple[Space, IOMMUMemoryRegion | None], start: int, last: int) -> None:
        known = spans.setdefault(key, [])
        if known and known[-1][1] + 1 == start:
            known[-1] = (known[-1][0], last)
        else:
            known.append((start, last))

    for step, length in steps:
        add((step.space, None), step.address, step.address + length - 1)
        if step.iommu is not None:
            add((step.space, step.iommu), step.iommu_address, step.iommu_address + length - 1)
    return spans


def _follow(mapping: DMAMapping, parts: list[Translation]) -> Release:
    """Follow every translation under ``mapping``; returns what undoes it.

    :raise OSError: an IOMMU refuses.
    """
    follower = _Follower(mapping)
    follower.start(parts)
    return follower.stop
