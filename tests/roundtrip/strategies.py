"""Hypothesis strategies for what legacy dicts hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

ODD_TEXTS = (
    "",
    "\0",
    "a\0",
    "\0\0",
    "\0b",
    "\ud800",
    "\udfff\ud800",
    "\u241b",
    "\u241b0000",
    "\u241bD800",
    "\ufffd",
    "\U0001f600",
    "a\nb\r\n",
    '"',
    "\\",
    "\x1b[31m",
)
# Names that mean something to HDF5, to the escapes of the format, or to its encodings.
ODD_KEYS = (
    "a/b",
    "/",
    "",
    ".",
    "..",
    "...",
    "%",
    "%2F",
    "%25",
    "$int",
    "$",
    "$dict",
    "a\0b",
    "\0",
    "\u241b",
    "\u241b0041",
    "extra",
    "kinds",
    "steps",
    "layer_000",
    "hidden_states/layer_000",
    "attention",
    "00000000",
    "\u65e5\u672c",
    "e\u0301",
)
STORED_ELSEWHERE = frozenset(
    {
        "hidden_states",
        "attentions",
        "attention_mean",
        "tokens",
        "tokens_decoded",
        "question",
        "generated_text",
        "generated_answer",
        "generated_answer_clean",
        "question_id",
        "prompt_length",
        "label",
    }
)

# All of Unicode, lone surrogates included.
texts = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=()), max_size=12)
# In a container a NaN is a NaN: JSON keeps neither its sign nor its payload.
floats = st.floats().map(lambda value: math.nan if math.isnan(value) else value)
integers = st.integers() | st.sampled_from(
    [2**53 - 1, 2**53, -(2**53), 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**60]
)
field_names = (
    st.sampled_from(ODD_KEYS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
).filter(lambda name: name not in STORED_ELSEWHERE)
dict_keys = st.sampled_from(ODD_KEYS) | texts | st.integers(-(2**63) + 1, 2**63 - 1)

dtypes = st.sampled_from(
    [
        "?",
        "i1",
        "u1",
        "<i2",
        ">i2",
        "<u4",
        ">u4",
        "<i8",
        ">i8",
        "<u8",
        "<f2",
        ">f2",
        "<f4",
        ">f4",
        "<f8",
        ">f8",
        "<c8",
        ">c16",
        "S3",
        "<U3",
        ">U3",
    ]
).map(np.dtype)


@st.composite
def arrays(draw: Any) -> np.ndarray:
    """Arrays of up to three axes, also empty, 0-d, in Fortran's order and not contiguous."""
    dtype = draw(dtypes)
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    elements = None
    if dtype.kind == "U":
        # numpy drops NUL characters at the end of a text.
        letters = st.characters(exclude_categories=())
        elements = st.text(letters, max_size=3).map(lambda text: text.rstrip("\0"))
    array = draw(npst.arrays(dtype, shape, elements=elements))
    order = draw(st.sampled_from(["C", "F", "strided"]))
    if order == "F":
        return np.asfortranarray(array)
    if order == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::-2]
    return array


numpy_scalars = st.builds(
    lambda dtype, value: np.array([value], dtype)[0],
    st.sampled_from(["?", "i1", "u8", "<i4", "<f2", "<f4", "<f8", "<c16"]),
    st.integers(0, 100),
) | st.builds(
    lambda dtype, value: np.array([value], dtype)[0],
    st.sampled_from(["<f2", "<f4", "<f8", "<c16"]),
    st.sampled_from([0.5, -0.0, math.inf, math.nan]),
)
plain_leaves = st.none() | st.booleans() | integers | floats | texts | st.binary(max_size=20)
leaves = plain_leaves | arrays() | numpy_scalars | st.binary(max_size=5).map(bytearray)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists, tuples and dicts of `children`."""
    return (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | st.dictionaries(dict_keys, children, max_size=4)
    )


values = st.recursive(leaves, containers, max_leaves=12)
plain_values = st.recursive(plain_leaves, containers, max_leaves=12)
extra_fields = st.dictionaries(field_names, values, max_size=5)

# Floating-point arrays with everything that casts must get right.
_SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, 65520.0, 1e-8, 6e-5, 1e-40, 3.4e38)


@st.composite
def float_arrays(draw: Any, *, dtype: str | None = None) -> np.ndarray:
    """Arrays of float16, float32 or float64 whose values lie near the limits of narrower types."""
    name = draw(st.sampled_from(["<f2", "<f4", "<f8", ">f4"])) if dtype is None else dtype
    made = np.dtype(name)
    width = 8 * made.itemsize
    exact = st.floats(width=16).map(float)
    anything = st.floats(width=width).map(float)
    special = st.sampled_from(_SPECIAL)
    element = draw(st.sampled_from([exact, anything, exact | anything | special, special]))
    count = draw(st.integers(0, 24))
    numbers = draw(st.lists(element, min_size=count, max_size=count))
    with np.errstate(all="ignore"):
        return np.array(numbers, dtype=np.float64).astype(made)
