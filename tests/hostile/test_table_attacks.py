"""Tables of Parquet, Arrow and JSON made to exhaust memory or time, or to crash their readers.

pyarrow believes what a file says of its sizes: most of these take gigabytes if they are read as
they are, or lead out of the file.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc
from pyarrow import parquet as pq

from h5traces.errors import ConversionError
from h5traces.sources.arrow_sizes import inflated_nbytes, read_page
from h5traces.sources.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SECONDS = 10  # of a processor; what takes longer hangs
MAX_EXTRA_NBYTES = 300 << 20
MILLION = 1_000_000
LONG = "x" * 900_000


def read(path: Path, kind: str) -> list[dict[str, Any]]:
    """Every cell of a table."""
    table = open_table(path, kind)
    try:
        return [{name: each.read() for name, each in group.items()} for group in table.groups()]
    finally:
        table.close()


# --- Arrow ----------------------------------------------------------------------------------------


def arrow(batch: Any, *, stream: bool = False, codec: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    write = ipc.new_stream if stream else ipc.new_file
    with write(sink, batch.schema, options=ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write(batch)
    return sink.getvalue().to_pybytes()


def column(values: Any, name: str = "hidden_states") -> Any:
    return pa.record_batch([values], names=[name])


def inflating(codec: str, nbytes: int, *, stream: bool = False) -> bytes:
    """Numbers, all zero, that take a hundredth or less of their size."""
    zeros = pa.array(np.zeros(nbytes // 4, np.float32))
    rows = pa.FixedSizeListArray.from_arrays(zeros, len(zeros) // 4)
    return arrow(column(rows), codec=codec, stream=stream)


def lying_length(says: int) -> bytes:
    """A compressed buffer that claims to become so many bytes."""
    data = inflating("zstd", 4 * MILLION)
    claim = struct.pack("<q", 4 * MILLION)
    assert data.count(claim) == 1
    return data.replace(claim, struct.pack("<q", says))


def dictionary(num_rows: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([LONG]))


def one_row(values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def offsets(*values: int) -> bytes:
    """Lists of numbers whose offsets are others than were written."""
    found = arrow(column(pa.array([[1.5] * 7, [2.5] * 6])))
    honest = struct.pack("<3i", 0, 7, 13)
    assert found.count(honest) == 1
    return found.replace(honest, struct.pack("<3i", *values))


def indices(value: int) -> bytes:
    """A dictionary's index that leads out of it."""
    coded = pa.DictionaryArray.from_arrays(pa.array([77, 77], pa.int32()), pa.array(["a"] * 78))
    honest = struct.pack("<2i", 77, 77)
    found = arrow(column(coded))
    assert found.count(honest) == 1
    return found.replace(honest, struct.pack("<2i", value, value))


def views() -> Any:
    """One text, named by every element of a row."""
    one = struct.pack("<i4s2i", len(LONG), LONG[:4].encode(), 0, 0)
    buffers = [None, pa.py_buffer(one * 1000), pa.py_buffer(LONG.encode())]
    return one_row(pa.Array.from_buffers(pa.string_view(), 1000, buffers))


def unlisted() -> bytes:
    """A file that lists fewer batches than it holds: one of two, spliced in."""
    batch = column(pa.array([1.5, 2.5]))
    one = arrow(batch)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, batch.schema) as writer:
        writer.write(batch)
        writer.write(batch)
    two = sink.getvalue().to_pybytes()
    end = b"\xff\xff\xff\xff\0\0\0\0"
    assert one.count(end) == two.count(end) == 1
    return two[: two.index(end)] + one[one.index(end) :]


