"""Prints results for people."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from h5traces.cli.console import (
    cell,
    finding_line,
    first_lines,
    human_size,
    note,
    print_line,
    print_lines,
    print_table,
    warn,
    with_flags,
)
from h5traces.format.layout import PRECISION_FEATURE, TEXT_FIELDS
from h5traces.format.text import and_more, counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.checking.inspect import ArrayStats, Inspection, SampleStats
    from h5traces.checking.reports import ValidationReport
    from h5traces.checking.verify import VerifyReport
    from h5traces.errors import Problem
    from h5traces.extract.estimate import Estimate
    from h5traces.extract.running import ExtractionReport
    from h5traces.features import FeatureReport
    from h5traces.fidelity import FidelityReport, Unmatched
    from h5traces.format.record import TraceMetadata
    from h5traces.rewriting.label import LabelReport
    from h5traces.rewriting.reports import ConversionReport, FileReport
    from h5traces.rewriting.rewrite import RepackReport


# Rows of a conversion; more would push the messages off the screen.
_MOST_ROWS: Final = 20
# Of lists without end.
_LINES_AT_ONCE: Final = 100


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    return table


def warn_of_loss(precision: str | None) -> None:
    """Say once that precision was lost."""
    if precision is not None:
        warn(f"{precision}: the archives hold less than their sources; keep those if you need more")


def warn_of(note: str | None) -> None:
    """A warning, unless empty."""
    if note is not None:
        warn(note)


def print_conversion(report: ConversionReport) -> None:
    """One row per archive or job, and a row of totals."""
    if not report.files:
        return
    numbers = ("samples", "before", "after", "ratio", "seconds", "warnings")
    table = _table("status", "archive", *numbers, numbers=numbers)
    shown = report.files
    if len(shown) > _MOST_ROWS:
        # Those that need a look, and no wall of lines.
        shown = [each for each in shown if each.status == "failed"][:_MOST_ROWS]
    for each in shown:
        name = each.targets[0]
        if len(each.targets) > 1:
            name += f" … {Path(each.targets[-1]).name}"
        table.add_row(*_conversion_row(each, each.status, cell(name)))
    if len(report.files) > 1:
        others = len(report.files) - len(shown)
        name = f"{counted(others, 'archive')} not listed; --json lists all" if others else ""
        table.add_row(*_conversion_row(_total(report), "total", name))
    print_table(table)
    written = [each for each in report.files if each.status == "converted"]
    changed = [each for each in written if not each.is_lossless]
    kept = list(dict.fromkeys(each.kept_layers for each in written if each.kept_layers))
    if written and not any(each.num_samples for each in written):
        print_line("0 samples: the sources are empty")
    elif kept:
        beginning = "holds" if changed else "lossless for"
        print_line(f"{beginning} the {_only(', '.join(kept))}")
    elif written and not changed:
        num_cut = sum(each.num_cut for each in written)
        left = [counted(num_cut, "padded position")] if num_cut else []
        every = (line for each in written for line in each.understood)
        left += dict.fromkeys(f"what was {each}" for each in every if each.startswith("left out"))
        but = f" but for {', and '.join(left)}" if left else ""
        print_line(f"lossless: the archives hold every bit of their sources{but}")
    for line in first_lines([f"{each.targets[0]}: {each.changes}" for each in changed]):
        print_line(line)
    understood = dict.fromkeys(line for each in written for line in each.understood)
    for line in first_lines([f"understood: {with_flags(each)}" for each in understood]):
        print_line(line)


def _only(kept: str) -> str:
    return f"{kept} kept; the other layers are only in the source"


def _conversion_row(each: FileReport, status: str, name: str) -> list[str]:
    ratio = each.archive_nbytes / each.source_nbytes if each.source_nbytes else 0
    written = each.archive_nbytes > 0
    num_warnings = len(each.warnings) + sum(one.severity != "note" for one in each.findings)
    return [
        status,
        name,
        str(each.num_samples) if each.num_samples or written else "",
        human_size(each.source_nbytes),
        human_size(each.archive_nbytes) if written else "",
        f"{ratio:.3f}" if written and each.num_samples else "",
        f"{each.seconds:.1f}" if each.seconds else "",
        str(num_warnings) if num_warnings else "",
    ]


def _total(report: ConversionReport) -> FileReport:
    from h5traces.rewriting.reports import FileReport

    total = FileReport(sources=[], targets=[])
    for each in report.files:
        total.num_samples += each.num_samples
        total.source_nbytes += each.source_nbytes
        total.archive_nbytes += each.archive_nbytes
        total.seconds += each.seconds
        total.warnings += each.warnings
        total.findings += each.findings
    return total


def print_rewrite(report: RepackReport, *, dry_run: bool) -> None:
    """The targets of a rewrite, and how they were made."""
    if not report.targets:
        print_line("wrote nothing: no shard falls to this rank")
        return
    targets = report.targets[0]
    if len(report.targets) > 1:
        targets += f" … {report.targets[-1]}"
    how = "chunks copied" if report.copied else "recompressed"
    samples = counted(report.num_samples, "sample")
    if dry_run:
        print_line(f"would write {targets}: {samples}, {how}")
        return
    sizes = f"{human_size(report.source_nbytes)} -> {human_size(report.target_nbytes)}"
    print_line(f"wrote {targets}: {samples}, {sizes}, {how}")


def print_inspection(result: Inspection) -> None:
    """What a file holds, for people."""
    metadata = result.metadata
    print_line(f"{result.path}  ({result.container}, {human_size(result.nbytes)})")
    print_line(f"  model: {metadata.get('model_id', 'unknown')}")
    print_line(f"  dataset: {metadata.get('dataset', 'unknown')}")
    if result.container == "archive":
        index = "" if metadata.get("has_footer") else ", no index (run h5traces seal)"
        print_line(f"  format: {metadata['format_version']}, {metadata['codec']}{index}")
        losses = metadata["losses"]
        print_line(f"  precision: {', then '.join(losses) or 'exact'}")
        lossless = {True: "yes", False: "no", None: "unknown"}[metadata["is_lossless"]]
        changes = f" ({metadata['changes']})" if metadata["changes"] else ""
        kept = metadata["kept_layers"]
        if metadata["is_lossless"]:
            changes = f", for the {_only(kept)}" if kept else " (every stored value)"
        print_line(f"  lossless: {lossless}{changes}")
        if PRECISION_FEATURE in metadata.get("required_features", ()):
            print_line(
                "  HDF5 viewers show codes; for values: h5traces export "
                f"{result.path} -o values.h5 --decoded"
            )
    stored = f"{len(result.layers)} stored"
    if metadata.get("num_layers") and metadata.get("layers"):
        stored += f" of {metadata['num_layers']}: {', '.join(map(str, result.layers))}"
    what = "positions" if result.by_position else "layers"
    print_line(f"  samples: {result.num_samples}; {what}: {stored}")
    if result.lengths:
        lengths = ", ".join(f"{name} {value:g}" for name, value in result.lengths.items())
        print_line(f"  sequence length: {lengths}")
    coverage = ", ".join(f"{count} {name}" for name, count in result.coverage.items())
    print_line(f"  coverage: {coverage}")
    for line in first_lines([f"  understood: {with_flags(each)}" for each in result.understood]):
        print_line(line)
    for kind, size in sorted(result.sizes.items()):
        line = (
            f"  {kind}: {counted(size['num_datasets'], 'array')}, {human_size(size['raw_nbytes'])}"
        )
        if size.get("stored_nbytes"):
            ratio = size["stored_nbytes"] / size["raw_nbytes"]
            line += f" stored in {human_size(size['stored_nbytes'])} ({ratio:.3f})"
        print_line(line)
    for sample in result.samples:
        _print_sample(sample)
    for finding in result.findings:
        print_line(f"  {finding.severity} {finding_line(finding)}")
    is_good = all(each.severity == "note" for each in result.findings)
    print_line(f"  {'✓ ' if is_good else ''}{result.covers}")
    print_line()


def _print_sample(sample: SampleStats) -> None:
    print_line(
        f"  sample {sample.index}: id {sample.sample_id!r}, fields {', '.join(sample.fields)}"
    )
    for name, value in sample.texts.items():
        short = value if len(value) <= 100 else f"{value[:97]}…"
        print_line(f"    {name}: {short!r}")
    for kind, title in (
        ("hidden_states", "Hidden states"),
        ("attentions", "Attentions"),
        ("attention_mean", "Attention means"),
    ):
        arrays = [each for each in sample.arrays if each.kind == kind]
        if arrays:
            _print_kind(title, arrays, sample)
    print_line(f"    tokens: {sample.num_tokens}, decoded: {sample.num_tokens_decoded}")
    for problem in sample.problems:
        print_line(f"    ✗ {problem}")


def _print_kind(title: str, arrays: list[ArrayStats], sample: SampleStats) -> None:
    shapes = {str(tuple(each.shape)) for each in arrays}
    same = len(shapes) == 1 and not sample.problems
    mark = "in every layer" if same else "(shapes differ by layer)"
    if sample.coverage == "steps":
        steps = {len(each.shape) for each in arrays}
        print_line(f"    {title}: {'/'.join(map(str, sorted(steps)))} generation steps per layer")
    else:
        shape = tuple(arrays[0].shape)
        print_line(f"    {title}: shape={shape}, dtype={arrays[0].dtype} {mark}")
    for each in arrays:
        span = "no finite value"
        if each.minimum is not None and each.maximum is not None:
            span = f"{each.minimum:.4g} … {each.maximum:.4g}"
        odd = f", {each.num_nan} NaN, {each.num_inf} Inf" if each.num_nan or each.num_inf else ""
        site = f", {each.site}" if each.site else ""
        kept = f", kept exact: {each.kept_exact}" if each.kept_exact else ""
        print_line(f"      {each.name}: {span}{odd}{site}{kept}")


# What `ls` shows of a sample beside its index, by the name in its metadata.
_SAMPLE_COLUMNS: Final = {
    "sample_id": "sample id",
    "generation_index": "generation",
    "seq_len": "length",
    "prompt_len": "prompt",
    "label": "label",
    "coverage": "coverage",
}


def print_samples(found: Iterator[tuple[int, TraceMetadata]]) -> None:
    """The list of samples: a table if it fits on a screen, else lines as they come."""
    rows = (
        (
            str(index),
            *(
                "" if value is None else str(value)
                for value in map(metadata.__getattribute__, _SAMPLE_COLUMNS)
            ),
        )
        for index, metadata in found
    )
    names = ("index", *_SAMPLE_COLUMNS.values())
    screen = list(islice(rows, shutil.get_terminal_size().lines))
    following = next(rows, None)
    if following is None:
        numbers = tuple(each for each in names if each not in ("sample id", "coverage"))
        table = _table(*names, numbers=numbers)
        for row in screen:
            table.add_row(*map(cell, row))
        print_table(table)
        return
    lines = map("\t".join, chain((names,), screen, (following,), rows))
    while part := list(islice(lines, _LINES_AT_ONCE)):
        print_lines(part)


def print_texts(rows: list[dict[str, Any]]) -> None:
    """A paragraph for each sample: its facts, and its texts in full."""
    for row in rows:
        label = "" if row["label"] is None else f", label {row['label']}"
        name = "without id" if row["sample_id"] is None else row["sample_id"]
        print_line(f"{row['index']}: {name}, {counted(row['seq_len'], 'token')}{label}")
        for field in (each for each in TEXT_FIELDS if each in row):
            beginning, *more = str(row[field]).splitlines() or [""]
            print_line(f"  {field}: {beginning}")
            for line in more:
                print_line(f"    {line}")


def print_validation(found: list[ValidationReport]) -> None:
    """Every problem on its own line, and a verdict per file."""
    for each in found:
        for finding in each.findings:
            print_line(f"{each.path}: {finding.severity} {finding_line(finding)}")
        graver = [finding for finding in each.findings if finding.severity != "note"]
        failures = [finding for finding in graver if each.checks.fails([finding])]
        size = counted(each.num_datasets, "dataset")
        good = f"valid, with {counted(len(graver), 'warning')}" if graver else "valid"
        covers = each.covers if graver else f"✓ {each.covers}"
        _print_checked(each, good, size, covers=covers, num_failures=len(failures))


def print_verification(found: list[VerifyReport]) -> None:
    """Every problem on its own line, and a verdict per file."""
    for each in found:
        _print_checked(each, "intact", human_size(each.nbytes))
        if any(problem.kind == "damaged" for problem in each.problems):
            saving = "restore it from a copy, or run 'h5traces salvage', which saves the samples"
            note(f"{each.path}: {saving} that are intact")


def _problem_lines(problems: list[Problem]) -> list[str]:
    """A line per problem; one per sample for those of another source, which are one per array."""
    lines, more = [], Counter[str]()
    for each in problems:
        sample = each.loc
        if each.kind == "differs_from_source":
            sample = "/".join(each.loc.split("/")[:3])
            more[sample] += 1
        if more[sample] < 2:
            lines.append((sample, f"{each.loc}: {each.message} [{each.kind}]"))
    return [
        f"{line} and {more[sample] - 1} more" if more[sample] > 1 else line
        for sample, line in lines
    ]


def _print_checked(
    report: ValidationReport | VerifyReport,
    good: str,
    size: str,
    *,
    covers: str = "",
    num_failures: int = 0,
) -> None:
    for line in _problem_lines(report.problems):
        print_line(f"{report.path}:{line}")
    for each in report.notes:
        print_line(f"{report.path}: note: {with_flags(each)}")
    failures = len(report.problems) + num_failures
    verdict = good if report.ok else counted(failures, "problem")
    what = f"; {covers}" if report.ok and covers else ""
    print_line(f"{report.path}: {verdict} ({counted(report.num_samples, 'sample')}, {size}){what}")


def print_labels(report: LabelReport) -> None:
    """How many samples get which label, and how the scores are distributed."""
    what = "a label" if report.labels or report.label_column else "scores"
    print_line(f"{report.num_labelled} of {report.num_samples} samples get {what}")
    for value, count in report.labels.items():
        share = count / report.num_samples
        print_line(f"  label {value} ({_meaning(report, value)}): {count} ({share:.1%})")
    if report.num_excluded:
        names = [name for name, number in report.class_labels.items() if number is None]
        print_line(f"  no label ({_classes(report, names)}): {report.num_excluded}")
    if report.num_without_label > report.num_excluded:
        print_line(f"  without a label: {report.num_without_label - report.num_excluded}")
    for name, stats in report.scores.items():
        print_line(
            f"  {name}: minimum {stats.minimum:.4g}, median {stats.median:.4g}, "
            f"mean {stats.mean:.4g}, maximum {stats.maximum:.4g}"
        )
    if report.num_repeated:
        print_line(f"  {report.num_repeated} rows repeat an earlier one")
    if report.num_replaced:
        print_line(f"  {counted(report.num_replaced, 'sample')} had another label before")


def _meaning(report: LabelReport, value: int) -> str:
    """The meaning of a label: its classes, or a range of scores."""
    if report.threshold is not None:
        is_high = value == int(report.higher_means == "hallucinated")
        return f"{'>=' if is_high else '<'} {report.threshold:g}"
    return _classes(report, [name for name, each in report.class_labels.items() if each == value])


def _classes(report: LabelReport, names: list[str]) -> str:
    if len(names) == 1:
        return repr(names[0])
    return ", ".join(f"{name!r}: {report.classes[name]}" for name in names)


def print_targets(targets: list[str], *, dry_run: bool) -> None:
    """The files that were written, or would be."""
    for target in targets:
        print_line(f"{'would write' if dry_run else 'wrote'} {target}")


def print_features(report: FeatureReport, *, dry_run: bool) -> None:
    """The shape of every feature."""
    if not dry_run and not report.is_written:
        samples = counted(report.num_samples, "sample")
        print_line(f"computed {samples}; the rank that ends last writes {report.target}")
        return
    if not dry_run and not report.shapes:
        print_line(f"{report.target} is there already")
        return
    size = "" if dry_run else f" ({human_size(report.nbytes)})"
    print_line(f"{'would write' if dry_run else 'wrote'} {report.target}{size}")
    print_line(f"  {counted(report.num_samples, 'sample')}, {report.num_labelled} with a label")
    print_line(f"  layers {report.layers}")
    for name, shape in report.shapes.items():
        print_line(f"  {name}: {tuple(shape)} float32")
    for name, ratios in report.explained.items():
        shares = ", ".join(f"{each:.1%}" for each in ratios)
        print_line(f"  components of {name} explain, by layer: {shares}")


def print_fidelity(report: FidelityReport) -> None:
    """A table for every kind, a row for every layer."""
    print_line(
        f"{counted(report.num_samples, 'sample')}, matched by {report.matched_by}; "
        f"edges are above {report.threshold:g}"
    )
    for each in report.kinds:
        print_line()
        of_mean = f", compared with the mean over heads of A's {each.reference}"
        print_line(each.kind + (of_mean if each.reference != each.kind else ""))
        rows: list[Any] = [*each.layers, each.total]
        columns = _STATES if each.kind == "hidden_states" else _WEIGHTS
        table = _table("layer", *columns, numbers=tuple(columns))
        for row in rows:
            values = ((getattr(row, name), form) for name, form in columns.values())
            table.add_row(row.name, *(_figure(value, form) for value, form in values))
        print_table(table)
        not_finite, misplaced = each.total.num_not_finite, each.total.num_misplaced
        if not_finite or misplaced:
            print_line(f"NaN or infinite in A: {not_finite}; not the same in both: {misplaced}")


# By column: the figure of a layer, and how it is shown.
_STATES = {
    "NRMSE": ("nrmse", "%"),
    "max sigma": ("max_sigma", ".3g"),
    "max relative": ("max_relative", ".3g"),
    "mean cosine": ("mean_cosine", ".7g"),
    "lowest": ("min_cosine", ".7g"),
    "neighbours": ("neighbour_agreement", "%"),
    "difference": ("difference_nrmse", "%"),
}
_WEIGHTS = {
    "NRMSE": ("nrmse", "%"),
    "max error": ("max_error", ".3g"),
    "max relative": ("max_relative", ".3g"),
    "edges": ("num_edges", "d"),
    "flips": ("num_flips", "d"),
    "share": ("flip_share", "%"),
    "mean KL": ("mean_kl", ".3g"),
    "max KL": ("max_kl", ".3g"),
}


def _figure(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.4g} %" if form == "%" else f"{value:{form}}"


def unmatched_lines(found: Unmatched, which: str) -> list[str]:
    """What only one archive has, for people."""
    lines = []
    if found.samples:
        named = and_more(found.samples, 3)
        only = counted(len(found.samples), "sample is", "samples are")
        lines.append(f"{only} only in {which}: {named}")
    kinds = found.kinds().items()
    lines += [
        f"{counted(count, f'layer of {kind} is', f'layers of {kind} are')} only in {which}"
        for kind, count in kinds
    ]
    return lines


def print_extraction(report: ExtractionReport) -> None:
    """The results of a run, or the needs of a dry run."""
    if report.status == "planned":
        if (forecast := report.forecast) is not None:
            from h5traces.extract.estimate import estimate

            found = estimate(
                forecast.shape,
                forecast.lengths,
                layers=forecast.layers,
                kinds=forecast.kinds,
                precision=forecast.precision,
                rates=forecast.rates,
            )
            print_estimate(found, sequences="every answer at its largest length")
        print_line(
            f"{counted(report.num_planned, 'sample')}: {human_size(report.needed_nbytes)} needed "
            f"at most, with the room to pack a shard; {human_size(report.free_nbytes)} free"
        )
        return
    line = (
        f"{report.output}: {report.num_before + report.num_written} of {report.num_planned} samples"
    )
    if report.num_before:
        line += f", {report.num_before} of them before"
    if report.num_written:
        line += (
            f"; {human_size(report.nbytes)} in {report.seconds:.1f} s, "
            f"{report.tokens_per_second:.0f} tokens/s"
        )
    print_line(line)
    if report.halved:
        halved = counted(len(report.halved), "batch", "batches")
        print_line(f"{halved} did not fit into memory, and ran as halves")


def print_estimate(found: Estimate, *, sequences: str = "") -> None:
    """Bytes per sample and per 1000, by way of storing them."""
    numbers = ("layers", "per sample", "per 1000", "of float16")
    table = _table("stored as", *numbers, "basis", numbers=numbers)
    float16 = next(each for each in found.rows if each.name == "raw float16")
    for each in found.rows:
        table.add_row(
            cell(each.name),
            str(each.num_layers),
            human_size(each.sample_nbytes),
            human_size(each.per_thousand),
            f"{each.sample_nbytes / float16.sample_nbytes:.2f}",
            each.basis,
        )
    print_table(table)
    shape = found.shape
    print_line(
        f"{shape.num_layers} layers, hidden size {shape.hidden_size}, {shape.num_heads} heads, "
        f"{found.mean_seq_len:.1f} tokens per sample" + (f" ({sequences})" if sequences else "")
    )
    if found.advice:
        print_line(with_flags(found.advice))
    bits = ", ".join(f"{kind} {each:.2f}" for kind, each in found.rates.bits.items())
    print_line(f"bits per value: {bits} ({found.rates.source})")
