"""Files that `Hdf5Writer` makes, in the hands of the HDF5 library and its tools."""

import shutil
import struct
import subprocess

import h5py
import numpy as np
import pytest
from h5py import h5o
from hypothesis import given, settings
from hypothesis import strategies as st

from h5traces.format.forms import form_of
from h5traces.format.layout import IMAGE_ATTRS, IMAGE_RANGE
from h5traces.storage.arrays import (
    as_bytes,
    chunk_offsets,
    chunk_shape,
    cut,
    encode_array,
    num_chunks,
)
from h5traces.storage.codecs import CODECS, get_codec
from h5traces.storage.hdf5.indexes import checksum, checksums
from h5traces.storage.hdf5.writing import Hdf5Writer
from h5traces.storage.publish import PartFile

ATTRS = {
    "number": 5,
    "negative": -(2**63),
    "share": 0.1,
    "text": "aÄ😀",
    "empty": "",
    "list": (3, 1, 2),
    "none": (),
}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "written.h5"


class Writing:
    """An `Hdf5Writer` on a file that is published when the block ends."""

    def __init__(self, target):
        self._part = PartFile(target)
        self._writer = Hdf5Writer(self._part.file)

    def __enter__(self):
        return self._writer

    def __exit__(self, exception_type, *_):
        if exception_type is not None:
            self._part.discard()
            return
        self._writer.close()
        self._part.file.raise_error()
        self._part.publish()


def write_array(writer, path, values, chunk=None, codec="gzip", attrs=None):
    chunk = chunk or chunk_shape(values.shape, values.dtype.itemsize)
    encoder = get_codec(codec)
    return writer.write_dataset(
        path,
        dtype=values.dtype.name,
        shape=values.shape,
        chunk=chunk,
        codec=codec,
        chunks=[
            encoder.encode(as_bytes(cut(values, offset, chunk)), values.dtype.itemsize)
            for offset in chunk_offsets(values.shape, chunk)
        ],
        attrs=attrs or {},
    )


