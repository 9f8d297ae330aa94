"""verify and salvage: damage is named, what is intact is saved, a conversion is proven."""

import contextlib
import json
import struct
import warnings

import h5py
import pytest
from legacy_batches import LAYOUTS, assert_same, make_archive, make_batch, write_layout

import h5traces
from h5traces.checking.inspect import inspect
from h5traces.checking.salvage import salvage
from h5traces.checking.seal import seal
from h5traces.errors import StoredStateWarning, TargetError
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import read_directory
from h5traces.storage.hdf5.reading import Hdf5Reader
from h5traces.writing.options import PrecisionOptions


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("archive"), make_batch("full_gz"))


@pytest.fixture
def flipped(archive, tmp_path):
    """Writes a copy of the archive with one bit flipped."""

    def flip(offset, bit=0, name="flipped.h5"):
        data = bytearray(archive.read_bytes())
        data[offset] ^= 1 << bit
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return flip


@contextlib.contextmanager
def without_footer_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoredStateWarning)
        yield


def chunk_offset(archive, index, path):
    return h5traces.open(archive)[index]._stored.entry(path).chunks.offsets[0]


def test_an_intact_archive_is_intact(archive):
    for deep in (False, True):
        (report,) = h5traces.verify(archive, deep=deep)
        assert report.ok
        assert report.num_samples == len(h5traces.open(archive))
        assert report.num_chunks > 0


@pytest.mark.parametrize("deep", [False, True])
def test_damage_is_named_by_sample_and_layer(archive, flipped, deep):
    path = flipped(chunk_offset(archive, 3, "attentions/layer_002") + 9)
    report = h5traces.verify(path, deep=deep)
    assert [each.loc for each in report.problems] == ["/samples/00000003/attentions/layer_002"]
    assert "checksum does not fit" in report.problems[0].message


def test_exchanged_arrays_are_found_without_a_footer(archive, tmp_path):
    path = tmp_path / "exchanged.h5"
    path.write_bytes(archive.read_bytes())
    with h5py.File(path, "r+") as file:
        group = file["samples/00000002/hidden_states"]
        group.move("layer_000", "spare")
        group.move("layer_001", "layer_000")
        group.move("spare", "layer_001")
    report = h5traces.verify(path)
    assert any("no index" in note for note in report.notes)
    assert "/samples/00000002" in [each.loc for each in report.problems]


def test_salvage_saves_all_other_samples(archive, flipped, tmp_path):
    path = flipped(chunk_offset(archive, 1, "hidden_states/layer_000") + 3)
    before = path.read_bytes()
    report = salvage(path, tmp_path / "saved.h5")
    source, saved = h5traces.open(archive), h5traces.open(tmp_path / "saved.h5")
    assert report.lost_samples == [1]
    assert [each.loc for each in report.lost] == ["/samples/00000001/hidden_states/layer_000"]
    assert report.num_saved == len(saved) == len(source) - 1
    for ours, theirs in zip(saved, [source[0], *source[2:]], strict=True):
        assert_same(ours.to_dict(), theirs.to_dict())
    assert path.read_bytes() == before
    assert h5traces.verify(tmp_path / "saved.h5", deep=True).ok


def test_salvage_works_from_the_footer_when_hdf5_is_destroyed(archive, tmp_path):
    data = bytearray(archive.read_bytes())
    (end,) = struct.unpack_from("<Q", data, 28)
    position = 48
    chunks = sorted(
        extent
        for trace in h5traces.open(archive)
        for entry in trace._stored.objects.values()
        if entry.chunks
        for extent in zip(entry.chunks.offsets, entry.chunks.sizes, strict=True)
    )
    # Everything of the HDF5 part but its superblock and its chunks.
    for offset, size in [*chunks, (end, 0)]:
        data[position:offset] = bytes(offset - position)
        position = offset + size
    path = tmp_path / "destroyed.h5"
    path.write_bytes(data)
    assert not h5traces.verify(path).ok
    report = salvage(path, tmp_path / "saved.h5")
    assert not report.lost
    assert len(h5traces.open(tmp_path / "saved.h5")) == len(h5traces.open(archive))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_a_conversion_is_proven_against_its_batch(tmp_path, layout, dtype):
    batch = write_layout(tmp_path, layout)
    h5traces.convert(batch, tmp_path / "out.h5", precision=PrecisionOptions(dtype=dtype))
    report = h5traces.verify(tmp_path / "out.h5", against=batch)
    assert report.ok
    assert any("samples compared with" in note for note in report.notes)


def test_another_batch_is_told_apart(tmp_path):
    batch = make_batch("full_pkl")
    archive = make_archive(tmp_path / "archive", batch)
    batch[2]["generated_answer_clean"] += "!"
    batch[3]["hidden_states"][1] = batch[3]["hidden_states"][1] + 1
    batch[4]["question_id"] = "another"
    other = write_layout(tmp_path / "other", "full_pkl", batch)
    report = h5traces.verify(archive, against=other)
    assert [each.loc for each in report.problems] == [
        "/samples/00000002/generated_answer_clean",
        "/samples/00000003/hidden_states/layer_001",
        "/samples/00000004",
    ]
    assert {each.kind for each in report.problems} == {"differs_from_source"}


def test_a_batch_with_more_samples_is_told_apart(tmp_path):
    batch = make_batch("full_pkl")
    archive = make_archive(tmp_path / "archive", batch[:-1])
    longer = write_layout(tmp_path / "longer", "full_pkl", batch)
    report = h5traces.verify(archive, against=longer)
    assert [each.kind for each in report.problems] == ["missing_sample"]


