"""``h5traces extract`` and ``h5traces estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from h5traces.cli import reports
from h5traces.cli.console import (
    EXIT_PROBLEMS,
    DryRun,
    Json,
    Verify,
    fail,
    print_json,
    reported,
    samples_progress,
    stopping,
    warn,
)
from h5traces.cli.precision import (
    CALIBRATION_SAMPLES,
    PRECISION_ERRORS,
    AttentionBits,
    CalibrationSamples,
    HeadMean,
    MantissaBits,
    Scales,
    Step,
    Tier,
    parse_precision,
    warn_of_loss,
)
from h5traces.errors import ExtractionError, LayerIndexError, MissingDependencyError
from h5traces.format.dtypes import DtypePolicy, OverflowPolicy
from h5traces.format.precision import EXACT
from h5traces.storage.codecs import ArrayCodec
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from h5traces.extract.estimate import Estimate
    from h5traces.extract.sizes import ModelShape

_USAGE_ERRORS = (ExtractionError, LayerIndexError, MissingDependencyError, *PRECISION_ERRORS)

ModelId = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="Hub id, local folder, or an alias such as `llama2_chat_7B`.",
    ),
]
Dataset = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="`triviaqa`, `truthfulqa`, or a `.jsonl` or `.csv` file with a column `question` "
        "(and `question_id`, `answers` where there are).",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="0,5,10-12,last", help="Decoder blocks (0-based) [default: all]."),
]
Kinds = Annotated[
    str,
    typer.Option(metavar="KIND,KIND", help="`hidden_states`, `attentions`, or both."),
]
Dtype = Annotated[
    DtypePolicy,
    typer.Option(help="Stored type. `auto`: the narrowest that keeps every bit."),
]
ModelDtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    typer.Option(help="Type to compute in. `auto`: the checkpoint's, but float32 on processors."),
]
MaxNewTokens = Annotated[
    int, typer.Option(metavar="N", min=1, help="Tokens of an answer, at most.")
]
Codec = Annotated[ArrayCodec, typer.Option(help="Compression of the arrays.")]
Device = Annotated[
    str | None,
    typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto` for all [default: cuda if there is]."),
]
Revision = Annotated[str | None, typer.Option(help="Commit, branch or tag of the model.")]


def extract(
    model_id: ModelId,
    dataset: Dataset,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="DEST",
            help="Folder for shards (`traces/`), or an `.h5` name.",
        ),
    ],
    num_samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The first N questions [default: all].")
    ] = None,
    layers: Layers = None,
    kinds: Kinds = "hidden_states,attentions",
    embedding: Annotated[
        bool, typer.Option("--embedding", help="Also store the output of the embedding.")
    ] = False,
    last_state: Annotated[
        Literal["final_norm", "block_output"],
        typer.Option(
            help="Where the last block's state is taken: behind the final norm or before."
        ),
    ] = "final_norm",
    tier: Tier = None,
    step: Step = None,
    attention_bits: AttentionBits = None,
    head_mean: HeadMean = None,
    mantissa_bits: MantissaBits = None,
    scales: Scales = None,
    calibration_samples: CalibrationSamples = CALIBRATION_SAMPLES,
    dtype: Dtype = "float16",
    on_overflow: Annotated[
        OverflowPolicy,
        typer.Option(
            help="Arrays with finite values beyond the type: store as float32, stop, or clip."
        ),
    ] = "float32",
    on_nan: Annotated[
        Literal["error", "skip", "keep"],
        typer.Option(help="Samples with NaN: stop, leave out, or store."),
    ] = "error",
    codec: Codec = "gzip",
    max_new_tokens: MaxNewTokens = 64,
    num_beams: Annotated[int, typer.Option(metavar="N", min=1, help="Beam search.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="With --sample; 0 for none.")] = 0,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Each sample's own seed is made of it and its id.")
    ] = 0,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text around `{question}` [default: 'Answer the question concisely. "
            "Q: {question} A:'; with --chat the question alone].",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")
    ] = False,
    answer_cut: Annotated[
        Literal["none", "sentence", "newline"],
        typer.Option(help="Where the clean answer ends. Raw answer and arrays are never cut."),
    ] = "none",
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples computed together.")
    ] = 1,
    model_dtype: ModelDtype = "auto",
    device: Device = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantise the weights with bitsandbytes.")
    ] = False,
    revision: Revision = None,
    dataset_path: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A local copy of triviaqa's or truthfulqa's repository."),
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Commit, branch or tag of the data set.")
    ] = None,
    question_column: Annotated[str | None, typer.Option(help="Of a file.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Of a file.")] = None,
    answers_column: Annotated[str | None, typer.Option(help="Of a file.")] = None,
    shard_samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most N samples per archive.")
    ] = None,
    verify: Verify = True,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads that compress [default: cores].")
    ] = None,
    check_space: Annotated[
        bool,
        typer.Option("--check-space/--no-check-space", help="Refuse to start on a disk too small."),
    ] = True,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run a model on questions and archive its traces.

    Each answer is generated first; then one clean forward pass over prompt and answer gives hidden
    states `(S, H)` and attentions `(A, S, S)` of every layer. Every sample is durable before it
    counts: a run that was stopped, killed or that crashed goes on when the same command is given
    again. Ctrl-C finishes the current batch. Samples that cannot be computed are left out and
    listed in `DEST.report.json`.

    - `h5traces extract --model-id examples/tiny-llama-pydocs --dataset examples/questions.jsonl
      -o out/`
    - `h5traces extract --model-id llama2_chat_7B --dataset triviaqa --num-samples 1000 -o traces/
      --layers 0,5,10,15,20,25,last --batch-size 8`
    - `… --tier analysis` gives up precision for size, within bounds, when a shard is packed
    - `… --dry-run` tells how much room it will take
    """
    with reported(_USAGE_ERRORS):
        precision = parse_precision(tier, step, attention_bits, head_mean, mantissa_bits) or EXACT
        from h5traces import extract as extraction  # torch and transformers: heavy, and optional
        from h5traces.extract.options import DEFAULT_TEMPLATE

        extraction.hide_progress_bars()
        options = extraction.ExtractOptions(
            layers=layers,
            kinds=_kinds(kinds),
            embedding=embedding,
            last_state=last_state,
            generation=extraction.GenerationOptions(
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            ),
            seed=seed,
            prompt_template=prompt_template or ("{question}" if chat else DEFAULT_TEMPLATE),
            chat=chat,
            answer_cut=answer_cut,
            batch_size=batch_size,
            on_nan=on_nan,
        )
        with samples_progress("extract") as update, stopping() as should_stop:
            report = extraction.extract_dataset(
                extraction.ModelChoice(
                    model_id=model_id,
                    revision=revision,
                    dtype=model_dtype,
                    device=device,
                    load_in_4bit=load_in_4bit,
                ),
                extraction.DatasetChoice(
                    dataset=dataset,
                    num_samples=num_samples,
                    path=dataset_path,
                    revision=dataset_revision,
                    columns=extraction.Columns(
                        question=question_column, sample_id=id_column, answers=answers_column
                    ),
                ),
                output,
                options,
                precision=PrecisionOptions(
                    tier=precision,
                    scales=scales,
                    calibration_samples=calibration_samples,
                    dtype=dtype,
                    on_overflow=on_overflow,
                    codec=codec,
                ),
                target=TargetOptions(
                    shard_samples=shard_samples, verify=verify, dry_run=dry_run, workers=workers
                ),
                check_space=check_space,
                progress=update,
                should_stop=should_stop,
            )
    if json:
        print_json(report.as_dict())
    else:
        if dry_run and (forecast := report.forecast) is not None:
            from h5traces.extract.estimate import estimate as estimate_sizes

            found = estimate_sizes(
                forecast.shape,
                forecast.lengths,
                layers=forecast.layers,
                kinds=forecast.kinds,
                precision=forecast.precision,
                rates=forecast.rates,
            )
            reports.print_estimate(found, sequences="every answer as long as it may be")
        reports.print_extraction(report)
    if report.num_written and precision.is_lossy:
        warn_of_loss(str(precision))
    for message in report.warnings:
        warn(message)
    for each in report.skipped:
        warn(f"left out: {each.message}")
    if report.needed_nbytes > report.free_nbytes:
        warn("the disk is too small for the forecast")
    if report.status == "stopped":
        fail("stopped; what was computed is safe, the same command goes on")
        raise typer.Exit(128 + should_stop.number)
    if not report.ok:
        raise typer.Exit(EXIT_PROBLEMS)


