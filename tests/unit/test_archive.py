"""Archives as sequences: indices, ids, shards, workers, and how little of a file is read."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import assert_same, make_archive, make_batch

import h5traces
from h5traces.archive import open_files
from h5traces.archive.footer_store import FooterStore
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    LayerIndexError,
    SampleIndexError,
    StoredStateWarning,
    TraceNotFoundError,
)
from h5traces.storage import plans
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import hdf5_end
from h5traces.storage.kernels import run_plan
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = make_batch("full_pkl", num_samples=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive"), BATCH)


@pytest.fixture
def archive(path: Path) -> Iterator[h5traces.Archive]:
    with h5traces.open(path) as opened:
        yield opened


def ids(archive: h5traces.Archive) -> list[str | None]:
    return [trace["question_id"] for trace in archive]


def without_footer(path: Path, folder: Path) -> Path:
    copy = folder / "no_footer.h5"
    copy.write_bytes(path.read_bytes()[: hdf5_end(LocalFile(path))])
    return copy


def test_indices_are_those_of_a_list(archive: h5traces.Archive) -> None:
    assert len(archive) == 6
    expected = [f"tc_{number}" for number in range(6)]
    for index in range(-6, 6):
        assert archive[index]["question_id"] == expected[index]
        assert archive[np.int64(index)].metadata.sample_id == expected[index]
    for index in (6, -7, 100):
        with pytest.raises(IndexError, match=f"index {index} is out of range.*6 traces"):
            archive[index]
    with pytest.raises(TypeError):
        archive["tc_1"]  # type: ignore[call-overload]
    assert ids(archive) == expected
    assert [trace["question_id"] for trace in reversed(archive)] == expected[::-1]
    collected: list[Any] = []
    collected.extend(archive)
    assert len(collected) == 6


@pytest.mark.parametrize(
    "part",
    [
        slice(None),
        slice(1, 4),
        slice(-2, None),
        slice(None, None, 2),
        slice(None, None, -1),
        slice(4, 1),
        slice(2, 100),
    ],
)
def test_slices_are_those_of_a_list(archive: h5traces.Archive, part: slice) -> None:
    view = archive[part]
    expected = [f"tc_{number}" for number in range(6)][part]
    assert isinstance(view, h5traces.Archive)
    assert ids(view) == expected
    assert view.ids == tuple(expected)
    assert view.metadata.num_samples == len(view) == len(expected)
    assert ids(view[::-1]) == expected[::-1]
    assert ids(archive) == [f"tc_{number}" for number in range(6)]


def test_metadata_and_layers(archive: h5traces.Archive, path: Path) -> None:
    assert archive.layers == (0, 1, 2)
    assert archive.paths == (path,)
    assert archive.metadata.num_samples == 6
    assert archive.metadata.layers is None
    assert archive.metadata.hidden_size == 8
    assert str(path) in repr(archive)
    assert "6 traces" in repr(archive)


def test_selecting_layers(archive: h5traces.Archive) -> None:
    view = archive.select(layers=[2, 0, 2])
    assert view.layers == (0, 2)
    assert len(view[5]["hidden_states"]) == 2
    assert_same(view[5]["attentions"][1], BATCH[5]["attentions"][2])
    assert_same(view[-1].to_dict()["hidden_states"], BATCH[5]["hidden_states"][::2])
    assert view[1:3].layers == (0, 2)
    assert view.select(layers=[2])[0]["hidden_states"].layers == (2,)
    assert archive.layers == (0, 1, 2)
    assert view.select(layers=[]).layers == ()
    assert list(view.select(layers=[])[0]["hidden_states"]) == []
    for missing in ([3], [-1], [1]):
        with pytest.raises(LayerIndexError, match=r"layer .* stores 2 layers \(0, 2\)"):
            view.select(layers=missing)


def test_selecting_samples(archive: h5traces.Archive, path: Path) -> None:
    view = archive.select(samples="1:4").select(samples=[2, 0], layers="last")
    assert ids(view) == ["tc_3", "tc_1"]
    assert view.layers == (2,)
    assert view.by_id("tc_3").ordinal == 3
    with pytest.raises(SampleIndexError, match="sample 2 was asked for, but there are 2"):
        view.select(samples=[2])
    with pytest.raises(LayerIndexError, match=f"layer 0 was asked for, but {path} stores 1"):
        view.select(layers="0-last")


def test_reading_many_at_once(archive: h5traces.Archive) -> None:
    found = archive.read([5, 0, -1, 5], layers=[2, 1], kinds=["attentions"], workers=3)
    assert [list(each) for each in found] == [["attentions"]] * 4
    for each, index in zip(found, [5, 0, 5, 5], strict=True):
        assert_same(each["attentions"], BATCH[index]["attentions"][1:])
    assert archive.read([]) == []
    whole = archive.read(range(6))
    for each, trace in zip(whole, BATCH, strict=True):
        assert_same(each["hidden_states"], trace["hidden_states"])
        assert_same(each["attentions"], trace["attentions"])
    with pytest.raises(IndexError):
        archive.read([6])
    with pytest.raises(LayerIndexError):
        archive.read([0], layers=[9])


def test_one_index_layer_and_kind_will_do(archive: h5traces.Archive) -> None:
    assert archive.select(layers=2).layers == (2,)
    assert ids(archive.select(samples=3)) == ["tc_3"]
    (found,) = archive.read(5, layers=1, kinds="hidden_states")
    assert_same(found, {"hidden_states": [BATCH[5]["hidden_states"][1]]})
    for kinds in ("hidden_state", ["hidden_states", "hidden_state"]):
        with pytest.raises(ValueError, match=r"'hidden_state' is unknown; .* hidden_states"):
            archive.read([0], kinds=kinds)
    with pytest.raises(TypeError, match=r"archive\.by_id\('tc_3'\)"):
        archive["tc_3"]  # type: ignore[call-overload]


def test_a_view_has_its_layers_only(archive: h5traces.Archive) -> None:
    trace = archive.select(layers=[1])[0]
    assert_same(trace.layer(1), BATCH[0]["hidden_states"][1])
    for kind in ("hidden_states", "attentions"):
        with pytest.raises(LayerIndexError, match=r"layer 0 of .* not selected; .* layers \[1\]"):
            trace.layer(0, kind)
    with pytest.raises(ValueError, match="'hidden' is unknown"):
        trace.layer(1, "hidden")


def test_signatures_and_errors_name_the_public_function(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^open\(\) got an unexpected keyword argument 'exact'"):
        h5traces.open(tmp_path, exact=True)  # type: ignore[call-arg]
    assert h5traces.open.__name__ == "open"
    assert "ReadLimits = ReadLimits()," in str(inspect.signature(h5traces.open)).replace("'", "")
    assert repr(TargetOptions(workers=2)) == "TargetOptions(workers=2)"
    with pytest.raises(TypeError, match="precision is 3, expected a PrecisionOptions, a Precision"):
        h5traces.create(tmp_path / "a.h5", precision=3)  # type: ignore[arg-type]


# --- ids ----------------------------------------------------------------------------------------


def test_ids_may_repeat_and_be_missing(tmp_path: Path) -> None:
    wanted = ["a", None, "b", "a", "", "a"]
    batch = [dict(trace) for trace in BATCH]
    for trace, question_id in zip(batch, wanted, strict=True):
        if question_id is None:
            del trace["question_id"]
        else:
            trace["question_id"] = question_id
    archive = h5traces.open(make_archive(tmp_path, batch))
    assert archive.ids == tuple(wanted)
    assert archive.by_id("b").ordinal == 2
    assert archive.by_id("").ordinal == 4
    with pytest.raises(TraceNotFoundError, match=r"3 traces have .* id 'a', at \[0, 3, 5\]"):
        archive.by_id("a")
    assert [archive.by_id("a", generation).ordinal for generation in range(3)] == [0, 3, 5]
    with pytest.raises(TraceNotFoundError, match="no trace has the sample id 'a' with generation"):
        archive.by_id("a", 3)
    with pytest.raises(TraceNotFoundError, match="no trace has the sample id 'c'"):
        archive.by_id("c")
    with pytest.raises(KeyError):
        archive.by_id("c")
    assert archive[:3].by_id("a").ordinal == 0
    assert archive[1].get("question_id", "unknown") == "unknown"
    assert "question_id" not in archive[1]


# --- shards -------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    report = h5traces.convert(
        make_archive(tmp_path, BATCH[:5]).with_suffix(".pkl"),
        f"{folder}/",
        target=TargetOptions(shard_samples=2),
    )
    assert report.ok
    assert [Path(target).name for target in report.files[0].targets] == [
        "batch-00000.h5",
        "batch-00001.h5",
        "batch-00002.h5",
    ]
    return folder


def test_shards_read_as_one(shards: Path) -> None:
    names = sorted(shards.iterdir())
    for source in (shards, str(shards), f"{shards}/*.h5", f"{shards}/batch-0000?.h5", names):
        with h5traces.open(source) as archive:
            assert archive.paths == tuple(names)
            assert_same([trace.to_dict() for trace in archive], BATCH[:5])
            assert archive.by_id("tc_3").ordinal == 3
            assert archive[-1].ordinal == 4
            assert ids(archive[1:5:2]) == ["tc_1", "tc_3"]
            assert "and 2 more" in repr(archive)
    backwards = h5traces.open(names[::-1])
    assert ids(backwards) == ["tc_4", "tc_2", "tc_3", "tc_0", "tc_1"]
    assert len(h5traces.open([names[0], shards])) == 5


def test_an_empty_shard_is_no_obstacle(shards: Path, tmp_path: Path) -> None:
    empty = make_archive(tmp_path / "empty", [], name="empty.pkl")
    names = sorted(shards.iterdir())
    archive = h5traces.open([names[0], empty, names[1]])
    assert ids(archive) == ["tc_0", "tc_1", "tc_2", "tc_3"]
    assert len(h5traces.open(empty)) == 0
    assert h5traces.load(empty) == []


def test_shards_of_different_models_are_refused(path: Path, tmp_path: Path) -> None:
    other = make_archive(tmp_path, BATCH, layers=[0])
    with pytest.raises(ArchiveError, match=r"layers=\(0,\).*one model and one set of layers"):
        h5traces.open([path, other])


def test_nothing_to_open(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing.h5", tmp_path / "*.h5", tmp_path):
        told = r"nothing that matches|holds no \.h5 or \.hdf5 file"
        with pytest.raises(FileNotFoundError, match=told):
            h5traces.open(missing)
    with pytest.raises(ArchiveError, match="no archive to open"):
        h5traces.open([])


def open_descriptors(folder: Path) -> int:
    found = 0
    for each in list(Path("/proc/self/fd").iterdir()):
        try:
            found += each.readlink().parent == folder
        except OSError:
            continue
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_few_files_stay_open(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        shutil.copy(path, tmp_path / f"{number}.h5")
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 2)
    archive = h5traces.open(tmp_path)
    archive.close()
    assert open_descriptors(tmp_path) == 0
    for index in [*range(36), 0, 35, 17]:
        assert archive[index]["question_id"] == f"tc_{index % 6}"
        assert open_descriptors(tmp_path) <= 2
    archive.close()
    assert open_descriptors(tmp_path) == 0
    # Closed is not the end: the next use opens again.
    assert archive[20]["question_id"] == "tc_2"


def test_a_file_replaced_meanwhile_is_not_mistaken_for_the_old_one(
    path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.h5"
    shutil.copy(path, copy)
    archive = h5traces.open(copy)
    make_archive(tmp_path, make_batch("full_pkl", seed=1), name="copy.pkl", overwrite=True)
    assert_same(archive[5].to_dict(), BATCH[5])
    archive.close()
    with pytest.raises(CorruptArchiveError, match="was replaced since it was opened"):
        archive[5].to_dict()


# --- workers ------------------------------------------------------------------------------------


def digest_of_layer(job: tuple[h5traces.Archive, int]) -> bytes:
    archive, index = job
    return archive[index]["hidden_states"][1].tobytes()


def dict_of_trace(trace: h5traces.Trace) -> dict[str, Any]:
    return trace.to_dict()


@pytest.mark.parametrize("footer", [True, False])
def test_pickling(path: Path, tmp_path: Path, footer: bool) -> None:
    source = path if footer else without_footer(path, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoredStateWarning)
        archive = h5traces.open(source)
        view = archive.select(layers=[1])[2:5]
        assert view.ids == ("tc_2", "tc_3", "tc_4")
        trace = archive[3]
        assert_same(trace["attentions"][0], BATCH[3]["attentions"][0])
        copies = [pickle.loads(pickle.dumps(each)) for each in (archive, view, trace)]
        assert_same(copies[0][5].to_dict(), BATCH[5])
        assert copies[1].ids == view.ids
        assert copies[1].layers == (1,)
        assert_same(copies[1][0]["hidden_states"][0], BATCH[2]["hidden_states"][1])
        assert_same(copies[2].to_dict(), BATCH[3])
        assert len(pickle.dumps(h5traces.open(source))) < 10_000


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::h5traces.errors.StoredStateWarning")
@pytest.mark.parametrize("footer", [True, False])
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_processes(path: Path, tmp_path: Path, method: Any, footer: bool) -> None:
    archive = h5traces.open(path if footer else without_footer(path, tmp_path))
    # Opened, and partly read, before the workers start.
    assert_same(archive[0]["hidden_states"][1], BATCH[0]["hidden_states"][1])
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        found = pool.map(digest_of_layer, [(archive, index % 6) for index in range(12)])
        (trace,) = pool.map(dict_of_trace, [archive[4]])
    assert found == [BATCH[index % 6]["hidden_states"][1].tobytes() for index in range(12)]
    assert_same(trace, BATCH[4])
    assert_same(archive[0].to_dict(), BATCH[0])


def read_in_child(archive: h5traces.Archive, results: Any) -> None:
    results.put(archive[3]["attentions"][2].tobytes())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::h5traces.errors.StoredStateWarning")
@pytest.mark.parametrize("footer", [True, False])
def test_forked_children_inherit_an_open_archive(path: Path, tmp_path: Path, footer: bool) -> None:
    archive = h5traces.open(path if footer else without_footer(path, tmp_path))
    archive[3].to_dict()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=read_in_child, args=(archive, results)) for _ in range(3)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert found == [BATCH[3]["attentions"][2].tobytes()] * 3
    assert_same(archive[3].to_dict(), BATCH[3])


@pytest.mark.filterwarnings("ignore::h5traces.errors.StoredStateWarning")
@pytest.mark.parametrize("footer", [True, False])
def test_threads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, footer: bool) -> None:
    source = path if footer else without_footer(path, tmp_path)
    others = [shutil.copy(source, tmp_path / f"copy{number}.h5") for number in range(3)]
    # Files are closed and opened again all the time.
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 1)
    archive = h5traces.open([source, *others])

    def read(index: int) -> bool:
        found = archive[index]["hidden_states"][index % 3]
        return found.tobytes() == BATCH[index % 6]["hidden_states"][index % 3].tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [number * 7 % 24 for number in range(240)]))


def test_torch_data_loader_workers(path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Dataset(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.archive = h5traces.open(path)

        def __len__(self) -> int:
            return len(self.archive)

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(self.archive[index]["hidden_states"][2]).float()

    loader = torch.utils.data.DataLoader(
        Dataset(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = list(loader)
    for tensor, trace in zip(found, BATCH, strict=True):
        assert_same(tensor.numpy(), trace["hidden_states"][2].astype(np.float32))


# --- how much is read ---------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and size of every read of a local file."""
    seen: list[tuple[int, int]] = []
    read_at, read_into = LocalFile.read_at, LocalFile.read_into

    def counted(self: LocalFile, offset: int, nbytes: int) -> bytes:
        seen.append((offset, nbytes))
        return read_at(self, offset, nbytes)

    def counted_into(self: LocalFile, offset: int, out: memoryview) -> None:
        seen.append((offset, len(out)))
        read_into(self, offset, out)

    def counted_plan(plan: Any, source: Any, *others: Any, **options: Any) -> None:
        seen.extend(zip(plan["offset"].tolist(), plan["nbytes"].tolist(), strict=True))
        run_plan(plan, source, *others, **options)

    monkeypatch.setattr(LocalFile, "read_at", counted)
    monkeypatch.setattr(LocalFile, "read_into", counted_into)
    monkeypatch.setattr(plans, "run_plan", counted_plan)
    return seen


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    batch = [
        {
            "hidden_states": [rng.standard_normal((40, 256)).astype(np.float16) for _ in range(8)],
            "attentions": [rng.random((4, 40, 40)).astype(np.float16) for _ in range(8)],
            "tokens": np.arange(40),
            "question_id": f"q{number}",
        }
        for number in range(40)
    ]
    return make_archive(tmp_path_factory.mktemp("large"), batch)


