"""Extra fields of every type come back from pickles and archives equal, and of the same type."""

from __future__ import annotations

import argparse
import datetime
import math
import pickle
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch

import h5traces
from h5traces.archive.tensors import materialised
from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.format import values
from h5traces.sources.pickle.stream import BatchStream

UTC, BERLIN = datetime.UTC, datetime.timezone(datetime.timedelta(hours=1, seconds=7))
ARRAY = np.arange(6, dtype=">i2").reshape(2, 3)

VALUES: dict[str, Any] = {
    "set": {"x", "y", None, 1.5, (1, "a"), True},
    "empty set": set(),
    "frozenset": frozenset({b"a", 3}),
    "set of frozensets": {frozenset({1}), frozenset()},
    "set of scalars": {np.int64(3), np.float32(0.5)},
    "deque": deque([1, [2]], maxlen=3),
    "open deque": deque("ab"),
    "ordered": OrderedDict(b=1, a=[2]),
    "ordered with arrays": OrderedDict(b=ARRAY, a=torch.ones(2)),
    "counter": Counter("abca"),
    "defaultdict": defaultdict(list, {"a": [1], "b": []}),
    "defaultdict of none": defaultdict(None, a=1),
    "defaultdict with arrays": defaultdict(dict, {3: {"a": ARRAY}}),
    "namespace": SimpleNamespace(a=1, b=SimpleNamespace(c=ARRAY), d=None),
    "empty namespace": SimpleNamespace(),
    "arguments": argparse.Namespace(model="tiny", lr=1e-4, layers=[1, 2], out=Path("x/y")),
    "empty arguments": argparse.Namespace(),
    "path": Path("/data/run 1/ä"),
    "pure paths": (PurePosixPath("a/b"), PureWindowsPath(r"C:\\a\\b"), PurePosixPath()),
    "datetime": datetime.datetime(2024, 2, 29, 1, 2, 3, 4),
    "aware": [datetime.datetime(1, 1, 1, tzinfo=zone) for zone in (UTC, BERLIN)],
    "fold": datetime.datetime(2024, 10, 27, 2, 30, fold=1),
    "date": datetime.date(9999, 12, 31),
    "time": datetime.time(23, 59, 59, 999999, tzinfo=BERLIN),
    "timedelta": -datetime.timedelta(days=3, seconds=5, microseconds=7),
    "decimal": [Decimal("1.50"), Decimal("-1E+999"), Decimal("Infinity"), Decimal("-0")],
    "fraction": Fraction(-(7**200), 3),
    "uuid": uuid.UUID(int=5),
    "complex": [1 + 2j, complex(-0.0, math.inf)],
    "range": [range(3), range(10, 0, -3), range(10**12)],
    "slice": [slice(1, None, 2), slice(None)],
    "numbers": [10**400, -(2**63), 0.1, True, None, b"\\x00", bytearray(b"a")],
    "keys": {1.5: "a", (0, 1): "b", None: "c", b"d": 1, True: 2, frozenset({1}): 3},
    "objects": np.array(["a", None, [1, {"b": ARRAY}], {2}], dtype=object),
    "objects of two axes": np.array([[1, "a"], [None, 2.5]], dtype=object),
    "empty objects": np.array([], dtype=object),
    "ragged": np.array([np.zeros(2), np.zeros(3), None], dtype=object)[:2],
    "texts": np.array(["a", "längere"]),
    "dates": np.array(["2024-01-01T00:00:01", "NaT"], "M8[s]"),
    "dates of years, big-endian": np.array(["1970", "2024"], ">M8[Y]"),
    "differences": np.array([1, -2], "m8[ns]"),
    "date scalar": np.datetime64("2024-01-01"),
    "generic difference": np.timedelta64(3),
    "bfloat16": np.array([1.5, -0.0, math.inf], ml_dtypes.bfloat16),
    "float8": np.array([[0.5, 448]], ml_dtypes.float8_e4m3fn),
    "int4": np.array([1, -7], ml_dtypes.int4),
    "size": torch.Size([2, 3]),
}
BASE = {"hidden_states": [np.zeros((2, 4), np.float16)], "question_id": "q0"}


def assert_same(expected: Any, found: Any) -> None:
    """Equal, of the same type, at every depth."""
    if isinstance(expected, torch.Size):
        expected = tuple(expected)  # which it is equal to
    assert type(expected) is type(found)
    if isinstance(expected, np.ndarray) and expected.dtype.kind == "O":
        assert expected.shape == found.shape
        assert_same(expected.ravel().tolist(), found.ravel().tolist())
    elif isinstance(expected, torch.Tensor):
        assert expected.dtype == found.dtype
        one, other = (each.reshape(-1).view(torch.uint8) for each in (expected, found))
        assert expected.shape == found.shape
        assert torch.equal(one, other)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert expected.dtype.newbyteorder("=") == found.dtype.newbyteorder("=")
        np.testing.assert_array_equal(expected, found)
    elif isinstance(expected, dict):
        assert list(expected) == list(found)
        assert list(map(type, expected)) == list(map(type, found))
        for one, other in zip(expected.values(), found.values(), strict=True):
            assert_same(one, other)
        if isinstance(expected, defaultdict):
            assert expected.default_factory is found.default_factory
    elif isinstance(expected, (SimpleNamespace, argparse.Namespace)):
        assert_same(vars(expected), vars(found))
    elif isinstance(expected, (list, tuple, deque)):
        assert len(expected) == len(found)
        assert getattr(expected, "maxlen", None) == getattr(found, "maxlen", None)
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Decimal):
        assert str(expected) == str(found)
    else:
        assert expected == found or repr(expected) == repr(found)
        assert getattr(expected, "fold", 0) == getattr(found, "fold", 0)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_all_types_are_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "batch.pkl"
    path.write_bytes(pickle.dumps([{**BASE, **VALUES}], protocol))
    with BatchStream(path) as batch:
        (found,) = [materialised(each) for each in batch]
    # Protocols before 4 lose what few know of: the fold of a time.
    for name, value in pickle.loads(pickle.dumps(VALUES, protocol)).items():
        try:
            assert_same(value, found[name])
        except AssertionError as error:
            message = f"{name}: {value!r} became {found[name]!r}"
            raise AssertionError(message) from error


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("types")
    (folder / "batch.pkl").write_bytes(pickle.dumps([{**BASE, **VALUES}]))
    assert h5traces.convert(folder / "batch.pkl", folder / "batch.h5").ok
    assert h5traces.verify(folder / "batch.h5", against=folder / "batch.pkl").ok
    return folder / "batch.h5"


