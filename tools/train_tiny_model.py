#!/usr/bin/env python3
"""Train the tiny Llama that the examples trace, from text that Python itself carries.

A model small enough to live in the repository lets every example and every test run offline on
real traces: trained weights, a real tokenizer, attention that has learned where to look.

What is read    The topics of `pydoc_data` (the reference manual's own prose), the docstrings of the
                standard library's source files and of a few modules written in C. Nothing is
                downloaded. Repeated paragraphs count once. Where a docstring opens with one short
                sentence, a question in the examples' prompt is made of it, so that the model can
                answer and stop.
What is held    One document in twenty, chosen by a hash of its name, with its question. Neither
out             the tokenizer nor the model sees these, but for short phrases that recur.
What is         model.safetensors (float16), config.json, generation_config.json, tokenizer.json,
written         tokenizer_config.json: all that transformers needs to load the folder without a
                network. training.json has the options, versions and measured losses.
What is         Train loss; held-out loss of the weights as saved, questions apart because their
printed         fixed wording is easy; and, as the yardstick, what a model that knows only token
                frequencies would reach on the same held-out tokens.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import math
import platform
import pydoc_data.topics
import random
import re
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
IGNORED_TARGET = -100  # what torch's cross entropy skips
HELD_OUT_ONE_IN = 20
SHORTEST_KEPT_PARAGRAPH = 60  # shorter ones ("Example:") repeat honestly and stay
PROMPT = "Answer the question concisely. Q: {question} A:"

# Tests and tools have their own interfaces and say little about Python itself.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
C_MODULES = ("builtins", "cmath", "gc", "itertools", "math", "sys", "time")

EPILOG = """\
examples:
  the model in the repository (about a quarter of an hour on two cores):
    python tools/train_tiny_model.py --seed 0 --steps 2400 --batch-size 8 --overwrite

  a quick look at the whole path (half a minute, a poor model):
    python tools/train_tiny_model.py --steps 50 --out-dir tiny-quick

The same seed, Python, torch and processor family give the same weights. Another Python release has
other docstrings: compare corpus_sha256 in training.json before comparing losses.
"""


class Document(NamedTuple):
    """One text with the name that decides whether it is held out."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, already split."""

    train: list[str]
    held_out: list[str]
    held_out_questions: list[str]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.held_out, self.held_out_questions):
            for text in part:
                digest.update(text.encode() + b"\0")
        return digest.hexdigest()


# --- text -----------------------------------------------------------------------------------------


def topic_documents() -> Iterator[Document]:
    """Yield the reference manual, topic by topic."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topic:{name}", text.strip())


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def walk_docstrings(node: ast.AST, name: str) -> Iterator[Document]:
    """Yield the docstrings of a module, its classes and functions, outermost first."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and docstring.strip():
            yield Document(name, docstring.strip())
    for child in ast.iter_child_nodes(node):
        owns_name = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from walk_docstrings(child, f"{name}.{child.name}" if owns_name else name)


def source_documents() -> Iterator[Document]:
    """Yield docstrings parsed from the standard library's sources; nothing is imported or run."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield from walk_docstrings(ast.parse(path.read_bytes()), module_name(path, root))


def c_documents() -> Iterator[Document]:
    """Yield docstrings of modules without Python source, their functions and their methods."""
    for module in C_MODULES:
        for name, value in sorted(vars(importlib.import_module(module)).items()):
            if name.startswith("_") or not callable(value):
                continue
            qualified = name if module == "builtins" else f"{module}.{name}"
            members = sorted(vars(value).items()) if inspect.isclass(value) else []
            named = [(qualified, value), *((f"{qualified}.{key}", item) for key, item in members)]
            for full_name, target in named:
                # A constant's __doc__ is that of its type and says nothing about the constant.
                documented = callable(target) or inspect.isdatadescriptor(target)
                docstring = target.__doc__ if documented else None
                if isinstance(docstring, str) and docstring.strip():
                    yield Document(full_name, inspect.cleandoc(docstring))


def first_sentence(text: str) -> str | None:
    """Return the sentence that opens a docstring if it can serve as an answer."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s", paragraph)[0]
    complete = sentence.endswith(".") and sentence[0].isupper()
    return sentence if complete and 15 <= len(sentence) <= 120 else None


