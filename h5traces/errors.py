"""The exceptions of h5traces.

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

    def as_dict(self) -> dict[str, str]:
        """The problem as a JSON-ready dict with the keys ``loc``, ``message`` and ``kind``."""
        return asdict(self)


class H5TracesError(Exception):
    """Base class of every error that h5traces raises on purpose."""


class ArchiveError(H5TracesError):
    """An archive cannot be read or written."""


class NotAnArchiveError(ArchiveError):
    """The file is no h5traces archive: not HDF5, or HDF5 written by something else."""


class CorruptArchiveError(ArchiveError):
    """Stored bytes contradict themselves: a checksum, a size or a shape does not fit."""


class HostileFileError(CorruptArchiveError):
    """The file holds a construct that archives never contain and that attacks are made of."""


class UnsupportedVersionError(ArchiveError):
    """The archive's format version or a required feature is unknown to this release."""


class UnsupportedEncodingError(ArchiveError):
    """A stored element has an encoding name or version that this release does not know."""


class MissingFilterError(ArchiveError):
    """A dataset needs an HDF5 filter plugin that is not available."""


class RemoteError(ArchiveError):
    """A server cannot be reached, refuses access, or does not do what reading takes."""


class ArchiveExistsError(ArchiveError):
    """The target exists already and replacing it was not asked for."""


class TargetError(ArchiveError, ValueError):
    """An output is no name that its command can write, or is one of the files that it reads."""


class SchemaError(H5TracesError, ValueError):
    """Metadata or a record does not fit the schema; ``problems`` lists every finding."""

    problems: tuple[Problem, ...]

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[SchemaError], tuple[str, tuple[Problem, ...]]]:
        return type(self), (str(self), self.problems)


class TraceNotFoundError(H5TracesError, KeyError):
    """No trace has that sample id, or several have and the id alone is ambiguous."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class LayerIndexError(H5TracesError, IndexError):
    """A layer or position that the trace or archive does not store."""


class SampleIndexError(H5TracesError, IndexError):
    """A sample that the archive does not hold."""


class ConversionError(H5TracesError):
    """A legacy batch cannot be converted."""


class UnsafePickleError(ConversionError):
    """A pickle asks for something outside the allow-list; nothing of it was executed."""


class ExtractionError(H5TracesError):
    """Activations could not be extracted from a model."""


class TooLongError(ExtractionError):
    """A prompt and its answer do not fit into the model's context."""


class NanError(ExtractionError):
    """A sample has NaN among its values."""


class PrecisionError(H5TracesError):
    """Arrays cannot be stored as precisely, or as coarsely, as was asked for."""


class LossyArchiveError(ArchiveError):
    """An archive that stores less than its source held was asked for what it does not hold."""


class HeadsNotStoredError(LossyArchiveError, KeyError):
    """The archive holds attentions averaged over heads, not each head's."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class LossyWarning(UserWarning):
    """What is read or written holds less than its source did."""


class FidelityError(H5TracesError):
    """Two archives cannot be compared: nothing in common, or arrays of different shapes."""


class FeatureError(H5TracesError):
    """Features cannot be computed, or hold values that are no numbers."""


class DatasetError(H5TracesError):
    """A training dataset cannot give what was asked of it; the message names shard and sample."""


class MissingDependencyError(H5TracesError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class StoredStateWarning(UserWarning):
    """The archive can be read, but not in its usual way; for instance its footer is missing."""


__version__ = "0.1.0"


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "h5traces":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
