"""The whole of an extraction: a model and a data set by name, archives on disk."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from h5traces.archive.opening import open as open_archive
from h5traces.archive.selection import choose_layers
from h5traces.arguments import checked
from h5traces.errors import (
    ArchiveExistsError,
    ExtractionError,
    PrecisionError,
    TargetError,
    TooLongError,
)
from h5traces.extract import models
from h5traces.extract.extractor import Extractor
from h5traces.extract.generation import Job, Planner, batches
from h5traces.extract.options import DatasetChoice, ExtractOptions, ModelChoice, window_of
from h5traces.extract.questions import load_dataset
from h5traces.extract.running import ExtractionReport, Run, Skipped, skipped_before
from h5traces.extract.shared import SharedExtraction
from h5traces.extract.sizes import Forecast, ModelShape
from h5traces.extract.uploading import UploadedExtraction, shards_of
from h5traces.format.archive import MEASURED
from h5traces.format.kinds import MODEL_KINDS, WEIGHT_KINDS
from h5traces.format.precision import EXACT
from h5traces.meaning.checks import CheckOptions
from h5traces.paths import check_not_a_source
from h5traces.ranks.plan import RunPlan, plain_options, read_plan
from h5traces.ranks.rank import Rank, find_rank
from h5traces.ranks.run import RankRun, check_shared
from h5traces.rewriting.uploads import Uploads
from h5traces.writing.calibrate import load_given
from h5traces.writing.create import target_of_run
from h5traces.writing.options import PrecisionOptions, TargetOptions, check_type
from h5traces.writing.process_writer import ProcessWriter
from h5traces.writing.shards import stored_keys
from h5traces.writing.spool_folder import spool_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from h5traces.extract.questions import QuestionSet
    from h5traces.extract.running import RunProgress, SkipReason
    from h5traces.format.archive import ExtractionMetadata
    from h5traces.format.precision import Precision, Tier
    from h5traces.paths import PathLike, Target
    from h5traces.ranks.rank import RankChoice


class Engine(Protocol):
    """A program that runs models; `h5traces.vllm.VllmEngine` is one.

    Attributes
    ----------
    spare_tokens
        Tokens of the model's context that it needs for itself.
    """

    @property
    def spare_tokens(self) -> int: ...  # noqa: D102, RUF100

    def check(self, model: ModelChoice, options: ExtractOptions) -> None:
        """Reject what it cannot do, before anything is loaded; ExtractionError says why."""

    def start(
        self, model: ModelChoice, tokenizer: Any, options: ExtractOptions, jobs: list[Job]
    ) -> Extractor:
        """Load the model; `jobs` are all samples of the run."""


@checked
def extract_dataset(
    model: ModelChoice,
    dataset: DatasetChoice,
    dest: PathLike,
    options: ExtractOptions | None = None,
    *,
    precision: PrecisionOptions | Tier | Precision | None = None,
    target: TargetOptions = TargetOptions(),
    check_space: bool = True,
    progress: Callable[[RunProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    checks: CheckOptions = CheckOptions(),
    rank: int | Literal["auto"] | None = None,
    world_size: int | None = None,
) -> ExtractionReport:
    """Ask a model all questions of a data set and archive its hidden states and attentions.

    A stopped run goes on when it is started again with the same arguments. Samples that cannot be
    computed are left out and listed in the report, which is also written to ``<dest>.report.json``.

    Parameters
    ----------
    model, dataset
        Which model is asked which questions.
    dest
        A name that ends in ``.h5`` for one archive. A folder that exists, or text that ends in a
        slash, for shards; or a folder of a bucket, ``s3://bucket/run/``, to which every shard is
        uploaded when it is verified. There, tiers need scales.
    options
        What is computed.
    precision
        How it is stored: a tier, a `Precision`, or `PrecisionOptions`.
    target
        Shards, verification and workers, as for `h5traces.create`; a dry run loads no weights and
        writes nothing.
    check_space
        Reject a disk that is too small for the forecast.
    progress
        Called after every written sample, in another thread.
    should_stop
        Called before every batch; if true, the run stops and can go on later.
    checks
        Which findings are left out of the report, and which of them are a failure. Samples with
        them are kept.
    rank, world_size
        Do the share of one of `world_size` processes on one folder; ``rank="auto"`` asks the
        environment. Any number of them goes on with a stopped run; see `docs/cluster.md`.

    Returns
    -------
    ExtractionReport
        What was done.

    Raises
    ------
    TargetError
        `dest` names neither a file nor a folder, or `target` has an option that does not apply.
    ExtractionError
        Model, data set or options cannot be used, or the disk is too small.
    PrecisionError
        The tier does not go with the other options, or the scales are of another model.
    ArchiveExistsError, ArchiveError
        The output is that of another run, or of other options.
    """
    options, storage = options or ExtractOptions(), PrecisionOptions.of(precision)
    engine: Engine | None = model.engine
    if engine is not None:
        engine.check(model, options)
    uploads = Uploads.to(dest)
    folder = dest if uploads is None else f"{uploads.folder}/"
    place = target_of_run(folder, replace(target, dry_run=False))
    if Path(dataset.dataset).is_file():
        check_not_a_source(place, dataset.dataset)
    chosen = _chosen_rank(rank, world_size, place, uploads)
    if chosen is not None:
        check_shared(place, target)
    check_type(storage.precision, storage.dtype or "float16")
    load_given(storage.scales, storage.precision)
    if uploads is not None and storage.precision.step is not None and storage.scales is None:
        message = (
            f"{dest}: shards that go to a bucket cannot share scales that one of them measures; "
            "pass scales: a file of 'h5traces calibrate', or an archive of a few samples with this "
            "precision, extracted to disk"
        )
        raise PrecisionError(message)
    questions = load_dataset(dataset)
    config = models.load_config(
        model.model_id, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    tokenizer = models.load_tokenizer(
        model.model_id, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    report = ExtractionReport(str(place.path) if uploads is None else uploads.url, checks=checks)
    spare = 0 if engine is None else engine.spare_tokens
    jobs = _plan(Planner(tokenizer, config, options, spare_tokens=spare), questions, report)
    report.num_planned = len(jobs) + len(report.skipped)
    shape = ModelShape.of(config)
    forecast = Forecast(
        shape=shape,
        layers=choose_layers(options.layers, range(shape.num_layers)),
        kinds=tuple(each for each in options.kinds if each in MODEL_KINDS),
        lengths=tuple(each.num_kept(options) for each in jobs),
        precision=storage,
        window=min(
            window_of(options.attentions),
            max(job.num_tokens(options.generation.max_new_tokens) for job in jobs),
        ),
    )
    report.forecast = forecast
    if uploads is None:
        report.needed_nbytes = forecast.needed_nbytes(_num_written(place), place.shard_samples)
    else:
        report.needed_nbytes = forecast.waiting_nbytes(place.shard_samples)
    report.free_nbytes = _free_nbytes(place.path)
    if target.dry_run:
        return report
    if check_space and report.needed_nbytes > report.free_nbytes:
        message = (
            f"{place.path}: the samples may need {report.needed_nbytes / 1e9:,.1f} GB with the "
            f"room to pack a shard, but {report.free_nbytes / 1e9:,.1f} GB are free on that disk; "
            "choose another, fewer samples or layers, smaller shards, or check_space=False"
        )
        raise ExtractionError(message)
    if engine is None:
        extractor = _loaded(model, tokenizer, options, storage)
    else:
        extractor = engine.start(model, tokenizer, options, jobs)
    with contextlib.closing(extractor):
        metadata = extractor.metadata(questions)
        facts: dict[str, Any] = {
            "precision": storage,
            "target": target,
            "model_id": models.resolve_model(model.model_id),
            "model_revision": getattr(config, "_commit_hash", None) or model.revision,
            "dataset": questions.name,
            "num_layers": extractor.num_layers,
            "extraction": metadata,
        }
        if uploads is not None:
            assert chosen is not None
            assert place.shard_samples is not None
            shards = shards_of(jobs, options.batch_size, place.shard_samples)
            pieces = [shard.jobs for shard in shards]
            plan = _shared_plan(pieces, options, place, facts, chosen)
            uploaded = UploadedExtraction(uploads.url, chosen, plan, shards, place, facts)
            uploaded.run(extractor, options, report, (progress, should_stop))
            return report
        if chosen is not None:
            pieces = list(batches(jobs, options.batch_size))
            rank_run = RankRun(
                place.path, chosen, _shared_plan(pieces, options, place, facts, chosen)
            )
            with rank_run:
                shared = SharedExtraction(rank_run, jobs, options.batch_size)
                shared.run(extractor, place, facts, options, report, (progress, should_stop))
            return report
        writer = ProcessWriter(dest, **facts)
        report.num_before = writer.num_samples
        if writer.is_finished:
            with writer:
                _check_finished(writer, place.path, jobs, metadata, storage.precision, report)
            return report
        Run(
            extractor,
            writer,
            jobs,
            options,
            report,
            precision=storage,
            progress=progress,
            should_stop=should_stop,
        ).run()
        return report


def _loaded(
    model: ModelChoice, tokenizer: Any, options: ExtractOptions, storage: PrecisionOptions
) -> Extractor:
    """The model in transformers."""
    models.set_threads(model.threads)
    loaded = models.load_model(
        model.model_id,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        load_in_4bit=model.load_in_4bit,
        trust_remote_code=model.trust_remote_code,
        eager=bool({*options.kinds} & {*WEIGHT_KINDS}),
    )
    return Extractor(loaded, tokenizer, options, dtype=storage.dtype or "float16")


def _chosen_rank(
    rank: RankChoice, world_size: int | None, place: Target, uploads: Uploads | None
) -> Rank | None:
    """Which rank this is; one that is alone where a run goes to a bucket."""
    folder = place.folder if uploads is None else uploads.run_folder
    chosen = find_rank(rank, world_size, folder)
    if chosen is None and place.is_folder:
        before = read_plan(folder)
        if before is not None and (uploads is None or before.world_size > 1):
            message = (
                f"{folder}: holds a run of several ranks; go on with rank=0 and world_size=1, "
                "or more of them"
            )
            raise TargetError(message)
    return Rank(0, 1) if chosen is None and uploads is not None else chosen


def _shared_plan(
    pieces: Sequence[Sequence[Job]],
    options: ExtractOptions,
    place: Target,
    facts: dict[str, Any],
    rank: Rank,
) -> RunPlan:
    """What all ranks must agree on; a piece of work is a batch of samples, or a shard."""
    storage: PrecisionOptions = facts["precision"]
    calibration = load_given(storage.scales, storage.precision)
    extraction: ExtractionMetadata = facts["extraction"]
    chosen = {
        **extraction.model_dump(mode="json", exclude=MEASURED),
        **{name: facts[name] for name in ("model_id", "model_revision", "dataset", "num_layers")},
        "precision": str(storage.precision),
        "stored_dtype": storage.dtype,
        "on_overflow": storage.on_overflow,
        "codec": storage.codec,
        "scales": None if calibration is None else calibration.digest,
        "shard_samples": place.shard_samples,
        "batch_size": options.batch_size,
    }
    longest = options.generation.max_new_tokens
    return RunPlan(
        command="extract",
        world_size=rank.size,
        first_task=rank.first,
        options=plain_options(chosen),
        costs=tuple(sum(job.num_tokens(longest) for job in piece) for piece in pieces),
        ids=tuple(job.key for piece in pieces for job in piece),
    )


def _plan(planner: Planner, questions: QuestionSet, report: ExtractionReport) -> list[Job]:
    """The jobs of all questions that fit into the model's context."""
    jobs = []
    for question in questions.questions:
        for index, job in planner.jobs(question):
            if isinstance(job, Job):
                jobs.append(job)
                continue
            reason: SkipReason = "too_long" if isinstance(job, TooLongError) else "unfit_answer"
            report.skipped.append(
                Skipped(question.sample_id, question.row, reason, str(job), index)
            )
    if not jobs:
        message = f"{questions.name}: no question fits: {report.skipped[0].message}"
        raise ExtractionError(message)
    return jobs


