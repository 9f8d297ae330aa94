"""What storing adds to the time of an extraction.

Run ``python benchmarks/extraction.py`` (some minutes); it prints a markdown table. In every round
the same samples are extracted in each way, one way after the other, so ratios within a round hold
on a noisy machine and seconds do not; medians, with the range of the rounds in brackets.

*compute* generates answers, runs the clean forward pass, copies and casts, and throws the records
away. *bare* is a script with transformers alone: it generates, runs the forward pass with
``output_hidden_states`` and ``output_attentions``, and casts and copies all arrays; batches are cut
in the order of the questions. *stored* is ``h5traces extract`` as it is: another process writes
every sample durably, and packs shards, while the next ones are computed. *threaded* does so in a
thread of the same process, *in turn* in the same thread, between samples. *added* is the time
beyond *compute*, as a share of *compute*, until every sample is durable. *tail* is the part of it
that comes once per run, after the last sample is computed; *start* and *close* come once as well,
and are in no other column: starting the process, and packing the last shard. *here* is the
processor time of the process that computes, beyond that of *compute*: what storing takes from it,
however busy other cores are.

The model is the trained one of this repository, with its 40 questions several times over and
answers of up to 64 tokens. ``--random 7b`` takes one of Llama-2-7B's shape with random weights
instead, for machines with a GPU, and ``--random 1b`` one of Llama-3.2-1B's (16 layers, hidden size
2048, 32 heads, 8 of them for keys) in bfloat16; random weights never end an answer, so all have
``--max-new-tokens``.

Prediction, written before the first run: *in turn* adds 60 %, since writing a sample of this model
takes two thirds of the processor time of computing it; *stored* adds less than 3 % where a core is
free (``--threads 1`` on two), and 20 % where torch uses all of them.

Outcome: *in turn* added 99 % on two busy cores (``--threads 1 --rounds 3 --repeats 3``). *stored*
adds 2 % to a model of a billion parameters and 4 to 8 % to the trained one: ``docs/extraction.md``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from suite.folder import made_folder

import h5traces
from h5traces.extract import ExtractOptions, GenerationOptions, load_model, load_tokenizer
from h5traces.extract.capture import padded
from h5traces.extract.extractor import Extractor
from h5traces.extract.generation import Planner, batches
from h5traces.extract.questions import read_questions
from h5traces.extract.running import WriterThread
from h5traces.writing.process_writer import ProcessWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = EXAMPLES / "tiny-llama-pydocs"
SHARD_SAMPLES = 40
SECONDS = ("no core, s", "tail, s", "start, s", "close, s")


SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"dtype": torch.float16},
    "1b": {
        "dtype": torch.bfloat16,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def random_model(shape: str, device: str) -> Any:
    """A Llama of this shape, made on its device."""
    sizes = dict(SHAPES[shape])
    dtype = sizes.pop("dtype")
    config = transformers.LlamaConfig(max_position_embeddings=4096, vocab_size=32000, **sizes)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=dtype
        )
    return model.eval()


class Bench:
    """One model, one list of jobs, all ways."""

    def __init__(self, model: Any, tokenizer: Any, options: ExtractOptions, samples: int) -> None:
        self._extractor = Extractor(model, tokenizer, options)
        planner = Planner(tokenizer, model.config, options)
        known = read_questions(EXAMPLES / "questions.jsonl").questions
        questions = [replace(known[n % len(known)], sample_id=f"q{n}") for n in range(samples)]
        self._jobs = [job for each in questions for _, job in planner.jobs(each)]
        self._batches = list(batches(self._jobs, options.batch_size))
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self.num_samples, self.num_tokens = len(self._jobs), 0
        self.start_of_writer = 0.0  # processor time

    def bare(self, _folder: Path) -> dict[str, float]:
        """What a script with transformers alone does: generate, one forward pass, copy all."""
        started, size = time.perf_counter(), self._options.batch_size
        pad, generation = self._tokenizer.eos_token_id, self._options.generation
        self.bare_tokens = 0
        for start in range(0, len(self._jobs), size):
            inputs = padded(
                [each.prompt for each in self._jobs[start : start + size]], pad, self._model.device
            )
            inputs.pop("position_ids", None)
            with torch.inference_mode():
                ids = self._model.generate(
                    **inputs,
                    max_new_tokens=generation.max_new_tokens,
                    num_beams=generation.num_beams,
                    do_sample=False,
                    pad_token_id=pad,
                )
                mask = (ids != pad).long()
                mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
                output = self._model(
                    ids, attention_mask=mask, output_hidden_states=True, output_attentions=True
                )
            arrays = [*output.hidden_states, *output.attentions]
            _ = [each.half().cpu().numpy() for each in arrays]
            self.bare_tokens += int(mask.sum())
        return {"seconds": time.perf_counter() - started}

    def compute(self, _folder: Path) -> dict[str, float]:
        """Throw the records away."""
        started = time.perf_counter()
        self.num_tokens = 0
        for batch in self._batches:
            self.num_tokens += sum(len(each.tokens) for each in self._extractor.run(batch))
        return {"seconds": time.perf_counter() - started}

    def stored(self, folder: Path, make: Any = ProcessWriter) -> dict[str, float]:
        """As the command does it."""
        before, spent = time.perf_counter(), spent_by_children()
        writer = make(f"{folder}/run/", target=h5traces.TargetOptions(shard_samples=SHARD_SAMPLES))
        started = time.perf_counter()
        thread = WriterThread(writer, lambda _record: None)
        for batch in self._batches:
            for each in self._extractor.run(batch):
                thread.put(each)
            thread.flush()
        computed = time.perf_counter()
        thread.close()
        ended = time.perf_counter()
        writer.close()
        closed = time.perf_counter()
        spent = spent_by_children() - spent - self.start_of_writer
        return {
            "seconds": computed - started,
            "tail": ended - computed,
            "writer": 1000 * max(0, spent) / self.num_samples,
            "start": started - before,
            "close": closed - ended,
        }

    def measure_start(self, folder: Path) -> None:
        """Note what a writer takes that writes nothing."""
        before = spent_by_children()
        ProcessWriter(f"{folder}/run/", target=h5traces.TargetOptions(shard_samples=1)).close()
        self.start_of_writer = spent_by_children() - before

    def threaded(self, folder: Path) -> dict[str, float]:
        """In a thread of the process that computes."""
        return self.stored(folder, h5traces.create)

    def in_turn(self, folder: Path) -> dict[str, float]:
        """Write between samples."""
        started = time.perf_counter()
        writer = h5traces.create(
            f"{folder}/run/", target=h5traces.TargetOptions(shard_samples=SHARD_SAMPLES)
        )
        for batch in self._batches:
            for each in self._extractor.run(batch):
                writer.append(each)
        ended = time.perf_counter()
        writer.close()
        return {"seconds": ended - started, "close": time.perf_counter() - ended}


def spent_by_children() -> float:
    """Processor time of the processes that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def no_core() -> float:
    """How long this thread could have run but had no core; 0 where the system does not say."""
    path = Path("/proc/thread-self/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


def cell(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description="What storing adds to the time of an extraction.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4, help="of the 40 questions")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-beams", type=int, default=1, help="the old pipeline had 5")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", choices=sorted(SHAPES), help="a larger model")
    parser.add_argument("--samples", type=int, help="instead of --repeats")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--ways", nargs="+", help="of the table, beside compute [default: all]")
    parser.add_argument("--folder", type=made_folder, help="on the disk to measure")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    model = (
        random_model(arguments.random, arguments.device)
        if arguments.random
        else load_model(str(TINY), device=arguments.device)
    )
    options = ExtractOptions(
        batch_size=arguments.batch_size,
        generation=GenerationOptions(
            max_new_tokens=arguments.max_new_tokens, num_beams=arguments.num_beams
        ),
    )
    samples = arguments.samples or 40 * arguments.repeats
    bench = Bench(model, load_tokenizer(str(TINY)), options, samples)
    bench.compute(Path())  # warms caches and thread pools
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench.measure_start(Path(folder))
    ways = {
        "bare": bench.bare,
        "compute": bench.compute,
        "stored": bench.stored,
        "threaded": bench.threaded,
        "in turn": bench.in_turn,
    }
    chosen = {"compute", *(arguments.ways or ways)}
    ways = {name: way for name, way in ways.items() if name in chosen}
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(arguments.rounds):
        found = {}
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                before, waited = time.process_time(), no_core()
                found[name] = way(Path(folder))
                found[name]["here"] = time.process_time() - before
                found[name]["no core"] = no_core() - waited
        rounds.append(found)
    num_tokens = dict.fromkeys(ways, bench.num_tokens)
    if "bare" in ways:
        num_tokens["bare"] = bench.bare_tokens
    threads = torch.get_num_threads()
    print(f"{bench.num_samples} samples, {bench.num_tokens} tokens, torch on {threads} threads\n")
    shown = ("way", "seconds", "tokens/s", "added, %", "here, %", *SECONDS, "writer, ms")
    print(f"| {' | '.join(shown)} |\n{'|---' * len(shown)}|")
    for name in ways:
        print(row(name, rounds, num_tokens))


def row(name: str, rounds: list[dict[str, dict[str, float]]], num_tokens: dict[str, int]) -> str:
    found = [each[name] for each in rounds]
    added = [100 * (each[name]["seconds"] / each["compute"]["seconds"] - 1) for each in rounds]
    here = [100 * (each[name]["here"] / each["compute"]["here"] - 1) for each in rounds]
    cells = [
        name,
        cell([each["seconds"] for each in found], ".2f"),
        cell([num_tokens[name] / each["seconds"] for each in found], ".0f"),
        *(cell(each, ".1f") if name != "compute" else "" for each in (added, here)),
        *(
            cell([each[key.split(",")[0]] for each in found], form)
            if key.split(",")[0] in found[0]
            else ""
            for key, form in (*((each, ".2f") for each in SECONDS), ("writer", ".1f"))
        ),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