def without_footer(archive, path, change=lambda _file: None):
    """A copy of an archive that HDF5 had open for writing."""
    path.write_bytes(archive.read_bytes())
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("change", "loc", "message"),
    [
        (lambda file: file.attrs.__setitem__("model_id", "of variable length"), "/", "type or sha"),
        (lambda file: file.attrs.__delitem__("complete"), "/", "complete"),
        (lambda file: file.attrs.__setitem__("num_samples", 99), "/", "num_samples is 99"),
        (
            lambda file: file["kinds/attentions"].attrs.__setitem__("axes", "of variable length"),
            "/kinds",
            "type or shape",
        ),
        (
            lambda file: (file.__delitem__("index/samples"), file["index"].create_group("samples")),
            "/index/samples",
            "is a group, expected a table",
        ),
    ],
)
def test_what_is_wrong_above_the_samples_is_seen_without_a_footer(
    archive, tmp_path, change, loc, message
):
    assert h5traces.verify(without_footer(archive, tmp_path / "intact.h5")).ok
    report = h5traces.verify(without_footer(archive, tmp_path / "changed.h5", change))
    assert [each.loc for each in report.problems] == [loc]
    assert message in report.problems[0].message


@pytest.fixture
def walks(monkeypatch):
    """The samples that were walked through in HDF5."""
    found = []
    walk = Hdf5Reader.sample

    def counted(reader, name, **options):
        found.append(name)
        return walk(reader, name, **options)

    monkeypatch.setattr(Hdf5Reader, "sample", counted)
    return found


def test_reading_without_a_footer_walks_a_sample_once(archive, tmp_path, walks):
    path = without_footer(archive, tmp_path / "plain.h5")
    with without_footer_warnings():
        trace = h5traces.open(path)[1]
    list(trace["hidden_states"]), list(trace["attentions"]), trace["tokens"]
    assert walks == ["00000001"]


def test_a_footer_that_fails_while_reading_is_left_after_one_walk(archive, tmp_path, walks):
    """Each array of the trace asked HDF5 for the whole sample again."""
    path = tmp_path / "damaged.h5"
    data = bytearray(archive.read_bytes())
    names = read_directory(LocalFile(archive)).columns["names"]
    data[read_directory(LocalFile(archive)).hdf5_nbytes + names.offset + 3] ^= 1
    path.write_bytes(data)
    trace = h5traces.open(path)[1]
    with pytest.warns(StoredStateWarning, match="names is damaged"):
        found = trace.to_dict()
    assert_same(found, h5traces.open(archive)[1].to_dict())
    assert walks == ["00000001"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("link", ["none", "symbolic", "hard"])
def test_salvage_never_writes_over_its_source(archive, flipped, tmp_path, link, overwrite):
    path = flipped(chunk_offset(archive, 1, "hidden_states/layer_000") + 3)
    before = path.read_bytes()
    target = tmp_path / "target.h5"
    if link == "none":
        target = path
    elif link == "symbolic":
        target.symlink_to(path)
    else:
        target.hardlink_to(path)
    with pytest.raises(TargetError, match="is one of the sources"):
        salvage(path, target, overwrite=overwrite)
    assert path.read_bytes() == target.read_bytes() == before


def test_salvage_into_a_folder_keeps_the_name(archive, tmp_path):
    report = salvage(archive, f"{tmp_path}/saved/")
    assert report.target == str(tmp_path / "saved" / archive.name)
    assert len(h5traces.open(report.target)) == report.num_saved == len(h5traces.open(archive))
    with pytest.raises(TargetError, match="neither a folder that exists nor a name ending in"):
        salvage(archive, str(tmp_path / "other"))


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_sealing_through_a_link_seals_the_archive(archive, tmp_path, link):
    path, name = without_footer(archive, tmp_path / "plain.h5"), tmp_path / "link.h5"
    name.symlink_to(path) if link == "symbolic" else name.hardlink_to(path)
    assert seal(name)[0].sealed
    assert name.is_symlink() == (link == "symbolic")
    assert name.samefile(path)
    assert h5traces.verify(path, deep=True).ok


def test_several_archives_are_checked_at_once(archive, flipped, tmp_path):
    path = flipped(chunk_offset(archive, 3, "attentions/layer_002") + 9)
    (tmp_path / "intact.h5").write_bytes(archive.read_bytes())
    for sources in (tmp_path, f"{tmp_path}/*.h5", [path, tmp_path / "intact.h5"]):
        reports = h5traces.verify(sources)
        assert [each.path for each in reports] == [str(path), str(tmp_path / "intact.h5")]
        assert [each.ok for each in reports] == [False, True]
        assert not reports.ok
        assert reports.problems == reports[0].problems
        assert h5traces.validate(sources, quick=True).ok
        # Reading every value finds it, too.
        found = h5traces.validate(sources)
        assert [each.ok for each in found] == [False, True]
        assert [each.loc for each in found.problems] == ["/samples/00000003"]
        assert [each.num_samples for each in inspect(sources)] == [6, 6]
    with pytest.raises(FileNotFoundError, match="no such file"):
        h5traces.validate(tmp_path / "none.h5")


def test_reports_are_json(archive):
    for report in (*h5traces.verify(archive), *h5traces.validate(archive)):
        document = json.loads(json.dumps(report.as_dict()))
        assert document["ok"]
        assert document["num_samples"] == 6
        assert document["problems"] == []
