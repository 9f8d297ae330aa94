"""Torch tensors in pickles, read without torch."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.format.values import TorchValue
from h5traces.sources.pickle.stream import BatchStream

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")

DTYPES = (
    "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool "
    "complex64 complex128 float8_e4m3fn float8_e5m2"
).split()


def read(tmp_path: Path, value: Any, protocol: int = 4) -> Any:
    return read_raw(tmp_path, pickle.dumps([{"value": value}], protocol))


def read_raw(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "batch.pkl"
    path.write_bytes(data)
    with BatchStream(path) as batch:
        (item,) = batch
    return item["value"]


def raw(tensor: Any) -> bytes:
    tensor = tensor.detach().contiguous().reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(expected: Any, found: Any) -> None:
    assert type(found) is TorchValue
    assert f"torch.{found.dtype}" == str(expected.dtype)
    assert found.data.shape == tuple(expected.shape)
    assert found.data.flags.c_contiguous
    assert found.data.flags.aligned
    assert found.data.tobytes() == raw(expected)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path: Path, dtype: str, protocol: int) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    found = read(tmp_path, tensor, protocol)
    assert_same(tensor, found)
    if dtype == "bfloat16":
        assert found.data.dtype == np.uint16
    elif not dtype.startswith("float8"):
        assert found.data.dtype == np.dtype(dtype)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "make",
    [
        lambda base: base[1:],
        lambda base: base[:, 2],
        lambda base: base.T,
        lambda base: base[::2, ::3],
        lambda base: base[0, 0],
        lambda base: base[:0],
        lambda base: base[1].expand(5, -1),
        lambda base: base.reshape(1, 6, 1, 8),
        lambda base: base.clone().requires_grad_(),
        lambda base: torch.nn.Parameter(base),
        lambda _base: torch.tensor(3.0),
        lambda _base: torch.zeros(0, 3),
    ],
)
def test_views(tmp_path: Path, make: Any, protocol: int) -> None:
    tensor = make(torch.arange(48, dtype=torch.float32).reshape(6, 8))
    assert_same(tensor, read(tmp_path, tensor, protocol))


def test_views_of_one_storage(tmp_path: Path) -> None:
    base = torch.arange(48, dtype=torch.int16).reshape(6, 8)
    tensors = [base, base[1:3], base.T, base]
    found = read(tmp_path, tensors)
    for one, other in zip(tensors, found, strict=True):
        assert_same(one, other)
    assert found[0] is found[3]


def test_a_storage_object_that_is_shared(tmp_path: Path) -> None:
    data = pickle.dumps([{"value": torch.arange(6, dtype=torch.float32)}], 2)
    start = data.index(b"ctorch._utils")
    reduce = data.index(b"R", data.index(b"c_codecs")) + 1  # of encode
    reduce = data.index(b"R", reduce) + 1  # of _load_from_bytes
    assert data[reduce : reduce + 1] == b"q"
    slot = data[reduce + 1]
    end = data.index(b"Rq", data.index(b"OrderedDict") + 20)
    assert end > start
    second = b"ctorch._utils\n_rebuild_tensor_v2\n(h" + bytes([slot])
    second += b"K\x02K\x03\x85K\x01\x85\x89N" + b"tR"
    found = read_raw(
        tmp_path, data[: data.rindex(b"s")] + b"0" + second + data[data.rindex(b"s") :]
    )
    np.testing.assert_array_equal(found.data, [2.0, 3.0, 4.0])


def test_cuda_tensors_need_no_cuda(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float16)
    data = pickle.dumps([{"value": tensor}], 4)
    assert data.count(b"X\x03\x00\x00\x00cpu") == 1
    grown = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    # The embedded stream is a bytes object, so its length grows by three.
    opcode, width = (b"B", 4) if b"B" in data[:200] else (b"C", 1)
    at = data.index(b"\x80\x02\x8a\n") - width
    length = int.from_bytes(data[at : at + width], "little") + 3
    assert data[at - 1 : at] == opcode
    grown = grown[:at] + length.to_bytes(width, "little") + grown[at + width :]
    assert_same(tensor, read_raw(tmp_path, grown))
    old = data.replace(b"ctorch\nHalfStorage\n", b"ctorch.cuda\nHalfStorage\n")
    old = old[:at] + (length + 2).to_bytes(width, "little") + old[at + width :]
    assert_same(tensor, read_raw(tmp_path, old))


def test_large_tensors_are_views_of_the_payload(tmp_path: Path) -> None:
    found = read(tmp_path, torch.zeros(1 << 20, dtype=torch.uint8))
    assert isinstance(found.data.base, bytes)


def test_refuses_bits_that_change_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(UnsafePickleError, match=r"resolve_conj"):
        read(tmp_path, torch.ones(3, dtype=torch.complex64).conj())


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_trace_holds_are_named_with_their_field(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    for value, message in (
        (tensor.to_sparse(), r"field 'value' is a sparse tensor, .*to_dense\(\)"),
        ([0, {"x": tensor.to_sparse()}], "field 'value', index 1, key 'x' is a sparse tensor"),
        (torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), r"quantised .*dequantize\(\)"),
        (tensor.to("meta"), "a tensor without values"),
        (torch.nested.nested_tensor([tensor]), "a nested tensor"),
    ):
        with pytest.raises(ConversionError, match=message):
            read(tmp_path, value)


def test_shapes_and_devices_are_tuples_and_text(tmp_path: Path) -> None:
    value = [torch.Size([1, 2]), torch.device("cuda", 1), torch.device("cpu")]
    assert read(tmp_path, value) == [(1, 2), "cuda:1", "cpu"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x00K\x03\x85", b"K\x01K\x03\x85", "reaches element 3 of a storage of 3"),
        (b"K\x00K\x03\x85", b"K\x00K\x04\x85", "reaches element 3 of a storage of 3"),
        (b"K\x00K\x03\x85", b"J\xff\xff\xff\xffK\x03\x85", "offset -1"),
        (b"K\x01\x85", b"J\xff\xff\xff\xff\x85", "a shape holds -1"),
        (b"K\x01\x85", b"M\xff\xff\x85", "reaches element"),
        (b"K\x01\x85", b"K\x01K\x01\x86", "has the strides"),
        (b"K\x00K\x03\x85", b"K\x00]", "a shape is a list"),
        (b"K\x00K\x03\x85", b"NK\x03\x85", "offset"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "big-endian"),
        (b"FloatStorage", b"DoubleStorag", "DoubleStorag"),
        (b"\x8a\nl\xfc", b"\x8a\nm\xfc", "not a legacy torch.save"),
        (b"K\x03N", b"K\x02N", "found 12 for 3 elements"),
        (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00sturage", "persistent id"),
    ],
)
def test_refuses_forged_tensors(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    data = pickle.dumps([{"value": torch.arange(3, dtype=torch.float32)}], 3)
    data = data.replace(b"q\x0b", b"").replace(b"q\x0c", b"")
    assert old in data
    with pytest.raises(ConversionError, match=message):
        read_raw(tmp_path, data.replace(old, new, 1))
