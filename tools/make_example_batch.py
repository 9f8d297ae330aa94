#!/usr/bin/env python3
"""Write a legacy batch of real traces: a list of dicts, pickled and gzipped (layout `full_gz`).

For each question the model answers greedily; then prompt and answer run through it once more, in
one forward pass, and every block's hidden states and attentions are kept. The answer's token ids
are used as generated: decoding and tokenising again can give other tokens.

Each dict has these keys, in this order (S tokens, H channels, A heads):
  hidden_states           list over blocks of (S, H) arrays; the embedding is left out, so entry i
                          is transformers' hidden_states[i + 1]; the last is after the final norm
  attentions              list over blocks of (A, S, S) arrays; exact zeros above the diagonal
  tokens                  int64 array (S,): prompt, then answer, without the end token
  tokens_decoded          list of S strings, every token decoded by itself
  generated_answer_clean  the answer, decoded and stripped
  question_id             copied from the questions file
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "Answer the question concisely. Q: {question} A:"

EPILOG = """\
examples:
  the batch in the repository:
    python tools/make_example_batch.py --overwrite

  all forty questions, with the arrays as computed:
    python tools/make_example_batch.py --num-samples 40 --dtype float32 -o all_0000.pkl.gz

  what is inside (unpickle only files that you trust; this one you just made):
    >>> import gzip, pickle
    >>> batch = pickle.load(gzip.open("all_0000.pkl.gz"))
    >>> batch[0]["question_id"], len(batch[0]["hidden_states"]), batch[0]["attentions"][0].shape

A questions file has one JSON object per line with question_id and question; more keys are allowed:
  {"question_id": "py_0001", "question": "What does math.sqrt do?", "answers": ["..."]}
"""


def read_questions(path: Path, num_samples: int) -> list[dict[str, Any]]:
    """Return the first questions of a JSON-lines file."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if not {"question_id", "question"} <= entry.keys():
            message = f"{path}, line {number}: needs the keys question_id and question"
            raise ValueError(message)
        questions.append(entry)
    if len(questions) < num_samples:
        message = f"{path} has {len(questions)} questions, --num-samples asks for {num_samples}"
        raise ValueError(message)
    return questions[:num_samples]


def load(model_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a local folder for float32 compute.

    Only the eager attention returns its weights; the fused kernels never form them.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_path, attn_implementation="eager", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    return model.float().eval(), tokenizer


def generate_answer(model: PreTrainedModel, prompt: torch.Tensor, max_new_tokens: int) -> list[int]:
    """Return the greedy continuation's token ids, without the end token."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=ends[0],  # one prompt needs no padding; naming it spares a warning
    )
    answer = generated[0, prompt.shape[1] :].tolist()
    return answer[:-1] if answer and answer[-1] in ends else answer


def to_stored(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Return the only sample of a batch as a separate array in the stored dtype."""
    array = np.ascontiguousarray(tensor[0].numpy().astype(dtype))
    if not np.isfinite(array).all():
        message = f"values up to {tensor.abs().max().item():g} do not fit {dtype}: use float32"
        raise ValueError(message)
    return array


@torch.inference_mode()
def trace(
    model: PreTrainedModel, token_ids: Sequence[int], dtype: np.dtype
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return hidden states and attentions of all blocks from one clean forward pass."""
    output = model(
        input_ids=torch.tensor([token_ids]),
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    hidden_states = [to_stored(state, dtype) for state in output.hidden_states[1:]]
    attentions = [to_stored(attention, dtype) for attention in output.attentions]
    return hidden_states, attentions


def make_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Answer one question and trace prompt and answer; the order of keys is part of the layout."""
    prompt = tokenizer(PROMPT.format(question=question["question"]), return_tensors="pt").input_ids
    longest = prompt.shape[1] + args.max_new_tokens
    if longest > model.config.max_position_embeddings:
        message = (
            f"{question['question_id']}: prompt and answer may reach {longest} tokens, "
            f"the model takes {model.config.max_position_embeddings}"
        )
        raise ValueError(message)
    answer = generate_answer(model, prompt, args.max_new_tokens)
    token_ids = [*prompt[0].tolist(), *answer]
    hidden_states, attentions = trace(model, token_ids, np.dtype(args.dtype))
    return {
        "hidden_states": hidden_states,
        "attentions": attentions,
        "tokens": np.array(token_ids, dtype=np.int64),
        "tokens_decoded": [tokenizer.decode([token]) for token in token_ids],
        "generated_answer_clean": tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "question_id": question["question_id"],
    }


def write_batch(samples: list[dict[str, Any]], path: Path) -> None:
    """Write a sibling and rename it; no time or name in the gzip header, so bytes repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with (
            part.open("wb") as file,
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as stream,
        ):
            pickle.dump(samples, stream, protocol=4)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"{text} is not positive"
        raise argparse.ArgumentTypeError(message)
    return value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=Path("examples/tiny-llama-pydocs"),
        help="folder with weights and tokenizer; nothing is downloaded (default: %(default)s)",
    )
    add(
        "--questions",
        type=Path,
        default=Path("examples/questions.jsonl"),
        help="JSON lines (default: %(default)s)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("examples/legacy/tiny-llama-pydocs_pydocs_batch_0000.pkl.gz"),
        help="file to write (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace the output if it exists")
    add(
        "--num-samples",
        type=positive,
        default=8,
        help="questions to take, from the first (default: %(default)s)",
    )
    add(
        "--max-new-tokens",
        type=positive,
        default=24,
        help="longest answer (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the stored arrays; computing is always in float32 (default: %(default)s)",
    )
    add("--threads", type=positive, default=2, help="processor threads (default: %(default)s)")
    args = parser.parse_args(argv)
    for path, what in ((args.model / "config.json", "--model"), (args.questions, "--questions")):
        if not path.exists():
            parser.error(f"{what}: {path} does not exist (run from the repository's root?)")
    if args.output.exists() and not args.overwrite:
        parser.error(f"{args.output} exists: choose another -o or pass --overwrite")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(mode=True)
    questions = read_questions(args.questions, args.num_samples)
    model, tokenizer = load(args.model)
    samples = []
    for question in questions:
        sample = make_sample(model, tokenizer, question, args)
        samples.append(sample)
        print(
            f"{question['question_id']}  {len(sample['tokens'])} tokens  {question['question']}  "
            f"->  {sample['generated_answer_clean']}",
            file=sys.stderr,
        )
    write_batch(samples, args.output)
    print(f"{args.output}  {len(samples)} samples  {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
