"""The compiled variants of the batches and of the assigned DMA path (pyproject.toml says all the rest).

They are optional: without a C compiler or Python.h everything installs and Python and numpy do the work. The limited
API makes one library serve every CPython from 3.11 on.
"""

from setuptools import Extension, setup


def compiled(module: str) -> Extension:
    """The extension ``module``, whose one source has its name."""
    return Extension(
        module,
        [module.replace(".", "/") + ".c"],
        define_macros=[("Py_LIMITED_API", "0x030b0000")],
        extra_compile_args=["-std=c11", "-O3"],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[compiled("vfio_model.batch._compiled"), compiled("vfio_model.host._path")],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
