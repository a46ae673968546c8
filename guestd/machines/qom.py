"""An object of QOM as monitors show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Value = Callable[[], object]
TYPE_NAMES: dict[type, str] = {int: "uint64", bool: "bool", str: "str"}
"""Of properties."""


@dataclass
class QomObject:
    """``properties`` by name: type and how to read it; ``children`` by name."""

    type: str
    path: str = ""
    properties: dict[str, tuple[str, Value]] = field(default_factory=dict)
    children: dict[str, QomObject] = field(default_factory=dict)


@dataclass
class QomTree:
    """What of ``/machine`` a type of machine adds: objects by the container that they are in (``""``: the machine
    itself), the objects of its buses by their names, and properties of the machine itself.
    """

    machine_type: str
    objects: dict[str, dict[str, QomObject]] = field(default_factory=dict)
    buses: dict[str, QomObject] = field(default_factory=dict)
    properties: dict[str, tuple[str, Value]] = field(default_factory=dict)
