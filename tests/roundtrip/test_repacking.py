"""Merging, splitting and subsets: copied chunks hold what was converted, and nothing else."""

import h5py
import numpy as np
import pytest
from legacy_batches import LAYERS, LAYOUTS, assert_same, make_archive, make_batch

import h5traces
from h5traces.errors import ArchiveError, ArchiveExistsError, LayerIndexError, StoredStateWarning
from h5traces.rewriting.repack import repack
from h5traces.writing.options import PrecisionOptions, TargetOptions


def stored_chunks(path):
    """Every chunk of every dataset below /samples as its bytes, by path."""
    found = {}

    def collect(name, thing):
        if isinstance(thing, h5py.Dataset):
            chunks = [thing.id.get_chunk_info(i) for i in range(thing.id.get_num_chunks())]
            data = path.read_bytes()
            found[name] = [data[c.byte_offset : c.byte_offset + c.size] for c in chunks]

    with h5py.File(path) as file:
        file["samples"].visititems(collect)
    return found


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "source", make_batch("full_gz"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_the_same_bytes_and_the_same_dicts(tmp_path, layout):
    source = make_archive(tmp_path / "source", make_batch(layout))
    report = repack(source, tmp_path / "copy.h5")
    assert report.copied
    assert stored_chunks(tmp_path / "copy.h5") == stored_chunks(source)
    for ours, theirs in zip(
        h5traces.open(tmp_path / "copy.h5"), h5traces.open(source), strict=True
    ):
        assert_same(ours.to_dict(), theirs.to_dict())
        # Content digests do not depend on the archive.
        assert ours.metadata.digest == theirs.metadata.digest
    assert h5traces.verify(tmp_path / "copy.h5", deep=True).ok


@pytest.mark.parametrize("layout", ["full_gz", "step_min", "container_dict"])
def test_a_subset_of_layers_is_what_converting_with_layers_gives(tmp_path, layout):
    batch = make_batch(layout)
    source = make_archive(tmp_path / "source", batch)
    expected = make_archive(tmp_path / "expected", batch, layers=[0, LAYERS - 1])
    repack(source, tmp_path / "subset.h5", layers=[LAYERS - 1, 0])
    subset = h5traces.open(tmp_path / "subset.h5")
    assert subset.layers == (0, LAYERS - 1)
    assert subset.metadata.num_layers == LAYERS
    for ours, theirs in zip(subset, h5traces.open(expected), strict=True):
        assert_same(ours.to_dict(), theirs.to_dict())
    assert h5traces.verify(tmp_path / "subset.h5", deep=True).ok


def test_samples_are_taken_in_the_order_given(archive, tmp_path):
    source = h5traces.open(archive)
    repack(archive, tmp_path / "some.h5", samples=[4, 0, -1])
    some = h5traces.open(tmp_path / "some.h5")
    assert some.ids == (source.ids[4], source.ids[0], source.ids[-1])
    repack(archive, tmp_path / "every_other.h5", samples=slice(None, None, 2))
    assert h5traces.open(tmp_path / "every_other.h5").ids == source.ids[::2]


def test_split_and_merge_give_the_archive_back(archive, tmp_path):
    report = repack(archive, tmp_path / "shard.h5", target=TargetOptions(shard_samples=4))
    shards = [tmp_path / f"shard-{number:05d}.h5" for number in range(len(report.targets))]
    assert [str(path) for path in shards] == report.targets
    assert next(len(h5traces.open(path)) for path in shards) == 4
    repack(shards, tmp_path / "merged.h5")
    source, merged = h5traces.open(archive), h5traces.open(tmp_path / "merged.h5")
    assert merged.ids == source.ids
    for ours, theirs in zip(merged, source, strict=True):
        assert_same(ours.to_dict(), theirs.to_dict())
        name = source.metadata.sources[theirs.metadata.source.file].name
        assert merged.metadata.sources[ours.metadata.source.file].name == name


def test_merging_an_archive_with_itself_numbers_the_generations(archive, tmp_path):
    copy = tmp_path / "copy.h5"
    repack(archive, copy)
    repack([archive, copy], tmp_path / "both.h5")
    both = h5traces.open(tmp_path / "both.h5")
    sample_id = next(each for each in both.ids if each is not None)
    assert both.by_id(sample_id, generation_index=1).ordinal >= len(both) // 2
    assert h5traces.validate(tmp_path / "both.h5").ok


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zstd_is_read_by_us_and_by_stock_h5py(archive, tmp_path, dtype):
    pytest.importorskip("hdf5plugin")
    target = tmp_path / "zstd.h5"
    report = repack(archive, target, precision=PrecisionOptions(codec="zstd", dtype=dtype))
    assert not report.copied
    plain = tmp_path / "plain.h5"
    repack(archive, plain, precision=PrecisionOptions(dtype=dtype))
    ours, expected = h5traces.open(target), h5traces.open(plain)
    assert ours.metadata.codec == "zstd"
    with h5py.File(target) as stock:
        for index, trace in enumerate(expected):
            assert_same(ours[index].to_dict(), trace.to_dict())
            for layer in range(LAYERS):
                name = f"samples/{index:08d}/attentions/layer_{layer:03d}"
                np.testing.assert_array_equal(stock[name][...], trace["attentions"][layer])
    assert h5traces.verify(target, deep=True).ok
    without_footer = tmp_path / "edited.h5"
    without_footer.write_bytes(target.read_bytes())
    h5py.File(without_footer, "r+").close()
    with pytest.warns(UserWarning, match="no index"):
        assert_same(h5traces.open(without_footer)[0].to_dict(), expected[0].to_dict())


def test_a_damaged_chunk_is_not_copied(archive, tmp_path):
    data = bytearray(archive.read_bytes())
    entry = h5traces.open(archive)[2]._stored.entry("hidden_states/layer_001")
    data[entry.chunks.offsets[0] + 5] ^= 1
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"hidden_states/layer_001 is damaged"):
        repack(damaged, tmp_path / "copy.h5")
    assert not list(tmp_path.glob("copy*"))


