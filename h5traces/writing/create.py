"""`create`: starts a run that writes samples as they come, or resumes one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from h5traces.arguments import checked
from h5traces.errors import (
    ArchiveError,
    ArchiveExistsError,
    PrecisionError,
    SchemaError,
    TargetError,
)
from h5traces.format.document import problems_of
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import Target, check_not_a_source
from h5traces.precision.scales import ScaleSet
from h5traces.storage.codecs import GZIP, get_codec
from h5traces.writing.calibrate import check_model, load_given
from h5traces.writing.options import PrecisionOptions, TargetOptions, WriteOptions
from h5traces.writing.spool_folder import RunState, SpoolFolder, spool_path
from h5traces.writing.spool_writer import SpoolWriter
from h5traces.writing.trace_writer import DirectWriter

if TYPE_CHECKING:
    from h5traces.format.archive import ExtractionMetadata
    from h5traces.format.precision import Precision, Tier
    from h5traces.paths import PathLike
    from h5traces.precision.scales import Calibration
    from h5traces.writing.trace_writer import TraceWriter

# Of a run into a folder; half an hour to some hours of generating with a 7B model.
DEFAULT_SHARD_SAMPLES = 1000


@checked
def create(
    path: PathLike,
    *,
    precision: PrecisionOptions | Precision | Tier | None = None,
    target: TargetOptions = TargetOptions(),
    spool: bool = True,
    resume: bool = True,
    reading: ReadingOptions = ReadingOptions(),
    model_id: str | None = None,
    model_revision: str | None = None,
    dataset: str | None = None,
    num_layers: int | None = None,
    extraction: ExtractionMetadata | None = None,
) -> TraceWriter:
    """Start a run that writes samples as they come, or resume one that was stopped.

    Nothing is ever overwritten. Samples wait in ``<path>.spool`` until their shard is packed.

    Parameters
    ----------
    path
        A name that ends in ``.h5`` for one archive. A folder that exists, or text that ends in a
        slash, for shards ``traces-00000.h5`` and so on.
    precision
        ``exact`` (the default), ``fine``, ``analysis``, ``compact`` or ``native``, a `Precision`,
        or `PrecisionOptions` for stored type, scales and codec as well. The spool holds samples
        without this loss; it happens when a shard is packed. Scales are measured on the first
        samples of the run, and all shards have the same. A stopped run needs the same options
        again.
    target
        ``shard_samples``: samples per shard, 1000 by default in a folder; an ``.h5`` name with it
        gets ``-00000`` and so on before its suffix. ``verify``: read every file back before it
        gets its name. ``workers``: threads, one per core by default. The other options do not
        apply.
    spool
        Acknowledge a sample only when it is durable. Without, samples go straight into the archive,
        and a crash loses all of a shard that was not full.
    resume
        Resume a run that was stopped, and do nothing if it is finished. Without, both are errors.
    reading
        What dicts do not say themselves: what the first hidden state is, and whether padding is
        kept.
    model_id, model_revision, dataset, num_layers, extraction
        Recorded in the archives.

    Returns
    -------
    TraceWriter
        A context manager; ``sample_id in writer.done`` says whether a sample is stored already.

    Raises
    ------
    TargetError
        `path` names neither a file nor a folder, `target` has an option that does not apply, or
        the file of scales is the target.
    ArchiveExistsError
        The target exists, and `resume` or `spool` is false.
    ArchiveError
        Another process is writing the target, or the stopped run had other options.
    PrecisionError
        The tier does not go with the other arguments, or the scales are of another model.
    SchemaError, UnsupportedEncodingError
        An argument has a value that it cannot have, or no codec has that name.
    """
    precision = PrecisionOptions.of(precision)
    place, state, options, calibration = described_run(
        path,
        precision,
        target,
        model_id=model_id,
        model_revision=model_revision,
        dataset=dataset,
        num_layers=num_layers,
        extraction=extraction,
    )
    step = precision.precision.step
    spooled = spool_path(place).exists()
    existing = place.existing()
    if (existing or spooled) and not (resume and spool):
        found = existing[0] if existing else spool_path(place)
        message = f"{found} exists; name another target, or resume with resume=True and spool=True"
        raise ArchiveExistsError(message)
    if not spool and step is not None and calibration is None:
        message = (
            "without a spool there are no samples to measure quantisation steps on before the "
            "first is written; pass scales, which 'h5traces calibrate' makes, or spool=True"
        )
        raise PrecisionError(message)
    if not spool:
        return DirectWriter(place, state, options, reading=reading)
    if existing and not spooled:
        return SpoolWriter(place, state, options, None, reading=reading)
    return _resumed(
        place,
        state,
        options,
        reading=reading,
        calibration=calibration,
        calibration_samples=precision.calibration_samples,
    )


def described_run(
    path: PathLike, precision: PrecisionOptions, target: TargetOptions, **facts: Any
) -> tuple[Target, RunState, WriteOptions, Calibration | None]:
    """Where a run goes, what it records, how it writes, and the scales that it was given."""
    place = target_of_run(path, target)
    calibration = load_given(precision.scales, precision.precision)
    if calibration is not None:
        check_model(calibration, facts.get("model_id"))
    if precision.scales is not None:
        check_not_a_source(place, precision.scales)
    state = _state(
        shard_samples=place.shard_samples,
        dtype=precision.dtype or "float16",
        on_overflow=precision.on_overflow,
        codec=precision.codec or GZIP.name,
        precision=precision.precision,
        calibration=None if calibration is None else calibration.digest,
        **facts,
    )
    step = precision.precision.step
    scales = ScaleSet() if step is None or calibration is None else calibration.scales(step)
    return place, state, WriteOptions.of(precision, target, scales=scales), calibration


def target_of_run(path: PathLike, options: TargetOptions = TargetOptions()) -> Target:
    """The target of `create`: in a folder, always shards."""
    for name in ("overwrite", "skip_existing", "dry_run"):
        if getattr(options, name):
            message = f"{path}: {name} does not apply to a run, which resumes and never overwrites"
            raise TargetError(message)
    found = Target.of(path, shard_samples=options.shard_samples)
    if found.is_folder and found.shard_samples is None:
        return replace(found, shard_samples=DEFAULT_SHARD_SAMPLES)
    return found


def _state(**fields: Any) -> RunState:
    try:
        state = RunState(**fields)
    except ValidationError as error:
        found = problems_of(error)
        raise SchemaError("; ".join(map(str, found)), found) from error
    get_codec(state.codec)
    return state


def _resumed(
    target: Target,
    state: RunState,
    options: WriteOptions,
    *,
    reading: ReadingOptions,
    calibration: Calibration | None,
    calibration_samples: int,
) -> SpoolWriter:
    folder = SpoolFolder(spool_path(target))
    try:
        before = folder.state()
        if before is None and target.existing():
            # Killed when everything was packed and the spool half removed.
            folder.remove_all()
            return SpoolWriter(target, state, options, None, reading=reading)
        if before is None:
            folder.save(state)
        elif differences := state.differences(before):
            message = (
                f"{target.path}: the stopped run had other options: {', '.join(differences)}; pass "
                "the same again, or name another target"
            )
            raise ArchiveError(message)
        return SpoolWriter(
            target,
            before or state,
            options,
            folder,
            calibration=calibration,
            calibration_samples=calibration_samples,
            reading=reading,
        )
    except BaseException:
        folder.release()
        raise