def _num_written(target: Target) -> int:
    """Samples of earlier starts, packed or in the spool."""
    found = [*spool_path(target).glob("*.sample"), *target.existing()]
    if not found:
        return 0
    try:
        with open_archive(found) as archive:
            return len(archive)
    except FileNotFoundError:
        return 0  # another process packs the spool; the writer says so


def _free_nbytes(path: Path) -> int:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check_finished(
    writer: ProcessWriter,
    path: Path,
    jobs: list[Job],
    metadata: ExtractionMetadata,
    wanted: Precision,
    report: ExtractionReport,
) -> None:
    """Compare a finished run with the one that was asked for."""
    with open_archive(path) as archive:
        differences = metadata.differences(archive.metadata.extraction)
        precision = archive.metadata.precision or EXACT
    if precision != wanted:
        differences.append(f"precision={wanted} (was {precision})")
    if differences:
        message = (
            f"{path}: holds a finished run with other options: {', '.join(differences)}; name "
            "another output"
        )
        raise ArchiveExistsError(message)
    before = skipped_before(path)
    done = stored_keys(writer.done, writer.later)
    missing = [each for each in jobs if each.key not in done and each.key not in before]
    if missing:
        message = (
            f"{path}: the run is finished with {writer.num_samples} samples, and {len(missing)} "
            f"that were asked for are not among them ({missing[0].name} first); write them to "
            "another output, then merge both"
        )
        raise ArchiveExistsError(message)
    known = {each.key for each in report.skipped}
    report.skipped += [each for key, each in before.items() if key not in known]
    report.status = "finished"
