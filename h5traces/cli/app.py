"""The commands of ``h5traces``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from h5traces import layout
from h5traces.archive import expand_paths, open_archive
from h5traces.check import validate as validate_archive
from h5traces.cli import reports
from h5traces.cli.console import (
    EXIT_PROBLEMS,
    bytes_progress,
    count_progress,
    fail,
    print_json,
    print_line,
    reported,
    warn,
)
from h5traces.conversion import Progress
from h5traces.conversion import convert as convert_batches
from h5traces.dtypes import DtypePolicy, OverflowPolicy
from h5traces.errors import ArchiveExistsError, ConversionError, H5TracesError
from h5traces.exporting import export as export_archive
from h5traces.inspection import inspect as inspect_file
from h5traces.legacy.layouts import SOURCE_SUFFIXES
from h5traces.sealing import seal as seal_archive
from h5traces.storage.codecs import ArrayCodec
from h5traces.version import __version__

app = typer.Typer(
    name="h5traces",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "The archive for LLM traces: per-layer hidden states and attentions in plain HDF5.\n\n"
        "Start with: `h5traces convert traces/ -o archives/`, then `h5traces inspect archives/`."
    ),
    epilog="Exit codes: 0 fine, 1 problems found, 2 wrong usage.",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]


def _version(value: bool) -> None:
    if value:
        print_line(f"h5traces {__version__} (format {layout.FORMAT_VERSION})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


def parse_layers(value: str) -> list[int]:
    """Layer numbers from ``0,5,10`` and ranges such as ``28-31``.

    Raises
    ------
    typer.BadParameter
        The text is something else.
    """
    layers: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            message = f"{part!r} is no layer number; expected 0-based numbers such as 0,5,10 or 0-7"
            raise typer.BadParameter(message)
        layers += range(int(first), int(last if dash else first) + 1)
    return layers


@app.command()
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC…", help="Batches (`.pkl`, `.pkl.gz`), globs or folders."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DEST", help="Folder for the archives, or one `.h5` name."
        ),
    ],
    layers: Annotated[
        str | None,
        typer.Option(metavar="0,5,10-12", help="Keep only these decoder blocks (0-based)."),
    ] = None,
    dtype: Annotated[
        DtypePolicy,
        typer.Option(help="Stored type. `auto`: the narrowest that keeps every bit."),
    ] = "float16",
    on_overflow: Annotated[
        OverflowPolicy,
        typer.Option(
            help="Arrays with finite values beyond the type: store as float32, stop, or clip."
        ),
    ] = "float32",
    codec: Annotated[ArrayCodec, typer.Option(help="Compression of the arrays.")] = "gzip",
    merge: Annotated[bool, typer.Option("--merge", help="All batches into one archive.")] = False,
    shard_samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most N samples per archive.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace archives that exist.")
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Pass over finished ones: resumes a stopped run."),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Read all back from disk and compare with the source before naming a file.",
        ),
    ] = True,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Compressing threads [default: cores].")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="Recorded model [default: from the file name].")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Recorded dataset [default: from the file name].")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Convert legacy trace batches to archives.

    Pickles are read by an interpreter that executes nothing; samples stream through in bounded
    memory. Every archive is verified against its source before it gets its name, so the pickle may
    go when this command exits with 0.

    - `h5traces convert traces/ -o archives/`
    - `h5traces convert 'run/*.pkl.gz' -o run.h5 --merge --layers 0,5,10,15,20,25,31`
    - `h5traces convert traces/ -o archives/ --skip-existing` finishes a stopped run
    """
    wanted = None if layers is None else parse_layers(layers)
    with reported((ConversionError,)), bytes_progress("convert") as update:

        def progress(state: Progress) -> None:
            text = f"{state.source.name}: {state.num_samples} samples"
            update(state.done_nbytes, state.total_nbytes, text)

        report = convert_batches(
            sources,
            output,
            layers=wanted,
            dtype=dtype,
            on_overflow=on_overflow,
            codec=codec,
            merge=merge,
            shard_samples=shard_samples,
            overwrite=overwrite,
            skip_existing=skip_existing,
            verify=verify,
            dry_run=dry_run,
            workers=workers,
            model_id=model_id,
            dataset=dataset,
            progress=progress,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_conversion(report)
    for each in report.files:
        for message in each.warnings:
            warn(f"{', '.join(Path(source).name for source in each.sources)}: {message}")
        if each.error is not None:
            fail(each.error)
    for leftover in report.leftovers:
        fail(leftover.reason)
    if not report.ok:
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
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
    """Show what archives or legacy batches hold: shapes, ranges, consistency, sizes.

    Pickles are read to their end (that is how their samples are counted); archives answer at once.

    - `h5traces inspect archives/`
    - `h5traces inspect old.pkl.gz --samples all`
    """
    if samples != "all" and not samples.isdigit():
        message = f"{samples!r}: expected a number of samples, or 'all'"
        raise typer.BadParameter(message)
    found, failed = [], False
    with reported():
        for path in expand_paths(sources, (*SOURCE_SUFFIXES, ".h5", ".hdf5")):
            try:
                with count_progress(path.name) as update:
                    wanted: Any = samples if samples == "all" else int(samples)
                    result = inspect_file(path, samples=wanted, progress=update)
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


@app.command()
def ls(
    sources: Annotated[list[str], typer.Argument(metavar="FILE…", help="Archives.")],
    json: Json = False,
) -> None:
    """List the samples of archives: index, id, length, coverage, label.

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


@app.command()
def validate(
    sources: Annotated[list[str], typer.Argument(metavar="FILE…", help="Archives.")],
    json: Json = False,
) -> None:
    """Report every problem of structure and schema with its HDF5 path.

    Looks at every object through HDF5, reads no array, and checks that the footer tells the same.
    Exit code 1 if there is a problem.

    - `h5traces validate archives/*.h5`
    """
    found = []
    with reported():
        for path in expand_paths(sources):
            with count_progress(path.name) as update:
                found.append(validate_archive(path, progress=update))
    if json:
        print_json([each.as_dict() for each in found])
    else:
        reports.print_validation(found)
    if any(not each.ok for each in found):
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
def seal(
    sources: Annotated[list[str], typer.Argument(metavar="FILE…", help="Archives.")],
    accept_edits: Annotated[
        bool,
        typer.Option("--accept-edits", help="Seal although values or metadata were changed."),
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Rebuild the footer of archives that something opened for writing.

    Any open for writing removes the footer; archives are then read through HDF5, correctly but
    slowly. Sealing reads every chunk, and refuses if contents no longer fit their digests.
    """
    found = []
    with reported():
        for path in expand_paths(sources):
            with count_progress(path.name) as update:
                found.append(
                    seal_archive(path, accept_edits=accept_edits, dry_run=dry_run, progress=update)
                )
    if json:
        print_json([each.as_dict() for each in found])
    for each in found:
        for place in each.edited:
            warn(f"{each.path}: {place} was changed since the archive was written")
        if each.sealed and not json:
            print_line(f"{each.path}: sealed, {each.num_samples} samples")
        elif each.edited and not accept_edits:
            fail(f"{each.path}: not sealed; --accept-edits seals it as it is now")
    if any(each.edited and not accept_edits for each in found):
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Archive, glob or folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DEST", help="`.pkl`, `.pkl.gz` or `.h5`.")
    ],
    dtype: Annotated[
        DtypePolicy | None, typer.Option(help="Stored type of an `.h5` export [default: float32].")
    ] = None,
    numpy: Annotated[
        bool, typer.Option("--numpy", help="Arrays where the source held torch tensors.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write a legacy batch back, or an archive that every viewer can show.

    - `h5traces export run.h5 -o run.pkl.gz`
    - `h5traces export run.h5 -o run_float32.h5` for browser viewers that cannot show float16
    """
    with reported((ConversionError, ArchiveExistsError)), count_progress(str(output)) as update:
        export_archive(
            source,
            output,
            dtype=dtype,
            container="numpy" if numpy else "source",
            overwrite=overwrite,
            dry_run=dry_run,
            progress=update,
        )
    print_line(f"{'would write' if dry_run else 'wrote'} {output}")


def main() -> None:
    """Run the command line."""
    app()
