"""From archives to a file of features."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.archive import shared_metadata
from h5traces.archive.opening import open_archive
from h5traces.archive.selection import choose_samples
from h5traces.errors import ArchiveExistsError, FeatureError, __version__
from h5traces.features.pca import PrincipalComponents, StreamingPCA
from h5traces.features.reductions import FEATURES
from h5traces.features.samples import definitions_of, fitted, iterate_features, place_of
from h5traces.features.table import Column, FeatureTable, SpooledColumn
from h5traces.features.writing import check_target, write_features
from h5traces.format.text import and_more
from h5traces.storage.publish import make_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from h5traces.archive.archive import Archive
    from h5traces.features.samples import SampleFeatures
    from h5traces.paths import PathLike, Source

FEATURES_FORMAT = "h5traces-features"
FEATURES_VERSION = "1.0"
# In the column of labels where there is none; 0, 1 and -1 are labels that people use.
NO_LABEL = -(2**63)
_PCA_ROWS = 1024


@dataclass(slots=True)
class FeatureReport:
    """What was computed.

    Attributes
    ----------
    archives, target
        Files read, and the file written (or, in a dry run, that would be).
    layers
        The model's own layer numbers, the second axis of every feature.
    num_samples, num_labelled
        Rows, and those with a label.
    shapes
        By feature, the shape of its array.
    explained
        By feature and layer, the share of variance that the principal components explain.
    problems
        Rows with NaN or infinite values: file, sample, feature and layers.
    nbytes
        Size of the file.
    """

    archives: list[str]
    target: str
    layers: list[int]
    num_samples: int = 0
    num_labelled: int = 0
    shapes: dict[str, list[int]] = field(default_factory=dict)
    explained: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    nbytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


def extract_features(
    sources: Source | Iterable[Source],
    output: PathLike,
    names: Iterable[str],
    *,
    layers: Iterable[int] | None = None,
    pca: int | None = None,
    pca_samples: slice | Sequence[int] | None = None,
    pca_only: bool = False,
    allow_nan: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    labels: PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureReport:
    """Compute features of all samples and write them, with ids and labels, to one file.

    Memory stays at a few samples per worker: columns grow in nameless files beside `output`.

    Parameters
    ----------
    sources
        Archives, globs and folders, also on servers.
    output
        ``.h5``, ``.npz`` or ``.parquet``.
    names
        Features, of `FEATURES`.
    layers
        The model's own layer numbers; all that are stored by default.
    pca
        Also project features of hidden states on this many principal components, layer by layer:
        columns ``<name>_pca``, and what was fitted.
    pca_samples
        Samples to fit on, such as those of a training split; all by default.
    pca_only
        Leave out the features that were projected.
    allow_nan
        Write although features are NaN or infinite; components are then fitted on other rows.
    workers
        Threads; one per core by default.
    overwrite
        Replace `output`.
    dry_run
        Look at the first sample only, and write nothing.
    storage_options, labels
        As for `h5traces.open`.
    progress
        Called with the samples done and the samples there are.

    Raises
    ------
    FeatureError
        A sample cannot have a feature, or features are NaN or infinite and `allow_nan` is false;
        the message names file and sample. Nothing is written.
    ArchiveExistsError
        `output` exists.
    """
    target = Path(output)
    check_target(target)
    if target.exists() and not overwrite:
        message = f"{target} exists; use --overwrite to replace it, or another name"
        raise ArchiveExistsError(message)
    wanted = [each.name for each in definitions_of(names)]
    projected = [name for name in wanted if FEATURES[name].is_state] if pca is not None else []
    if pca is not None and not projected:
        message = f"principal components are of hidden states, but only {', '.join(wanted)} is "
        msg = f"{message}asked for"
        raise FeatureError(msg)
    with open_archive(sources, storage_options=storage_options, labels=labels) as archive:
        view = archive if layers is None else archive.select(layers=layers)
        report = FeatureReport([str(each) for each in view.paths], str(target), list(view.layers))
        if dry_run:
            _look(view, wanted, report)
            return report
        make_folder(target.parent)
        with _Spool(target.parent, len(view)) as spool:
            for each in iterate_features(view, wanted, workers=workers):
                spool.add(each, view)
                report.problems += each.problems
                if progress is not None:
                    progress(each.index + 1, len(view))
            _check_problems(report, allow_nan=allow_nan)
            table = FeatureTable(dict(spool.finished()), _samples(view, report), {}, {})
            table.others["layers"] = np.array(report.layers, dtype="<i8")
            table.metadata = _metadata(view, wanted)
            if pca is not None:
                fit_on = choose_samples(pca_samples, len(view))
                for name in projected:
                    _project(table, spool, name, pca, fit_on, report)
                    if pca_only:
                        del table.features[name]
            report.shapes = {name: list(each.shape) for name, each in table.features.items()}
            report.nbytes = write_features(table, target, overwrite=overwrite)
    return report


class _Spool:
    """The columns while samples come in; the width of each is known with the first that has one."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self._folder, self._num_samples = folder, num_samples
        self.columns: dict[str, SpooledColumn] = {}
        # Samples without the arrays that a feature is made of, before the first that has them.
        self._waiting: dict[str, int] = {}

    def new(self, name: str, row_shape: tuple[int, ...]) -> SpooledColumn:
        """A further column."""
        self.columns[name] = SpooledColumn(self._folder, row_shape)
        return self.columns[name]

    def add(self, sample: SampleFeatures, archive: Archive) -> None:
        """The next sample's features."""
        for name, values in sample.values.items():
            column = self.columns.get(name)
            if column is None and not values.shape[1]:
                self._waiting[name] = self._waiting.get(name, 0) + 1
                continue
            if column is None:
                column = self.new(name, values.shape)
                for _ in range(self._waiting.pop(name, 0)):
                    column.append(np.full(values.shape, np.nan, dtype=np.float32))
            place = f"{place_of(archive[sample.index])}: {name}"
            column.append(fitted(values, column.shape[2], place))

    def finished(self) -> dict[str, Column]:
        """All columns.

        Raises
        ------
        FeatureError
            No sample has the arrays that a feature is made of.
        """
        if self._waiting or not self.columns:
            names = ", ".join(self._waiting) or "features"
            message = f"none of {self._num_samples} samples has the arrays that {names} is made of"
            raise FeatureError(message)
        return dict(self.columns)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for column in self.columns.values():
            column.close()


