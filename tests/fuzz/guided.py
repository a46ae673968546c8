"""One target under atheris, which follows what the code does with its bytes: ``python -m tests.fuzz.guided TARGET``."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["protocols", "hostd", "vfio_model"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