def test_a_layer_of_a_sample_is_one_read_of_its_chunk(
    large: Path, reads: list[tuple[int, int]]
) -> None:
    archive = h5traces.open(large)
    archive[0]["hidden_states"][0]  # the footer's tables are read once
    for index, kind, position in ((7, "hidden_states", 3), (31, "attentions", 7), (0, "tokens", 0)):
        trace = archive[index]
        path = kind if kind == "tokens" else f"{kind}/layer_{position:03d}"
        chunks = trace._stored.entry(path).chunks
        assert chunks is not None
        reads.clear()
        value = archive[index][kind]
        if kind != "tokens":
            value = value[position]
        assert value.size
        assert reads == [(chunks.offsets[0], chunks.sizes[0])]


def test_opening_reads_little(large: Path, reads: list[tuple[int, int]]) -> None:
    archive = h5traces.open(large)
    assert len(archive) == 40
    assert len(reads) <= 3
    assert sum(nbytes for _, nbytes in reads) <= 70_000
    assert isinstance(archive._files[0].store, FooterStore)
    reads.clear()
    archive[13]["hidden_states"][5]
    chunk = archive[13]._stored.entry("hidden_states/layer_005").stored_nbytes
    # The chunk, the table of the group, the sample's row, and two columns that all samples share.
    assert len(reads) == 5
    assert sum(nbytes for _, nbytes in reads) - chunk < large.stat().st_size / 50
    reads.clear()
    assert archive.ids[39] == "q39"
    # The ids alone.
    assert len(reads) == 1
    assert sum(nbytes for _, nbytes in reads) < 1000
