"""Measures the scales of a model's hidden states, from which quantisation steps are made."""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h5traces.archive.hdf5_store import Hdf5Store
from h5traces.archive.opening import open as open_archive
from h5traces.archive.scales import stored_statistics
from h5traces.archive.selection import as_numbers, choose_layers
from h5traces.arguments import checked
from h5traces.errors import ArchiveExistsError, OptionError, PrecisionError, __version__
from h5traces.format import layout
from h5traces.format.html import Report
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.precision import CalibrationRecord
from h5traces.format.record import StepArrays
from h5traces.format.text import utc_now
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import Target, check_not_a_source, local_path
from h5traces.precision.encoding import STEPPED_KINDS, may_be_encoded
from h5traces.precision.scales import METHOD, Calibration, ChannelAccumulator, stored_arrays
from h5traces.sources.collecting import archives_and_sources
from h5traces.sources.opening import facts_in_name, is_read_as_archive, open_source
from h5traces.sources.runs import readings_of
from h5traces.storage.hdf5.writing import Hdf5Writer
from h5traces.storage.publish import PartFile, make_folder, remove_abandoned_parts
from h5traces.storage.threads import ThreadPool
from h5traces.writing.archive_writer import write_scales
from h5traces.writing.options import DEFAULT_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.selection import LayerChoice
    from h5traces.archive.trace import Trace
    from h5traces.format.precision import Precision
    from h5traces.format.record import TraceRecord
    from h5traces.paths import PathLike

    # Path of a layer, and its hidden states (tokens, hidden).
    States = Iterable[tuple[str, NDArray[Any]]]


@dataclass(slots=True)
class CalibrationReport(Report):
    """What a calibration measured.

    Attributes
    ----------
    path
        The file of scales.
    num_samples, num_tokens
        What was measured; the first token of each sample is left out.
    num_not_finite
        Tokens left out because of a NaN or infinite value, in the layer with the most.
    layers
        Paths of the layers, such as ``hidden_states/layer_005``.
    hidden_size
        Channels of the hidden states.
    model_id
        The model that the sources name.
    """

    path: str
    num_samples: int = 0
    num_tokens: int = 0
    num_not_finite: int = 0
    layers: list[str] = field(default_factory=list)
    hidden_size: int = 0
    model_id: str | None = None


