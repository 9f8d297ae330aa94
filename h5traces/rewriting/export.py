"""Exports archives to the formats of others, and to float32 HDF5 for viewers without float16."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from h5traces.archive.agreement import ComparedTraces
from h5traces.archive.opening import open as open_archive
from h5traces.archive.shards import inherited_facts, shared_metadata
from h5traces.arguments import checked
from h5traces.errors import (
    ArchiveExistsError,
    ConversionError,
    LossyWarning,
    OptionError,
    TargetError,
    warn,
)
from h5traces.format.layout import USER_PREFIX
from h5traces.format.text import and_more, wrapped
from h5traces.format.values import EncodedObject
from h5traces.lazy import needing
from h5traces.paths import Target, check_not_a_source
from h5traces.rewriting.export_arrays import write_npz, write_safetensors
from h5traces.rewriting.export_references import write_references
from h5traces.rewriting.repack import read_files
from h5traces.storage.publish import (
    PartFile,
    make_folder,
    new_folder,
    remove_abandoned_parts,
)
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import WriteOptions
from h5traces.writing.preparation import text_element
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.format.dtypes import DtypePolicy
    from h5traces.format.record import TraceRecord
    from h5traces.paths import PathLike

ExportFormat = Literal[
    "pickle", "h5traces", "torch", "safetensors", "npz", "parquet", "datasets", "kerchunk"
]

# Explicit memo numbers (MEMOIZE of protocol 4 counts from the start of the file), so that every
# sample can be pickled by itself and freed before the next.
_PROTOCOL: Final = 3
_PROTOCOL_HEADER_NBYTES: Final = 2
_GZIP_LEVEL: Final = 6
_SUFFIXES: Final[dict[ExportFormat, tuple[str, ...]]] = {
    "pickle": (".pkl.gz", ".pkl"),
    "h5traces": (".h5",),
    "torch": (".pt", ".pth"),
    "safetensors": (".safetensors",),
    "npz": (".npz",),
    "parquet": (".parquet",),
    "kerchunk": (".json",),
}
EXPORT_FORMATS: Final[tuple[ExportFormat, ...]] = (*_SUFFIXES, "datasets")
# Of users' own, so that the export is an archive.
_LINES: Final = f"{USER_PREFIX}lines"
# One file per sample.
_OF_SAMPLES: Final = {"safetensors": write_safetensors, "npz": write_npz}
_LIBRARIES: Final = {
    "torch": ("export_torch", "torch", "torch"),
    "parquet": ("export_tables", "pyarrow", "parquet"),
    "datasets": ("export_tables", "pyarrow", "parquet"),
}


@dataclass(frozen=True, slots=True)
class _Job:
    """An export: its sources, target and options."""

    archive: Archive
    compared: ComparedTraces
    target: Target
    format: ExportFormat
    overwrite: bool
    progress: Callable[[int, int], None] | None

    @property
    def path(self) -> Path:
        """The file, or the folder of files."""
        return self.target.path

    def traces(self) -> Iterator[Trace]:
        """Every trace; progress is reported when the next is asked for."""
        for index, trace in enumerate(self.compared.traces(self.archive)):
            yield trace
            if self.progress is not None:
                self.progress(index + 1, len(self.archive))


@checked
def export(
    source: PathLike,
    dest: PathLike,
    *,
    to: ExportFormat | None = None,
    dtype: DtypePolicy | None = None,
    decoded: bool = False,
    container: Literal["source", "numpy"] = "source",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an archive's traces to another format, sample by sample in bounded memory.

    Parameters
    ----------
    source
        An archive, a glob or a folder of archives.
    dest
        A file, or a folder, in which a file is named after its source. A folder is needed for
        several samples as ``safetensors`` or ``npz``, which hold one per file, and is itself the
        result of ``datasets``.
    to
        ``pickle``: a list of dicts (``.pkl``, ``.pkl.gz``). ``torch``: the same as ``torch.save``
        writes it, all arrays as tensors (``.pt``). ``safetensors`` and ``npz``: named arrays.
        ``parquet`` and ``datasets``: one row per sample. ``kerchunk``: no values, but references
        to the archive's chunks for zarr (``.json``). ``h5traces``: an archive (``.h5``). Without
        it the suffix of `dest` decides; in a folder it is ``pickle``.
    dtype
        Stored type of an ``.h5`` export: ``float32`` by default, which suits viewers without
        float16; with `decoded`, that of the values.
    decoded
        An ``.h5`` export for people with HDF5 viewers: values where a tier has codes, and texts of
        several lines also as lines of at most 80 characters, in the group ``x_lines`` of a sample.
    container
        For pickles: ``numpy`` turns what came from torch tensors into arrays.
    overwrite
        Replace `dest`; not a folder of ``datasets``.
    dry_run
        Check only.
    progress
        Called with the samples written and the samples there are.

    Returns
    -------
    Path
        The file or folder written.

    Raises
    ------
    OptionError
        There is no such format.
    TargetError
        `dest` has a suffix of no format, or is a source, or holds one sample and there are more.
    ConversionError
        `dtype` or `decoded` was given for something else than an archive, or samples have no place
        in the format, such as generation steps in ``npz``.
    MissingDependencyError
        The format needs a library that is not installed.
    CorruptArchiveError
        The footer of the archive and its HDF5 part say different things of a sample.
    ArchiveExistsError
        `dest` exists.
    """
    place, form = _target(dest, to)
    if form != "h5traces" and (dtype is not None or decoded):
        what = "a pickle" if form == "pickle" else form
        message = f"{place.path}: dtype is for .h5; {what} has the archive's types"
        if dtype is None:
            message = f"{place.path}: decoded is for .h5; {what} has values, and no codes"
        raise ConversionError(message)
    _check_library(form)
    with open_archive(source) as archive, ComparedTraces() as compared:
        if form != "datasets" and not (form in _OF_SAMPLES and place.is_folder):
            place = place.for_sources(archive.paths)
        job = _Job(archive, compared, place, form, overwrite, progress)
        _check_target(job)
        if dry_run:
            return place.path
        _warn_of_losses(job)
        _RUNS[form](job, dtype=dtype, decoded=decoded, container=container)
        for message in compared.warnings:
            warn(message, UserWarning)
    return place.path


