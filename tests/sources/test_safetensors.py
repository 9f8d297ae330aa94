"""Files of safetensors: one per request of an engine, and named tensors in general."""

from __future__ import annotations

import json
import struct
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

import h5traces
from h5traces.errors import ConversionError

if TYPE_CHECKING:
    from pathlib import Path

AUTO = h5traces.PrecisionOptions(dtype="auto")
LAYERS, TOKENS, HIDDEN, HEADS = 4, 7, 8, 2


def states(seed: int = 0, dtype: Any = torch.bfloat16, axes: str = "tlh") -> Any:
    """Numbers with the axes token, layer and hidden in some order."""
    found = torch.from_numpy(np.random.default_rng(seed).normal(size=(TOKENS, LAYERS, HIDDEN)))
    found = found.to(dtype)
    return (found if axes == "tlh" else found.transpose(0, 1)).contiguous()


def request(folder: Path, name: str = "cmpl-0", **tensors: Any) -> Path:
    """A file as vLLM's connector writes it."""
    path = folder / f"{name}.safetensors"
    content = {"hidden_states": states(), "token_ids": torch.arange(TOKENS) + 10, **tensors}
    save_file({key: value for key, value in content.items() if value is not None}, path)
    return path


def converted(path: Path, **options: Any) -> Any:
    """The only trace of an archive made of a file, which was verified against it."""
    target = path.with_suffix(".h5")
    report = h5traces.convert(path, target, **options)
    assert report.ok, report
    reading = options.get("reading", h5traces.ReadingOptions())
    assert all(each.ok for each in h5traces.verify(target, against=path, reading=reading))
    (trace,) = h5traces.open(target)
    return trace


@pytest.mark.parametrize("axes", ["tlh", "lth"], ids=["current", "previous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_request_of_vllm(tmp_path: Path, axes: str, dtype: Any) -> None:
    path = request(tmp_path, hidden_states=states(dtype=dtype, axes=axes))
    expected = load_file(path)
    (item,) = h5traces.load(path)
    assert item["question_id"] == "cmpl-0"
    assert torch.equal(item["hidden_states"], expected["hidden_states"])
    assert torch.equal(item["tokens"], expected["token_ids"])
    trace = converted(path, precision=AUTO)
    back = trace.to_dict()
    assert torch.equal(back["hidden_states"], expected["hidden_states"])
    assert torch.equal(back["tokens"], expected["token_ids"])
    assert trace.metadata.sample_id == "cmpl-0"


def test_slots_of_unknown_layers_are_positions_without_sites(tmp_path: Path) -> None:
    path = request(tmp_path)
    target = tmp_path / "a.h5"
    (report,) = h5traces.convert(path, target).files
    assert "first-state-unknown" in {each.check for each in report.findings}
    (trace,) = h5traces.open(target)
    assert "position_000" in str(trace._stored.children("hidden_states"))


def test_a_folder_of_requests_is_one_archive(tmp_path: Path) -> None:
    paths = [
        request(tmp_path, f"cmpl-{i}", hidden_states=states(i), token_ids=torch.arange(TOKENS) + i)
        for i in range(3)
    ]
    for path in paths:
        path.with_name(path.name + ".lock").touch()  # as vLLM leaves them
    target = tmp_path / "out" / "run.h5"
    report = h5traces.convert(tmp_path, target, merge=True)
    assert report.ok
    archive = h5traces.open(target)
    assert [each.metadata.sample_id for each in archive] == ["cmpl-0", "cmpl-1", "cmpl-2"]
    for trace, path in zip(archive, paths, strict=True):
        assert torch.equal(trace.to_dict()["hidden_states"], load_file(path)["hidden_states"])


@pytest.mark.parametrize("width", [2, 3], ids=["older", "newer"])
def test_float8_with_a_scale_per_token(tmp_path: Path, width: int) -> None:
    plain = states(dtype=torch.float32)
    scales = plain.abs().amax(dim=(1, 2), keepdim=True) / 448
    codes = (plain / scales).to(torch.float8_e4m3fn)
    shape = (TOKENS, 1, 1)[:width]
    path = request(tmp_path, hidden_states=codes, hidden_states_scales=scales.reshape(shape))
    (item,) = h5traces.load(path)
    assert torch.equal(item["hidden_states"], codes.float() * scales)
    with h5traces.sources.opening.open_source(path) as source:
        next(source)
        assert "float8 times" in source.understood[-1] or "float8 times" in source.understood[0]


def test_every_code_of_float8() -> None:
    from h5traces.sources.safetensors import _float8_e4m3fn

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(_float8_e4m3fn(), codes.float().numpy())


def test_loss_masks_and_metadata_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "hidden_states": states(),
        "input_ids": torch.arange(TOKENS)[None],
        "loss_mask": torch.ones(TOKENS, dtype=torch.bool),
        "aux": torch.zeros(TOKENS, 3 * HIDDEN),
    }
    save_file(tensors, path, metadata={"format": "pt", "model": "m"})
    back = converted(path).to_dict()
    assert torch.equal(back["tokens"], torch.arange(TOKENS))
    assert torch.equal(back["loss_mask"], tensors["loss_mask"])
    assert torch.equal(back["aux"], tensors["aux"])
    assert back["__metadata__"] == {"model": "m"}


def test_compressed_by_the_connector(tmp_path: Path) -> None:
    path = request(tmp_path, more=torch.rand(300_000))
    packed = tmp_path / "cmpl-0.safetensors.zst"
    packed.write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
    (item,) = h5traces.load(packed)
    assert item["question_id"] == "cmpl-0"
    assert torch.equal(item["hidden_states"], load_file(path)["hidden_states"])
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ConversionError, match="truncated"):
        h5traces.load(packed)


