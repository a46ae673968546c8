"""The migrated state of a pseries machine: which sections there are, how they are taken and loaded.

::

    source: stop ─► (RAM passes, the last one final) ─► sections ─► END          destination: reset, not running
                                                                    │
       read everything ─► every section known, in place, complete? ─┴─ no: VMStateError, nothing has changed
                                                                    └─ yes: load in the order below

Loading goes from what others stand on to what stands on them: time, VIO, bridges, TCE tables, functions, interrupt
lines. Of a bridge's two tables the second comes first: a host puts a window where its slot says, so the window at the
64-bit address has to be made while the default one is still there, as the guest made it. A table's window closes and
opens anew, whereby a VFIO container makes its host windows and maps what the table holds.

Sections are named and numbered as QEMU's where QEMU has them (``spapr_iommu``, ``spapr_pci``). The instance of a table
is its LIOBN, of a bridge its index, of a function index << 16 | bus << 8 | devfn.

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
is. Its own state is an *extra* entry, loaded when everything else is, before the machine runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vfio_model.errors import VMStateError
from vfio_model.iommu.spapr.quirks import OVERLAPPING_WINDOWS
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.iommu.spapr.vmstate import SPAPR_IOMMU, completed, export_table, import_table
from vfio_model.machine.phb import SpaprPhb
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.machine.vio import VioDma
from vfio_model.pci.device import PCIDevice
from vfio_model.ranges import Range
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription, decode, encode, unused
from vfio_model.vmstate.ram import RamReceiver, RamView
from vfio_model.vmstate.stream import MAX_PAYLOAD, MAX_SECTION_HEAD, Frame, FrameKind, FrameReader, FrameWriter, Section

VIRTUAL_CLOCK = VMStateDescription("virtual-clock", 1, (Field("now_ns", Type.U64),))
IRQ_LINES = VMStateDescription(
    "irq-lines",
    1,
    (
        Field("high_count"),
        Field("high", array="high_count"),
        Field("raised_count"),
        Field(
            "raised",
            array="raised_count",
            struct=VMStateDescription("irq-lines/raised", 1, (Field("irq"), Field("count", Type.U64))),
        ),
    ),
)
"""Levels, and how often each line went up."""
_MSI = VMStateDescription("spapr_pci/msi", 1, (Field("config_addr"), Field("first_irq"), Field("num")))
SPAPR_PCI = VMStateDescription(
    "spapr_pci",
    2,
    (
        Field("buid", Type.U64, equal=True),
        unused(4),
        Field("msi_devs_num"),
        Field("msi_devs", array="msi_devs_num", struct=_MSI),
    ),
    minimum_version=2,
)
"""A bridge: which functions have which message interrupts. Its pins follow from its functions', its LIOBNs from its
index: their old field is unused.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of the machine in the stream. ``check`` completes and judges a state; ``load`` takes it.

    ``optional``: older streams do not have it, and then it keeps its reset state.
    """

    description: VMStateDescription
    instance: int
    export: Callable[[], State]
    load: Callable[[State], OSError | None]
    check: Callable[[State, str], State] = lambda state, _where: state
    optional: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """What a section names it by."""
        return self.description.name, self.instance


def entries(machine: PseriesMachine) -> Iterator[Entry]:
    """Everything of ``machine`` that migrates besides RAM, in the order in which it is loaded.

    :raise VMStateError: a device cannot be migrated.
    """
    yield _clock(machine)
    for device in machine.vio:
        if device.dma is not None:
            yield _vio(device.dma)
    for phb in machine.phbs.values():
        yield _phb(phb)
        for number in reversed(range(len(phb.dma.tables))):
            yield _table(phb.dma.tables[number], optional=number > 0)
    for phb in machine.phbs.values():
        for devfn, function in sorted(phb.bus.devices.items()):
            yield _function(function, phb.index << 16 | phb.bus.number << 8 | devfn)
    yield _irqs(machine)


def _clock(machine: PseriesMachine) -> Entry:
    clock = machine.clock

    def load(state: State) -> None:
        clock.advance_to(state["now_ns"])

    return Entry(VIRTUAL_CLOCK, 0, lambda: {"now_ns": clock.now_ns}, load)


def _table(table: SpaprTceTable, *, optional: bool) -> Entry:
    return Entry(
        SPAPR_IOMMU,
        table.liobn,
        lambda: export_table(table),
        lambda state: import_table(table, state),
        lambda state, where: completed(state, where=where),
        optional,
    )


def _vio(dma: VioDma) -> Entry:
    def load(state: State) -> OSError | None:
        error = import_table(dma.table, state)
        dma.set_bypass(state["bypass"])
        return error

    return Entry(
        SPAPR_IOMMU,
        dma.table.liobn,
        lambda: export_table(dma.table, bypass=dma.bypass),
        load,
        lambda state, where: completed(state, where=where),
    )


def _phb(phb: SpaprPhb) -> Entry:
    def export() -> State:
        given = [
            {"config_addr": address, "first_irq": block.first, "num": block.num}
            for address, block in sorted(phb.msi.given.items())
        ]
        return {"buid": phb.buid, "msi_devs_num": len(given), "msi_devs": given}

    def load(state: State) -> None:
        phb.msi.restore((each["config_addr"], each["first_irq"], each["num"]) for each in state["msi_devs"])

    return Entry(SPAPR_PCI, phb.index, export, load)


def _function(function: PCIDevice, instance: int) -> Entry:
    if function.VMSTATE is None:
        raise VMStateError(
            f"{type(function).__name__} does not say what of it migrates", where=f"function {instance:#x}"
        )

    def check(state: State, where: str) -> State:
        function.check_state(state, where=where)
        return state

    def load(state: State) -> None:
        function.import_state(state)

    return Entry(function.VMSTATE, instance, function.export_state, load, check)


def _irqs(machine: PseriesMachine) -> Entry:
    irqs = machine.irqs

    def export() -> State:
        high = sorted(irqs.high)
        raised = [{"irq": irq, "count": count} for irq, count in sorted(irqs.raised.items())]
        return {"high_count": len(high), "high": high, "raised_count": len(raised), "raised": raised}

    def load(state: State) -> None:
        irqs.restore(state["high"], {each["irq"]: each["count"] for each in state["raised"]})

    return Entry(IRQ_LINES, 0, export, load, optional=True)


# -- the source ------------------------------------------------------------------------------------------------------


def ram_views(machine: PseriesMachine) -> list[RamView]:
    """The machine's RAM, as :mod:`vfio_model.vmstate.ram` takes it."""
    return [RamView(block.name, block.view, block.page_size) for block in machine.ram]