def test_errors_name_what_is_wrong(archive, tmp_path):
    with pytest.raises(ArchiveError, match="is one of the sources; name another output"):
        repack(archive, archive, target=TargetOptions(overwrite=True))
    with pytest.raises(LayerIndexError, match="layer 7 was asked for, but"):
        repack(archive, tmp_path / "x.h5", layers=[7])
    with pytest.raises(IndexError):
        repack(archive, tmp_path / "x.h5", samples=[1000])
    (tmp_path / "there.h5").write_text("mine")
    with pytest.raises(ArchiveExistsError, match=r"there\.h5 exists; use overwrite=True"):
        repack(archive, tmp_path / "there.h5")
    assert (tmp_path / "there.h5").read_text() == "mine"


def test_a_dry_run_writes_nothing(archive, tmp_path):
    report = repack(
        archive, tmp_path / "shard.h5", target=TargetOptions(shard_samples=2, dry_run=True)
    )
    assert report.num_samples == len(h5traces.open(archive))
    assert report.targets == [str(tmp_path / "shard-00000.h5")]
    assert not list(tmp_path.glob("shard*"))


def test_tokens_that_the_fields_do_not_list_are_kept(tmp_path, archive):
    """A run of `extract` lists what its caller wanted; repacking dropped all other tokens."""
    with h5py.File(archive, "r+", libver=("v110", "v110")) as file:
        fields = file.attrs["fields"].replace(b'"tokens",', b"")
        file.attrs.create("fields", np.bytes_(fields))
    with pytest.warns(StoredStateWarning):
        source = h5traces.open(archive)
    assert "tokens" not in source[0]
    with pytest.warns(StoredStateWarning):
        repack(archive, tmp_path / "copy.h5", precision=PrecisionOptions(dtype="float32"))
    copy = h5traces.open(tmp_path / "copy.h5")
    for ours, theirs in zip(copy, source, strict=True):
        np.testing.assert_array_equal(ours._stored.tokens(), theirs._stored.tokens())
