"""Shims of pandas: a pickled DataFrame becomes a list of dicts, one per row.

Lists of numbers in its cells become arrays, as in other tables.

A frame is pickled as blocks of columns: arrays ``(columns, rows)`` with the place of each column.
Text of pandas 3 is an array of Arrow: offsets and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from h5traces.sources.arrays import as_array
from h5traces.sources.pickle.calls import Pending, Shim, brief, check_args, type_name
from h5traces.sources.pickle.source import contradict, reject

if TYPE_CHECKING:
    from h5traces.sources.pickle.calls import Meter

_SAVE: Final = "save the table as Parquet, or df.to_dict('records') with pickle"
_MAX_CELLS: Final = 5_000_000
_MAX_CELL_DEPTH: Final = 8
_TEXT_TYPES: Final[dict[Any, np.dtype[Any]]] = {
    "string": np.dtype("<i4"),
    "large_string": np.dtype("<i8"),
}


@dataclass(frozen=True, eq=False)
class _Part:
    """A piece of a frame, which no sample holds by itself."""

    what: str
    value: Any


def _part(what: str, value: Any) -> _Part:
    return value if type(value) is _Part and value.what == what else _wrong(what, value)


def _wrong(what: str, value: Any) -> Any:
    found = value.what if type(value) is _Part else type_name(value)
    reject(f"a frame of pandas has {found}, expected {what}; {_SAVE}")


# --- values of columns ---------------------------------------------------------------------------


def _alias(_meter: Meter, args: tuple[Any, ...]) -> _Part:
    check_args("type_for_alias", args, 1)
    if type(args[0]) is not str or args[0] not in _TEXT_TYPES:
        reject(f"a column of pandas is of Arrow's type {brief(args[0])}; {_SAVE}")
    return _Part("a type of text", args[0])


def _buffer(_meter: Meter, args: tuple[Any, ...]) -> _Part:
    check_args("py_buffer", args, 1)
    if type(args[0]) not in (bytes, bytearray):
        reject(f"a buffer of Arrow holds {type_name(args[0])}, expected bytes")
    return _Part("a buffer", args[0])


def _text(meter: Meter, args: tuple[Any, ...]) -> _Part:
    """The texts of an array of Arrow: ``(type, length, nulls, offset, buffers, ...)``."""
    if len(args) == 1 and type(args[0]) is tuple:
        args = args[0]
    if len(args) != 7 or type(args[4]) is not list or len(args[4]) != 3:
        reject(f"an array of Arrow is made of {len(args)} values; {_SAVE}")
    kind, length, _nulls, offset, (valid, places, data) = args[:5]
    dtype = _TEXT_TYPES[_part("a type of text", kind).value]
    if not all(type(each) is int and 0 <= each < _MAX_CELLS for each in (length, offset)):
        reject("an array of Arrow has no plausible length")
    content = b"" if data is None else bytes(_part("a buffer", data).value)
    stored = bytes(_part("a buffer", places).value)
    if len(stored) < (offset + length + 1) * dtype.itemsize:
        contradict(f"a column of {length:,} texts has {len(stored):,} bytes of offsets")
    ends = np.frombuffer(stored, dtype, offset + length + 1)[offset:].tolist()
    if ends[0] < 0 or ends[-1] > len(content) or any(a > b for a, b in pairwise(ends)):
        contradict("a column of text has offsets that are not in order")
    meter.charge(len(content) + 64 * length)
    texts: list[str | None] = [
        content[begin:end].decode("utf-8", "replace") for begin, end in pairwise(ends)
    ]
    if valid is not None:
        bits = np.frombuffer(bytes(_part("a buffer", valid).value), np.uint8)
        known = np.unpackbits(bits, bitorder="little")[offset : offset + length]
        if len(known) != length:
            contradict("a column of text has too few marks of missing values")
        texts = [text if is_known else None for text, is_known in zip(texts, known, strict=True)]
    return _Part("a column", texts)


def _text_array(_meter: Meter, _args: tuple[Any, ...]) -> Pending:
    def build(_meter: Meter, state: Any) -> _Part:
        if type(state) is not dict:
            reject(f"an array of text has {type_name(state)} for its state; {_SAVE}")
        return _part("a column", state.get("_pa_array"))

    return Pending("array of text", build)


def _nothing(_meter: Meter, _args: tuple[Any, ...]) -> _Part:
    return _Part("a type", None)


def _column(value: Any) -> list[Any]:
    """The values of one column."""
    if type(value) is _Part:
        return list(_part("a column", value).value)
    if type(value) is not np.ndarray or value.ndim != 1:
        return list(_wrong("a column", value))
    cells = value.tolist() if value.dtype.kind in "biufcUSO" else list(value)
    return [_cell(each) for each in cells] if value.dtype.kind == "O" else cells


def _cell(value: Any, depth: int = 0) -> Any:
    """A cell; of nested lists of numbers, also as `read_parquet` of pandas gives them, an array."""
    if type(value) is not np.ndarray or value.dtype.kind != "O" or depth > _MAX_CELL_DEPTH:
        return as_array(value)
    items = [_cell(each, depth + 1) for each in value.tolist()]
    kinds = {(each.dtype, each.shape) if type(each) is np.ndarray else None for each in items}
    return np.stack(items) if len(kinds) == 1 and None not in kinds else value


# --- frames --------------------------------------------------------------------------------------


def _block(_meter: Meter, args: tuple[Any, ...]) -> _Part:
    check_args("_unpickle_block", args, 3)
    values, place, _ndim = args
    if type(place) is slice:
        place = list(range(*place.indices(_MAX_CELLS)))
    elif type(place) is np.ndarray and place.dtype.kind == "i":
        place = place.tolist()
    else:
        reject(f"a block of columns has {type_name(place)} for their places")
    rows = values if type(values) is np.ndarray and values.ndim == 2 else [values]
    if len(rows) != len(place):
        contradict(f"a block of {len(rows)} columns has {len(place)} places")
    return _Part("a block", dict(zip(place, rows, strict=True)))


def _index(_meter: Meter, args: tuple[Any, ...]) -> _Part:
    check_args("_new_Index", args, 2)
    kind, state = args
    if type(kind) is not Shim or type(state) is not dict:
        reject(f"an index of pandas is of {type_name(kind)}")
    if {"start", "stop", "step"} <= state.keys():
        sizes = state["start"], state["stop"], state["step"]
        if not all(type(each) is int for each in sizes) or not state["step"]:
            reject("an index of pandas has a range without numbers")
        found = range(*sizes)
        if len(found) > _MAX_CELLS:
            reject(f"a frame of pandas has {len(found):,} rows, at most {_MAX_CELLS:,} are read")
        return _Part("an index", list(found))
    return _Part("an index", _column(state.get("data")))


def _manager(_meter: Meter, args: tuple[Any, ...]) -> _Part:
    """Columns by their names, and the index: ``(blocks, axes)``."""
    check_args("BlockManager", args, 2)
    blocks, axes = args
    if type(blocks) is not tuple or type(axes) is not list:
        reject(f"a frame of pandas is made of {type_name(blocks)} and {type_name(axes)}")
    columns: dict[int, Any] = {}
    for block in blocks:
        columns |= _part("a block", block).value
    *names, index = (_part("an index", each).value for each in axes)
    names = names[0] if names else [0]
    if set(columns) != set(range(len(names))):
        contradict(f"a frame of {len(names)} columns has {len(columns)}")
    found = {name: _column(columns[at]) for at, name in enumerate(names)}
    if any(len(each) != len(index) for each in found.values()):
        contradict(f"a frame of {len(index):,} rows has a column of another length")
    if len(index) * (len(found) + 1) > _MAX_CELLS:
        reject(f"a frame of pandas has more than {_MAX_CELLS:,} cells; {_SAVE}")
    return _Part("columns", found)


def _frame(_meter: Meter, args: tuple[Any, ...]) -> Pending:
    check_args("DataFrame", args, 0)
    return Pending("frame of pandas", _finish_frame)


def _finish_frame(meter: Meter, state: Any) -> list[dict[Any, Any]]:
    if type(state) is not dict:
        reject(f"a frame of pandas has {type_name(state)} for its state; {_SAVE}")
    columns = _part("columns", state.get("_mgr")).value
    meter.check_keys(columns, "the name of a column")
    meter.charge(64 * sum(map(len, columns.values())))
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _series(_meter: Meter, _args: tuple[Any, ...]) -> NoReturn:
    reject(
        "a Series of pandas is one column without rows of samples; save "
        "series.to_frame('hidden_states'), or series.tolist()"
    )


_SHIMS: Final[dict[tuple[str, ...], Any]] = {
    ("DataFrame", "pandas", "pandas.core.frame"): _frame,
    ("Series", "pandas", "pandas.core.series"): _series,
    ("BlockManager", "pandas.core.internals.managers"): _manager,
    ("_unpickle_block", "pandas._libs.internals"): _block,
    ("_new_Index", "pandas.core.indexes.base"): _index,
    ("Index", "pandas", "pandas.core.indexes.base"): None,
    ("RangeIndex", "pandas", "pandas.core.indexes.range"): None,
    ("ArrowStringArray", "pandas.arrays", "pandas.core.arrays.string_arrow"): _text_array,
    ("StringDtype", "pandas", "pandas.core.arrays.string_"): _nothing,
    ("_restore_array", "pyarrow.lib"): _text,
    ("chunked_array", "pyarrow.lib"): None,
    ("type_for_alias", "pyarrow.lib"): _alias,
    ("py_buffer", "pyarrow.lib"): _buffer,
}
FRAME_NAMES: Final = {
    (module, name): Shim(f"{modules[0]}.{name}", call)
    for (name, *modules), call in _SHIMS.items()
    for module in modules
}