def _target(dest: PathLike, to: ExportFormat | None) -> tuple[Target, ExportFormat]:
    if to is not None and to not in EXPORT_FORMATS:
        message = f"to is {to!r}, expected one of {', '.join(EXPORT_FORMATS)}"
        raise OptionError(message)
    if to == "datasets":
        text = os.fspath(dest)
        path = Path(text if isinstance(text, str) else os.fsdecode(text))
        return Target(path, "", is_folder=True), to
    suffixes = {each: form for form, own in _SUFFIXES.items() for each in own}
    known = tuple(suffixes) if to is None else _SUFFIXES[to]
    place = Target.of(dest, suffixes=known)
    return place, suffixes[place.suffix]


def _check_library(form: ExportFormat) -> None:
    if form in _LIBRARIES:
        _module(form)


def _module(form: ExportFormat) -> ModuleType:
    """The module that writes the format, which imports its library."""
    name, library, extra = _LIBRARIES[form]
    with needing(form, library, extra=extra):
        return importlib.import_module(f"h5traces.rewriting.{name}")


def _check_target(job: _Job) -> None:
    path = job.path
    if job.format in _OF_SAMPLES and len(job.archive) != 1 and not job.target.is_folder:
        message = (
            f"{path}: {job.format} holds one sample per file, and there are {len(job.archive)}; "
            f"name a folder: {path.with_suffix('')}/"
        )
        raise TargetError(message)
    if job.format == "datasets" and os.path.lexists(path):
        message = f"{path} exists; datasets are written to a new folder, name another"
        raise ArchiveExistsError(message)
    check_not_a_source(job.target, read_files(job.archive))


def _warn_of_losses(job: _Job) -> None:
    losses = shared_metadata(job.archive._files).losses
    if losses:
        is_archive = job.format == "h5traces"
        what = "a pickle" if job.format == "pickle" else job.format
        where = "'earlier_precisions' records it" if is_archive else f"{what} cannot record it"
        message = (
            f"{job.path}: holds less than its source did ({', '.join(map(str, losses))}); {where}"
        )
        warn(message, LossyWarning)


def _warn_left_out(job: _Job, names: list[str]) -> None:
    if names:
        message = (
            f"{job.path}: left out what {job.format} has no place for: "
            f"{and_more(list(dict.fromkeys(names)), 8)}; pickle and torch hold every field"
        )
        warn(message, LossyWarning)


