"""Attacks through HDF5's own constructs; each leaves a file without a footer."""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from attack import Attack, register
from h5py import h5a, h5d, h5g, h5o, h5p, h5s, h5t
from object_headers import lookup3, set_reference_count
from specimen import SAMPLE, edit

if TYPE_CHECKING:
    from pathlib import Path

ATTACKS: list[Attack] = []
LINKS = "archives hold hard links only"
LAYER = f"{SAMPLE}/hidden_states/layer_000"
TOKENS = f"{SAMPLE}/tokens"
EXTRA = f"{SAMPLE}/extra"
KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def trap(path: Path) -> str:
    """The name of a file beside `path` that hangs whoever opens it."""
    other = path.with_suffix(".trap")
    os.mkfifo(other)
    return str(other)


def put_text(location: Any, name: str, value: bytes) -> None:
    """A text attribute as archives have it, whatever it says."""
    location.attrs.create(name, np.bytes_(value))


def replaced(file: h5py.File, path: str) -> dict[str, Any]:
    """Take a dataset away and give back its attributes."""
    attrs = dict(file[path].attrs)
    del file[path]
    return attrs


def put(file: h5py.File, path: str, data: Any = None, **options: Any) -> h5py.Dataset:
    """Another dataset in a dataset's place, with its attributes."""
    attrs = replaced(file, path) if path in file else {}
    made = file.create_dataset(path, data=data, **options)
    for name, value in attrs.items():
        made.attrs[name] = value
    return made


def low_level(
    file: h5py.File, path: str, type_id: Any, shape: tuple[int, ...], options: Any
) -> h5d.DatasetID:
    """A dataset from HDF5's own parts, in place of another."""
    if path in file:
        replaced(file, path)
    return h5d.create(file.id, path.encode(), type_id, h5s.create_simple(shape), options)


def chunked(chunk: tuple[int, ...], *filters: int) -> Any:
    options = h5p.create(h5p.DATASET_CREATE)
    options.set_chunk(chunk)
    for each in filters:
        values = {1: (6,), 2: (2,)}.get(each, ())
        options.set_filter(each, h5py.h5z.FLAG_OPTIONAL, values)
    return options


# --- links -----------------------------------------------------------------------------------


def link_attack(name: str, where: str, *, soft: bool = False, problem: str = "") -> None:
    def build(path: Path) -> None:
        target = h5py.SoftLink("/samples/00000001") if soft else None
        other = "/nowhere" if soft else trap(path)

        def change(file: h5py.File) -> None:
            if where in file:
                del file[where]
            file[where] = target or h5py.ExternalLink(other, "/")

        edit(path, change)

    register(ATTACKS, None if problem else LINKS, problem=problem or LINKS, name=name)(build)


link_attack("external-link-as-layer", LAYER)
link_attack("external-link-as-group-of-layers", f"{SAMPLE}/hidden_states")
link_attack("external-link-as-extra-field", f"{EXTRA}/raw")
link_attack("external-link-as-sample", SAMPLE)
link_attack("external-link-as-samples", "samples")
link_attack("external-link-as-kinds", "kinds")
link_attack("external-link-as-kind", "kinds/attentions")
link_attack("external-link-as-index", "index", problem=LINKS)
link_attack("external-link-as-index-table", "index/samples", problem=LINKS)
link_attack("external-link-in-root", "other", problem="/other.*no such object belongs")
link_attack("soft-link-as-layer", LAYER, soft=True)
link_attack("soft-link-as-sample", SAMPLE, soft=True)
link_attack("soft-link-as-kinds", "kinds", soft=True)


@register(ATTACKS, "several hard links")
def hard_link_cycle(path: Path) -> None:
    def change(file: h5py.File) -> None:
        file[f"{SAMPLE}/extra/loop"] = file[f"{SAMPLE}/extra"]

    edit(path, change)


# Objects that are not the format's are passed over by readers, and named by validators.
@register(ATTACKS, None, problem="met before under another name")
def hard_link_cycle_that_lies(path: Path) -> None:
    address = []

    def change(file: h5py.File) -> None:
        group = file.create_group(f"{EXTRA}/a/b")
        group["again"] = group
        address.append(h5o.get_info(group.id).addr)

    edit(path, change)
    set_reference_count(path, address[0], 1)