@checked
def calibrate(
    sources: PathLike | Iterable[PathLike],
    dest: PathLike,
    *,
    samples: int = DEFAULT_SAMPLES,
    layers: LayerChoice = None,
    reading: ReadingOptions = ReadingOptions(),
    model_id: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationReport:
    """Measure the channels of hidden states on some samples, and write a file of scales.

    Memory holds one sample and a few megabytes per layer.

    Parameters
    ----------
    sources
        Archives or files of other programs, globs, folders; of one model.
    dest
        The new file, a name that ends in ``.h5``; in a folder, ``scales.h5``.
    samples
        Number of samples to measure, from the beginning of the sources.
    layers
        Decoder blocks to measure: numbers, or text such as ``0,5,last``; all by default.
    reading
        What a batch does not say itself.
    model_id
        Recorded; the name in the sources by default.
    overwrite
        Replace `dest`.
    dry_run
        Measure only.
    progress
        Called with the samples measured and the samples wanted.

    Raises
    ------
    OptionError
        `samples` is not positive.
    TargetError
        `dest` is no such name, or one of the sources.
    PrecisionError
        The samples come from several models, have several widths, or hold no hidden states.
    ArchiveExistsError
        `dest` exists.
    ConversionError, ArchiveError
        A source cannot be read.
    """
    if samples < 1:
        message = f"samples is {samples}, expected at least 1"
        raise OptionError(message)
    target = Target.of(dest).named("scales").path
    paths = [local_path(each) for each in archives_and_sources(sources, reading)]
    check_not_a_source(target, paths)
    if target.exists() and not overwrite:
        message = f"{target} exists; use overwrite=True to replace it, or another name"
        raise ArchiveExistsError(message)
    files = [path for path in paths if not is_read_as_archive(path, reading)]
    readings = readings_of(files, reading)
    with Measurement(layers) as measurement:
        for path in paths:
            with contextlib.closing(_samples(path, readings.get(path, reading))) as found:
                measurement.add_first(path.name, found, samples, progress)
            if measurement.num_samples >= samples:
                break
        name = model_id or _one_model(paths[: len(measurement.sources)], reading)
        calibration = measurement.calibration(name)
    if not dry_run:
        save_calibration(calibration, target, overwrite=overwrite)
    assert calibration.record is not None
    return CalibrationReport(
        str(target),
        calibration.record.num_samples,
        calibration.record.num_tokens,
        measurement.num_not_finite,
        sorted(calibration.layers),
        len(next(iter(calibration.layers.values())).sigma),
        calibration.record.model_id,
    )


class Measurement:
    """Measures the hidden states of samples, layers side by side."""

    def __init__(self, layers: LayerChoice = None) -> None:
        self._layers = layers if layers is None or isinstance(layers, str) else as_numbers(layers)
        self._accumulators: dict[str, ChannelAccumulator] = {}
        # Each thread holds copies of a layer.
        self._pool = ThreadPool(os.cpu_count())
        self.num_samples = 0
        self.sources: list[str] = []

    def add(self, source: str, states: States) -> None:
        """Measure one sample."""
        wanted = self._wanted(states)
        for path, _ in wanted:
            self._accumulators.setdefault(path, ChannelAccumulator())
        try:
            list(self._pool.map(lambda each: self._accumulators[each[0]].add(each[1]), wanted))
        except PrecisionError as error:
            message = f"{source}: sample {self.num_samples}: {error}"
            raise PrecisionError(message) from error
        if source not in self.sources:
            self.sources.append(source)
        self.num_samples += 1

    def add_first(
        self,
        source: str,
        samples: Iterable[States],
        most: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Measure samples of a source until there are `most`, those of earlier sources included."""
        for states in itertools.islice(samples, most - self.num_samples):
            self.add(source, states)
            if progress is not None:
                progress(self.num_samples, most)

    def _wanted(self, states: States) -> list[tuple[str, NDArray[Any]]]:
        if isinstance(self._layers, str):
            # The first sample says which layer is the last.
            states = list(states)
            found = {layer for path, _ in states if (layer := _layer(path)) is not None}
            self._layers = choose_layers(self._layers, sorted(found))
        layers = self._layers
        return [
            (path, values)
            for path, values in states
            if layers is None or (layer := _layer(path)) is None or layer in layers
        ]

    @property
    def has_states(self) -> bool:
        """Whether any layer had a token to measure."""
        return any(each.num_tokens for each in self._accumulators.values())

    @property
    def num_not_finite(self) -> int:
        """Tokens left out because a value is not finite, in the layer with the most."""
        return max((each.num_not_finite for each in self._accumulators.values()), default=0)

    def calibration(self, model_id: str | None, *, partial: bool = False) -> Calibration:
        """The statistics so far; if `partial`, without layers that had no token to measure."""
        measured = {
            path: each
            for path, each in self._accumulators.items()
            if each.num_tokens or not partial
        }
        found = {}
        for path, accumulator in measured.items():
            try:
                found[path] = accumulator.statistics()
            except PrecisionError as error:
                message = f"{', '.join(self.sources)}: {path}: {error}"
                raise PrecisionError(message) from error
        if not found:
            message = (
                f"{', '.join(self.sources) or 'the sources'}: {self.num_samples} samples without "
                "hidden states (tokens, hidden), so there is nothing to measure"
            )
            raise PrecisionError(message)
        record = CalibrationRecord(
            num_samples=self.num_samples,
            num_tokens=min(each.num_tokens for each in measured.values()),
            sources=tuple(self.sources),
            model_id=model_id,
            generator=f"h5traces {__version__}",
            method=METHOD,
        )
        return Calibration(found, record)

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _layer(path: str) -> int | None:
    return layout.parse_layer_name(path.rpartition("/")[2])


def _is_measured(kind: str, definition: str | None) -> bool:
    return kind in STEPPED_KINDS and may_be_encoded(kind, definition)


def record_states(record: TraceRecord) -> Iterator[tuple[str, NDArray[Any]]]:
    """States ``(tokens, channels)`` of a record: hidden states, and what is added to them."""
    for kind, layered in record.layered.items():
        if not _is_measured(kind, layered.definition):
            continue
        for each in layered.arrays:
            if not isinstance(each.array, StepArrays) and len(each.array.shape) == 2:
                yield f"{kind}/{each.name}", each.array.load().to_numpy()


def trace_states(trace: Trace) -> Iterator[tuple[str, NDArray[Any]]]:
    """States ``(tokens, channels)`` of a stored trace, likewise."""
    stored = trace._stored
    kinds = {kind for kind in stored.kinds if _is_measured(kind, stored.definition(kind))}
    for path in stored.objects:
        kind, _, name = path.partition("/")
        if kind in kinds and name and name not in layout.TABLES:
            array = stored.typed_layer(kind, name)
            if not isinstance(array, list) and len(array.shape) == 2:
                yield path, array.to_numpy()


def _samples(path: Path, reading: ReadingOptions) -> Generator[States]:
    """The hidden states of every sample of a file."""
    if is_read_as_archive(path, reading):
        with open_archive(path) as archive:
            yield from map(trace_states, archive)
        return
    yield from batch_states(path, reading)


def batch_states(path: Path, reading: ReadingOptions = ReadingOptions()) -> Generator[States]:
    """The hidden states of every sample of a legacy batch."""
    with open_source(path, reading) as source:
        yield from map(record_states, source.records())


def measured(archive: Archive, samples: int) -> Calibration:
    """Measure the selected layers of the first samples; empty if there are no hidden states."""
    with Measurement(archive.layers) as measurement:
        for trace in archive[:samples]:
            measurement.add(trace.path.name, trace_states(trace))
        if not measurement.has_states:
            return Calibration()
        return measurement.calibration(archive.metadata.model_id, partial=True)


def _one_model(paths: Sequence[Path], reading: ReadingOptions) -> str | None:
    """The model that the sources name."""
    found: dict[str, Path] = {}
    for path in paths:
        name = _model_of(path, reading)
        if name is not None:
            found.setdefault(name, path)
    if len(found) > 1:
        named = ", ".join(f"{path} from {name}" for name, path in found.items())
        message = f"the sources come from several models: {named}; calibrate each by itself"
        raise PrecisionError(message)
    return next(iter(found), None)


def _model_of(path: Path, reading: ReadingOptions) -> str | None:
    if not is_read_as_archive(path, reading):
        return facts_in_name(path).get("model_id")
    with open_archive(path) as archive:
        return archive.metadata.model_id


def save_calibration(calibration: Calibration, target: Path, *, overwrite: bool = False) -> None:
    """Write a file of scales; it appears under its name when it is complete."""
    make_folder(target.parent)
    remove_abandoned_parts(target)
    with PartFile(target) as part:
        hdf5 = Hdf5Writer(part.file)
        hdf5.add_attributes(
            "/",
            {
                "format": layout.SCALES_FORMAT,
                "format_version": layout.FORMAT_VERSION,
                "created": utc_now(),
            },
        )
        with ThreadPool() as pool:
            write_scales(hdf5, stored_arrays(calibration), calibration.record, pool)
        hdf5.close()
        part.file.raise_error()
        part.sync()
        part.publish(overwrite=overwrite)


def load_calibration(path: PathLike, *, may_be_empty: bool = False) -> Calibration:
    """Read the scales of a file that `calibrate` wrote, or of an archive."""
    file = Path(path)
    with contextlib.closing(Hdf5Store(file, DEFAULT_LIMITS)) as store:
        found = stored_statistics(store)
    if may_be_empty and (found is None or not found.layers):
        return Calibration()
    if found is None or not found.layers:
        message = (
            f"{file}: holds no scales; expected a file that 'h5traces calibrate' wrote, or an "
            "archive whose hidden states have quantisation steps"
        )
        raise PrecisionError(message)
    return found


def load_given(path: PathLike | None, precision: Precision) -> Calibration | None:
    """The scales of the file that a caller named, None without one."""
    if path is not None and precision.step is None:
        message = (
            f"{path}: scales need a precision with quantisation steps, and {precision} has "
            "none; choose a tier (fine, analysis, compact) or a step"
        )
        raise PrecisionError(message)
    return None if path is None else load_calibration(path)


def check_model(calibration: Calibration, model_id: str | None) -> None:
    """Reject scales that were measured on another model."""
    measured = calibration.record.model_id if calibration.record is not None else None
    if measured is None or model_id is None or _short(measured) == _short(model_id):
        return
    message = (
        f"the scales were measured on {measured}, the samples come from {model_id}; run 'h5traces "
        "calibrate' on samples of that model, or, if both names are of one model, with "
        f"the model id {model_id}"
    )
    raise PrecisionError(message)


def _short(model_id: str) -> str:
    """A model's name without its folder or account."""
    return model_id.rstrip("/").rpartition("/")[2].lower()
