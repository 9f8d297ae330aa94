"""Errors and warnings of h5traces, and its version.

Every class can be built from one message string and survives pickling: PyTorch's DataLoader
re-raises a worker's error as ``type(error)(message)``, and process pools pickle them.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Problem:
    """One finding of a check.

    Attributes
    ----------
    loc
        Where: an HDF5 path such as ``/samples/00000003/attentions/layer_005``, or a field name.
    message
        What was found, what was expected and what to do.
    kind
        A stable identifier for programs, such as ``missing_attribute``.
    """

    loc: str
    message: str
    kind: str

    def __str__(self) -> str:
        return f"{self.loc}: {self.message}"

    def as_dict(self) -> dict[str, str]:
        """The problem as a JSON-ready dict with the keys ``loc``, ``message`` and ``kind``."""
        return asdict(self)


class H5TracesError(Exception):
    """Base class of the errors that h5traces raises on purpose."""


class ArchiveError(H5TracesError):
    """An archive cannot be read or written; see the subclasses and the message."""


class NotAnArchiveError(ArchiveError):
    """The file is not an h5traces archive; name another file, or convert this one."""


class CorruptArchiveError(ArchiveError):
    """Stored bytes contradict a checksum, a size or a shape.

    Fetch the file again, or copy its intact samples with `h5traces.salvage`.
    """


class HostileFileError(CorruptArchiveError):
    """The file holds something that only attacks need; do not open it with other programs."""


class UnsupportedVersionError(ArchiveError):
    """The archive has a format version or feature that this release does not know; upgrade."""


class UnsupportedEncodingError(ArchiveError):
    """A stored value has an encoding that this release does not know; upgrade h5traces."""


class MissingFilterError(ArchiveError):
    """A dataset needs an HDF5 filter that is not available; the message names it."""


class RemoteError(ArchiveError):
    """A server cannot be reached, denies access, or cannot serve ranges; download the file."""


class ArchiveExistsError(ArchiveError):
    """The output exists; choose another name, or pass ``overwrite=True``."""


class RankBusyError(ArchiveError):
    """The rank is at work in another process; wait for it, stop it, or run another rank."""


class TargetError(ArchiveError, ValueError):
    """The output is not a valid name, or is one of the files that are read; name another."""


class OptionError(H5TracesError, ValueError):
    """Options or sources contradict each other or the files; the message says which."""


class ArgumentError(H5TracesError, TypeError):
    """An argument has the wrong type, or there is no such parameter; the message says what is."""


class SchemaError(H5TracesError, ValueError):
    """Metadata or a record does not fit the schema; `problems` lists every finding."""

    problems: tuple[Problem, ...]

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class TraceNotFoundError(H5TracesError, KeyError):
    """No sample has this id, or several have; look at the archive's ids, or use an index."""

    # KeyError would print the repr of the message.
    __str__ = Exception.__str__


class FieldNotFoundError(H5TracesError, KeyError):
    """A trace has no field of this name; the message lists those that it has."""

    # KeyError would print the repr of the message.
    __str__ = Exception.__str__


class LayerIndexError(H5TracesError, IndexError):
    """A layer or position is not stored; the message lists those that are."""


class SampleIndexError(H5TracesError, IndexError):
    """A sample is not stored; the message says how many are."""


class ReadOnlyError(H5TracesError, TypeError, AttributeError):
    """An archive, a trace or its layers were to be changed; the message says what can be."""


class ConversionError(H5TracesError):
    """A source cannot be converted; the message names file, sample and field."""


class UnsafePickleError(ConversionError):
    """A pickle asks for something outside the allow-list; nothing in it was executed."""


class ExtractionError(H5TracesError):
    """Activations cannot be extracted from a model; the message says what to change."""


class TooLongError(ExtractionError):
    """A prompt and its answer exceed the model's context; shorten either."""


class NanError(ExtractionError):
    """A sample contains NaN; compute in another type, or choose what to do with NaN."""


class PrecisionError(H5TracesError):
    """Arrays cannot be stored in the requested precision; choose another one."""


class LossyArchiveError(ArchiveError):
    """An archive that is not lossless lacks what was requested; use the archive it was made of."""


class HeadsNotStoredError(LossyArchiveError, KeyError):
    """The archive stores attentions averaged over heads; use the average, or another archive."""

    # KeyError would print the repr of the message.
    __str__ = Exception.__str__


class LossyWarning(UserWarning):
    """The archive that is read or written is not lossless."""


class FidelityError(H5TracesError):
    """Two archives cannot be compared: they share no samples, or their shapes differ."""


class FeatureError(H5TracesError):
    """Features cannot be computed, or are not finite; the message names the sample."""


class DatasetError(H5TracesError):
    """A training dataset cannot return a sample; the message names shard and sample."""


class MissingDependencyError(H5TracesError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class StoredStateWarning(UserWarning):
    """The archive is readable, but not in the usual way, for instance without its footer."""


__version__ = "0.1.0"


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "h5traces":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
