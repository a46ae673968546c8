"""hostd's shared memory: table memory of domains and PE blocks, each a sparse memfd sealed so that only hostd can
write it; and TCE tables of virtual machines, which their process may write too.

The modelled host asks for memory by name and gets words; here is which memfd lies behind which words, so that it can
be passed to a device process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from protocols.transport.shm import MappedMemory, create_memory


class SharedAreas:
    """The areas that exist, by their words."""

    def __init__(self) -> None:
        self._areas: dict[int, MappedMemory] = {}

    def buffers(self, name: str, size: int) -> memoryview:
        """Zeroed words for the host (its ``Buffers``)."""
        return self._create(name, size, exclusive=True)

    def shared(self, name: str, size: int) -> memoryview:
        """Zeroed words that whoever gets the descriptor may write too."""
        return self._create(name, size, exclusive=False)

    def _create(self, name: str, size: int, *, exclusive: bool) -> memoryview:
        memory = create_memory(name, size, exclusive=exclusive)
        self._areas[id(memory.words)] = memory
        return memory.words

    def fd(self, words: memoryview) -> int:
        """The memfd behind ``words``; it stays ours."""
        return self._areas[id(words)].fd

    def keep(self, live: Iterable[memoryview]) -> None:
        """Unmap every area whose words are not among ``live``: nobody reads or writes them any more."""
        kept = {id(words) for words in live}
        for key in [key for key in self._areas if key not in kept]:
            _close(self._areas.pop(key))

    def close(self) -> None:
        """Unmap everything."""
        self.keep(())

    def __len__(self) -> int:
        return len(self._areas)


def _close(memory: MappedMemory) -> None:
    with contextlib.suppress(BufferError):  # somebody still holds a slice: the mapping goes with it
        memory.close()
