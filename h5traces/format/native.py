"""The compiled kernels, where a compiler was at hand when h5traces was installed.

They do what Python does, with the same results, faster and without the interpreter's lock. Each
function returns None or False for what it does not know: then Python decides.
``H5TRACES_KERNELS=0`` in the environment turns them off, and ``plain`` keeps them to what every
processor can do.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Final

_SWITCH: Final = "H5TRACES_KERNELS"
# Of the functions that Python calls; a module that was built of older sources has another one.
REVISION: Final = 6


def _compiled() -> Any:
    if os.environ.get(_SWITCH) == "0":
        return None
    try:
        module = import_module("h5traces._native")
    except ImportError:
        return None
    return module if getattr(module, "REVISION", None) == REVISION else None


# The compiled module, or None.
NATIVE: Final = _compiled()


def describe() -> str:
    """Which kernels are used, for ``h5traces --version``."""
    if NATIVE is not None:
        return f"compiled kernels ({NATIVE.features()})"
    off = os.environ.get(_SWITCH) == "0"
    return f"no compiled kernels ({_SWITCH} is 0)" if off else "no compiled kernels"
