"""Archives on real servers: what reading asks of them, and how it fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import s3fs
import torch
from commands import run
from legacy_batches import assert_same, make_archive, make_batch
from servers import Server, running
from torch.utils.data import DataLoader

import h5traces
from h5traces.errors import (
    CorruptArchiveError,
    H5TracesError,
    MissingDependencyError,
    NotAnArchiveError,
    RemoteError,
    SchemaError,
    StoredStateWarning,
)
from h5traces.features import compute_features
from h5traces.graph import TraceGraphDataset
from h5traces.rewriting.label import label
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import TRAILER_NBYTES, hdf5_end
from h5traces.storage.remote.paths import RemoteOptions, RemotePath
from h5traces.torch_data import TraceDataset

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "bucket"
# So that not even a small test archive lies in the first request as a whole.
SMALL_TAIL = 8 << 10


def big_batch(num_samples: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Traces that are much larger than their footer."""
    rng = np.random.default_rng(seed)
    seq_len = 40
    return [
        {
            "hidden_states": [
                rng.standard_normal((seq_len, 256)).astype(np.float16) for _ in range(4)
            ],
            "attentions": [rng.random((4, seq_len, seq_len)).astype(np.float16) for _ in range(4)],
            "tokens": rng.integers(3, 32000, seq_len),
            "tokens_decoded": [f"t{number}" for number in range(seq_len)],
            "generated_answer_clean": "an answer",
            "question_id": f"q_{seed}_{index}",
        }
        for index in range(num_samples)
    ]