def device_frames(machine: PseriesMachine, writer: FrameWriter, extra: Iterable[Entry] = ()) -> Iterator[bytes]:
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


def save_device_state(machine: PseriesMachine) -> bytes:
    """A whole stream without RAM."""
    writer = FrameWriter()
    return b"".join((writer.header(machine.TYPE), *device_frames(machine, writer)))


# -- the destination -------------------------------------------------------------------------------------------------


class MachineLoader:
    """Reads a stream for ``machine``, which is reset and does not run. RAM is stored as it comes, everything else at
    :meth:`load`.
    """

    def __init__(self, machine: PseriesMachine, *, with_ram: bool = True, extra: Iterable[Entry] = ()) -> None:
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

    def _check_end(self, frame: Frame) -> None:
        for key, entry in self._entries.items():
            if key not in self._states and not entry.optional:
                raise VMStateError(f"no section {key[0]}, instance {key[1]:#x}", where=frame.where)

        for phb in self._machine.phbs.values():
            self._check_windows(phb, frame)

    def _check_windows(self, phb: SpaprPhb, frame: Frame) -> None:
        if OVERLAPPING_WINDOWS in phb.dma.options.quirks:
            return
        seen: list[Range] = []
        for table in phb.dma.tables:
            state = self._states.get((SPAPR_IOMMU.name, table.liobn))
            if state is not None and state["mig_nb_table"]:
                window = Range.sized(state["bus_offset"], state["mig_nb_table"] << state["page_shift"])
                if any(window.overlaps(other) for other in seen):
                    raise VMStateError(f"the DMA windows of {phb.name} overlap at {window}", where=frame.where)
                seen.append(window)

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


def load_device_state(machine: PseriesMachine, data: bytes | memoryview) -> None:
    """Load what :func:`save_device_state` made.

    :raise VMStateError: see :class:`MachineLoader`.
    """
    loader = MachineLoader(machine, with_ram=False)
    loader.feed(data)
    loader.load()
