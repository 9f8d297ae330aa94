"""Every way out: what is written is read by the library it is for, with the same values."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from legacy_batches import assert_same, bits, make_archive, make_batch, with_torch

import h5traces
from h5traces.errors import (
    ArchiveExistsError,
    ConversionError,
    LossyWarning,
    MissingDependencyError,
    OptionError,
    TargetError,
)

BATCH = make_batch("full_pkl", num_samples=5)
LAYERED = ("hidden_states", "attentions")
# In tables, which hold UTF-8.
REPLACED = pytest.mark.filterwarnings("ignore:.*lone surrogates of tokens_decoded")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make_archive(tmp_path, BATCH, dtype="auto")


@pytest.fixture
def bfloat16(tmp_path: Path) -> Path:
    return make_archive(tmp_path, with_torch(BATCH, "bfloat16"), dtype="bfloat16", name="bfloat16")


def as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if type(value) is dict:
        return {key: as_tensors(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(as_tensors, value))
    return value.item() if isinstance(value, np.generic) else value


def converted(source: Path, target: Path, **options: Any) -> list[dict[str, Any]]:
    h5traces.convert(source, target, **options).raise_for_errors()
    return h5traces.load(target)


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(tmp_path: Path, archive: Path, mmap: bool) -> None:
    out = h5traces.export(archive, tmp_path / "out.pt")
    loaded = torch.load(out, weights_only=True, mmap=mmap)
    assert_same(loaded, as_tensors(BATCH))
    again = converted(out, tmp_path / "again.h5", precision=h5traces.PrecisionOptions(dtype="auto"))
    assert_same(again, loaded)


def test_torch_keeps_bfloat16(tmp_path: Path, bfloat16: Path) -> None:
    loaded = torch.load(h5traces.export(bfloat16, tmp_path / "o.pt"), weights_only=True)
    assert loaded[0]["hidden_states"][0].dtype == torch.bfloat16
    assert_same(loaded, as_tensors(with_torch(BATCH, "bfloat16")))


def test_torch_takes_every_kind_of_tensor(tmp_path: Path) -> None:
    item = {
        "hidden_states": [np.ones((2, 3), np.float32)] * 2,
        **{
            f"of_{name}": np.arange(4).astype(name) for name in ("uint8", "uint32", "int16", "bool")
        },
        "empty": np.zeros((0, 3), np.float32),
        "nested": {"pair": (np.arange(3.0), "text")},
        "wide": np.float64(0.1),
    }
    source = make_archive(tmp_path, [item], dtype="auto")
    (loaded,) = torch.load(h5traces.export(source, tmp_path / "o.pt"), weights_only=True)
    assert_same(loaded, as_tensors(item))


# --- named arrays ---------------------------------------------------------------------------------


def layers(value: Any) -> list[Any]:
    return [np.asarray(each.float() if isinstance(each, torch.Tensor) else each) for each in value]


def assert_alike(found: Any, expected: Any) -> None:
    """The same layers, tokens and texts, in whatever held them."""
    for kind in LAYERED:
        pairs = zip(layers(found[kind]), layers(expected[kind]), strict=True)
        assert all(bits(one) == bits(other) for one, other in pairs)
    assert np.asarray(found["tokens"]).tolist() == np.asarray(expected["tokens"]).tolist()
    for key in ("question_id", "tokens_decoded", "generated_answer_clean", "prompt_length"):
        if key in expected and f"{key}.json" not in found:
            assert replaced(found[key]) == replaced(expected[key]), key


def replaced(value: Any) -> Any:
    """Texts as tables hold them, without lone surrogates."""
    if isinstance(value, list):
        return [replaced(each) for each in value]
    return value.encode("utf-8", "replace") if isinstance(value, str) else value


def test_npz(tmp_path: Path, archive: Path) -> None:
    folder = h5traces.export(archive, f"{tmp_path}/out/", to="npz")
    files = sorted(folder.iterdir())
    assert [each.name for each in files] == [f"batch-0000{number}.npz" for number in range(5)]
    with np.load(files[3], allow_pickle=False) as found:
        assert str(found["question_id"]) == BATCH[3]["question_id"]
        # Texts that end in NUL, which numpy's text would lose.
        assert json.loads(str(found["tokens_decoded.json"])) == BATCH[3]["tokens_decoded"]
        assert bits(found["attentions"][1]) == bits(BATCH[3]["attentions"][1])
    again = converted(
        folder, tmp_path / "again.h5", merge=True, precision=h5traces.PrecisionOptions(dtype="auto")
    )
    for found, expected in zip(again, BATCH, strict=True):
        assert_alike(found, expected)


def test_safetensors(tmp_path: Path, bfloat16: Path) -> None:
    from safetensors import safe_open

    folder = h5traces.export(bfloat16, f"{tmp_path}/out/", to="safetensors")
    files = sorted(folder.iterdir())
    expected = with_torch(BATCH, "bfloat16")
    with safe_open(files[4], "pt") as found:
        states = found.get_tensor("hidden_states")
        assert states.dtype == torch.bfloat16
        assert torch.equal(states, torch.stack(list(expected[4]["hidden_states"])))
        assert found.get_tensor("tokens").tolist() == expected[4]["tokens"].tolist()
        assert found.metadata()["question_id"] == expected[4]["question_id"]
    again = converted(
        folder, tmp_path / "again.h5", merge=True, precision=h5traces.PrecisionOptions(dtype="auto")
    )
    for found, other in zip(again, expected, strict=True):
        assert_alike(found, other)


def test_one_sample_may_be_one_file(tmp_path: Path) -> None:
    source = make_archive(tmp_path, BATCH[:1])
    out = h5traces.export(source, tmp_path / "one.npz")
    assert out == tmp_path / "one.npz"
    assert bits(np.load(out)["hidden_states"][0]) == bits(BATCH[0]["hidden_states"][0])


def test_layers_that_stacking_would_confuse_have_names(tmp_path: Path) -> None:
    states = [np.full((3, 4), layer, np.float32) for layer in range(3)]
    attentions = [np.full((2, 3, 3), 1 / 3, np.float32)] * 3
    source = make_archive(tmp_path, [{"hidden_states": states, "attentions": attentions}])
    h5traces.repack(source, tmp_path / "some.h5", layers=[0, 2])
    found = np.load(h5traces.export(tmp_path / "some.h5", tmp_path / "o.npz"))
    assert sorted(found.files) == [
        f"layers.{layer}.{kind}" for layer in (0, 2) for kind in ("attentions", "hidden_states")
    ]
    h5traces.convert(tmp_path / "o.npz", tmp_path / "again.h5").raise_for_errors()
    trace = h5traces.open(tmp_path / "again.h5")[0]
    assert trace["hidden_states"].layers == (0, 2)
    assert trace["hidden_states"][1][0, 0] == 2


# --- tables ---------------------------------------------------------------------------------------


@REPLACED
def test_parquet(tmp_path: Path, archive: Path) -> None:
    from pyarrow import parquet

    out = h5traces.export(archive, tmp_path / "o.parquet")
    rows = parquet.read_table(out).to_pylist()
    assert len(rows) == len(BATCH)
    again = converted(out, tmp_path / "again.h5", precision=h5traces.PrecisionOptions(dtype="auto"))
    for found, item in zip(again, BATCH, strict=True):
        assert_alike(found, item)
    for row, item in zip(rows, BATCH, strict=True):
        assert_alike({**row, **{kind: typed(row[kind], item[kind]) for kind in LAYERED}}, item)


def typed(value: Any, like: Any) -> Any:
    return [np.asarray(each, one.dtype) for each, one in zip(value, like, strict=True)]


@REPLACED
def test_datasets_loads_it(tmp_path: Path, archive: Path) -> None:
    import datasets

    out = h5traces.export(archive, f"{tmp_path}/set/", to="datasets")
    again = converted(out, tmp_path / "again.h5", precision=h5traces.PrecisionOptions(dtype="auto"))
    for one, item in zip(again, BATCH, strict=True):
        assert_alike(one, item)
    found = datasets.load_from_disk(str(out))
    assert len(found) == len(BATCH)
    for row, item in zip(found, BATCH, strict=True):
        assert_alike({**row, **{kind: typed(row[kind], item[kind]) for kind in LAYERED}}, item)
    with pytest.raises(ArchiveExistsError, match="name another"):
        h5traces.export(archive, out, to="datasets", overwrite=True)
    assert not list(tmp_path.glob("*.part"))


def test_samples_with_other_fields_have_nulls(tmp_path: Path) -> None:
    from pyarrow import parquet

    items = [
        {"hidden_states": [np.ones((2, 3), np.float32)], "score": 0.5},
        {"hidden_states": [np.ones((2, 3), np.float32)], "note": {"a": [1, None]}, "score": 1},
    ]
    source = make_archive(tmp_path, items, dtype="auto")
    rows = parquet.read_table(h5traces.export(source, tmp_path / "o.parquet")).to_pylist()
    assert [row["score"] for row in rows] == [0.5, 1]
    assert [row["note.json"] for row in rows] == [None, '{"a":[1,null]}']


# --- references -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_zarr_reads_the_archive_by_references(tmp_path: Path, codec: str) -> None:
    import fsspec
    import zarr

    generator = np.random.default_rng(0)
    big = {
        "hidden_states": [generator.normal(size=(600, 3000)).astype("f4") for _ in range(3)],
        "attentions": [generator.random((2, 600, 600)).astype("f4") for _ in range(3)],
    }
    batch = [*BATCH, big]
    source = make_archive(
        tmp_path, batch, precision=h5traces.PrecisionOptions(dtype="auto", codec=codec)
    )
    out = h5traces.export(source, tmp_path / "refs.json", to="kerchunk")
    assert out.stat().st_size < source.stat().st_size
    files = fsspec.filesystem("reference", fo=str(out), remote_protocol="file", asynchronous=True)
    store = zarr.storage.FsspecStore(files, read_only=True)
    root = zarr.open_group(store, mode="r", zarr_format=2)
    for number, item in enumerate(batch):
        sample = root[f"samples/{number:08d}"]
        for kind in LAYERED:
            for layer, expected in enumerate(item.get(kind, ())):
                found = sample[f"{kind}/layer_{layer:03d}"]
                assert bits(found[...]) == bits(expected)
    assert root["samples/00000003"].attrs["sample_id"] == BATCH[3]["question_id"]
    assert root["samples/00000001/tokens"][...].tolist() == BATCH[1]["tokens"].tolist()


def test_references_of_shards_and_bfloat16(tmp_path: Path, bfloat16: Path) -> None:
    h5traces.split(bfloat16, f"{tmp_path}/s/", 2)
    refs = json.loads(h5traces.export(tmp_path / "s", tmp_path / "r.json").read_text())["refs"]
    place = "samples/00000004/hidden_states/layer_001"
    assert json.loads(refs[f"{place}/.zarray"])["dtype"] == "<u2"
    assert json.loads(refs[f"{place}/.zattrs"])["h5traces_type"] == "bfloat16"
    address, _, size = refs[f"{place}/0.0"]
    assert Path(address).samefile(tmp_path / "s" / "bfloat16-00002.h5") or "00002" in address
    assert size > 0


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_virtualizarr_opens_the_references(tmp_path: Path, archive: Path) -> None:
    pytest.importorskip("virtualizarr")
    import xarray
    from obspec_utils.registry import ObjectStoreRegistry
    from obstore.store import LocalStore
    from virtualizarr import open_virtual_dataset
    from virtualizarr.parsers import KerchunkJSONParser

    out = h5traces.export(archive, tmp_path / "refs.json", to="kerchunk")
    registry = ObjectStoreRegistry({"file://": LocalStore()})
    parser = KerchunkJSONParser(group="samples/00000000/hidden_states")
    found = open_virtual_dataset(f"file://{out}", registry=registry, parser=parser)
    assert found["layer_001"].dims == ("token", "hidden")
    assert found["layer_001"].shape == BATCH[0]["hidden_states"][1].shape
    store = parser(f"file://{out}", registry)
    values = xarray.open_zarr(store, consolidated=False, zarr_format=3)["layer_001"].values
    assert bits(values) == bits(h5traces.open(archive)[0]["hidden_states"][1])


# --- every format ---------------------------------------------------------------------------------


def test_generation_steps_have_a_place_in_torch_only(tmp_path: Path) -> None:
    batch = make_batch("step_min")
    source = make_archive(tmp_path, batch, dtype="auto")
    assert_same(
        torch.load(h5traces.export(source, tmp_path / "o.pt"), weights_only=True), as_tensors(batch)
    )
    for to in ("npz", "safetensors", "datasets"):
        with pytest.raises(ConversionError, match="generation steps, which are not one array"):
            h5traces.export(source, f"{tmp_path}/{to}/", to=to)
        assert not any((tmp_path / to).glob("*"))


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    item = {"hidden_states": [np.ones((2, 3), np.float32)], "odd": [np.ones(2), {"a": 1}]}
    source = make_archive(tmp_path, [item])
    for name in ("o.npz", "o.safetensors", "o.parquet"):
        with pytest.warns(LossyWarning, match="left out what .* has no place for: odd; pickle and"):
            h5traces.export(source, tmp_path / name)


@pytest.mark.parametrize("to", ["npz", "safetensors"])
def test_a_folder_gets_its_name_when_all_is_written(tmp_path: Path, archive: Path, to: Any) -> None:
    seen = []

    def stop(done: int, count: int) -> None:
        seen.append(sorted(each.name for each in tmp_path.iterdir() if each.suffix != ".part"))
        if done == 3:
            raise KeyboardInterrupt

    before = sorted(each.name for each in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        h5traces.export(archive, f"{tmp_path}/out/", to=to, progress=stop)
    assert seen == [before] * 3
    assert sorted(each.name for each in tmp_path.iterdir()) == before
    out = h5traces.export(archive, f"{tmp_path}/out/", to=to)
    files = {each: each.read_bytes() for each in sorted(out.iterdir())}
    assert len(files) == 5
    with pytest.raises(ArchiveExistsError, match="and 2 more already"):
        h5traces.export(archive, f"{tmp_path}/out/", to=to)
    h5traces.export(archive, f"{tmp_path}/out/", to=to, overwrite=True)
    assert {each: each.read_bytes() for each in sorted(out.iterdir())} == files


def test_usage(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(TargetError, match=r"one sample per file, and there are 5; name a folder"):
        h5traces.export(archive, tmp_path / "a.npz")
    with pytest.raises(OptionError, match="to is 'zarr', expected one of 'pickle'"):
        h5traces.export(archive, tmp_path / "a.zarr", to="zarr")
    with pytest.raises(TargetError, match=r"ending in \.pt or \.pth"):
        h5traces.export(archive, tmp_path / "a.npz", to="torch")
    h5traces.export(archive, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(ArchiveExistsError):
        h5traces.export(archive, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before
    h5traces.export(archive, tmp_path / "a.pt", overwrite=True)
    assert {each.name for each in tmp_path.iterdir()} == {"batch.h5", "batch.pkl", "a.pt"}


@pytest.mark.parametrize(
    ("to", "library", "extra"),
    [("torch", "torch", "torch"), ("parquet", "pyarrow", "parquet"), ("datasets", "pyarrow", "p")],
)
def test_a_missing_library_is_named(
    tmp_path: Path, archive: Path, to: str, library: str, extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None\nimport h5traces\n"
        f"try:\n    h5traces.export({str(archive)!r}, {str(tmp_path)!r} + '/new/', to={to!r})\n"
        f"except {MissingDependencyError.__name__} as error:\n    print(error)"
    ).replace("except ", "except h5traces.errors.")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"{to} needs {library}, which is not installed; pip install 'h5traces[{extra}" in (
        done.stdout + done.stderr
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts memory so")
def test_memory_is_that_of_one_sample(tmp_path: Path) -> None:
    """Forty samples of 8 MB each, in under 250 MB above those of an empty process."""
    samples = tmp_path / "big.h5"
    with h5traces.create(samples, spool=False) as writer:
        states = [np.ones((500, 1000), np.float16)] * 8
        for _ in range(40):
            writer.append({"hidden_states": states})
    for name in ("o.pt", "o.parquet", "d/"):
        to = "'datasets'" if name == "d/" else "None"
        code = (
            "import re, h5traces, torch, pyarrow.parquet\n"
            "def memory(name):\n"
            "    status = open('/proc/self/status').read()\n"
            "    return int(re.search(name + r':\\s+(\\d+) kB', status)[1])\n"
            "# A process begins with the peak of the one that started it.\n"
            "open('/proc/self/clear_refs', 'w').write('5')\n"
            "before = memory('VmRSS')\n"
            f"h5traces.export({str(samples)!r}, {str(tmp_path)!r} + '/' + {name!r}, to={to})\n"
            "print(memory('VmHWM') - before)"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < 250_000, name


@REPLACED
def test_the_commands_and_code_of_the_document_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_archive(tmp_path, BATCH, name="run")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "exporting.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        assert words.pop(0) == "h5traces"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "h5traces", *words],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    expected = h5traces.open("run.h5")[0]["hidden_states"][1]
    assert bits(names["states"]) == bits(expected)


ODD = {
    "\udc80": np.zeros(2),
    "a\0b": 3,
    "taken": {"a": [1]},
    "taken.json": "mine",
    "ended": "text\0",
    "ended.json": "mine",
    "../up": np.arange(2),
    "unicode": np.array(["x", "yy"]),
}


@pytest.mark.parametrize("form", ["npz", "safetensors", "parquet", "datasets", "pt", "pkl"])
def test_names_that_a_format_has_no_place_for(tmp_path: Path, form: str) -> None:
    item = {
        "question_id": "q0",
        "hidden_states": [np.ones((2, 3), np.float16)] * 2,
        "prompt": "\ud800",
        "__metadata__": np.ones(1),
        **ODD,
    }
    archive = make_archive(tmp_path, [item])
    out = tmp_path / f"out.{form}"
    if form in ("pt", "pkl"):
        h5traces.export(archive, out)
        assert h5traces.load(out)[0].keys() == item.keys()
        return
    with pytest.warns(LossyWarning, match="left out what .* has no place for") as caught:
        h5traces.export(archive, out, to=form)
    message = str(caught[0].message)
    # Named by what messages show of such characters.
    assert "taken.json" in message
    if form == "npz":
        with np.load(out) as found:
            assert found["prompt"] == "\ud800"
            assert found["../up.npy"[:-4]].tolist() == [0, 1]
            assert found["unicode"].tolist() == ["x", "yy"]
            assert found["ended.json"] == "mine"
            assert len(set(found.files)) == len(found.files)
    elif form == "safetensors":
        from safetensors import safe_open

        with safe_open(out, "np") as found:
            assert json.loads(found.metadata()["prompt.json"]) == "\ud800"
            assert "../up" in found.keys()
    else:
        from datasets import load_from_disk
        from pyarrow import parquet

        table = parquet.read_table(out) if form == "parquet" else load_from_disk(str(out))
        assert {"taken.json", "ended", "../up", "unicode"} <= set(table.column_names)
