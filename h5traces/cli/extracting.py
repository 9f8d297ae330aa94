"""``h5traces extract`` and ``estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, Group, command, stopping
from h5traces.cli.console import fail, print_json, samples_progress, warn
from h5traces.cli.options import (
    KEEP,
    OUTPUT,
    PRECISION,
    Extracted,
    Json,
    Layers,
    Output,
    PrecisionGroup,
    option,
)
from h5traces.errors import ExtractionError
from h5traces.extract.options import (
    DEFAULT_TEMPLATE,
    Columns,
    DatasetChoice,
    ExtractOptions,
    GenerationOptions,
    ModelChoice,
)
from h5traces.extract.sizes import ModelShape
from h5traces.format.dtypes import DtypePolicy
from h5traces.storage.codecs import ArrayCodec
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from h5traces.extract.estimate import Estimate

_MODEL, _QUESTIONS, _ANSWERS, _PILOT = "Model", "Questions", "Answers", "Pilot"

ModelId = Annotated[
    str,
    option(
        panel=_MODEL, metavar="MODEL", help="Hub id, local folder, or alias (`llama2_chat_7B`)."
    ),
]
ModelDtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    option(
        panel=_MODEL,
        metavar="TYPE",
        help="Compute in `float32`, `float16`, `bfloat16`, or `auto`: the checkpoint's type, but "
        "float32 on CPUs.",
    ),
]
Device = Annotated[
    str | None,
    option(
        panel=_MODEL,
        metavar="NAME",
        help="`cpu`, `cuda`, `cuda:1`, or `auto` for all [default: cuda where there is a GPU].",
    ),
]
Revision = Annotated[
    str | None, option(panel=_MODEL, metavar="REV", help="Commit, branch or tag of the model.")
]
Kinds = Annotated[
    str,
    option(panel=KEEP, metavar="KIND,KIND", help="`hidden_states`, `attentions`, or both."),
]
MaxNewTokens = Annotated[
    int, option(panel=_ANSWERS, metavar="N", min=1, help="Largest number of tokens of an answer.")
]


def _model(
    model_id: ModelId,
    revision: Revision = None,
    model_dtype: ModelDtype = "auto",
    device: Device = None,
    load_in_4bit: Annotated[
        bool,
        option("--load-in-4bit", panel=_MODEL, help="Quantise the weights with bitsandbytes."),
    ] = False,
) -> ModelChoice:
    return ModelChoice(
        model_id=model_id,
        revision=revision,
        dtype=model_dtype,
        device=device,
        load_in_4bit=load_in_4bit,
    )


def _dataset(
    dataset: Annotated[
        str,
        option(
            panel=_QUESTIONS,
            metavar="NAME|FILE",
            help="`triviaqa`, `truthfulqa`, or a `.jsonl` or `.csv` file with a column `question` "
            "(and, optionally, `question_id` and `answers`).",
        ),
    ],
    num_samples: Annotated[
        int | None,
        option(
            "-n",
            "--num-samples",
            panel=_QUESTIONS,
            metavar="N",
            min=1,
            help="The first N questions [default: all].",
        ),
    ] = None,
    dataset_path: Annotated[
        str | None,
        option(
            panel=_QUESTIONS,
            metavar="DIR",
            help="A local copy of triviaqa's or truthfulqa's repository.",
        ),
    ] = None,
    dataset_revision: Annotated[
        str | None,
        option(panel=_QUESTIONS, metavar="REV", help="Commit, branch or tag of the data set."),
    ] = None,
    question_column: Annotated[
        str | None, option(panel=_QUESTIONS, metavar="NAME", help="Column of a file.")
    ] = None,
    id_column: Annotated[
        str | None, option(panel=_QUESTIONS, metavar="NAME", help="Column of a file.")
    ] = None,
    answers_column: Annotated[
        str | None, option(panel=_QUESTIONS, metavar="NAME", help="Column of a file.")
    ] = None,
) -> DatasetChoice:
    return DatasetChoice(
        dataset=dataset,
        num_samples=num_samples,
        path=dataset_path,
        revision=dataset_revision,
        columns=Columns(question=question_column, sample_id=id_column, answers=answers_column),
    )


def _generation(
    max_new_tokens: MaxNewTokens = 64,
    num_beams: Annotated[
        int, option(panel=_ANSWERS, metavar="N", min=1, help="Beams of beam search; 1 for none.")
    ] = 1,
    sample: Annotated[
        bool, option("--sample", panel=_ANSWERS, help="Draw tokens at random.")
    ] = False,
    temperature: Annotated[float, option(panel=_ANSWERS, metavar="T", help="Of `--sample`.")] = 1.0,
    top_k: Annotated[
        int, option(panel=_ANSWERS, metavar="K", min=0, help="Of `--sample`; 0 for all tokens.")
    ] = 0,
    top_p: Annotated[float, option(panel=_ANSWERS, metavar="P", help="Of `--sample`.")] = 1.0,
) -> GenerationOptions:
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


@command(ExtractionError)
def extract(
    *,
    model: Annotated[ModelChoice, Group(_model)],
    dataset: Annotated[DatasetChoice, Group(_dataset)],
    prompt_template: Annotated[
        str | None,
        option(
            panel=_QUESTIONS,
            metavar="TEXT",
            help="Text around `{question}` [default: 'Answer the question concisely. "
            "Q: {question} A:'; with `--chat` the question alone].",
        ),
    ] = None,
    chat: Annotated[
        bool,
        option("--chat", panel=_QUESTIONS, help="Put the prompt into the model's chat template."),
    ] = False,
    generation: Annotated[GenerationOptions, Group(_generation)],
    seed: Annotated[
        int,
        option(
            panel=_ANSWERS,
            metavar="N",
            min=0,
            help="Every sample's own seed is derived from it and the sample's id.",
        ),
    ] = 0,
    answer_cut: Annotated[
        Literal["none", "sentence", "newline"],
        option(
            panel=_ANSWERS,
            metavar="none|sentence|newline",
            help="Where the clean answer ends. Raw answer and arrays are never cut.",
        ),
    ] = "none",
    layers: Layers = None,
    kinds: Kinds = "hidden_states,attentions",
    embedding: Annotated[
        bool, option("--embedding", panel=KEEP, help="Also store the output of the embedding.")
    ] = False,
    last_state: Annotated[
        Literal["final_norm", "block_output"],
        option(
            panel=KEEP,
            metavar="final_norm|block_output",
            help="Where the last block's state is taken: after the final norm, or before it.",
        ),
    ] = "final_norm",
    on_nan: Annotated[
        Literal["error", "skip", "keep"],
        option(
            panel=KEEP,
            metavar="error|skip|keep",
            help="Samples with NaN: stop, leave out, or store.",
        ),
    ] = "error",
    precision: PrecisionGroup,
    output: Output,
    target: Extracted,
    check_space: Annotated[
        bool,
        option(
            "--check-space/--no-check-space",
            panel=OUTPUT,
            help="Do not start where the disk is too small.",
        ),
    ] = True,
    batch_size: Annotated[
        int, option(panel=_MODEL, metavar="N", min=1, help="Number of samples computed together.")
    ] = 1,
    json: Json = False,
) -> None:
    """Run a model on questions and archive its traces.

    Each answer is generated first; then one clean forward pass over prompt and answer gives hidden
    states `(S, H)` and attentions `(A, S, S)` of every layer. Finished samples are on disk: the
    same command continues a run that was stopped or that crashed. Ctrl-C finishes the current
    batch. Samples that cannot be computed are left out and listed in `DEST.report.json`.

    - `h5traces extract --model-id examples/tiny-llama-pydocs --dataset examples/questions.jsonl
      -o out/`
    - `h5traces extract --model-id llama2_chat_7B --dataset triviaqa --num-samples 1000 -o traces/
      --layers 0,5,10,15,20,25,last --batch-size 8`
    - `… --tier analysis` trades precision for size
    - `… --dry-run` estimates the size and writes nothing
    """
    from h5traces import extract as extraction  # torch and transformers: heavy, and optional

    extraction.hide_progress_bars()
    options = ExtractOptions(
        layers=layers,
        kinds=_kinds(kinds),
        embedding=embedding,
        last_state=last_state,
        generation=generation,
        seed=seed,
        prompt_template=prompt_template or ("{question}" if chat else DEFAULT_TEMPLATE),
        chat=chat,
        answer_cut=answer_cut,
        batch_size=batch_size,
        on_nan=on_nan,
    )
    with samples_progress("extract") as update, stopping() as should_stop:
        report = extraction.extract_dataset(
            model,
            dataset,
            output,
            options,
            precision=precision,
            target=target,
            check_space=check_space,
            progress=update,
            should_stop=should_stop,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_extraction(report)
    if report.num_written and precision.precision.is_lossy:
        reports.warn_of_loss(str(precision.precision))
    for message in report.warnings:
        warn(message)
    for each in report.skipped:
        warn(f"left out: {each.message}")
    if report.needed_nbytes > report.free_nbytes:
        warn("the disk is too small for the forecast")
    if report.status == "stopped":
        fail("stopped; finished samples are kept, and the same command continues")
        raise typer.Exit(128 + should_stop.number)
    if not report.ok:
        raise typer.Exit(EXIT_PROBLEMS)


def _shape(
    num_layers: Annotated[
        int | None, option(panel=_MODEL, metavar="N", min=1, help="Blocks, instead of a model.")
    ] = None,
    hidden_size: Annotated[
        int | None, option(panel=_MODEL, metavar="N", min=1, help="Width, instead of a model.")
    ] = None,
    num_heads: Annotated[
        int | None, option(panel=_MODEL, metavar="N", min=1, help="Heads, instead of a model.")
    ] = None,
) -> ModelShape | None:
    if num_layers is None or hidden_size is None or num_heads is None:
        return None
    return ModelShape(num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads)


def _storage(
    dtype: Annotated[
        DtypePolicy,
        option(
            panel=PRECISION,
            metavar="TYPE",
            help="Stored type: `float16`, `bfloat16`, `float32` or `auto`.",
        ),
    ] = "float16",
    codec: Annotated[
        ArrayCodec, option(panel=PRECISION, metavar="gzip|zstd", help="Compression.")
    ] = "gzip",
) -> PrecisionOptions:
    return PrecisionOptions(dtype=dtype, codec=codec)


@command(ExtractionError)
def estimate(
    *,
    model_id: Annotated[
        str | None, option(panel=_MODEL, metavar="MODEL", help="Hub id, local folder, or alias.")
    ] = None,
    revision: Revision = None,
    shape: Annotated[Any, Group(_shape)],
    seq_len: Annotated[
        int, option(panel=_MODEL, metavar="S", min=1, help="Tokens of prompt and answer.")
    ] = 43,
    layers: Layers = None,
    kinds: Kinds = "hidden_states,attentions",
    storage: Annotated[PrecisionOptions, Group(_storage)],
    pilot: Annotated[
        int | None,
        option(panel=_PILOT, metavar="N", min=1, help="Extract N samples, and measure their size."),
    ] = None,
    dataset: Annotated[
        str | None, option(panel=_PILOT, metavar="NAME|FILE", help="Questions of the pilot.")
    ] = None,
    max_new_tokens: Annotated[
        int, option(panel=_PILOT, metavar="N", min=1, help="Largest number of tokens of an answer.")
    ] = 64,
    model_dtype: ModelDtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Estimate the size of traces, per sample and per 1000.

    Without a pilot, raw sizes follow from the model's configuration, and those of archives are
    estimated with rates measured on the small model of the repository. `--pilot` measures yours.

    - `h5traces estimate --num-layers 32 --hidden-size 4096 --num-heads 32 --seq-len 43`
    - `h5traces estimate --model-id examples/tiny-llama-pydocs --pilot 8
      --dataset examples/questions.jsonl --layers 0,3,last`
    """
    if pilot is not None:
        if model_id is None or dataset is None:
            message = "--pilot needs --model-id and --dataset"
            raise typer.BadParameter(message)
        model = ModelChoice(model_id=model_id, revision=revision, dtype=model_dtype, device=device)
        generation = GenerationOptions(max_new_tokens=max_new_tokens)
        options = ExtractOptions(layers=layers, kinds=_kinds(kinds), generation=generation)
        found = _measured(model, dataset, pilot, options, storage)
    else:
        from h5traces.extract.estimate import estimate as estimate_sizes

        if model_id is not None:
            from h5traces import extract as extraction  # transformers reads the configuration

            shape = extraction.model_shape(model_id, revision=revision)
        if shape is None:
            message = "give --model-id, or all of --num-layers, --hidden-size and --num-heads"
            raise typer.BadParameter(message)
        found = estimate_sizes(
            shape, seq_len, layers=layers, kinds=_kinds(kinds), precision=storage
        )
    if json:
        print_json(found.as_dict())
    else:
        reports.print_estimate(found)


def _measured(
    model: ModelChoice,
    dataset: str,
    pilot: int,
    options: ExtractOptions,
    storage: PrecisionOptions,
) -> Estimate:
    from h5traces import extract as extraction  # torch and transformers: heavy, and optional

    extraction.hide_progress_bars()
    with samples_progress("pilot") as update:
        return extraction.estimate_with_pilot(
            model,
            DatasetChoice(dataset=dataset),
            pilot,
            options,
            precision=storage,
            progress=update,
        )


def _kinds(text: str) -> Any:
    """Kinds as they are named on the command line; unknown ones are rejected with the options."""
    return tuple(dict.fromkeys(each.strip() for each in text.split(",")))