BATCH = big_batch()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives that tests copy to where servers look."""
    folder = tmp_path_factory.mktemp("shelf")
    make_archive(folder, BATCH, name="a.pkl")
    make_archive(folder, big_batch(3, seed=1), name="b.pkl")
    make_archive(folder, make_batch("full_pkl"), name="small.pkl")
    return folder


@pytest.fixture(scope="module")
def web_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def web_process(web_folder: Path) -> Iterator[Server]:
    with running("web_server.py", str(web_folder)) as server:
        yield server


@pytest.fixture
def web(web_process: Server, web_folder: Path, shelf: Path) -> Server:
    shutil.copytree(shelf, web_folder, dirs_exist_ok=True)
    web_process.control(
        failures=[], version="etag", ranges=True, delay=0.0, token="", redirect="", lie=""
    )
    web_process.requests()
    return web_process


@pytest.fixture(scope="module")
def s3_process() -> Iterator[Server]:
    with running("s3_server.py") as server:
        options(server)["fs"].mkdir(BUCKET)
        yield server


def options(server: Server) -> dict[str, Any]:
    given = {"key": "a key", "secret": "a secret", "endpoint_url": server.url}
    return {"given": given, "fs": s3fs.S3FileSystem(**given, use_listings_cache=False)}


@pytest.fixture
def s3(s3_process: Server, shelf: Path) -> Server:
    s3_process.control(failures=[])
    files = options(s3_process)["fs"]
    for path in shelf.glob("*.h5"):
        files.pipe_file(f"{BUCKET}/run/{path.name}", path.read_bytes())
    s3_process.requests()
    return s3_process


def from_s3(server: Server, name: str = "run/a.h5", **more: Any) -> h5traces.Archive:
    given = options(server)["given"] | more.pop("storage", {})
    more.setdefault("remote", RemoteOptions(tail_nbytes=SMALL_TAIL))
    return h5traces.open(f"s3://{BUCKET}/{name}", storage_options=given, **more)


def from_web(server: Server, name: str = "a.h5", **more: Any) -> h5traces.Archive:
    more.setdefault("remote", RemoteOptions(tail_nbytes=SMALL_TAIL))
    return h5traces.open(f"{server.url}/{name}", **more)


OPENERS = {"s3": from_s3, "web": from_web}


@pytest.fixture(params=["s3", "web"])
def remote(request: pytest.FixtureRequest) -> tuple[Server, Any]:
    """A server, and what opens archives on it."""
    return request.getfixturevalue(request.param), OPENERS[request.param]


# --- what is read, and with how many requests ----------------------------------------------------


def test_everything_reads_as_from_disk(remote: Any) -> None:
    server, opener = remote
    archive = opener(server)
    assert archive.ids == tuple(each["question_id"] for each in BATCH)
    for trace, expected in zip(archive, BATCH, strict=True):
        assert_same(trace.to_dict(), expected)


def test_load_takes_addresses(web: Server) -> None:
    assert_same(h5traces.load(f"{web.url}/a.h5"), BATCH)


def test_a_cold_shard_takes_two_requests_at_most_and_an_array_one(remote: Any) -> None:
    server, opener = remote
    archive = opener(server)
    archive.ids  # noqa: B018  # reads the table of samples
    opened = server.requests()
    assert [each["method"] for each in opened] == ["GET"] * len(opened)
    assert 1 <= len(opened) <= 2
    assert opened[0]["range"] == f"bytes=-{SMALL_TAIL}"
    for layer in range(4):
        archive[1]["hidden_states"][layer]
        archive[2]["attentions"][layer]
    assert len(server.requests()) == 8


def test_the_footer_of_most_archives_lies_in_the_first_request(remote: Any) -> None:
    server, opener = remote
    archive = opener(server, remote=RemoteOptions())
    archive.ids  # noqa: B018
    assert len(server.requests()) == 1


def test_a_larger_footer_takes_one_more_request(remote: Any) -> None:
    server, opener = remote
    archive = opener(server, remote=RemoteOptions(tail_nbytes=TRAILER_NBYTES))
    assert_same(archive[0].to_dict(), BATCH[0])
    found = server.requests()
    # The tail, the footer, and the whole sample.
    assert len(found) == 3


def test_a_sample_is_one_request(remote: Any) -> None:
    server, opener = remote
    archive = opener(server)
    server.requests()
    archive[2].to_dict()
    assert len(server.requests()) == 1
    archive.read([1])
    assert len(server.requests()) == 1
    assert len(archive[0]["hidden_states"][1:]) == 3
    assert len(server.requests()) == 1


def test_batches_are_coalesced_and_equal_single_reads(remote: Any, shelf: Path) -> None:
    server, opener = remote
    archive, local = opener(server), h5traces.open(shelf / "a.h5")
    server.requests()
    found = archive.read([3, 0, 3], layers=[1, 2], workers=2)
    # Nearer to each other than a gap that is worth a request.
    assert len(server.requests()) <= 2
    for each, expected in zip(found, local.read([3, 0, 3], layers=[1, 2]), strict=True):
        assert_same(each, expected)


def test_far_ranges_are_fetched_in_parallel_requests(remote: Any) -> None:
    server, opener = remote
    choice = RemoteOptions(tail_nbytes=SMALL_TAIL, max_gap_nbytes=0, max_request_nbytes=30_000)
    archive = opener(server, remote=choice)
    server.requests()
    assert_same(archive[0].to_dict(), BATCH[0])
    found = server.requests()
    assert len(found) > 4
    spans = [each["range"].removeprefix("bytes=").split("-") for each in found]
    assert max(int(last) - int(first) for first, last in spans) < 30_000


def test_an_array_of_many_chunks_is_one_request(web: Server, web_folder: Path) -> None:
    batch = big_batch(1)
    for trace in batch:
        trace["hidden_states"] = [np.ones((3000, 1024), np.float16)]
        trace["attentions"] = []
    make_archive(web_folder, batch, name="chunks.pkl")
    archive = from_web(web, "chunks.h5", remote=RemoteOptions(tail_nbytes=1 << 10))
    assert len(archive[0]._stored.ranges("hidden_states/position_000")) > 1
    web.requests()
    assert archive[0]["hidden_states"][0].shape == (3000, 1024)
    assert len(web.requests()) == 1


def test_globs_folders_and_lists_of_shards(remote: Any, shelf: Path) -> None:
    server, opener = remote
    start = "run/" if opener is from_s3 else ""
    both = opener(server, f"{start}[ab].h5")
    assert [path.name for path in both.paths] == ["a.h5", "b.h5"]
    assert len(both) == 7
    with pytest.raises(H5TracesError, match="of one model"):
        opener(server, start)
    assert_same(both[6].to_dict(), h5traces.open(shelf / "b.h5")[2].to_dict())
    mixed = h5traces.open(
        [str(shelf / "b.h5"), both.paths[0]],
        storage_options=options(server)["given"] if opener is from_s3 else None,
    )
    assert len(mixed) == 7
    assert h5traces.open(f"file://{shelf}/a.h5").paths == (shelf / "a.h5",)


def test_file_systems_without_a_transport_of_their_own(shelf: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/run/a.h5", (shelf / "a.h5").read_bytes())
    archive = h5traces.open("memory://run/*.h5", remote=RemoteOptions(tail_nbytes=SMALL_TAIL))
    assert_same(archive[3].to_dict(), BATCH[3])
    memory.rm("/run/a.h5")
    with pytest.raises(RemoteError, match="deleted"):
        archive[0].to_dict()
    with pytest.raises(FileNotFoundError, match=r"memory://run/a\.h5"):
        h5traces.open("memory://run/a.h5")


def test_rewriting_reads_from_servers(web: Server, tmp_path: Path) -> None:
    from h5traces.rewriting.repack import repack

    report = repack(f"{web.url}/a.h5", tmp_path / "two.h5", layers=[0, 2])
    assert report.num_samples == 4
    assert_same(
        h5traces.open(tmp_path / "two.h5")[1]["hidden_states"][1], BATCH[1]["hidden_states"][2]
    )


@pytest.mark.filterwarnings("ignore:.*attention rows that do not sum to 1")
def test_features_take_one_request_per_sample(remote: Any, shelf: Path) -> None:
    server, opener = remote
    archive = opener(server)
    server.requests()
    names = ["last_token", "mean", "attention_entropy"]
    found = compute_features(archive, names, workers=2)
    assert len(server.requests()) == len(archive)
    assert_same(found, compute_features(h5traces.open(shelf / "a.h5"), names))


def test_labels_of_archives_on_servers(remote: Any, tmp_path: Path) -> None:
    server, opener = remote
    address = opener(server).paths[0]
    table = tmp_path / "scores.csv"
    rows = [f"q_0_{index},{index / 4}" for index in range(4)]
    table.write_text("\n".join(["question_id,bleurt_score", *rows]), encoding="utf-8")
    given = options(server)["given"] if opener is from_s3 else {}
    with pytest.raises(SchemaError, match="name a folder"):
        label(address, table, storage_options=given)
    label(address, table, storage_options=given, folder=tmp_path / "labels")
    assert (tmp_path / "labels" / "a.h5.labels.json").exists()
    assert opener(server, labels=tmp_path / "labels").labels == (1, 1, 0, 0)
    assert opener(server).labels == (None,) * 4
    label(address, table, storage_options=given, output=tmp_path / "mine.h5")
    assert h5traces.open(tmp_path / "mine.h5").labels == (1, 1, 0, 0)


def test_items_and_batches_of_a_dataset_are_coalesced(remote: Any, shelf: Path) -> None:
    server, opener = remote
    kinds = ("hidden_states", "attentions")
    dataset = TraceDataset(opener(server), kinds=kinds)
    local = TraceDataset(shelf / "a.h5", kinds=kinds)
    server.requests()
    item = dataset[2]
    assert len(server.requests()) == 1
    assert torch.equal(item["attentions"], local[2]["attentions"])
    items = dataset.__getitems__([3, 0, 1])
    assert len(server.requests()) <= 2
    for each, index in zip(items, (3, 0, 1), strict=True):
        assert torch.equal(each["hidden_states"], local[index]["hidden_states"])
    with pytest.raises(IndexError, match="the dataset has 4"):
        dataset.__getitems__([1, 9])


def test_a_graph_on_a_server_is_one_request(web: Server, shelf: Path) -> None:
    graphs = TraceGraphDataset(from_web(web))
    local = TraceGraphDataset(shelf / "a.h5")
    graphs[4]
    web.requests()
    found = graphs[5]
    # Near enough to each other; in larger samples they are two, side by side.
    assert len(web.requests()) == 1
    assert torch.equal(found.x, local[5].x)
    assert torch.equal(found.edge_index, local[5].edge_index)


@pytest.mark.parametrize(("kind", "start"), [("s3", "spawn"), ("web", "fork")])
def test_workers_of_a_loader_read_from_servers(
    request: pytest.FixtureRequest, shelf: Path, kind: str, start: str
) -> None:
    dataset = TraceDataset(OPENERS[kind](request.getfixturevalue(kind)), layers=2)
    dataset[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loader = DataLoader(
            dataset, batch_size=2, num_workers=2, multiprocessing_context=start, collate_fn=list
        )
        found = [item for batch in loader for item in batch]
    local = TraceDataset(shelf / "a.h5", layers=2)
    assert [each["sample_id"] for each in found] == [each["question_id"] for each in BATCH]
    for each, expected in zip(found, (local[index] for index in range(4)), strict=True):
        assert torch.equal(each["hidden_states"], expected["hidden_states"])


# --- processes -----------------------------------------------------------------------------------


def _read_one(archive: h5traces.Archive, index: int) -> bytes:
    return archive[index]["hidden_states"][2].tobytes()


@pytest.mark.parametrize(
    ("kind", "method"),
    [("s3", "fork"), ("web", "fork"), ("s3", "spawn"), ("web", "forkserver")],
)
def test_other_processes_make_connections_of_their_own(
    request: pytest.FixtureRequest, kind: str, method: str
) -> None:
    archive = OPENERS[kind](request.getfixturevalue(kind))
    expected = [_read_one(archive, index) for index in range(4)]
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; fsspec runs one.
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.starmap(_read_one, [(archive, index) for index in range(4)])
    assert found == expected


def test_a_forked_child_uses_what_it_inherited(remote: Any) -> None:
    server, opener = remote
    archive = opener(server)
    trace = archive[1]
    expected = trace["attentions"][0].tobytes()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        same = False
        try:
            same = trace["attentions"][0].tobytes() == expected
        finally:
            os.write(writing, b"same" if same else b"else")
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 4) == b"same"
    os.close(reading)
    os.close(writing)


def test_threads_share_an_archive(remote: Any) -> None:
    server, opener = remote
    archive = opener(server)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: _read_one(archive, index % 4), range(32)))
    assert found == [each["hidden_states"][2].tobytes() for each in BATCH] * 8


def test_pickles_closes_and_opens_again(remote: Any) -> None:
    server, opener = remote
    archive = pickle.loads(pickle.dumps(opener(server)))
    assert archive.ids[0] == "q_0_0"
    archive.close()
    assert_same(archive[0].to_dict(), BATCH[0])
    file = pickle.loads(pickle.dumps(archive[0]._stored.file.store.file))
    assert file.read_at(0, 8) == b"\x89HDF\r\n\x1a\n"


# --- the cache -----------------------------------------------------------------------------------


def test_the_cache_saves_requests(remote: Any, tmp_path: Path) -> None:
    server, opener = remote
    for expected in (3, 1, 1):
        archive = opener(server, cache=tmp_path, remote=RemoteOptions(tail_nbytes=1 << 10))
        assert_same(archive[0].to_dict(), BATCH[0])
        # The end of the object is always asked for: it tells whether the object is the same.
        assert len(server.requests()) == expected


def test_a_replaced_object_is_never_mixed_with_the_cached_one(
    remote: Any, shelf: Path, tmp_path: Path
) -> None:
    server, opener = remote
    opener(server, cache=tmp_path)[0].to_dict()
    replace(server, opener, (shelf / "b.h5").read_bytes())
    archive = opener(server, cache=tmp_path)
    assert_same(archive[0].to_dict(), h5traces.open(shelf / "b.h5")[0].to_dict())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_cache_is_fetched_again(web: Server, tmp_path: Path) -> None:
    from_web(web, cache=tmp_path)[0].to_dict()
    (data,) = tmp_path.glob("*/data")
    data.write_bytes(bytes(data.stat().st_size))
    with next(tmp_path.glob("*/ranges")).open("ab") as log:
        log.write(b"12 torn li")
    for _ in range(2):
        assert_same(from_web(web, cache=tmp_path)[0].to_dict(), BATCH[0])


def test_a_cache_that_cannot_be_written_is_done_without(web: Server, tmp_path: Path) -> None:
    archive = from_web(web, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    with pytest.warns(StoredStateWarning, match="cache cannot be written"):
        assert_same(archive[0].to_dict(), BATCH[0])
    assert_same(archive[1].to_dict(), BATCH[1])


# --- failures ------------------------------------------------------------------------------------


def replace(server: Server, opener: Any, data: bytes, name: str = "a.h5") -> None:
    """Put other bytes in the place of an archive."""
    if opener is from_s3:
        options(server)["fs"].pipe_file(f"{BUCKET}/run/{name}", data)
    else:
        Path(os.environ["H5TRACES_TEST_WEB"], name).write_bytes(data)


@pytest.fixture(autouse=True)
def _web_folder_for_replace(web_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("H5TRACES_TEST_WEB", str(web_folder))


def test_an_object_replaced_while_it_is_read_is_named(remote: Any, shelf: Path) -> None:
    server, opener = remote
    archive = opener(server)
    replace(server, opener, (shelf / "b.h5").read_bytes())
    with pytest.raises(CorruptArchiveError, match=r"replaced since it was opened") as caught:
        archive[2]["hidden_states"][1]
    assert "/samples/00000002/hidden_states/layer_001" in str(caught.value)
    assert str(archive.paths[0]) in str(caught.value)
    # Also where the file was closed meanwhile, or the archive went to another process.
    archive.close()
    with pytest.raises(CorruptArchiveError, match="replaced since it was opened"):
        archive[0].to_dict()


@pytest.mark.parametrize("version", ["time", "none"])
def test_servers_without_etags(web: Server, web_folder: Path, shelf: Path, version: str) -> None:
    web.control(version=version)
    archive = from_web(web)
    assert_same(archive[0].to_dict(), BATCH[0])
    data = bytearray((shelf / "a.h5").read_bytes())
    offset, nbytes = archive[1]._stored.ranges("hidden_states/layer_002")[0]
    data[offset + nbytes // 2] ^= 1
    path = web_folder / "a.h5"
    os.utime(path, (1, 1))
    path.write_bytes(data)
    # The checksum of the chunk tells where nothing else does.
    with pytest.raises(CorruptArchiveError, match=r"layer_002.*(replaced|checksum)"):
        archive[1]["hidden_states"][2]


def test_an_object_replaced_by_a_smaller_one(remote: Any, shelf: Path) -> None:
    server, opener = remote
    archive = opener(server)
    offset, nbytes = archive[3]._stored.ranges("hidden_states/layer_001")[0]
    whole = (shelf / "a.h5").read_bytes()
    replace(server, opener, whole[: offset + nbytes // 2])
    with pytest.raises(CorruptArchiveError, match=r"/samples/00000003.*replaced since"):
        archive[3]["hidden_states"][1]
    replace(server, opener, whole[: offset - 1])
    with pytest.raises(RemoteError, match=r"/samples/00000003.*shorter than it was"):
        archive[3]["hidden_states"][1]


def test_checksums_are_verified(remote: Any, shelf: Path) -> None:
    server, opener = remote
    data = bytearray((shelf / "a.h5").read_bytes())
    with h5traces.open(shelf / "a.h5") as local:
        offset, nbytes = local[1]._stored.ranges("attentions/layer_002")[0]
    data[offset + nbytes // 2] ^= 1
    replace(server, opener, bytes(data))
    with pytest.raises(CorruptArchiveError, match=r"a\.h5: /samples/00000001/attentions/layer_002"):
        opener(server)[1]["attentions"][2]


def test_missing_objects(remote: Any) -> None:
    server, opener = remote
    with pytest.raises(FileNotFoundError, match=r"nothing\.h5: no such object"):
        opener(server, "nothing.h5")
    with pytest.raises(FileNotFoundError, match="nothing that matches"):
        opener(server, "nothing*.h5")


def test_an_object_deleted_while_it_is_read(web: Server, web_folder: Path) -> None:
    archive = from_web(web)
    (web_folder / "a.h5").unlink()
    with pytest.raises(RemoteError, match=r"/samples/00000001/hidden_states/layer_000.*deleted"):
        archive[1]["hidden_states"][0]


@pytest.mark.parametrize("address", ["s3", "web", "s3-glob"])
def test_an_unreachable_server(address: str) -> None:
    choice = RemoteOptions(attempts=2, timeout=2)
    storage = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}
    url = {"s3": "s3://b/x.h5", "web": "http://127.0.0.1:9/x.h5", "s3-glob": "s3://b/*.h5"}[address]
    given = {} if address == "web" else storage
    with pytest.raises(RemoteError, match="cannot be reached") as caught:
        h5traces.open(url, storage_options=given, remote=choice)
    assert url in str(caught.value)


def test_a_server_that_went_away_names_the_sample(web_folder: Path, shelf: Path) -> None:
    shutil.copy(shelf / "a.h5", web_folder)
    choice = RemoteOptions(attempts=2, tail_nbytes=SMALL_TAIL)
    with running("web_server.py", str(web_folder)) as server:
        archive = from_web(server, remote=choice)
    with pytest.raises(RemoteError, match=r"/samples/00000003/attentions/layer_000.*reached"):
        archive[3]["attentions"][0]


@pytest.mark.parametrize(
    "failure", [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")]
)
def test_expired_credentials(s3: Server, failure: tuple[int, str]) -> None:
    s3.control(failures=[failure])
    with pytest.raises(RemoteError, match="credentials") as caught:
        from_s3(s3)
    assert "s3://bucket/run/a.h5" in str(caught.value)
    assert failure[1] in str(caught.value)
    archive = from_s3(s3)
    s3.control(failures=[failure])
    with pytest.raises(RemoteError, match=r"/samples/00000000/hidden_states/layer_001.*credent"):
        archive[0]["hidden_states"][1]
    # Refusals are not tried again.
    s3.control(failures=[])
    assert_same(archive[0]["hidden_states"][1], BATCH[0]["hidden_states"][1])


def test_no_credentials_at_all(s3: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RemoteError, match="there are no credentials"):
        h5traces.open(f"s3://{BUCKET}/run/a.h5", storage_options={"endpoint_url": s3.url})


def test_web_servers_that_want_a_token(web: Server) -> None:
    web.control(token="secret")
    with pytest.raises(RemoteError, match=r"401.*credentials"):
        from_web(web)
    headers = {"headers": {"Authorization": "Bearer secret"}}
    archive = from_web(web, storage_options=headers)
    assert len(archive) == 4
    web.control(token="another")
    with pytest.raises(RemoteError, match=r"/samples/00000000/.*403.*credentials"):
        archive[0]["hidden_states"][0]


def test_credentials_do_not_follow_to_another_host(web: Server, web_folder: Path) -> None:
    headers = {"headers": {"Authorization": "Bearer secret"}}
    with running("web_server.py", str(web_folder)) as first:
        first.control(redirect=web.url)
        archive = from_web(first, storage_options=headers)
        assert_same(archive[0]["hidden_states"][1], BATCH[0]["hidden_states"][1])
        assert {each["authorization"] for each in first.requests()} == {"Bearer secret"}
    found = web.requests()
    assert found[0]["range"] == f"bytes=-{SMALL_TAIL}"
    assert {each["authorization"] for each in found} == {""}


def test_a_batch_that_cannot_be_fetched_names_its_samples(remote: Any, shelf: Path) -> None:
    server, opener = remote
    archive = opener(server)
    replace(server, opener, (shelf / "b.h5").read_bytes())
    for read in (
        lambda: archive.read([2, 1], layers=[0]),
        lambda: archive[1].to_dict(),
        lambda: archive[1]["hidden_states"][:],
        lambda: compute_features(archive[1:2], ["mean"]),
    ):
        with pytest.raises(CorruptArchiveError, match=r"/samples/00000001.*replaced") as caught:
            read()
        assert str(archive.paths[0]) in str(caught.value)


def test_a_damaged_footer(remote: Any, shelf: Path) -> None:
    server, opener = remote
    whole = (shelf / "a.h5").read_bytes()
    for place in (-TRAILER_NBYTES - 10, -TRAILER_NBYTES // 2, hdf5_end(LocalFile(shelf / "a.h5"))):
        data = bytearray(whole)
        data[place] ^= 1
        replace(server, opener, bytes(data))
        with pytest.raises(CorruptArchiveError, match=r"a\.h5.*index.*h5traces seal"):
            opener(server)[0].to_dict()


def test_shards_are_fetched_side_by_side(web: Server, web_folder: Path, shelf: Path) -> None:
    for number in range(6):
        shutil.copy(shelf / "a.h5", web_folder / f"many-{number}.h5")
    try:
        archive = from_web(web, "many-*.h5")
        web.control(delay=0.3)
        found = archive.read([4 * number for number in range(6)], layers=[1])
        asked = web.requests()
        assert len(asked) <= 12
        assert max(int(request["at_once"]) for request in asked) > 1
        assert_same(found[5]["hidden_states"][0], BATCH[0]["hidden_states"][1])
    finally:
        for path in web_folder.glob("many-*.h5"):
            path.unlink()


@pytest.mark.parametrize("failures", [[503], [500, 429, 502], [-1], [-1, 503]])
def test_what_may_pass_is_tried_again(web: Server, failures: list[int]) -> None:
    archive = from_web(web)
    web.control(failures=failures)
    assert_same(archive[0]["hidden_states"][1], BATCH[0]["hidden_states"][1])
    assert len(web.requests()) == len(failures) + 1


def test_listings_are_tried_again(remote: Any) -> None:
    server, opener = remote
    folder = "run/" if opener is from_s3 else ""
    failure = (503, "SlowDown") if opener is from_s3 else 503
    server.control(failures=[failure] * 2)
    assert len(opener(server, f"{folder}[ab].h5")) == 7


def test_s3_slow_down_is_tried_again(s3: Server) -> None:
    s3.control(failures=[(503, "SlowDown"), (500, "InternalError")])
    archive = from_s3(s3)
    assert_same(archive[0]["hidden_states"][1], BATCH[0]["hidden_states"][1])


def test_a_server_that_never_answers(web: Server) -> None:
    archive = from_web(web, remote=RemoteOptions(timeout=0.2, attempts=2, tail_nbytes=SMALL_TAIL))
    web.control(delay=2.0)
    with pytest.raises(RemoteError, match=r"layer_001.*cannot be reached"):
        archive[0]["hidden_states"][1]


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        ("other range", "not with what was asked for"),
        ("no size", "without the size"),
        ("no length", "does not say how many bytes"),
        ("more", "sends more than the"),
    ],
)
def test_a_server_that_lies(web: Server, lie: str, expected: str) -> None:
    archive = from_web(web)
    web.control(lie=lie)
    with pytest.raises(RemoteError, match=rf"layer_001.*{expected}"):
        archive[0]["hidden_states"][1]
    with pytest.raises(RemoteError, match=expected):
        from_web(web)


def test_a_server_without_ranges(web: Server) -> None:
    web.control(ranges=False)
    with pytest.raises(RemoteError, match="does not support range requests"):
        from_web(web)
    # What is small enough comes as a whole.
    assert len(from_web(web, "small.h5", remote=RemoteOptions(tail_nbytes=1 << 20))) == 6


@pytest.mark.parametrize("name", ["empty.h5", "text.h5", "cut.h5"])
def test_what_is_no_archive(remote: Any, name: str, shelf: Path) -> None:
    server, opener = remote
    contents = {"empty.h5": b"", "text.h5": b"no archive" * 10000}
    whole = (shelf / "a.h5").read_bytes()
    replace(server, opener, contents.get(name, whole[:-100]), name)
    expected = {
        "empty.h5": (RemoteError, "empty"),
        "text.h5": (NotAnArchiveError, "not an HDF5 file"),
        # Nothing tells where the samples are; HDF5 would have to be asked over the network.
        "cut.h5": (CorruptArchiveError, "h5traces seal"),
    }
    kind, message = expected[name]
    with pytest.raises(kind, match=message):
        opener(server, name if opener is from_web else f"run/{name}")


def test_secrets_in_addresses_are_not_shown(web: Server) -> None:
    address = f"{web.url}/a.h5?X-Amz-Signature=secret"
    archive = h5traces.open(address)
    assert archive.ids[0] == "q_0_0"
    assert "secret" not in repr(archive)
    assert archive.paths == (RemotePath(address),)
    with pytest.raises(FileNotFoundError) as caught:
        h5traces.open(f"{web.url}/nothing.h5?token=secret")
    assert "secret" not in str(caught.value)


def test_commands_that_need_a_file_say_so(web: Server) -> None:
    from h5traces.paths import expand_paths

    with pytest.raises(RemoteError, match="download it"):
        expand_paths(f"{web.url}/a.h5")


def test_without_the_libraries(shelf: Path) -> None:
    code = (
        "import sys; sys.modules['fsspec'] = None; import h5traces\n"
        f"assert len(h5traces.open({str(shelf / 'a.h5')!r})) == 4\n"
        "h5traces.open('s3://bucket/run.h5')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert MissingDependencyError.__name__ in done.stderr
    assert "install h5traces[remote]" in done.stderr


def test_an_unknown_protocol() -> None:
    with pytest.raises(RemoteError, match="nix://"):
        h5traces.open("nix://somewhere/run.h5")


# --- the command line -----------------------------------------------------------------------------


def test_inspect_and_ls(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    listed = run("ls", f"s3://{BUCKET}/run/[ab].h5", "--json")
    assert [each["sample_id"] for each in json.loads(listed.stdout)][:2] == ["q_0_0", "q_0_1"]
    seen = run("inspect", f"s3://{BUCKET}/run/[ab].h5", "--json")
    first, second = json.loads(seen.stdout)
    assert (first["num_samples"], second["num_samples"]) == (4, 3)
    assert first["path"] == f"s3://{BUCKET}/run/a.h5"
    missing = run("ls", f"s3://{BUCKET}/run/nothing.h5", code=2)
    assert "no such object" in missing.stderr
    s3.control(failures=[(403, "ExpiredToken")])
    refused = run("ls", f"s3://{BUCKET}/run/a.h5", code=1)
    assert "ExpiredToken" in refused.stderr
    local_only = run("verify", f"s3://{BUCKET}/run/a.h5", code=1)
    assert "download it" in local_only.stderr


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(web: Server, web_folder: Path, shelf: Path) -> Server:
    """A server that answers as much of the hub's API as reading takes."""
    target = web_folder / "someone" / "traces" / "run"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(shelf / "a.h5", target)
    shutil.copy(shelf / "b.h5", target)
    return web


def test_the_hub(hub: Server) -> None:
    storage = {"endpoint": hub.url, "token": False}
    choice = RemoteOptions(tail_nbytes=SMALL_TAIL)
    one = h5traces.open(
        "hf://datasets/someone/traces/run/a.h5", storage_options=storage, remote=choice
    )
    assert_same(one[1].to_dict(), BATCH[1])
    hub.requests()
    one[0]["hidden_states"][1]
    (asked,) = hub.requests()
    assert asked["path"] == "/datasets/someone/traces/resolve/main/run/a.h5"
    both = h5traces.open("hf://datasets/someone/traces/run/*.h5", storage_options=storage)
    assert len(both) == 7
    with pytest.raises(FileNotFoundError, match="hf://datasets/someone/nothing"):
        h5traces.open("hf://datasets/someone/nothing/a.h5", storage_options=storage)


def test_the_hub_with_a_token(hub: Server) -> None:
    hub.control(token="hf_secret")
    storage = {"endpoint": hub.url, "token": "hf_secret"}
    archive = h5traces.open("hf://datasets/someone/traces/run/a.h5", storage_options=storage)
    assert len(archive) == 4
    assert all(each["authorization"] == "Bearer hf_secret" for each in hub.requests())
