"""Exports archives to legacy batches, or to float32 HDF5 for viewers without float16."""

from __future__ import annotations

import contextlib
import gzip
import os
import pickle
from typing import TYPE_CHECKING, Any, Literal

from h5traces.archive.agreement import ComparedTraces
from h5traces.archive.opening import open as open_archive
from h5traces.archive.shards import inherited_facts, shared_metadata
from h5traces.arguments import checked
from h5traces.errors import ConversionError, LossyWarning, warn
from h5traces.paths import Target, check_not_a_source
from h5traces.rewriting.repack import read_files
from h5traces.storage.publish import PartFile, make_folder, remove_abandoned_parts
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import WriteOptions
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from h5traces.archive.archive import Archive
    from h5traces.format.dtypes import DtypePolicy
    from h5traces.paths import PathLike

# Explicit memo numbers (MEMOIZE of protocol 4 counts from the start of the file), so that every
# sample can be pickled by itself and freed before the next.
_PROTOCOL = 3
_PROTOCOL_HEADER_NBYTES = 2
_GZIP_LEVEL = 6
_SUFFIXES = (".pkl.gz", ".pkl", ".h5")


@checked
def export(
    source: PathLike,
    dest: PathLike,
    *,
    dtype: DtypePolicy | None = None,
    container: Literal["source", "numpy"] = "source",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an archive's traces to another file, sample by sample in bounded memory.

    Parameters
    ----------
    source
        An archive, a glob or a folder of archives.
    dest
        A name ending in ``.pkl`` or ``.pkl.gz`` for a legacy batch (a list of dicts), or in ``.h5``
        for an archive; in a folder, a ``.pkl.gz`` is named after its source.
    dtype
        Stored type of an ``.h5`` export; ``float32`` suits viewers without float16.
    container
        For pickles: ``numpy`` turns what came from torch tensors into arrays.
    overwrite
        Replace `dest`.
    dry_run
        Check only.
    progress
        Called with the samples written and the samples there are.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    TargetError
        `dest` has none of these suffixes, or is a source.
    ConversionError
        `dtype` was given for a pickle.
    CorruptArchiveError
        The footer of the archive and its HDF5 part say different things of a sample.
    ArchiveExistsError
        `dest` exists.
    """
    place = Target.of(dest, suffixes=_SUFFIXES)
    is_pickle = place.suffix != _SUFFIXES[-1]
    if is_pickle and dtype is not None:
        message = f"{place.path}: dtype is for {_SUFFIXES[-1]}; a pickle has the archive's types"
        raise ConversionError(message)
    with open_archive(source) as archive, ComparedTraces() as compared:
        place = place.for_sources(archive.paths)
        check_not_a_source(place, read_files(archive))
        target = place.path
        if dry_run:
            return target
        make_folder(target.parent)
        remove_abandoned_parts(target)
        losses = shared_metadata(archive._files).losses
        if losses:
            where = "a pickle cannot record it" if is_pickle else "'earlier_precisions' records it"
            message = (
                f"{target}: holds less than its source did ({', '.join(map(str, losses))}); {where}"
            )
            warn(message, LossyWarning)
        if is_pickle:
            _export_pickle(
                archive, compared, target, container, overwrite=overwrite, progress=progress
            )
        else:
            options = WriteOptions(
                dtype=dtype or "float32",
                overwrite=overwrite,
                earlier_precisions=losses,
            )
            with ArchiveWriter(target, options, **inherited_facts(archive._files)) as writer:
                for index, trace in enumerate(compared.traces(archive)):
                    writer.append(to_record(trace))
                    if progress is not None:
                        progress(index + 1, len(archive))
        for message in compared.warnings:
            warn(message, UserWarning)
    return target


def _export_pickle(
    archive: Archive,
    compared: ComparedTraces,
    target: Path,
    container: Literal["source", "numpy"],
    *,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    with PartFile(target) as part:
        with contextlib.ExitStack() as files:
            out: Any = files.enter_context(os.fdopen(os.dup(part.file.fileno()), "wb"))
            if target.name.endswith(".gz"):
                zipped = gzip.GzipFile(
                    filename="", fileobj=out, mode="wb", compresslevel=_GZIP_LEVEL, mtime=0
                )
                out = files.enter_context(zipped)
            out.write(pickle.PROTO + bytes([_PROTOCOL]) + pickle.EMPTY_LIST)
            for index, trace in enumerate(compared.traces(archive)):
                fragment = pickle.dumps(trace.to_dict(container=container), protocol=_PROTOCOL)
                # Without its own header and STOP: the dict, then "append it to the list".
                out.write(memoryview(fragment)[_PROTOCOL_HEADER_NBYTES : -len(pickle.STOP)])
                out.write(pickle.APPEND)
                if progress is not None:
                    progress(index + 1, len(archive))
            out.write(pickle.STOP)
        part.publish(overwrite=overwrite)
