"""``h5traces extract`` and ``estimate``."""

from __future__ import annotations

import signal
from dataclasses import replace
from json import loads as parse_json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from h5traces.cli import reports
from h5traces.cli.command import EXIT_PROBLEMS, EXIT_STOPPED, Group, command, stopping
from h5traces.cli.console import (
    fail,
    finding_line,
    print_json,
    samples_progress,
    tell_findings,
    warn,
)
from h5traces.cli.options import (
    KEEP,
    OUTPUT,
    PRECISION,
    Checks,
    Extracted,
    Json,
    Layers,
    Output,
    PrecisionGroup,
    Ranks,
    Reading,
    option,
)
from h5traces.errors import ConversionError, ExtractionError
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

_Defaults = tuple[str, Literal["final_norm", "block_output"], int]
# Of `--kinds`, `--last-state` and `--batch-size`.
_TRANSFORMERS: _Defaults = ("hidden_states,attentions", "final_norm", 1)
_VLLM: _Defaults = ("hidden_states", "block_output", 256)
_MODEL, _QUESTIONS, _ANSWERS, _PILOT = "Model", "Questions", "Answers", "Pilot"

ModelId = Annotated[
    str, option(_MODEL, "--model-id MODEL", "Hub id, local folder, or alias (`llama2_chat_7B`).")
]
ModelDtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    option(
        _MODEL,
        "--model-dtype TYPE",
        "Compute in `float32`, `float16`, `bfloat16`, or `auto`: the checkpoint's type, but "
        "float32 on CPUs.",
    ),
]
Device = Annotated[
    str | None,
    option(
        _MODEL,
        "--device NAME",
        "`cpu`, `cuda`, `cuda:1`, or `auto` for all [default: cuda where there is a GPU].",
    ),
]
Revision = Annotated[
    str | None, option(_MODEL, "--revision REV", "Commit, branch or tag of the model.")
]
TrustRemoteCode = Annotated[
    bool,
    option(
        _MODEL,
        "--trust-remote-code",
        "Run Python code that comes with the model; `--revision` must then be a commit.",
    ),
]
_KINDS = (
    "By layer: `hidden_states`, `attentions`, `residual_mid`, `attention_output`, `mlp_output`, "
    "`head_outputs`, `queries`, `keys`, `values`, `router_logits`, `attention_mean`, "
    "`state_norms`; by token: `logits`, `logprobs`, `entropy`"
)
Kinds = Annotated[str, option(KEEP, "--kinds KIND,KIND", f"{_KINDS}.")]
ExtractedKinds = Annotated[
    str | None,
    option(
        KEEP,
        "--kinds KIND,KIND",
        _KINDS + " [default: hidden_states,attentions; of vLLM hidden_states].",
    ),
]
Attentions = Annotated[
    str | None,
    option(
        KEEP,
        "--attentions full|qk|window:N|mean|none",
        "Weights; queries and keys, of which archives compute the weights when they are read: "
        "smaller from some hundred tokens on; weights of the last N keys of every query; their "
        "mean over heads; or nothing [default: as `--kinds` says].",
    ),
]
MaxNewTokens = Annotated[
    int,
    option(
        _ANSWERS,
        "--max-new-tokens N",
        "Largest number of tokens of an answer; 0 to run prompts only.",
        min=0,
    ),
]


