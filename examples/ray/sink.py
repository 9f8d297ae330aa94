"""States of a model as a step of Ray Data, which flow into archives.

    python examples/ray/sink.py MODEL questions.jsonl traces/

For pipelines that exist; `examples/ray/extract.py` asks questions with batches, tiers and resuming.
"""

import sys
from typing import Any

import ray

import h5traces
import h5traces.ray


class Model:
    """An actor of Ray: loads a model once, and traces rows."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the hidden states of its question, ``(layer, token, hidden)``."""
        import torch

        inputs = self.tokenizer(row["question"], return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            states = self.model(**inputs, output_hidden_states=True).hidden_states
        return {**row, "hidden_states": torch.cat(states).half().cpu().numpy()}


def main(model: str, questions: str, traces: str, num_gpus: float = 1) -> None:
    """Trace all rows."""
    rows = ray.data.read_json(questions, lines=True)
    traced = rows.map(
        Model, fn_constructor_args=(model,), num_gpus=num_gpus, compute=ray.data.ActorPoolStrategy()
    )
    reading = h5traces.ReadingOptions(first_state="embedding")
    sink = h5traces.ray.ArchiveSink(traces, model_id=model, reading=reading)
    traced.write_datasink(sink)
    print(len(sink.archives), "archives,", len(h5traces.open(traces)), "samples")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