def estimate(
    model_id: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Hub id, local folder, or alias.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Instead of a model: its blocks.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Instead of a model: its width.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Instead of a model: its heads.")
    ] = None,
    seq_len: Annotated[
        int, typer.Option(metavar="S", min=1, help="Tokens of prompt and answer.")
    ] = 43,
    layers: Layers = None,
    kinds: Kinds = "hidden_states,attentions",
    dtype: Dtype = "float16",
    codec: Codec = "gzip",
    pilot: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Extract N samples and measure instead of guessing."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Questions of the pilot.")
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    model_dtype: ModelDtype = "auto",
    device: Device = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Estimate the size of traces, per sample and per 1000.

    From the configuration alone, raw sizes are exact and those of archives estimated with rates
    that were measured on the small model of the repository. `--pilot` measures on yours.

    - `h5traces estimate --num-layers 32 --hidden-size 4096 --num-heads 32 --seq-len 43`
    - `h5traces estimate --model-id examples/tiny-llama-pydocs --pilot 8
      --dataset examples/questions.jsonl --layers 0,3,last`
    """
    storage = PrecisionOptions(dtype=dtype, codec=codec)
    found: Estimate
    with reported(_USAGE_ERRORS):
        if pilot is not None:
            if model_id is None or dataset is None:
                message = "--pilot needs --model-id and --dataset"
                raise typer.BadParameter(message)
            from h5traces import extract as extraction  # torch and transformers: heavy, optional

            extraction.hide_progress_bars()
            model = extraction.ModelChoice(
                model_id=model_id, revision=revision, dtype=model_dtype, device=device
            )
            options = extraction.ExtractOptions(
                layers=layers,
                kinds=_kinds(kinds),
                generation=extraction.GenerationOptions(max_new_tokens=max_new_tokens),
            )
            with samples_progress("pilot") as update:
                found = extraction.estimate_with_pilot(
                    model,
                    extraction.DatasetChoice(dataset=dataset),
                    pilot,
                    options,
                    precision=storage,
                    progress=update,
                )
        else:
            from h5traces.extract.estimate import estimate as estimate_sizes

            shape = _shape(model_id, revision, num_layers, hidden_size, num_heads)
            found = estimate_sizes(
                shape, seq_len, layers=layers, kinds=_kinds(kinds), precision=storage
            )
    if json:
        print_json(found.as_dict())
    else:
        reports.print_estimate(found)


def _shape(
    model_id: str | None,
    revision: str | None,
    num_layers: int | None,
    hidden_size: int | None,
    num_heads: int | None,
) -> ModelShape:
    """The shape of a model by name, or as it was given."""
    if model_id is not None:
        from h5traces import extract as extraction  # transformers reads the configuration

        return extraction.model_shape(model_id, revision=revision)
    if num_layers is None or hidden_size is None or num_heads is None:
        message = "give --model-id, or all of --num-layers, --hidden-size and --num-heads"
        raise typer.BadParameter(message)
    from h5traces.extract.sizes import ModelShape

    return ModelShape(num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads)


def _kinds(text: str) -> Any:
    """Kinds as they are named on the command line; unknown ones are refused with the options."""
    return tuple(dict.fromkeys(each.strip() for each in text.split(",")))
