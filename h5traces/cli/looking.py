"""``h5traces inspect``, ``ls``, ``head``, ``validate`` and ``verify``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from h5traces.archive.opening import open as open_archive
from h5traces.checking.inspect import inspect as inspect_file
from h5traces.checking.isolated import DEFAULT_MEMORY_NBYTES, IsolationLimits
from h5traces.checking.reports import ValidationReport
from h5traces.checking.validate import validate as validate_archive
from h5traces.checking.verify import VerifyReport
from h5traces.checking.verify import verify as verify_archive
from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, command
from h5traces.cli.console import count_progress, fail, print_json, print_json_rows, print_line
from h5traces.cli.options import Archives, Checks, Json, Ranks, Reading, option
from h5traces.errors import H5TracesError
from h5traces.format.layout import TEXT_FIELDS
from h5traces.paths import expand_paths
from h5traces.ranks.rank import share_of
from h5traces.sources.collecting import archives_and_sources
from h5traces.sources.drafting import drafted

_ISOLATION = "Isolation"


@command()
def inspect(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="Archives or batches, globs or folders.")
    ],
    *,
    num_samples: Annotated[
        str, option(None, "-n --num-samples N|all", "Read the arrays of the first N samples.")
    ] = "1",
    reading: Reading,
    checks: Checks,
    json: Json = False,
) -> None:
    """Show what archives or other files of traces hold, and their sizes.

    The latter are read to their end (that is how samples are counted); archives answer at once.

    - `h5traces inspect archives/`
    - `h5traces inspect old.pkl.gz --num-samples all`
    - `h5traces inspect run/hidden_states.pt`
    - `h5traces inspect s3://bucket/run/*.h5` reads the indexes and one sample
    """
    if num_samples != "all" and not (num_samples.isascii() and num_samples.isdigit()):
        message = f"{num_samples!r}: expected a number of samples, or 'all'"
        raise typer.BadParameter(message)
    found, failed = [], False
    for path in archives_and_sources(sources, reading):
        result = None
        try:
            with count_progress(path.name) as update:
                wanted: Any = num_samples if num_samples == "all" else int(num_samples)
                (result,) = inspect_file(
                    path, samples=wanted, reading=reading, checks=checks, progress=update
                )
        except H5TracesError as error:
            failed = True
            fail(str(error))
        if result is None:
            # Not above: the error holds the file, and HDF5 opens none twice in different ways.
            if not json and reading.mapping is None:
                _print_draft(path)
            continue
        found.append(result)
        if not json:
            reports.print_inspection(result)
    if json:
        print_json([each.as_dict() for each in found])
    if failed or not all(each.ok for each in found):
        raise typer.Exit(EXIT_PROBLEMS)


def _print_draft(path: Any) -> None:
    """The contents of a file that no reader understands, and a mapping to begin with."""
    try:
        draft = drafted(path)
    except (H5TracesError, OSError):
        return
    if draft is not None:
        print_line(f"{path} holds")
        for line in draft.holdings:
            print_line(f"  {line}")
        print_line("a mapping to begin with, for --mapping; say what is true of the file:")
        for line in ("", *draft.text.splitlines()):
            print_line(line)


@command()
def ls(sources: Archives, json: Json = False) -> None:
    """List the samples of archives.

    Index, id, generation, length, coverage and label of each: a table, or where it is longer than
    the screen, lines with tabs between the columns.

    - `h5traces ls archives/ | grep -P "\\tlast_position$"`
    - `h5traces ls archives/ --json | jq -r '.[].sample_id'`
    """
    found = enumerate(open_archive(sources)._metadata())
    if json:
        dumped = (
            (index, each.model_dump(mode="json", exclude={"fields"})) for index, each in found
        )
        print_json_rows({"index": index, **row} for index, row in dumped)
    else:
        reports.print_samples(found)


@command()
def head(
    sources: Archives,
    *,
    num_samples: Annotated[int, option(None, "-n --num-samples N", "How many samples.", min=1)] = 3,
    json: Json = False,
) -> None:
    """Show the first samples with their texts.

    - `h5traces head archives/`
    - `h5traces head s3://bucket/run/*.h5 -n 10`
    """
    shown = open_archive(sources)[:num_samples]
    rows: list[dict[str, Any]] = [
        {
            "index": index,
            **trace.metadata.model_dump(mode="json", exclude={"fields"}),
            **{name: trace[name] for name in TEXT_FIELDS if name in trace},
        }
        for index, trace in enumerate(shown)
    ]
    if json:
        print_json(rows)
    else:
        reports.print_texts(rows)


@command()
def validate(
    sources: Archives,
    *,
    quick: Annotated[bool, option(None, "--quick", "Read no arrays: structure and index only.")] = (
        False
    ),
    checks: Checks,
    isolated: Annotated[
        bool, option(_ISOLATION, "--isolated", "Use a child process, for files from strangers.")
    ] = False,
    memory: Annotated[
        int, option(_ISOLATION, "--memory MIB", "Memory for each file.", min=1)
    ] = DEFAULT_MEMORY_NBYTES >> 20,
    timeout: Annotated[
        float | None,
        option(
            _ISOLATION,
            "--timeout SECONDS",
            "Time for each file [default: 60, and 1 more for every 20 MB unless --quick].",
            min=0.1,
        ),
    ] = None,
    ranks: Ranks,
    json: Json = False,
) -> None:
    """Report every problem of structure, schema and meaning.

    Looks at every object through HDF5, compares the index with it, and checks every value: constant
    layers, NaN, attention to later tokens, padding, equal samples and so on. Exit code 1 if there
    is a problem. With `--isolated`, a crash of HDF5, too much memory or a hang is a problem, too.

    - `h5traces validate archives/*.h5`
    - `h5traces validate archives/ --fail-on warning --ignore repeated-id`
    - `h5traces validate --isolated downloaded.h5`
    """
    found: list[ValidationReport] = []
    isolation = IsolationLimits(memory_nbytes=memory << 20, timeout=timeout) if isolated else None
    for path in share_of(expand_paths(sources), **ranks):
        with count_progress(path.name) as update:
            found += validate_archive(
                path, quick=quick, checks=checks, isolation=isolation, progress=update
            )
    if json:
        print_json([each.as_dict() for each in found])
    else:
        reports.print_validation(found)
    if any(not each.ok for each in found):
        raise typer.Exit(EXIT_PROBLEMS)


@command()
def verify(
    sources: Archives,
    *,
    deep: Annotated[
        bool, option(None, "--deep", "Inflate everything; compare contents, structure and schema.")
    ] = False,
    against: Annotated[
        str | None,
        option(None, "--against BATCH", "Compare with the legacy batch the archive was made from."),
    ] = None,
    reading: Reading,
    ranks: Ranks,
    json: Json = False,
) -> None:
    """Compare the bytes of archives with their digests.

    Every byte is compared with a checksum, as fast as the disk reads. Damage is named by sample and
    layer. Exit code 1 if there is any; `h5traces salvage` saves the rest.

    - `h5traces verify archives/`
    - `h5traces verify run.h5 --against run.pkl.gz` before deleting the pickle
    """
    found: list[VerifyReport] = []
    for path in share_of(expand_paths(sources), **ranks):
        with count_progress(path.name) as update:
            found += verify_archive(
                path, deep=deep, against=against, reading=reading, progress=update
            )
    if json:
        print_json([each.as_dict() for each in found])
    else:
        reports.print_verification(found)
    if any(not each.ok for each in found):
        raise typer.Exit(EXIT_PROBLEMS)
