"""What an output names, and that it is never a file that is read."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import h5traces
from h5traces.errors import ArchiveError, NotAnArchiveError, TargetError
from h5traces.paths import Target, check_not_a_source, expand_paths
from h5traces.storage.remote.paths import RemotePath


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_trailing_slash_or_a_folder_is_a_folder(tmp_path):
    for name in (
        "new/",
        "new.h5/",
        "deep/new/",
        str(tmp_path / "new") + "/",
        f"file://{tmp_path}/",
    ):
        assert Target.of(name).is_folder
    Path("old").mkdir()
    Path("old.h5").mkdir()
    Path("link.h5").symlink_to("old")
    for name in ("old", "old.h5", "link.h5", ".", "..", Path("old"), Path("old.h5"), "old/"):
        assert Target.of(name).is_folder
    assert Target.of("old.h5").shard(0) == Path("old.h5/traces.h5")


@pytest.mark.parametrize("name", ["run.h5", "new/run.h5", Path("a.b.h5"), "file:///tmp/x.h5"])
def test_a_name_with_the_suffix_is_a_file(name):
    target = Target.of(name)
    assert not target.is_folder
    assert target.shard(0) == Path(str(name).removeprefix("file://"))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("archives", r"archives is neither .* ending in \.h5; for a new folder write archives/"),
        ("run.hdf5", "write run.hdf5/"),
        ("run.H5", "write run.H5/"),
        ("some/.h5", "write some/.h5/"),
        ("", "an empty name is neither"),
        (Path("archives"), "create it first, or pass text that ends in a slash"),
    ],
)
def test_anything_else_is_an_error_that_says_what_to_write(name, remedy):
    with pytest.raises(TargetError, match=remedy) as caught:
        Target.of(name)
    assert isinstance(caught.value, ArchiveError)
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not list(Path().iterdir())


def test_other_errors_of_a_name():
    Path("plain").write_bytes(b"")
    with pytest.raises(TargetError, match="plain is neither a folder"):
        Target.of("plain")
    with pytest.raises(TargetError, match="plain/ ends in a slash, but plain is a file"):
        Target.of("plain/")
    with pytest.raises(TargetError, match=r"s3://bucket/run\.h5 is an address on a server"):
        Target.of("s3://bucket/run.h5")
    with pytest.raises(TargetError, match="shard_samples is 0, expected at least 1"):
        Target.of("run.h5", shard_samples=0)


def test_suffixes_of_a_command():
    suffixes = (".pkl", ".pkl.gz", ".h5")
    names = ("a.pkl", "a.pkl.gz", "a.h5")
    assert [Target.of(each, suffixes=suffixes).suffix for each in names] == list(suffixes)
    assert Target.of("out/", suffixes=suffixes).shard(0) == Path("out/traces.pkl")
    with pytest.raises(TargetError, match=r"ending in \.pkl or \.pkl\.gz or \.h5"):
        Target.of("a.npz", suffixes=suffixes)


def test_names_of_shards():
    assert Target.of("run.h5", shard_samples=2).shard(12) == Path("run-00012.h5")
    assert Target.of("run/", shard_samples=2).shard(123456) == Path("run/traces-123456.h5")
    assert Target.of("run/").named("sub/batch").shard(0) == Path("run/sub/batch.h5")
    assert Target.of("run.h5").named("batch").shard(0) == Path("run.h5")


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["a/run.h5"], "run"),
        ([Path("run.hdf5")], "run"),
        ([RemotePath("s3://bucket/run.h5")], "run"),
        ([Path("run.v2.h5")], "run.v2"),
        (["a.h5", "b.h5"], "traces"),
    ],
)
def test_what_is_made_of_sources_is_named_after_the_only_one(sources, name):
    assert Target.of("out/").for_sources(sources).shard(0) == Path(f"out/{name}.h5")
    split = Target.of("out/", shard_samples=5).for_sources(sources)
    assert split.shard(1) == Path(f"out/{name}-00001.h5")
    assert Target.of("new.h5").for_sources(sources).shard(0) == Path("new.h5")


def test_existing_and_taken():
    target = Target.of("run.h5", shard_samples=2)
    assert target.existing() == target.taken() == []
    for number in (0, 1, 3, 100000):
        target.shard(number).write_bytes(b"")
    for other in ("run.h5", "run-0.h5", "run-00000.pkl", "xrun-00000.h5", "run-00000.h5.spool"):
        Path(other).write_bytes(b"")
    assert target.existing() == [target.shard(0), target.shard(1)]
    assert set(target.taken()) == {target.shard(number) for number in (0, 1, 3, 100000)}
    assert Target.of("run.h5").existing() == Target.of("run.h5").taken() == [Path("run.h5")]
    assert Target.of("none/", shard_samples=2).taken() == []


@given(sample=st.integers(0, 10**6), size=st.integers(1, 1000))
def test_samples_and_shards(sample, size):
    target = Target.of("run.h5", shard_samples=size)
    shard = target.shard_of(sample)
    assert target.first_sample(shard) <= sample < target.first_sample(shard + 1)
    assert Target.of("run.h5").shard_of(sample) == 0


def _symlink_file(source):
    Path("link.h5").symlink_to(source)
    return Path("link.h5")


def _symlink_chain(source):
    Path("first.h5").symlink_to(source)
    Path("second.h5").symlink_to("first.h5")
    return Path("second.h5")


def _symlink_folder(source):
    Path("linked").symlink_to(source.parent)
    return Path("linked") / source.name


def _hard_link(source):
    Path("hard.h5").hardlink_to(source)
    return Path("hard.h5")


def _dots(source):
    return source.parent / ".." / source.parent.name / "." / source.name


LINKS = {
    "same": lambda source: source,
    "relative": lambda source: source.relative_to(Path.cwd()),
    "absolute": lambda source: source.absolute(),
    "dots": _dots,
    "symlink file": _symlink_file,
    "symlink chain": _symlink_chain,
    "symlink folder": _symlink_folder,
    "hard link": _hard_link,
}


@settings(max_examples=150)
@given(
    target=st.sampled_from(sorted(LINKS)),
    source=st.sampled_from(sorted(LINKS)),
    name=st.sampled_from(["run.h5", "run-00000.h5", "run-00007.h5", "Ä b.h5"]),
    as_text=st.booleans(),
    as_target=st.booleans(),
)
def test_no_name_of_a_source_is_an_output(
    tmp_path_factory, target, source, name, as_text, as_target
):
    folder = tmp_path_factory.mktemp("case")
    os.chdir(folder)
    file = folder / "data" / name
    file.parent.mkdir()
    file.write_bytes(b"all of it")
    read = LINKS[source](file)
    for link in folder.glob("*.h5"):
        link.rename(folder / f"read-{link.name}")
        read = folder / f"read-{link.name}" if read.name == link.name else read
    if source == "symlink folder":
        Path("linked").rename("read-linked")
        read = Path("read-linked") / name
    if source == "symlink chain":
        read.unlink()
        read.symlink_to(file)
    written = LINKS[target](file)
    output = Target.of(str(written)) if as_target else str(written) if as_text else written
    other = folder / "data" / "other.h5"
    other.write_bytes(b"other")
    with pytest.raises(TargetError, match="is one of the sources; name another output") as caught:
        check_not_a_source(output, [other, str(read) if as_text else read])
    assert str(written) in str(caught.value)
    assert str(read) in str(caught.value)
    with pytest.raises(TargetError, match="is one of the sources"):
        check_not_a_source(output, f"file://{file}")
    check_not_a_source(output, [other])
    check_not_a_source(other, [read])


@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.parametrize("link", ["same", "hard link", "symlink file"])
def test_shards_that_exist_are_outputs_too(tmp_path, number, link):
    """Also those with a gap before them: writing gets there before it notices."""
    source = tmp_path / "source.h5"
    source.write_bytes(b"all of it")
    target = Target.of(str(tmp_path / "new" / "run.h5"), shard_samples=3)
    shard = target.shard(number)
    shard.parent.mkdir()
    if link == "same":
        source = source.rename(shard)
    elif link == "hard link":
        shard.hardlink_to(source)
    else:
        shard.symlink_to(source)
    with pytest.raises(TargetError, match=f"run-{number:05d}.h5.* is one of the sources"):
        check_not_a_source(target, [source])
    check_not_a_source(Target.of(str(tmp_path / "new" / "run.h5")), [source])


def test_what_is_no_output():
    """Addresses on servers, also where their text looks like a path here; files that are gone."""
    Path("s3:/bucket").mkdir(parents=True)
    Path("s3:/bucket/run.h5").write_bytes(b"")
    sources = [RemotePath("s3://bucket/run.h5"), "S3://bucket/run.h5", "HTTPS://host/run.h5"]
    check_not_a_source(["s3:/bucket/run.h5", "new.h5"], sources)
    Path("loop.h5").symlink_to("loop.h5")
    check_not_a_source(["loop.h5"], ["gone.h5"])
    with pytest.raises(TargetError, match=r"new\.h5 is one of the sources"):
        check_not_a_source(["other.h5", "new.h5"], ["new.h5"])


def test_file_urls_name_files_in_any_case(tmp_path):
    (tmp_path / "run.h5").write_bytes(b"")
    for url in (f"file://{tmp_path}/run.h5", f"FILE://{tmp_path}/run.h5"):
        assert expand_paths(url) == [tmp_path / "run.h5"]
        with pytest.raises(TargetError, match="is one of the sources"):
            check_not_a_source("run.h5", [url])


@pytest.mark.parametrize("value", [3, None, b"a.h5", [b"a.h5"], [3], {"a.h5": 1}])
def test_what_is_no_name_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="expected the name of a file, a glob or a folder"):
        h5traces.open(value)
    with pytest.raises(TypeError, match="expected the name of a file, a glob or a folder"):
        h5traces.load(value)


def test_samples_in_memory_are_no_sources(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"sources is .*; h5traces\.create writes samples"):
        h5traces.convert([{"tokens": [1]}], tmp_path / "x.h5")  # type: ignore[list-item]


@pytest.mark.parametrize("value", ["", [""], ["a.h5", ""]])
def test_an_empty_name_is_not_the_current_folder(value: Any, tmp_path: Path) -> None:
    for run in (h5traces.open, lambda each: h5traces.convert(each, tmp_path / "x.h5")):
        with pytest.raises(FileNotFoundError, match=r"name of a source is empty|a\.h5: no such"):
            run(value)
    with pytest.raises(FileNotFoundError, match="name of a source is empty"):
        h5traces.load("")


def test_a_folder_without_archives_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \.h5 or \.hdf5 file$"):
        h5traces.open(tmp_path)
    (tmp_path / "notes.txt").write_text("no archive")
    for name in ("a.pkl", "b.pkl.gz"):
        (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(FileNotFoundError, match=r"but 2 pickled batches; h5traces\.convert"):
        h5traces.open(tmp_path)
    (tmp_path / "b.pkl.gz").write_bytes(gzip.compress(b"\x80\x04N."))
    for name in ("a.pkl", "b.pkl.gz"):
        with pytest.raises(NotAnArchiveError, match=r"is a pickle.*; h5traces\.load"):
            h5traces.open(tmp_path / name)
    with pytest.raises(NotAnArchiveError, match=r"notes\.txt: is text, not an archive; "):
        h5traces.open(tmp_path / "notes.txt")
