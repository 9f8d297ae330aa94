"""``h5traces index``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h5traces.cli.command import command
from h5traces.cli.console import count_progress, print_json, print_line, warn
from h5traces.cli.options import OUTPUT, Archives, Json, Ranks, Workers, option
from h5traces.format.text import and_more, counted


@command()
def index(
    sources: Archives,
    *,
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "-o --output CATALOGUE",
            "A `.parquet` name [default: catalogue.parquet in the folder].",
        ),
    ] = None,
    texts: Annotated[
        bool, option(OUTPUT, "--texts", "List questions and answers, too; reads every sample.")
    ] = False,
    check: Annotated[
        bool,
        option(
            None,
            "--check",
            "Compare the archive_id of every shard with the catalogue, not only size and time.",
        ),
    ] = False,
    workers: Workers = None,
    ranks: Ranks,
    json: Json = False,
) -> None:
    """Write the catalogue of many shards, or bring it up to date.

    A catalogue is a Parquet file with a row for each sample. It opens as one archive, without
    touching a shard, wherever archives are read, and DuckDB, polars and pandas query it. Run the
    command again when shards were added, replaced or labelled: only those are read.

    - `h5traces index archives/`
    - `h5traces index s3://bucket/run/ -o run.parquet --texts`
    - `h5traces index archives/ --rank auto`
    - `h5traces head archives/catalogue.parquet`
    """
    from h5traces.rewriting.cataloguing import index as write_catalogue

    if output is None:
        if len(sources) != 1 or not Path(sources[0]).is_dir():
            message = "name the catalogue with -o; only that of a folder on disk has a default"
            raise typer.BadParameter(message)
        output = str(Path(sources[0], "catalogue.parquet"))
    with count_progress("index") as update:
        report = write_catalogue(
            sources, output, texts=texts, check=check, workers=workers, progress=update, **ranks
        )
    if json:
        print_json(report.as_dict())
    elif not report.is_written:
        shards = counted(report.num_read, "shard")
        print_line(f"read {shards}; the rank that ends last writes {report.path}")
    elif not report.num_samples:
        print_line(f"{report.path} is there already")
    else:
        print_line(
            f"wrote {report.path}: {counted(report.num_samples, 'sample')} in "
            f"{counted(report.num_shards, 'shard')}, {report.num_read} read, "
            f"{report.num_kept} unchanged"
        )
    if report.gone:
        warn(f"not there any more, and taken out of the catalogue: {and_more(report.gone, 5)}")
