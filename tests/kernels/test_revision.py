"""Python calls the kernels that it was written for, and no older ones."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from h5traces.format import native

# Of the names and parameters of all functions. After a change of them, count up `REVISION` in
# format/native.py and kernels.h, and put the new digest here.
INTERFACE = {6: "70c47f08847412eb2a7ae82fbb8f38177f4eea6a56863d9968cc40eae35b9e7b"}


@pytest.mark.skipif(native.NATIVE is None, reason="no compiled kernels")
def test_the_interface_is_that_of_its_revision() -> None:
    functions = {
        name: value.__doc__ for name, value in vars(native.NATIVE).items() if callable(value)
    }
    digest = hashlib.sha256(repr(sorted(functions.items())).encode()).hexdigest()
    assert digest == INTERFACE[native.REVISION]


def test_older_kernels_are_left_alone() -> None:
    code = (
        "import sys, types\n"
        "old = sys.modules['h5traces._native'] = types.ModuleType('h5traces._native')\n"
        "old.REVISION = 0\n"
        "from h5traces.format import native\n"
        "assert native.NATIVE is None\n"
        "print(native.describe())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no compiled kernels\n"