ARROW: dict[str, Callable[[], bytes]] = {
    "zstd": lambda: inflating("zstd", 80 * MILLION),
    "zstd stream": lambda: inflating("zstd", 80 * MILLION, stream=True),
    "lz4": lambda: inflating("lz4", 120 * MILLION),
    "exabytes": lambda: lying_length(1 << 60),
    "gigabytes": lambda: lying_length(1 << 33),
    "fewer bytes": lambda: lying_length(64),
    "negative": lambda: lying_length(-5),
    "dictionary of zstd": lambda: arrow(
        column(pa.DictionaryArray.from_arrays([0], pa.array(["x" * 80 * MILLION]))), codec="zstd"
    ),
    "one text, many times": lambda: arrow(column(one_row(dictionary(20_000)))),
    "views of one text": lambda: arrow(column(views())),
    "many nulls": lambda: arrow(column(one_row(pa.nulls(1 << 30)))),
    "many empty structures": lambda: arrow(
        column(one_row(pa.StructArray.from_buffers(pa.struct([]), 1 << 30, [None], children=[])))
    ),
    "runs": lambda: arrow(column(one_row(pa.RunEndEncodedArray.from_arrays([1 << 30], ["x"])))),
    "views of lists": lambda: arrow(
        column(
            one_row(
                pa.ListViewArray.from_arrays(
                    [0] * 10_000, [10_000] * 10_000, pa.array(range(10_000))
                )
            )
        )
    ),
    "offsets beyond": lambda: offsets(0, 1 << 30, 1 << 30),
    "offsets before": lambda: offsets(-(1 << 30), 7, 13),
    "offsets back": lambda: offsets(0, 13, 7),
    "indices beyond": lambda: indices(1 << 30),
    "indices before": lambda: indices(-7),
    "unlisted": unlisted,
    "cut off": lambda: arrow(column(pa.array([1.5] * 1000)))[:-500],
    "stream cut off": lambda: arrow(column(pa.array([1.5] * 1000)), stream=True)[:-500],
    "no schema": lambda: b"ARROW1\0\0" + b"\xff" * 4 + bytes(4) + bytes(99) + b"ARROW1",
}


# --- Parquet --------------------------------------------------------------------------------------


def parquet(table: Any, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue().to_pybytes()


def _varint(value: int, width: int = 0) -> bytes:
    """An integer of Thrift's compact protocol, in so many bytes."""
    value *= 2
    found = bytearray()
    while value >= 128 or len(found) + 1 < width:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def claiming(data: bytes, **changes: tuple[int, int]) -> bytes:
    """A file whose footer says other numbers than it did."""
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[at:]
    for before, after in changes.values():
        old = _varint(before)
        assert old in footer
        footer = footer.replace(old, _varint(after, len(old)))
    return data[:at] + footer


def zeros(num_values: int, *, dictionary: bool) -> tuple[bytes, Any]:
    """One row of zeros, and what the footer says of its column."""
    table = pa.table({"hidden_states": one_row(pa.array(np.zeros(num_values, np.float32)))})
    data = parquet(table, use_dictionary=dictionary, data_page_size=1 << 30)
    return data, pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)


def lying_size() -> bytes:
    """A page that becomes much more than its column is said to hold."""
    data, column = zeros(20 * MILLION, dictionary=False)
    sizes = column.total_uncompressed_size
    return claiming(data, size=(sizes, 4000), values=(column.num_values, 1000))


def lying_count() -> bytes:
    """Pages with more values than their column: a run of one value, a few bytes long."""
    data, column = zeros(20 * MILLION, dictionary=True)
    return claiming(data, values=(column.num_values, 1000))


def page_header(**fields: int) -> bytes:
    """A page's header: its type, sizes and values."""
    sizes = b"".join(b"\x15" + _varint(fields[name]) for name in ("kind", "nbytes", "stored"))
    return sizes + b"\x2c\x15" + _varint(fields["values"]) + b"\x15\0\x15\x06\x15\x06\0\0"


def footer_of(num_chunks: int) -> bytes:
    """A footer of empty column chunks: two bytes each in the file, hundreds in memory."""
    group = b"\x19\xfc" + bytes((num_chunks & 127 | 128, num_chunks >> 7 & 127 | 128))
    group += bytes((num_chunks >> 14,)) + b"\0" * num_chunks + b"\x16\0\x16\0\0"
    schema = b"\x29\x1c\x48\x01a\x15\0\0"
    footer = b"\x15\x02" + schema + b"\x16\0\x19\x1c" + group + b"\0"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def wrong_counts() -> bytes:
    """A list that is said to need no level for what may be missing, which its counts are for."""
    data = parquet(pa.table({"hidden_states": one_row(pa.array([1.5] * 3))}))
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # The repetition of the first field: optional becomes required.
    assert b"\x25\x02" in data[at:]
    return data[:at] + data[at:].replace(b"\x25\x02", b"\x25\0", 1)


