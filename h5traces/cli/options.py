"""Options that several commands share, and the groups that are built from them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import typer

from h5traces.cli.command import Group
from h5traces.format.dtypes import DtypePolicy, OverflowPolicy
from h5traces.format.precision import HeadMean as HeadMeanName
from h5traces.format.precision import Precision
from h5traces.format.precision import Tier as TierName
from h5traces.meaning.checks import CheckOptions, FailOn
from h5traces.meaning.options import FirstState, ReadingOptions
from h5traces.rewriting.ordering import Order
from h5traces.storage.codecs import ArrayCodec
from h5traces.writing.options import AUTOMATIC_SAMPLES, Compare, PrecisionOptions, TargetOptions
from h5traces.writing.options import Foreign as ForeignChoice

KEEP: Final = "What to keep"
PRECISION: Final = "Precision"
READING: Final = "Reading"
CHECKS: Final = "Checks"
OUTPUT: Final = "Output"
RANKS: Final = "Ranks"


def option(panel: str | None, spelling: str, text: str, **settings: Any) -> Any:
    """An option as it reads in the help: its panel, names and value (``-n --num-samples N``).

    Without a name, it is the parameter's.
    """
    names = [each for each in spelling.split() if each[0] == "-"]
    metavar = spelling.split()[-1]
    settings["metavar"] = None if metavar in names else metavar
    return typer.Option(*names, rich_help_panel=panel, help=text, **settings)


Archives = Annotated[list[str], typer.Argument(metavar="FILE…", help="Archives, globs or folders.")]
Json = Annotated[bool, option(None, "--json", "One JSON document on stdout.")]
DryRun = Annotated[bool, option(OUTPUT, "--dry-run", "Say what would be done; write nothing.")]
Overwrite = Annotated[bool, option(OUTPUT, "--overwrite", "Replace existing files.")]
Workers = Annotated[
    int | None, option(None, "--workers N", "Threads [default: one per core].", min=1)
]
Verify = Annotated[
    bool,
    option(
        OUTPUT,
        "--verify/--no-verify",
        "Read every new file back and compare it with its source before it gets its name.",
    ),
]
Output = Annotated[str, option(OUTPUT, "-o --output DEST", "An `.h5` name, or a folder/.")]
Layers = Annotated[
    str | None, option(KEEP, "--layers 0,5,10-12,last", "Decoder blocks (0-based) [default: all].")
]
Samples = Annotated[
    str | None, option(KEEP, "--samples 0,3|0:100", "Indices of samples [default: all].")
]
NumSamples = Annotated[int, option(KEEP, "-n --num-samples N", "The first N samples.", min=1)]
ShardSamples = Annotated[
    int | None, option(OUTPUT, "--shard-samples N", "At most N samples per archive.", min=1)
]


def _precision(
    tier: Annotated[
        TierName | None,
        option(
            PRECISION,
            "--tier NAME",
            "`exact` (no quantisation, the default for new archives); `fine` (0.01 sigma, as "
            "in bfloat16); `analysis` (0.05 sigma); `compact` (0.2 sigma, attentions "
            "averaged over heads); `native` (float16 rounded to 5 mantissa bits).",
        ),
    ] = None,
    step: Annotated[
        float | None,
        option(
            PRECISION,
            "--step C",
            "Quantisation step of hidden states, 0.001 to 4 sigma of their channel; errors "
            "are at most half of it.",
        ),
    ] = None,
    attention_bits: Annotated[
        int | None,
        option(
            PRECISION, "--attention-bits BITS", "Bits of attention weights, on a square-root scale."
        ),
    ] = None,
    head_mean: Annotated[
        HeadMeanName | None,
        option(
            PRECISION,
            "--head-mean none|beside|only",
            "Attentions averaged over heads; `only` replaces the heads by them.",
        ),
    ] = None,
    mantissa_bits: Annotated[
        int | None,
        option(
            PRECISION,
            "--mantissa-bits K",
            "Round what stays in float16 to K (1 to 9) of its 10 mantissa bits.",
        ),
    ] = None,
    scales: Annotated[
        str | None,
        option(
            PRECISION,
            "--scales FILE",
            "Written by `h5traces calibrate`, or an archive with scales [default: measured "
            "on the first samples].",
        ),
    ] = None,
    calibration_samples: Annotated[
        int,
        option(
            PRECISION,
            "--calibration-samples N",
            "Samples measured where there is no --scales.",
            min=1,
        ),
    ] = AUTOMATIC_SAMPLES,
    dtype: Annotated[
        DtypePolicy | None,
        option(
            PRECISION,
            "--dtype TYPE",
            "Stored type: `float16`, `bfloat16`, `float32`, or `auto`, the narrowest that "
            "keeps every bit [default: float16, or that of the archives read].",
        ),
    ] = None,
    on_overflow: Annotated[
        OverflowPolicy,
        option(
            PRECISION,
            "--on-overflow float32|error|clip",
            "Arrays with finite values beyond the type are stored as float32, end the run, or "
            "are clipped.",
        ),
    ] = "float32",
    codec: Annotated[
        ArrayCodec | None,
        option(
            PRECISION,
            "--codec gzip|zstd",
            "Compression [default: gzip, or that of the archives read].",
        ),
    ] = None,
) -> PrecisionOptions:
    chosen: TierName | Precision | None = tier
    changes = {
        "step": step,
        "attention_bits": attention_bits,
        "head_mean": head_mean,
        "mantissa_bits": mantissa_bits,
    }
    named = [f"--{name.replace('_', '-')}" for name, each in changes.items() if each is not None]
    if named and tier == "exact":
        message = f"--tier exact is without quantisation, {', '.join(named)} with; leave one out"
        raise typer.BadParameter(message)
    if named:
        chosen = Precision.of(tier or "exact", **changes)
    return PrecisionOptions(
        tier=chosen,
        scales=scales,
        calibration_samples=calibration_samples,
        dtype=dtype,
        on_overflow=on_overflow,
        codec=codec,
    )


def _reading(
    first_state: Annotated[
        FirstState | None,
        option(
            READING,
            "--first-state embedding|block",
            "What the first hidden state is, where the file does not show it.",
        ),
    ] = None,
    keep_padding: Annotated[
        bool,
        option(READING, "--keep-padding", "Keep padded positions and their mask [default: cut]."),
    ] = False,
    mapping: Annotated[
        str | None,
        option(READING, "--mapping TOML", "Which name of a file holds which field, and its axes."),
    ] = None,
    layer_ids: Annotated[
        str | None,
        option(
            READING,
            "--layer-ids 0,8,16-20",
            "Layers of the hidden states, counted as vLLM does: 0 is the embedding, i the output "
            "of block i - 1.",
        ),
    ] = None,
    responses: Annotated[
        str | None,
        option(
            READING,
            "--responses JSONL",
            "Responses of a server: prompt length, answer and finish reason of each request.",
        ),
    ] = None,
) -> ReadingOptions:
    ids = None if layer_ids is None else _ids(layer_ids)
    return ReadingOptions(
        first_state=first_state,
        keep_padding=keep_padding,
        mapping=mapping,
        layer_ids=ids,
        responses=responses,
    )


_RANGE: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def _ids(text: str) -> tuple[int, ...]:
    """Ids of layers from text such as ``0,8,16-20``."""
    found = [_RANGE.fullmatch(each.strip()) for each in text.split(",")]
    if not all(found):
        message = f"--layer-ids is {text}, expected numbers and ranges such as 0,8,16-20"
        raise typer.BadParameter(message)
    ends = [(int(each[1]), int(each[2] or each[1])) for each in found if each]
    return tuple(number for first, last in ends for number in range(first, last + 1))


def _checks(
    ignore: Annotated[
        list[str] | None,
        option(CHECKS, "--ignore ID", "Leave out the findings of a check; repeatable."),
    ] = None,
    fail_on: Annotated[
        FailOn,
        option(CHECKS, "--fail-on error|warning", "From which findings on the exit code is 1."),
    ] = "error",
) -> CheckOptions:
    return CheckOptions(ignore=tuple(ignore or ()), fail_on=fail_on)


def _new_file(overwrite: Overwrite = False, dry_run: DryRun = False) -> TargetOptions:
    return TargetOptions(overwrite=overwrite, dry_run=dry_run)


def _rewritten(
    overwrite: Overwrite = False,
    verify: Verify = True,
    workers: Workers = None,
    dry_run: DryRun = False,
) -> TargetOptions:
    return TargetOptions(overwrite=overwrite, verify=verify, workers=workers, dry_run=dry_run)


def _converted(
    shard_samples: ShardSamples = None,
    overwrite: Overwrite = False,
    skip_existing: Annotated[
        bool,
        option(
            OUTPUT,
            "--skip-existing",
            "Keep archives that are what would be written; finishes a stopped run.",
        ),
    ] = False,
    compare: Annotated[
        Compare,
        option(
            OUTPUT,
            "--compare time|ends|content",
            "How --skip-existing compares sources: by size, time and both ends; without the time, "
            "for copies; or by all bytes, of which this records a digest.",
        ),
    ] = "time",
    verify: Verify = True,
    workers: Annotated[
        int | None,
        option(
            None,
            "--workers N",
            "Threads [default: one per core]; with several batches, processes.",
            min=1,
        ),
    ] = None,
    dry_run: DryRun = False,
) -> TargetOptions:
    return TargetOptions(
        shard_samples=shard_samples,
        overwrite=overwrite,
        skip_existing=skip_existing,
        compare=compare,
        verify=verify,
        workers=workers,
        dry_run=dry_run,
    )


def _ranks(
    rank: Annotated[
        str | None,
        option(
            RANKS,
            "--rank R|auto",
            "Do the share of one of several processes; `auto` asks the environment: "
            "H5TRACES_RANK, SLURM arrays, RANK, steps of srun.",
        ),
    ] = None,
    world_size: Annotated[
        int | None, option(RANKS, "--world-size N", "How many processes there are.", min=1)
    ] = None,
) -> dict[str, Any]:
    if rank is None or rank == "auto":
        return {"rank": rank, "world_size": world_size}
    if not rank.isdecimal():
        message = f"--rank {rank}: expected a number from 0 on, or auto"
        raise typer.BadParameter(message)
    return {"rank": int(rank), "world_size": world_size}


def _extracted(
    shard_samples: ShardSamples = None,
    verify: Verify = True,
    workers: Workers = None,
    dry_run: DryRun = False,
) -> TargetOptions:
    return TargetOptions(
        shard_samples=shard_samples, verify=verify, workers=workers, dry_run=dry_run
    )


Checks = Annotated[CheckOptions, Group(_checks)]
Reading = Annotated[ReadingOptions, Group(_reading)]
Foreign = Annotated[
    ForeignChoice,
    option(
        OUTPUT,
        "--foreign keep|drop",
        "Whether to keep what other programs put into archives; names with x_ are always kept.",
    ),
]
MergeOrder = Annotated[
    Order | None,
    option(
        OUTPUT,
        "--order id|source|index",
        "Sort samples by id, by the file converted from, or by row of the data set [default: as "
        "they lie].",
    ),
]
PrecisionGroup = Annotated[PrecisionOptions, Group(_precision)]
NewFile = Annotated[TargetOptions, Group(_new_file)]
Rewritten = Annotated[TargetOptions, Group(_rewritten)]
Converted = Annotated[TargetOptions, Group(_converted)]
Ranks = Annotated[dict[str, Any], Group(_ranks)]
Extracted = Annotated[TargetOptions, Group(_extracted)]