# --- named tensors in general --------------------------------------------------------------------


def test_modules_are_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    layers = {f"model.layers.{i}": states(i)[:, 0].clone() for i in range(LAYERS)}
    save_file({**layers, "token_ids": torch.arange(TOKENS)}, path)
    (item,) = h5traces.load(path)
    assert list(item["hidden_states"]) == sorted(layers)
    trace = converted(path)
    assert list(trace["hidden_states"].layers) == [0, 1, 2, 3]
    for name, value in trace.to_dict()["hidden_states"].items():
        assert torch.equal(value, layers[name])


def test_attentions_beside_an_embedding(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"embedding": torch.zeros(TOKENS, HIDDEN)}
    for i in range(LAYERS):
        tensors[f"layer_{i}"] = states(i)[:, 0].clone()
        tensors[f"attentions_{i}"] = torch.eye(TOKENS).repeat(HEADS, 1, 1)
    save_file(tensors, path)
    trace = converted(path)
    assert list(trace["hidden_states"].layers) == [None, 0, 1, 2, 3]
    assert list(trace["attentions"].layers) == [0, 1, 2, 3]
    back = trace.to_dict()
    assert torch.equal(back["hidden_states"]["embedding"], tensors["embedding"])


def test_counted_states_are_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"hidden_states_{i}": states(i)[:, 0].clone() for i in range(12)}, path)
    (item,) = h5traces.load(path)
    for i, each in enumerate(item["hidden_states"]):
        assert torch.equal(each, states(i)[:, 0])


def test_samples_by_prefix(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {}
    for i in range(3):
        tensors[f"q{i}/hidden_states"] = states(i)
        tensors[f"q{i}/token_ids"] = torch.arange(TOKENS) + i
    save_file(tensors, path)
    found = h5traces.load(path)
    assert [each["question_id"] for each in found] == ["q0", "q1", "q2"]
    for i, each in enumerate(found):
        assert torch.equal(each["hidden_states"], states(i))
    report = h5traces.convert(path, tmp_path / "a.h5")
    assert report.files[0].num_samples == 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(3, 4), "y": torch.zeros(2)}, r"holds x \(3, 4\), y \(2,\).* mapping"),
        ({"hidden_states": torch.zeros(3, 4)}, r"fits \(layer, hidden\) and \(token, hidden\)"),
        ({f"hidden_states_{i}": torch.zeros(3, 4) for i in (1, 2)}, "some are missing"),
        (
            {"layer_0": torch.zeros(3, 4), "blocks.0.output": torch.zeros(3, 4)},
            "may all be hidden_states; say which are in a mapping",
        ),
    ],
)
def test_what_is_ambiguous_names_the_mapping(
    tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ConversionError, match=message):
        h5traces.inspect(path)


# --- files that contradict themselves -------------------------------------------------------------


def raw(header: Any, data: bytes = b"", declared: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD = {
    "header beyond the file": (raw({}, declared=1000), "cut off"),
    "huge header": (raw({}, declared=90_000_000), "at most"),
    "not JSON": (raw(b"{x}"), "is not JSON"),
    "deep JSON": (raw(b'{"a":' + b"[" * 100_000), "is not JSON"),
    "twice": (raw(b'{"a":1,"a":2}'), "comes twice"),
    "overlap": (raw({"a": tensor(0, 8, [2]), "b": tensor(4, 8, [1])}, bytes(8)), "overlap"),
    "gap": (raw({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)), "overlap"),
    "beyond": (raw({"a": tensor(0, 8, [2])}, bytes(4)), "not complete"),
    "more": (raw({"a": tensor(0, 8, [2])}, bytes(12)), "4 bytes follow"),
    "huge offsets": (raw({"a": tensor(0, 1 << 61, [1 << 59])}, bytes(4)), "not complete"),
    "wrong size": (raw({"a": tensor(0, 8, [3])}, bytes(8)), "needs 12 bytes"),
    "negative": (raw({"a": tensor(0, 8, [-2])}, bytes(8)), "not lists of sizes"),
    "product": (raw({"a": tensor(0, 0, [1 << 40, 1 << 40, 0])}), "too many elements"),
    "no dtype": (raw({"a": {"shape": [], "data_offsets": [0, 0]}}), "the header says of 'a' no"),
    "other dtype": (raw({"a": tensor(0, 4, [8], "F4")}, bytes(4)), "has the dtype F4"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "not an object of text"),
    "many axes": (raw({"a": tensor(0, 4, [1] * 40)}, bytes(4)), "not lists of sizes"),
}


@pytest.mark.parametrize(("count", "message"), [(20_000, "at most 10,000"), (100_000, "60,000")])
def test_very_many_tensors_end_soon(tmp_path: Path, count: int, message: str) -> None:
    path = tmp_path / "a.safetensors"
    header = {f"t{i}": tensor(4 * i, 4 * i + 4, [1]) for i in range(count)}
    path.write_bytes(raw(header, bytes(4 * count)))
    start = time.process_time()
    with pytest.raises(ConversionError, match=message):
        h5traces.load(path)
    assert time.process_time() - start < 10  # a square of the number takes minutes


@pytest.mark.parametrize("name", BAD)
def test_headers_that_do_not_fit(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=message) as caught:
        h5traces.load(path)
    assert str(caught.value).startswith(str(path))
