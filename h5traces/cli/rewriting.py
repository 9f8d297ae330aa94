"""``h5traces repack``, ``merge``, ``split``, ``export``, ``label``, ``seal`` and ``salvage``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from h5traces.archive.opening import open as open_archive
from h5traces.checking.salvage import salvage as salvage_archive
from h5traces.checking.seal import seal as seal_archive
from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, command
from h5traces.cli.console import count_progress, fail, note, print_json, print_line, warn
from h5traces.cli.options import (
    OUTPUT,
    READING,
    Archives,
    DryRun,
    Foreign,
    Json,
    Layers,
    MergeOrder,
    NewFile,
    Output,
    PrecisionGroup,
    Ranks,
    Rewritten,
    Samples,
    ShardSamples,
    option,
)
from h5traces.errors import ConversionError
from h5traces.format.dtypes import DtypePolicy
from h5traces.format.text import and_more, counted
from h5traces.meaning.options import FirstState
from h5traces.paths import expand_paths
from h5traces.rewriting.export import ExportFormat
from h5traces.rewriting.export import export as export_archive
from h5traces.rewriting.label import LabelReport, joined
from h5traces.rewriting.label_table import HigherMeans, LabelOptions
from h5traces.rewriting.repack import merge as merge_archives
from h5traces.rewriting.repack import repack as repack_archives
from h5traces.rewriting.repack import split as split_archives
from h5traces.rewriting.rewrite import RepackReport
from h5traces.storage.codecs import tools_note
from h5traces.writing.options import TargetOptions

_LABELS = "Labels"
_CLASS_LABEL = re.compile(
    r"(.+?)=(-?[0-9]{1,19}|none)(?:,|\Z)", re.ASCII | re.IGNORECASE | re.DOTALL
)
_CLASS_LABELS = re.compile(rf"(?:{_CLASS_LABEL.pattern})+", _CLASS_LABEL.flags)
_IDS = LabelOptions().id_column


@command()
def repack(
    sources: Archives,
    *,
    layers: Layers = None,
    samples: Samples = None,
    precision: PrecisionGroup,
    first_state: Annotated[
        FirstState | None,
        option(
            READING,
            "--first-state embedding|block",
            "Name hidden states that are stored by position: what the first is.",
        ),
    ] = None,
    output: Output,
    shard_samples: ShardSamples = None,
    foreign: Foreign = "keep",
    target: Rewritten,
    ranks: Ranks,
    json: Json = False,
) -> None:
    """Rewrite archives with fewer layers or samples, or more compactly.

    Without an option of precision, chunks are copied byte for byte, as fast as the disk is.

    - `h5traces repack run.h5 -o seven.h5 --layers 0,5,10,15,20,25,31`
    - `h5traces repack run.h5 -o first.h5 --samples 0:100`
    - `h5traces repack run.h5 -o fast.h5 --codec zstd`
    - `h5traces repack run.h5 -o small.h5 --tier analysis`
    - `h5traces repack shards/ -o small/ --tier analysis --shard-samples 1000 --rank auto`
    """
    run = partial(
        repack_archives,
        sources,
        output,
        layers=layers,
        samples=samples,
        precision=precision,
        first_state=first_state,
        foreign=foreign,
        **ranks,
    )
    target = replace(target, shard_samples=shard_samples)
    _rewrite(run, output, target, precision.codec, json=json)


@command()
def merge(
    sources: Archives,
    *,
    output: Output,
    order: MergeOrder = None,
    foreign: Foreign = "keep",
    target: Rewritten,
    json: Json = False,
) -> None:
    """Merge several archives of one model into one.

    Chunks are copied byte for byte. Naming an archive twice is an error.

    - `h5traces merge shards/*.h5 -o run.h5`
    - `h5traces merge shards/*.h5 -o run.h5 --order id`
    """
    run = partial(merge_archives, sources, output, order=order, foreign=foreign)
    _rewrite(run, output, target, json=json)


@command()
def split(
    sources: Archives,
    *,
    output: Output,
    shard_samples: Annotated[
        int, option(OUTPUT, "-n --shard-samples N", "At most N samples per archive.", min=1)
    ],
    foreign: Foreign = "keep",
    target: Rewritten,
    json: Json = False,
) -> None:
    """Cut archives into shards.

    Chunks are copied byte for byte.

    - `h5traces split run.h5 -o shards/ -n 250` writes `shards/run-00000.h5` and so on
    """
    run = partial(split_archives, sources, output, shard_samples, foreign=foreign)
    _rewrite(run, output, target, json=json)


def _rewrite(
    run: Callable[..., RepackReport],
    output: str,
    target: TargetOptions,
    codec: str | None = None,
    *,
    json: bool,
) -> None:
    """Run a rewrite with progress, and report it."""
    with count_progress(output) as update:
        report = run(target=target, progress=update)
    if json:
        print_json(report.as_dict())
    else:
        reports.print_rewrite(report, dry_run=target.dry_run)
    for message in report.warnings:
        warn(message)
    if not target.dry_run:
        reports.warn_of_loss(report.precision)
    reports.warn_of(tools_note(codec))


@command(ConversionError)
def export(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Archive, glob or folder.")],
    *,
    output: Annotated[
        str,
        option(
            OUTPUT,
            "-o --output DEST",
            "A file (`.pkl`, `.pkl.gz`, `.pt`, `.safetensors`, `.npz`, `.parquet`, `.json`, "
            "`.h5`), or a folder/.",
        ),
    ],
    to: Annotated[
        ExportFormat | None,
        option(OUTPUT, "--to FORMAT", "Format [default: by the suffix; in a folder, pickle]."),
    ] = None,
    dtype: Annotated[
        DtypePolicy | None,
        option(OUTPUT, "--dtype TYPE", "Stored type of an `.h5` export [default: float32]."),
    ] = None,
    decoded: Annotated[
        bool,
        option(
            OUTPUT,
            "--decoded",
            "An `.h5` for people: values where a tier has codes, and long texts as lines.",
        ),
    ] = False,
    numpy: Annotated[
        bool, option(OUTPUT, "--numpy", "Arrays where the source held torch tensors.")
    ] = False,
    target: NewFile,
) -> None:
    """Write the samples in another format.

    - `h5traces export run.h5 -o run.pkl.gz` is a legacy batch: a list of dicts
    - `h5traces export run.h5 -o run.pt` is the same, for torch.load
    - `h5traces export run.h5 -o samples/ --to safetensors` one file per sample; also `npz`
    - `h5traces export run.h5 -o run.parquet` one row per sample
    - `h5traces export run.h5 -o run_dataset/ --to datasets` for `datasets.load_from_disk`
    - `h5traces export run.h5 -o run.json --to kerchunk` no copy: zarr reads the archive
    - `h5traces export run.h5 -o run_float32.h5` for viewers without float16
    - `h5traces export tier.h5 -o values.h5 --decoded` for HDFView and others, which show codes
    """
    with count_progress(output) as update:
        path = export_archive(
            source,
            output,
            to=to,
            dtype=dtype,
            decoded=decoded,
            container="numpy" if numpy else "source",
            overwrite=target.overwrite,
            dry_run=target.dry_run,
            progress=update,
        )
    print_line(f"{'would write' if target.dry_run else 'wrote'} {path}")
    if not target.dry_run:
        # Only the new archive says what a cast to --dtype changed.
        casts: list[str] = []
        for place in (source, path) if path.suffix == ".h5" else (source,):
            with open_archive(place) as archive:
                changed = [each for each in archive.metadata.casts or () if each.num_changed != 0]
            casts += [str(each) for each in changed if each.cast_from != each.dtype]
        if casts:
            print_line(f"values are those of the archive: {', '.join(dict.fromkeys(casts))}")


@command()
def label(
    *,
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE…", help="Archives, globs or folders. [required]"),
    ] = None,
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="Labels or scores: CSV, TSV or JSON Lines.")
    ],
    id_column: Annotated[str, option(_LABELS, "--id-column NAME", "Column of ids.")] = _IDS,
    label_column: Annotated[
        str | None,
        option(_LABELS, "--label-column NAME", "Column of classes, such as 0 and 1, or words."),
    ] = None,
    positive: Annotated[
        str | None,
        option(_LABELS, "--positive CLASS", "Its class that gets label 1, hallucination; else 0."),
    ] = None,
    class_labels: Annotated[
        str | None,
        option(
            _LABELS,
            "--class-labels A=1,B=0,C=none",
            "Instead, the label of every class, also of more than two.",
        ),
    ] = None,
    score_column: Annotated[
        str | None,
        option(_LABELS, "--score-column NAME", "Column of scores [default: bleurt_score]."),
    ] = None,
    higher_means: Annotated[
        HigherMeans | None,
        option(
            _LABELS,
            "--higher-means correct|hallucinated",
            "What high scores mean; required, but for `bleurt_score` (correct).",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        option(_LABELS, "--threshold NUMBER", "Scores from here on are high [default: 0.5]."),
    ] = None,
    scores_only: Annotated[
        bool, option(_LABELS, "--scores-only", "Keep the scores and make no labels.")
    ] = False,
    partial: Annotated[
        bool, option(_LABELS, "--partial", "Leave samples that are not in the table unlabelled.")
    ] = False,
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "-o --output DEST",
            "A new archive with the labels inside: an `.h5` name, or a folder/.",
        ),
    ] = None,
    folder: Annotated[
        str | None,
        option(OUTPUT, "--folder DIR", "Put the labels here [default: beside the archives]."),
    ] = None,
    target: NewFile,
    json: Json = False,
) -> None:
    """Join labels or scores to archives by question id.

    Writes `<archive>.labels.json` beside each archive, where `h5traces.open` finds it; archives are
    never changed. Labels come from a column of classes, or are made of scores by a threshold; what
    1 means is always said. How many samples get which label is printed before anything is written.
    A sample that the table lacks is an error, or with `--partial` stays without a label. Ids that
    only the table has are named.

    - `h5traces label run.h5 human.csv --label-column label --positive hallucinated`
    - `h5traces label run.h5 human.csv --label-column is_correct --positive 0`
    - `h5traces label run.h5 human.csv --label-column label --class-labels wrong=1,right=0,odd=none`
    - `h5traces label run.h5 scores.csv` makes labels of `bleurt_score`
    - `h5traces label run.h5 rouge.csv --score-column rougeL --higher-means correct --threshold 0.3`
    - `h5traces label shards/*.h5 scores.csv --dry-run` writes nothing
    - `h5traces label run.h5 scores.csv -o labelled.h5` copies chunks into a new archive
    """
    if not sources:
        missing = "FILE…" if table.endswith((".csv", ".tsv", ".jsonl")) else "TABLE"
        message = f"{missing} is missing; only {table} is named"
        raise typer.BadParameter(message)
    options = LabelOptions(
        label_column=label_column,
        positive=positive,
        class_labels=_class_labels(class_labels),
        score_column=score_column,
        higher_means=higher_means,
        threshold=threshold,
        scores_only=scores_only,
        id_column=id_column,
    )
    with contextlib.ExitStack() as stack:
        with count_progress("joining") as update:
            joining = joined(
                sources,
                table,
                options=options,
                output=output,
                folder=folder,
                overwrite=target.overwrite,
                progress=update,
            )
            found = stack.enter_context(joining)
        if found.joins:
            _report(found.report, json=json)
        found.check(partial=partial)
        found.write(target)
        if not json:
            reports.print_targets(found.report.targets, dry_run=target.dry_run)


def _class_labels(named: str | None) -> dict[str, int | None] | None:
    """The labels of classes by name; a name may hold commas."""
    if named is None:
        return None
    if not _CLASS_LABELS.fullmatch(named):
        message = (
            f"--class-labels {named}: expected classes with an integer or none each, such as "
            "wrong=1,right=0,unsure=none"
        )
        raise typer.BadParameter(message)
    found = [(each[1], each[2]) for each in _CLASS_LABEL.finditer(named)]
    if len(dict(found)) < len(found):
        message = f"--class-labels {named}: names a class twice"
        raise typer.BadParameter(message)
    return {name: None if number.lower() == "none" else int(number) for name, number in found}


def _report(report: LabelReport, *, json: bool) -> None:
    """Samples that joined go to stdout, the others to stderr."""
    if json:
        print_json(report.as_dict())
    else:
        reports.print_labels(report)
    what, rest = "score" if report.label_column is None else "label", "without a label"
    found = [
        (report.missing, f"sample without a {what} stays", f"samples without a {what} stay", rest),
        (report.ambiguous, "sample shares an id and stays", "samples share an id and stay", rest),
        (
            [repr(each) for each in report.unknown],
            "id of the table is",
            "ids of the table are",
            "in none of the archives",
        ),
        (report.similar, "of these differs", "of these differ", "in spaces, case or quotes only"),
        (report.unscored, "row of the table has", "rows of the table have", f"no {what}"),
    ]
    for names, one, many, rest in found:
        if names:
            warn(f"{counted(len(names), one, many)} {rest}: {and_more(names)}")


@command()
def seal(
    sources: Archives,
    *,
    accept_edits: Annotated[
        bool, option(None, "--accept-edits", "Seal although values or metadata were changed.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Rebuild the index of archives that another program changed.

    A program that opens an archive for writing removes the index; the archive is then read through
    HDF5, correctly but slowly. Sealing reads every chunk, and stops at content that no longer fits
    its digest.

    - `h5traces seal edited.h5`
    """
    found = []
    for path in expand_paths(sources):
        with count_progress(path.name) as update:
            found += seal_archive(path, accept_edits=accept_edits, dry_run=dry_run, progress=update)
    if json:
        print_json([each.as_dict() for each in found])
    for each in found:
        for place in each.edited:
            warn(f"{each.path}: {place} was changed since the archive was written")
        if each.edited and not accept_edits and not each.already_sealed:
            fail(f"{each.path}: not sealed; --accept-edits seals it as it is now")
        elif not json:
            done = "sealed" if each.sealed else "would seal it"
            done = "already sealed" if each.already_sealed else done
            print_line(f"{each.path}: {done}, {counted(each.num_samples, 'sample')}")
        if each.foreign:
            note(
                f"{each.path}: {counted(len(each.foreign), 'name')} not of the format, and kept: "
                f"{and_more(each.foreign, 3)}; 'h5traces repack --foreign drop' leaves them out"
            )
    if any(each.edited and not accept_edits and not each.already_sealed for each in found):
        raise typer.Exit(EXIT_PROBLEMS)


@command()
def salvage(
    source: Annotated[str, typer.Argument(metavar="FILE", help="The damaged archive.")],
    *,
    output: Output,
    foreign: Foreign = "keep",
    target: NewFile,
    json: Json = False,
) -> None:
    """Copy the intact samples of a damaged archive.

    Lost samples are listed; exit code 1 if there are any.

    - `h5traces salvage damaged.h5 -o saved.h5`
    """
    with count_progress(source) as update:
        report = salvage_archive(
            source,
            output,
            foreign=foreign,
            overwrite=target.overwrite,
            dry_run=target.dry_run,
            progress=update,
        )
    if json:
        print_json(report.as_dict())
    else:
        lost = f"lost {report.lost_samples}" if report.lost_samples else "none lost"
        done = "would save" if target.dry_run else "saved"
        print_line(f"{done} {counted(report.num_saved, 'sample')} in {report.target}, {lost}")
    for message in report.warnings:
        warn(message)
    for each in report.lost:
        warn(f"{source}: {each.loc}: {each.message}")
    if report.lost:
        raise typer.Exit(EXIT_PROBLEMS)
