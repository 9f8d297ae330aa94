"""What is known of one sample is used for others like it, with the same outcome."""

from __future__ import annotations

import copy
import string
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from legacy_batches import assert_same, make_archive, make_batch, write_layout

import h5traces
from h5traces.archive.footer_store import FooterObjects, FooterStore
from h5traces.checking import helpers
from h5traces.format import layout
from h5traces.format.digests import ObjectsDigest, content_digest, sample_digest
from h5traces.format.dtypes import TypedArray
from h5traces.format.entries import ObjectEntry
from h5traces.format.forms import StoredObject, digests_of, form_of
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.record import LayerArray, LayeredArrays
from h5traces.meaning import array_checks
from h5traces.storage.files import LocalFile
from h5traces.storage.hdf5.headers import HeaderCheck
from h5traces.storage.hdf5.reading import Hdf5Reader

if TYPE_CHECKING:
    from pathlib import Path

texts = st.text(st.characters(), max_size=6)
names = st.sampled_from(["a", "digest", "dtype", "x_mine", "kind", "digeste"]) | texts
values = texts | st.integers() | st.tuples(st.integers(), st.integers())
digests = st.text(string.hexdigits.lower(), min_size=32, max_size=32)


@given(
    metadata=st.dictionaries(names, values, max_size=4),
    objects=st.dictionaries(texts, st.dictionaries(names, values, max_size=4), max_size=4),
    data=st.data(),
)
def test_digests_of_like_samples(
    metadata: dict[str, Any], objects: dict[str, dict[str, Any]], data: Any
) -> None:
    known = ObjectsDigest(objects)
    own = {path: data.draw(digests) for path, attrs in objects.items() if "digest" in attrs}
    for path, digest in own.items():
        objects[path]["digest"] = digest
    assert known.of(metadata, own) == sample_digest(metadata, objects)
    stored = [StoredObject.of(ObjectEntry(path, objects[path])) for path in sorted(objects)]
    expected = (
        sample_digest(metadata, objects),
        content_digest({path: attrs.get("digest") for path, attrs in objects.items()}),
    )
    assert digests_of(metadata, stored) == expected


