"""``h5traces inspect``, ``ls``, ``validate`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from h5traces.archive.opening import open_archive
from h5traces.checking.inspect import inspect as inspect_file
from h5traces.checking.isolated import (
    DEFAULT_MEMORY_NBYTES,
    DEFAULT_TIMEOUT,
    IsolationLimits,
)
from h5traces.checking.reports import ValidationReport
from h5traces.checking.validate import validate as validate_archive
from h5traces.checking.verify import VerifyReport
from h5traces.checking.verify import verify as verify_archive
from h5traces.cli import reports
from h5traces.cli.console import (
    EXIT_PROBLEMS,
    Archives,
    Json,
    count_progress,
    fail,
    is_number,
    print_json,
    reported,
)
from h5traces.errors import H5TracesError
from h5traces.paths import expand_paths, expand_sources
from h5traces.sources.opening import SOURCE_SUFFIXES


def inspect(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="FILE…", help="Archives or batches, globs or folders."),
    ],
    samples: Annotated[
        str, typer.Option(metavar="N|all", help="Read the arrays of this many samples.")
    ] = "1",
    json: Json = False,
) -> None:
    """Show what archives or batches hold, and their sizes.

    Pickles are read to their end (that is how their samples are counted); archives answer at once.

    - `h5traces inspect archives/`
    - `h5traces inspect old.pkl.gz --samples all`
    - `h5traces inspect s3://bucket/run/*.h5` reads the footers and one sample
    """
    if samples != "all" and not is_number(samples):
        message = f"{samples!r}: expected a number of samples, or 'all'"
        raise typer.BadParameter(message)
    found, failed = [], False
    with reported():
        for path in expand_sources(sources, (*SOURCE_SUFFIXES, ".h5", ".hdf5")):
            try:
                with count_progress(path.name) as update:
                    wanted: Any = samples if samples == "all" else int(samples)
                    (result,) = inspect_file(path, samples=wanted, progress=update)
            except H5TracesError as error:
                failed = True
                fail(str(error))
                continue
            found.append(result)
            if not json:
                reports.print_inspection(result)
    if json:
        print_json([each.as_dict() for each in found])
    if failed or any(sample.problems for each in found for sample in each.samples):
        raise typer.Exit(EXIT_PROBLEMS)


def ls(
    sources: Archives,
    json: Json = False,
) -> None:
    """List the samples of archives.

    Index, id, generation, length, coverage and label of each.

    - `h5traces ls archives/ --json | jq -r '.[].sample_id'`
    """
    with reported():
        archive = open_archive(sources)
        rows = [
            {"index": index, **trace.metadata.model_dump(mode="json", exclude={"fields"})}
            for index, trace in enumerate(archive)
        ]
    if json:
        print_json(rows)
    else:
        reports.print_samples(rows)


def validate(
    sources: Archives,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="In a child process: for files from strangers.")
    ] = False,
    memory: Annotated[
        int, typer.Option(metavar="MIB", min=1, help="With --isolated: memory for each file.")
    ] = DEFAULT_MEMORY_NBYTES >> 20,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="With --isolated: time for each file.")
    ] = DEFAULT_TIMEOUT,
    json: Json = False,
) -> None:
    """Report every problem of structure and schema.

    Looks at every object through HDF5, reads no array, and checks that the footer tells the same.
    Exit code 1 if there is a problem. With --isolated, a crash of HDF5, a full memory or a hang is
    one, too.

    - `h5traces validate archives/*.h5`
    - `h5traces validate --isolated downloaded.h5`
    """
    found: list[ValidationReport] = []
    isolation = IsolationLimits(memory_nbytes=memory << 20, timeout=timeout) if isolated else None
    with reported():
        for path in expand_paths(sources):
            with count_progress(path.name) as update:
                found += validate_archive(path, isolation=isolation, progress=update)
    if json:
        print_json([each.as_dict() for each in found])
    else:
        reports.print_validation(found)
    if any(not each.ok for each in found):
        raise typer.Exit(EXIT_PROBLEMS)


def verify(
    sources: Archives,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Inflate everything; check contents, structure and schema."),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="BATCH", help="Prove that the archive holds this legacy batch."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare the bytes of archives with their digests.

    The quick check compares a checksum of every byte, as fast as the disk reads. Damage is named by
    sample and layer. Exit code 1 if there is any; see `h5traces salvage`.

    - `h5traces verify archives/`
    - `h5traces verify run.h5 --against run.pkl.gz` before deleting the pickle
    """
    found: list[VerifyReport] = []
    with reported():
        for path in expand_paths(sources):
            with count_progress(path.name) as update:
                found += verify_archive(path, deep=deep, against=against, progress=update)
    if json:
        print_json([each.as_dict() for each in found])
    else:
        reports.print_verification(found)
    if any(not each.ok for each in found):
        raise typer.Exit(EXIT_PROBLEMS)
