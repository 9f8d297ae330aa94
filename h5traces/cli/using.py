"""``h5traces features`` and ``fidelity``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, command
from h5traces.cli.console import count_progress, fail, first_lines, print_json, warn
from h5traces.cli.options import (
    KEEP,
    OUTPUT,
    Archives,
    Json,
    Layers,
    NewFile,
    Ranks,
    Workers,
    option,
)
from h5traces.errors import FidelityError
from h5traces.features import PcaOptions, extract_features
from h5traces.fidelity import FidelityReport, compare
from h5traces.format import layout

_FEATURES, _LIMITS = "Features", "Limits"
_POOLED = ("mean", "max", "answer_mean", "answer_max")
_ATTENTION = {"entropy": "attention_entropy", "sink": "sink_mass", "lookback": "lookback_ratio"}


@command()
def features(
    sources: Archives,
    *,
    last_token: Annotated[
        bool, option(_FEATURES, "--last-token", "Hidden state of the last token, per layer.")
    ] = False,
    pooled: Annotated[
        str | None,
        option(
            _FEATURES,
            "--pooled NAME,NAME",
            "Hidden states pooled over tokens: some of `mean`, `max`, `answer_mean`, `answer_max`.",
        ),
    ] = None,
    kinds: Annotated[
        str,
        option(
            _FEATURES,
            "--kinds KIND,KIND",
            "What `--last-token` and `--pooled` are made of: kinds with tokens and one more axis, "
            "such as `mlp_output`.",
        ),
    ] = layout.HIDDEN_STATES,
    attention: Annotated[
        str | None,
        option(
            _FEATURES,
            "--attention NAME,NAME",
            "Summaries of attention, per head: some of `entropy`, `sink`, `lookback`.",
        ),
    ] = None,
    pca: Annotated[
        int | None,
        option(_FEATURES, "--pca K", "Project hidden states on K principal components.", min=1),
    ] = None,
    pca_samples: Annotated[
        str | None,
        option(
            _FEATURES,
            "--pca-samples 0,3|0:100",
            "Indices of the samples that components are fitted to [default: all].",
        ),
    ] = None,
    pca_only: Annotated[
        bool, option(_FEATURES, "--pca-only", "Leave out the features that were projected.")
    ] = False,
    layers: Layers = None,
    labels: Annotated[
        str | None,
        option(KEEP, "--labels DIR", "Folder of the labels [default: beside the archives]."),
    ] = None,
    output: Annotated[
        str, option(OUTPUT, "-o --output DEST", "A name ending in `.h5`, `.npz` or `.parquet`.")
    ],
    allow_nan: Annotated[
        bool, option(OUTPUT, "--allow-nan", "Write features that are NaN or infinite.")
    ] = False,
    workers: Workers = None,
    target: NewFile,
    ranks: Ranks,
    json: Json = False,
) -> None:
    """Compute features: a row for every sample.

    Every feature is an array (samples, layers, width), with ids and labels beside it. `answer_…`
    and `lookback` need archives that record the length of prompts. Features that are NaN or
    infinite are an error that names file and sample, unless `--allow-nan` is given.

    - `h5traces features run.h5 --last-token -o features.h5`
    - `h5traces features shards/ --pooled mean,max --attention entropy,sink -o features.parquet`
    - `h5traces features run.h5 --last-token --pca 32 --pca-samples 0:800 -o features.npz`
    - `h5traces features shards/ --last-token -o features.h5 --rank auto`
    """
    names = ["last_token"] * last_token
    names += _listed(pooled, {name: name for name in _POOLED}, "--pooled")
    names = [
        name if kind == layout.HIDDEN_STATES else f"{kind}.{name}"
        for kind in kinds.split(",")
        for name in names
    ]
    names += _listed(attention, _ATTENTION, "--attention")
    if not names:
        message = "name at least one of --last-token, --pooled and --attention"
        raise typer.BadParameter(message)
    with count_progress(output) as update:
        report = extract_features(
            sources,
            output,
            names,
            layers=layers,
            pca=None if pca is None else PcaOptions(pca, pca_samples, only=pca_only),
            labels=labels,
            allow_nan=allow_nan,
            target=replace(target, workers=workers),
            progress=update,
            **ranks,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_features(report, dry_run=target.dry_run)
    for line in first_lines(report.problems + report.notes):
        warn(line)


def _listed(value: str | None, names: dict[str, str], option: str) -> list[str]:
    """Names of features from a list such as ``mean,max``."""
    chosen = [] if value is None else [part.strip() for part in value.split(",")]
    unknown = [part for part in chosen if part not in names]
    if unknown:
        message = f"{option} {', '.join(unknown)}: expected some of {', '.join(names)}"
        raise typer.BadParameter(message)
    return [names[part] for part in chosen]


@command(FidelityError)
def fidelity(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: archive, glob or folder.")],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The archive to judge, of the same samples.")
    ],
    *,
    threshold: Annotated[
        float,
        option(None, "--threshold T", "An edge is where the mean over heads is greater.", min=0),
    ] = 0.01,
    max_sigma: Annotated[
        float | None,
        option(
            _LIMITS, "--max-sigma X", "Exit 1 where a state is off by more than X sigma.", min=0
        ),
    ] = None,
    max_flips: Annotated[
        float | None,
        option(
            _LIMITS,
            "--max-flips X",
            "Exit 1 where more than the share X of a layer's edges flip.",
            min=0,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare a lossy archive with its original, layer by layer.

    States: error in units of each channel's standard deviation sigma (NRMSE, largest), relative
    error, cosine of each token, share of tokens that keep their nearest neighbour, and NRMSE of the
    difference to the layer before. Attentions: error, edges that appear or vanish at the threshold,
    divergence (KL, nats) of each row. `docs/fidelity.md` defines each measure and its limits.

    Samples are matched by id and generation, without ids by index. Exit code 0 however large the
    errors are, unless `--max-sigma` or `--max-flips` is exceeded (1); 2 where nothing can be
    compared.

    - `h5traces fidelity exact.h5 small.h5`
    - `h5traces fidelity exact/ small/ --max-sigma 0.06 --max-flips 0.005 --json`
    """
    with count_progress("comparing") as update:
        report = compare(a, b, threshold=threshold, progress=update)
    exceeding = report.exceeding(max_sigma=max_sigma, max_flips=max_flips)
    if json:
        print_json({**report.as_dict(), "exceeding": exceeding})
    else:
        reports.print_fidelity(report)
    for line in _notes(report):
        warn(line)
    for line in exceeding:
        fail(line)
    if exceeding:
        raise typer.Exit(EXIT_PROBLEMS)


def _notes(report: FidelityReport) -> list[str]:
    """What was not compared."""
    lines = reports.unmatched_lines(report.only_in_a, "A")
    lines += reports.unmatched_lines(report.only_in_b, "B")
    return lines + first_lines(report.skipped)
