"""The migrated state of a machine: which sections there are, how they are taken and loaded.

::

    source: stop ─► (RAM passes, the last one final) ─► sections ─► END          destination: reset, not running
                                                                    │
       read everything ─► every section known, in place, complete? ─┴─ no: VMStateError, nothing has changed
                                                                    └─ yes: load in the order below

Loading goes from what others stand on to what stands on them: time first, interrupt lines last. What there is between
is a machine's own: :mod:`.pseries_vmstate`, :mod:`.q35.vmstate`.

How a process migrates with this (one of them writes, the other reads, both from their loops):

1. ``writer = FrameWriter()``; send ``writer.header(machine.TYPE)`` and the ``blocks()`` of a
   ``RamSender(writer, ram_views(machine))``.
2. While the guest runs: a first pass of :meth:`~vfio_model.vmstate.ram.RamSender.everything`, then passes of
   what became dirty, each ended by ``end_pass(final=False)``.
3. Stop every writer of guest memory (drivers, timers, device threads, idle work), send what is dirty,
   ``end_pass(final=True)``.
4. ``for piece in device_frames(machine, writer)``: sections and the end.
5. The reader feeds a :class:`MachineLoader`; when its ``complete`` is true it calls ``load()``, which resets the
   machine (and so its assigned devices) first, and lets the machine run. After any error the reader's machine is
   thrown away and the source goes on.

The registers of an assigned or remote device live in its process: of the machine's entries only its configuration space
is. Its own state is an *extra* entry, loaded when everything else is, before the machine runs; what it says of itself
before (:meth:`~vfio_model.vmstate.stream.FrameWriter.early`, among the passes over RAM) is kept until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vfio_model.errors import VMStateError
from vfio_model.machine import pseries_vmstate
from vfio_model.machine.base import Machine
from vfio_model.machine.entries import Entry
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.machine.q35 import vmstate as q35_vmstate
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.vmstate.fields import State, decode, encode
from vfio_model.vmstate.ram import RamReceiver, RamView
from vfio_model.vmstate.stream import MAX_PAYLOAD, MAX_SECTION_HEAD, Frame, FrameKind, FrameReader, FrameWriter, Section

__all__ = [
    "Entry",
    "MachineLoader",
    "device_frames",
    "entries",
    "load_device_state",
    "ram_views",
    "save_device_state",
]


def entries(machine: Machine) -> Iterator[Entry]:
    """Everything of ``machine`` that migrates besides RAM, in the order in which it is loaded.

    :raise VMStateError: a device cannot be migrated.
    """
    if isinstance(machine, PseriesMachine):
        return pseries_vmstate.entries(machine)
    assert isinstance(machine, Q35Machine), "there are two types of machines"
    return q35_vmstate.entries(machine)


# -- the source ------------------------------------------------------------------------------------------------------


def ram_views(machine: Machine) -> list[RamView]:
    """The machine's RAM, as :mod:`vfio_model.vmstate.ram` takes it."""
    return [RamView(block.name, block.view, block.page_size) for block in machine.ram]


def device_frames(machine: Machine, writer: FrameWriter, extra: Iterable[Entry] = ()) -> Iterator[bytes]:
    """A section for each object, then those of ``extra``, and the end. The machine stands still meanwhile.

    :raise VMStateError: a device cannot be migrated, or a table is too large to be sent.
    """
    for entry in (*entries(machine), *extra):
        description = entry.description
        data = encode(description, entry.export())
        if len(data) > MAX_PAYLOAD - MAX_SECTION_HEAD:
            where = f"section {description.name}, instance {entry.instance:#x}"
            raise VMStateError(f"{len(data)} bytes do not fit a frame", where=where)
        yield writer.section(Section(description.name, entry.instance, description.version, data))
    yield writer.end()


def save_device_state(machine: Machine) -> bytes:
    """A whole stream without RAM."""
    writer = FrameWriter()
    return b"".join((writer.header(machine.TYPE), *device_frames(machine, writer)))


# -- the destination -------------------------------------------------------------------------------------------------


class MachineLoader:
    """Reads a stream for ``machine``, which is reset and does not run. RAM is stored as it comes, everything else at
    :meth:`load`.
    """

    def __init__(self, machine: Machine, *, with_ram: bool = True, extra: Iterable[Entry] = ()) -> None:
        """``extra``: what is loaded when all of the machine is."""
        self._machine = machine
        self._reader = FrameReader(machine.TYPE)
        self.ram = RamReceiver(ram_views(machine)) if with_ram else None
        self._entries = {entry.key: entry for entry in (*entries(machine), *extra)}
        self._states: dict[tuple[str, int], State] = {}

    @property
    def complete(self) -> bool:
        """Whether the end has come."""
        return self._reader.ended

    def feed(self, data: bytes | memoryview) -> None:
        """More of the stream.

        :raise VMStateError: it cannot be loaded; nothing but RAM has changed, and the loader is of no more use.
        """
        for frame in self._reader.feed(data):
            if frame.kind is FrameKind.SECTION:
                self._section(frame)
            elif frame.kind is FrameKind.END:
                self._check_end(frame)
            elif frame.kind is FrameKind.EARLY:
                self._early(frame)
            elif frame.kind is not FrameKind.HEADER:
                if self.ram is None:
                    raise VMStateError("RAM in a stream of device state", where=frame.where)
                self.ram.take(frame)

    def _section(self, frame: Frame) -> None:
        if self.ram is not None and not self.ram.final:
            raise VMStateError("a section before the final pass over RAM", where=frame.where)
        section = Section.unpack(frame)
        where = f"{section.where}, {frame.where}"
        entry = self._entries.get((section.name, section.instance))
        if entry is None:
            raise VMStateError("this machine has no such object", where=where)
        if entry.key in self._states:
            raise VMStateError("comes twice", where=where)
        state = decode(entry.description, section.version, section.data, entry.export(), where=where)
        self._states[entry.key] = entry.check(state, where)

    def _early(self, frame: Frame) -> None:
        section = Section.unpack(frame)
        entry = self._entries.get((section.name, section.instance))
        if entry is None or entry.early is None:
            where = f"{section.where}, {frame.where}"
            raise VMStateError("nothing is said of it before the machine stands", where=where)
        entry.early(section.data)

    def _check_end(self, frame: Frame) -> None:
        for key, entry in self._entries.items():
            if key not in self._states and not entry.optional:
                raise VMStateError(f"no section {key[0]}, instance {key[1]:#x}", where=frame.where)

        if isinstance(self._machine, PseriesMachine):
            pseries_vmstate.check_windows(self._machine, self._states, where=frame.where)

    def load(self) -> None:
        """Give the machine the state that was read.

        :raise VMStateError: the stream was cut, or somebody refused a part (a host that cannot make a window): then
            the machine must not run.
        """
        self._reader.close()
        self._machine.reset()
        for entry in self._entries.values():
            state = self._states.get(entry.key)
            if state is not None:
                _load(entry, state)


def _load(entry: Entry, state: Mapping[str, Any]) -> None:
    where = f"section {entry.description.name}, instance {entry.instance:#x}"
    try:
        error = entry.load(dict(state))
    except (OSError, MemoryError) as refused:
        raise VMStateError(f"refused: {refused}", where=where) from refused
    if error is not None:
        raise VMStateError(f"refused: {error}", where=where) from error


def load_device_state(machine: Machine, data: bytes | memoryview) -> None:
    """Load what :func:`save_device_state` made.

    :raise VMStateError: see :class:`MachineLoader`.
    """
    loader = MachineLoader(machine, with_ram=False)
    loader.feed(data)
    loader.load()
