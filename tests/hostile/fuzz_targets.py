"""What a coverage-guided fuzzer calls: readers of sources, the chunk decoders, and `open`.

Each target takes any bytes, and raises only where something is wrong with h5traces: an exception
that is not of ours, other values than a stock library gives, an import that the data asked for.
`SEEDS` gives the inputs that a run starts from.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import datetime
import decimal
import fractions
import importlib
import io
import json
import os
import pickle
import pkgutil
import struct
import sys
import tempfile
import types
import uuid
import warnings
import zlib
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import probe
import pyarrow as pa
import specimen
import test_pickles
import test_sources
import test_table_attacks
import torch
import zstandard
from legacy_batches import LAYOUTS, dumps, make_batch
from pyarrow import parquet as pq

import h5traces.sources
from h5traces.errors import ConversionError, H5TracesError
from h5traces.meaning.options import ReadingOptions
from h5traces.sources.array_files import TABLES
from h5traces.sources.opening import open_source
from h5traces.sources.pickle.source import PickleLimits
from h5traces.sources.pickle.stream import BatchStream
from h5traces.sources.signatures import identify
from h5traces.storage.codecs import CODECS
from h5traces.storage.hdf5.others import OtherHdf5, named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGEST_SEED = 8192
_LENGTH = struct.Struct("<I")
_CHUNK_HEAD = struct.Struct("<BBH")
_ITEMSIZES = (1, 2, 4, 8)
_NAMES = tuple(CODECS)
# A fuzzer's inputs are short; what is made of them should be, too.
_LIMITS = PickleLimits(max_created_nbytes=1 << 20, max_item_opcodes=20_000)


_EXAMPLES = Path(__file__).parents[2] / "examples" / "mappings"
_FILTERED: tuple[dict[str, Any], ...] = (
    {"compression": "gzip", "shuffle": True},
    {"compression": "lzf", "fletcher32": True},
    {"scaleoffset": 3, "maxshape": (None, None, 4)},
)
_ON_FIRST_USE = ("h5traces.", "encodings.")
# Readers are loaded on first use, with the libraries they need: here, so that no input does it.
for _reader in pkgutil.walk_packages(h5traces.sources.__path__, "h5traces.sources."):
    importlib.import_module(_reader.name)


class FindingError(Exception):
    """A target did what it must not."""


@cache
def _folder() -> Path:
    # In memory where that is possible; a file for every input.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(dir=where))


# --- the unpickler ---------------------------------------------------------------------------


def unpickle(data: bytes) -> None:
    """Read a batch; nothing may be imported for it."""
    path = _folder() / "batch.pkl"
    path.write_bytes(data)
    # Protocol 0 is written in this encoding, which Python imports when it is first used.
    codecs.lookup("raw_unicode_escape")
    before = set(sys.modules)
    with contextlib.suppress(ConversionError):
        read_batch(path)
    if more := set(sys.modules) - before:
        message = f"the pickle had {sorted(more)} imported"
        raise FindingError(message)


def read_batch(path: Path) -> None:
    """Every item of a batch."""
    # Once at once, once in passes, which are two ways through a dict.
    for whole_nbytes in (1 << 20, 0):
        with (
            contextlib.suppress(ConversionError),
            BatchStream(path, limits=_LIMITS, whole_nbytes=whole_nbytes) as batch,
        ):
            for _ in batch:
                pass


def pickles() -> Iterator[bytes]:
    """Honest batches of all layouts and protocols, and the attacks that are short."""
    for layout in LAYOUTS:
        batch = make_batch(layout, num_samples=1)
        for protocol in range(6):
            yield dumps(batch, protocol)
        yield dumps(batch, numpy1=True)
    yield from _other_containers()
    for build, _ in test_pickles.ATTACKS.values():
        yield build()


# --- other sources ---------------------------------------------------------------------------


def read_source(data: bytes) -> None:
    """Read a file of any kind that its content says; nothing may be imported for it."""
    path = _folder() / "source"
    path.write_bytes(data)
    before = set(sys.modules)
    with contextlib.suppress(H5TracesError):
        test_sources.read(path)
    # Readers and encodings are loaded on first use.
    more = {each for each in set(sys.modules) - before if not each.startswith(_ON_FIRST_USE)}
    if more:
        message = f"the file had {sorted(more)} imported"
        raise FindingError(message)


def torch_files() -> Iterator[bytes]:
    """Honest files of torch.save in both formats, and the attacks that are short."""
    batch = make_batch("full_pkl", num_samples=1)
    batch[0]["more"] = {
        name: torch.arange(3).to(getattr(torch, name))
        for name in ("bfloat16", "int64", "bool", "float8_e5m2", "complex64")
    }
    for is_zip in (True, False):
        for protocol in range(2, 6):
            for value in (batch, [{"hidden_states": [torch.zeros(4, 4)[1:, ::2]]}], []):
                buffer = io.BytesIO()
                torch.save(
                    value,
                    buffer,
                    pickle_protocol=protocol,
                    _use_new_zipfile_serialization=is_zip,
                )
                yield buffer.getvalue()
    yield from test_sources.short_attacks("torch")


def safetensors() -> Iterator[bytes]:
    """Files as serving engines write them, of every dtype, and the attacks that are short."""
    for dtype, width in (("F32", 4), ("BF16", 2), ("F8_E4M3", 1)):
        tensors = {"hidden_states": (dtype, [3, 2, 4], 24 * width), "token_ids": ("I64", [3], 24)}
        if width == 1:
            tensors["hidden_states_scales"] = ("F32", [3, 1, 1], 12)
        yield test_sources.safetensors(tensors)
        yield test_sources.safetensors(tensors, {"__metadata__": {"model": "m"}})
    for name in ("layer_0", "model.layers.0", "hidden_states_0", "q0/hidden_states", "x"):
        yield test_sources.safetensors({name: ("F16", [3, 4], 24)})
        yield test_sources.safetensors({name: ("F16", [2, 3, 4], 48), "tokens": ("I32", [3], 12)})
    yield from test_sources.short_attacks("safetensors")


def numpy_files() -> Iterator[bytes]:
    """Files of numpy.save and savez, and the attacks that are short."""
    states = np.zeros((2, 3, 4), np.float16)
    for save in (np.savez, np.savez_compressed):
        for more in ({}, {"tokens": np.arange(3)}, {"gold": np.array(["a", "bb"]), "label": 1}):
            buffer = io.BytesIO()
            save(buffer, hidden_states=states, **more)
            yield buffer.getvalue()
    for array in (states, np.asfortranarray(states), states.astype(">f8"), np.array("text")):
        buffer = io.BytesIO()
        np.save(buffer, array)
        yield buffer.getvalue()
    yield from test_sources.short_attacks("numpy")


# --- tables, mappings, HDF5 ------------------------------------------------------------------


def read_table(data: bytes) -> None:
    """Read every cell of a table, then its samples."""
    path = _folder() / "table"
    path.write_bytes(data)
    kind = identify(path).id
    if kind in TABLES:
        with contextlib.suppress(H5TracesError):
            test_table_attacks.read(path, kind)
    read_source(data)


def tables() -> Iterator[bytes]:
    """Honest tables of Parquet, Arrow and JSON by codecs, and the attacks that are short."""
    row = {"question_id": "q", "hidden_states": [[[1.5, 2.0]] * 2] * 3, "tokens": [1, 2]}
    more = {"tokens_decoded": ["a", "b"], "label": 1, "other": {"a": [None, "x"]}, "none": None}
    for rows in ([row], [row | more] * 3):
        table = pa.Table.from_pylist(rows)
        for codec in ("none", "zstd", "snappy"):
            for version in ("1.0", "2.0"):
                sink = io.BytesIO()
                pq.write_table(table, sink, compression=codec, data_page_version=version)
                yield sink.getvalue()
        for batch in table.to_batches():
            yield test_table_attacks.arrow(batch)
            yield test_table_attacks.arrow(batch, stream=True, codec="zstd")
            yield test_table_attacks.arrow(batch, codec="lz4")
        yield "".join(json.dumps(each) + "\n" for each in rows).encode()
        yield json.dumps(rows).encode()
    small = ("fewer bytes", "offsets beyond", "indices beyond", "unlisted", "no schema")
    yield from (test_table_attacks.ARROW[name]() for name in small)


@cache
def _mapped() -> Path:
    path = _folder() / "arrays.npz"
    states = np.zeros((2, 3, 4), np.float32)
    names = {f"layers.{number}": states[number] for number in range(2)}
    np.savez(path, x=states, tokens=np.arange(3), **names, **{"q0/x": states, "q1/x": states})
    return path


def read_mapped(data: bytes) -> None:
    """Read a file of arrays as a mapping says."""
    path = _mapped().with_name("mapping.toml")
    path.write_bytes(data)
    options = ReadingOptions(mapping=path)
    with contextlib.suppress(H5TracesError), open_source(_mapped(), options) as source:
        for number, record in enumerate(source.records()):
            if number > 100 or len(record.sample_id) > 10_000:
                message = "a mapping makes many samples of a few"
                raise FindingError(message)


def mappings() -> Iterator[bytes]:
    """Mappings that fit the file, those that ship as examples, and some that do not fit."""
    states = '[fields.hidden_states]\nname = "x"\naxes = "layer token hidden"\n'
    yield from (
        states.encode(),
        f'first_state = "block"\nignore = ["q*"]\n{states}layers = [3, 5]\n'.encode(),
        states.replace('"x"', '"{id}/x"').encode(),
        b'[fields]\nhidden_states = "layers.{layer}"\ntokens = "tokens"\n',
        states.replace("layer token", "batch token").encode(),
        b'[fields.hidden_states]\nname = "layers.{layer}"\nembedding = "x"\nlayers = [1, 0]\n',
        states.replace("axes", 'dtype = "bfloat16"\naxes').encode(),
        f'version = 1\nkind = "npz"\nfile = "{{id}}.npz"\n{states}'.encode(),
        f'{states}[array]\ndtype = "float32"\nshape = [-1, 3, 4]\noffset = 2\n'.encode(),
    )
    yield from (path.read_bytes() for path in sorted(_EXAMPLES.glob("*.toml")))


def read_hdf5(data: bytes) -> None:
    """Read every dataset and attribute of a foreign file."""
    path = _folder() / "other.h5"
    path.write_bytes(data)
    try:
        file = OtherHdf5(path)
    except H5TracesError:
        return
    try:
        for _, each in named(file):
            with contextlib.suppress(H5TracesError):
                _ = each.shape, each.dtype, each.read()
    finally:
        file.close()


def hdf5_files() -> Iterator[bytes]:
    """Small files in old and new forms, with filters, texts and attributes."""
    states = np.zeros((2, 3, 4), np.float32)
    for libver in ("earliest", "latest"):
        for options in ({}, {"chunks": (1, 3, 4)}, *_FILTERED):
            sink = io.BytesIO()
            with h5py.File(sink, "w", libver=libver) as file:
                file.create_group("layer_0").create_dataset("x", data=states, **options)
                file["layer_0"].attrs["n"] = np.arange(3)
            yield sink.getvalue()
            with h5py.File(sink, "a", libver=libver) as file:
                file.attrs["text"] = "abc"
                file["texts"] = np.array(["a", "bb"], dtype=h5py.string_dtype())
            yield sink.getvalue()


def _other_containers() -> Iterator[bytes]:
    """Small batches in other containers, and values of every type that Python has."""
    state = np.zeros((1, 2), np.float16)
    row = {"hidden_states": [state, state], "question_id": "q"}
    typed = {
        **row,
        "values": [
            {1, "a", (1, 2)},
            frozenset({b"a"}),
            collections.deque([1], 3),
            collections.OrderedDict(a=1),
            collections.defaultdict(list, a=[]),
            collections.Counter("aab"),
            types.SimpleNamespace(a=1),
            argparse.Namespace(b=2),
            PurePosixPath("a/b"),
            datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
            datetime.timedelta(1),
            decimal.Decimal("1.5"),
            fractions.Fraction(1, 3),
            uuid.UUID(int=1),
            1j,
            range(3),
            slice(1),
            np.array(["a", None], dtype=object),
            np.array(["2024"], "M8[Y]"),
        ],
    }
    columns = {"hidden_states": [[state]] * 2, "question_ids": ["q", "r"], "labels": [0, 1]}
    for value in (
        [typed], row, {"q": row, "r": row}, (row,), (row, row), (row,) * 4, columns,
        {"data": [row], "labels": [1]}, {1: {"hidden_states": [state]}},
    ):  # fmt: skip
        for protocol in (0, 2, 4, 5):
            yield pickle.dumps(value, protocol)
    yield pickle.dumps(row) + pickle.dumps([row])


# --- chunks ----------------------------------------------------------------------------------


def decode_chunk(data: bytes) -> None:
    """Undo a codec: first its number, the size and number of elements, then the stored bytes."""
    if len(data) < _CHUNK_HEAD.size:
        return
    number, width, count = _CHUNK_HEAD.unpack_from(data)
    codec, itemsize = CODECS[_NAMES[number % len(_NAMES)]], _ITEMSIZES[width % len(_ITEMSIZES)]
    stored, out = data[_CHUNK_HEAD.size :], bytearray(count * itemsize)
    if not out:
        return
    try:
        codec.decode(memoryview(stored), memoryview(out), itemsize)
    except ValueError:
        return
    expected = _stock(codec.name, stored, itemsize)
    if expected is not None and expected != out:
        message = f"{codec.name} gives other bytes than the stock library"
        raise FindingError(message)


def _stock(codec: str, stored: bytes, itemsize: int) -> bytes | None:
    """What others make of a chunk that h5traces took for intact; None if nobody is asked."""
    if codec in ("gzip", "deflate"):
        raw = zlib.decompress(stored)
    elif codec == "zstd":
        raw = zstandard.ZstdDecompressor().decompress(stored)
    else:
        return None
    width = 1 if codec == "deflate" else itemsize
    return np.frombuffer(raw, np.uint8).reshape(width, -1).T.tobytes()


def chunks() -> Iterator[bytes]:
    """Chunks of every codec: noise, numbers that compress, zeros."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(_NAMES):
        for width, itemsize in enumerate(_ITEMSIZES):
            for values in (
                rng.integers(0, 256, 40 * itemsize),
                rng.integers(0, 3, 500 * itemsize),
                np.zeros(900 * itemsize),
            ):
                raw = values.astype(np.uint8).tobytes()
                stored = CODECS[name].encode(memoryview(raw), itemsize)
                yield _CHUNK_HEAD.pack(number, width, len(raw) // itemsize) + stored


# --- open ------------------------------------------------------------------------------------


@cache
def _archive() -> tuple[Path, dict[str, Any], dict[str, bytes]]:
    path = _folder() / "archive.h5"
    specimen.write(path)
    return path, *specimen.footer_of(path)


def read_archive(data: bytes) -> None:
    """Read an archive whose footer is what the data say, with right checksums."""
    path, _, _ = _archive()
    directory, *columns = _split(data, 1 + len(specimen.PARTS))
    try:
        document = json.loads(directory)
    except (ValueError, RecursionError):
        document = None
    tables = dict(zip(specimen.PARTS, columns, strict=True))
    if isinstance(document, dict):
        specimen.seal(path, document, tables)
    else:
        specimen.seal(path, {}, tables, directory=directory or b" ")
    with warnings.catch_warnings(), contextlib.suppress(H5TracesError):
        warnings.simplefilter("ignore")
        probe.read(str(path))


def _split(data: bytes, count: int) -> list[bytes]:
    """So many parts, each behind its length; what is missing is empty."""
    parts, position = [], 0
    for _ in range(count):
        (length,) = _LENGTH.unpack(data[position : position + 4].ljust(4, b"\0"))
        parts.append(data[position + 4 : position + 4 + length])
        position = min(position + 4 + length, len(data))
    return parts


def footers() -> Iterator[bytes]:
    """The footer of a real archive, and it again with single columns emptied."""
    _, document, columns = _archive()
    directory = json.dumps(document).encode()
    parts = [directory, *(columns[name] for name in specimen.PARTS)]
    for missing in (None, *range(len(parts))):
        kept = [b"" if number == missing else part for number, part in enumerate(parts)]
        yield b"".join(_LENGTH.pack(len(part)) + part for part in kept)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "unpickler": unpickle,
    "torch": read_source,
    "safetensors": read_source,
    "numpy": read_source,
    "tables": read_table,
    "mappings": read_mapped,
    "hdf5": read_hdf5,
    "chunks": decode_chunk,
    "open": read_archive,
}
SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "unpickler": pickles,
    "torch": torch_files,
    "safetensors": safetensors,
    "numpy": numpy_files,
    "tables": tables,
    "mappings": mappings,
    "hdf5": hdf5_files,
    "chunks": chunks,
    "open": footers,
}
