"""Archives as tables with one row per sample, for pandas, Arrow, and what reads Arrow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import OptionError
from h5traces.format import layout
from h5traces.format.text import as_names, utf8
from h5traces.lazy import needing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from h5traces.archive.rows import Row

_COUNTS: Final = ("generation_index", "seq_len", "prompt_len")
_INTEGERS: Final = frozenset({"ordinal", "position_in_file", "label", *_COUNTS})
_NORMS: Final = "hidden_norms"
_SCORES: Final = "score_"


def columns_of(archive: Iterable[Row], columns: str | Iterable[str] | None) -> dict[str, list[Any]]:
    """Values by column, None if a sample has none; only what is asked for is read.

    Raises
    ------
    OptionError
        There is no such column.
    """
    getters = _getters(archive)
    names = [each for each in getters if each != _NORMS] if columns is None else as_names(columns)
    unknown = [each for each in names if each not in getters]
    if unknown:
        message = f"column {unknown[0]!r} is unknown; there are {', '.join(getters)}"
        raise OptionError(message)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for trace in archive:
        for name in names:
            found[name].append(getters[name](trace))
    return found


def to_arrow(archive: Iterable[Row], columns: str | Iterable[str] | None) -> Any:
    """See `Archive.to_arrow`."""
    with needing("to_arrow", "pyarrow", extra="parquet"):
        import pyarrow as pa
    types = {"default": pa.float64(), _NORMS: pa.list_(pa.float32())}
    types |= dict.fromkeys(_INTEGERS, pa.int64())
    arrays = {}
    for name, values in columns_of(archive, columns).items():
        is_text = name not in types and not name.startswith(_SCORES)
        kind = pa.large_string() if is_text else types.get(name, pa.float64())
        cells = [None if each is None else utf8(each) for each in values] if is_text else values
        arrays[name] = pa.array(cells, kind)
    return pa.table(arrays)


def to_pandas(archive: Iterable[Row], columns: str | Iterable[str] | None) -> Any:
    """See `Archive.to_pandas`."""
    with needing("to_pandas", "pandas", extra="tables"):
        import pandas as pd
    series = {}
    for name, values in columns_of(archive, columns).items():
        if name in _INTEGERS:
            series[name] = pd.Series(values, dtype="Int64")
        elif name.startswith(_SCORES):
            series[name] = pd.Series(values, dtype="float64")
        else:
            series[name] = pd.Series(values, dtype="object")
    return pd.DataFrame(series)


def _getters(archive: Iterable[Row]) -> dict[str, Callable[[Row], Any]]:
    """How to get each column of a trace; scores by the names that any trace has."""
    getters: dict[str, Callable[[Row], Any]] = {
        "ordinal": lambda trace: trace.ordinal,
        "path": lambda trace: str(trace.path),
        "position_in_file": lambda trace: trace.position_in_file,
        "sample_id": lambda trace: trace.metadata.sample_id,
    }
    getters |= {name: _attribute(name) for name in (*_COUNTS, "coverage", "label")}
    scores = sorted({name for trace in archive for name in trace.metadata.scores or {}})
    getters |= {f"{_SCORES}{name}": _score(name) for name in scores}
    getters |= {name: _text(name) for name in layout.TEXT_FIELDS}
    getters[_NORMS] = _norms
    return getters


def _attribute(name: str) -> Callable[[Row], Any]:
    return lambda trace: getattr(trace.metadata, name)


def _score(name: str) -> Callable[[Row], Any]:
    return lambda trace: (trace.metadata.scores or {}).get(name)


def _text(name: str) -> Callable[[Row], Any]:
    return lambda trace: trace.get(name)


def _norms(trace: Row) -> list[float] | None:
    """Mean over positions of the 2-norm of each layer's hidden states; None in steps or absent."""
    if layout.HIDDEN_STATES not in trace._stored.objects:
        return None
    found = []
    for layer in trace._value(layout.HIDDEN_STATES, "numpy"):
        if not isinstance(layer, np.ndarray):
            return None
        norms = np.linalg.norm(layer.astype(np.float32), axis=-1)
        kept = norms if trace.mask is None else norms[trace.mask]
        found.append(float(kept.mean()) if kept.size else float("nan"))
    return found
