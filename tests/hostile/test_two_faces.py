"""Files whose index and HDF5 part are both intact and say different things.

h5traces reads the index, HDFView and h5py read HDF5: who made such a file decides who sees what.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest
from legacy_batches import assert_same, make_archive, make_batch

import h5traces
from h5traces.archive.agreement import Agreement
from h5traces.archive.footer_store import FooterStore
from h5traces.errors import CorruptArchiveError, LayerIndexError, PrecisionError
from h5traces.format.digests import sample_digest
from h5traces.format.entries import ObjectEntry
from h5traces.format.forms import StoredObject
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import FooterBuilder, hdf5_end
from h5traces.storage.hdf5.headers import HeaderCheck

if TYPE_CHECKING:
    from pathlib import Path

BATCH = make_batch("full_pkl")
STATE = "hidden_states/layer_000"


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path, BATCH, name="a.pkl")


class Face:
    """What a forged index says: attributes of the root, and of samples with their objects."""

    def __init__(self, path: Path) -> None:
        store = FooterStore(LocalFile(path), DEFAULT_LIMITS)
        self.root, self.kinds = dict(store.root_attrs), dict(store.kinds)
        self.samples = [
            (dict(sample.attrs), dict(sample.objects))
            for sample in map(store.sample, range(store.num_samples))
        ]

    def change(self, sample: int, path: str, **changes) -> None:
        objects = self.samples[sample][1]
        objects[path] = replace(objects[path], **changes)

    def write(self, path: Path) -> None:
        """The index, whose checksums and digests are right."""
        builder = FooterBuilder()
        for attrs, objects in self.samples:
            attrs["digest"] = sample_digest(
                attrs, {name: entry.attrs for name, entry in objects.items()}
            )
            builder.add_sample(attrs, [StoredObject.of(objects[name]) for name in sorted(objects)])
        file = LocalFile(path)
        end = hdf5_end(file)
        footer = b"".join(builder.finish(Part(file, end), self.root, self.kinds))
        with path.open("r+b") as out:
            out.truncate(end)
            out.seek(end)
            out.write(footer)


class Part:
    """The HDF5 part of a file."""

    def __init__(self, file: LocalFile, nbytes: int) -> None:
        self.nbytes, self.read_at = nbytes, file.read_at


def exchanged_samples(face):
    face.samples[:2] = face.samples[1::-1]


def another_label(face):
    face.samples[1][0]["label"] = 1


def another_model(face):
    face.root["model_id"] = "another/model"


def another_kind(face):
    face.kinds["hidden_states"] = {**face.kinds["hidden_states"], "layers": (7, 8, 9)}


def exchanged_layers(face):
    objects = face.samples[1][1]
    first, second = objects[STATE], objects["hidden_states/layer_001"]
    objects[STATE] = replace(second, path=STATE)
    objects["hidden_states/layer_001"] = replace(first, path="hidden_states/layer_001")


def one_array_less(face):
    del face.samples[1][1][STATE]


def one_array_more(face):
    objects = face.samples[1][1]
    objects["extra/more"] = replace(objects[STATE], path="extra/more")
    objects.setdefault("extra", ObjectEntry("extra"))


def another_site(face):
    attrs = face.samples[1][1][STATE].attrs
    face.change(1, STATE, attrs={**attrs, "site": "final_norm"})


def another_shape(face):
    entry = face.samples[1][1][STATE]
    face.change(1, STATE, shape=entry.shape[::-1], chunk=entry.chunk[::-1])


def another_type(face):
    face.change(1, STATE, dtype="int16")


def chunks_of_another(face):
    for sample in (0, 1):
        other = face.samples[1 - sample][1][STATE]
        face.change(sample, STATE, attrs=other.attrs, chunks=other.chunks, shape=other.shape)
        face.change(sample, STATE, chunk=other.chunk)


def without_a_sample(face):
    face.samples.pop()
    face.root["num_samples"] = len(face.samples)


FORGERIES = {
    each.__name__: each
    for each in (
        exchanged_samples,
        another_label,
        another_model,
        another_kind,
        exchanged_layers,
        one_array_less,
        one_array_more,
        another_site,
        another_shape,
        another_type,
        chunks_of_another,
        without_a_sample,
    )
}


@pytest.fixture(params=FORGERIES.values(), ids=FORGERIES)
def forged(request, archive):
    face = Face(archive)
    request.param(face)
    face.write(archive)
    return archive


def test_verify_names_the_difference(forged):
    (report,) = h5traces.verify(forged)
    assert {each.kind for each in report.problems} == {"footer_mismatch"}
    assert all("HDF5" in each.message or "stored" in each.message for each in report.problems)


def test_an_honest_index_agrees(archive):
    Face(archive).write(archive)
    (report,) = h5traces.verify(archive)
    assert report.ok
    with h5py.File(archive) as file:
        samples = file["samples"]
        names = []
        samples.visit(names.append)
        assert report.num_objects == len(names) + len(file["kinds"])


@pytest.mark.parametrize(
    "copy",
    [
        lambda source, folder: h5traces.repack(source, folder / "new.h5"),
        lambda source, folder: h5traces.repack(source, folder / "new.h5", layers="0"),
        lambda source, folder: h5traces.repack(source, folder / "new.h5", precision="analysis"),
        lambda source, folder: h5traces.merge([source], folder / "new.h5"),
        lambda source, folder: h5traces.split(source, folder / "new.h5", 1),
        lambda source, folder: h5traces.export(source, folder / "new.h5"),
        lambda source, folder: h5traces.export(source, folder / "new.pkl"),
    ],
    ids=["repack", "layers", "tier", "merge", "split", "export", "pickle"],
)
def test_nothing_is_made_of_an_index_that_says_something_else(forged, tmp_path, copy):
    folder = tmp_path / "out"
    folder.mkdir()
    # Layers and widths that the index makes up end in errors of their own.
    with pytest.raises((CorruptArchiveError, LayerIndexError, PrecisionError), match=r"a\.h5"):
        copy(forged, folder)
    assert list(folder.iterdir()) == []


def test_seal_makes_the_index_say_what_hdf5_does(forged):
    assert h5traces.seal(forged)[0].sealed
    assert h5traces.verify(forged, deep=True).ok
    with h5traces.open(forged) as found:
        for trace, expected in zip(found, BATCH, strict=True):
            assert_same(trace.to_dict(), expected)


def test_salvage_takes_samples_on_which_both_agree(archive, tmp_path):
    face = Face(archive)
    another_label(face)
    face.write(archive)
    report = h5traces.salvage(archive, tmp_path / "saved.h5")
    assert report.lost_samples == [1]
    assert "the index has other metadata than HDF5" in report.lost[0].message
    assert h5traces.verify(tmp_path / "saved.h5", deep=True).ok


def test_what_hdf5_was_made_to_say_is_seen_too(archive):
    """The other way round: HDF5 is edited, and its old index is put behind it again."""
    face = Face(archive)
    with h5py.File(archive, "r+") as file:
        file["samples/00000001"].attrs["label"] = np.int64(1)
    face.write(archive)
    (report,) = h5traces.verify(archive)
    assert [each.loc for each in report.problems] == ["/samples/00000001"]


def shown(path):
    """For every sample, whether its headers alone say what the index does; and what differs."""
    store = FooterStore(LocalFile(path), DEFAULT_LIMITS)
    agreement = Agreement(store, path, DEFAULT_LIMITS)
    headers = HeaderCheck(store.file)
    try:
        found = [
            headers.shows(
                agreement._addresses[name], sample := store.sample(index), sample.objects.row, index
            )
            for index, name in enumerate(agreement._names)
        ]
        samples = (agreement.of_sample(index) for index in range(store.num_samples))
        return found, [*agreement.of_head(), *(each for one in samples for each in one)]
    finally:
        agreement.close()


def archives(folder):
    """Archives with everything that is stored in its own way."""
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((5, 8)).astype(np.float32) for _ in range(3)]
    steps = [[each[:3], each[3:4], each[4:5]] for each in states]
    plain = {"hidden_states": states, "tokens": np.arange(5), "question_id": "q"}
    batches = {
        "plain": [plain, {**plain, "label": 1}],
        "extras": [{**plain, "more": {"a": [1, None, {"b": "text"}], "c": np.arange(3)}}],
        "steps": [{**plain, "hidden_states": steps}],
        "empty": [{**plain, "hidden_states": [each[:0] for each in states], "tokens": []}],
        "long": [{**plain, "hidden_states": [np.zeros((3000, 1024), np.float32)]}],
        "texts": [{**plain, "tokens_decoded": ["", "\ud800", "é", "x" * 300, "\0"]}],
    }
    for name, batch in batches.items():
        source = folder / f"{name}.pkl"
        source.write_bytes(pickle.dumps(batch))
        h5traces.convert(source, folder / f"{name}.h5")
        yield folder / f"{name}.h5"
    h5traces.repack(folder / "plain.h5", folder / "tier.h5", precision="fine")
    yield folder / "tier.h5"
    yield make_archive(folder, BATCH, name="legacy.pkl")


def test_headers_of_every_kind_of_array_are_known(tmp_path):
    """So that comparing takes no time; the library is asked where they are not."""
    for path in archives(tmp_path):
        found, differences = shown(path)
        assert found == [True] * len(found), path
        assert differences == [], path


def test_other_headers_are_left_to_the_library(archive, tmp_path):
    with h5py.File(archive, "r+") as file:
        file["samples/00000000"].attrs["x_mine"] = "edited"
    h5traces.seal(archive, accept_edits=True)
    found, differences = shown(archive)
    assert not found[0]
    assert differences == []
    # More layers than a header lists links of.
    layers = [np.zeros((2, 3), np.float16)] * 200
    source = tmp_path / "many.pkl"
    source.write_bytes(pickle.dumps([{"hidden_states": layers, "tokens": [1, 2]}]))
    h5traces.convert(source, tmp_path / "many.h5")
    assert shown(tmp_path / "many.h5") == ([False], [])


def test_random_bytes_are_no_header(archive):
    store = FooterStore(LocalFile(archive), DEFAULT_LIMITS)
    rng, data = np.random.default_rng(0), archive.read_bytes()
    start = Agreement(store, archive, DEFAULT_LIMITS)
    address = start._addresses["00000000"]
    start.close()
    for _ in range(300):
        place = address + int(rng.integers(400))
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        archive.write_bytes(changed)
        sample = store.sample(0)
        HeaderCheck(LocalFile(archive)).shows(address, sample, sample.objects.row, None)
    for address in (0, 1, len(data) - 1, len(data), len(data) + 1, 1 << 62):
        assert not HeaderCheck(LocalFile(archive)).shows(address, sample, sample.objects.row, None)


def test_verify_says_what_it_did_not_compare(archive, tmp_path):
    (report,) = h5traces.verify(archive)
    with h5py.File(archive) as file:
        names = []
        file["samples"].visit(names.append)
        datasets = [each for each in names if isinstance(file["samples"][each], h5py.Dataset)]
    samples = len(BATCH)
    assert report.not_compared == [
        f"values of {len(datasets)} datasets and metadata of {samples} samples with their digests: "
        "deep=True",
        "values with their source: against='batch.pkl'",
    ]
    assert [each for each in report.notes if each.startswith("not compared: ")] == [
        f"not compared: {each}" for each in report.not_compared
    ]
    source = tmp_path / "a.pkl"
    assert h5traces.verify(archive, deep=True, against=source)[0].not_compared == []
    (report,) = h5traces.verify(archive, deep=True)
    assert report.not_compared == ["values with their source: against='batch.pkl'"]
    with archive.open("r+b") as file:
        file.truncate(hdf5_end(LocalFile(archive)))
    (report,) = h5traces.verify(archive, against=source)
    assert len(report.not_compared) == 1
    assert "which only an index has" in report.not_compared[0]
