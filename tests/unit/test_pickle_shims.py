"""Shims check what they are given before they build an array."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest

from h5traces.sources.pickle.machine import Machine
from h5traces.sources.pickle.shims import NAMES, STORAGE_NAMES, Shim
from h5traces.sources.pickle.source import MalformedError, MemorySource, PickleLimits, RejectedError


def load(data: bytes) -> Any:
    return Machine(MemorySource(data), PickleLimits()).load()


class Call:
    """Pickles as a call of any name with any arguments and state."""

    def __init__(self, module: str, name: str, *args: Any, state: Any = None) -> None:
        self.global_name = _Global(module, name)
        self.args = args
        self.state = state


class _Global:
    def __init__(self, module: str, name: str) -> None:
        self.line = f"c{module}\n{name}\n".encode()


class _Pickler(pickle._Pickler):
    """Writes names without importing them; the C pickler checks that they exist."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(obj.line)
        elif isinstance(obj, Call):
            self.save(obj.global_name)
            self.save(obj.args)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)


def dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 3).dump(value)
    return buffer.getvalue()


NDARRAY = _Global("numpy", "ndarray")
STATE = (3, "<", None, None, None, -1, -1, 0)


def dtype(code: Any = "f8", state: Any = STATE) -> Call:
    return Call("numpy", "dtype", code, False, True, state=state)


OBJECT = dtype("O8", (3, "|", None, None, None, -1, -1, 63))


def array(*state: Any, cls: Any = NDARRAY) -> Call:
    return Call("numpy.core.multiarray", "_reconstruct", cls, (0,), b"b", state=state)


def test_the_helper_writes_what_numpy_writes() -> None:
    found = load(dumps(array(1, (2,), dtype(), False, bytes(16))))
    np.testing.assert_array_equal(found, [0.0, 0.0])


