"""Stock HDF5 tools read every archive, and what they change is never read as it was before."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from h5py import h5a, h5d, h5l, h5t
from legacy_batches import ODD_TEXT, assert_same, make_archive, make_batch, with_torch

import h5traces
from h5traces.checking.seal import seal
from h5traces.checking.validate import validate
from h5traces.errors import (
    CorruptArchiveError,
    H5TracesError,
    HostileFileError,
    MissingFilterError,
    NotAnArchiveError,
    StoredStateWarning,
    UnsupportedVersionError,
)
from h5traces.format import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BATCH = make_batch("full_pkl", num_samples=6)
EXTRAS = {
    "note": ODD_TEXT,
    "nested": {"a/b": [np.arange(3), (1, None)], "": 2.5},
    "empty": np.zeros((0, 2)),
}


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32", "steps", "container"])
def archive_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "float16":
            return make_archive(folder, [{**trace, **EXTRAS} for trace in BATCH])
        case "bfloat16":
            batch = make_batch("full_pkl", dtype="float32-from-bfloat16")
            return make_archive(folder, batch, dtype="auto")
        case "float32":
            return make_archive(folder, make_batch("full_pkl", dtype="float32"), dtype="auto")
        case "steps":
            return make_archive(folder, make_batch("step_clean"))
        case _:
            return make_archive(folder, make_batch("container_dict", dtype="float64"))


def datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, each: Any) -> None:
        if isinstance(each, h5py.Dataset):
            found[name] = each

    file.visititems(visit)
    return found


def test_h5py_reads_every_dataset_to_the_same_bits(archive_path: Path) -> None:
    types = set()
    with h5traces.open(archive_path) as archive, h5py.File(archive_path, "r") as file:
        stored = datasets(file)
        num_compared = 0
        for index, trace in enumerate(archive):
            for path, entry in trace._stored.objects.items():
                if entry.is_group:
                    continue
                values = stored[f"samples/{index:08d}/{path}"][...]
                ours = trace._stored.values(path)
                if entry.dtype == "bfloat16":
                    ours = (ours.astype(np.uint32) << 16).view(np.float32)
                if entry.dtype.startswith("text:"):
                    values = values.astype(ours.dtype)
                assert_same(values, ours, path)
                types.add(entry.dtype)
                num_compared += 1
        assert num_compared == len(stored) - 1  # all but the index
    assert types & {"float16", "bfloat16", "float32", "float64"}


def test_texts_are_plain_utf8(tmp_path: Path) -> None:
    target = make_archive(tmp_path, BATCH)
    with h5py.File(target, "r") as file:
        sample = file["samples/00000005"]
        decoded = [text.decode() for text in sample["tokens_decoded"][...]]
        assert decoded == BATCH[5]["tokens_decoded"]
        assert sample["generated_answer_clean"][...].tolist() == [b"the answer"]
        assert sample["tokens"].dtype == np.int64
        assert_same(sample["tokens"][...], BATCH[5]["tokens"])
        types = [
            sample["tokens_decoded"].id.get_type(),
            h5a.open(sample.id, b"coverage").get_type(),
        ]
        for type_id in types:
            assert type_id.get_class() == h5t.STRING
            assert not type_id.is_variable_str()
            assert type_id.get_strpad() == h5t.STR_NULLPAD
            assert type_id.get_cset() == h5t.CSET_UTF8


def test_attentions_are_images_for_viewers(archive_path: Path) -> None:
    num_images = 0
    with h5py.File(archive_path, "r") as file:
        for name, dataset in datasets(file).items():
            kind = name.split("/")[2] if name.startswith("samples/") else ""
            is_layer = name.rpartition("/")[2].startswith("layer_")
            expected = is_layer and kind in ("attentions", "attention_mean")
            assert ("CLASS" in dataset.attrs) is expected, name
            if not expected:
                continue
            num_images += 1
            for attribute, value in layout.IMAGE_ATTRS.items():
                opened = h5a.open(dataset.id, attribute.encode())
                assert not opened.get_type().is_variable_str()
                assert opened.get_type().get_size() == len(value)
                assert dataset.attrs[attribute] == value.encode()
    assert num_images >= 18


def test_links_are_hard_and_data_is_filtered(archive_path: Path) -> None:
    with h5py.File(archive_path, "r") as file:
        kinds = []

        def look(name: bytes, info: Any) -> None:
            kinds.append((name, info.type, file.id.links.get_info(name).type))

        file.id.links.visit(look, info=True)
        assert len(kinds) >= 60
        assert {kind for _, *both in kinds for kind in both} == {h5l.TYPE_HARD}
        for name, dataset in datasets(file).items():
            options = dataset.id.get_create_plist()
            assert options.get_layout() == h5d.CHUNKED, name
            assert dataset.compression == "gzip", name
            assert options.get_external_count() == 0
            assert not options.get_obj_track_times(), name
            if dataset.size and dataset.dtype.kind == "f":
                assert dataset.shuffle, name


def test_the_file_needs_hdf5_1_10_and_no_more(archive_path: Path) -> None:
    head = archive_path.read_bytes()[:9]
    assert head[:8] == b"\x89HDF\r\n\x1a\n"
    assert head[8] == 3
    with h5py.File(archive_path, "r") as file:
        for path in ("/", "samples", "samples/00000000"):
            assert h5py.h5o.get_info(file[path].id).hdr.version == 2


def test_attributes_tell_what_the_archive_is(archive_path: Path) -> None:
    with h5py.File(archive_path, "r") as file, h5traces.open(archive_path) as archive:
        assert file.attrs["format"] == b"h5traces"
        assert file.attrs["complete"] == 1
        assert file.attrs["num_samples"] == len(archive)
        assert list(file["samples"]) == [f"{index:08d}" for index in range(6)]
        for name, value in file.attrs.items():
            assert b"\n" not in np.asarray(value).tobytes(), name
        index = file["index/samples"]
        assert index["seq_len"].tolist() == [trace.metadata.seq_len for trace in archive]
        ids = [each.decode() for each in index["sample_id"]]
        assert ids == [each or "" for each in archive.ids]


def run(*arguments: Any) -> str:
    done = subprocess.run(
        [str(each) for each in arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.h5tools
def test_h5dump_prints_the_numbers(archive_path: Path) -> None:
    with h5traces.open(archive_path) as archive:
        states = archive[5]["hidden_states"][1]
        name = "hidden_states/layer_001"
        expected = archive[5]._stored.values(name)
        if archive[5]._stored.entry(name).dtype == "bfloat16":
            expected = (expected.astype(np.uint32) << 16).view(np.float32)
        assert len(states)
    path = f"/samples/00000005/{name}"
    printed = run("h5dump", "-y", "-w", "0", "-m", "%.17g", "-d", path, archive_path)
    body = printed.partition("DATA {")[2].partition("}")[0]
    numbers = np.array(re.findall(r"[-+0-9.e]+|nan|inf", body), dtype=np.float64)
    assert_same(numbers.reshape(expected.shape), expected.astype(np.float64))


@pytest.mark.h5tools
def test_h5dump_prints_attributes(tmp_path: Path) -> None:
    target = make_archive(tmp_path, BATCH)
    printed = run("h5dump", "-a", "/samples/00000005/sample_id", target)
    assert '"tc_5"' in printed
    assert "STR_NULLPAD" in printed
    printed = run("h5dump", "-a", "/samples/00000005/attentions/layer_000/CLASS", target)
    assert '"IMAGE"' in printed
    printed = run("h5dump", "-A", "-d", "/samples/00000005/hidden_states/layer_002", target)
    assert "final_norm" in printed
    printed = run("h5dump", "-p", "-H", "-d", "/samples/00000005/hidden_states/layer_000", target)
    assert "PREPROCESSING SHUFFLE" in printed
    assert "COMPRESSION DEFLATE" in printed


@pytest.mark.h5tools
def test_h5ls_lists_everything(archive_path: Path) -> None:
    listed = run("h5ls", "-r", archive_path)
    found = {line.split()[0] for line in listed.splitlines()}
    with h5traces.open(archive_path) as archive:
        for index, trace in enumerate(archive):
            for path in trace._stored.objects:
                if "%" not in path and " " not in path:
                    assert f"/samples/{index:08d}/{path}" in found
    assert {"/kinds", "/index/samples"} <= found


# --- files that other programs changed ----------------------------------------------------------


def edited(tmp_path: Path, change: Callable[[h5py.File], None]) -> Path:
    """An archive of BATCH that stock h5py opened for writing."""
    target = make_archive(tmp_path, BATCH)
    with h5py.File(target, "a") as file:
        change(file)
    return target


def open_with_warning(path: Path) -> h5traces.Archive:
    with pytest.warns(StoredStateWarning, match=r"no index.*h5traces seal"):
        return h5traces.open(path)


SAMPLE = "samples/00000001"
PLACE = f"/{SAMPLE}"


def test_opening_for_writing_alone_removes_the_footer(tmp_path: Path) -> None:
    target = edited(tmp_path, lambda _: None)
    archive = open_with_warning(target)
    assert not archive._files[0].has_footer
    assert_same([trace.to_dict() for trace in archive], BATCH)
    report = validate(target)
    assert report.ok
    assert "no index" in report.notes[0]
    assert seal(target)[0].sealed
    assert_same(h5traces.load(target), BATCH)  # a warning would be an error
    assert validate(target).notes == []


def test_an_edited_value_is_read_as_it_is_now(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        file[f"{SAMPLE}/hidden_states/layer_000"][0, 0] = 42

    target = edited(tmp_path, change)
    expected = BATCH[1]["hidden_states"][0].copy()
    expected[0, 0] = 42
    with pytest.warns(StoredStateWarning, match="layer_000: the values do not fit their digest"):
        assert_same(open_with_warning(target)[1]["hidden_states"][0], expected)
    (report,) = seal(target)
    assert (report.sealed, report.edited) == (False, [f"{PLACE}/hidden_states/layer_000"])
    assert not open_with_warning(target)._files[0].has_footer
    assert seal(target, dry_run=True, accept_edits=True)[0].sealed is False
    assert seal(target, accept_edits=True)[0].sealed
    assert_same(h5traces.open(target)[1]["hidden_states"][0], expected)


@pytest.mark.parametrize("at_once", [True, False])
def test_edited_attributes_are_read_as_they_are_now(tmp_path: Path, at_once: bool) -> None:
    def change(file: h5py.File) -> None:
        if at_once:
            file[SAMPLE].attrs["label"] = 7
        file[SAMPLE].attrs["sample_id"] = np.bytes_("renamed")

    target = edited(tmp_path, change)
    archive = open_with_warning(target)
    assert archive.ids == ("tc_0", "renamed", "tc_2", "tc_3", "tc_4", "tc_5")
    assert archive.by_id("renamed")["question_id"] == "renamed"
    assert archive[1].metadata.label == (7 if at_once else None)
    kinds = {(each.loc, each.kind) for each in validate(target).problems}
    assert {(PLACE, "digest_mismatch"), ("/index/samples", "index_mismatch")} <= kinds
    assert seal(target)[0].edited == [PLACE]
    assert seal(target, accept_edits=True)[0].sealed
    assert h5traces.open(target)[1]["question_id"] == "renamed"


def test_two_datasets_swapped_by_name(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        group = file[f"{SAMPLE}/hidden_states"]
        group.move("layer_000", "other")
        group.move("layer_001", "layer_000")
        group.move("other", "layer_001")

    target = edited(tmp_path, change)
    found = open_with_warning(target)[1]["hidden_states"]
    sources = BATCH[1]["hidden_states"]
    assert_same(list(found), [sources[1], sources[0], sources[2]])
    assert [each.kind for each in validate(target).problems] == ["digest_mismatch"]
    (report,) = seal(target)
    assert (report.sealed, report.edited) == (False, [PLACE])


def test_two_datasets_swapped_by_value(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        one, other = (file[f"{SAMPLE}/attentions/layer_00{number}"] for number in (0, 2))
        values = one[...]
        one[...] = other[...]
        other[...] = values

    target = edited(tmp_path, change)
    sources = BATCH[1]["attentions"]
    found = open_with_warning(target)[1]["attentions"]
    with pytest.warns(StoredStateWarning, match="the values do not fit their digest") as caught:
        assert_same(list(found), [sources[2], sources[1], sources[0]])
    assert len(caught) == 2
    expected = [f"{PLACE}/attentions/layer_000", f"{PLACE}/attentions/layer_002"]
    assert seal(target)[0].edited == expected


def test_a_deleted_sample_is_gone(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file[SAMPLE]

    target = edited(tmp_path, change)
    with pytest.warns(StoredStateWarning) as caught:
        archive = h5traces.open(target)
    assert "holds 5 samples, its metadata says 6" in str(caught[-1].message)
    assert archive.ids == ("tc_0", "tc_2", "tc_3", "tc_4", "tc_5")
    assert_same([trace.to_dict() for trace in archive], [BATCH[0], *BATCH[2:]])
    kinds = {each.kind for each in validate(target).problems}
    assert {"sample_names", "count_mismatch"} <= kinds
    assert seal(target)[0].edited == ["/samples"]


def test_a_deleted_field_is_an_error_that_names_it(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file[f"{SAMPLE}/tokens"]

    target = edited(tmp_path, change)
    trace = open_with_warning(target)[1]
    with pytest.raises(CorruptArchiveError, match="00000001: the field 'tokens' is listed but not"):
        trace.to_dict()
    assert_same(trace["hidden_states"][0], BATCH[1]["hidden_states"][0])
    problems = {(each.loc, each.kind) for each in validate(target).problems}
    assert (PLACE, "missing_field") in problems


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("<f2", {"compression": "gzip", "shuffle": True}),
        ("<f2", {"compression": "gzip", "fletcher32": True}),
        ("<f4", {"compression": "gzip"}),
        ("<f4", {"chunks": (4, 4)}),
        ("<f8", {}),
        (">f4", {"compression": "gzip"}),
    ],
)
def test_a_dataset_written_anew_by_h5py(
    tmp_path: Path, dtype: str, options: dict[str, Any]
) -> None:
    source = BATCH[1]["hidden_states"][1]
    values = (source * 2).astype(dtype)

    def change(file: h5py.File) -> None:
        group = file[f"{SAMPLE}/hidden_states"]
        del group["layer_001"]
        group.create_dataset("layer_001", data=values, **options)

    target = edited(tmp_path, change)
    expected = values.astype(values.dtype.newbyteorder("="))
    assert_same(open_with_warning(target)[1]["hidden_states"][1], expected)
    assert PLACE in {each.loc for each in validate(target).problems}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            (report,) = seal(target)
        except CorruptArchiveError as error:
            assert "h5repack" in str(error)  # noqa: PT017  # either way is right
        else:
            assert not report.sealed
            assert PLACE in report.edited


def soft_link(file: h5py.File) -> None:
    del file[f"{SAMPLE}/tokens"]
    file[f"{SAMPLE}/tokens"] = h5py.SoftLink("/samples/00000000/tokens")


def external_link(file: h5py.File) -> None:
    del file[f"{SAMPLE}/tokens"]
    file[f"{SAMPLE}/tokens"] = h5py.ExternalLink("other.h5", "/x")


def second_hard_link(file: h5py.File) -> None:
    file[f"{SAMPLE}/again"] = file[f"{SAMPLE}/tokens"]


def variable_length_text(file: h5py.File) -> None:
    file[SAMPLE].attrs["sample_id"] = "a variable-length string"


def lzf(file: h5py.File) -> None:
    del file[f"{SAMPLE}/tokens"]
    file[SAMPLE].create_dataset("tokens", data=np.arange(9), compression="lzf")


def chunks_never_written(file: h5py.File) -> None:
    del file[f"{SAMPLE}/tokens"]
    file[SAMPLE].create_dataset("tokens", shape=(9,), dtype="<i8", compression="gzip")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (soft_link, HostileFileError, "hard links only"),
        (external_link, HostileFileError, "hard links only"),
        (second_hard_link, HostileFileError, "several hard links"),
        (variable_length_text, HostileFileError, "expected fixed-length text"),
        (lzf, MissingFilterError, "h5repack"),
        (chunks_never_written, CorruptArchiveError, "chunks are stored"),
    ],
)
def test_what_archives_never_hold_is_refused(
    tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    target = edited(tmp_path, change)
    archive = open_with_warning(target)
    with pytest.raises(error, match=f"00000001.*{message}"):
        archive[1].to_dict()
    assert_same(archive[2].to_dict(), BATCH[2])
    assert any(each.loc.startswith(PLACE) for each in validate(target).problems)
    with pytest.raises(error, match=message):
        seal(target)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("format_version", b"2.0", UnsupportedVersionError, "'2.0'.*upgrade h5traces"),
        ("format_version", b"nonsense", UnsupportedVersionError, "upgrade h5traces"),
        ("required_features", b'["holograms"]', UnsupportedVersionError, "requires holograms"),
        ("required_features", b"{", CorruptArchiveError, "not a list of names"),
        ("format", b"other", NotAnArchiveError, "not an h5traces archive"),
        ("complete", 0, CorruptArchiveError, "not finished"),
        ("num_samples", -5, H5TracesError, "num_samples"),
        ("archive_id", b"x", H5TracesError, "archive_id"),
    ],
)
def test_root_attributes_that_mean_do_not_read(
    tmp_path: Path, name: str, value: Any, error: type[Exception], message: str
) -> None:
    def change(file: h5py.File) -> None:
        file.attrs[name] = np.bytes_(value) if isinstance(value, bytes) else np.int64(value)

    target = edited(tmp_path, change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoredStateWarning)
        with pytest.raises(error, match=f"{re.escape(str(target))}.*{message}"):
            h5traces.open(target)
    assert not validate(target).ok


def test_a_newer_minor_version_is_read(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        file.attrs["format_version"] = np.bytes_("1.7")
        file.attrs["something_new"] = np.int64(1)
        file["kinds"].create_group("router_logits").attrs["axes"] = np.bytes_('["token","expert"]')

    archive = open_with_warning(edited(tmp_path, change))
    assert_same([trace.to_dict() for trace in archive], BATCH)
    assert archive.metadata.format_version == "1.7"


@pytest.fixture(params=["float16", "bfloat16", "steps"])
def repack_source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Any]]:
    if request.param == "steps":
        batch = make_batch("step_min")
        return make_archive(tmp_path, batch), batch
    if request.param == "float16":
        return make_archive(tmp_path, BATCH), BATCH
    batch = make_batch("full_pkl", dtype="float32-from-bfloat16")
    return make_archive(tmp_path, batch, dtype="auto"), batch


@pytest.mark.h5tools
@pytest.mark.parametrize(
    "options", ["", "-L", "-f SHUF -f GZIP=9", "-f NONE", "-l CONTI", "-f GZIP=1", "-S PAGE"]
)
def test_h5repack_keeps_the_data(repack_source: tuple[Path, list[Any]], options: str) -> None:
    source, batch = repack_source
    target = source.with_name("repacked.h5")
    run("h5repack", *options.split(), source, target)
    archive = open_with_warning(target)
    assert_same([trace.to_dict() for trace in archive], batch)
    report = validate(target)
    unfiltered = options in ("-f NONE", "-l CONTI")
    assert report.ok is not unfiltered, report.problems
    assert {each.kind for each in report.problems} <= {"filter"}


@pytest.mark.h5tools
def test_a_repacked_file_can_be_sealed(repack_source: tuple[Path, list[Any]]) -> None:
    source, batch = repack_source
    target = source.with_name("repacked.h5")
    run("h5repack", "-L", source, target)
    assert seal(target)[0].sealed
    assert_same(h5traces.load(target), batch)
    assert validate(target).ok
    assert h5traces.open(target)._files[0].has_footer


@pytest.mark.h5tools
def test_an_unfiltered_file_cannot_be_sealed(tmp_path: Path) -> None:
    source = make_archive(tmp_path, BATCH)
    target = tmp_path / "repacked.h5"
    run("h5repack", "-f", "NONE", source, target)
    with pytest.raises(CorruptArchiveError, match=r"not stored in chunks.*h5repack -L -f SHUF"):
        seal(target)
    assert_same(open_with_warning(target)[5].to_dict(), BATCH[5])


def test_a_footer_of_another_file_is_not_believed(tmp_path: Path) -> None:
    ours = make_archive(tmp_path / "ours", BATCH)
    theirs = make_archive(tmp_path / "theirs", make_batch("full_pkl", seed=1))
    hdf5, footer = (_split(path) for path in (ours, theirs))
    ours.write_bytes(hdf5[0] + footer[1])
    with pytest.warns(StoredStateWarning, match=r"the index (belongs|describes)"):
        archive = h5traces.open(ours)
    assert_same([trace.to_dict() for trace in archive], BATCH)


def _split(path: Path) -> tuple[bytes, bytes]:
    from h5traces.storage.files import LocalFile
    from h5traces.storage.footer import hdf5_end

    data, end = path.read_bytes(), hdf5_end(LocalFile(path))
    return data[:end], data[end:]


def test_validation_compares_footer_and_hdf5(tmp_path: Path) -> None:
    ours = make_archive(tmp_path / "ours", BATCH)
    edited_copy = tmp_path / "edited.h5"
    shutil.copy(ours, edited_copy)
    with h5py.File(edited_copy, "a") as file:
        # Of the same length, so that the footer seems to fit.
        file[SAMPLE].attrs.modify("sample_id", np.bytes_("tc_9"))
    hdf5, footer = _split(edited_copy)[0], _split(ours)[1]
    assert len(hdf5) == len(_split(ours)[0])
    edited_copy.write_bytes(hdf5 + footer)
    kinds = {(each.loc, each.kind) for each in validate(edited_copy).problems}
    assert (PLACE, "footer_mismatch") in kinds


def iter_json_attributes(file: h5py.File) -> Iterator[tuple[str, Any]]:
    for name in ("fields", "sources", "required_features"):
        if name in file.attrs:
            yield name, json.loads(file.attrs[name])


def test_nested_metadata_is_one_line_of_json(tmp_path: Path) -> None:
    with h5py.File(make_archive(tmp_path, BATCH), "r") as file:
        found = dict(iter_json_attributes(file))
    assert found["fields"] == list(BATCH[0])
    assert found["sources"][0]["num_samples"] == 6
    assert found["required_features"] == []


def test_torch_bfloat16_is_a_float_to_h5py(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    batch = with_torch(make_batch("full_pkl"), "bfloat16")
    with h5py.File(make_archive(tmp_path, batch, dtype="auto"), "r") as file:
        dataset = file["samples/00000005/hidden_states/layer_000"]
        assert dataset.id.get_type().get_size() == 2
        values = torch.from_numpy(dataset[...].astype(np.float32)).bfloat16()
        assert torch.equal(values, batch[5]["hidden_states"][0])
