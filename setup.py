"""The compiled kernels, which are left out where no compiler is; pyproject.toml says all else."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(Path("h5traces/_kernels").glob("*.c"))
# Contracting multiplications and additions would change results.
FLAGS = "-std=c11 -O3 -g0 -ffp-contract=off -fvisibility=hidden -Wall -Wextra".split()
# Free-threaded builds of Python have no stable ABI.
IS_STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "h5traces._native",
            [path.as_posix() for path in SOURCES],
            depends=["h5traces/_kernels/kernels.h"],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", "-lm"],
            py_limited_api=IS_STABLE,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if IS_STABLE else {},
)
