"""What storing adds to the time of an extraction.

Run ``python benchmarks/extraction.py`` (some minutes); it prints a markdown table. In every round
the same samples are extracted in each way, one way after the other, so ratios within a round hold
on a noisy machine and seconds do not; medians, with the range of the rounds in brackets.

*compute* generates answers, runs the clean forward pass, copies and casts, and throws the records
away. *stored* is ``h5traces extract`` as it is: a thread writes every sample durably while the next
one is computed. *in turn* writes in the same thread, between samples. *added* is the time beyond
*compute*, as a share of *compute*; *writing* is the time that *in turn* spends in the writer, the
last packing included.

The model is the trained one of this repository, with its 40 questions and answers of up to 64
tokens. ``--random-7b`` takes one of Llama-2-7B's shape with random weights instead, for machines
with a GPU; random weights never end an answer, so all have 64 tokens.

Prediction, written before the first run: on two cores that torch may both use, *stored* adds 5 % to
*compute* and *in turn* 12 %; with torch on one thread, so that a core is free as it is beside a
GPU, *stored* adds less than 3 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import h5traces
from h5traces.extract import ExtractOptions, GenerationOptions, load_model, load_tokenizer
from h5traces.extract.extractor import Extractor
from h5traces.extract.planning import Planner
from h5traces.extract.questions import read_questions
from h5traces.extract.reports import ExtractionReport
from h5traces.extract.running import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.extract.planning import Job

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = EXAMPLES / "tiny-llama-pydocs"


def random_7b(device: str) -> Any:
    """A model of Llama-2-7B's shape, made on its device."""
    config = transformers.LlamaConfig(max_position_embeddings=4096, vocab_size=32000)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float16
        )
    return model.eval()


class Bench:
    """One model, one list of jobs, three ways."""

    def __init__(self, model: Any, tokenizer: Any, options: ExtractOptions, samples: int) -> None:
        self._options = options
        self._extractor = Extractor(model, tokenizer, options)
        planner = Planner(tokenizer, model.config, options)
        questions = read_questions(EXAMPLES / "questions.jsonl").questions[:samples]
        self._jobs = [planner.job(each) for each in questions]
        self._batches: Sequence[Sequence[Job]] = [
            self._jobs[start : start + options.batch_size]
            for start in range(0, len(self._jobs), options.batch_size)
        ]
        self.num_tokens = 0

    def compute(self, _folder: Path) -> dict[str, float]:
        """Throw the records away."""
        started = time.perf_counter()
        self.num_tokens = 0
        for batch in self._batches:
            self.num_tokens += sum(len(each.tokens) for each in self._extractor.run(batch))
        return {"seconds": time.perf_counter() - started}

    def stored(self, folder: Path) -> dict[str, float]:
        """As the command does it."""
        target = folder / "run.h5"
        started = time.perf_counter()
        writer = h5traces.create(target)
        Run(
            self._extractor,
            writer,
            self._jobs,
            self._options,
            ExtractionReport(str(target)),
        ).run()
        return {"seconds": time.perf_counter() - started}

    def in_turn(self, folder: Path) -> dict[str, float]:
        """Write between samples."""
        started, writing = time.perf_counter(), 0.0
        writer = h5traces.create(folder / "run.h5")
        for batch in self._batches:
            records = self._extractor.run(batch)
            before = time.perf_counter()
            for each in records:
                writer.append(each)
            writing += time.perf_counter() - before
        before = time.perf_counter()
        writer.close()
        writing += time.perf_counter() - before
        return {"seconds": time.perf_counter() - started, "writing": writing}


def cell(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description="What storing adds to the time of an extraction.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random-7b", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = (
        random_7b(arguments.device)
        if arguments.random_7b
        else load_model(str(TINY), device=arguments.device)
    )
    options = ExtractOptions(
        batch_size=arguments.batch_size, generation=GenerationOptions(max_new_tokens=64)
    )
    bench = Bench(model, load_tokenizer(str(TINY)), options, arguments.samples)
    bench.compute(Path())  # warms caches and thread pools
    ways = {"compute": bench.compute, "stored": bench.stored, "in turn": bench.in_turn}
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(arguments.rounds):
        found = {}
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                found[name] = way(Path(folder))
        rounds.append(found)
    print(
        f"{arguments.samples} samples, {bench.num_tokens} tokens, {torch.get_num_threads()} threads"
    )
    print("| way | seconds | tokens/s | added, % | writing, % |")
    print("|---|---|---|---|---|")
    for name in ways:
        seconds = [each[name]["seconds"] for each in rounds]
        base = [each["compute"]["seconds"] for each in rounds]
        added = [100 * (one / other - 1) for one, other in zip(seconds, base, strict=True)]
        writing = [
            100 * each[name].get("writing", 0.0) / each["compute"]["seconds"] for each in rounds
        ]
        print(
            f"| {name} | {cell(seconds, '.2f')} | "
            f"{cell([bench.num_tokens / each for each in seconds], '.0f')} | "
            f"{cell(added, '.1f') if name != 'compute' else ''} | "
            f"{cell(writing, '.1f') if name == 'in turn' else ''} |"
        )


if __name__ == "__main__":
    main()
