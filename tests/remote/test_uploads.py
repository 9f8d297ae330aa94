"""Archives that are uploaded to S3: whole or absent, compared, and never twice."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import s3fs
from legacy_batches import make_archive, make_batch, write_batch
from servers import Server, running

import h5traces
from h5traces.errors import ArchiveExistsError, RemoteError, TargetError
from h5traces.ranks.bucket import BucketRun
from h5traces.ranks.plan import RunPlan
from h5traces.ranks.rank import Rank
from h5traces.rewriting.convert_scales import SharedScales
from h5traces.rewriting.uploads import Uploads
from h5traces.storage.remote import paths, uploading
from h5traces.storage.remote.paths import RemoteOptions, RemotePath
from h5traces.writing.calibrate import load_calibration

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "uploads"
PART = 5 << 20  # the smallest that S3 takes
NUM_PARTS = 4
UPLOAD = {"method": "PUT", "query": "partNumber=3", "status": 503, "code": "SlowDown", "times": 1}
COMPLETE = {**UPLOAD, "method": "POST", "query": "uploadId"}
EXPIRED = {"status": 400, "code": "ExpiredToken", "times": 99}


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with running("s3_server.py") as server:
        yield server


@pytest.fixture
def files(process: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    process.control(fail={}, failures=[])
    given = {"key": "key", "secret": "secret", "endpoint_url": process.url}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", process.url)
    found = s3fs.S3FileSystem(**given, use_listings_cache=False)
    if found.exists(BUCKET):
        found.rm(BUCKET, recursive=True)
    found.mkdir(BUCKET)
    return found


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of several parts."""
    monkeypatch.setattr(uploading, "_PART_NBYTES", PART)
    path = tmp_path / "large.h5"
    path.write_bytes(np.random.default_rng(0).bytes(NUM_PARTS * PART - 1000))
    return path


OPTIONS = RemoteOptions()
TARGET = RemotePath(f"s3://{BUCKET}/run/large.h5")


def names(files: Any) -> list[str]:
    return sorted(files.find(BUCKET))


