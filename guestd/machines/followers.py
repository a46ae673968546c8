"""Who follows an IOMMU region, in words."""

from __future__ import annotations

from vfio_model.memory.notifier import IOMMUNotifier


def follower(notifier: IOMMUNotifier) -> str:
    """The owner of the callback names the follower; the range is relative to the region."""
    owner = type(getattr(notifier.fn, "__self__", notifier.fn)).__name__
    flags = "|".join(flag.name or "" for flag in type(notifier.flags) if flag and flag in notifier.flags)
    return f"{owner}: {flags}, {notifier.start:016x}-{notifier.last:016x}"
