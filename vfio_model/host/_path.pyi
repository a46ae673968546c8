"""What ``_path.c`` offers."""

from collections.abc import Callable

from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer

class Path:
    """The fast half of :class:`vfio_model.host.dma.AssignedImpl` on the lane whose counter is ``lanes[slot]``.

    ``pe`` and ``lanes`` (words) and ``dirty`` (the bytes of a dirty map, or None) are held as long as the object lives.

    :raise ValueError: when they are too short or not aligned.
    """

    def __new__(
        cls,
        pe: memoryview,
        lanes: memoryview,
        slot: int,
        slow_read: Callable[[int, WriteBuffer], MemTxResult],
        slow_write: Callable[[int, ReadBuffer], MemTxResult],
        ok: MemTxResult,
        dirty: memoryview | None = None,
        /,
    ) -> Path: ...
    def read(self, iova: int, out: WriteBuffer, /) -> MemTxResult:
        """``ok`` after an access that went well here, else what ``slow_read`` answers."""

    def write(self, iova: int, data: ReadBuffer, /) -> MemTxResult:
        """As :meth:`read`, with ``slow_write``."""

    def many(self, iovas: memoryview, size: int, pieces: memoryview, first: int, to_ram: bool, /) -> int:
        """Move the pieces of ``size`` bytes from number ``first`` on, each in a section of its own; returns how many
        went before one that is not plainly good. ``iovas`` are words.

        :raise ValueError: when there are fewer pieces than addresses.
        """

    def know(
        self,
        root_word: int,
        record: int,
        start: int,
        shift: int,
        base: int,
        tces: memoryview,
        ram: memoryview,
        levels: tuple[int, int, int, int] = ...,
        /,
    ) -> None:
        """Serve the window that word ``root_word`` of the PE publishes as ``record``: its first bus address, page shift
        and TCEs; and the segment whose byte 0 lies at ``base``. The two views are held until :meth:`forget`.

        With more than one level ``tces`` are the words of the whole domain, and ``levels`` says how many there are, the
        bits that each indexes, the word of the topmost table, and the pages of the window.
        """

    def forget(self) -> None:
        """Leave all to the slow half, and give the two views back."""