def pending(files: Any) -> list[Any]:
    return list(files.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", ()))


def test_an_upload_in_parts_is_whole(files: Any, large: Path, process: Server) -> None:
    process.requests()
    uploading.upload(large, TARGET, OPTIONS)
    sent = process.requests()
    assert files.cat(TARGET.url) == large.read_bytes()
    # Announced, sent, named, compared.
    assert [each["method"] for each in sent].count("PUT") == NUM_PARTS
    methods = [each["method"] for each in (sent[0], *sent[-2:])]
    assert methods == ["POST", "POST", "HEAD"], sent
    assert len(sent) == NUM_PARTS + 3
    assert sent[-2]["condition"] == "*"
    # The same once more is done already; another file is an error.
    uploading.upload(large, TARGET, OPTIONS)
    large.write_bytes(b"another")
    with pytest.raises(ArchiveExistsError, match=r"large\.h5 exists, and holds something else"):
        uploading.upload(large, TARGET, OPTIONS)
    uploading.upload(large, TARGET, OPTIONS, overwrite=True)
    assert files.cat(TARGET.url) == b"another"


def test_a_small_file_takes_two_requests(files: Any, tmp_path: Path, process: Server) -> None:
    path = tmp_path / "small.h5"
    path.write_bytes(b"small")
    process.requests()
    uploading.upload(path, TARGET, OPTIONS)
    assert [each["method"] for each in process.requests()] == ["PUT", "HEAD"]


@pytest.mark.parametrize(
    ("calculation", "header", "expected"),
    [("when_supported", "crc32", "r/zBbw=="), ("when_required", "md5", "ebKBBg0ze5srhMzzkK3PdA==")],
)
def test_every_part_carries_a_checksum(
    files: Any,
    large: Path,
    process: Server,
    monkeypatch: pytest.MonkeyPatch,
    calculation: str,
    header: str,
    expected: str,
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", calculation)
    large.write_bytes(b"a" * (PART + 1))
    process.requests()
    uploading.upload(large, TARGET, OPTIONS)
    (first,) = (each for each in process.requests() if "partNumber=1" in each["query"])
    assert first[header] == expected


def test_a_server_that_received_other_bytes_is_an_error(
    files: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = uploading._Bucket.ask

    def other(bucket: Any, method: str, **arguments: Any) -> dict[str, Any]:
        answer = ask(bucket, method, **arguments)
        return {**answer, "ChecksumCRC32": "AAAAAA=="} if method == "upload_part" else answer

    monkeypatch.setattr(uploading._Bucket, "ask", other)
    with pytest.raises(RemoteError, match="the server received other bytes"):
        uploading.upload(large, TARGET, OPTIONS)
    assert names(files) == []
    assert not pending(files)


@pytest.mark.parametrize("failing", [UPLOAD, COMPLETE], ids=["part", "completion"])
@pytest.mark.parametrize(
    "how",
    [{}, {"status": 500, "code": "InternalError"}, {"lost": True}, {"reset": True}],
    ids=["busy", "fault", "answer lost", "connection reset"],
)
def test_a_request_that_fails_is_repeated(
    files: Any, large: Path, process: Server, failing: dict[str, Any], how: dict[str, Any]
) -> None:
    process.control(fail={**failing, **how})
    uploading.upload(large, TARGET, OPTIONS)
    assert files.cat(TARGET.url) == large.read_bytes()
    assert not pending(files)


def test_a_small_file_whose_answer_is_lost_is_there(
    files: Any, tmp_path: Path, process: Server
) -> None:
    path = tmp_path / "small.h5"
    path.write_bytes(b"small")
    process.control(fail={**UPLOAD, "query": "", "lost": True})
    uploading.upload(path, TARGET, OPTIONS)
    assert files.cat(TARGET.url) == b"small"


@pytest.mark.parametrize("failing", [UPLOAD, COMPLETE], ids=["part", "completion"])
def test_credentials_that_expire_leave_nothing_under_the_name(
    files: Any, large: Path, process: Server, failing: dict[str, Any]
) -> None:
    process.control(fail={**failing, **EXPIRED})
    with pytest.raises(RemoteError, match=r"large\.h5: the server refuses access .*ExpiredToken"):
        uploading.upload(large, TARGET, OPTIONS)
    process.control(fail={})
    assert names(files) == []
    assert not pending(files)
    uploading.upload(large, TARGET, OPTIONS)
    assert files.cat(TARGET.url) == large.read_bytes()


def test_what_the_server_stored_is_compared(
    files: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading._Bucket, "_checksum", lambda *_: {})
    before, sent = Path.open, []

    class Torn:
        """Gives a part without its last bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, offset: int) -> None:
            self.file.seek(offset)

        def read(self, nbytes: int) -> bytes:
            data = self.file.read(nbytes)
            sent.append(len(data))
            return data[:-1] if len(data) < PART else data

    uploader = uploading._Upload(large, TARGET, OPTIONS, overwrite=False)
    monkeypatch.setattr(Path, "open", lambda path, mode="r": Torn(before(path, mode)))
    with pytest.raises(RemoteError, match="was uploaded, but the server has something else"):
        uploader.run()
    assert len(sent) == NUM_PARTS


def test_a_document_is_written_once(files: Any, process: Server) -> None:
    place = RemotePath(f"s3://{BUCKET}/run/run.json")
    process.control(fail={**UPLOAD, "query": "", "lost": True})
    assert uploading.put_new(place, b"first", OPTIONS)
    assert uploading.put_new(place, b"first", OPTIONS)
    assert not uploading.put_new(place, b"second", OPTIONS)
    assert files.cat(place.url) == b"first"


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    folder = tmp_path / "batches"
    folder.mkdir()
    for number in range(3):
        samples = make_batch("full_pkl")
        for each in samples:
            each["question_id"] = f"{each['question_id']}_{number}"
        write_batch(folder / f"b{number}.pkl", samples)
    return folder


DEST = f"s3://{BUCKET}/run/"


def test_convert_writes_to_a_bucket(
    files: Any, batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests use the folder of all at the same time.
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    report = h5traces.convert(batches, DEST)
    assert report.ok
    assert names(files) == [f"{BUCKET}/run/b{number}.h5" for number in range(3)]
    assert [each.targets for each in report.files] == [[f"{DEST}b{n}.h5"] for n in range(3)]
    assert not list((tmp_path / "scratch").iterdir())
    h5traces.convert(batches, f"{tmp_path}/local/")
    assert h5traces.open(DEST) == h5traces.open(tmp_path / "local")
    h5traces.index(DEST, tmp_path / "c.parquet")
    assert h5traces.open(tmp_path / "c.parquet") == h5traces.open(DEST)


def test_what_is_there_is_compared_or_an_error(files: Any, batches: Path) -> None:
    h5traces.convert(batches / "b1.pkl", DEST)
    report = h5traces.convert(batches, DEST)
    assert [each.status for each in report.files] == ["converted", "failed", "converted"]
    assert "b1.h5 exists; use overwrite=True" in str(report.files[1].error)
    keep = h5traces.TargetOptions(skip_existing=True)
    report = h5traces.convert(batches, DEST, target=keep)
    assert [each.status for each in report.files] == ["skipped"] * 3
    write_batch(batches / "b1.pkl", make_batch("full_pkl")[:2])
    report = h5traces.convert(batches, DEST, target=keep)
    assert [each.status for each in report.files] == ["skipped", "failed", "skipped"]
    assert "is not what this command would write" in str(report.files[1].error)
    replacing = h5traces.TargetOptions(overwrite=True)
    assert h5traces.convert(batches / "b1.pkl", DEST, target=replacing).ok
    assert len(h5traces.open(f"{DEST}b1.h5")) == 2


def test_a_run_whose_credentials_expire_is_finished_later(
    files: Any, batches: Path, process: Server
) -> None:
    process.control(fail={**UPLOAD, **EXPIRED, "query": "", "after": 1})
    report = h5traces.convert(batches, DEST)
    assert [each.status for each in report.files] == ["converted", "failed", "failed"]
    assert "ExpiredToken" in str(report.files[1].error)
    process.control(fail={})
    assert names(files) == [f"{BUCKET}/run/b0.h5"]
    report = h5traces.convert(batches, DEST, target=h5traces.TargetOptions(skip_existing=True))
    assert [each.status for each in report.files] == ["skipped", "converted", "converted"]


@pytest.mark.parametrize("reset", [False, True], ids=["busy", "connection reset"])
def test_a_server_that_keeps_failing_ends_a_run_that_can_go_on(
    files: Any, batches: Path, process: Server, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(paths, "_LONGEST_PAUSE", 0.01)
    process.control(fail={**UPLOAD, "query": "", "after": 3, "times": 99, "reset": reset})
    with pytest.raises(RemoteError, match="the server cannot be reached, or fails"):
        h5traces.convert(batches, DEST, rank=0, world_size=1)
    process.control(fail={})
    report = h5traces.convert(batches, DEST, rank=0, world_size=1)
    assert {each.status for each in report.files} == {"skipped", "converted"}
    assert len(h5traces.open(DEST)) == 3 * len(make_batch("full_pkl"))


def test_ranks_share_a_bucket(files: Any, batches: Path) -> None:
    reports = [h5traces.convert(batches, DEST, rank=rank, world_size=2) for rank in (1, 0, 1)]
    assert all(each.ok for each in reports)
    assert {each.status for each in reports[2].files} == {"skipped"}
    assert len(h5traces.open(DEST)) == 3 * len(make_batch("full_pkl"))
    found = [each for each in names(files) if "/ranks/" in each and "converted" in each]
    lines = [json.loads(files.cat(each)) for each in found]
    assert sorted(line["item"] for line in lines) == [0, 1, 2]
    assert len(json.loads(files.cat(f"{DEST}run.json"))["sources"]) == 3
    with pytest.raises(TargetError, match="its run was planned otherwise: "):
        h5traces.convert(batches, DEST, layers=[0], rank=0, world_size=2)


def test_only_folders_of_buckets_are_targets(batches: Path) -> None:
    with pytest.raises(TargetError, match="only folders of a bucket can be written"):
        h5traces.convert(batches, f"s3://{BUCKET}/run.h5")
    with pytest.raises(TargetError, match="is an address on a server"):
        h5traces.convert(batches, "https://host/run/")


def test_a_run_in_a_bucket_is_followed_and_collected(
    files: Any, batches: Path, tmp_path: Path, process: Server
) -> None:
    write_batch(batches / "again.pkl", h5traces.load(batches / "b1.pkl"))
    h5traces.convert(batches, DEST, rank=1, world_size=2)
    found = h5traces.status(DEST)
    assert (found.done, found.missing, found.num_items) == ([1], [0], 4)
    report = h5traces.collect(DEST)
    assert not report.ok
    assert len(report.missing) == found.num_items - found.num_done
    process.control(fail={**UPLOAD, **EXPIRED, "query": "", "after": 2})
    assert not h5traces.convert(batches, DEST, rank=0, world_size=2).ok
    process.control(fail={})
    assert h5traces.convert(batches, DEST, rank=0, world_size=2).ok
    process.requests()
    found = h5traces.status(DEST)
    # The plan, and one listing.
    assert len(process.requests()) <= 3
    assert found.ok
    assert found.num_samples == 4 * len(make_batch("full_pkl"))
    report = h5traces.collect(DEST, tmp_path / "run.parquet")
    assert report.ok, report.problems
    assert report.num_verified == 4
    # All batches have the same contents, under other ids.
    assert report.duplicates == [f"b{n}.h5 holds the same samples as again.h5" for n in range(3)]
    assert {each.status for each in report.files} <= {"converted", "skipped"}
    assert h5traces.open(tmp_path / "run.parquet") == h5traces.open(DEST)
    listed = f"{DEST}catalogue.parquet"
    assert h5traces.index(DEST, listed).num_read == 4
    assert h5traces.open(listed) == h5traces.open(DEST)
    assert h5traces.index(DEST, listed).num_kept == 4
    with pytest.raises(TargetError, match="write the catalogue to disk, then copy it"):
        h5traces.index(DEST, listed, rank=0, world_size=2)
    for rank in range(2):
        h5traces.index(DEST, tmp_path / "ranks.parquet", rank=rank, world_size=2)
    files.put_file(str(tmp_path / "ranks.parquet"), f"{DEST}copied.parquet")
    assert h5traces.open(f"{DEST}copied.parquet") == h5traces.open(DEST)
    with pytest.raises(TargetError, match="lists shards on servers"):
        h5traces.index(make_archive(tmp_path, make_batch("full_pkl")), listed)
    files.rm(f"{BUCKET}/run/b0.h5")
    report = h5traces.collect(DEST, verify="none")
    assert any("b0.h5: was written, and is not there any more" in e for e in report.problems)
    with pytest.raises(TargetError, match=r"holds no run\.json"):
        h5traces.status(f"s3://{BUCKET}/nothing/")


def test_a_rank_at_work_in_a_bucket_is_seen(files: Any) -> None:
    plan = RunPlan(command="convert", world_size=2, options={}, costs=(1, 1))
    with BucketRun(DEST, Rank(0, 2), plan) as run:
        run.note(0, status="converted", num_samples=3, nbytes=5)
        found = h5traces.status(DEST)
        assert (found.running, found.missing, found.num_samples) == ([0], [1], 3)
        with pytest.raises(TargetError, match="of which rank 0 gave a sign of life"):
            BucketRun(DEST, Rank(0, 3), plan.model_copy(update={"world_size": 3}))
    assert h5traces.status(DEST).done == [0]
    BucketRun(DEST, Rank(0, 3), plan.model_copy(update={"world_size": 3}))
    assert h5traces.status(DEST).world_size == 3


def test_ranks_share_scales_that_one_put_first(
    files: Any, batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No two shares hold the same samples, so scales of their own would differ.
    for number in range(3):
        write_batch(batches / f"b{number}.pkl", make_batch("final_full", seed=number))
    h5traces.convert(batches, f"{tmp_path}/alone/", precision="analysis")
    for rank in (2, 0, 1):
        report = h5traces.convert(batches, DEST, precision="analysis", rank=rank, world_size=3)
        assert report.ok
    assert [each.metadata.digest for each in h5traces.open(DEST)] == [
        each.metadata.digest for each in h5traces.open(tmp_path / "alone")
    ]
    (scales,) = (each for each in names(files) if each.endswith(".scales"))
    # A rank that has measured, too, takes those that were put before.
    other = tmp_path / "other.h5"
    h5traces.calibrate(tmp_path / "alone", other, samples=1)
    plan = RunPlan(command="convert", world_size=3, options={}, costs=(1,))
    run = BucketRun(f"{DEST}other/", Rank(0, 3), plan)
    files.copy(scales, scales.replace("run/", "run/other/"))
    real, asked = uploading.read_document_at, []

    def late(target: RemotePath, options: RemoteOptions) -> bytes:
        asked.append(target)
        if len(asked) == 1:
            raise FileNotFoundError
        return real(target, options)

    monkeypatch.setattr(uploading, "read_document_at", late)
    found = SharedScales(run).of("None", lambda: load_calibration(other))
    assert len(asked) > 1
    files.get_file(scales, str(tmp_path / "first.h5"))
    assert found.digest == load_calibration(tmp_path / "first.h5").digest
    assert found.digest != load_calibration(other).digest


def test_a_rank_that_was_slower_is_skipped(
    files: Any, batches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has uploaded the archive while this one made it."""
    keep = h5traces.TargetOptions(skip_existing=True)
    uploads = Uploads.to(DEST)
    assert uploads is not None
    with uploads:
        h5traces.convert(batches / "b1.pkl", f"{uploads.folder}/")
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        h5traces.convert(batches / "b1.pkl", DEST)
        assert not uploads.upload(uploads.folder / "b1.h5")
        replacing = h5traces.TargetOptions(overwrite=True)
        h5traces.convert(batches / "b2.pkl", uploads.folder / "b1.h5", target=replacing)
        with pytest.raises(ArchiveExistsError, match="holds something else"):
            uploads.upload(uploads.folder / "b1.h5")
    assert h5traces.convert(batches, DEST, target=keep).ok


def test_a_part_of_an_array_keeps_its_ranks(
    files: Any, batches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h5traces.convert(batches, DEST, rank=0, world_size=3)
    for name in ("ID", "MIN", "MAX"):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", "2")
    h5traces.convert(batches, DEST, rank="auto")
    assert h5traces.status(DEST).missing == [1]