def question_text(document: Document) -> str | None:
    """Return the document as a question and its answer, or None if none can be made."""
    answer = first_sentence(document.text)
    if answer is None or any(part.startswith("_") for part in document.name.split(".")):
        return None
    return PROMPT.format(question=f"What does {document.name} do?") + " " + answer


def without_repeats(text: str, seen: set[str]) -> str:
    """Drop the paragraphs that an earlier document had; indentation and wrapping do not count.

    The manual prints the same passages under several topics. Kept, they would put held-out text
    into the training set and make the held-out loss a lie.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < SHORTEST_KEPT_PARAGRAPH or key not in seen:
            kept.append(paragraph)
        seen.add(key)
    return "\n\n".join(kept).strip()


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def read_corpus() -> Corpus:
    """Collect, deduplicate and split all text; the result depends on the Python release alone."""
    corpus = Corpus([], [], [])
    seen: set[str] = set()
    documents = [*topic_documents(), *c_documents(), *source_documents()]
    for document in documents:
        key = " ".join(document.text.split())
        if key in seen:
            continue
        body = without_repeats(document.text, seen)
        seen.add(key)
        held_out = is_held_out(document.name)
        if body:
            is_topic = document.name.startswith("topic:")
            text = body if is_topic else f"{document.name}\n\n{body}"
            (corpus.held_out if held_out else corpus.train).append(text)
        question = question_text(document)
        if question is not None:
            (corpus.held_out_questions if held_out else corpus.train).append(question)
    return corpus


# --- tokens ---------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> FastTokenizer:
    """Learn a byte-level BPE: every text has tokens, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As Llama's own tokenizer does: a text begins with <s> unless special tokens are refused.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return one token list per text, each between <s> and </s>."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [[tokenizer.bos_token_id, *text.ids, tokenizer.eos_token_id] for text in encoded]


def pack(documents: Sequence[Sequence[int]], seq_len: int, bos: int, pad: int) -> torch.Tensor:
    """Lay documents end to end and cut rows of `seq_len + 1` tokens that all begin with <s>.

    Prompts begin with <s>, so rows do: the model must have seen it at position 0.
    """
    stream = [token for document in documents for token in document]
    rows = []
    start = 0
    while start < len(stream):
        head = [] if stream[start] == bos else [bos]
        end = start + seq_len + 1 - len(head)
        row = head + stream[start:end]
        rows.append(row + [pad] * (seq_len + 1 - len(row)))
        start = end
    return torch.tensor(rows)


def targets_of(rows: torch.Tensor, bos: int, pad: int) -> torch.Tensor:
    """Return next tokens; <s> after </s> is not a prediction and padding is not text."""
    targets = rows[:, 1:].clone()
    targets[(targets == bos) | (targets == pad)] = IGNORED_TARGET
    return targets


