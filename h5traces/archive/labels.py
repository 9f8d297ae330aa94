"""The labels that lie beside an archive file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import ValidationError

from h5traces.errors import (
    CorruptArchiveError,
    H5TracesError,
    OptionError,
    Problem,
    SchemaError,
    UnsupportedVersionError,
)
from h5traces.format import layout
from h5traces.format.archive import LABELS_FORMAT, LabelSidecar
from h5traces.format.document import problems_of
from h5traces.format.text import and_more, counted
from h5traces.storage.files import open_regular
from h5traces.storage.remote.paths import RemotePath, is_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.format.archive import ArchiveMetadata
    from h5traces.format.record import TraceMetadata
    from h5traces.paths import PathLike

SIDECAR_SUFFIX = ".labels.json"
_EXPECTED: Final = (
    "expected what 'h5traces label' writes; move the file away, or write it anew with that command"
)
_KIND: Final = "a file of labels that 'h5traces label' wrote"
# Of the document itself, and of each sample: id, label and scores.
_BASE_NBYTES: Final = 64 << 10
_SAMPLE_NBYTES: Final = 4 << 10
# Millions of labels; JSON takes several times its size in memory.
_MOST_NBYTES: Final = 512 << 20


def sidecar_path(archive: Path | RemotePath, folder: Path | None = None) -> Path | None:
    """Where the labels of an archive file lie: beside it, or in a folder for all of them.

    None beside an archive on a server, where labels are not looked for.
    """
    name = f"{archive.name}{SIDECAR_SUFFIX}"
    if folder is not None:
        return folder / name
    return None if isinstance(archive, RemotePath) else archive.with_name(name)


def labels_folder(labels: PathLike | Literal[False] | None) -> Path | Literal[False] | None:
    """The folder of labels that a user named; False for none, None for the archives' own folders.

    Raises
    ------
    OptionError
        It is not a folder on disk.
    """
    if labels is None or labels is False:
        return labels
    if is_url(labels):
        message = f"labels={labels!r} is on a server; expected a folder on disk"
        raise OptionError(message)
    if not isinstance(labels, (str, os.PathLike)):
        message = f"labels={labels!r}, expected a folder of labels, False or None"
        raise OptionError(message)
    folder = Path(labels)
    if not folder.is_dir():
        message = (
            f"labels={str(folder)!r} is not a folder; expected one that 'h5traces label' filled"
        )
        raise OptionError(message)
    return folder


class FileLabels:
    """The labels of the samples of one archive file, and where they came from."""

    def __init__(self, sidecar: LabelSidecar, place: str) -> None:
        self.sidecar, self._place = sidecar, place
        self._rows = {ordinal: row for row, ordinal in enumerate(sidecar.ordinals)}

    def has_label(self, ordinal: int) -> bool:
        """Whether a sample has a label here."""
        return self.sidecar.labels is not None and ordinal in self._rows

    def label(self, sample_id: str | None, ordinal: int) -> int | None:
        """The label of a sample that has one here; errors as of `labelled`."""
        assert self.sidecar.labels is not None
        row = self._rows[ordinal]
        self._check_id(row, sample_id)
        return self.sidecar.labels[row]

    def labelled(self, metadata: TraceMetadata, ordinal: int) -> TraceMetadata:
        """A sample's metadata with its label and scores; unchanged without one.

        SchemaError where the label is of a sample with another id.
        """
        row = self._rows.get(ordinal)
        if row is None:
            return metadata
        self._check_id(row, metadata.sample_id)
        sidecar = self.sidecar
        scores = {name: column[row] for name, column in sidecar.scores.items()}
        label = metadata.label if sidecar.labels is None else sidecar.labels[row]
        return metadata.model_copy(
            update={"label": label, "scores": {**(metadata.scores or {}), **scores} or None}
        )

    def _check_id(self, row: int, sample_id: str | None) -> None:
        if self.sidecar.sample_ids[row] != sample_id:
            message = (
                f"{self._place}: sample {self.sidecar.ordinals[row]} is "
                f"{self.sidecar.sample_ids[row]!r} there, but {sample_id!r} in the archive; run "
                "'h5traces label' again"
            )
            raise SchemaError(message)


def label_problems(
    archive: Path, root: ArchiveMetadata, samples: Sequence[TraceMetadata | None]
) -> list[Problem]:
    """What is wrong with the labels beside an archive, if there are any.

    `root` are the metadata of the archive, `samples` those of its samples, None if they are
    damaged.
    """
    place = archive.with_name(f"{archive.name}{SIDECAR_SUFFIX}")
    try:
        labels = read_sidecar(place, archive, root)
        if labels is not None:
            for ordinal, metadata in enumerate(samples):
                if metadata is not None:
                    labels.labelled(metadata, ordinal)
    except H5TracesError as error:
        return [Problem(place.name, str(error).removeprefix(f"{place}: "), "wrong_labels")]
    return []


def largest_sidecar(num_samples: int) -> int:
    """Size in bytes that the labels of an archive may have."""
    return min(_BASE_NBYTES + num_samples * _SAMPLE_NBYTES, _MOST_NBYTES)


def read_sidecar(
    place: Path, archive: Path | RemotePath, metadata: ArchiveMetadata
) -> FileLabels | None:
    """The labels in a file, which must be those of an archive; None if it does not exist.

    Nothing but a regular file is opened, and no symbolic link is followed. What does not fit the
    archive is rejected before its columns are looked at.

    SchemaError, CorruptArchiveError and UnsupportedVersionError as for an archive.
    """
    try:
        document = _read_json(place, metadata.num_samples)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        message = f"{place}: is not JSON ({error}); {_EXPECTED}"
        raise CorruptArchiveError(message) from error
    if not isinstance(document, dict) or document.get("format") != LABELS_FORMAT:
        message = f"{place}: holds something other than labels; {_EXPECTED}"
        raise CorruptArchiveError(message)
    version = layout.parse_version(str(document.get("format_version")))
    if version is not None and version[0] != layout.FORMAT_MAJOR:
        message = f"{place}: format version is {version[0]}.{version[1]}; upgrade h5traces"
        raise UnsupportedVersionError(message)
    _check_archive(place, document, archive, metadata)
    try:
        # Not from JSON: pydantic's parser rejects the lone surrogates that ids may hold.
        return FileLabels(LabelSidecar.model_validate(_with_columns(document)), str(place))
    except ValidationError as error:
        problems = problems_of(error)
        message = f"{place}: {and_more(problems, separator='; ')}"
        raise SchemaError(message, problems) from error


def _read_json(place: Path, num_samples: int) -> Any:
    most = largest_sidecar(num_samples)
    try:
        with os.fdopen(open_regular(place, CorruptArchiveError, _KIND, links=False), "rb") as file:
            content = file.read(most + 1)
    except IsADirectoryError as error:
        message = f"{place}: is a folder, expected {_KIND}"
        raise CorruptArchiveError(message) from error
    if len(content) > most:
        message = (
            f"{place}: has more than {most} bytes, the most that 'h5traces label' writes for "
            f"{counted(num_samples, 'sample')}"
        )
        raise CorruptArchiveError(message)
    return json.loads(content)


def _check_archive(
    place: Path, document: dict[str, Any], archive: Path | RemotePath, metadata: ArchiveMetadata
) -> None:
    """Raise SchemaError for labels of another archive."""
    found = document.get("archive_id")
    if found != metadata.archive_id:
        message = (
            f"{place}: holds labels of the archive {str(found)[:40]}, but {archive} is "
            f"{metadata.archive_id}: it was rewritten since, or the labels belong to another file; "
            "run 'h5traces label' again, or move the labels away"
        )
        raise SchemaError(message)
    number = document.get("num_samples")
    if number != metadata.num_samples:
        message = (
            f"{place}: num_samples is {str(number)[:40]}, but {archive} has "
            f"{metadata.num_samples}; run 'h5traces label' again"
        )
        raise SchemaError(message)


def _with_columns(document: dict[str, Any]) -> dict[str, Any]:
    """The document with lists as tuples, which strict validation asks for."""

    def of(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    plain = {key: of(value) for key, value in document.items()}
    if isinstance(plain.get("scores"), dict):
        plain["scores"] = {name: of(column) for name, column in plain["scores"].items()}
    return plain
