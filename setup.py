"""The compiled variants of the batches and of two DMA paths (pyproject.toml says all the rest).

They are optional: without a C compiler or Python.h everything installs and Python and numpy do the work. The limited
API makes one library serve every CPython from 3.11 on.
"""

from setuptools import Extension, setup


def compiled(module: str, *more: str) -> Extension:
    """The extension ``module``, of the source of its name and ``more`` sources and headers beside it."""
    first = module.replace(".", "/") + ".c"
    beside = [first.rpartition("/")[0] + "/" + name for name in more]
    return Extension(
        module,
        [first, *(path for path in beside if path.endswith(".c"))],
        depends=[path for path in beside if path.endswith(".h")],
        define_macros=[("Py_LIMITED_API", "0x030b0000")],
        extra_compile_args=["-std=c11", "-O3"],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[
        compiled("vfio_model.batch._compiled", "_compiled_maps.c", "_compiled_walks.c", "_compiled.h"),
        compiled("vfio_model.host._path", "../memory/_lane.h"),
        compiled("vfio_model.memory._atc", "_lane.h"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