def dag(path: Path) -> list[int]:
    """A chain of 40 groups, each linked twice from the one before: 2^40 paths."""
    addresses = []

    def change(file: h5py.File) -> None:
        here = file.create_group(f"{EXTRA}/dag")
        for _ in range(40):
            below = here.create_group("a")
            here["b"] = below
            addresses.append(h5o.get_info(below.id).addr)
            here = below

    edit(path, change)
    return addresses


@register(ATTACKS, None, problem="several hard links", name="dag-of-2-to-40-paths")
def honest_dag(path: Path) -> None:
    dag(path)


@register(
    ATTACKS, None, problem="met before under another name", name="dag-of-2-to-40-paths-that-lies"
)
def lying_dag(path: Path) -> None:
    for address in dag(path):
        set_reference_count(path, address, 1)


@register(ATTACKS, LINKS, problem="num_samples is 2, 5002 are stored")
def many_links_in_samples(path: Path) -> None:
    def change(file: h5py.File) -> None:
        group = file["samples"]
        for number in range(2, 5_002):
            group[f"{number:08d}"] = h5py.SoftLink("/x")

    edit(path, change)


# --- storage ---------------------------------------------------------------------------------


@register(ATTACKS, "external storage; archives hold their own bytes")
def external_storage(path: Path) -> None:
    other = trap(path)
    edit(
        path,
        lambda file: put(
            file, TOKENS, shape=(6,), dtype="i8", external=[(other, 0, h5py.h5f.UNLIMITED)]
        ),
    )


def virtual(path: Path, source: str, name: str) -> None:
    def change(file: h5py.File) -> None:
        replaced(file, TOKENS)
        made = h5py.VirtualLayout(shape=(6,), dtype="i8")
        made[:] = h5py.VirtualSource(source, name, shape=(6,))
        file.create_virtual_dataset(TOKENS, made)

    edit(path, change)


@register(ATTACKS, "a virtual dataset; archives hold their own bytes")
def virtual_dataset(path: Path) -> None:
    virtual(path, trap(path), "x")


@register(ATTACKS, "a virtual dataset; archives hold their own bytes")
def virtual_dataset_of_itself(path: Path) -> None:
    virtual(path, ".", TOKENS)


@register(ATTACKS, "external storage; archives hold their own bytes", problem="external storage")
def external_storage_of_extra(path: Path) -> None:
    other = trap(path)
    edit(
        path,
        lambda file: put(file, f"{EXTRA}/raw", shape=(2,), dtype="u1", external=[(other, 0, 2)]),
    )


@register(ATTACKS, None, problem="external storage; archives hold their own bytes")
def external_storage_of_index(path: Path) -> None:
    other = trap(path)

    def change(file: h5py.File) -> None:
        dtype = file["index/samples"].dtype
        put(file, "index/samples", shape=(2,), dtype=dtype, external=[(other, 0, 1000)])

    edit(path, change)


@register(ATTACKS, None, problem="a virtual dataset; archives hold their own bytes")
def virtual_index(path: Path) -> None:
    other = trap(path)

    def change(file: h5py.File) -> None:
        dtype = replaced_dtype(file)
        made = h5py.VirtualLayout(shape=(2,), dtype=dtype)
        made[:] = h5py.VirtualSource(other, "x", shape=(2,))
        file.create_virtual_dataset("index/samples", made)

    edit(path, change)


def replaced_dtype(file: h5py.File) -> np.dtype:
    dtype = file["index/samples"].dtype
    del file["index/samples"]
    return dtype


# --- sizes -----------------------------------------------------------------------------------


@register(ATTACKS, "takes 9223372036854775808 bytes; the limit is", name="2-to-60-elements")
def huge_chunked(path: Path) -> None:
    options = dict(shape=(1 << 60,), dtype="i8", chunks=(1 << 20,), compression="gzip")
    edit(path, lambda file: put(file, TOKENS, **options))


@register(ATTACKS, "takes .* bytes; the limit is", name="2-to-60-elements-contiguous")
def huge_contiguous(path: Path) -> None:
    edit(path, lambda file: put(file, TOKENS, shape=(1 << 60,), dtype="i8"))


@register(ATTACKS, "takes .* bytes; the limit is", name="2-to-60-elements-beside-an-empty-axis")
def huge_beside_nothing(path: Path) -> None:
    options = dict(shape=(0, 1 << 60), dtype="f2", chunks=(1, 1), compression="gzip")
    options["maxshape"] = (None, 1 << 60)
    edit(path, lambda file: put(file, LAYER, **options))