def assert_attributes(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        stored = found[name]
        if isinstance(value, str):
            assert stored.decode() == value
        else:
            assert np.array_equal(stored, value)
            assert np.asarray(stored).dtype == (
                np.float64 if isinstance(value, float) else np.int64
            )


shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    divisors=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    dtype=st.sampled_from(["float16", "float32", "float64", "int64", "uint8"]),
    codec=st.sampled_from(sorted(CODECS)),
)
def test_stock_h5py_reads_every_shape_chunk_and_codec(
    tmp_path_factory, shape, divisors, dtype, codec
):
    import hdf5plugin  # noqa: F401  # registers its filters with HDF5

    target = tmp_path_factory.mktemp("any") / "written.h5"
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    chunk = tuple(-(-max(1, n) // d) for n, d in zip(shape, divisors, strict=False))
    with Writing(target) as writer:
        offsets, sizes = write_array(writer, "/a/values", values, chunk, codec, ATTRS)
    with h5py.File(target) as file:
        dataset = file["a/values"]
        assert dataset.dtype == values.dtype
        assert dataset.chunks == chunk
        assert np.array_equal(dataset[...], values)
        assert_attributes(dataset.attrs, ATTRS)
        stored = [dataset.id.get_chunk_info(n) for n in range(dataset.id.get_num_chunks())]
        assert sorted(zip(offsets, sizes, strict=True)) == sorted(
            (each.byte_offset, each.size) for each in stored
        )


values_of_attributes = st.one_of(
    st.text(max_size=5),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.integers(-5, 5)).map(tuple),
    # No header has room for it.
    st.just(70_000 * "x"),
)
digests = st.text("0123456789abcdef", min_size=32, max_size=32)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    divisor=st.integers(1, 3),
    attrs=st.dictionaries(st.text(min_size=1, max_size=5), values_of_attributes, max_size=4),
    some=st.lists(st.tuples(st.none() | digests, st.none() | st.floats()), min_size=1, max_size=4),
    is_picture=st.booleans(),
)
def test_datasets_of_one_form_are_those_written_alone(
    tmp_path_factory, shape, divisor, attrs, some, is_picture
):
    folder = tmp_path_factory.mktemp("like")
    chunk = tuple(-(-max(1, n) // divisor) for n in shape)
    count = num_chunks(shape, chunk)
    with Writing(folder / "alone.h5") as alone, Writing(folder / "like.h5") as like:
        for number, (digest, white) in enumerate(some):
            path, chunks = f"/a/{number}", [bytes([number + 1]) * 20] * count
            own = attrs if digest is None else {**attrs, "digest": digest, "last": number % 2}
            form, known = form_of("float16", shape, chunk, "gzip", own)
            assert known == digest
            shown = {**IMAGE_ATTRS} if is_picture else {}
            if white is not None:
                shown[IMAGE_RANGE] = (0.0, white)
            layout = {"dtype": "float16", "shape": shape, "chunk": chunk, "codec": "gzip"}
            expected = alone.write_dataset(path, **layout, chunks=chunks, attrs={**shown, **own})
            found = like.write_like(path, form, digest, chunks, white, is_picture=is_picture)
            assert found == expected
        alone.finish_group("/a")
        like.finish_group("/a")
    assert (folder / "like.h5").read_bytes() == (folder / "alone.h5").read_bytes()


@pytest.mark.parametrize("num_chunks", [1, 2, 1024, 1025, 2048, 9000])
def test_datasets_of_many_chunks(target, num_chunks):
    values = np.arange(2 * num_chunks)
    with Writing(target) as writer:
        write_array(writer, "/many", values, (2,))
    with h5py.File(target) as file:
        assert np.array_equal(file["many"][:], values)


@pytest.mark.parametrize("itemsize", [3, 255, 256, 65_535, 65_536, 70_000])
def test_text_of_any_width(target, itemsize):
    values = np.array([b"x" * itemsize, b"y"], dtype=f"S{itemsize}")
    encoded = encode_array(values, "deflate")
    with Writing(target) as writer:
        writer.write_dataset(
            "/text",
            dtype=f"text:{itemsize}",
            shape=encoded.shape,
            chunk=encoded.chunk,
            codec="deflate",
            chunks=encoded.chunks,
            attrs={},
        )
    with h5py.File(target) as file:
        assert file["text"][:].tolist() == values.tolist()


def write_groups(target, names):
    with Writing(target) as writer:
        writer.create_group("/samples", {})
        for number, name in enumerate(names):
            writer.create_group(f"/samples/{name}", {"number": number})
            writer.finish_group(f"/samples/{name}")


# 129 is the first that leaves the header; 186 and 18,972 are the first of trees of two and three
# levels.
@pytest.mark.parametrize(
    "num_links", [0, 1, 5, 128, 129, 185, 186, 187, 2000, 10_000, 18_971, 18_972, 70_000]
)
def test_groups_of_many_links_can_be_read_and_changed(target, num_links):
    names = [f"{number:08d}" for number in range(num_links)]
    write_groups(target, names)
    with h5py.File(target) as file:
        group = file["samples"]
        assert len(group) == num_links
        assert list(group) == names
        chosen = {*range(0, num_links, 97), *range(min(num_links, 60))} | {num_links - 1} - {-1}
        for number in chosen:
            assert group[names[number]].attrs["number"] == number
        assert "missing" not in group
    with h5py.File(target, "r+") as file:
        group = file["samples"]
        for number in range(300):
            group.create_group(f"new{number}").attrs["number"] = number
        for name in names[:50]:
            del group[name]
        if len(names) > 50:
            group[names[50]].attrs["more"] = 1
    with h5py.File(target) as file:
        group = file["samples"]
        assert sorted(group) == sorted([*names[50:], *(f"new{number}" for number in range(300))])
        assert all(group[f"new{number}"].attrs["number"] == number for number in range(300))
        assert names[50:51] == [name for name in names[50:51] if group[name].attrs["more"] == 1]


@pytest.mark.parametrize("num_links", [129, 10_000])
def test_groups_can_be_emptied_and_filled_again(target, num_links):
    names = [f"{number:08d}" for number in range(num_links)]
    write_groups(target, names)
    # Links of more than 4 KiB get storage of their own.
    more = [
        *names[::7],
        "x" * 5000,
        "y" * 60_000,
        *(f"{number}{'z' * 3000}" for number in range(9)),
    ]
    with h5py.File(target, "r+") as file:
        group = file["samples"]
        for name in names:
            del group[name]
        assert list(group) == []
        for number, name in enumerate(more):
            group.create_group(name).attrs["number"] = number
    with h5py.File(target, "r+") as file:
        group = file["samples"]
        assert sorted(group) == sorted(more)
        assert all(group[name].attrs["number"] == number for number, name in enumerate(more))
        for name in more[10:]:
            del group[name]
    with h5py.File(target) as file:
        assert sorted(file["samples"]) == sorted(more[:10])


@pytest.mark.parametrize("length", [300, 3000, 65_000])
def test_links_of_any_length(target, length):
    names = sorted(str(number) for number in range(150))
    names[-1] = "x" * length
    write_groups(target, names)
    with h5py.File(target, "r+") as file:
        group = file["samples"]
        assert list(group) == names
        assert all(group[name].attrs["number"] == number for number, name in enumerate(names))
        for number in range(3000):
            group.create_group(f"new{number}")
        del group[names[-1]]
    with h5py.File(target) as file:
        assert len(file["samples"]) == 149 + 3000


def test_links_lie_in_small_blocks(target):
    """HDF5 reads blocks and nodes whole: of 70,000 links, one such read takes 17 kB at most."""
    write_groups(target, [f"{number:08d}" for number in range(70_000)])
    data = target.read_bytes()
    heap, tree = data.index(b"FRHP"), data.index(b"BTHD")
    (largest_block,) = struct.unpack_from("<Q", data, heap + 120)
    (node_nbytes,) = struct.unpack_from("<I", data, tree + 6)
    assert largest_block == 16 << 10
    assert node_nbytes <= 2 << 10
    assert data.count(b"FHDB") > 70_000 * 20 // largest_block
    assert data.count(b"BTLF") > 70_000 * 11 // node_nbytes


@pytest.mark.h5tools
@pytest.mark.parametrize("num_groups", [129, 10_000])
def test_the_tools_of_hdf5_take_many_groups(target, num_groups):
    write_groups(target, [f"{number:08d}" for number in range(num_groups)])
    for command in (["h5dump", "-n"], ["h5ls", "-r"], ["h5stat"]):
        done = subprocess.run([*command, target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if command == ["h5stat"]:
            assert "Unaccounted space: 0 bytes" in done.stdout
        else:
            assert done.stdout.count("/samples/0000") == num_groups


def test_attributes_and_names_too_large_for_a_header(target):
    long_name, value = "n" * 70_000, "v" * 200_000
    with Writing(target) as writer:
        writer.create_group("/", {"large": value})
        writer.create_group(f"/a/{long_name}", {"large": value, "small": 1})
        write_array(writer, f"/a/{long_name}/values", np.arange(5), attrs={"large": value})
        writer.finish_group("/a")
    with h5py.File(target) as file:
        assert file.attrs["large"].decode() == value
        assert list(file["a"]) == [long_name]
        group = file["a"][long_name]
        assert group.attrs["large"].decode() == value
        assert group.attrs["small"] == 1
        assert group["values"][:].tolist() == [0, 1, 2, 3, 4]
        assert group["values"].attrs["large"].decode() == value


def test_changes_by_the_library_keep_the_rest(target):
    values = np.arange(40, dtype="f2").reshape(5, 8)
    with Writing(target) as writer:
        for number in range(40):
            write_array(writer, f"/group/{number:03d}", values + number, attrs=ATTRS)
    with h5py.File(target, "r+") as file:
        file["group/003"][...] = 0
        file["group/004"].attrs["text"] = "other"
        for number in range(30):
            file["group/005"].attrs[f"more{number}"] = number
        file["group"].move("006", "moved")
        for number in range(200):
            file["group"].create_dataset(f"new{number}", data=number)
    with h5py.File(target) as file:
        group = file["group"]
        assert not group["003"][...].any()
        assert group["004"].attrs["text"] == "other"
        assert len(group["005"].attrs) == len(ATTRS) + 30
        assert np.array_equal(group["moved"][...], values + 6)
        assert all(group[f"new{number}"][()] == number for number in range(200))
        for number in range(7, 40):
            assert np.array_equal(group[f"{number:03d}"][...], values + number)


def test_the_library_counts_what_is_in_headers(target):
    with Writing(target) as writer:
        writer.create_group("/a", ATTRS)
        write_array(writer, "/a/values", np.arange(3), attrs=ATTRS)
    with h5py.File(target) as file:
        for name in ("a", "a/values"):
            info = h5o.get_info(file[name].id)
            assert info.num_attrs == len(ATTRS)
            assert info.rc == 1
            assert info.hdr.version == 2


def test_tables_have_named_columns(target):
    columns = {
        "ordinal": np.arange(3, dtype=np.int64),
        "share": np.array([0.5, np.nan, 1.0]),
        "name": np.array(["a", "Ä".encode(), b""], dtype="S2"),
    }
    with Writing(target) as writer:
        writer.write_table("/index/samples", columns)
    with h5py.File(target) as file:
        table = file["index/samples"][:]
    assert table.dtype.names == tuple(columns)
    for name, values in columns.items():
        assert np.array_equal(table[name], values, equal_nan=name == "share")


def test_a_written_group_takes_nothing_more(target):
    with Writing(target) as writer:
        writer.create_group("/a", {})
        writer.finish_group("/a")
        with pytest.raises(ValueError, match="/a/b lies in a group that is written already"):
            writer.create_group("/a/b", {})


def test_a_missing_chunk_is_noticed(target):
    array = {"dtype": "int64", "shape": (4,), "chunk": (2,), "codec": "gzip", "attrs": {}}
    with Writing(target) as writer:
        with pytest.raises(ValueError, match="/a: 1 chunks, expected 2"):
            writer.write_dataset("/a", chunks=[b"x"], **array)


@pytest.mark.h5tools
@pytest.mark.skipif(shutil.which("h5repack") is None, reason="the HDF5 tools are not installed")
@pytest.mark.parametrize("num_groups", [3, 500])
def test_the_tools_of_hdf5_take_it(target, num_groups):
    values = np.arange(24, dtype="f2").reshape(4, 6)
    with Writing(target) as writer:
        writer.create_group("/", {"format": "test"})
        for number in range(num_groups):
            write_array(writer, f"/samples/{number:08d}/one", values, attrs=ATTRS)
            write_array(writer, f"/samples/{number:08d}/four", values, (2, 3))
            writer.finish_group(f"/samples/{number:08d}")
    repacked = target.with_name("repacked.h5")
    for command in (
        ["h5dump", target],
        ["h5ls", "-rv", target],
        ["h5stat", target],
        ["h5repack", target, repacked],
        ["h5diff", target, repacked],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if command[0] == "h5stat":
            assert "Unaccounted space: 0 bytes" in done.stdout
    with h5py.File(repacked) as file:
        assert file.attrs["format"] == b"test"
        assert_attributes(file["samples/00000002/one"].attrs, ATTRS)
        assert np.array_equal(file["samples/00000002/four"][...], values)


@given(st.binary(max_size=100))
def test_checksums_of_one_and_of_many_agree(block):
    alike = [bytes([number]) + block for number in range(20)]
    assert checksums([block, *alike]) == [checksum(each) for each in [block, *alike]]


# lookup3.c's own examples, driver5: hashlittle(..., 0).
@pytest.mark.parametrize(
    ("block", "expected"), [(b"", 0xDEADBEEF), (b"Four score and seven years ago", 0x17770551)]
)
def test_checksums_are_lookup3(block, expected):
    assert checksum(block) == expected
    assert checksums(10 * [block]) == 10 * [expected]
