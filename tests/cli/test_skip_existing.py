"""``--skip-existing`` keeps an archive only if it is what the command would write."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from commands import run
from legacy_batches import make_batch

import h5traces
from h5traces.errors import OptionError, TargetError
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

SKIP = TargetOptions(skip_existing=True)


def write(path: Path, *, seed: int = 0, num_samples: int = 3, hidden: int = 8) -> Path:
    """A batch of the same size for every seed."""
    rng = np.random.default_rng(seed)
    batch = [
        {
            "hidden_states": list(rng.normal(size=(3, 5, hidden)).astype(np.float16)),
            "attentions": list(rng.random((3, 2, 5, 5)).astype(np.float16)),
            "tokens": rng.integers(3, 99, 5),
            "question_id": f"tc_{number}",
        }
        for number in range(num_samples)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(batch))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "llama_triviaqa_batch_0000.pkl")


@pytest.fixture
def target(source: Path, tmp_path: Path) -> Path:
    run("convert", source, "-o", tmp_path / "a.h5")
    return tmp_path / "a.h5"


def is_kept(source: Path, target: Path, *options: Any) -> None:
    before = target.read_bytes()
    printed = run("convert", source, "-o", target, "--skip-existing", *options)
    assert printed.stdout.startswith("status")
    assert "skipped" in printed.stdout
    assert "did not record" not in printed.stderr
    assert target.read_bytes() == before


def is_stale(source: Any, target: Path, *options: Any, why: str) -> None:
    before = target.read_bytes()
    printed = run("convert", source, "-o", target, "--skip-existing", *options, code=2)
    assert why in printed.stderr, printed.stderr
    assert "--overwrite writes it anew" in printed.stderr
    assert target.read_bytes() == before


# --- sources ------------------------------------------------------------------------------------


def test_the_same_source_is_kept(source: Path, target: Path) -> None:
    is_kept(source, target)
    is_kept(source, target, "--compare", "ends")


def test_a_batch_that_was_extracted_again_is_stale(source: Path, target: Path) -> None:
    before, status = source.read_bytes(), source.stat()
    write(source, seed=1)
    assert len(before) == source.stat().st_size
    # Also under its old time.
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    is_stale(source, target, why=f"{source} has another content")
    write(source, num_samples=4)
    is_stale(source, target, why=f"and had {len(before):,}")


def test_a_copied_source_differs_in_its_time_only(source: Path, target: Path) -> None:
    os.utime(source)
    is_stale(source, target, why="--compare ends keeps such archives")
    is_kept(source, target, "--compare", "ends")


def test_file_systems_that_keep_seconds_only(source: Path, target: Path) -> None:
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns // 10**9 * 10**9))
    is_kept(source, target)


def test_content_sees_a_change_in_the_middle(tmp_path: Path) -> None:
    source, target = write(tmp_path / "a.pkl", hidden=4096), tmp_path / "a.h5"
    content = bytearray(source.read_bytes())
    assert len(content) > 3 * 65536
    run("convert", source, "-o", target, "--compare", "content")
    os.utime(source)
    is_kept(source, target, "--compare", "content")
    # The recorded digest also answers whether a file with another time is another one.
    is_kept(source, target)
    status = source.stat()
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    is_stale(source, target, why="has another content")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    is_stale(source, target, "--compare", "content", why="has another content")


def test_content_without_a_recorded_digest(source: Path, target: Path) -> None:
    is_stale(source, target, "--compare", "content", why="there is no digest of the whole of")


def test_what_is_recorded_of_a_source(source: Path, target: Path, tmp_path: Path) -> None:
    with h5traces.open(target) as archive:
        (found,) = archive.metadata.sources or ()
        assert (found.nbytes, found.modified_ns) == (
            source.stat().st_size,
            source.stat().st_mtime_ns,
        )
        assert found.ends_digest is not None
        assert found.digest is None
        assert archive.metadata.conversion == {}
    h5traces.repack(target, tmp_path / "b.h5", layers=0)
    with h5traces.open(tmp_path / "b.h5") as archive:
        assert archive.metadata.sources == (found,)
        # Its options are those of another archive.
        assert archive.metadata.conversion is None


def test_a_source_that_grows_while_it_is_read_fails(source: Path, tmp_path: Path) -> None:
    def grow(_: Any) -> None:
        os.utime(source)

    report = h5traces.convert(source, tmp_path / "a.h5", progress=grow)
    assert "was changed while it was read" in str(report.files[0].error)
    assert not (tmp_path / "a.h5").exists()


# --- options ------------------------------------------------------------------------------------

SHAPING = {
    "layers": (["--layers", "0,2"], "it holds the layers 0, 1, 2, not 0, 2"),
    "last": (["--layers", "last"], "it holds the layers 0, 1, 2, not 2"),
    "tier": (["--tier", "native"], "its precision is exact, not"),
    "dtype": (["--dtype", "auto"], "its dtype is float16, not auto"),
    "overflow": (["--on-overflow", "clip"], "its --on-overflow is float32, not clip"),
    "codec": (["--codec", "zstd"], "its codec is gzip, not zstd"),
    "model": (["--model-id", "other"], "its --model-id is llama, not other"),
    "dataset": (["--dataset", "other"], "its dataset is triviaqa, not other"),
    "first state": (["--first-state", "block"], "it was written without --first-state block"),
    "padding": (["--keep-padding"], "it was written without --keep-padding"),
}


@pytest.mark.parametrize("name", SHAPING)
def test_every_option_that_shapes_the_result(source: Path, target: Path, name: str) -> None:
    options, why = SHAPING[name]
    printed = run("convert", source, "-o", target, "--skip-existing", *options, code=2)
    assert why in printed.stderr, printed.stderr
    # And back: the archive with the option is not the one without it.
    run("convert", source, "-o", target, "--overwrite", *options)
    is_kept(source, target, *options)
    run("convert", source, "-o", target, "--skip-existing", code=2)


def test_options_that_name_the_same_are_the_same(source: Path, target: Path) -> None:
    is_kept(source, target, "--layers", "0-2", "--tier", "exact", "--model-id", "llama")
    is_kept(source, target, "--workers", 1, "--no-verify")


def test_scales_of_a_tier(source: Path, tmp_path: Path) -> None:
    target, scales = tmp_path / "a.h5", tmp_path / "scales.h5"
    run("calibrate", source, "-o", scales, "--model-id", "llama")
    run("convert", source, "-o", target, "--tier", "fine", "--scales", scales)
    is_kept(source, target, "--tier", "fine", "--scales", scales)
    printed = run("convert", source, "-o", target, "--tier", "fine", "--skip-existing", code=2)
    assert "it was written with other scales" in printed.stderr


def test_sources_of_a_merge(tmp_path: Path) -> None:
    folder, target = tmp_path / "traces", tmp_path / "all.h5"
    for number in range(2):
        write(folder / f"run_batch_000{number}.pkl", seed=number)
    run("convert", folder, "-o", target, "--merge")
    is_kept(folder, target, "--merge")
    late = write(folder / "run_batch_0002.pkl", seed=2)
    is_stale(folder, target, "--merge", why="run_batch_0002.pkl is not in it")
    late.unlink()
    (folder / "run_batch_0001.pkl").unlink()
    is_stale(folder, target, "--merge", why="run_batch_0001.pkl is not among the sources any more")


def test_shards_of_another_size(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards" / "run.h5"
    run("convert", source, "-o", out, "--shard-samples", 2)
    first = tmp_path / "shards" / "run-00000.h5"
    before = first.read_bytes()
    run("convert", source, "-o", out, "--shard-samples", 2, "--skip-existing")
    printed = run("convert", source, "-o", out, "--shard-samples", 1, "--skip-existing", code=2)
    assert "its shards hold 2, 1 samples, not 1 each" in printed.stderr
    run("convert", source, "-o", out, "--shard-samples", 3, "--skip-existing", code=2)
    assert first.read_bytes() == before


def test_only_what_is_stale_is_an_error(tmp_path: Path) -> None:
    folder, out = tmp_path / "traces", tmp_path / "out"
    for number in range(3):
        write(folder / f"run_batch_000{number}.pkl", seed=number)
    run("convert", folder, "-o", f"{out}/")
    write(folder / "run_batch_0001.pkl", seed=9)
    (out / "run_batch_0002.h5").unlink()
    printed = run("convert", folder, "-o", f"{out}/", "--skip-existing", "--json", code=2)
    found = [each["status"] for each in json.loads(printed.stdout)["files"]]
    assert found == ["skipped", "failed", "converted"]
    assert "run_batch_0001.h5 exists, but is not what this command would write" in printed.stderr


# --- archives that do not say ---------------------------------------------------------------------


def test_an_archive_without_these_records_is_kept_with_a_warning(
    source: Path, target: Path
) -> None:
    with h5py.File(target, "r+") as file:
        del file.attrs["conversion"]
        (sources,) = json.loads(file.attrs["sources"])
        kept = {key: sources[key] for key in ("name", "nbytes", "num_samples")}
        text = json.dumps([kept]).encode()
        file.attrs.create("sources", text, dtype=h5py.string_dtype("utf-8", len(text)))
    printed = run("convert", source, "-o", target, "--skip-existing")
    assert "skipped" in printed.stdout
    assert "did not record how its source was read, when its source was last" in printed.stderr


def test_an_archive_of_another_origin_is_not_kept(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.h5"
    with h5traces.create(target) as writer:
        writer.append(make_batch("full_pkl", num_samples=1)[0])
    is_stale(source, target, why="does not say that it was converted from anything")
    target.write_bytes(b"no archive")
    printed = run("convert", source, "-o", target, "--skip-existing", code=2)
    assert "it has the name of the new archive" in printed.stderr


# --- functions that cannot skip -------------------------------------------------------------------


def test_rewriting_does_not_skip(target: Path, tmp_path: Path) -> None:
    for rewrite in (
        h5traces.repack,
        h5traces.merge,
        lambda *paths, **options: h5traces.split(*paths, 2, **options),
    ):
        with pytest.raises(OptionError, match="skip_existing has no meaning here"):
            rewrite(target, tmp_path / "b.h5", target=SKIP)
    assert not (tmp_path / "b.h5").exists()


@pytest.mark.parametrize("named", ["", "/*.h5", "/sub/../*.h5"])
def test_a_rewrite_does_not_land_among_its_sources(
    target: Path, tmp_path: Path, named: str
) -> None:
    folder = tmp_path / "shards"
    run("split", target, "-o", f"{folder}/", "-n", 2)
    (folder / "sub").mkdir()
    for out in (f"{folder}/", folder / "all.h5"):
        with pytest.raises(TargetError, match="would lie among its sources"):
            h5traces.repack(f"{folder}{named}", out)
    run("merge", f"{folder}{named}", "-o", f"{folder}/", code=2)
    run("merge", f"{folder}{named}", "-o", tmp_path / "all.h5")
    shutil.copy(tmp_path / "all.h5", folder / "sub" / "one.h5")
    # Files that are named one by one may have a neighbour.
    run("repack", folder / "a-00000.h5", "-o", folder / "small.h5", "--layers", 0)
