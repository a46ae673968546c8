"""The log of a daemon: lines on stderr, which whoever started it sends to a file."""

from __future__ import annotations

import sys
import time


def log(role: str, text: str) -> None:
    """One line, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {role}: {text}", file=sys.stderr, flush=True)