def batches(
    documents: list[list[int]], *, batch_size: int, seq_len: int, bos: int, pad: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield training rows for ever; every epoch packs the documents in a new order."""
    shuffle = random.Random(seed)
    while True:
        order = shuffle.sample(documents, len(documents))
        rows = pack(order, seq_len, bos, pad)
        rows = rows[shuffle.sample(range(len(rows)), len(rows))]
        yield from rows.split(batch_size)


# --- model ----------------------------------------------------------------------------------------


def build_model(tokenizer: FastTokenizer, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def optimizer_for(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """Decay matrices only; decayed norm gains would just be pushed towards zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def learning_rate(step: int, *, steps: int, peak: float, warmup: int) -> float:
    """Rise linearly, then follow a cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def token_losses(
    model: LlamaForCausalLM, rows: torch.Tensor, bos: int, pad: int, *, reduction: str
) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1]).logits.float()
    targets = targets_of(rows, bos, pad)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED_TARGET,
        reduction=reduction,
    )


def train(model: LlamaForCausalLM, rows: Iterator[torch.Tensor], args: argparse.Namespace) -> dict:
    """Run all steps; return the mean loss of the last hundred and the tokens seen."""
    bos, pad = model.config.bos_token_id, model.config.pad_token_id
    optimizer = optimizer_for(model, args.lr)
    warmup = min(100, max(1, args.steps // 10))
    losses: list[float] = []
    tokens_seen = 0
    began = time.monotonic()
    model.train()
    for step in range(args.steps):
        lr = learning_rate(step, steps=args.steps, peak=args.lr, warmup=warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(rows)
        loss = token_losses(model, batch, bos, pad, reduction="mean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        tokens_seen += batch[:, 1:].numel()
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            recent = losses[-args.report_every :]
            spent = time.monotonic() - began
            left = spent / (step + 1) * (args.steps - step - 1)
            log(
                f"step {step + 1}/{args.steps}  loss {sum(recent) / len(recent):.3f}  "
                f"lr {lr:.1e}  {spent:.0f} s spent, about {left:.0f} s left"
            )
    last = losses[-100:]
    return {"train_loss": sum(last) / len(last), "tokens_seen": tokens_seen}


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Return nats per token over all rows."""
    bos, pad = model.config.bos_token_id, model.config.pad_token_id
    model.eval()
    total = sum(
        token_losses(model, chunk, bos, pad, reduction="sum").item() for chunk in rows.split(16)
    )
    return total / int((targets_of(rows, bos, pad) != IGNORED_TARGET).sum())


def unigram_losses(train_rows: torch.Tensor, rows: torch.Tensor, bos: int, pad: int) -> dict:
    """Return what token frequencies alone give: the entropy in training text, the loss outside."""

    def count(table: torch.Tensor) -> np.ndarray:
        targets = targets_of(table, bos, pad)
        return np.bincount(targets[targets >= 0].numpy(), minlength=vocab_size).astype(float)

    vocab_size = int(max(train_rows.max(), rows.max())) + 1
    seen, unseen = count(train_rows), count(rows)
    log_p = np.log((seen + 1) / (seen + 1).sum())
    frequencies = seen[seen > 0] / seen.sum()
    return {
        "unigram_entropy": float(-(frequencies * np.log(frequencies)).sum()),
        "held_out_unigram_loss": float(-(unseen * log_p).sum() / unseen.sum()),
        "held_out_tokens": int(unseen.sum()),
    }


# --- output ---------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: FastTokenizer, out_dir: Path) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    write_for_older_releases(out_dir)


def write_for_older_releases(out_dir: Path) -> None:
    """Rewrite the tokenizer's files so that transformers 4.44 reads them as release 5 does."""
    path = out_dir / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # release 5's own name is new
    write_json(path, settings)
    path = out_dir / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    # Pairs came with tokenizers 0.20. Byte-level tokens hold no space, so "a b" loses nothing.
    bpe = tokenizer["model"]
    bpe["merges"] = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    write_json(path, tokenizer)


def write_json(path: Path, document: dict) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def options(args: argparse.Namespace) -> dict:
    hidden = {"out_dir", "overwrite", "report_every"}
    return {key: value for key, value in sorted(vars(args).items()) if key not in hidden}


def versions() -> dict:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


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
        "--out-dir",
        type=Path,
        default=Path("examples/tiny-llama-pydocs"),
        help="folder for weights and tokenizer (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a model that is already in the folder")
    add("--seed", type=int, default=0, help="of the weights and the order of text (default: 0)")
    add("--steps", type=positive, default=2400, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=positive, default=8, help="rows in a step (default: %(default)s)")
    add("--seq-len", type=positive, default=256, help="tokens in a row (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak of the cosine (default: %(default)s)")
    add("--layers", type=positive, default=6, help="decoder blocks (default: %(default)s)")
    add("--hidden-size", type=positive, default=128, help="channels (default: %(default)s)")
    add("--intermediate-size", type=positive, default=344, help="MLP width (default: %(default)s)")
    add("--heads", type=positive, default=8, help="attention heads (default: %(default)s)")
    add("--vocab-size", type=positive, default=2048, help="tokens, at least 259 (default: 2048)")
    add(
        "--max-positions",
        type=positive,
        default=512,
        help="longest sequence the saved model admits to (default: %(default)s)",
    )
    add(
        "--threads",
        type=positive,
        default=2,
        help="processor threads; another number may round sums differently (default: 2)",
    )
    add("--report-every", type=positive, default=50, help="steps between lines on stderr")
    args = parser.parse_args(argv)
    smallest_vocab = 256 + len(SPECIAL_TOKENS)
    if args.vocab_size < smallest_vocab:
        parser.error(f"--vocab-size must hold all bytes: at least {smallest_vocab}")
    if args.hidden_size % (2 * args.heads):
        parser.error("--hidden-size must be an even multiple of --heads: rotary pairs need it")
    if args.seq_len > args.max_positions:
        parser.error("--seq-len is longer than --max-positions")
    if (args.out_dir / "model.safetensors").exists() and not args.overwrite:
        parser.error(f"{args.out_dir} already has a model: choose --out-dir or pass --overwrite")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(args.seed)

    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train, args.vocab_size, args.max_positions)
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    train_ids = encode(tokenizer, corpus.train)
    held_out = pack(encode(tokenizer, corpus.held_out), args.seq_len, bos, pad)
    questions = pack(encode(tokenizer, corpus.held_out_questions), args.seq_len, bos, pad)
    baseline = unigram_losses(pack(train_ids, args.seq_len, bos, pad), held_out, bos, pad)
    log(
        f"{len(train_ids)} documents with {sum(map(len, train_ids))} tokens to train on, "
        f"{len(corpus.held_out)} and {len(corpus.held_out_questions)} questions held out"
    )

    model = build_model(tokenizer, args)
    rows = batches(
        train_ids,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        bos=bos,
        pad=pad,
        seed=args.seed,
    )
    outcome = train(model, rows, args)
    save(model, tokenizer, args.out_dir)

    # Measured on what a reader of the folder gets, float16 rounding included.
    saved = AutoModelForCausalLM.from_pretrained(args.out_dir).float()
    if len(AutoTokenizer.from_pretrained(args.out_dir)) != saved.config.vocab_size:
        message = f"{args.out_dir}: the saved tokenizer and model disagree on the vocabulary"
        raise RuntimeError(message)
    outcome |= baseline | {
        "held_out_loss": mean_loss(saved, held_out),
        "held_out_question_loss": mean_loss(saved, questions),
        "train_tokens": sum(map(len, train_ids)),
        "num_parameters": saved.num_parameters(),
    }
    report = {
        "options": options(args),
        "versions": versions(),
        "corpus_sha256": corpus.sha256(),
        "measured": {k: round(v, 4) for k, v in sorted(outcome.items())},
    }
    write_json(args.out_dir / "training.json", report)
    print(f"parameters                 {outcome['num_parameters']}")
    print(f"tokens seen                {outcome['tokens_seen']}")
    print(f"tokens in training text    {outcome['train_tokens']}")
    print(f"train loss                 {outcome['train_loss']:.4f} nats/token, last 100 steps")
    print(
        f"held-out loss              {outcome['held_out_loss']:.4f} nats/token, "
        f"{outcome['held_out_tokens']} tokens"
    )
    print(f"held-out loss, questions   {outcome['held_out_question_loss']:.4f} nats/token")
    print(f"held-out loss, unigram     {outcome['held_out_unigram_loss']:.4f} nats/token")
    print(f"unigram entropy, training  {outcome['unigram_entropy']:.4f} nats/token")
    print(f"wall time                  {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
