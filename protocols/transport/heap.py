"""The garbage collector of a process that has started and is going to serve for long.

Reference counting frees what a request leaves behind; what is left to the collector are cycles, which are rare here.
With Python's defaults it would nevertheless walk the whole program, every module and schema, again and again between
requests, and throw everything else out of the processor's caches. Source: the ``gc`` module, ``freeze()``.
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000
"""So many more objects than were freed make the collector look at the young ones."""


def settle() -> None:
    """What there is by now stays for the life of the process: the collector need not look at it any more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
