"""Samples of named arrays, as safetensors and npz hold them: one, or one per prefix of names.

Names such as ``q0/hidden_states`` belong to sample ``q0``; `naming` says what they are.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record
from h5traces.sources.naming import TOKENS, Naming, is_numbered
from h5traces.sources.opening import source_stem
from h5traces.sources.responses import add_response
from h5traces.sources.source import TraceSource

if TYPE_CHECKING:
    from h5traces.format.record import SourcePosition, TraceRecord
    from h5traces.sources.mapped import MappedFile
    from h5traces.sources.naming import Arrays

Loaders = Mapping[str, Callable[[], Any]]

# Of one sample.
_MOST_ARRAYS: Final = 10_000
_FIELDS: Final = (*layout.KINDS, *TOKENS, layout.TOKENS_DECODED)
_OF_SAMPLE: Final = re.compile(rf"(.+)[/.]({'|'.join(_FIELDS)})\Z")


class NamedArraysSource(TraceSource):
    """A file of named arrays: one sample, or one per prefix of names.

    Attributes
    ----------
    arrays
        By name, what loads each array.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, options: ReadingOptions = ReadingOptions()
    ) -> None:
        super().__init__(path, options=options)
        self._samples: list[tuple[str, Loaders]] = []
        self._file: MappedFile
        self.arrays: Loaders = {}
        self._naming = Naming(self.path, self.established, self.understood)

    def take(self, arrays: Loaders, facts: Mapping[str, str], file: MappedFile) -> None:
        """Say what the file holds: arrays by name, text about them, and the file they lie in."""
        self._file = file
        self.arrays = arrays
        self._facts = {key: value for key, value in facts.items() if key != "format"}
        self._samples = self._split(arrays)
        self.num_samples = len(self._samples)

    def requests(self) -> tuple[str, ...]:
        """Names of the samples to which responses of a server belong."""
        return tuple(name for name, _ in self._samples)

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, by samples, and the size of the file."""
        nbytes = self._file.nbytes
        return nbytes * self.num_read // max(self.num_samples or 0, 1), nbytes

    def close(self) -> None:
        """Close the file; samples that were returned stay valid."""
        self._samples, self.arrays = [], {}
        self._file.close()

    def release(self, nbytes: int = 0) -> None:
        """Give back pages of the file, of which `nbytes` were read as views."""
        self._file.release(nbytes)

    def __next__(self) -> dict[Any, Any]:
        if not self._samples:
            raise StopIteration
        self.release()
        name, loaders = self._samples.pop(0)
        if len(loaders) > _MOST_ARRAYS:
            message = (
                f"{self.path}: holds {len(loaders):,} arrays of sample {name[:80]!r}, at most "
                f"{_MOST_ARRAYS:,} are read; name samples as in 'q0/hidden_states', or save each "
                "to a separate file"
            )
            raise ConversionError(message)
        self.num_read += 1
        arrays = self.prepared({key: load() for key, load in loaders.items()})
        return self.answered(self._naming.sample(name, arrays, self._facts), name)

    def answered(self, item: dict[Any, Any], name: str) -> dict[Any, Any]:
        """The sample with what the response to its request says, where there are responses."""
        if self.options.responses is not None:
            add_response(item, name, self.path, os.fspath(self.options.responses))
            self._naming.note(f"{self.options.responses} says what its request was answered")
        return item

    def prepared(self, arrays: Arrays) -> Arrays:
        """The arrays of one sample, as a format changes them before they are named."""
        return arrays

    def to_record(
        self, item: dict[Any, Any], place: SourcePosition, layers: tuple[int, ...] | None
    ) -> TraceRecord:
        """One sample as a record; where its last hidden state was taken is not known."""
        return to_record(
            item,
            source=place,
            layers=layers,
            sites_known=False,
            options=self.options,
            established=self.established,
        )

    def _split(self, arrays: Loaders) -> list[tuple[str, Loaders]]:
        """Arrays by sample, each with the sample's id."""
        stem = source_stem(self.path.name)
        if any(name in layout.KINDS for name in arrays):
            return [(stem, arrays)]
        found: defaultdict[str, dict[str, Callable[[], Any]]] = defaultdict(dict)
        for name, value in arrays.items():
            match = _OF_SAMPLE.match(name)
            if match is None or is_numbered(match[1]):
                return [(stem, arrays)]
            found[match[1]][match[2]] = value
        return list(found.items())
