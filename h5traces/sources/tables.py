"""Tables of samples: Parquet, Arrow, JSON Lines and folders saved by datasets, row by row.

Lists of numbers in a cell become arrays. Columns that are known by name need no mapping.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ConversionError, MissingDependencyError, SchemaError
from h5traces.format import layout
from h5traces.meaning.options import ReadingOptions
from h5traces.sources.arrays import ArrayFile, Held, as_array
from h5traces.sources.json_numbers import parse_with_arrays
from h5traces.sources.lens import is_of_lens, of_lens
from h5traces.sources.named_arrays import NamedArraysSource
from h5traces.sources.opening import source_stem
from h5traces.sources.pickle.source import FileSource, PickleLimits
from h5traces.sources.rows import read_rows, text_of
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from h5traces.sources.arrays import Group

_IDS: Final = ("id", "qid", "uid", "example_id", "sample_id")
_NEUROX: Final = {"linex_index", "features"}
_MAX_STATE_NBYTES: Final = 1 << 20
_MAX_JSON_NBYTES: Final = 32 << 20


def open_table(path: Path, kind: str) -> ArrayFile:
    """Open a table of a kind of `signatures.KINDS`.

    Raises
    ------
    ConversionError
        It is damaged, or asks for more memory than its size explains.
    MissingDependencyError
        pyarrow is not installed, which reads all but JSON.
    """
    if kind in ("jsonl", "json"):
        return _JsonTable(path, kind)
    try:
        from h5traces.sources import arrow
    except ImportError as error:
        message = f"{path}: tables of Parquet and Arrow need pyarrow: pip install h5traces[parquet]"
        raise MissingDependencyError(message) from error
    if kind == "datasets-folder":
        return arrow.ArrowTable(kind, dataset_files(path), links=False)
    if kind == "parquet":
        return arrow.ParquetTable(path)
    return arrow.ArrowTable(kind, [(path, None)], links=True)


class TableSource(NamedArraysSource):
    """A table whose columns are named as the fields of samples are: one sample per row."""

    kind = "table"

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        super().__init__(path, options=options)
        from h5traces.sources.signatures import identify

        self._table = open_table(self.path, identify(path).id)
        self.kind = self._table.kind  # type: ignore[misc]
        self._rows = self._table.groups()

    def __next__(self) -> dict[Any, Any]:
        group = next(self._rows)
        if group.keys() == _NEUROX:
            message = (
                f"{self.path}: is the JSON of NeuroX, one object per sentence and word; extract "
                "with output_type='hdf5', and use the mapping neurox-hdf5 of the examples"
            )
            raise ConversionError(message)
        arrays = {name: each.read() for name, each in group.items()}
        stem = source_stem(self.path.name)
        if is_of_lens(arrays):
            self._naming.note(
                "'residual_stream' of vLLM-Lens holds outputs of all blocks (first_state='block'), "
                "or of those that were asked for (layer_ids, each block + 1)"
            )
            arrays = of_lens(arrays, self.path)
        if layout.QUESTION_ID not in arrays:
            name = next((each for each in _IDS if each in arrays), None)
            if name is not None:
                arrays[layout.QUESTION_ID] = arrays.pop(name)
                self._naming.note(f"{name!r} holds the ids")
        self.num_read += 1
        item = self._naming.sample(f"{stem}_{self.num_read - 1}", arrays)
        return self.answered(item, str(item[layout.QUESTION_ID]))

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, and the size of the table."""
        return self._table.progress

    def close(self) -> None:
        """Close the table; samples that were returned stay valid."""
        self._rows = iter(())
        self._table.close()


class _JsonTable(ArrayFile):
    """JSON Lines, or an array of objects: one sample each."""

    has_rows = True

    def __init__(self, path: Path, kind: str) -> None:
        self.kind = kind
        self._source = FileSource(path, PickleLimits())
        if kind == "json" and self._source.compressed_size > _MAX_JSON_NBYTES:
            self._source.close()
            message = (
                f"{path}: a JSON array is read whole, at most {_MAX_JSON_NBYTES:,} bytes; write "
                "one object a line (JSON Lines), or Parquet"
            )
            raise ConversionError(message)
        self._path = path
        # A file as text closes the bytes below it.
        self._text = text_of(self._source.file)

    def groups(self) -> Iterator[Group]:
        """One group per object."""
        try:
            for row in read_rows(self._path, self._text, parse_with_arrays).rows:
                yield {name: Held(as_array(value)) for name, value in row.cells.items()}
                del row
        except SchemaError as error:
            raise ConversionError(str(error)) from error

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, and the size of the file."""
        size = self._source.compressed_size
        return (size if self._text.closed else self._source.compressed_position), size

    def close(self) -> None:
        """Close the file."""
        self._text.close()
        self._source.close()


def dataset_files(folder: Path) -> list[tuple[Path, str | None]]:
    """The Arrow files of a folder that `save_to_disk` of datasets wrote, each with its split.

    Raises
    ------
    ConversionError
        Its lists of files are none, or name files elsewhere.
    """
    if not (folder / "dataset_dict.json").exists():
        return [(path, None) for path in _files_of(folder)]
    splits = _listed(folder / "dataset_dict.json", ("splits",))
    found: list[tuple[Path, str | None]] = []
    for split in splits:
        found += [(path, split) for path in _files_of(folder / split)]
    return found


def _files_of(folder: Path) -> list[Path]:
    return [folder / name for name in _listed(folder / "state.json", ("_data_files", "filename"))]


def _listed(path: Path, keys: tuple[str, ...]) -> list[str]:
    """Names of files in a document that datasets wrote, each in its folder."""
    with os.fdopen(open_regular(path, ConversionError, links=False), "rb") as file:
        content = file.read(_MAX_STATE_NBYTES + 1)
    try:
        document = json.loads(content)
        names = document[keys[0]]
        if len(keys) > 1:
            names = [each[keys[1]] for each in names]
        wrong = [each for each in names if type(each) is not str or not _is_bare(each)]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        message = f"{path}: does not list files as datasets does; save the data set again"
        raise ConversionError(message) from error
    if wrong:
        message = f"{path}: names {str(wrong[0])[:80]!r}, expected files in its folder"
        raise ConversionError(message)
    return list(names)


def _is_bare(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name