@register(ATTACKS, "8589934592 bytes are declared, and not stored", name="8-gib-never-stored")
def late_allocation(path: Path) -> None:
    edit(path, lambda file: put(file, TOKENS, shape=(1 << 30,), dtype="i8"))


@register(ATTACKS, "chunks cannot be listed in a file of", name="2-to-32-chunks")
def many_chunks(path: Path) -> None:
    options = dict(shape=(1 << 32,), dtype="u1", chunks=(1,), compression="gzip")
    edit(path, lambda file: put(file, TOKENS, **options))


@register(ATTACKS, "0 of 1 chunks are stored where they belong")
def missing_chunk(path: Path) -> None:
    options = dict(shape=(6,), dtype="i8", chunks=(6,), compression="gzip")
    edit(path, lambda file: put(file, TOKENS, **options))


def bomb(
    name: str,
    error: str,
    stored: bytes,
    raw_nbytes: int,
    *filters: int,
    problem: str = "",
) -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            options = chunked((raw_nbytes,), *filters)
            made = low_level(file, f"{EXTRA}/raw", h5t.STD_U8LE, (raw_nbytes,), options)
            made.write_direct_chunk((0,), stored)
            made = h5py.Dataset(made)
            for key, value in {"encoding": "bytes", "encoding_version": "1"}.items():
                made.attrs[key] = np.bytes_(value)

        edit(path, change)

    register(ATTACKS, error, problem=problem, name=name)(build)


def zeros(nbytes: int) -> bytes:
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(MiB)) for _ in range(nbytes >> 20)]
    return b"".join([*parts, packer.flush()])


GIB_OF_ZEROS = zeros(GiB)
EDITED = "do not fit the sample"  # a quick validate reads no arrays
SHORT = zlib.compress(bytes(100))
LIMIT = "take 1073741824 bytes; the limit is"
bomb("deflate-bomb", LIMIT, GIB_OF_ZEROS, GiB, 1)
bomb("double-deflate", r"\[1, 1\] repeat", zlib.compress(GIB_OF_ZEROS, 9), GiB, 1, 1)
bomb("small-chunk-that-inflates-to-1-gib", "cannot hold 128 raw", GIB_OF_ZEROS, 128, 1)
bomb(
    "chunk-that-inflates-to-1-mib", "more than the expected 128", zeros(MiB), 128, 1, problem=EDITED
)
bomb("chunk-that-inflates-short", "holds 100 bytes, expected 128", SHORT, 128, 1, problem=EDITED)
bomb("chunk-too-small-for-its-size", "cannot hold 1000000", zlib.compress(b""), 1_000_000, 1)
bomb("foreign-bomb", "not inflate to 136 bytes or less", zeros(MiB), 132, 3, 1, problem=EDITED)
bomb("foreign-chunk-of-1-gib", LIMIT, GIB_OF_ZEROS, GiB, 1, 3)
bomb("foreign-damage", "fletcher32 checksum does not fit", SHORT, 128, 1, 3, problem=EDITED)
bomb("foreign-inflates-short", "holds 100 bytes, expected 128", SHORT, 128, 2, 1, problem=EDITED)


@register(ATTACKS, "the shuffle filter is for elements of .7,., not 2")
def shuffle_of_another_size(path: Path) -> None:
    def change(file: h5py.File) -> None:
        options = h5p.create(h5p.DATASET_CREATE)
        options.set_chunk((6, 8))
        options.set_filter(2, 0, (7,))
        options.set_deflate(6)
        raw = file[LAYER][:].tobytes()
        # HDF5 corrects the number on creating a dataset: it is forged below.
        made = low_level(file, LAYER, h5t.IEEE_F16LE, (6, 8), options)
        made.write_direct_chunk((0, 0), zlib.compress(raw))

    edit(path, change)
    patch_header(path, LAYER, struct.pack("<HHHI", 2, 0, 1, 2), struct.pack("<HHHI", 2, 0, 1, 7))


def patch_header(path: Path, name: str, old: bytes, new: bytes) -> None:
    """Replace bytes in an object's header, with the checksum that goes with them."""
    with h5py.File(path) as file:
        address = h5o.get_info(file[name].id).addr
    data = bytearray(path.read_bytes())
    flags = data[address + 5]
    start = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    end = start + width + int.from_bytes(data[start : start + width], "little")
    position = data.index(old, start, end)
    data[position : position + len(old)] = new
    struct.pack_into("<I", data, end, lookup3(bytes(data[address:end])))
    path.write_bytes(data)


