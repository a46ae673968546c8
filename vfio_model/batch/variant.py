"""Which implementation translates and maps batches and moves assigned DMA: the compiled one if it loads, else numpy.

All give the same results (``reference`` is the meaning of the others, in plain Python). The environment variable
``VFIO_MODEL_BATCH`` forces one for this process and its children: to compare them, or to look for a bug. Single
accesses of the assigned path are Python unless it is ``compiled``; for mappings (:mod:`vfio_model.batch.tces`,
:mod:`vfio_model.batch.dma_map`) ``reference`` is numpy, and :mod:`vfio_model.batch.pages` is numpy always.
"""

from __future__ import annotations

import os
from functools import partial
from types import ModuleType
from typing import Any, Literal, Protocol, get_args

from vfio_model.batch.tables import translate_each_reference, translate_reference
from vfio_model.errors import ConfigError

compiled: ModuleType | None
"""The library, or None where it was not built."""
try:
    from vfio_model.batch import _compiled

    compiled = _compiled
except ImportError:
    compiled = None

Variant = Literal["reference", "numpy", "compiled"]
VARIABLE = "VFIO_MODEL_BATCH"


def choose(forced: str | None, built: bool) -> Variant:
    """The variant for a value of the variable; empty is as good as unset.

    :raise ConfigError: when there is no such variant, or it was not built.
    """
    if not forced:
        return "compiled" if built else "numpy"
    for variant in get_args(Variant):
        if variant == forced and (built or variant != "compiled"):
            known: Variant = variant
            return known
    if forced == "compiled":
        raise ConfigError(
            "the compiled variant of the batches was not built",
            where=VARIABLE,
            hint="install again where a C compiler and Python.h are, or choose numpy",
        )
    raise ConfigError(f"no variant {forced!r}", where=VARIABLE, hint="one of " + ", ".join(get_args(Variant)))


chosen: Variant = choose(os.environ.get(VARIABLE), compiled is not None)
"""What this process uses."""


def kernel() -> Any:
    """The compiled library (see ``_compiled.pyi``) when it is what this process uses, else None."""
    return compiled if chosen == "compiled" else None


class Translator(Protocol):
    """Translates batches through one table; see :class:`vfio_model.batch.table_vectors.TableTranslator`."""

    def translate(self, iovas: Any, out: Any, /) -> tuple[bool, int]:
        """Addresses of ``iovas`` into ``out`` (contiguous u64 words, as many, not the same); whether all lie in the
        window, and the AND of their permissions. When one lies outside, ``out`` holds rubbish.
        """

    def translate_each(self, iovas: Any, /) -> tuple[Any, Any]:
        """Address and permission of each on its own, as two arrays; outside the window both are 0."""


def table_translator(table: Any, start: int, page_shift: int) -> Translator:
    """A translator through ``table`` (contiguous u64 words, shared, not copied), whose window starts at ``start`` and
    has pages of ``1 << page_shift`` bytes (2..63). It serves one thread.
    """
    if chosen == "compiled":
        return CompiledTranslator(table, start, page_shift)
    if chosen == "reference":
        return ReferenceTranslator(table, start, page_shift)
    from vfio_model.batch.table_vectors import TableTranslator  # noqa: PLC0415  imports numpy, heavy and optional

    return TableTranslator(table, start, page_shift)


class CompiledTranslator:
    """A :class:`Translator` by the compiled library."""

    def __init__(self, table: Any, start: int, page_shift: int) -> None:
        assert compiled is not None, "chosen only where it was built"
        self.translate = partial(compiled.translate, table, start, page_shift)
        self._each = partial(compiled.translate_each, table, start, page_shift)

    def translate_each(self, iovas: Any, /) -> tuple[memoryview, bytearray]:
        """See :class:`Translator`."""
        out, perms = memoryview(bytearray(8 * len(iovas))).cast("Q"), bytearray(len(iovas))
        self._each(iovas, out, perms)
        return out, perms


class ReferenceTranslator:
    """A :class:`Translator` in plain Python."""

    def __init__(self, table: Any, start: int, page_shift: int) -> None:
        self._window = memoryview(table), start, page_shift

    def translate(self, iovas: Any, out: Any, /) -> tuple[bool, int]:
        """See :class:`Translator`."""
        addresses, inside, perms = translate_reference(*self._window, memoryview(iovas))
        for at, address in enumerate(addresses):
            out[at] = address
        return inside, perms

    def translate_each(self, iovas: Any, /) -> tuple[list[int], list[int]]:
        """See :class:`Translator`."""
        return translate_each_reference(*self._window, memoryview(iovas))
