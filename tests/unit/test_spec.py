"""What schema/SPEC.md says is what archives hold: its tables, vectors and code are executed."""

import ast
import json
import math
import pickle
import re
import struct
import subprocess
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

import h5traces
from h5traces.format import layout, text
from h5traces.format import values as encodings
from h5traces.format.archive import ArchiveMetadata
from h5traces.format.digests import dataset_digest, sample_digest
from h5traces.format.entries import carrier_dtype
from h5traces.format.record import IndexRow, TraceMetadata, index_columns
from h5traces.format.value_types import BY_NAME
from h5traces.precision import encoding
from h5traces.storage.arrays import chunk_shape
from h5traces.storage.codecs import CODECS
from h5traces.writing.options import PrecisionOptions

IMAGES = {*layout.IMAGE_ATTRS, layout.IMAGE_RANGE}
ROOT = Path(__file__).resolve().parents[2]
SPEC = (ROOT / "schema" / "SPEC.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "legacy"


def section(title):
    """The text of the section of that title, without its subsections' order mattering."""
    found = re.search(
        rf"^## \d+ {re.escape(title)}\n(.*?)(?=^## |\Z)", SPEC, re.MULTILINE | re.DOTALL
    )
    assert found, f"SPEC.md has no section {title!r}"
    return found[1]


def tables(title):
    """Tables of a section: a list of rows each, a row being a dict by column."""
    made = []
    for block in re.findall(r"(?:^\|.*\|\n)+", section(title), re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        header, _, *rows = [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]
        made.append([dict(zip(header, row, strict=True)) for row in rows])
    return made


def table(title, *columns):
    """The one table of a section that begins with these columns."""
    (found,) = [
        each for each in tables(title) if tuple(each[0])[: len(columns)] == columns and each
    ]
    return found


# The attributes of datasets, and not those of their group.
OF_DATASETS = ("attribute", "stored as", "present", "meaning")


def names(cell):
    """What stands between backticks in a cell."""
    return re.findall(r"`([^`]*)`", cell)


def one(cell):
    (name,) = names(cell)
    return name


def test_the_normative_text_is_short():
    """Words outside of generated tables, of code and of the examples with h5py."""
    text = SPEC.replace(section("Reading an archive with nothing but h5py"), "")
    for left_out in (r"<!-- generated: .*?<!-- end: \w+ -->", r"```.*?```"):
        text = re.sub(left_out, "", text, flags=re.DOTALL)
    assert len([each for each in text.split() if re.search(r"\w", each)]) <= 6000


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example batch of the repository as an archive."""
    folder = tmp_path_factory.mktemp("example")
    h5traces.convert(EXAMPLE, folder)
    (path,) = folder.glob("*.h5")
    return path


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """An archive with bfloat16, escaped text and extra fields, as ``archive.h5``."""
    folder = tmp_path_factory.mktemp("rich")
    random = np.random.default_rng(0)
    bfloat16 = (random.normal(size=(3, 4)).astype("f4").view("u4") & 0xFFFF0000).view("f4") * 2**90
    trace = {
        "hidden_states": [random.normal(size=(3, 4)).astype("f2"), bfloat16],
        "attentions": [random.random(size=(2, 3, 3)).astype("f2") for _ in range(2)],
        "tokens": np.array([1, 2, 3]),
        "tokens_decoded": ["ä\U0001f600", "a\0", "\u241b0000"],
        "question_id": "tc_33\0",
        "config": {"a": (1, 2**70, float("inf")), 3: [b"\xff", None], "$x": {"y": -0.5}},
    }
    batch = folder / "m_d_batch_0000.pkl"
    batch.write_bytes(pickle.dumps([trace, trace]))
    h5traces.convert(batch, folder / "archive.h5", precision=PrecisionOptions(dtype="auto"))
    return folder, trace


def plain_attributes(thing):
    """All attributes of an h5py object as plain Python values."""
    return {
        name: text.decode(bytes(value)) if isinstance(value, bytes) else value.tolist()
        for name, value in thing.attrs.items()
    }


# The file


def test_code_blocks_read_an_archive(rich, monkeypatch):
    folder, trace = rich
    monkeypatch.chdir(folder)
    blocks = re.findall(
        r"```python\n(.*?)```", section("Reading an archive with nothing but h5py"), re.DOTALL
    )
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(compile(block, "SPEC.md", "exec"), names)  # what readers are told to run
    with names["file"]:
        np.testing.assert_array_equal(names["states"], trace["hidden_states"][0])
        np.testing.assert_array_equal(names["heads"], trace["attentions"][0])
        np.testing.assert_array_equal(names["tokens"], trace["tokens"])
        assert len(names["all_states"]) == 2
        assert names["question_id"] == "tc_33\0"
        assert names["words"] == trace["tokens_decoded"]
        assert names["source"] == "float32"
        assert names["values"].dtype == np.float32
        np.testing.assert_array_equal(names["values"], trace["hidden_states"][1])
        assert names["config"] == trace["config"]
        assert type(names["config"]["a"]) is tuple


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """An archive of the tier compact whose first layer has exceptions."""
    folder = tmp_path_factory.mktemp("compact")
    random = np.random.default_rng(0)
    states = random.normal(size=(40, 16)).astype("f2")
    states[3, 4], states[5, 6] = np.nan, 60000
    attention = random.dirichlet(np.ones(40), size=(4, 40)).astype("f2")
    trace = {"hidden_states": [states, states + 1], "attentions": [attention] * 2}
    batch = folder / "batch.pkl"
    batch.write_bytes(pickle.dumps([trace]))
    h5traces.convert(batch, folder / "compact.h5", precision="compact")
    return folder, trace


def test_code_blocks_decode_an_archive(compact, monkeypatch):
    folder, trace = compact
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", section("Precision below float16"), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "SPEC.md", "exec"), names)  # what readers are told to run
    with names["file"] as file:
        sigma = file["scales/hidden_states/layer_000/sigma"][:]
        bound = names["stored"].attrs["max_error_sigma"] * sigma
        assert names["stored"].attrs["num_exceptions"] == 2
    states, mean = names["states"], trace["attentions"][0].astype("f4").mean(axis=0)
    source = trace["hidden_states"][0].astype("f8")
    finite = np.isfinite(source)
    assert (np.abs(states - source)[finite] <= np.broadcast_to(bound, source.shape)[finite]).all()
    assert np.isnan(states[3, 4])
    assert states[5, 6] == 60000
    assert np.abs(np.sqrt(names["mean"]) - np.sqrt(mean)).max() <= 0.5001 / 255
    assert np.array_equal(names["mean"] > 0.01, mean > 0.01)
    with h5traces.open(folder / "compact.h5", lossy_dtype="float32") as archive:
        np.testing.assert_array_equal(archive[0]["hidden_states"][0], states)
        np.testing.assert_allclose(archive[0]["attention_mean"][0], names["mean"], rtol=3e-7)


def test_encodings_of_layers_are_those_of_the_code(compact):
    rows = {one(row["encoding"]): row for row in table("Precision below float16", "encoding")}
    assert set(rows) == {encoding.CHANNEL_STEPS, encoding.SQUARE_ROOT, encoding.FLOAT16_ROUNDED}
    assert {one(row["version"]) for row in rows.values()} == {encoding.VERSION}
    with h5py.File(compact[0] / "compact.h5") as file:
        for path in ("hidden_states", "attention_mean"):
            for name, dataset in file[f"samples/00000000/{path}"].items():
                if name != "exceptions":
                    row = rows[dataset.attrs["encoding"].decode()]
                    assert dataset.attrs["formula"].decode() == one(row["restored value"])
                    assert dataset.dtype.name in names(row["stored type"])
        assert json.loads(file.attrs["required_features"]) == ["encoded-layers"]
        kind = plain_attributes(file["kinds/attention_mean"])
        assert (kind["derivation"], kind["reduction"]) == ("head-mean 1", "mean")
        record = {one(row["attribute"]) for row in table("Precision below float16", "attribute")}
        assert set(file["scales"].attrs) == record - {"model_id"}


def test_code_blocks_need_nothing_but_h5py_and_numpy():
    code = "\n".join(re.findall(r"```python\n(.*?)```", SPEC, re.DOTALL))
    imported = {
        alias.name
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported == {"h5py", "re", "base64", "json", "numpy"}


def test_bfloat16_layout(rich):
    with h5py.File(rich[0] / "archive.h5") as file:
        stored = file["samples/00000000/hidden_states/layer_001"].id.get_type()
        assert stored.get_size() == 2
        assert stored.get_fields() == (15, 7, 8, 0, 7)
        assert stored.get_ebias() == 127
    examples = re.findall(r"`0x([0-9A-F]{4})` is (infinity|-?\d+\.\d+)", section("The HDF5 file"))
    assert len(examples) == 3
    for bits, number in examples:
        assert np.array([int(bits, 16) << 16], "<u4").view("<f4")[0] == float(number)


def test_object_format_and_links(example):
    head = example.read_bytes()[:12]
    assert head[:8] == b"\x89HDF\r\n\x1a\n"
    assert head[8] in (2, 3)

    def check(group):
        for name in group:
            assert isinstance(group.get(name, getlink=True), h5py.HardLink)
            assert h5py.h5o.get_info(group[name].id).rc == 1
            if isinstance(group[name], h5py.Group):
                check(group[name])
            elif group.name.startswith("/samples"):
                assert group[name].chunks
                assert group[name].compression == "gzip"
                assert group[name].shuffle == (group[name].dtype.kind != "S")

    with h5py.File(example) as file:
        assert set(file) == {"kinds", "samples", "index"}
        check(file)


def test_chunk_table_follows_the_rule():
    rows = table("The HDF5 file", "shape", "itemsize", "chunk")
    assert len(rows) >= 5
    for row in rows:
        shape, chunk = (
            tuple(map(int, re.findall(r"\d+", row[name]))) for name in ("shape", "chunk")
        )
        assert chunk_shape(shape, int(row["itemsize"])) == chunk


def test_codecs_are_those_of_the_code():
    rows = {one(row["codec"]): row for row in table("The HDF5 file", "codec")}
    assert set(rows) == set(CODECS)
    for name, row in rows.items():
        filters = [
            int(each) for each in re.findall(r"(\d+) \(", row["HDF5 filters, in order of writing"])
        ]
        assert filters == [each.filter_id for each in CODECS[name].pipeline(4)]


def test_stored_types_are_those_of_the_code():
    for row in table("The HDF5 file", "stored type"):
        for name in names(row["stored type"]):
            stored = name.replace(":n", ":3")
            assert str(carrier_dtype(stored).itemsize) in row["bytes"] or name == "text:n"


# Attributes


def test_root_attributes_are_those_of_the_table(example):
    rows = {one(row["attribute"]): row for row in table("Root group", "attribute")}
    assert set(rows) == set(ArchiveMetadata.model_fields)
    with h5py.File(example) as file:
        stored = dict(file.attrs)
    assert set(stored) <= set(rows)
    # What this batch does not tell, and what is there for subsets of layers or extractions only.
    assert set(rows) - set(stored) == {
        "model_revision",
        "layers",
        "extraction",
        "precision",
        "earlier_precisions",
    }
    assert {rows[name]["present"] for name in set(rows) - set(stored)} == {"if known"}
    for name, value in stored.items():
        form = rows[name]["stored as"].partition(",")[0]
        assert {"S": "text", "i": "int64"}[np.asarray(value).dtype.kind] == form
        if "JSON" in rows[name]["stored as"]:
            json.loads(text.decode(bytes(value)))


def test_layers_are_present_in_a_subset(tmp_path):
    h5traces.convert(EXAMPLE, tmp_path / "subset.h5", layers=[0, 3, 5])
    with h5py.File(tmp_path / "subset.h5") as file:
        assert file.attrs["layers"].tolist() == [0, 3, 5]
        assert file.attrs["layers"].dtype == "<i8"
        assert sorted(file["samples/00000000/hidden_states"]) == [
            "layer_000",
            "layer_003",
            "layer_005",
        ]


def test_kind_and_sample_attributes_are_those_of_the_tables(example):
    # The example is exact, knows its layers, and has no arrays whose heads were reduced.
    kinds = {one(row["attribute"]) for row in table("Kinds", "attribute")}
    samples = {one(row["attribute"]) for row in table("Samples", "attribute")}
    assert samples == set(TraceMetadata.model_fields)
    with h5py.File(example) as file:
        for kind in file["kinds"].values():
            assert set(kind.attrs) == kinds - {"reduction", "derivation", "positions"}
        for sample in file["samples"].values():
            assert {"seq_len", "coverage", "digest"} <= set(sample.attrs) <= samples


def test_dataset_attributes_are_those_of_the_tables(example, rich):
    layered = {
        name for row in table("Layered arrays", *OF_DATASETS) for name in names(row["attribute"])
    }
    images = {name for name in layered if name.isupper()}
    assert images == IMAGES
    seen = set()
    for path in (example, rich[0] / "archive.h5"):
        with h5py.File(path) as file:
            sample = file["samples/00000000"]
            for kind in ("hidden_states", "attentions"):
                for dataset in sample[kind].values():
                    seen |= set(dataset.attrs)
                    assert (images <= set(dataset.attrs)) == (kind == "attentions")
    assert {"site", "digest", "source_dtype"} <= seen <= layered


def test_datasets_of_a_sample_are_those_of_the_table(example):
    rows = {name: row for row in tables("Tokens and texts")[0] for name in names(row["dataset"])}
    numbers = {layout.TOKENS, layout.ATTENTION_MASK}
    assert set(rows) == {*numbers, layout.TOKENS_DECODED, *layout.TEXT_FIELDS}
    with h5py.File(example) as file:
        found = {
            name: each
            for name, each in file["samples/00000000"].items()
            if isinstance(each, h5py.Dataset)
        }
    assert set(found) <= set(rows)


def test_encodings_are_those_of_the_code():
    rows = table("Extra fields", "encoding", "version")
    assert {one(row["encoding"]) for row in rows} == set(encodings._DECODERS)
    assert {one(row["version"]) for row in rows} == {encodings.VERSION}
    tags = {one(row["tag"]) for row in table("Extra fields", "tag")}
    assert tags == set(encodings.JSON_TAGS)
    types = {one(row["name"]) for row in table("Extra fields", "name", "content")}
    assert types == set(BY_NAME)


def test_table_of_samples_has_the_columns(example):
    rows = {one(row["column"]): row["type"] for row in table("Table of samples", "column")}
    with h5py.File(example) as file:
        stored = file["index/samples"].dtype
    labelled = TraceMetadata(seq_len=1, coverage="full", label=1)
    texts = {"question": "Why?", "generated_text": "So."}
    assert list(index_columns([IndexRow.of(labelled, texts)])) == list(rows)
    # No sample of the example has a label or a question, so these columns are not there.
    assert [each for each in rows if each not in ("label", "question")] == list(stored.names)
    for name, kind in rows.items():
        if name in stored.names:
            assert {"i": "int64", "S": "text"}[stored[name].kind] == kind


# Vectors


def test_text_vectors():
    rows = table("Text", "string, as a Python literal")
    assert len(rows) >= 8
    for row in rows:
        string = ast.literal_eval(one(row["string, as a Python literal"]))
        (stored,) = names(row["stored bytes without padding, hexadecimal"]) or [""]
        assert text.encode(string) == bytes.fromhex(stored)
        assert text.decode(bytes.fromhex(stored) + b"\0\0") == string


def test_key_vectors():
    rows = table("Text", "key, as a Python literal")
    assert len(rows) >= 8
    for row in rows:
        key, name = ast.literal_eval(one(row["key, as a Python literal"])), one(row["link name"])
        assert text.escape(layout.escape_key(key)) == name
        assert layout.unescape_key(text.unescape(name)) == key


def test_digest_vectors():
    rows = table("Digests", "type", "shape")
    values = {
        ("float16", "(2, 2)"): np.array([[0, 1], [-2, 0.5]], "<f2"),
        ("bfloat16", "(2)"): np.array([0x3F80, 0xC000], "<u2"),
        ("text", "(3)"): text.encode_all(["a", "", "\xe9\0"]),
        ("float16", "(0, 4)"): np.zeros((0, 4), "<f2"),
    }
    assert len(rows) == len(values)
    for row in rows:
        hashed = bytes.fromhex(one(row["all hashed bytes, hexadecimal"]))
        kind, digest = one(row["type"]), one(row["digest"])
        assert xxhash.xxh3_128_hexdigest(hashed) == digest
        assert dataset_digest(kind, values[kind, row["shape"]]) == digest


def test_sample_digest_vector():
    document, digest = re.search(
        r"```json\n(.*?)\n```\n\nIts digest is `(\w{32})`", section("Digests"), re.DOTALL
    ).groups()
    assert xxhash.xxh3_128_hexdigest(document.encode()) == digest
    parsed = json.loads(document)
    assert sample_digest(parsed["metadata"], parsed["objects"]) == digest


@pytest.mark.parametrize("which", ["example", "rich"])
def test_digests_of_an_archive_by_the_recipe(which, request):
    """Computed from h5py's values alone, as SPEC.md says."""
    path = request.getfixturevalue(which)
    path = path[0] / "archive.h5" if which == "rich" else path

    def hashed(dataset):
        shape = json.dumps(list(dataset.shape))
        values = dataset[:]
        if values.dtype.kind == "S":
            items = (len(each).to_bytes(8, "little") + each for each in values.ravel().tolist())
            return f"text{shape}\n".encode() + b"".join(items)
        if dataset.id.get_type().get_size() == 2 and values.dtype == np.float32:
            bits = (values.view("<u4") >> 16).astype("<u2")
            return f"bfloat16{shape}\n".encode() + bits.tobytes()
        return f"{values.dtype.name}{shape}\n".encode() + values.tobytes()

    with h5py.File(path) as file:
        for sample in file["samples"].values():
            objects = {}

            def add(name, thing, objects=objects):
                objects[name] = {
                    key: value
                    for key, value in plain_attributes(thing).items()
                    if key not in IMAGES
                }
                if isinstance(thing, h5py.Dataset):
                    digest = xxhash.xxh3_128_hexdigest(hashed(thing))
                    assert objects[name]["digest"] == digest, name

            sample.visititems(add)
            metadata = plain_attributes(sample)
            digest = metadata.pop("digest")
            for name in ("fields", "generation_index", "source"):
                metadata.pop(name, None)
            document = json.dumps(
                {"metadata": metadata, "objects": objects},
                sort_keys=True,
                ensure_ascii=False,
                separators=(",", ":"),
            )
            assert xxhash.xxh3_128_hexdigest(document.encode()) == digest


@pytest.mark.parametrize("beams", [(5, 5, 5), (5, 5, 2)])
def test_generation_steps_by_the_rule(tmp_path, beams):
    random = np.random.default_rng(1)

    def steps(*axes):
        shapes = [(beam, *(each[step] for each in axes)) for step, beam in enumerate(beams)]
        return [random.normal(size=shape).astype("f2") for shape in shapes]

    trace = {
        "hidden_states": [steps((7, 1, 1), (4, 4, 4)) for _ in range(2)],
        "attentions": [steps((3, 3, 3), (7, 1, 1), (7, 8, 9)) for _ in range(2)],
        "tokens": np.arange(3),
    }
    (tmp_path / "steps.pkl").write_bytes(pickle.dumps([trace]))
    h5traces.convert(tmp_path / "steps.pkl", tmp_path / "steps.h5")
    with h5py.File(tmp_path / "steps.h5") as file:
        sample = file["samples/00000000"]
        assert plain_attributes(sample)["coverage"] == "steps"
        for kind in ("hidden_states", "attentions"):
            shapes = sample[kind]["steps"][:]
            for position, layer in enumerate(trace[kind]):
                flat, start = sample[kind][f"layer_{position:03d}"][:], 0
                rows = flat.shape[0] or 1
                for shape, wanted in zip(shapes[position].tolist(), layer, strict=True):
                    stop = start + math.prod(shape) // rows
                    np.testing.assert_array_equal(flat[:, start:stop].reshape(shape), wanted)
                    start = stop
                assert start == flat.shape[1]


# The footer, by a parser made of SPEC.md's tables; it must not import h5traces.storage.footer


STRUCT_FORMATS = {"uint64": "<Q", "uint32": "<I", "bytes8": "<8s"}
NUMPY_DTYPES = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "int64": "<i8"}


class FooterBySpec:
    """The footer of `data`, read by the tables of SPEC.md."""

    def __init__(self, data):
        rows = table("Footer", "offset", "type", "name")
        trailer = {}
        for row in rows:
            form, offset = STRUCT_FORMATS[row["type"]], int(row["offset"])
            (trailer[one(row["name"])],) = struct.unpack_from(form, data[-64:], offset)
        assert trailer["magic"] == b"h5tr\r\nF1"
        assert trailer["trailer_checksum"] == xxhash.xxh3_64_intdigest(data[-64:-16])
        assert trailer["version"] == 1
        self.start = trailer["hdf5_nbytes"]
        first = self.start + trailer["body_nbytes"]
        assert first + trailer["directory_nbytes"] + 64 == len(data)
        base, end = struct.unpack_from("<Q", data, 12)[0], struct.unpack_from("<Q", data, 28)[0]
        assert base + end == self.start
        stored = data[first : first + trailer["directory_nbytes"]]
        assert xxhash.xxh3_64_intdigest(stored) == trailer["directory_checksum"]
        raw = zlib.decompress(stored)
        assert len(raw) == trailer["directory_raw_nbytes"]
        self.directory = json.loads(raw)
        self.rows, position = [], 0
        for nbytes, checksum in self.directory["groups"]:
            self.rows += self._rows_of(data[self.start + position :][:nbytes], checksum)
            position += nbytes
        self.columns = {}
        for row in table("Footer", "column", "value"):
            name = one(row["column"])
            offset, nbytes, raw_nbytes, checksum = self.directory["columns"][name]
            assert offset == position, "columns lie in the order of the table"
            position += nbytes
            stored = data[self.start + offset : self.start + offset + nbytes]
            assert xxhash.xxh3_64_intdigest(stored) == checksum
            raw = zlib.decompress(stored)
            assert len(raw) == raw_nbytes
            self.columns[name] = json.loads(raw)
        assert position == trailer["body_nbytes"]
        assert set(self.columns) == set(self.directory["columns"])

    def _rows_of(self, group, checksum):
        """The raw bytes of all rows of a group."""
        fields = [
            (name, NUMPY_DTYPES[row["type"]])
            for name, row in zip(
                ("nbytes", "raw_nbytes", "checksum"),
                table("Footer", "table of a group", "type"),
                strict=True,
            )
        ]
        left = self.directory["num_samples"] + self.directory.get("has_scales", 0) - len(self.rows)
        places = np.frombuffer(group, fields, min(1000, left))
        assert xxhash.xxh3_64_intdigest(group[: places.nbytes]) == checksum
        position = places.nbytes
        for place in places:
            stored = group[position : position + place["nbytes"]]
            assert xxhash.xxh3_64_intdigest(stored) == place["checksum"]
            raw = zlib.decompress(stored)
            assert len(raw) == place["raw_nbytes"]
            yield raw
            position += len(stored)
        assert position == len(group)

    def samples(self):
        """For every sample its attributes and, by path, what the footer says of each object."""
        for raw in self.rows:
            counts = dict(
                zip(("object", "axis", "chunk"), struct.unpack_from("<3I", raw), strict=True)
            )
            column, position = {}, 16
            for row in table("Footer", "column of a row", "type"):
                times, _, unit = row["one entry per"].rpartition(" bytes per ")
                count = counts[unit] * int(times or 1)
                name, dtype = one(row["column of a row"]), NUMPY_DTYPES[row["type"]]
                column[name] = np.frombuffer(raw, dtype, count, position).tolist()
                position += count * np.dtype(dtype).itemsize
            assert struct.unpack_from("<I", raw, 12)[0] == len(raw) - position
            yield json.loads(raw[position:]), dict(self._objects(column))

    def _objects(self, column):
        axis = chunk = previous = 0
        for row, name in enumerate(column["object_name"]):
            axes = slice(axis, axis + column["object_ndim"][row])
            chunks = []
            for index in range(chunk, chunk + column["object_num_chunks"][row]):
                offset = previous + column["chunk_gap"][index]
                previous = offset + column["chunk_nbytes"][index]
                checksum = column["chunk_checksum"][index]
                chunks.append((offset, column["chunk_nbytes"][index], checksum))
            yield (
                self.columns["names"][name],
                {
                    "attrs": self.columns["attrs"][column["object_attrs"][row]],
                    "type": self.directory["types"][column["object_type"][row]],
                    "codec": self.directory["codecs"][column["object_codec"][row]],
                    "shape": tuple(column["object_dims"][axes]),
                    "chunk": tuple(column["object_chunk_dims"][axes]),
                    "digest": bytes(column["object_digest"][16 * row : 16 * row + 16]).hex(),
                    "chunks": chunks,
                },
            )
            axis = axes.stop
            chunk += len(chunks)
        assert (axis, chunk) == (len(column["object_dims"]), len(column["chunk_gap"]))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An archive with an array of several chunks, whose last one hangs over the edge."""
    folder = tmp_path_factory.mktemp("large")
    states = np.arange(2500 * 1001, dtype="f4").reshape(2500, 1001)
    batch = folder / "batch.pkl"
    batch.write_bytes(pickle.dumps([{"hidden_states": [states], "attentions": []}]))
    h5traces.convert(batch, folder / "large.h5", precision=PrecisionOptions(dtype="float32"))
    return folder / "large.h5"


@pytest.mark.parametrize("which", ["example", "rich", "large", "compact"])
def test_footer_by_the_tables_agrees_with_hdf5(which, request):
    path = request.getfixturevalue(which)
    path = next(path[0].glob("*.h5")) if isinstance(path, tuple) else path
    data = path.read_bytes()
    footer = FooterBySpec(data)
    num_chunks = 0
    with h5py.File(path) as file:
        assert footer.directory["archive"] == plain_attributes(file)
        assert footer.directory["num_samples"] == len(file["samples"])
        kinds = {name: plain_attributes(kind) for name, kind in file["kinds"].items()}
        assert footer.directory["kinds"] == kinds
        listed = list(footer.samples())
        of_samples = [attrs for attrs, _ in listed][: len(file["samples"])]
        ids = [[each.get(key) for each in of_samples] for key in ("sample_id", "generation_index")]
        assert footer.columns["ids"] == ids
        groups = list(file["samples"].values())
        assert footer.directory.get("has_scales", 0) == ("scales" in file)
        groups += [file] if "scales" in file else []
        for (attrs, objects), sample in zip(listed, groups, strict=True):
            assert attrs == ({} if sample is file else plain_attributes(sample))
            paths = []
            sample.visit(paths.append)
            if sample is file:
                paths = [each for each in paths if each.partition("/")[0] == "scales"]
            assert list(objects) == sorted(paths)
            for path, entry in objects.items():
                stored = plain_attributes(sample[path])
                digest = stored.pop("digest", "0" * 32)
                others = {k: v for k, v in stored.items() if k not in IMAGES}
                assert (entry["digest"], entry["attrs"]) == (digest, others)
                if isinstance(sample[path], h5py.Group):
                    assert (entry["type"], entry["codec"], entry["chunks"]) == ("", "", [])
                    continue
                dataset = sample[path]
                assert (entry["shape"], entry["chunk"]) == (dataset.shape, dataset.chunks)
                assert dataset.id.get_num_chunks() == len(entry["chunks"])
                grid = np.ndindex(
                    *(
                        math.ceil(length / size)
                        for length, size in zip(dataset.shape, dataset.chunks, strict=True)
                    )
                )
                for place, (offset, nbytes, checksum) in zip(grid, entry["chunks"], strict=True):
                    first = tuple(i * c for i, c in zip(place, dataset.chunks, strict=True))
                    info = dataset.id.get_chunk_info_by_coord(first)
                    assert (info.byte_offset, info.size) == (offset, nbytes)
                    stored = data[offset : offset + nbytes]
                    assert xxhash.xxh3_64_intdigest(stored) == checksum
                    zlib.decompress(stored)
                    num_chunks += 1
    assert num_chunks >= 3


def test_footer_is_gone_after_opening_for_writing(example, tmp_path):
    copy = tmp_path / "copy.h5"
    copy.write_bytes(example.read_bytes())
    start = FooterBySpec(copy.read_bytes()).start
    with h5py.File(copy, "r+"):
        pass
    assert copy.stat().st_size == start


# Tools that were not written here


@pytest.mark.h5tools
def test_h5dump_shows_the_documented_attributes(example):
    dump = subprocess.run(
        ["h5dump", "-A", str(example)], capture_output=True, text=True, check=True
    ).stdout
    with h5py.File(example) as file:
        shown = set(re.findall(r'ATTRIBUTE "(\w+)"', dump))
        assert set(file.attrs) | set(file["samples/00000000"].attrs) <= shown
    documented = {
        name
        for title in ("Root group", "Kinds", "Samples", "Layered arrays")
        for row in table(title, *(OF_DATASETS if title == "Layered arrays" else ["attribute"]))
        for name in names(row["attribute"])
    }
    assert shown <= documented
    assert 'DATASET "layer_005"' in dump
    assert '"final_norm"' in dump
    assert "H5T_STR_NULLPAD" in dump
    assert "H5T_STR_NULLTERM" not in dump
    assert "H5T_VARIABLE" not in dump


@pytest.mark.h5tools
def test_h5dump_prints_bfloat16(rich):
    path, trace = rich
    dataset = "/samples/00000000/hidden_states/layer_001"
    dump = subprocess.run(
        ["h5dump", "-d", dataset, "-m", "%.9g", "-y", "-w", "0", str(path / "archive.h5")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    data = re.search(r"DATA \{(.*?)\}", dump, re.DOTALL)[1]
    numbers = np.array([float(each) for each in data.replace(",", " ").split()], "f4")
    np.testing.assert_array_equal(numbers.reshape(3, 4), trace["hidden_states"][1])
