"""Where a machine's interrupts end: numbered lines, counted. There is no CPU to take them; drivers and tests look
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

IrqListener = Callable[[int, bool], None]
"""``(irq, level)``: the line went up or down."""


class IrqLines:
    """All lines of one machine. A message is a *pulse*: up and down."""

    def __init__(self) -> None:
        self.raised: Counter[int] = Counter()
        """How often each line went up."""
        self._high: set[int] = set()
        self.listeners: list[IrqListener] = []

    @property
    def high(self) -> frozenset[int]:
        """The lines that are up."""
        return frozenset(self._high)

    def level(self, irq: int) -> bool:
        """Whether the line is up."""
        return irq in self._high

    def set(self, irq: int, level: bool) -> None:
        """Drive the line; only a change is heard."""
        if level == (irq in self._high):
            return
        if level:
            self._high.add(irq)
            self.raised[irq] += 1
        else:
            self._high.discard(irq)
        for listener in tuple(self.listeners):
            listener(irq, level)

    def pulse(self, irq: int) -> None:
        """Up and down."""
        self.set(irq, True)
        self.set(irq, False)

    def restore(self, high: Iterable[int], raised: Mapping[int, int]) -> None:
        """Exactly the lines ``high`` are up, and they went up as often as ``raised`` says."""
        wanted = set(high)
        for irq in sorted(self._high | wanted):
            self.set(irq, irq in wanted)
        self.raised = Counter(raised)

    def reset(self) -> None:
        """Every line goes down; counts stay."""
        for irq in sorted(self._high):
            self.set(irq, False)