@contextlib.contextmanager
def _part(job: _Job, path: Path | None = None) -> Iterator[PartFile]:
    """A file that gets its name when the block ends well."""
    target = job.path if path is None else path
    make_folder(target.parent)
    remove_abandoned_parts(target)
    with PartFile(target) as part:
        yield part
        part.file.raise_error()
        part.publish(overwrite=job.overwrite)


# --- formats --------------------------------------------------------------------------------------


def _export_archive(job: _Job, *, dtype: DtypePolicy | None, decoded: bool, **_: Any) -> None:
    options = WriteOptions(
        dtype=dtype or ("auto" if decoded else "float32"),
        overwrite=job.overwrite,
        verify=False,
        earlier_precisions=shared_metadata(job.archive._files).losses,
    )
    make_folder(job.path.parent)
    remove_abandoned_parts(job.path)
    with ArchiveWriter(job.path, options, **inherited_facts(job.archive._files)) as writer:
        for trace in job.traces():
            record = to_record(trace)
            writer.append(record, _lines(record) if decoded else ())


def _lines(record: TraceRecord) -> Iterator[EncodedObject]:
    """Texts of several lines as lines, for viewers that show a text as one cell."""
    found = {name: wrapped(text) for name, text in record.texts.items()}
    long = {name: lines for name, lines in found.items() if len(lines) > 1}
    if long:
        yield EncodedObject(_LINES)
    for name, lines in long.items():
        yield text_element(f"{_LINES}/{name}", lines)


def _export_pickle(job: _Job, *, container: Literal["source", "numpy"], **_: Any) -> None:
    with _part(job) as part, contextlib.ExitStack() as files:
        out: Any = files.enter_context(os.fdopen(os.dup(part.file.fileno()), "wb"))
        if job.path.name.endswith(".gz"):
            zipped = gzip.GzipFile(
                filename="", fileobj=out, mode="wb", compresslevel=_GZIP_LEVEL, mtime=0
            )
            out = files.enter_context(zipped)
        out.write(pickle.PROTO + bytes([_PROTOCOL]) + pickle.EMPTY_LIST)
        for trace in job.traces():
            fragment = pickle.dumps(trace.to_dict(container=container), protocol=_PROTOCOL)
            # Without its own header and STOP: the dict, then "append it to the list".
            out.write(memoryview(fragment)[_PROTOCOL_HEADER_NBYTES : -len(pickle.STOP)])
            out.write(pickle.APPEND)
        out.write(pickle.STOP)


def _export_torch(job: _Job, **_: Any) -> None:
    with _part(job) as part:
        _module(job.format).write_torch(job.traces(), part)


def _export_samples(job: _Job, **_: Any) -> None:
    write, left_out = _OF_SAMPLES[job.format], []
    if not job.target.is_folder:
        for trace in job.traces():
            with _part(job) as part:
                left_out += write(trace, part)
    else:
        stem = job.target.for_sources(job.archive.paths).path.name.removesuffix(job.target.suffix)
        with new_folder(job.path, overwrite=job.overwrite) as folder:
            for trace in job.traces():
                name = f"{stem}-{trace.ordinal:05d}{job.target.suffix}"
                with PartFile(folder / name) as part:
                    left_out += write(trace, part)
                    part.file.raise_error()
                    part.publish(overwrite=False)
    _warn_left_out(job, left_out)


def _export_parquet(job: _Job, **_: Any) -> None:
    module = _module(job.format)
    schema, left_out = module.table_schema(job.archive)
    with _part(job) as part:
        module.write_parquet(job.traces(), schema, part)
    _warn_left_out(job, left_out)


def _export_dataset(job: _Job, **_: Any) -> None:
    """A folder that gets its name when all its files are durable."""
    module = _module(job.format)
    schema, left_out = module.table_schema(job.archive)
    with new_folder(job.path) as folder:
        module.write_dataset(job.traces(), schema, folder)
    _warn_left_out(job, left_out)


def _export_references(job: _Job, **_: Any) -> None:
    # References go by the index, which is compared with HDF5 first.
    for _each in job.traces():
        pass
    with _part(job) as part:
        write_references(job.archive, part)


_RUNS: Final[dict[ExportFormat, Any]] = {
    "pickle": _export_pickle,
    "h5traces": _export_archive,
    "torch": _export_torch,
    "safetensors": _export_samples,
    "npz": _export_samples,
    "parquet": _export_parquet,
    "datasets": _export_dataset,
    "kerchunk": _export_references,
}
