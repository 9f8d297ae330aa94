"""Files of torch.save are read without torch and without running code."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from legacy_batches import assert_same, make_batch

import h5traces
from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.format.values import TorchValue
from h5traces.sources.opening import open_source

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = ("zip", "zip-4", "old", "old-4", "deflated")
DTYPES = (
    "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool "
    "complex64 complex128 float8_e4m3fn float8_e5m2"
).split()


def save(path: Path, value: Any, form: str = "zip") -> Path:
    protocol = 4 if form.endswith("4") else 2
    is_old = form.startswith("old")
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not is_old)
    if form == "deflated":
        repack(path, lambda _name, data: data, zipfile.ZIP_DEFLATED)
    return path


def repack(path: Path, change: Any, method: int = zipfile.ZIP_STORED) -> None:
    """Write the zip file again, each entry as `change` gives it; None drops it."""
    with zipfile.ZipFile(path) as file:
        entries = {name: change(name, file.read(name)) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in entries.items():
            if data is not None:
                file.writestr(name, data)


def in_torch(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: in_torch(each) for key, each in value.items()}
    if isinstance(value, list):
        return [in_torch(each) for each in value]
    return value


def raw(tensor: Any) -> bytes:
    tensor = tensor.detach().contiguous().reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def only_value(path: Path) -> Any:
    with open_source(path) as source:
        (item,) = source
    return item["value"]


def assert_tensor(expected: Any, found: Any) -> None:
    assert type(found) is TorchValue
    assert f"torch.{found.dtype}" == str(expected.dtype)
    assert found.data.shape == tuple(expected.shape)
    assert found.data.tobytes() == raw(expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("in_arrays", [False, True], ids=["tensors", "arrays"])
def test_a_batch_is_what_torch_loads(tmp_path: Path, form: str, in_arrays: bool) -> None:
    batch = make_batch("full_pkl")
    path = save(tmp_path / "batch.pkl", batch if in_arrays else in_torch(batch), form)
    expected = torch.load(path, weights_only=False)
    assert_same(h5traces.load(path), expected)
    target = tmp_path / "batch.h5"
    (report,) = h5traces.convert(path, target).files
    assert report.num_samples == len(batch)
    assert h5traces.verify(target, against=path)[0].ok
    assert_same(h5traces.load(target), expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path: Path, dtype: str, form: str) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    assert_tensor(tensor, only_value(save(tmp_path / "a.pt", [{"value": tensor}], form)))


@pytest.mark.parametrize("form", FORMATS)
def test_views_share_their_storage(tmp_path: Path, form: str) -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    views = [
        *(whole, whole[1], whole[:, 2], whole.transpose(0, 2), whole[..., ::2], whole[1:1]),
        *(whole[:1].expand(4, 4, 5), torch.tensor(3.0), torch.nn.Parameter(whole[0])),
        *(torch.zeros(0, 7), whole.clone().requires_grad_()),
    ]
    found = only_value(save(tmp_path / "a.pt", [{"value": views}], form))
    for expected, each in zip(views, found, strict=True):
        assert_tensor(expected, each)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    value = only_value(save(tmp_path / "a.pt", [{"value": torch.zeros(100, 100)}]))
    assert not value.data.flags.owndata
    assert not value.data.flags.writeable
    assert value.data.flags.aligned


def test_values_stay_valid_after_the_file_is_gone(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", [{"value": torch.full((100, 100), 3.0)}])
    value = only_value(path)
    path.unlink()
    assert (value.data == 3).all()


@pytest.mark.parametrize("form", ["zip", "old"])
def test_files_of_big_endian_machines(tmp_path: Path, form: str) -> None:
    tensors = [torch.arange(6).to(getattr(torch, each)) for each in ("bfloat16", "int64", "uint8")]
    path = save(tmp_path / "a.pt", [{"value": tensors}], form)

    def swapped(tensor: Any) -> bytes:
        words = np.frombuffer(raw(tensor), f"u{tensor.element_size()}")
        return words.byteswap().tobytes()

    if form == "zip":
        changed = {f"a/data/{i}": swapped(tensor) for i, tensor in enumerate(tensors)}
        changed["a/byteorder"] = b"big"
        repack(path, lambda name, data: changed.get(name, data))
    else:
        data = re.sub(rb"(?<=little_endianq.)\x88", b"\x89", path.read_bytes())
        for tensor in tensors:
            data = data.replace(raw(tensor), swapped(tensor))
        path.write_bytes(data)
    for expected, found in zip(tensors, only_value(path), strict=True):
        assert_tensor(expected, found)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_what_no_trace_holds_is_named_with_its_field(tmp_path: Path, form: str) -> None:
    batch = in_torch(make_batch("full_pkl"))
    batch[1]["hidden_states"][1] = batch[1]["hidden_states"][1].to_sparse()
    path = save(tmp_path / "a.pt", batch, form)
    with pytest.raises(ConversionError, match="field 'hidden_states', index 1 is a sparse tensor"):
        h5traces.load(path)
    batch[1]["hidden_states"][1] = torch.zeros(3, 3, dtype=torch.complex64)
    save(path, batch, form)
    report = h5traces.convert(path, tmp_path / "a.h5")
    assert "field 'hidden_states', layer 1: torch dtype is complex64" in report.files[0].error


def test_one_sample_per_file_becomes_one_archive(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    samples = in_torch(make_batch("full_pkl"))
    for number, sample in enumerate(samples):
        sample["hidden_states"] = [each.bfloat16() for each in sample["hidden_states"]]
        save(folder / f"sample_{number}.pt", sample)
    target = tmp_path / "run.h5"
    options = h5traces.PrecisionOptions(dtype="auto")
    report = h5traces.convert(folder, target, merge=True, precision=options)
    assert report.ok
    assert_same(h5traces.load(target), samples)


@pytest.mark.parametrize("form", FORMATS)
def test_containers_are_those_of_pickles(tmp_path: Path, form: str) -> None:
    samples = in_torch(make_batch("full_pkl"))
    by_id = {each["question_id"]: each for each in samples}
    path = tmp_path / "a.pt"
    for value in (tuple(samples), by_id, samples[0]):
        save(path, value, form)
        found = h5traces.load(path)
        assert_same(found, samples[: len(found)])
        assert len(found) == (1 if value is samples[0] else len(samples))


def test_a_folder_of_several_formats(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    batch = make_batch("full_pkl")
    (folder / "batch_0.pkl").write_bytes(pickle.dumps(batch))
    save(folder / "batch_1.pt", batch)
    save(folder / "batch_2.pkl", in_torch(batch), "old")
    (folder / "batch_3.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    report = h5traces.convert(folder, f"{tmp_path}/out/")
    assert not report.ok
    assert [each.num_samples for each in report.files] == [len(batch)] * 3
    text = " ".join(each.reason for each in report.leftovers)
    assert "batch_3.pt: is a pointer of Git LFS" in text
    assert "git lfs pull" in text


class Attack:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/h5traces-was-here",)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_nothing_is_executed(tmp_path: Path, form: str) -> None:
    path = save(tmp_path / "a.pt", [{"hidden_states": [Attack()]}], form)
    with pytest.raises(UnsafePickleError, match="nothing was imported"):
        h5traces.load(path)


def test_a_model_is_no_batch(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", torch.nn.Linear(2, 2))
    with pytest.raises(UnsafePickleError, match="Linear"):
        h5traces.load(path)


# --- files that contradict themselves -------------------------------------------------------------


def test_entries_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for change, message in (
        (lambda name, data: None if name == "a/data/0" else data, "no entry 'a/data/0'"),
        (lambda name, data: data[:-4] if name == "a/data/0" else data, "has 36 bytes"),
        (lambda name, data: b"middle" if name == "a/byteorder" else data, "the byte order is"),
        (lambda name, data: data[:-9] if name == "a/data.pkl" else data, "a.pt"),
    ):
        save(path, [{"value": torch.zeros(10)}])
        repack(path, change)
        with pytest.raises(ConversionError, match=message):
            h5traces.load(path)


def test_old_files_that_do_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", [{"value": torch.zeros(10)}], "old")
    data = path.read_bytes()
    for changed, message in (
        (data[:-4], "is not complete"),
        (data[:-48] + struct.pack("<q", 11) + data[-40:], "found 11"),
        (data + b"more", "4 bytes follow the last storage"),
        (data + data, "write one file per call"),
        (data[: len(data) // 3], "truncated"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ConversionError, match=message):
            h5traces.load(path)


def test_a_cut_file_is_not_complete(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", [{"value": torch.zeros(1000)}])
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ConversionError, match="has no directory at its end, so it is not complete"):
        h5traces.load(path)


def test_a_bomb_of_deflated_zeros(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", [{"value": torch.zeros(30_000_000)}], "deflated")
    with pytest.raises(ConversionError, match="expands from"):
        h5traces.load(path)


def test_an_expanded_tensor_does_not_fill_the_disk(tmp_path: Path) -> None:
    value = [torch.zeros(1).expand(1 << 20, 1 << 10)] * 3
    path = save(tmp_path / "a.pt", [{"hidden_states": value}])
    with pytest.raises(UnsafePickleError, match="unfold to more than"):
        h5traces.load(path)


def test_a_plain_pickle_may_not_refer_to_what_is_outside(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 3) if value == "x" else None

    buffer = io.BytesIO()
    Pickler(buffer).dump([{"value": "x"}])
    (tmp_path / "a.pkl").write_bytes(buffer.getvalue())
    with pytest.raises(UnsafePickleError, match="outside of itself"):
        h5traces.load(tmp_path / "a.pkl")