def _model(
    model_id: ModelId,
    revision: Revision = None,
    model_dtype: ModelDtype = "auto",
    device: Device = None,
    load_in_4bit: Annotated[
        bool, option(_MODEL, "--load-in-4bit", "Quantise the weights with bitsandbytes.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Annotated[
        int | None,
        option(
            _MODEL, "--threads N", "Threads of a CPU [default: as many as cores are free].", min=1
        ),
    ] = None,
) -> ModelChoice:
    return ModelChoice(
        model_id=model_id,
        revision=revision,
        dtype=model_dtype,
        device=device,
        load_in_4bit=load_in_4bit,
        trust_remote_code=trust_remote_code,
        threads=threads,
    )


def _dataset(
    dataset: Annotated[
        str,
        option(
            _QUESTIONS,
            "--dataset NAME|FILE",
            "`triviaqa`, `truthfulqa`, or a `.jsonl` or `.csv` file with a column `question` "
            "(and, optionally, `question_id` and `answers`).",
        ),
    ],
    num_samples: Annotated[
        int | None,
        option(_QUESTIONS, "-n --num-samples N", "The first N questions [default: all].", min=1),
    ] = None,
    dataset_path: Annotated[
        str | None,
        option(
            _QUESTIONS,
            "--dataset-path DIR",
            "A local copy of triviaqa's or truthfulqa's repository.",
        ),
    ] = None,
    dataset_revision: Annotated[
        str | None,
        option(_QUESTIONS, "--dataset-revision REV", "Commit, branch or tag of the data set."),
    ] = None,
    question_column: Annotated[
        str | None, option(_QUESTIONS, "--question-column NAME", "Column of a file.")
    ] = None,
    id_column: Annotated[
        str | None, option(_QUESTIONS, "--id-column NAME", "Column of a file.")
    ] = None,
    answers_column: Annotated[
        str | None, option(_QUESTIONS, "--answers-column NAME", "Column of a file.")
    ] = None,
    given_column: Annotated[
        str | None,
        option(
            _QUESTIONS,
            "--given-column NAME",
            "Column of answers that the model is given instead of generating its own: text, token "
            "ids, or a list of several answers.",
        ),
    ] = None,
    messages_column: Annotated[
        str | None,
        option(
            _QUESTIONS,
            "--messages-column NAME",
            "Column of chats (lists of messages) for the model's chat template; a last message of "
            "the assistant is the answer.",
        ),
    ] = None,
    tools_column: Annotated[
        str | None, option(_QUESTIONS, "--tools-column NAME", "Column of the tools of chats.")
    ] = None,
    prompt_ids_column: Annotated[
        str | None,
        option(_QUESTIONS, "--prompt-ids-column NAME", "Column of prompts as token ids."),
    ] = None,
    spans_column: Annotated[
        str | None,
        option(_QUESTIONS, "--spans-column NAME", "Column of character spans of the given answer."),
    ] = None,
) -> DatasetChoice:
    return DatasetChoice(
        dataset=dataset,
        num_samples=num_samples,
        path=dataset_path,
        revision=dataset_revision,
        columns=Columns(
            question=question_column,
            sample_id=id_column,
            answers=answers_column,
            given=given_column,
            messages=messages_column,
            tools=tools_column,
            prompt_ids=prompt_ids_column,
            spans=spans_column,
        ),
    )


def _generation(
    max_new_tokens: MaxNewTokens = 64,
    num_beams: Annotated[
        int, option(_ANSWERS, "--num-beams N", "Beams of beam search; 1 for none.", min=1)
    ] = 1,
    sample: Annotated[bool, option(_ANSWERS, "--sample", "Draw tokens at random.")] = False,
    temperature: Annotated[float, option(_ANSWERS, "--temperature T", "Of `--sample`.")] = 1.0,
    top_k: Annotated[
        int, option(_ANSWERS, "--top-k K", "Of `--sample`; 0 for all tokens.", min=0)
    ] = 0,
    top_p: Annotated[float, option(_ANSWERS, "--top-p P", "Of `--sample`.")] = 1.0,
    num_generations: Annotated[
        int,
        option(_ANSWERS, "--num-generations N", "Of `--sample`: answers to each question.", min=1),
    ] = 1,
) -> GenerationOptions:
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_generations=num_generations,
    )


