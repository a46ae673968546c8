"""The compiled variant of what a cache of translations does at a hit (``_atc.c``), where it was built and is wanted."""

from __future__ import annotations

from vfio_model.batch import variant

try:
    from vfio_model.memory._atc import Front, Path
except ImportError:  # not built
    Front = Path = None  # type: ignore[assignment,misc]

__all__ = ["Front", "Path", "available"]


def available() -> bool:
    """Whether this process uses it."""
    return Path is not None and variant.chosen == "compiled"
