"""Who is connected: the open files of the port and the mms behind them.

One AF_UNIX connection is one open file; its handle is a random 64-bit number that ioctls quote. Handles are secrets
of the client that opened them, die with their connection and are never used again. A client is the process at the
other end (its pid, by SO_PEERCRED): a handle quoted on behalf of an mm of another process is EBADF.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hostd.events import Descriptor, Mapped
from vfio_model.errors import RemoteProtocolError
from vfio_model.host.host import CONTAINER_PATH, GROUP_PREFIX
from vfio_model.host.hpa import Segment
from vfio_model.host.mm import Mm, Vma


@dataclass(eq=False)
class Client:
    """An mm: ``handle`` names it in ioctls. ``memory`` holds the memfds it declared, by the host's segment id."""

    handle: int
    connection: int
    pid: int
    name: str
    mm: Mm
    memory: dict[str, tuple[Segment, Descriptor]] = field(default_factory=dict)
    segments: dict[str, Segment] = field(default_factory=dict)
    """By the name that the client declared."""
    vmas: dict[int, Segment] = field(default_factory=dict)
    """What is declared, by its first address."""
    leaving: bool = False
    _mapped: dict[str, Mapped] = field(default_factory=dict)

    def view(self, vma: Vma) -> memoryview | None:
        """The bytes of a mapping of its, to be read; None when they cannot be seen. Mapped here when first needed."""
        name = vma.segment.id
        if name not in self._mapped:
            try:
                self._mapped[name] = self.memory[name][1].map()
            except (KeyError, OSError, RemoteProtocolError):
                return None
        return self._mapped[name].view[vma.offset : vma.offset + vma.length]

    def forget(self, segment: Segment) -> None:
        """Close the memfd of a segment that is not used any more."""
        _, fd = self.memory.pop(segment.id)
        fd.close()
        mapped = self._mapped.pop(segment.id, None)
        if mapped is not None:
            mapped.close()

    def uses(self, segment: Segment) -> bool:
        """Whether ``segment`` is declared, or pinned by what was declared once."""
        pinned = (run.hpa for region in self.mm.regions.values() for run in region.runs)
        return segment in self.vmas.values() or any(hpa == segment.hpa for hpa in pinned)

    def close_memory(self) -> None:
        """Close the memfds."""
        for segment, _ in list(self.memory.values()):
            self.forget(segment)


@dataclass(eq=False)
class OpenFile:
    """A file of a container, a group, a virtual machine or one of its TCE tables. The modelled host knows it by the
    same ``handle``.
    """

    handle: int
    connection: int
    path: str
    client: Client
    closing: bool = False
    left: int = 0
    """The container that a group is or was in: taking it out may still be under way."""

    def __post_init__(self) -> None:
        self.is_container = self.path == CONTAINER_PATH
        self.is_group = not self.is_container and self.path.startswith(GROUP_PREFIX)

    @property
    def group(self) -> int:
        """The number of the group that it is."""
        return int(self.path.removeprefix(GROUP_PREFIX))


@dataclass(eq=False)
class Connection:
    """A connection; what it is for is known after its first message."""

    id: int
    pid: int
    opened: Client | OpenFile | str | None = None
    """The string is the name of an attached device server. None: nothing yet."""
    busy: bool = False
    """Its open is still pending."""


class Clients:
    """Connections, mms and files by what they are looked up with. ``new_handle`` draws a 64-bit secret."""

    def __init__(self, new_handle: Callable[[], int]) -> None:
        self._new_handle = new_handle
        self._used: set[int] = set()
        self.connections: dict[int, Connection] = {}
        self.mms: dict[int, Client] = {}
        self.files: dict[int, OpenFile] = {}

    def handle(self) -> int:
        """A handle that was never given out, and is not 0."""
        while (handle := self._new_handle()) in self._used or handle == 0:
            pass
        self._used.add(handle)
        return handle

    def file_for(self, mm: int, handle: int) -> OpenFile | None:
        """The open file ``handle``, if it belongs to the process of mm ``mm``; None is EBADF."""
        client, file = self.mms.get(mm), self.files.get(handle)
        if client is None or file is None or file.closing or client.leaving or file.client.pid != client.pid:
            return None
        return file

    def files_of(self, client: Client) -> list[OpenFile]:
        """Every file that was opened on behalf of ``client``, groups before containers."""
        return sorted(
            (file for file in self.files.values() if file.client is client), key=lambda file: file.is_container
        )

    def by_path(self, path: str) -> Iterator[OpenFile]:
        """Open and closing files of ``path``."""
        return (file for file in self.files.values() if file.path == path)
