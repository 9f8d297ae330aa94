"""Shown beside an archive on the page: labels, findings of checks, scores of a features file."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from h5traces.archive.labels import labels_folder, largest_sidecar, sidecar_path
from h5traces.archive.opening import open as open_archive
from h5traces.checking.meaning import look_of, stored_content
from h5traces.errors import CorruptArchiveError, H5TracesError, OptionError
from h5traces.features.reductions import FEATURES
from h5traces.meaning.checks import CheckOptions
from h5traces.meaning.sample_checks import SampleChecks
from h5traces.storage.files import open_regular
from h5traces.storage.hdf5.others import open_datasets
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.paths import PathLike
    from h5traces.storage.remote.paths import RemotePath

    Path_ = Path | RemotePath

_ROWS: Final = 1024
_DIRECTIONS: Final = re.compile(r"(?:pca_(?P<pca>.+)_components|(?P<own>.+)_coef)\Z")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one archive, for the page.

    Attributes
    ----------
    entry
        What the page gets: ``name``, ``kind`` (``directions``, ``columns`` or ``tokens``),
        ``layers``, ``width``, and for directions their number, ``count``.
    path
        The numbers, float32. Of directions (layer, direction, weights and intercept), else
        (sample, layer, width).
    """

    entry: dict[str, Any]
    path: Path


@dataclass(slots=True)
class Shown:
    """An archive that the page shows, and what lies beside it."""

    path: Path_
    sidecar: Path | None = None
    scores: list[Scores] = field(default_factory=list)

    def labels(self) -> bytes | None:
        """The labels beside the archive as they are stored; None without such a file."""
        if self.sidecar is None or not self.sidecar.exists():
            return None
        with open_archive(self.path, labels=self.sidecar.parent) as archive:
            most = largest_sidecar(len(archive))
        with os.fdopen(open_regular(self.sidecar, CorruptArchiveError, links=False), "rb") as file:
            return file.read(most)

    def checks(self) -> list[str]:
        """Findings in the first sample, as `h5traces.inspect` states them."""
        with open_archive(self.path) as archive:
            examined = SampleChecks(replace(look_of(archive), full_mapper=map))
            for trace in archive[:1]:
                examined.add(to_record(trace), stored_content(trace))
        found = examined.findings.summaries(CheckOptions())
        return [str(each) for each in found if each.severity != "note"]


def shown(
    paths: Sequence[Path_],
    folder: Path,
    *,
    labels: PathLike | Literal[False] | None = None,
    scores: PathLike | None = None,
) -> list[Shown]:
    """The archives of a page; numbers of `scores` go into `folder`.

    Raises
    ------
    OptionError
        `scores` is not a features file of these archives.
    """
    place = labels_folder(labels)
    found = [
        Shown(path, None if place is False else sidecar_path(path, place or None)) for path in paths
    ]
    if scores is not None:
        with _Table(Path(scores)) as table:
            for number, each in enumerate(found):
                each.scores += table.scores(each.path, len(found), folder, f"scores-{number:05d}")
            if not any(each.scores for each in found):
                message = f"{scores}: holds no scores of these archives that can be shown by layer"
                raise OptionError(message)
    return found