def _engine(
    engine: Annotated[
        Literal["transformers", "vllm"],
        option(
            _MODEL,
            "--engine transformers|vllm",
            "What runs the model. vLLM is faster, and gives hidden states only, the last before "
            "the final norm.",
        ),
    ] = "transformers",
    engine_arguments: Annotated[
        str | None,
        option(
            _MODEL,
            "--engine-arguments JSON",
            'Of `vllm.LLM`, such as `{"tensor_parallel_size": 2}`.',
        ),
    ] = None,
    self_check: Annotated[
        bool,
        option(
            _MODEL,
            "--self-check/--no-self-check",
            "Compare vLLM with transformers over eleven tokens before the run.",
        ),
    ] = True,
) -> Any:
    if engine == "transformers":
        if engine_arguments is not None:
            message = "--engine-arguments are those of --engine vllm"
            raise typer.BadParameter(message)
        return None
    from h5traces.vllm.engine import VllmEngine

    try:
        arguments = parse_json(engine_arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        message = f"--engine-arguments is {engine_arguments}, expected an object of JSON"
        raise typer.BadParameter(message)
    return VllmEngine(arguments=arguments, self_check=self_check)


@command(ExtractionError)
def extract(
    *,
    model: Annotated[ModelChoice, Group(_model)],
    engine: Annotated[Any, Group(_engine)],
    dataset: Annotated[DatasetChoice, Group(_dataset)],
    prompt_template: Annotated[
        str | None,
        option(
            _QUESTIONS,
            "--prompt-template TEXT",
            "Text around `{question}` [default: 'Answer the question concisely. "
            "Q: {question} A:'; with `--chat` the question alone].",
        ),
    ] = None,
    chat: Annotated[
        bool, option(_QUESTIONS, "--chat", "Put the prompt into the model's chat template.")
    ] = False,
    generation: Annotated[GenerationOptions, Group(_generation)],
    seed: Annotated[
        int,
        option(
            _ANSWERS,
            "--seed N",
            "Every sample's own seed is derived from it and the sample's id.",
            min=0,
        ),
    ] = 0,
    answer_cut: Annotated[
        Literal["none", "sentence", "newline"],
        option(
            _ANSWERS,
            "--answer-cut none|sentence|newline",
            "Where the clean answer ends. Raw answer and arrays are never cut.",
        ),
    ] = "none",
    layers: Layers = None,
    kinds: ExtractedKinds = None,
    attentions: Attentions = None,
    top_logits: Annotated[
        int | None,
        option(
            KEEP, "--top-logits K", "Of `logits`, the largest K of every token, with ids.", min=1
        ),
    ] = None,
    embedding: Annotated[
        bool, option(KEEP, "--embedding", "Also store the output of the embedding.")
    ] = False,
    last_state: Annotated[
        Literal["final_norm", "block_output"] | None,
        option(
            KEEP,
            "--last-state final_norm|block_output",
            "Where the last block's state is taken: after the final norm, or before it [default: "
            "final_norm; of vLLM block_output].",
        ),
    ] = None,
    tokens: Annotated[
        str,
        option(
            KEEP,
            "--tokens all|prompt|answer|prompt_last|last|every:N|spans",
            "Which tokens are stored; of attentions, the weights among them.",
        ),
    ] = "all",
    on_nan: Annotated[
        Literal["error", "skip", "keep"],
        option(KEEP, "--on-nan error|skip|keep", "Samples with NaN: stop, leave out, or store."),
    ] = "error",
    precision: PrecisionGroup,
    output: Output,
    target: Extracted,
    check_space: Annotated[
        bool,
        option(
            OUTPUT, "--check-space/--no-check-space", "Do not start where the disk is too small."
        ),
    ] = True,
    batch_size: Annotated[
        int | None,
        option(
            _MODEL,
            "--batch-size N",
            "Number of samples computed together, or that vLLM is given at a time [default: 1; of "
            "vLLM 256].",
            min=1,
        ),
    ] = None,
    checks: Checks,
    ranks: Ranks,
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
    - `… --engine vllm --layers 8,16` records hidden states at vLLM's speed
    - `… --tier analysis` trades precision for size
    - `… --dry-run` estimates the size and writes nothing
    """
    from h5traces import extract as extraction  # torch and transformers: heavy, and optional

    extraction.hide_progress_bars()
    default_kinds, default_state, default_size = _TRANSFORMERS if engine is None else _VLLM
    options = ExtractOptions(
        layers=layers,
        kinds=_kinds(default_kinds if kinds is None else kinds),
        attentions=attentions,
        top_logits=top_logits,
        embedding=embedding,
        last_state=last_state or default_state,
        tokens=tokens,
        generation=generation,
        seed=seed,
        prompt_template=prompt_template or ("{question}" if chat else DEFAULT_TEMPLATE),
        chat=chat,
        answer_cut=answer_cut,
        batch_size=batch_size or default_size,
        on_nan=on_nan,
    )
    is_rank = ranks["rank"] is not None
    with samples_progress("extract") as update, stopping(is_rank=is_rank) as should_stop:
        report = extraction.extract_dataset(
            replace(model, engine=engine),
            dataset,
            output,
            options,
            precision=precision,
            target=target,
            check_space=check_space,
            progress=update,
            should_stop=should_stop,
            checks=checks,
            **ranks,
        )
    if json:
        print_json(report.as_dict())
    else:
        reports.print_extraction(report)
    if report.num_written and precision.precision.is_lossy:
        reports.warn_of_loss(str(precision.precision))
    for message in report.warnings:
        warn(message)
    tell_findings(report.findings, report.output, checks)
    for found in report.findings:
        if checks.fails([found]):
            fail(f"{report.output}: {finding_line(found)}")
    for each in report.skipped:
        warn(f"left out: {each.message}")
    if report.needed_nbytes > report.free_nbytes:
        warn("the disk is too small for the forecast")
    if report.status == "stopped":
        fail("stopped; finished samples are kept, and the same command continues")
        is_told = is_rank and should_stop.number != signal.SIGINT
        raise typer.Exit(EXIT_STOPPED if is_told else 128 + should_stop.number)
    if not report.ok:
        raise typer.Exit(EXIT_PROBLEMS)


def _shape(
    num_layers: Annotated[
        int | None, option(_MODEL, "--num-layers N", "Blocks, instead of a model.", min=1)
    ] = None,
    hidden_size: Annotated[
        int | None, option(_MODEL, "--hidden-size N", "Width, instead of a model.", min=1)
    ] = None,
    num_heads: Annotated[
        int | None, option(_MODEL, "--num-heads N", "Heads, instead of a model.", min=1)
    ] = None,
) -> ModelShape | None:
    if num_layers is None or hidden_size is None or num_heads is None:
        return None
    return ModelShape(num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads)


def _storage(
    dtype: Annotated[
        DtypePolicy,
        option(
            PRECISION, "--dtype TYPE", "Stored type: `float16`, `bfloat16`, `float32` or `auto`."
        ),
    ] = "float16",
    codec: Annotated[ArrayCodec, option(PRECISION, "--codec gzip|zstd", "Compression.")] = "gzip",
) -> PrecisionOptions:
    return PrecisionOptions(dtype=dtype, codec=codec)


@command(ConversionError, ExtractionError)
def estimate(
    *,
    model_id: Annotated[
        str | None, option(_MODEL, "--model-id MODEL", "Hub id, local folder, or alias.")
    ] = None,
    revision: Revision = None,
    shape: Annotated[Any, Group(_shape)],
    seq_len: Annotated[
        int, option(_MODEL, "--seq-len S", "Tokens of prompt and answer.", min=1)
    ] = 43,
    layers: Layers = None,
    kinds: Kinds = "hidden_states,attentions",
    attentions: Attentions = None,
    storage: Annotated[PrecisionOptions, Group(_storage)],
    pilot: Annotated[
        str | None,
        option(
            _PILOT,
            "--pilot N|FILE",
            "Extract N samples and measure their size, or measure the first samples of a file or "
            "folder of any kind that `convert` reads.",
        ),
    ] = None,
    reading: Reading,
    dataset: Annotated[
        str | None, option(_PILOT, "--dataset NAME|FILE", "Questions of the pilot.")
    ] = None,
    max_new_tokens: Annotated[
        int, option(_PILOT, "--max-new-tokens N", "Largest number of tokens of an answer.", min=1)
    ] = 64,
    model_dtype: ModelDtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Estimate the size of traces, per sample and per 1000.

    Without a pilot, raw sizes follow from the model's configuration, and those of archives are
    estimated with rates measured on the small model of the repository. `--pilot` measures yours,
    or what a file of traces that you have takes as an archive.

    - `h5traces estimate --num-layers 32 --hidden-size 4096 --num-heads 32 --seq-len 43`
    - `h5traces estimate --model-id examples/tiny-llama-pydocs --pilot 8
      --dataset examples/questions.jsonl --layers 0,3,last`
    - `h5traces estimate --pilot examples/legacy`
    """
    if pilot is not None and not pilot.isdecimal():
        from h5traces.extract.measuring import estimate_from_files

        found = estimate_from_files(pilot, layers=layers, precision=storage, reading=reading)
    elif pilot is not None:
        if model_id is None or dataset is None:
            message = "--pilot needs --model-id and --dataset, or a file of traces"
            raise typer.BadParameter(message)
        if not int(pilot):
            message = "--pilot is 0, expected 1 or more samples"
            raise typer.BadParameter(message)
        model = ModelChoice(
            model_id=model_id,
            revision=revision,
            dtype=model_dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        generation = GenerationOptions(max_new_tokens=max_new_tokens)
        options = ExtractOptions(
            layers=layers, kinds=_kinds(kinds), attentions=attentions, generation=generation
        )
        found = _measured(model, dataset, int(pilot), options, storage)
    else:
        from h5traces.extract.estimate import estimate as estimate_sizes

        if model_id is not None:
            from h5traces import extract as extraction  # transformers reads the configuration

            shape = extraction.model_shape(
                model_id, revision=revision, trust_remote_code=trust_remote_code
            )
        if shape is None:
            message = "give --model-id, or all of --num-layers, --hidden-size and --num-heads"
            raise typer.BadParameter(message)
        found = estimate_sizes(
            shape,
            seq_len,
            layers=layers,
            kinds=_kinds(kinds),
            attentions=attentions,
            precision=storage,
        )
    if json:
        print_json(found.as_dict())
    else:
        reports.print_estimate(found)


def _measured(
    model: ModelChoice, dataset: str, pilot: int, options: ExtractOptions, storage: PrecisionOptions
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
