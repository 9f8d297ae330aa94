"""What samples have in common whose rows in the index are of one form: names, types and shapes.

It is worked out once for all of them, and so is how their datasets are read.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np

from h5traces.errors import ArchiveError, UnsupportedEncodingError
from h5traces.format.entries import ChunkTable, ObjectEntry, carrier_dtype
from h5traces.storage.arrays import check_shape, chunk_bounds
from h5traces.storage.codecs import get_codec
from h5traces.storage.footer_rows import FooterError
from h5traces.storage.kernels import PLAN_CODECS
from h5traces.storage.plans import UNKNOWN, Datasets, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from h5traces.format.limits import ReadLimits
    from h5traces.storage.arrays import ChunkBounds
    from h5traces.storage.footer import FooterTables
    from h5traces.storage.footer_rows import FooterRow, RowForm
    from h5traces.storage.plans import Layout, Restoration

    # An object without digest and chunks; of a dataset, bounds of these and places in its row.
    Described = tuple[ObjectEntry, ChunkBounds | None, slice]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_NO_TYPE: Final = np.dtype("V0")
_DEFLATE: Final = PLAN_CODECS.index("deflate")
# Forms of rows; samples of one run have one for each length.
_FORMS_KEPT: Final = 128
# How some datasets are read, for each form of rows: what some readers want.
_LAYOUTS_KEPT: Final = 2


def kept(known: dict[_Key, _Value], key: _Key, make: Callable[[], _Value], most: int) -> _Value:
    """The value of a key, made where it is not known; a full dict is emptied first."""
    # One look into the dict: another thread may empty it at any time.
    found = known.get(key)
    if found is None:
        found = make()
        if len(known) >= most:
            known.clear()
        known[key] = found
    return found


def list_of(tables: FooterTables, name: str) -> list[Any]:
    """A column of the index that holds a list."""
    document = tables.column(name)
    if not isinstance(document, list):
        message = f"the index's column {name} is not a list"
        raise FooterError(message)
    return document


def misfit(place: int, error: Exception) -> FooterError:
    """The error for an object, by its place in its row, that does not fit its columns."""
    return FooterError(f"object {place} of a row of the index does not fit its columns: {error}")


class Terms:
    """What rows of an index refer to by number: types, codecs, and paths of objects.

    Shards of one run have the same, and samples of the same lengths, so `terms_of` gives them the
    same terms and forms.
    """

    def __init__(
        self,
        types: tuple[str, ...],
        codecs: tuple[str, ...],
        names: tuple[str, ...],
        limits: ReadLimits,
    ) -> None:
        self.types, self.codecs, self.names, self.limits = types, codecs, names, limits
        self._forms: dict[bytes, StoredForm] = {}

    def form(self, row: FooterRow) -> StoredForm:
        """What the row has in common with others."""
        return kept(self._forms, row.key, lambda: StoredForm(row.form, self), _FORMS_KEPT)

    @cached_property
    def dtypes(self) -> dict[int, np.dtype[Any]]:
        """Types; of a group, and of what no archive can hold, that of no bytes."""
        return {number: _dtype_of(each) for number, each in enumerate(self.types)}

    @cached_property
    def plan_codecs(self) -> NDArray[np.int64]:
        """Numbers of codecs in plans; the last one stands for all that the index lacks."""
        known = {name: number for number, name in enumerate(PLAN_CODECS)}
        return np.array([*(known.get(each, UNKNOWN) for each in self.codecs), UNKNOWN])


terms_of: Final = lru_cache(maxsize=4)(Terms)


def _dtype_of(stored_type: str) -> np.dtype[Any]:
    try:
        return carrier_dtype(stored_type)
    except (UnsupportedEncodingError, TypeError):
        return _NO_TYPE


class FormFacts(NamedTuple):
    """Numbers of datasets and of their raw bytes, and bounds of the sizes of all chunks."""

    num_datasets: int
    raw_nbytes: int
    smallest: NDArray[np.float64]
    largest: NDArray[np.float64]


class StoredForm:
    """What rows of one form share.

    Attributes
    ----------
    columns
        The columns that they share.
    places
        Place in them of every object, by path.
    types
        Number of the type of every object.
    """

    def __init__(self, columns: RowForm, terms: Terms) -> None:
        self.columns, self._terms = columns, terms
        self.types: list[int] = columns.object_type.tolist()
        numbers, names = columns.object_name, terms.names
        try:
            self.places = {names[number]: place for place, number in enumerate(numbers.tolist())}
        except IndexError as error:
            message = "the index's table of names is too short"
            raise FooterError(message) from error
        if len(self.places) != len(numbers):
            message = "the index's table of objects does not fit its names"
            raise FooterError(message)
        self._described: dict[int, Described] = {}
        # By paths and restorations.
        self._layouts: dict[Any, Layout] = {}

    def described(self, place: int) -> Described:
        """An object without what its row alone says.

        IndexError, ValueError, TypeError or ArchiveError where it makes no sense.
        """
        if place in self._described:
            return self._described[place]
        columns, terms = self.columns, self._terms
        path = terms.names[int(columns.object_name[place])]
        dtype = terms.types[int(columns.object_type[place])]
        codec = terms.codecs[int(columns.object_codec[place])]
        bounds = None
        chunks = slice(*columns.chunk_ends[place : place + 2].tolist())
        entry = ObjectEntry(path)
        if dtype:
            dims = slice(*columns.axis_ends[place : place + 2].tolist())
            shape, chunk = columns.object_dims[dims], columns.object_chunk_dims[dims]
            zeros = (0,) * (chunks.stop - chunks.start)
            table = ChunkTable(zeros, zeros, zeros)
            entry = ObjectEntry(
                path, {}, dtype, tuple(shape.tolist()), tuple(chunk.tolist()), codec, table
            )
            get_codec(codec)
            check_shape(entry, terms.limits)
            bounds = chunk_bounds(entry)
        self._described[place] = entry, bounds, chunks
        return self._described[place]

    @cached_property
    def facts(self) -> FormFacts:
        """What checks of whole samples ask; FooterError where an object makes no sense."""
        bounds: NDArray[Any] = np.zeros((2, int(self.columns.chunk_ends[-1])), np.float64)
        num_datasets = raw_nbytes = place = 0
        try:
            for place in range(len(self.places)):
                entry, found, chunks = self.described(place)
                if found is not None:
                    bounds[:, chunks] = [[found.smallest], [found.largest]]
                    num_datasets += 1
                    raw_nbytes += entry.raw_nbytes
        except (IndexError, ValueError, TypeError, ArchiveError) as error:
            raise misfit(place, error) from error
        return FormFacts(num_datasets, raw_nbytes, *bounds)

    def layout(self, key: Any) -> Layout | None:
        """How the datasets of a key are read, if that is kept."""
        return self._layouts.get(key)

    def keep(self, key: Any, layout: Layout) -> None:
        """Keep a layout for the next sample."""
        kept(self._layouts, key, lambda: layout, _LAYOUTS_KEPT)


def wanted_of(
    samples: Sequence[
        tuple[StoredForm, FooterRow, Sequence[str], Sequence[tuple[str, Restoration]]]
    ],
    terms: Terms,
) -> Wanted:
    """What the index says of datasets of some samples: forms, rows, paths and restorations."""
    forms = [form.columns for form, *_ in samples]

    def column(name: str) -> NDArray[np.int64]:
        return np.concatenate([getattr(form, name) for form in forms]).astype(np.int64)

    paths = [path for *_, some, _ in samples for path in some]
    counts = [len(some) for *_, some, _ in samples]
    listed = [form.places[path] for form, _, some, _ in samples for path in some]
    sizes = [(len(form.object_ndim), int(form.chunk_ends[-1])) for form in forms]
    before = np.cumsum([(0, 0), *sizes], axis=0)[:-1]
    places = listed + np.repeat(before[:, 0], counts)
    # Of all objects, then of those that are wanted.
    num_axes, num_chunks = column("object_ndim"), column("object_num_chunks")
    first_axes, first_chunks = (np.cumsum(each) - each for each in (num_axes, num_chunks))
    num_axes, num_chunks, first_axes, first_chunks = (
        each[places] for each in (num_axes, num_chunks, first_axes, first_chunks)
    )
    # Bytes of text are an axis more, which no shuffle has taken for elements.
    axes = np.arange(int(num_axes.max(initial=0)) + 1)
    shape, chunk = np.ones((2, len(places), len(axes)), np.int64)
    has_axis = axes < num_axes[:, np.newaxis]
    of_axes = (first_axes[:, np.newaxis] + axes)[has_axis]
    shape[has_axis] = column("object_dims")[of_axes]
    chunk[has_axis] = column("object_chunk_dims")[of_axes]
    known = terms.plan_codecs
    codec = known[np.minimum(column("object_codec")[places], len(known) - 1)]
    types = [terms.dtypes.get(kind, _NO_TYPE) for kind in column("object_type")[places].tolist()]
    widths = np.array([each.itemsize if each.kind == "S" else 1 for each in types], np.int64)
    itemsizes = np.array([each.itemsize for each in types], np.int64) // widths
    shape[:, -1] = chunk[:, -1] = widths
    chunks = np.repeat(first_chunks - np.cumsum(num_chunks) + num_chunks, num_chunks)
    chunks += np.arange(len(chunks))
    columns = zip(*(row.chunks for _, row, *_ in samples), strict=True)
    found = Datasets(
        shape,
        chunk,
        num_axes,
        itemsizes,
        np.where((widths > 1) & (codec != _DEFLATE), UNKNOWN, codec),
        num_chunks,
        *(np.concatenate(each)[chunks] for each in columns),
    )
    own = chunks - np.repeat(np.repeat(before[:, 1], counts), num_chunks)
    suiting: list[Restoration | None] = [None] * len(paths)
    if any(given for *_, given in samples):
        facts = zip(shape.tolist(), chunk.tolist(), num_axes.tolist(), strict=True)
        owners = chain.from_iterable(repeat(dict(given), len(some)) for *_, some, given in samples)
        hows = (given.get(path) for given, path in zip(owners, paths, strict=True))
        suiting = [
            how if how is not None and how.suits(*fact) else None
            for how, fact in zip(hows, facts, strict=True)
        ]
    return Wanted(paths, types, found, suiting, own, counts)
