"""Reads batches item by item, in bounded memory and without trusting the file.

A batch is a pickled list or tuple of dicts; a dict that is one sample, or holds samples by id or
columns; a list of dicts inside another dict; or several of these, one after the other in a file.
The file may be compressed; pickle protocols 0 to 5.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record
from h5traces.sources.naming import Naming
from h5traces.sources.opening import source_stem
from h5traces.sources.pickle.containers import (
    EXPECTED,
    Entry,
    Understood,
    bare_arrays,
    describe,
    elements_of,
    is_cache,
    is_generation,
    is_sample,
    is_trace,
    pair_item,
    rows,
    sentences,
    understand,
    with_id,
)
from h5traces.sources.pickle.cursor import FIRST_OPCODES, Cursor
from h5traces.sources.pickle.items import NoDictsError, ShortTupleError, TooLargeError
from h5traces.sources.pickle.plain import DICTS
from h5traces.sources.pickle.source import MIB, FileSource, PickleLimits, contradict
from h5traces.sources.signatures import identify
from h5traces.sources.source import TraceSource

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from h5traces.format.record import SourcePosition, TraceRecord
    from h5traces.sources.pickle.items import Found
    from h5traces.sources.pickle.stack import Storages

_DEFAULT_LIMITS: Final = PickleLimits()
# A dict of at most this many bytes is read at once; a larger one in passes that hold one sample.
_WHOLE_NBYTES: Final = 64 * MIB
# Of a column, such as labels, which is kept in memory while larger ones are read.
_COLUMN_NBYTES: Final = 4 * MIB
_NO_LIMIT: Final = 1 << 62
# Of a cut file, too, of which less is known.
_KINDS: Final = frozenset({"pickle", "empty", "gzip", "zlib", "bz2", "xz", "lzma", "zstd"})


class BatchStream(TraceSource):
    """The items of a batch as dicts, one by one; a context manager.

    It keeps no reference to an item that it has returned, but for small values that later items may
    share. Arrays may be read-only views of the pickle's payload, in the byte order of the file;
    tensors are `TorchValue`.

    Attributes
    ----------
    is_list
        Whether the first object of the file is a list or tuple.
    num_passes
        How often the file has been opened: more than once if items share large objects, or for a
        large dict.
    """

    kind = "pickle"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limits: PickleLimits = _DEFAULT_LIMITS,
        options: ReadingOptions = ReadingOptions(),
        whole_nbytes: int = _WHOLE_NBYTES,
    ) -> None:
        super().__init__(path, options=options)
        self.num_passes = 0
        self._limits = limits
        self._whole_nbytes = whole_nbytes
        self._closed_at = (0, 0)
        self._options = options
        self._is_done = False
        self._sites_known = True
        # If the first dict of a file is one sample, so are the others.
        self._is_trace = False
        self._naming = Naming(self.path, self.established, self.understood)
        self._storages: Storages | None = None
        self._others: list[Cursor] = []
        self._cursor: Cursor | None = None
        self._check_kind()
        try:
            self._cursor = self._new_cursor(whole_nbytes=whole_nbytes)
            self._samples = self._read(self._cursor)
            # What is not a batch is reported at once.
            self.is_list = self._find_root(self._cursor) in ("list", "tuple")
        except BaseException:
            self.close()
            raise

    def _check_kind(self) -> None:
        kind = identify(self.path)
        if kind.id == "unknown":
            with self._make_source() as source:
                if source.file.peek(1)[0] in FIRST_OPCODES:
                    return
        if kind.id not in _KINDS:
            message = f"{self.path}: is {kind}; {kind.remedy}"
            raise ConversionError(message)

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes of the file read in this pass, and the size of the file."""
        if self._cursor is None:
            return self._closed_at
        return max([self._cursor.progress, *(each.progress for each in self._others)])

    def __next__(self) -> dict[Any, Any]:
        if self._cursor is None and not self._is_done:
            message = f"{self.path}: the batch is closed; open it again"
            raise ValueError(message)
        try:
            item = next(self._samples)
        except BaseException:
            # Nothing after an error in the stream can be trusted.
            self.close()
            raise
        if is_cache(item):
            # Hooks take the last state before the norm.
            self._sites_known = False
            name = source_stem(self.path.name)
            if not self._is_trace:
                name = f"{name}_{self.num_read}"
            item = self._naming.sample(name, dict(item))
        self.num_read += 1
        return item

    def close(self) -> None:
        """Close the file; items that were returned stay valid."""
        if self._cursor is not None:
            self._closed_at = self.progress
            for cursor in (self._cursor, *self._others):
                cursor.close()
            self._cursor = None
            self._others.clear()

    def objects(self) -> Iterator[Any]:
        """The contents of the file, whatever they mean: the dicts of a list, or one object."""
        cursor = self._cursor
        assert cursor is not None
        try:
            while self.is_list and cursor.advance():
                yield cursor.take().value
        except NoDictsError:
            self.is_list = False
            cursor.restart(whole_nbytes=_NO_LIMIT, is_list_whole=True)
        if self.is_list:
            return
        value = cursor.whole_checked()
        self.is_list = type(value) is list and bool(value) and all(type(e) in DICTS for e in value)
        yield from value if self.is_list else [value]

    def to_record(
        self, item: dict[Any, Any], place: SourcePosition, layers: tuple[int, ...] | None
    ) -> TraceRecord:
        """One item as a record."""
        return to_record(
            item,
            source=place,
            layers=layers,
            # No producer of pairs is known, nor where their last hidden state was taken.
            sites_known=self._sites_known,
            options=self._options,
            established=self.established,
        )

    # --- pickles --------------------------------------------------------------------------------

    def _new_cursor(
        self, *, start: int = 0, whole_nbytes: int | None = None, level: int = 0
    ) -> Cursor:
        def open_source() -> tuple[FileSource, Storages | None]:
            self.num_passes += 1
            source = self._make_source()
            return source, self._storages

        return Cursor(
            self.path,
            self._limits,
            open_source,
            start=start,
            whole_nbytes=whole_nbytes,
            level=level,
        )

    def _make_source(self) -> FileSource:
        """The bytes of the pickle, from its start; files of torch.save hold it among others."""
        return FileSource(self.path, self._limits)

    def _ends(self, cursor: Cursor) -> bool:
        """Whether no further pickle of samples follows; else it is current."""
        return cursor.ends(_NO_LIMIT if self._is_trace else self._whole_nbytes)

    def _read(self, cursor: Cursor) -> Iterator[dict[Any, Any]]:
        num_pickles = 1
        while True:
            yield from self._one_pickle(cursor)
            if names := cursor.machine.left_out:
                self.understood.append(f"left out of outputs of a model: {', '.join(names)}")
            if self._ends(cursor):
                break
            num_pickles += 1
        if num_pickles > 1:
            self.understood.append(f"{num_pickles} pickles follow one another in the file")
        self._is_done = True
        self.close()

    def _find_root(self, cursor: Cursor) -> str | None:
        try:
            return cursor.find_root()
        except TooLargeError:
            found = cursor.machine.outermost()
            cursor.check(lambda: contradict(f"found {found}, {EXPECTED}"))
            raise

    def _one_pickle(self, cursor: Cursor) -> Iterator[dict[Any, Any]]:
        if self._find_root(cursor) in ("list", "tuple"):
            try:
                while cursor.advance():
                    yield cursor.take().value
            except NoDictsError:
                cursor.restart(whole_nbytes=_NO_LIMIT, is_list_whole=True)
            else:
                return
        try:
            value = cursor.whole()
        except TooLargeError:
            yield from self._large_dict(cursor)
            return
        if type(value) in (list, tuple) and value and all(type(each) in DICTS for each in value):
            yield from value
        elif cursor.machine.is_object(value) and is_trace(value):
            self.understood.append("an output of a model is one sample")
            self._is_trace = True
            yield value
        elif type(value) in DICTS:
            yield from self._small_dict(cursor, value)
        else:
            yield from self._arrays(cursor, value)

    def _arrays(self, cursor: Cursor, value: Any) -> Iterator[dict[Any, Any]]:
        """The samples of arrays without names."""
        samples, sentence = cursor.check(lambda: bare_arrays(value))
        cursor.check(lambda: cursor.machine.check(value))
        self.understood.append(sentence)
        # Nothing says where the last state was taken.
        self._sites_known = False
        stem = source_stem(self.path.name)
        for index, states in enumerate(samples):
            name = f"{stem}_{index}" if len(samples) > 1 else stem
            yield {layout.HIDDEN_STATES: states, layout.QUESTION_ID: name}

    # --- dicts ----------------------------------------------------------------------------------

    def _small_dict(self, cursor: Cursor, value: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        entries = {key: Entry.of(each) for key, each in value.items()}
        found: Understood = cursor.check(lambda: understand(entries))
        if found.what in ("trace", "cache"):
            self._say(found, 1)
            self._is_trace = True
            yield value
        elif found.what == "mapping":
            self._say(found, len(value))
            self._note_generations(next(iter(value.values())))
            for index, (key, sample) in enumerate(value.items()):
                yield with_id(sample, key, index)
        else:
            yield from self._lists(
                cursor, found, entries, lambda key: iter(elements_of(entries[key].value))
            )

    def _large_dict(self, cursor: Cursor) -> Iterator[dict[Any, Any]]:
        """The samples of a dict that is not read into memory."""
        cursor.restart(whole_nbytes=None)
        if cursor.advance():
            first = cursor.machine.ready[0]
            is_mapping = not first.is_element and is_sample(first.value)
            self._note_generations(first.value)
            del first
            if is_mapping:
                self._say(Understood("mapping"), None)
                yield from self._mapping(cursor)
                return
        survey = _Survey(cursor)
        try:
            level = cursor.survey(survey.see)
        except ShortTupleError:
            cursor.restart(whole_nbytes=_NO_LIMIT)
            yield from cursor.whole()
            return
        entries = survey.entries()
        found: Understood = cursor.check(lambda: understand(entries))
        if found.what in ("trace", "cache"):
            self._say(found, 1)
            self._is_trace = True
            cursor.restart(whole_nbytes=_NO_LIMIT)
            yield cursor.whole()
            return

        def elements(key: Any) -> Iterator[Any]:
            entry = entries[key]
            if entry.values is not None:
                return iter(entry.values)
            return self._column(cursor.start, level, key, entry.length or 0)

        yield from self._lists(cursor, found, entries, elements)

    def _mapping(self, cursor: Cursor) -> Iterator[dict[Any, Any]]:
        index = 0
        while True:
            yield self._sample_by_id(cursor, index)
            index += 1
            if not cursor.advance():
                return

    def _note_generations(self, first: Any) -> None:
        if is_generation(first):
            self._options = replace(
                self.options, first_state=self.options.first_state or "embedding"
            )
            self.understood.append(
                "entries are generations of an uncertainty study: hidden_states are those of the "
                "last token before the end of the answer (emb_tok_before_eos), the embedding first"
            )

    def _sample_by_id(self, cursor: Cursor, index: int) -> dict[Any, Any]:
        found = cursor.take()
        if found.is_element or not is_sample(found.value):
            what = "a list" if found.is_element else describe(found.value)
            cursor.check(
                lambda: contradict(
                    f"the entry {str(found.key)[:40]!r} of a dict of samples is {what}, expected "
                    f"the dict of a sample"
                )
            )
        return with_id(found.value, found.key, index)

    def _column(self, start: int, level: int, key: Any, length: int) -> Iterator[Any]:
        """The elements of a list in the outer dict, in a separate pass."""
        cursor = self._new_cursor(start=start, level=level)
        self._others.append(cursor)
        cursor.find_root()
        while length and cursor.advance():
            if cursor.machine.ready[0].key == key:
                length -= 1
                yield cursor.take().value
            else:
                cursor.take()
        cursor.close()

    def _lists(
        self,
        cursor: Cursor,
        found: Understood,
        entries: dict[Any, Entry],
        elements: Callable[[Any], Iterator[Any]],
    ) -> Iterator[dict[Any, Any]]:
        """The samples of columns, a wrapper or pairs."""
        lists = {field: elements(name) for name, field in found.columns.items()}
        start: Iterator[dict[Any, Any]] | None = None
        num_samples = max((entry.length or 0 for entry in entries.values()), default=0)
        if found.what == "pairs":
            self._sites_known = False
            start = (
                cursor.check(partial(pair_item, pair, index))
                for index, pair in enumerate(elements(found.key))
            )
        elif found.what == "wrapper":
            inner = entries[found.key].value
            start = (
                (with_id(each, key, at) for at, (key, each) in enumerate(inner.items()))
                if type(inner) in DICTS
                else (dict(each) for each in elements(found.key))
            )
        self._say(found, num_samples)
        yield from rows(lists, start)

    def _say(self, found: Understood, num_samples: int | None) -> None:
        said, unread = sentences(found, num_samples)
        self.understood += [each for each in said if each not in self.understood]
        self.unread += [each for each in unread if each not in self.unread]


class _Survey:
    """Learns what a large dict holds, and keeps one element of each list, and short lists."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._entries: dict[Any, Entry] = {}
        self._nbytes: dict[Any, int] = {}

    def see(self, found: Found | None) -> None:
        """Add an item; None starts over."""
        if found is None:
            self._entries.clear()
            self._nbytes.clear()
        elif not found.is_element:
            self._entries[found.key] = Entry.of(found.value)
        else:
            self._see_element(found.key, found.value)

    def _see_element(self, key: Any, value: Any) -> None:
        entry = self._entries.setdefault(key, Entry(length=0, first=value, values=[]))
        entry.length = (entry.length or 0) + 1
        nbytes = self._nbytes.get(key, 0) + self._cursor.machine.nbytes(value)
        self._nbytes[key] = nbytes
        if nbytes > _COLUMN_NBYTES:
            entry.values = None
        elif isinstance(entry.values, list):
            entry.values.append(value)

    def entries(self) -> dict[Any, Entry]:
        """What was seen, empty lists included."""
        for key, length in self._cursor.machine.columns.items():
            if not length:
                self._entries.setdefault(key, Entry(length=0, values=[]))
        return self._entries