@pytest.mark.parametrize("name", VALUES)
def test_archives_keep_the_types(archive: Path, name: str) -> None:
    (found,) = h5traces.load(archive)
    assert_same(VALUES[name], found[name])


@pytest.mark.parametrize("way", ["append", "torch.save"])
@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "bfloat16"]
)
def test_tensors_of_types_that_numpy_has_not(tmp_path: Path, way: str, dtype: str) -> None:
    tensor = torch.tensor([[0.5, -3.0], [448.0, 0.0]]).to(getattr(torch, dtype))
    row, target = {**BASE, "scale": tensor, "inside": [{"a": tensor[0, 1]}]}, tmp_path / "a.h5"
    if way == "append":
        with h5traces.create(target) as writer:
            writer.append(row)
    else:
        torch.save([row], tmp_path / "batch.pt")
        h5traces.convert(tmp_path / "batch.pt", target).raise_for_errors()
    found = h5traces.open(target)[0]
    assert_same(tensor, found["scale"])
    assert_same([{"a": tensor[0, 1]}], found.to_dict()["inside"])


def test_stock_h5py_reads_their_content(archive: Path) -> None:
    with h5py.File(archive) as file:
        extra = file["samples/00000000/extra"]
        assert extra["dates"][()].tolist()[0] == 1704067201
        assert extra["dates"].attrs["dtype"] == b"<M8[s]"
        group = extra["ordered with arrays"]
        assert (group.attrs["encoding"], group.attrs["type"]) == (b"typed", b"OrderedDict")
        np.testing.assert_array_equal(group["00000000/00000000"][()], ARRAY)
        assert b'{"$Counter":{"a":2' in extra["counter"][0]


def test_sets_are_stored_in_the_same_order_whatever_their_hashes() -> None:
    (one,) = values.encode_element("x", {"b", "a", 3})
    (other,) = values.encode_element("x", {3, "a", "b"})
    np.testing.assert_array_equal(one.values, other.values)


class Point:
    """A class that no archive knows."""


def test_types_without_an_encoding_are_named() -> None:
    with pytest.raises(ConversionError, match=r"type test_value_types\.Point has no encoding"):
        list(values.encode_element("x", {"a": [Point()]}))
    with pytest.raises(ConversionError, match=r"a defaultdict that makes .* has no encoding"):
        list(values.encode_element("x", defaultdict(lambda: 1)))


def test_classes_in_pickles_are_named_with_their_field(tmp_path: Path) -> None:
    path = tmp_path / "batch.pkl"
    path.write_bytes(pickle.dumps([{**BASE, "config": {"point": Point()}}]))
    said = (
        r"item 0: the pickle asks for 'test_value_types' 'Point' in the field 'config' 'point', "
        r"which is not a plain value; nothing was imported\. .*dataclasses\.asdict"
    )
    with BatchStream(path) as batch, pytest.raises(UnsafePickleError, match=said):
        list(batch)


@pytest.mark.parametrize("way", ["list", "stacked", "steps"])
def test_layers_of_ml_dtypes_come_back(tmp_path: Path, way: str) -> None:
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(4, 8)).astype(ml_dtypes.bfloat16) for _ in range(3)]
    value: Any = {"list": states, "stacked": np.stack(states), "steps": states}[way]
    if way == "steps":
        value = [[each[None], each[None, :1]] for each in states]
    row = {"hidden_states": value, "question_id": "q0"}
    if way != "steps":
        row["attentions"] = [np.eye(4, dtype=np.float16)[None]] * 3
    (tmp_path / "batch.pkl").write_bytes(pickle.dumps([row]))
    exact = h5traces.PrecisionOptions(dtype="auto")
    assert h5traces.convert(tmp_path / "batch.pkl", tmp_path / "batch.h5", precision=exact).ok
    for path in (tmp_path / "batch.pkl", tmp_path / "batch.h5"):
        (found,) = h5traces.load(path)
        assert_same(value, found["hidden_states"])
    with h5traces.open(tmp_path / "batch.h5") as archive:
        layer = archive[0]["hidden_states"]
        first = layer[0][0] if way == "steps" else layer[0]
    expected = states[0].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(first, np.float32).reshape(4, 8), expected)
