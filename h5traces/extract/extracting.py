"""The whole of ``h5traces extract``: a model and a data set by name, archives on disk."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.opening import open_archive
from h5traces.archive.stores import StoredSize
from h5traces.errors import ArchiveExistsError, ExtractionError, TooLongError
from h5traces.extract import models
from h5traces.extract.estimate import (
    STATED_RATES,
    Estimate,
    Forecast,
    ModelShape,
    Rates,
    estimate,
    num_values,
    shape_of,
)
from h5traces.extract.extractor import Extractor, Job, Planner
from h5traces.extract.models import load_config
from h5traces.extract.options import (
    DatasetChoice,
    ExtractOptions,
    ModelChoice,
    StoreOptions,
    layer_numbers,
)
from h5traces.extract.questions import HUB_DATASETS, QuestionSet, load_questions, read_questions
from h5traces.extract.running import ExtractionReport, Run, skipped, skipped_before
from h5traces.format import layout
from h5traces.format.precision import EXACT, TIERS, Precision
from h5traces.rewriting.repack import repack
from h5traces.storage.codecs import GZIP
from h5traces.writing.calibrate import load_given
from h5traces.writing.create import target_of_run
from h5traces.writing.options import PrecisionOptions, TargetOptions, check_type
from h5traces.writing.process_writer import ProcessWriter
from h5traces.writing.spool_folder import spool_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.extract.estimate import Estimate, ModelShape
    from h5traces.extract.extractor import Job
    from h5traces.extract.running import RunProgress
    from h5traces.format.archive import ExtractionMetadata
    from h5traces.paths import PathLike, Target


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
        A name that ends in ``.h5`` for one archive. A folder that exists, or text that ends in a
        slash, for shards.
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
    target_options = TargetOptions(
        shard_samples=store.shard_samples, workers=store.workers, verify=store.verify
    )
    target = target_of_run(output, target_options)
    questions = load_dataset(dataset)
    config = models.load_config(model.model_id, revision=model.revision)
    tokenizer = models.load_tokenizer(model.model_id, revision=model.revision)
    layers = layer_numbers(options.layers, shape_of(config).num_layers)
    report = ExtractionReport(str(target.path), num_planned=len(questions.questions))
    jobs = _plan(Planner(tokenizer, config, options), questions, report)
    forecast = Forecast(shape_of(config), jobs, layers, options, store)
    report.estimate = forecast.estimate()
    check_space(target, forecast, store, report, dry_run=dry_run)
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
        precision=PrecisionOptions(
            tier=store.tier,
            scales=store.scales,
            calibration_samples=store.calibration_samples,
            dtype=options.dtype,
            on_overflow=store.on_overflow,
            codec=store.codec,
        ),
        target=target_options,
        model_id=models.resolve_model(model.model_id),
        model_revision=getattr(loaded.config, "_commit_hash", None) or model.revision,
        dataset=questions.name,
        num_layers=extractor.anatomy.num_layers,
        extraction=metadata,
    )
    report.num_before = writer.num_samples
    if writer.is_finished:
        with writer:
            _finished_before(writer, target.path, jobs, metadata, store, report)
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


def check_space(
    target: Target,
    forecast: Forecast,
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
    folder = target.path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    report.free_nbytes = shutil.disk_usage(folder).free
    report.needed_nbytes = forecast.needed_nbytes(_num_written(target))
    if report.needed_nbytes > report.free_nbytes and store.check_space and not dry_run:
        message = (
            f"{target.path}: the samples may need {report.needed_nbytes / 1e9:,.1f} GB with the "
            f"room to pack a shard, but {report.free_nbytes / 1e9:,.1f} GB are free on that disk; "
            "choose another, fewer samples or layers, smaller shards, or --no-check-space"
        )
        raise ExtractionError(message)


def _num_written(target: Target) -> int:
    """Samples of earlier starts; those whose shard is being written need their room once more."""
    num_spooled = sum(1 for _ in spool_path(target).glob("*.sample"))
    found = [str(each) for each in target.existing()]
    if not found:
        return num_spooled
    with open_archive(found) as archive:
        return num_spooled + len(archive)


_BITS = 8


def estimate_with_pilot(
    model: ModelChoice,
    dataset: DatasetChoice,
    num_samples: int,
    options: ExtractOptions | None = None,
    *,
    store: StoreOptions | None = None,
    progress: Callable[[RunProgress], None] | None = None,
) -> Estimate:
    """Extract a few samples of all layers, and reckon with what they took.

    Parameters
    ----------
    model, dataset, options, store
        As for `extract_dataset`; ``options.layers`` are the subset to compare with.
    num_samples
        Samples of the pilot: the first so many.
    progress
        Called when a sample was written.

    Raises
    ------
    ExtractionError
        As `extract_dataset`; also where no sample could be computed.
    """
    options, store = options or ExtractOptions(), store or StoreOptions()
    shape = shape_of(load_config(model.model_id, revision=model.revision))
    layers = None
    if options.layers is not None:
        layers = layer_numbers(options.layers, shape.num_layers)
    with tempfile.TemporaryDirectory(prefix="h5traces-pilot-") as folder:
        output = Path(folder) / "pilot.h5"
        report = extract_dataset(
            model,
            replace(dataset, num_samples=num_samples),
            output,
            replace(options, layers=None),
            store=replace(store, shard_samples=None),
            progress=progress,
        )
        if not report.num_written:
            message = f"no sample of the pilot could be computed: {report.skipped[0].message}"
            raise ExtractionError(message)
        with open_archive(output) as archive:
            lengths = [trace.metadata.seq_len for trace in archive]
        rates = _measured(output, shape, lengths)
        tier_rates = {}
        if options.dtype == "float16" and store.codec == GZIP.name:
            for precision in (each for each in TIERS.values() if not each.is_exact):
                encoded = output.with_name(f"{precision.tier}.h5")
                repack(output, encoded, precision=precision, target=TargetOptions(verify=False))
                tier_rates[precision] = _measured(encoded, shape, lengths)
                encoded.unlink()
    return estimate(
        shape,
        lengths,
        layers=layers,
        kinds=options.kinds,
        dtype=options.dtype,
        codec=store.codec,
        rates=rates,
        tier_rates=tier_rates,
    )


def _measured(path: Path, shape: ModelShape, lengths: list[int]) -> Rates:
    """The rates of a pilot's archive.

    What one array takes beside its values is the stated figure, since the archive of a pilot does
    not tell it from what a sample takes; together they are what was measured. Scales, of which an
    archive has one set however many its samples are, are left out.
    """
    with open_archive(path) as archive:
        sizes = archive._files[0].sizes()
    num_layers, num_samples = shape.num_layers, len(lengths)
    scales = sizes.pop(layout.SCALES_GROUP, StoredSize())
    nbytes = path.stat().st_size - scales.stored_nbytes
    values = num_values(shape, lengths, [kind for kind in layout.KINDS if kind in sizes])
    stored = {kind: sizes[kind].stored_nbytes for kind in values}
    beside = (nbytes - sum(stored.values())) / num_samples
    arrays = STATED_RATES["float16"].array_nbytes
    return Rates(
        bits={
            kind: stored[kind] * _BITS / (each * num_layers * num_samples)
            for kind, each in values.items()
        },
        array_nbytes=arrays,
        sample_nbytes=beside - arrays * num_layers * len(values),
        source=f"pilot of {num_samples} samples",
        is_measured=True,
    )
