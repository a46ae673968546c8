"""The steps of an ``explain``: what was looked at, what was found there, and whether the walk can go on."""

from __future__ import annotations

from typing import Final

from vfio_model.memory.address_space import AddressSpace
from vfio_model.ranges import Gpa
from vfio_model.vfio.ram_span import ram_span

PERMS: Final = {0: "no access", 1: "r", 2: "w", 3: "rw"}


class Walk:
    """The steps so far; :attr:`ok` is False after the first that failed."""

    def __init__(self) -> None:
        self.steps: list[dict[str, object]] = []
        self.ok = True
        self.result: int | None = None
        self.perm = ""
        self.page_size = 0

    def step(self, what: str, value: str, *, ok: bool = True) -> bool:
        """Note a step; whether the walk goes on."""
        self.steps.append({"what": what, "value": value, "ok": ok})
        self.ok = self.ok and ok
        return ok

    def reach(self, system: AddressSpace, gpa: int, perm: int) -> None:
        """The last step: guest-physical ``gpa`` with permission bits ``perm``."""
        span = ram_span(system, Gpa(gpa))
        where = f"{span.block.name} + {span.offset:#x}" if span is not None else "not RAM"
        self.step("guest-physical", f"{gpa:#x}: {where}", ok=span is not None)
        self.result, self.perm = gpa, PERMS[perm]

    def document(self) -> dict[str, object]:
        """As the control socket gives it."""
        return {
            "steps": self.steps,
            "result": self.result if self.ok else None,
            "perm": self.perm if self.ok else "",
            "page_size": self.page_size,
        }
