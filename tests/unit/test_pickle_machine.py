"""The pickle machine gives what pickle.load gives, for every protocol."""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.sources.pickle.machine import Machine
from h5traces.sources.pickle.source import MalformedError, MemorySource, PickleLimits, RejectedError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def load(data: bytes, **limits: int) -> Any:
    return Machine(MemorySource(data), PickleLimits(**limits)).load()


def assert_same(expected: Any, found: Any) -> None:
    assert type(expected) is type(found)
    if isinstance(expected, dict):
        assert list(expected) == list(found)
        for key, value in expected.items():
            assert_same(value, found[key])
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (np.ndarray, np.generic)):
        # numpy swaps arrays of protocols 0 to 4 to native order; here the file's order stays.
        found = found.astype(found.dtype.newbyteorder("="), copy=False)
        expected = expected.astype(expected.dtype.newbyteorder("="), copy=False)
        assert expected.dtype == found.dtype
        assert expected.shape == found.shape
        assert expected.tobytes() == found.tobytes()
        assert expected.flags.f_contiguous == found.flags.f_contiguous
    elif isinstance(expected, float):
        assert struct.pack(">d", expected) == struct.pack(">d", found) or (
            math.isnan(expected) and math.isnan(found)  # text protocols drop a nan's payload
        )
    else:
        assert expected == found


dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.integer_dtypes(endianness="<"),
    hnp.integer_dtypes(endianness=">"),
    hnp.unsigned_integer_dtypes(endianness=">"),
    hnp.floating_dtypes(endianness="<", sizes=(16, 32, 64)),
    hnp.floating_dtypes(endianness=">", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="<", sizes=(64, 128)),
    hnp.complex_number_dtypes(endianness=">", sizes=(64, 128)),
    hnp.byte_string_dtypes(min_len=1, max_len=5),
    hnp.unicode_string_dtypes(min_len=1, max_len=5, endianness="<"),
    hnp.unicode_string_dtypes(min_len=1, max_len=5, endianness=">"),
)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
scalars = hnp.arrays(dtypes, ()).map(lambda array: array[()])
layouts = arrays.flatmap(
    lambda array: (
        st.sampled_from([array, array.T, np.asfortranarray(array), array[::-1, ...]])
        if array.ndim
        else st.just(array)
    )
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(1 << 2100), max_value=1 << 2100),
    st.floats(),
    st.text(),
    st.binary(),
    st.binary().map(bytearray),
    layouts,
    scalars,
)
keys = st.text() | st.integers(min_value=1 - (1 << 63), max_value=(1 << 63) - 1)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(keys, inner, max_size=5),
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(value=values)
def test_equals_pickle_load(protocol: int, value: Any) -> None:
    data = pickle.dumps(value, protocol)
    assert_same(pickle.loads(data), load(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        "lines\nand \\u0041 \x00 \U0001f600 \ud800",
        "x" * 70_000,
        b"x" * 70_000,
        bytearray(b"x" * 70_000),
        list(range(2500)),
        {str(number): number for number in range(2500)},
        [0, 1, True, False, 255, 256, 65535, 65536, -1, 1 << 31, -(1 << 31), 1 << 63, 1 << 2000],
        [0.0, -0.0, math.inf, -math.inf, 5e-324, 1e308, 0.1],
        [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        np.longdouble("1.5"),
        np.zeros((0, 1 << 40)),
        np.broadcast_to(np.arange(3), (2, 3)),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_equals_pickle_load_in_the_corners(protocol: int, value: Any) -> None:
    data = pickle.dumps(value, protocol)
    assert_same(pickle.loads(data), load(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<f2", ">f2", ">c8", "<U3", ">U3", "|b1", "|S4"])
def test_arrays_keep_the_byte_order_of_the_file(protocol: int, dtype: str) -> None:
    value = np.ones((2, 3), dtype)
    found = load(pickle.dumps(value, protocol))
    assert (found.dtype.str, found.dtype.byteorder) == (value.dtype.str, value.dtype.byteorder)
    assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_objects_stay_shared(protocol: int) -> None:
    inner = ["shared"]
    found = load(pickle.dumps({"a": inner, "b": (inner, inner)}, protocol))
    assert found["a"] is found["b"][0] is found["b"][1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_dicts_stay_ordered_dicts(protocol: int) -> None:
    value = OrderedDict(b=1, a=2)
    assert_same(value, load(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_the_module_names_of_numpy_1_and_2(package: str, protocol: int) -> None:
    value = {"array": np.arange(6, dtype=">i4").reshape(2, 3), "scalar": np.float32(0.1)}
    data = pickle.dumps(value, protocol)

    def rename(match: re.Match[bytes]) -> bytes:
        name = package.encode() + match[2]
        return b"c" + name if match[1] == b"c" else b"\x8c" + bytes([len(name)]) + name

    renamed, count = re.subn(rb"(c|\x8c.)numpy\._?core(\.multiarray|\.numeric)", rename, data)
    assert count == (1 if protocol == 4 else 2)  # protocol 4 writes the second as a memo slot
    assert_same(value, load(renamed))


def test_forms_that_only_old_picklers_write() -> None:
    assert load(b"(dp1\nS'a\\x41\\n\\''\np2\nI7\nsS'b'\nL8L\ns.") == {"aA\n'": 7, "b": 8}
    assert load(b"(I1\nI2\nl.") == [1, 2]
    assert load(b"(U\x01aT\x02\x00\x00\x00bct.") == ("a", "bc")
    assert load(b"I01\n.") is True
    assert load(b"F0.5\n.") == 0.5
    assert load(
        b"c__builtin__\nbytearray\n(X\x02\x00\x00\x00\xc3\xbfX\x07\x00\x00\x00latin-1tR."
    ) == bytearray(b"\xff")
    # cPickle of Python 2 numbered its memo from 1.
    assert load(b"\x80\x02]q\x01(X\x01\x00\x00\x00aq\x02h\x02e.") == ["a", "a"]
    # POP, POP_MARK and DUP are never written for plain data, but mean what they say.
    assert load(b"K\x01K\x020.") == 1
    assert load(b"K\x01(K\x02K\x031.") == 1
    assert load(b"K\x012\x86.") == (1, 1)


def test_large_arrays_are_views_of_the_payload() -> None:
    data = pickle.dumps(np.zeros(1 << 20, np.uint8), 4)
    array = load(data)
    assert isinstance(array.base, bytes)
    assert not array.flags.writeable
    assert load(pickle.dumps(np.zeros(1 << 20, np.uint8), 5)).flags.writeable


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"\x80\x06N.", MalformedError, "protocol 6"),
        (b"\xffN.", MalformedError, "0xff is not a pickle opcode"),
        (b"I1x\n.", MalformedError, "text of an int"),
        (b"Fx\n.", MalformedError, "text of a float"),
        (b"S'\\q'\n.", MalformedError, "Python 2 string"),
        (b"U\x01\xff.", MalformedError, "Python 2 string holds bytes"),
        (b"NN.", RejectedError, "left on the stack"),
        (b"]}a", MalformedError, "no end"),
        (b"B\xff\x00\x00\x00abc", MalformedError, "255 bytes are declared and only 3 follow"),
        (b"I1", MalformedError, "declared"),
    ],
)
def test_refuses_what_no_pickler_writes(data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(data)


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        ([1] * 100, {"max_item_opcodes": 50}),
        (["a" + str(number) for number in range(100)], {"max_item_memo": 50}),
        ([[[[["deep"]]]]], {"max_mark_depth": 0}),
        (b"x" * 100, {"max_payload_nbytes": 99}),
        (bytearray(b"x" * 100), {"max_payload_nbytes": 99}),
        ("x" * 100, {"max_string_nbytes": 99}),
        ([b"x" * 100, b"y" * 100], {"max_item_nbytes": 199}),
    ],
)
def test_every_limit_names_itself(value: Any, limit: dict[str, int]) -> None:
    data = pickle.dumps([value, value], 5)
    with pytest.raises(RejectedError, match=rf"raise PickleLimits\({next(iter(limit))}="):
        load(data, **limit)


def test_errors_are_conversion_errors() -> None:
    assert issubclass(UnsafePickleError, ConversionError)
