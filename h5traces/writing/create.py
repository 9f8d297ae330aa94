"""The public function: starts a run, or goes on with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from h5traces.errors import ArchiveError, ArchiveExistsError, PrecisionError, SchemaError
from h5traces.format.document import problems_of
from h5traces.format.precision import Precision
from h5traces.precision.scales import ScaleSet
from h5traces.storage.codecs import get_codec
from h5traces.writing.calibrate import check_model, load_given
from h5traces.writing.options import AUTOMATIC_SAMPLES, WriteOptions
from h5traces.writing.shards import Target
from h5traces.writing.spool_folder import RunState, SpoolFolder
from h5traces.writing.spool_writer import SpoolWriter
from h5traces.writing.trace_writer import DirectWriter

if TYPE_CHECKING:
    from h5traces.format.archive import ExtractionMetadata
    from h5traces.format.dtypes import DtypePolicy, OverflowPolicy
    from h5traces.format.precision import Tier
    from h5traces.paths import PathLike
    from h5traces.precision.scales import Calibration
    from h5traces.writing.trace_writer import TraceWriter


def create(
    path: PathLike,
    *,
    shard_samples: int | None = None,
    spool: bool = True,
    resume: bool = True,
    tier: Tier | Precision = "exact",
    scales: PathLike | None = None,
    calibration_samples: int = AUTOMATIC_SAMPLES,
    dtype: DtypePolicy = "float16",
    on_overflow: OverflowPolicy = "float32",
    codec: str = "gzip",
    workers: int | None = None,
    verify: bool = True,
    model_id: str | None = None,
    model_revision: str | None = None,
    dataset: str | None = None,
    num_layers: int | None = None,
    extraction: ExtractionMetadata | None = None,
) -> TraceWriter:
    """Start a run that writes samples as they come, or go on with one that was stopped.

    Nothing is ever overwritten. Samples wait in ``<path>.spool`` until a shard of them is packed.

    Parameters
    ----------
    path
        A name ending in ``.h5`` for one archive, or a folder for shards ``traces-00000.h5`` and so
        on.
    shard_samples
        Samples per shard; 1000 by default in a folder. An ``.h5`` name with it gets ``-00000`` and
        so on before its suffix.
    spool
        Acknowledge a sample only when it is durable. Without, samples go straight into the archive,
        and a crash loses all of a shard that was not full.
    resume
        Go on with a run that was stopped, and do nothing where it is finished; without, both are
        errors.
    tier, scales, calibration_samples
        How precisely, as in `h5traces.convert`. The spool holds samples exactly; precision is given
        up when a shard is packed. Scales are measured on the first samples of the run, all shards
        have the same.
    dtype, on_overflow, codec
        As in `h5traces.convert`; those of a stopped run must be given again.
    workers
        Threads; one per core by default.
    verify
        Read every file back and compare it before it gets its name.
    model_id, model_revision, dataset, num_layers, extraction
        Recorded in the archives.

    Returns
    -------
    TraceWriter
        Use it as a context manager; ``sample_id in writer.done`` tells what need not be done again.

    Raises
    ------
    ArchiveExistsError
        The target exists, and resuming was not wanted.
    ArchiveError
        Another process is writing the target, or the stopped run had other options.
    PrecisionError
        The tier does not go with the other arguments, or the scales are of another model.
    SchemaError, UnsupportedEncodingError
        An argument has a value that it cannot have, or no codec has that name.
    """
    target = Target.of(Path(path), shard_samples)
    precision = Precision.of(tier)
    calibration = load_given(scales, precision)
    if calibration is not None:
        check_model(calibration, model_id)
    state = _state(
        shard_samples=target.shard_samples,
        dtype=dtype,
        on_overflow=on_overflow,
        codec=codec,
        precision=precision,
        calibration=None if calibration is None else calibration.digest,
        model_id=model_id,
        model_revision=model_revision,
        dataset=dataset,
        num_layers=num_layers,
        extraction=extraction,
    )
    options = WriteOptions(
        dtype=dtype,
        on_overflow=on_overflow,
        codec=codec,
        workers=workers,
        precision=precision,
        scales=_given_scales(precision, calibration),
    )
    spooled = target.spool_path.exists()
    existing = target.existing()
    if (existing or spooled) and not (resume and spool):
        found = existing[0] if existing else target.spool_path
        message = f"{found} exists; name another target, or go on with resume=True and spool=True"
        raise ArchiveExistsError(message)
    if not spool and precision.step is not None and calibration is None:
        message = (
            "without a spool there is nothing to measure steps on before the first sample is "
            "written; give scales, which 'h5traces calibrate' makes, or spool=True"
        )
        raise PrecisionError(message)
    if not spool:
        return DirectWriter(target, state, options, verify=verify)
    if existing and not spooled:
        return SpoolWriter(target, state, options, None, verify=verify)
    return _resumed(
        target,
        state,
        options,
        verify=verify,
        calibration=calibration,
        calibration_samples=calibration_samples,
    )


def _given_scales(precision: Precision, calibration: Calibration | None) -> ScaleSet:
    if precision.step is None or calibration is None:
        return ScaleSet()
    return calibration.scales(precision.step)


def _state(**fields: Any) -> RunState:
    try:
        state = RunState(**fields)
    except ValidationError as error:
        found = problems_of(error)
        message = "; ".join(f"{each.loc}: {each.message}" for each in found)
        raise SchemaError(message, found) from error
    get_codec(state.codec)
    return state


def _resumed(
    target: Target,
    state: RunState,
    options: WriteOptions,
    *,
    verify: bool,
    calibration: Calibration | None,
    calibration_samples: int,
) -> SpoolWriter:
    folder = SpoolFolder(target.spool_path)
    try:
        before = folder.state()
        if before is None and target.existing():
            # Killed when all was packed and the spool half removed.
            folder.remove_all()
            return SpoolWriter(target, state, options, None, verify=verify)
        if before is None:
            folder.save(state)
        elif differences := state.differences(before):
            message = (
                f"{target.path}: the stopped run had other options: {', '.join(differences)}; give "
                "the same again, or name another target"
            )
            raise ArchiveError(message)
        return SpoolWriter(
            target,
            before or state,
            options,
            folder,
            verify=verify,
            calibration=calibration,
            calibration_samples=calibration_samples,
        )
    except BaseException:
        folder.release()
        raise
