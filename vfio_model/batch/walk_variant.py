"""Walks through tables of several levels by the variant that this process uses (:mod:`vfio_model.batch.variant`)."""

from __future__ import annotations

from typing import Any

from vfio_model.batch import variant
from vfio_model.batch.lazy import lazy_numpy
from vfio_model.batch.walks import WalkSpec, walk_reference


def walk(spec: WalkSpec, base: int, words: Any, iovas: Any) -> tuple[Any, Any]:
    """As :func:`walk_reference`, as arrays (uint64, uint8); ``iovas`` is a numpy uint64 array."""
    np = lazy_numpy()
    kernel = variant.kernel()
    if kernel is not None:
        out, perms = np.empty(len(iovas), dtype=np.uint64), np.empty(len(iovas), dtype=np.uint8)
        kernel.walk(words, base, np.ascontiguousarray(iovas), out, perms, spec.words())
        return out, perms
    if variant.chosen == "reference":
        addresses, each = walk_reference(spec, base, words, iovas)
        return np.array(addresses, dtype=np.uint64), np.array(each, dtype=np.uint8)
    from vfio_model.batch.walk_vectors import walk_vectors  # noqa: PLC0415  imports numpy, heavy and optional

    return walk_vectors(spec, base, words, iovas)
