"""The whole of ``h5traces extract``: a model and a data set by name, archives on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.opening import open_archive
from h5traces.errors import ArchiveExistsError, ExtractionError, TooLongError
from h5traces.extract import models
from h5traces.extract.choices import DatasetChoice, ModelChoice, StoreOptions
from h5traces.extract.extractor import Extractor
from h5traces.extract.forecasting import Forecast, check_space, shape_of
from h5traces.extract.hub import HUB_DATASETS, load_questions
from h5traces.extract.layer_ranges import layer_numbers
from h5traces.extract.options import ExtractOptions
from h5traces.extract.planning import Job, Planner
from h5traces.extract.questions import QuestionSet, read_questions
from h5traces.extract.reports import ExtractionReport, skipped_before
from h5traces.extract.running import Run, skipped
from h5traces.format.precision import EXACT, Precision
from h5traces.writing.calibrate import load_given
from h5traces.writing.options import check_type
from h5traces.writing.process_writer import ProcessWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.archive.opening import PathLike
    from h5traces.extract.running import RunProgress
    from h5traces.format.extraction import ExtractionMetadata


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
    PrecisionError
        The tier does not go with the other options, or the scales are of another model.
    ArchiveExistsError, ArchiveError
        The output is that of another run, or of other options.
    """
    options, store = options or ExtractOptions(), store or StoreOptions()
    precision = Precision.of(store.tier)
    check_type(precision, options.dtype)
    load_given(store.scales, precision)
    questions = load_dataset(dataset)
    config = models.load_config(model.model_id, revision=model.revision)
    tokenizer = models.load_tokenizer(model.model_id, revision=model.revision)
    layers = layer_numbers(options.layers, shape_of(config).num_layers)
    report = ExtractionReport(str(output), num_planned=len(questions.questions))
    jobs = _plan(Planner(tokenizer, config, options), questions, report)
    forecast = Forecast(shape_of(config), jobs, layers, options, store)
    report.estimate = forecast.estimate()
    check_space(Path(output), forecast, store, report, dry_run=dry_run)
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
    writer = ProcessWriter(
        output,
        shard_samples=store.shard_samples,
        tier=store.tier,
        scales=store.scales,
        calibration_samples=store.calibration_samples,
        dtype=options.dtype,
        on_overflow=store.on_overflow,
        codec=store.codec,
        workers=store.workers,
        verify=store.verify,
        model_id=models.resolve_model(model.model_id),
        model_revision=getattr(loaded.config, "_commit_hash", None) or model.revision,
        dataset=questions.name,
        num_layers=extractor.anatomy.num_layers,
        extraction=metadata,
    )
    report.num_before = writer.num_samples
    if writer.is_finished:
        with writer:
            _finished_before(writer, Path(output), jobs, metadata, store, report)
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


def _finished_before(
    writer: ProcessWriter,
    output: Path,
    jobs: list[Job],
    metadata: ExtractionMetadata,
    store: StoreOptions,
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
        precision = archive.metadata.precision or EXACT
    differences = metadata.differences(recorded)
    if precision != (wanted := Precision.of(store.tier)):
        differences.append(f"precision={wanted} (was {precision})")
    if differences:
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