class _Table:
    """A file that `h5traces features` wrote, or numpy's ``.npz`` with arrays of the same names."""

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".h5", ".npz"):
            message = f"{path}: scores come from .h5 or .npz, as 'h5traces features' writes them"
            raise OptionError(message)
        self._path = path
        self._arrays: Mapping[str, Any] = {}

    def __enter__(self) -> _Table:
        try:
            if self._path.suffix == ".npz":
                self._file: Any = np.load(self._path, allow_pickle=False)
                self._arrays = self._file
            else:
                self._file, found = open_datasets(self._path)
                self._arrays = {_npz_name(path): each for path, each in found.items()}
            self.layers = [int(each) for each in self._arrays["layers"][...]]
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError) as error:
            message = (
                f"{self._path}: is not a file of features ({error}); expected what "
                "'h5traces features' writes, "
                "or its arrays 'layers', 'archive' and 'index' beside your own in .npz"
            )
            raise OptionError(message) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def scores(
        self, archive: Path_, num_archives: int, folder: Path, stem: str
    ) -> Iterator[Scores]:
        """Write the numbers of an archive, one file for each array."""
        with open_archive(archive) as opened:
            num_samples = len(opened)
        rows = self._rows(archive.name, num_archives, num_samples)
        for number, (name, array) in enumerate(self._arrays.items()):
            path, directions = folder / f"{stem}-{number:03d}.f4", _DIRECTIONS.match(name)
            if directions is not None:
                yield self._directions(directions, array[...], path)
            elif rows is not None and self._is_score(name, array):
                yield self._values(name, array, rows, num_samples, path)

    def _rows(self, name: str, num_archives: int, num_samples: int) -> NDArray[np.int64] | None:
        """Of every sample of an archive, its row in the table, or -1."""
        if "index" not in self._arrays:
            return None
        ordinals = self._arrays["index"][...]
        archives = self._arrays["archive"][...].astype(str) if "archive" in self._arrays else None
        is_own = (
            np.ones(len(ordinals), bool)
            if archives is None and num_archives == 1
            else archives == name
        )
        is_own &= (ordinals >= 0) & (ordinals < num_samples)
        if not np.any(is_own):
            return None
        found = np.full(num_samples, -1, np.int64)
        found[ordinals[is_own]] = np.flatnonzero(is_own)
        return found

    def _is_score(self, name: str, array: Any) -> bool:
        is_state = name in FEATURES and FEATURES[name].is_state
        shape = (len(self._arrays["index"]), len(self.layers))
        return (
            array.dtype.kind == "f"
            and array.ndim in (2, 3)
            and array.shape[:2] == shape
            and not is_state
        )

    def _directions(self, found: re.Match[str], weights: NDArray[Any], path: Path) -> Scores:
        """Of principal components, or of linear probes: ``NAME_coef`` and ``NAME_intercept``."""
        weights = weights[:, np.newaxis] if weights.ndim == 2 else weights
        if found["pca"]:
            name, mean = f"{found['pca']}_pca", self._arrays[f"pca_{found['pca']}_mean"][...]
            intercept = -np.einsum("lkh,lh->lk", weights, mean)
        else:
            name = found["own"]
            intercept = np.zeros(weights.shape[:2])
            if f"{name}_intercept" in self._arrays:
                intercept = self._arrays[f"{name}_intercept"][...].reshape(weights.shape[:2])
        num_layers, count, width = weights.shape
        if num_layers != len(self.layers):
            message = (
                f"{self._path}: {found[0]} has {num_layers} layers, but 'layers' lists "
                f"{len(self.layers)}"
            )
            raise OptionError(message)
        np.concatenate([weights, intercept[..., np.newaxis]], axis=-1).astype("<f4").tofile(path)
        entry = {
            "name": name,
            "kind": "directions",
            "layers": self.layers,
            "count": count,
            "width": width,
        }
        return Scores(entry, path)

    def _values(
        self, name: str, array: Any, rows: NDArray[np.int64], num_samples: int, path: Path
    ) -> Scores:
        width = array.shape[2] if array.ndim == 3 else 1
        lengths = self._arrays.get("seq_len")
        is_by_token = (
            array.ndim == 3
            and lengths is not None
            and width == int(np.max(lengths[...], initial=0))
        )
        with path.open("wb") as out:
            for start in range(0, num_samples, _ROWS):
                wanted = rows[start : start + _ROWS]
                block = np.full((len(wanted), len(self.layers), width), np.nan, "<f4")
                for at, row in enumerate(wanted):
                    if row >= 0:
                        block[at] = array[row].reshape(len(self.layers), width)
                block.tofile(out)
        kind = "tokens" if is_by_token else "columns"
        return Scores({"name": name, "kind": kind, "layers": self.layers, "width": width}, path)


def _npz_name(path: str) -> str:
    """The name in ``.npz`` for a path in HDF5."""
    return path.removeprefix("features/").removeprefix("samples/").replace("/", "_")


def checks_document(each: Shown) -> bytes:
    """Findings in the form that the page reads, and what stopped the checks, if anything."""
    try:
        found = each.checks()
    except (H5TracesError, OSError) as error:
        found = [str(error)]
    return json.dumps(found, ensure_ascii=True).encode()
