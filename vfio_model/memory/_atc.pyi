"""What ``_atc.c`` offers."""

from collections.abc import Callable
from typing import Generic, TypeVar

from vfio_model.memory.atc_entries import Hit
from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer

T = TypeVar("T")

class Front:
    """Entries by page, as a dict has them; their buffers are held as long as they are here. ``writable``: to write
    through, for which a read-only buffer is no hit.
    """

    def __new__(cls, writable: bool, /) -> Front: ...
    def get(self, page: int, /) -> Hit | None: ...
    def __setitem__(self, page: int, hit: Hit, /) -> None: ...
    def pop(self, page: int, default: None, /) -> Hit | None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

class Path(Generic[T]):
    """Accesses that hit, each in one section; ``T`` is what tells how one of :meth:`access` ended.

    It knows nothing at first: everything goes to the slow half, of which what is not called may be None.
    """

    def __new__(
        cls,
        slow_read: Callable[[int, WriteBuffer], MemTxResult] | None,
        slow_write: Callable[[int, ReadBuffer], MemTxResult] | None,
        slow_access: Callable[[int, memoryview, bool], tuple[int, T]] | None,
        ok: MemTxResult,
        moved_ok: T,
        /,
    ) -> Path[T]: ...
    def read(self, iova: int, out: WriteBuffer, /) -> MemTxResult:
        """``ok`` after an access that lies in one entry, else what ``slow_read`` answers."""

    def write(self, iova: int, data: ReadBuffer, /) -> MemTxResult:
        """As :meth:`read`, with ``slow_write``."""

    def access(self, addr: int, view: memoryview, is_write: bool, /) -> tuple[int, T]:
        """Bytes moved, as many as lie in one entry and fit into a section, and ``moved_ok``; when there are none, what
        ``slow_access`` answers."""

    def know(
        self,
        ring: memoryview,
        lanes: memoryview,
        slot: int,
        seen: memoryview,
        gate: memoryview,
        readable: Front,
        writable: Front,
        /,
    ) -> None:
        """Serve what the two tables hold while the head of ``ring`` equals the word ``seen`` and ``gate`` (one word, or
        one byte) is not zero, in sections of the lane whose counter is ``lanes[slot]``. All are held until
        :meth:`forget`.

        :raise ValueError: when they are too short or not aligned.
        """

    def forget(self) -> None:
        """Leave all to the slow half, and give everything back."""