def test_the_allow_list_is_exact() -> None:
    modules = {module for module, _ in NAMES}
    assert modules == {
        "numpy",
        "numpy.core.multiarray",
        "numpy._core.multiarray",
        "numpy.core.numeric",
        "numpy._core.numeric",
        "_codecs",
        "_collections",
        "argparse",
        "builtins",
        "__builtin__",
        "collections",
        "copyreg",
        "copy_reg",
        "datetime",
        "decimal",
        "fractions",
        "ml_dtypes",
        "pathlib",
        "pathlib._local",
        "types",
        "uuid",
        "torch",
        "torch._utils",
        "torch.storage",
    }
    assert {name for module, name in NAMES if module in ("builtins", "__builtin__")} == {
        *("bytes", "bytearray", "set", "frozenset", "complex", "range", "xrange", "slice"),
        *("object", "list", "dict", "tuple", "int", "float", "str", "bool"),
    }
    # These are passed on only: a call of `list` or `int` would take whatever it is given.
    for name in ("object", "list", "dict", "tuple", "int", "float", "str", "bool"):
        assert NAMES["builtins", name].call is None
    assert all(isinstance(shim, Shim) for shim in (*NAMES.values(), *STORAGE_NAMES.values()))
    assert not NAMES.keys() & STORAGE_NAMES.keys()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dtype("O", (3, "|", None, None, None, -1, -1, 63)), "unknown type"),
        (dtype("O8", (3, "|", None, None, None, -1, -1, 0)), "unexpected flags"),
        (array(1, (1,), OBJECT, False, bytes(8)), "has a bytes for its data, expected a list"),
        (Call("numpy.core.multiarray", "scalar", OBJECT, bytes(8)), "the dtype of objects"),
        (Call("numpy.core.numeric", "_frombuffer", bytes(8), OBJECT, (1,), "C"), "a bytes for its"),
        (dtype("V8"), "structures"),
        (dtype("M8"), "expected a tuple of 9"),
        (dtype("M8", (4, "<", None, None, None, -1, -1, 0, (None, (b"D", 0, 1, 1)))), "multiple 0"),
        (dtype("M8", (4, "<", None, None, None, -1, -1, 0, (None, (b"x", 1, 1, 1)))), "unit 'x'"),
        (dtype("f4,O"), "unknown type"),
        (dtype("U268435456"), "elements of 1073741824 bytes"),
        (dtype("U٣"), "unknown type"),
        (dtype(b"f8"), "called with a bytes"),
        (dtype([("a", "O")]), "called with a list"),
        (Call("numpy", "dtype", "f8"), "called with 1 arguments"),
        (dtype(state=(3, "<", None, ("a",), {"a": 1}, -1, -1, 0)), "unexpected names, fields"),
        (dtype(state=(3, "<", (1, 2), None, None, -1, -1, 0)), "unexpected subarray"),
        (dtype(state=(3, "<", None, None, None, -1, -1, 63)), "unexpected flags"),
        (dtype(state=(3, "<", None, None, None, 4096, -1, 0)), "unexpected element size"),
        (dtype(state=(3, "<", None, None, None, -1, 7, 0)), "unexpected alignment"),
        (dtype(state=(3, "x", None, None, None, -1, -1, 0)), "unexpected byte order"),
        (dtype(state=(4, "<", None, None, None, -1, -1, 0)), "unexpected version"),
        (dtype(state=(*STATE, {"metadata": 1})), "expected a tuple of 8"),
        (dtype(state=[1]), "is a list, expected a tuple of 8"),
        (dtype(state={"a": 1}), "is a dict, expected a tuple of 8"),
        (array(1, (2,), dtype(), False, [1, 2]), "has a list for its data"),
        (array(1, (2,), dtype(), False, "text"), "has a str for its data"),
        (array(1, (2,), "f8", False, bytes(16)), "has a str for its dtype"),
        (array(1, (-2,), dtype(), False, bytes(16)), "a shape holds -2"),
        (array(1, (True,), dtype(), False, bytes(8)), "a shape holds True"),
        (array(1, [2], dtype(), False, bytes(16)), "a shape is a list"),
        (array(1, (1,) * 33, dtype(), False, bytes(8)), "at most 32"),
        (array(1, (1 << 62,), dtype(), False, b""), "a shape holds"),
        (array(1, (2,), dtype(), 1, bytes(16)), "has the order an int"),
        (array(2, (2,), dtype(), False, bytes(16)), "has version 2"),
        (array(1, 2, 3), "is a tuple, expected a tuple of 4 or 5"),
        (array(1, (2,), dtype("U0"), False, b""), "0 bytes"),
        (array(cls=dtype()), "called with a"),
        (array(1, cls=bytes), "asks for|called with"),
        (Call("numpy", "ndarray", (3,)), "numpy.ndarray is called"),
        (Call("numpy.core.numeric", "_frombuffer", bytes(8), dtype(), (1,), "K"), "the order 'K'"),
        (Call("numpy.core.multiarray", "scalar", dtype(), "x"), "has a str for its data"),
        (Call("numpy.core.multiarray", "scalar", dtype()), "called with 1 arguments"),
        (Call("_codecs", "encode", "x", "rot13"), "'rot13'"),
        (Call("_codecs", "encode", b"x", "latin1"), "called with a bytes"),
        (Call("_codecs", "encode", "x"), "called with 1 arguments"),
        (Call("builtins", "bytes", 10**9), "called with 1 arguments"),
        (Call("builtins", "bytearray", 10**9), "called with an int"),
        (Call("builtins", "bytearray", "x", "utf-16"), "'utf-16'"),
        (Call("collections", "OrderedDict", [("a", 1)]), "called with 1 arguments"),
        (dtype(state=None), "without the state"),
        ([dtype(state=None)], "without the state"),
    ],
)
def test_refuses_what_numpy_never_writes(value: Any, message: str) -> None:
    with pytest.raises(RejectedError, match=message):
        load(dumps(value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (array(1, (2,), dtype(), False, bytes(15)), "needs 16 bytes, found 15"),
        (array(1, (1 << 40,), dtype(), False, bytes(15)), "needs 8,796,093,022,208 bytes"),
        (Call("numpy.core.multiarray", "scalar", dtype(), bytes(9)), "needs 8 bytes, found 9"),
        (
            array(1, (1,), dtype("U1", (3, "<", None, None, None, 4, 4, 8)), False, b"\xff" * 4),
            "not a Unicode",
        ),
        (dtype("U99999999999"), "no dtype"),
        (Call("_codecs", "encode", "\u1234", "latin1"), r"above U\+00FF"),
    ],
)
def test_refuses_contradictions(value: Any, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        load(dumps(value))


def test_copies_are_paid_for_by_what_was_read() -> None:
    text = dumps("x" * 100_000)[2:-1]
    put = b"\x94"
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0"
    data = b"\x80\x04" + text.replace(b"q\x00", b"") + put + call * 2000 + b"."
    with pytest.raises(RejectedError, match=r"copies of .* would be made.*max_created_nbytes"):
        load(data)
