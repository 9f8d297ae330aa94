"""From archives to a file of features."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from h5traces.archive.labels import sidecar_path
from h5traces.archive.opening import open as open_archive
from h5traces.archive.selection import choose_samples
from h5traces.archive.shards import shared_metadata
from h5traces.arguments import checked, checked_options
from h5traces.errors import ArchiveExistsError, FeatureError, OptionError, __version__
from h5traces.features.components import fit_components, require_scikit_learn
from h5traces.features.samples import RowSums, definitions_of, fitted, iterate_features, place_of
from h5traces.features.sharing import SharedFeatures
from h5traces.features.table import FeatureTable, SpooledColumn
from h5traces.features.writing import FORMATS, check_writer, write_features
from h5traces.format import layout
from h5traces.format.html import Report
from h5traces.format.text import and_more, utc_now
from h5traces.paths import Target, check_not_a_source
from h5traces.ranks.plan import run_folder
from h5traces.ranks.rank import find_rank
from h5traces.ranks.run import check_no_overwrite
from h5traces.storage.publish import make_folder
from h5traces.writing.options import TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.selection import LayerChoice, SampleChoice
    from h5traces.features.samples import SampleFeatures
    from h5traces.paths import PathLike, Source

# Stands for a missing label; 0, 1 and -1 are labels that people use.
NO_LABEL: Final = -(2**63)
_BLOCK_ROWS = 1024


@checked_options
@dataclass(frozen=True, slots=True)
class PcaOptions:
    """Principal components of features of hidden states, fitted layer by layer.

    Attributes
    ----------
    num_components
        How many.
    samples
        Samples to fit on, such as those of a training split, as for `h5traces.repack`; all by
        default.
    only
        Leave out the features that were projected.
    """

    num_components: int
    samples: SampleChoice = None
    only: bool = False


@dataclass(slots=True)
class FeatureReport(Report):
    """What was computed.

    Attributes
    ----------
    archives, target
        Files read, and the file written (in a dry run: that would be written).
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
    notes
        What to know about the numbers: attention rows that do not sum to 1.
    nbytes
        Size of the file.
    is_written
        Whether `target` is there: a rank that does not end last leaves it to others.
    """

    archives: list[str]
    target: str
    layers: list[int]
    num_samples: int = 0
    num_labelled: int = 0
    shapes: dict[str, list[int]] = field(default_factory=dict)
    explained: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0
    is_written: bool = False


@checked
def extract_features(
    sources: Source | Iterable[Source],
    output: PathLike,
    names: Iterable[str],
    *,
    layers: LayerChoice = None,
    pca: int | PcaOptions | None = None,
    allow_nan: bool = False,
    target: TargetOptions = TargetOptions(),
    storage_options: Mapping[str, Any] | None = None,
    labels: PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
    rank: int | Literal["auto"] | None = None,
    world_size: int | None = None,
) -> FeatureReport:
    """Compute features of all samples and write them, with ids and labels, to one file.

    Memory stays at a few samples per worker: columns grow in nameless files beside `output`.

    Parameters
    ----------
    sources
        Archives, globs and folders, also on servers.
    output
        A file that ends in ``.h5``, ``.npz`` or ``.parquet``; in a folder (text that ends in a
        slash, or one that exists) it becomes ``features.h5``.
    names
        Features, of `FEATURES`; those of states also of another kind, ``mlp_output.last_token``.
    layers
        The model's own layer numbers; all that are stored by default.
    pca
        Also project features of hidden states on this many principal components, layer by layer:
        columns ``<name>_pca``, and what was fitted.
    allow_nan
        Write although features are NaN or infinite; components are then fitted on other rows.
    target
        ``overwrite`` `output`, or look at the first sample only and write nothing (``dry_run``);
        ``workers``. The other options do not apply.
    storage_options, labels
        As for `h5traces.open`.
    progress
        Called with the number of samples done and that of all samples, or of those of the rank.
    rank, world_size
        Compute the share of one of `world_size` processes. Rows lie in ``<output>.run`` until all
        are there; the rank that ends last writes `output`. See `docs/cluster.md`.

    Returns
    -------
    FeatureReport
        What was computed; ``is_written`` says whether `output` is there.

    Raises
    ------
    FeatureError
        A sample cannot have a feature, or features are NaN or infinite and `allow_nan` is false;
        the message names file and sample. Nothing is written.
    ArchiveExistsError
        `output` exists.
    TargetError
        `output` is one of the sources, under any name, or ends in another suffix; or its run was
        planned with other options or sources.
    OptionError
        `pca` is of no hidden states, or asks for more components than the samples have.
    MissingDependencyError
        `pca` needs scikit-learn, or ``.parquet`` needs pyarrow, and it is not installed.
    """
    target.check_unused("shard_samples", "skip_existing", "compare")
    place = Target.of(output, suffixes=FORMATS).named("features").shard(0)
    check_writer(place)
    chosen = find_rank(rank, world_size, run_folder(place))
    if chosen is not None:
        check_no_overwrite(overwrite=target.overwrite)
    components = PcaOptions(pca) if isinstance(pca, int) else pca
    definitions = definitions_of(names)
    wanted = [each.name for each in definitions]
    if components is not None:
        require_scikit_learn()
        if not any(each.is_state for each in definitions):
            message = (
                f"principal components are of hidden states, but only {', '.join(wanted)} is "
                "asked for"
            )
            raise OptionError(message)
    with open_archive(sources, storage_options=storage_options, labels=labels) as archive:
        may_exist = target.overwrite or chosen is not None
        _check_free(place, archive, labels, overwrite=may_exist)
        view = archive.select(layers=layers)
        # Now, since a wrong choice must not come out after hours.
        fit_on = choose_samples(components.samples if components else None, len(view))
        report = FeatureReport([str(each) for each in view.paths], str(place), list(view.layers))
        if target.dry_run:
            _look(view, wanted, report)
            return report
        make_folder(place.parent)
        writing = _Writing(view, wanted, report, place, components, fit_on, allow_nan=allow_nan)
        if chosen is None:
            rows = iterate_features(view, wanted, workers=target.workers)
            writing.write(_counting(rows, len(view), progress), overwrite=target.overwrite)
            return report
        shared = {"pca": components and repr(components), "allow_nan": allow_nan}
        with SharedFeatures(place, chosen, view, wanted, **shared) as run:
            if not run.is_joined:
                report.num_samples = run.compute(target.workers, progress)
                run.join(lambda: writing.write(run.rows(), overwrite=False))
            report.is_written = run.is_joined
    return report


def _counting(
    rows: Iterator[SampleFeatures], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[SampleFeatures]:
    for each in rows:
        yield each
        if progress is not None:
            progress(each.index + 1, total)


@dataclass(frozen=True, slots=True)
class _Writing:
    """Makes the table of rows and writes it; notes go to `report`."""

    view: Archive
    wanted: list[str]
    report: FeatureReport
    place: Path
    components: PcaOptions | None
    fit_on: Sequence[int]
    allow_nan: bool

    def write(self, rows: Iterator[SampleFeatures], *, overwrite: bool) -> None:
        view, report = self.view, self.report
        with closing(_Spool(self.place.parent)) as spool:
            sums = RowSums()
            for each in rows:
                sums.add(each)
                spool.add(each, place_of(view[each.index]))
                report.problems += each.problems
            if report.problems and not self.allow_nan:
                message = (
                    f"{and_more(report.problems, separator='; ')}. Nothing was written; leave "
                    "these samples or layers out, or pass allow_nan=True to write such values"
                )
                raise FeatureError(message)
            report.notes += [sums.note] if sums.note else []
            table = FeatureTable(
                spool.features(len(view)),
                _samples(view, report),
                {"layers": np.array(report.layers, dtype="<i8")},
                _metadata(view, self.wanted, report.notes),
            )
            if self.components is not None:
                _project(table, spool, self.components, self.fit_on, report)
            report.shapes = {name: list(each.shape) for name, each in table.features.items()}
            report.nbytes = write_features(table, self.place, overwrite=overwrite)
            report.is_written = True


def _check_free(
    target: Path, archive: Archive, labels: PathLike | None, *, overwrite: bool
) -> None:
    folder = None if labels is None else Path(labels)
    sidecars = (sidecar_path(path, folder) for path in archive.paths)
    check_not_a_source(target, [*archive.paths, *(each for each in sidecars if each is not None)])
    if target.exists() and not overwrite:
        message = f"{target} exists; pass overwrite=True to replace it, or another name"
        raise ArchiveExistsError(message)


def _look(view: Archive, wanted: list[str], report: FeatureReport) -> None:
    """Fill the report of a dry run from the first sample."""
    report.num_samples = len(view)
    report.num_labelled = sum(label is not None for label in view.labels)
    for each in iterate_features(view[:1], wanted, workers=1):
        report.problems = each.problems
        report.shapes = {name: [len(view), *row.shape] for name, row in each.values.items()}


class _Spool:
    """The columns while samples come in; the first sample that has a feature decides its width."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._columns: dict[str, SpooledColumn] = {}
        # Samples without the arrays that a feature is made of, before the first that has them.
        self._waiting: Counter[str] = Counter()

    def new(self, name: str, row_shape: tuple[int, ...]) -> SpooledColumn:
        """A further column."""
        self._columns[name] = SpooledColumn(self._folder, row_shape)
        return self._columns[name]

    def add(self, sample: SampleFeatures, place: str) -> None:
        """Add the next sample's features."""
        for name, values in sample.values.items():
            column = self._columns.get(name)
            if column is None and not values.shape[1]:
                self._waiting[name] += 1
                continue
            if column is None:
                column = self.new(name, values.shape)
                for _ in range(self._waiting.pop(name, 0)):
                    column.append(np.full(values.shape, np.nan, dtype=np.float32))
            column.append(fitted(values, column.width, f"{place}: {name}"))

    def features(self, num_samples: int) -> dict[str, NDArray[np.float32]]:
        """All columns."""
        if self._waiting or not self._columns:
            names = ", ".join(self._waiting) or "features"
            message = f"none of {num_samples} samples has the arrays that {names} is made of"
            raise FeatureError(message)
        return {name: column.values for name, column in self._columns.items()}

    def close(self) -> None:
        """Delete the files."""
        for column in self._columns.values():
            column.close()


