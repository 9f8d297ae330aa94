"""The whole of ``h5traces extract``: a model and a data set by name, archives on disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h5traces.archive import open_archive
from h5traces.errors import ArchiveExistsError, ExtractionError
from h5traces.estimation import ModelShape, Rates, estimate, stated_rates
from h5traces.extract import models
from h5traces.extract.extractor import Extractor
from h5traces.extract.hub import HUB_DATASETS, load_questions
from h5traces.extract.options import ExtractOptions
from h5traces.extract.planning import Job, Planner, TooLongError
from h5traces.extract.questions import Columns, QuestionSet, read_questions
from h5traces.extract.reports import ExtractionReport, skipped_before
from h5traces.extract.running import Run, skipped
from h5traces.layer_ranges import layer_numbers
from h5traces.spooling import DEFAULT_SHARD_SAMPLES, RemoteWriter, Target
from h5traces.storage.codecs import GZIP

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.archive.opening import PathLike
    from h5traces.dtypes import DtypePolicy, OverflowPolicy
    from h5traces.estimation import Estimate
    from h5traces.extract.models import ModelDtype
    from h5traces.extract.running import RunProgress
    from h5traces.schema import ExtractionMetadata


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model computes, and where.

    Attributes
    ----------
    model_id
        Hub id, local folder, or alias.
    revision
        Commit, branch or tag on the hub.
    dtype
        Type to compute in; ``auto`` is the checkpoint's own, but float32 on processors.
    device
        As torch names it, or ``auto`` to spread the model over all.
    load_in_4bit
        Quantise the weights with bitsandbytes.
    """

    model_id: str
    revision: str | None = None
    dtype: ModelDtype = "auto"
    device: str | None = None
    load_in_4bit: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """Which questions are asked.

    Attributes
    ----------
    dataset
        ``triviaqa``, ``truthfulqa``, or a JSONL or CSV file.
    num_samples
        The first so many; None for all.
    path
        A local copy of a data set that is known by name.
    revision
        Its commit, branch or tag on the hub.
    columns
        Which columns of a file to read.
    """

    dataset: str
    num_samples: int | None = None
    path: str | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How archives are written; see `h5traces.create`.

    Attributes
    ----------
    shard_samples, on_overflow, codec, workers, verify
        As there. The stored type is that of `ExtractOptions`.
    check_space
        Refuse to start where the disk is too small for the forecast.
    """

    shard_samples: int | None = None
    on_overflow: OverflowPolicy = "float32"
    codec: str = GZIP.name
    workers: int | None = None
    verify: bool = True
    check_space: bool = True


def load_dataset(choice: DatasetChoice) -> QuestionSet:
    """The questions of a data set.

    Raises
    ------
    ExtractionError
        No data set and no file has that name, or it cannot be read.
    """
    name = choice.dataset
    if name in HUB_DATASETS:
        found = load_questions(name, path=choice.path, revision=choice.revision)
    elif Path(name).is_file():
        found = read_questions(Path(name), choice.columns)
    else:
        message = (
            f"no data set is known as {name!r}, and no file has that name; expected "
            f"{', '.join(HUB_DATASETS)}, or a .jsonl or .csv file"
        )
        raise ExtractionError(message)
    return found.first(choice.num_samples)


def shape_of(config: Any) -> ModelShape:
    """What of a configuration decides the size of traces."""
    text = config.get_text_config()
    return ModelShape(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=text.num_attention_heads,
    )


def extract_dataset(
    model: ModelChoice,
    dataset: DatasetChoice,
    output: PathLike,
    options: ExtractOptions | None = None,
    *,
    store: StoreOptions | None = None,
    dry_run: bool = False,
    progress: Callable[[RunProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ExtractionReport:
    """Ask a model all questions of a data set and archive what happens inside it.

    A stopped run goes on when it is started again with the same arguments. Samples that cannot be
    computed are left out and listed in the report, which also lies in ``<output>.report.json``.

    Parameters
    ----------
    model, dataset
        Who is asked what.
    output
        A name ending in ``.h5`` for one archive, or a folder for shards.
    options
        What is extracted, and how.
    store
        How it is written.
    dry_run
        Plan, and tell what would be needed; load no weights, write nothing.
    progress
        Called when a sample was written, in a thread of its own.
    should_stop
        Asked before every batch; when it says so, the run stops and can go on later.

    Returns
    -------
    ExtractionReport
        What was done.

    Raises
    ------
    ExtractionError
        Model, data set or options cannot be used, or the disk is too small.
    ArchiveExistsError, ArchiveError
        The output is that of another run, or of other options.
    """
    options, store = options or ExtractOptions(), store or StoreOptions()
    questions = load_dataset(dataset)
    config = models.load_config(model.model_id, revision=model.revision)
    tokenizer = models.load_tokenizer(model.model_id, revision=model.revision)
    layers = layer_numbers(options.layers, shape_of(config).num_layers)
    report = ExtractionReport(str(output), num_planned=len(questions.questions))
    jobs = _plan(Planner(tokenizer, config, options), questions, report)
    forecast = _Forecast(shape_of(config), jobs, layers, options, store)
    report.estimate = forecast.estimate()
    _check_space(Path(output), forecast, store, report, dry_run=dry_run)
    if dry_run:
        return report
    loaded = models.load_model(
        model.model_id,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        load_in_4bit=model.load_in_4bit,
        eager="attentions" in options.kinds,
    )
    extractor = Extractor(loaded, tokenizer, options)
    metadata = extractor.metadata(questions)
    writer = RemoteWriter(
        output,
        shard_samples=store.shard_samples,
        dtype=options.dtype,
        on_overflow=store.on_overflow,
        codec=store.codec,
        workers=store.workers,
        verify=store.verify,
        model_id=model.model_id,
        model_revision=model.revision or getattr(loaded.config, "_commit_hash", None),
        dataset=questions.name,
        num_layers=extractor.anatomy.num_layers,
        extraction=metadata,
    )
    report.num_before = writer.num_samples
    if writer.is_finished:
        with writer:
            _finished_before(writer, Path(output), jobs, metadata, report)
        return report
    run = Run(
        extractor,
        writer,
        jobs,
        options,
        report,
        on_overflow=store.on_overflow,
        progress=progress,
        should_stop=should_stop,
    )
    run.run()
    return report


def _plan(planner: Planner, questions: QuestionSet, report: ExtractionReport) -> list[Job]:
    """The jobs of all questions that fit into the model."""
    jobs = []
    for question in questions.questions:
        try:
            jobs.append(planner.job(question))
        except TooLongError as error:
            report.skipped.append(skipped(question, "too_long", str(error)))
    if not jobs:
        message = f"{questions.name}: no question fits: {report.skipped[0].message}"
        raise ExtractionError(message)
    return jobs


class _Forecast:
    """Room that samples need at most: every answer as long as it may be."""

    def __init__(
        self,
        shape: ModelShape,
        jobs: list[Job],
        layers: tuple[int, ...],
        options: ExtractOptions,
        store: StoreOptions,
    ) -> None:
        self._shape, self._layers = shape, layers
        self._options, self._store = options, store
        longest = options.generation.max_new_tokens
        self._lengths = [len(each.prompt) + longest for each in jobs]

    def estimate(self) -> Estimate:
        """The table."""
        return estimate(
            self._shape,
            self._lengths,
            layers=self._layers,
            kinds=self._options.kinds,
            dtype=self._options.dtype,
            codec=self._store.codec,
            rates=_rates(self._options.dtype, self._store.codec),
        )

    def needed_nbytes(self, num_done: int) -> float:
        """Room for all samples but the first so many, and for one more shard while it is packed."""
        sample = self.estimate().rows[-1].sample_nbytes
        left = max(0, len(self._lengths) - num_done)
        shard = self._store.shard_samples or DEFAULT_SHARD_SAMPLES
        return sample * (left + min(shard, len(self._lengths)))


def _rates(dtype: DtypePolicy, codec: str) -> Rates:
    """Stated rates, or for types and codecs that have none those of float32, which are larger."""
    try:
        return stated_rates(dtype, codec)
    except ExtractionError:
        return stated_rates("float32", GZIP.name)


def _check_space(
    output: Path,
    forecast: _Forecast,
    store: StoreOptions,
    report: ExtractionReport,
    *,
    dry_run: bool,
) -> None:
    """Compare what is needed with what is there.

    Raises
    ------
    ExtractionError
        The disk is too small.
    """
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    report.free_nbytes = shutil.disk_usage(folder).free
    report.needed_nbytes = forecast.needed_nbytes(_num_written(output, store.shard_samples))
    if report.needed_nbytes > report.free_nbytes and store.check_space and not dry_run:
        message = (
            f"{output}: the samples may need {report.needed_nbytes / 1e9:,.1f} GB with the room to "
            f"pack a shard, but {report.free_nbytes / 1e9:,.1f} GB are free on that disk; choose "
            "another, fewer samples or layers, smaller shards, or --no-check-space"
        )
        raise ExtractionError(message)


def _num_written(output: Path, shard_samples: int | None) -> int:
    """Samples of earlier starts; those whose shard is being written need their room once more."""
    target = Target.of(output, shard_samples)
    num_spooled = sum(1 for _ in target.spool_path.glob("*.sample"))
    found = [str(each) for each in target.existing()]
    if not found:
        return num_spooled
    with open_archive(found) as archive:
        return num_spooled + len(archive)


def _finished_before(
    writer: RemoteWriter,
    output: Path,
    jobs: list[Job],
    metadata: ExtractionMetadata,
    report: ExtractionReport,
) -> None:
    """Tell that there is nothing to do, or what is there instead.

    Raises
    ------
    ArchiveExistsError
        The archives are of another run, or lack samples.
    """
    with open_archive(output) as archive:
        recorded = archive.metadata.extraction
    if differences := metadata.differences(recorded):
        message = (
            f"{output}: holds a finished run with other options: {', '.join(differences)}; name "
            "another target"
        )
        raise ArchiveExistsError(message)
    before = skipped_before(output)
    missing = [
        each.question.sample_id
        for each in jobs
        if each.question.sample_id not in writer.done and each.question.sample_id not in before
    ]
    if missing:
        message = (
            f"{output}: the run is finished with {writer.num_samples} samples, and {len(missing)} "
            f"that were asked for are not among them ({missing[0]} first); write to another name, "
            "'h5traces merge' joins them"
        )
        raise ArchiveExistsError(message)
    known = {each.sample_id for each in report.skipped}
    report.skipped += [each for each in before.values() if each.sample_id not in known]
    report.status = "finished"
