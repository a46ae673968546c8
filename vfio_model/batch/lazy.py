"""numpy, imported by the first who needs it: 200 ms that a process without batches never pays."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def lazy_numpy() -> Any:
    """The module."""
    import numpy  # noqa: PLC0415 - the reason for this file

    return numpy
