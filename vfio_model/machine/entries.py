"""What of a machine migrates, one object at a time: entries of every machine type, and those that all have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfio_model.errors import VMStateError
from vfio_model.machine.base import Machine
from vfio_model.pci.device import PCIDevice
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of the machine in the stream. ``check`` completes and judges a state; ``load`` takes it.

    ``optional``: older streams do not have it, and then it keeps its reset state. ``early`` takes what is said of it
    before the machine stands.
    """

    description: VMStateDescription
    instance: int
    export: Callable[[], State]
    load: Callable[[State], OSError | None]
    check: Callable[[State, str], State] = lambda state, _where: state
    optional: bool = False
    early: Callable[[bytes], None] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What a section names it by."""
        return self.description.name, self.instance


def clock_entry(machine: Machine) -> Entry:
    """Virtual time."""
    clock = machine.clock

    def load(state: State) -> None:
        clock.advance_to(state["now_ns"])

    return Entry(VIRTUAL_CLOCK, 0, lambda: {"now_ns": clock.now_ns}, load)


def function_entry(function: PCIDevice, instance: int) -> Entry:
    """A PCI function.

    :raise VMStateError: it cannot be migrated.
    """
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


def irqs_entry(machine: Machine) -> Entry:
    """Interrupt lines; loaded last."""
    irqs = machine.irqs

    def export() -> State:
        high = sorted(irqs.high)
        raised = [{"irq": irq, "count": count} for irq, count in sorted(irqs.raised.items())]
        return {"high_count": len(high), "high": high, "raised_count": len(raised), "raised": raised}

    def load(state: State) -> None:
        irqs.restore(state["high"], {each["irq"]: each["count"] for each in state["raised"]})

    return Entry(IRQ_LINES, 0, export, load, optional=True)