def _samples(view: Archive, report: FeatureReport) -> dict[str, np.ndarray]:
    """Ids, places, labels and scores of the rows."""
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


def _metadata(view: Archive, wanted: list[str], notes: list[str]) -> dict[str, Any]:
    return {
        "format": layout.FEATURES_FORMAT,
        "format_version": "1.0",
        "generator": f"h5traces {__version__}",
        "created": utc_now(),
        "model_id": view.metadata.model_id or "",
        "archive_ids": [file.metadata.archive_id for file in view._files],
        "losses": [str(each) for each in shared_metadata(view._files).losses],
        "notes": notes,
        "features": {each.name: each.meaning for each in definitions_of(wanted)},
    }


def _project(
    table: FeatureTable,
    spool: _Spool,
    options: PcaOptions,
    fit_on: Sequence[int],
    report: FeatureReport,
) -> None:
    """Add the projections of features of hidden states, layer by layer, and what was fitted."""
    for name in [each.name for each in definitions_of(table.features) if each.is_state]:
        values = table.features[name]
        layers = range(values.shape[1])
        fits = [
            fit_components(_finite_rows(values[:, layer], fit_on), options.num_components)
            for layer in layers
        ]
        target = spool.new(f"{name}_pca", (len(layers), options.num_components))
        for row in values:
            parts = [fits[layer].transform(row[None, layer])[0] for layer in layers]
            target.append(np.stack(parts))
        table.features[f"{name}_pca"] = target.values
        for fact in ("components", "mean", "explained_variance", "explained_variance_ratio"):
            table.others[f"pca/{name}/{fact}"] = np.stack([getattr(fit, fact) for fit in fits])
        ratios = (fit.explained_variance_ratio.sum() for fit in fits)
        report.explained[name] = [round(float(each), 6) for each in ratios]
        if options.only:
            del table.features[name]


def _finite_rows(
    values: NDArray[np.float32], indices: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(indices), _BLOCK_ROWS):
        rows = values[list(indices[start : start + _BLOCK_ROWS])]
        yield rows[np.isfinite(rows).all(axis=1)]