PARQUET: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: zeros(20 * MILLION, dictionary=False)[0],
    "runs": lambda: zeros(20 * MILLION, dictionary=True)[0],
    "counts that do not fit": wrong_counts,
    "page of another size": lying_size,
    "page of more values": lying_count,
    "one text, many times": lambda: parquet(pa.table({"x": one_row(pa.array([LONG] * 400))})),
    "many chunks": lambda: footer_of(MILLION),
    "long footer": lambda: (
        b"PAR1" + bytes(20 * MILLION) + struct.pack("<I", 20 * MILLION) + b"PAR1"
    ),
    "footer elsewhere": lambda: b"PAR1" + struct.pack("<I", 0x7FFFFFFF) + b"PAR1",
    "no footer": lambda: b"PAR1",
    "cut off": lambda: zeros(1000, dictionary=True)[0][:-20],
}


# --- JSON -----------------------------------------------------------------------------------------

JSON: dict[str, Callable[[], bytes]] = {
    "deep": lambda: b'{"a":' * MILLION,
    "deep lists": lambda: b'{"a":' + b"[" * MILLION + b"\n{",
    "long number": lambda: b'{"a":' + b"9" * MILLION + b"}\n{}",
    "zeros": lambda: b'{"a": [' + b"0," * 17 * MILLION + b"0]}\n{}",
    "short lists": lambda: b'{"a": [' + b"[0]," * 5 * MILLION + b"0]}\n{}",
    "surrogates": lambda: b'{"a": "\xed\xa0\x80"}\n{}',
    "names twice": lambda: b'{"a": 1, "a": 2}\n{}',
}
KINDS = {"arrow": ARROW, "parquet": PARQUET, "jsonl": JSON}
ATTACKS = [(kind, name) for kind, attacks in KINDS.items() for name in attacks]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all of them, made by another process: to make some takes memory."""
    folder = tmp_path_factory.mktemp("made")
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import test_table_attacks
        from pathlib import Path

        for kind, name in test_table_attacks.ATTACKS:
            Path(sys.argv[2], f"{kind}-{name}").write_bytes(test_table_attacks.KINDS[kind][name]())
    """
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", textwrap.dedent(script), here, str(folder)]
    subprocess.run(command, check=True, timeout=100)
    return folder


@pytest.fixture(scope="module")
def outcomes(made: Path) -> dict[str, Any]:
    """What came of each, in its own process."""
    script = """
        import json, os, resource, sys, time
        sys.path.insert(0, sys.argv[1])
        import test_table_attacks
        from pathlib import Path

        def used(who=resource.RUSAGE_SELF):
            found = resource.getrusage(who)
            return found.ru_utime + found.ru_stime, found.ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )

        folder, before = Path(sys.argv[2]), set(sys.modules)
        for kind, name in test_table_attacks.ATTACKS:
            inlet, outlet = os.pipe()
            child = os.fork()
            if child == 0:
                seconds, nbytes = used()
                found = {"outcome": "read"}
                try:
                    test_table_attacks.read(folder / f"{kind}-{name}", kind)
                except test_table_attacks.ConversionError as error:
                    found = {"outcome": "rejected", "message": str(error)}
                except BaseException as error:
                    found = {"outcome": repr(error)[:500]}
                more_seconds, more_nbytes = used()
                found["seconds"] = more_seconds - seconds
                found["nbytes"] = more_nbytes - nbytes
                os.write(outlet, json.dumps(found).encode()[:60_000])
                os._exit(0)
            os.close(outlet)
            said = os.read(inlet, 1 << 16)
            os.close(inlet)
            _, status = os.waitpid(child, 0)
            found = json.loads(said) if said else {"outcome": f"status {status}"}
            print(json.dumps([f"{kind}-{name}", found]), flush=True)
    """
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), here, str(made)],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize(("kind", "name"), ATTACKS)
def test_attacks_end_at_once(made: Path, outcomes: dict[str, Any], kind: str, name: str) -> None:
    found = outcomes[f"{kind}-{name}"]
    assert found["outcome"] == "rejected", found
    assert str(made / f"{kind}-{name}") in found["message"]
    assert found["seconds"] < MAX_SECONDS
    assert found["nbytes"] < MAX_EXTRA_NBYTES


def test_nothing_is_written(made: Path, outcomes: dict[str, Any]) -> None:
    assert len(outcomes) == len(ATTACKS)
    assert len(list(made.iterdir())) == len(ATTACKS)


# --- what honest tables hold is read --------------------------------------------------------------