@register(ATTACKS, r"the filters \[54321\] are none that archives use", name="unknown-filter")
def unknown_filter(path: Path) -> None:
    def change(file: h5py.File) -> None:
        made = low_level(file, TOKENS, h5t.STD_I64LE, (6,), chunked((6,), 54321))
        made.write_direct_chunk((0,), bytes(48))

    edit(path, change)


@register(ATTACKS, None, problem=r"the filters \[54321\] are none that archives use")
def unknown_filter_of_index(path: Path) -> None:
    def change(file: h5py.File) -> None:
        type_id = file["index/samples"].id.get_type()
        low_level(file, "index/samples", type_id, (2,), chunked((2,), 54321))

    edit(path, change)


# --- groups ----------------------------------------------------------------------------------


def levels(name: str, where: str, error: str | None, problem: str) -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            here = h5g.open(file.id, where.encode())
            for _ in range(10_000):
                here = h5g.create(here, b"g")

        edit(path, change)

    register(ATTACKS, error, problem=problem, name=name)(build)


DEEP = "nested deeper than 64 levels"
levels("10000-levels-below-a-sample", SAMPLE, None, DEEP)
levels("10000-levels-below-extra", EXTRA, None, DEEP)
levels("10000-levels-below-a-kind", "kinds/attentions", None, "/kinds/attentions/g.*no such object")
levels("10000-levels-in-the-root", "/", None, "/g.*no such object")


