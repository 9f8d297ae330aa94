"""``h5traces features``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h5traces.cli import reports
from h5traces.cli.console import (
    Archives,
    DryRun,
    Json,
    Layers,
    count_progress,
    first_lines,
    print_json,
    reported,
    warn,
)
from h5traces.errors import ArchiveExistsError, TargetError
from h5traces.features import PcaOptions, extract_features

_USAGE = (ArchiveExistsError, TargetError, IndexError)
_POOLED = ("mean", "max", "answer_mean", "answer_max")
_ATTENTION = {"entropy": "attention_entropy", "sink": "sink_mass", "lookback": "lookback_ratio"}


def features(
    sources: Archives,
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="DEST", help="`.h5`, `.npz` or `.parquet`."),
    ],
    last_token: Annotated[
        bool, typer.Option("--last-token", help="Hidden state of the last token, per layer.")
    ] = False,
    pooled: Annotated[
        str | None,
        typer.Option(metavar=",".join(_POOLED), help="Hidden states pooled over tokens."),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar=",".join(_ATTENTION), help="Summaries of attention, per head."),
    ] = None,
    layers: Layers = None,
    pca: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Project hidden states on K principal components."),
    ] = None,
    pca_samples: Annotated[
        str | None,
        typer.Option(metavar="0,3|0:100", help="Fit them on these samples only, by index."),
    ] = None,
    pca_only: Annotated[
        bool, typer.Option("--pca-only", help="Leave out the features that were projected.")
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labels lie here, not beside the archives."),
    ] = None,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Write features that are NaN or infinite.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads [default: one per core].")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Compute features: a row for every sample.

    Every feature is an array (samples, layers, width). `answer_…` and `lookback` take archives that
    know the length of prompts. Features that are NaN or infinite are an error that names file and
    sample, unless --allow-nan.

    - `h5traces features run.h5 --last-token -o features.h5`
    - `h5traces features shards/ --pooled mean,max --attention entropy,sink -o features.parquet`
    - `h5traces features run.h5 --last-token --pca 32 --pca-samples 0:800 -o features.npz`
    """
    names = ["last_token"] * last_token
    names += _listed(pooled, {name: name for name in _POOLED}, "--pooled")
    names += _listed(attention, _ATTENTION, "--attention")
    if not names:
        message = "name at least one of --last-token, --pooled and --attention"
        raise typer.BadParameter(message)
    components = None if pca is None else PcaOptions(pca, pca_samples, only=pca_only)
    with reported(_USAGE), count_progress(output) as update:
        report = extract_features(
            sources,
            output,
            names,
            layers=layers,
            pca=components,
            labels=labels,
            allow_nan=allow_nan,
            workers=workers,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=update,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_features(report, dry_run=dry_run)
    for line in first_lines(report.problems):
        warn(line)


def _listed(value: str | None, names: dict[str, str], option: str) -> list[str]:
    """Names of features from a list such as ``mean,max``."""
    chosen = [] if value is None else [part.strip() for part in value.split(",")]
    unknown = [part for part in chosen if part not in names]
    if unknown:
        message = f"{option} {', '.join(unknown)}: expected some of {', '.join(names)}"
        raise typer.BadParameter(message)
    return [names[part] for part in chosen]
