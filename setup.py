"""The compiled variant of the batches (pyproject.toml says all the rest).

It is optional: without a C compiler or Python.h everything installs and numpy does the work. The limited API makes one
library serve every CPython from 3.11 on.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "vfio_model.batch._compiled",
            ["vfio_model/batch/_compiled.c"],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=["-std=c11", "-O3"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