@register(ATTACKS, "there are 1501 kinds; the limit is 1000", name="many-kinds")
def many_kinds(path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["kinds"]
        group = file.create_group("kinds").id
        for number in range(1501):
            h5g.create(group, b"%d" % number)

    edit(path, change)


# --- attributes ------------------------------------------------------------------------------


def attributes(name: str, where: str, error: str, problem: str = "") -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            target = h5o.open(file.id, where.encode())
            space = h5s.create(h5s.SCALAR)
            for number in range(20_000):
                h5a.create(target, b"x_%d" % number, h5t.STD_U8LE, space)

        edit(path, change)

    register(ATTACKS, error, problem=problem, name=name)(build)


TOO_MANY = "has 2000. attributes; the limit is 1000"
attributes("20000-attributes", TOKENS, TOO_MANY)


def big_attribute(name: str, where: str, error: str | None, problem: str = "") -> None:
    def build(path: Path) -> None:
        edit(path, lambda file: file[where].attrs.create("x_big", np.zeros(17 * MiB, "u1")))

    register(ATTACKS, error, problem=problem, name=name)(build)


TOO_BIG = "attributes take 1782.* bytes; the limit is 16777216"
big_attribute("17-mib-attribute", TOKENS, TOO_BIG)
big_attribute("17-mib-attribute-of-root", "/", TOO_BIG)
big_attribute("17-mib-attribute-of-kind", "kinds/attentions", TOO_BIG)


@register(ATTACKS, "attribute 'label' is of a type or shape that archives never hold")
def label_that_hdf5_would_clip(path: Path) -> None:
    edit(path, lambda file: file[SAMPLE].attrs.create("label", np.uint64(2**64 - 1)))


@register(ATTACKS, "attribute 'sample_id' is of a type or shape")
def attribute_of_variable_length(path: Path) -> None:
    edit(path, lambda file: file[SAMPLE].attrs.create("sample_id", "plain str"))


@register(ATTACKS, "attribute 'format' is of a type or shape")
def attribute_without_a_value(path: Path) -> None:
    edit(path, lambda file: file.attrs.create("format", h5py.Empty("S8")))


# --- types -----------------------------------------------------------------------------------


def type_attack(name: str, error: str, data: Any, dtype: Any, **options: Any) -> None:
    def build(path: Path) -> None:
        edit(path, lambda file: put(file, TOKENS, data, dtype=dtype, **options))

    register(ATTACKS, error, name=name)(build)


NUMBERS_ONLY = "archives hold integers, floats and text only"
type_attack("object-references", f"a reference; {NUMBERS_ONLY}", None, h5py.ref_dtype, shape=(6,))
type_attack("region-references", f"a reference; {NUMBERS_ONLY}", None, h5py.regionref_dtype,
            shape=(6,))  # fmt: skip
type_attack("variable-length-data", f"of variable length; {NUMBERS_ONLY}", None,
            h5py.vlen_dtype("i4"), shape=(6,))  # fmt: skip
type_attack("variable-length-strings", "a variable-length string", ["a"] * 6, h5py.string_dtype())
type_attack("array-type", f"an array; {NUMBERS_ONLY}", None, np.dtype(("i4", (1000, 1000))),
            shape=(6,))  # fmt: skip
type_attack("compound-in-a-sample", f"a compound; {NUMBERS_ONLY}", None, [("a", "i4")], shape=(6,))
type_attack("enumeration", f"an enumeration; {NUMBERS_ONLY}", None,
            h5py.enum_dtype({"a": 0}, "i8"), shape=(6,))  # fmt: skip
type_attack("opaque", f"opaque bytes; {NUMBERS_ONLY}", None, "V8", shape=(6,))
type_attack("null-dataspace", "a dataset without a simple shape", h5py.Empty("i8"), None)


def odd_type(name: str, error: str, make: Any) -> None:
    def build(path: Path) -> None:
        edit(
            path, lambda file: low_level(file, TOKENS, make(), (6,), h5p.create(h5p.DATASET_CREATE))
        )

    register(ATTACKS, error, name=name)(build)


def _changed(type_id: Any, **values: Any) -> Any:
    made = type_id.copy()
    for name, value in values.items():
        getattr(made, f"set_{name}")(*value if isinstance(value, tuple) else (value,))
    return made


LAYOUT = "an unusual layout; archives hold whole integers"
odd_type("integers-of-12-bits", LAYOUT, lambda: _changed(h5t.STD_I64LE, precision=12))
odd_type("integers-of-3-bytes", LAYOUT, lambda: _changed(h5t.STD_I32LE, precision=24, size=3))
odd_type("integers-of-1-gib", LAYOUT, lambda: _changed(h5t.STD_I32LE, size=GiB))
odd_type("floats-of-another-bias", LAYOUT, lambda: _changed(h5t.IEEE_F32LE, ebias=100))
odd_type("text-of-3-gib", "text:3221225472 is larger", lambda: _changed(h5t.C_S1, size=3 * GiB))


@register(ATTACKS, "named .committed. type")
def committed_type(path: Path) -> None:
    def change(file: h5py.File) -> None:
        named = h5t.STD_I64LE.copy()
        named.commit(file.id, b"named")
        low_level(file, TOKENS, named, (6,), h5p.create(h5p.DATASET_CREATE))

    edit(path, change)


@register(ATTACKS, "neither group nor dataset")
def named_type_as_layer(path: Path) -> None:
    def change(file: h5py.File) -> None:
        replaced(file, LAYER)
        h5t.STD_I64LE.copy().commit(file.id, LAYER.encode())

    edit(path, change)


def index_attack(name: str, problem: str, dtype: Any, shape: tuple[int, ...] = (2,)) -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            del file["index/samples"]
            options = {"chunks": (1,), "compression": "gzip"} if shape[0] > 2 else {}
            file.create_dataset("index/samples", shape, dtype=dtype, **options)

        edit(path, change)

    register(ATTACKS, None, problem=problem, name=name)(build)


index_attack("index-of-variable-length", "a variable-length string", [("a", h5py.string_dtype())])
index_attack("index-of-references", "a reference", [("a", h5py.ref_dtype)])
index_attack("index-of-arrays", "an array", [("a", "i4", (1000, 1000))])
index_attack("index-of-numbers", "not a plain compound", "i8")
index_attack("index-of-10-million-rows", "80000000 bytes are declared|cannot be listed",
             [("a", "i8")], (10_000_000,))  # fmt: skip
index_attack("index-of-2-to-60-rows", "limit 50000000 rows", [("a", "i8")], (1 << 60,))
index_attack("index-of-wide-rows", "larger than|not stored", [("a", "S1000000000")])


# --- the file itself -------------------------------------------------------------------------


@register(ATTACKS, "is not an HDF5 file")
def user_block(path: Path) -> None:
    path.write_bytes(bytes(512) + path.read_bytes())


@register(ATTACKS, "addresses of 8 bytes that count from 512; archives have 8 bytes from 0")
def base_address(path: Path) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 12, 512)
    struct.pack_into("<I", data, 44, lookup3(bytes(data[:44])))
    path.write_bytes(data)


@register(ATTACKS, "it was truncated|HDF5 cannot open it")
def first_bytes_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:16])


@register(ATTACKS, "its end is missing")
def half_a_file(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