def honest() -> Any:
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(3, 5, 4)).astype(np.float32).tolist() for _ in range(7)]
    return pa.table(
        {
            "hidden_states": pa.array(states, pa.list_(pa.list_(pa.list_(pa.float32())))),
            "question_id": [f"q{number}" for number in range(7)],
            "prompt": ["a long prompt, the same in all"] * 6 + [None],
            "tokens_decoded": [["a", "b", "a"]] * 7,
            "more": [{"a": "x", "b": [1, None]}] * 7,
            "flags": [[True, False]] * 7,
            "coded": pa.array(["u", "v", "u", "u", "v", "u", None]).dictionary_encode(),
        }
    )


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
@pytest.mark.parametrize("stream", [False, True])
def test_honest_arrow(tmp_path: Path, codec: str | None, stream: bool) -> None:
    table = honest()
    batches = [pa.concat_tables([table]).to_batches()[0]] * 2
    sink = pa.BufferOutputStream()
    write = ipc.new_stream if stream else ipc.new_file
    with write(sink, table.schema, options=ipc.IpcWriteOptions(compression=codec)) as writer:
        for batch in batches:
            writer.write(batch)
    path = tmp_path / "a.arrow"
    path.write_bytes(sink.getvalue().to_pybytes())
    as_expected(read(path, "arrow"), table.to_pylist() * 2)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "zstd", "snappy", "gzip"])
@pytest.mark.parametrize("size", [64, 1 << 20])
def test_honest_parquet(tmp_path: Path, version: str, codec: str, size: int) -> None:
    table = honest()
    if version == "2.0" and size == 64:
        # pyarrow 26 loses a row of the file it wrote.
        table = table.drop(["flags"])
    path = tmp_path / "a.parquet"
    options: dict[str, Any] = {"data_page_version": version, "compression": codec}
    pq.write_table(table, path, row_group_size=3, data_page_size=size, **options)
    as_expected(read(path, "parquet"), table.to_pylist())


def test_rows_that_pyarrow_loses(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options: dict[str, Any] = {"data_page_version": "2.0", "data_page_size": 64}
    pq.write_table(honest(), path, row_group_size=3, **options)
    with pytest.raises(ConversionError, match=r"pyarrow (reads 0 rows of row group 2|cannot read)"):
        read(path, "parquet")


def as_expected(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert list(row) == list(wanted)
        for name, value in row.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, np.array(wanted[name], value.dtype))
            else:
                assert value == wanted[name]


def test_a_link_to_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(arrow(column(pa.array([1.5]))))
    (tmp_path / "link.arrow").symlink_to("a.arrow")
    assert read(tmp_path / "link.arrow", "arrow") == [{"hidden_states": 1.5}]


# --- the sizes themselves -------------------------------------------------------------------------


def test_sizes_of_messages() -> None:
    """What buffers say they become is what pyarrow makes of them."""
    values = pa.array(np.arange(100_000, dtype=np.int64))
    data = pa.py_buffer(arrow(column(values), stream=True, codec="zstd"))
    found = [
        inflated_nbytes(each.metadata.to_pybytes(), each.body or b"")
        for each in ipc.MessageReader.open_stream(pa.BufferReader(data))
    ]
    assert found == [0, values.nbytes]
    plain = pa.py_buffer(arrow(column(values), stream=True))
    messages = ipc.MessageReader.open_stream(pa.BufferReader(plain))
    assert [inflated_nbytes(each.metadata.to_pybytes(), each.body or b"") for each in messages] == [
        0,
        0,
    ]
    with pytest.raises(ValueError, match="a message is damaged"):
        inflated_nbytes(b"\xff" * 40, b"")


def test_sizes_of_pages() -> None:
    data = page_header(kind=0, nbytes=1000, stored=300, values=77)
    page = read_page(lambda offset, nbytes: (b"." * 9 + data)[offset:][:nbytes], 9)
    assert (page.header_nbytes, page.nbytes) == (len(data), 1000)
    assert (page.compressed_nbytes, page.num_values) == (300, 77)
    for wrong in (b"", data[:-1], b"\x15" * 99, b"\x1c" * 99, b"\x18\xff\xff\xff\xff\x0f", b"\0"):
        with pytest.raises(ValueError, match="the header of a page at 0 is damaged"):
            read_page(lambda _, nbytes, wrong=wrong: wrong[:nbytes], 0)