@pytest.mark.parametrize("layout", ["full_pkl", "full_gz", "step_full", "container_dict"])
@pytest.mark.parametrize("dtype", ["float16", "float32-from-bfloat16"])
@pytest.mark.parametrize("tier", ["exact", "native"])
def test_arrays_read_together_are_those_read_alone(
    tmp_path: Path, layout: str, dtype: str, tier: str
) -> None:
    source = write_layout(tmp_path, layout, make_batch(layout, dtype=dtype))
    precision = h5traces.PrecisionOptions(tier=tier, dtype="auto" if tier == "exact" else "float16")
    assert h5traces.convert(source, tmp_path / "archive.h5", precision=precision).ok
    containers: tuple[Any, ...] = ("numpy", "source")
    for container in containers:
        with h5traces.open(tmp_path / "archive.h5", container=container) as archive:
            together = archive.read(range(len(archive)))
            assert together
            for trace, found in zip(archive, together, strict=True):
                for kind, arrays in found.items():
                    assert_same(arrays, [trace[kind][place] for place in range(len(arrays))])


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of one form and ids of several lengths; the first and the last are the same."""
    (first, *_) = make_batch("full_pkl")
    batch = []
    for number in range(5):
        sample = copy.deepcopy(first)
        sample["question_id"] = f"q{10**number}"
        for array in sample["hidden_states"]:
            array += np.float16(number % 4)
        batch.append(sample)
    return make_archive(tmp_path_factory.mktemp("alike"), batch)


class Changed(LocalFile):
    """A file in which one byte is another."""

    place = -1

    def read_at(self, offset: int, nbytes: int) -> bytes:
        found = bytearray(super().read_at(offset, nbytes))
        if offset <= self.place < offset + nbytes:
            found[self.place - offset] ^= 1
        return bytes(found)


def test_no_changed_byte_of_a_header_passes_for_that_of_a_like_sample(alike: Path) -> None:
    store = FooterStore(LocalFile(alike), DEFAULT_LIMITS)
    samples = [store.sample(index) for index in range(store.num_samples)]
    with Hdf5Reader(alike, DEFAULT_LIMITS) as reader:
        addresses = list(reader.sample_addresses().values())

    def shows(check: HeaderCheck, number: int) -> bool:
        objects = samples[number].objects
        assert isinstance(objects, FooterObjects)
        return check.shows(addresses[number], samples[number], objects.row, objects.key)

    file = Changed(alike)
    check = HeaderCheck(file)
    assert shows(check, 0)
    (pattern,) = check._patterns.values()
    assert pattern is not None
    assert all(shows(check, number) for number in range(5))
    # All used the pattern of the first: none was added.
    assert list(check._patterns.values()) == [pattern]
    found = []
    for file.place in range(addresses[3] - pattern.nbytes, addresses[3] + 200):
        check._block = b""
        is_same = shows(check, 3)
        check._patterns = {next(iter(check._patterns)): pattern}
        assert is_same == shows(HeaderCheck(file), 3), file.place
        found.append(is_same)
    # Checksums of headers, which others compare.
    assert 0 < sum(found) < len(found) / 4


def _outcome(path: Path) -> Any:
    (report,) = h5traces.validate(path)
    return report.num_samples, report.problems, report.findings, report.notes


@pytest.mark.parametrize("helper", ["working", "ended", "absent"])
def test_helpers_find_what_one_process_does(
    alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: str
) -> None:
    path = tmp_path / "damaged.h5"
    data = bytearray(alike.read_bytes())
    with h5traces.open(alike) as archive:
        chunks = archive[3]._stored.entry("hidden_states/layer_001").chunks
    assert chunks is not None
    data[chunks.offsets[0] + chunks.sizes[0] // 2] ^= 4
    path.write_bytes(data)
    expected = _outcome(path)
    assert expected[1]
    assert expected[2]
    monkeypatch.setattr(helpers, "MANY_SAMPLES", 2)
    monkeypatch.setattr(helpers, "num_workers", lambda: 2)
    if helper == "ended":
        monkeypatch.setattr(helpers, "_CHILD", "")
    if helper == "absent":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert _outcome(path) == expected


@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
def test_layers_in_one_block_show_what_they_show_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    random = np.random.default_rng(1)
    shape = (6, 5, 8) if kind == "hidden_states" else (6, 2, 5, 5)
    arrays = random.random(shape).astype("f4")
    arrays[1] = 3
    arrays[2, 0, 1] = np.nan
    arrays[3, -1, -1] = np.inf
    arrays[4, :2] = arrays[4, 0]
    layered = LayeredArrays(
        tuple(
            LayerArray(layout.layer_name(number), TypedArray(each, "float32"))
            for number, each in enumerate(arrays)
        )
    )

    def findings() -> list[Any]:
        layers = array_checks.Layers(
            kind=kind, layered=layered, axes=layout.KINDS[kind].axes, mapper=map
        )
        if kind == "attentions":
            return array_checks.weight_findings(layers, is_causal=True)
        return array_checks.state_findings(layers)

    together = findings()
    assert together
    monkeypatch.setattr(array_checks, "_BLOCK_VALUES", 1)
    assert repr(findings()) == repr(together)


@pytest.mark.parametrize(
    ("one", "other"), [(0.0, -0.0), (1, True), (1, 1.0), ((1, 2), (1.0, 2.0)), ((1,), (True,))]
)
def test_objects_whose_attributes_are_equal_but_not_alike_have_two_forms(
    one: Any, other: Any
) -> None:
    (first, _), (second, _) = (
        form_of("float16", (2, 3), (2, 3), "gzip", {"scale": each}) for each in (one, other)
    )
    assert repr(first.attrs["scale"]) == repr(one)
    assert repr(second.attrs["scale"]) == repr(other)