def _look(view: Archive, wanted: list[str], report: FeatureReport) -> None:
    """Fill the report of a dry run from the first sample."""
    report.num_samples = len(view)
    report.num_labelled = sum(label is not None for label in view.labels)
    for each in iterate_features(view[:1], wanted, workers=1):
        report.problems = each.problems
        report.shapes = {name: [len(view), *row.shape] for name, row in each.values.items()}


def _check_problems(report: FeatureReport, *, allow_nan: bool) -> None:
    if allow_nan or not report.problems:
        return
    message = (
        f"{and_more(report.problems, separator='; ')}. Nothing was written; leave these "
        "samples or layers out, or use --allow-nan to write such values"
    )
    raise FeatureError(message)


def _samples(view: Archive, report: FeatureReport) -> dict[str, np.ndarray]:
    """What tells the rows apart, and their labels and scores."""
    found = [(trace.path.name, trace.position_in_file, trace.metadata) for trace in view]
    report.num_samples = len(found)
    report.num_labelled = sum(metadata.label is not None for _, _, metadata in found)

    def numbers(name: str, absent: int) -> np.ndarray:
        values = [getattr(metadata, name) for _, _, metadata in found]
        return np.array([absent if each is None else each for each in values], dtype="<i8")

    columns = {
        "archive": np.array([name for name, _, _ in found], dtype=object),
        "index": np.array([index for _, index, _ in found], dtype="<i8"),
        "sample_id": np.array([each.sample_id or "" for _, _, each in found], dtype=object),
        "generation_index": numbers("generation_index", -1),
        "seq_len": numbers("seq_len", -1),
        "prompt_len": numbers("prompt_len", -1),
        "label": numbers("label", NO_LABEL),
        "has_label": np.array([each.label is not None for _, _, each in found], dtype="u1"),
    }
    scores = sorted({name for _, _, each in found for name in each.scores or {}})
    for name in scores:
        values = [(each.scores or {}).get(name, np.nan) for _, _, each in found]
        columns[f"score_{name}"] = np.array(values, dtype="<f8")
    return columns


def _metadata(view: Archive, wanted: list[str]) -> dict[str, Any]:
    metadata = view.metadata
    return {
        "format": FEATURES_FORMAT,
        "format_version": FEATURES_VERSION,
        "generator": f"h5traces {__version__}",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model_id": metadata.model_id or "",
        "archive_ids": [file.metadata.archive_id for file in view.files],
        "losses": [str(each) for each in shared_metadata(view.files).losses],
        "features": {name: FEATURES[name].meaning for name in wanted},
    }


def _project(
    table: FeatureTable,
    spool: _Spool,
    name: str,
    num_components: int,
    fit_on: Sequence[int],
    report: FeatureReport,
) -> None:
    """Add the projections of one feature, layer by layer, and what was fitted."""
    source = spool.columns[name]
    num_samples, num_layers, _ = source.shape
    fitted_layers: list[PrincipalComponents] = []
    for layer in range(num_layers):
        fitted_layers.append(_fit(source, layer, num_components, fit_on))
    target = spool.new(f"{name}_pca", (num_layers, num_components))
    for start in range(num_samples):
        row = source.rows(start, start + 1)[0]
        parts = [each.transform(row[i : i + 1])[0] for i, each in enumerate(fitted_layers)]
        target.append(np.stack(parts))
    table.features[f"{name}_pca"] = target
    facts = ("components", "mean", "explained_variance", "explained_variance_ratio")
    for fact in facts:
        values = np.stack([getattr(each, fact) for each in fitted_layers])
        table.others[f"pca/{name}/{fact}"] = values
    ratios = table.others[f"pca/{name}/explained_variance_ratio"].sum(axis=1)
    report.explained[name] = [round(float(each), 6) for each in ratios]


def _fit(
    source: SpooledColumn, layer: int, num_components: int, fit_on: Sequence[int]
) -> PrincipalComponents:
    pca = StreamingPCA(num_components)
    for start in range(0, len(fit_on), _PCA_ROWS):
        chosen = fit_on[start : start + _PCA_ROWS]
        rows = np.concatenate([source.layer_rows(layer, each, each + 1) for each in chosen])
        pca.partial_fit(rows[np.isfinite(rows).all(axis=1)])
    return pca.finished()
