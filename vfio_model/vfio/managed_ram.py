"""One RAM section of which parts may be absent, followed by a container: QEMU's ``VFIORamDiscardListener``.

Only what is populated is mapped, and in chunks of the manager's granularity: a mapping goes as a whole, so none may
reach into what can be discarded by itself. The price is many mappings, and a host gives a container a limited number
of them; :func:`too_many` says when all sections together might need more.
"""

from __future__ import annotations

from collections.abc import Iterable

from vfio_model.memory.discard import RamDiscardListener, RamDiscardManager
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.memory.region import RAMRegion
from vfio_model.ranges import Hva, Iova, Range, align_down, align_up
from vfio_model.vfio.container import MappingBackend

OTHER_MAPPINGS = 512
"""Set aside for the sections without a manager: the memory slots that QEMU expects without KVM."""


class ManagedRAM(RamDiscardListener):
    """Maps what is populated of ``section``, whose region has a discard manager; all of it is page aligned."""

    double_discard = True

    def __init__(self, backend: MappingBackend, section: MemoryRegionSection) -> None:
        assert isinstance(section.mr, RAMRegion) and section.mr.discard_manager is not None, "managed RAM"
        self.section = section
        self.manager: RamDiscardManager = section.mr.discard_manager
        self._backend, self._block = backend, section.mr.block
        self._to_iova = section.offset_within_address_space - section.offset_within_region

    @property
    def worst_case(self) -> int:
        """How many mappings the section needs with all of it populated."""
        granularity, start = self.manager.get_min_granularity(), self.section.offset_within_region
        end = align_up(start + self.section.size, granularity)
        return (end - align_down(start, granularity)) // granularity

    def notify_populate(self, part: Range) -> None:
        """Map ``part`` chunk by chunk; one unmap takes all of it back when the host refuses one."""
        queue, granularity, at = self._backend.queue, self.manager.get_min_granularity(), part.start
        while at <= part.last:
            end = min(align_up(at + 1, granularity), part.last + 1)
            vaddr = Hva(self._block.hva + at)
            queue.map(Iova(at + self._to_iova), end - at, vaddr, readonly=self.section.readonly)
            at = end
        if error := queue.flush():
            self.notify_discard(part)
            raise error

    def notify_discard(self, part: Range) -> None:
        """Unmap ``part``, all at once."""
        self._backend.queue.unmap(Iova(part.start + self._to_iova), part.size)
        self._backend.queue.flush()


def too_many(backend: MappingBackend, sections: Iterable[ManagedRAM]) -> bool:
    """Whether ``sections``, all populated, might need more mappings than the host gives, next to all other RAM."""
    counts = [one.worst_case for one in sections]
    return sum(counts) + OTHER_MAPPINGS - len(counts) > backend.dma_max_mappings
