"""Questions to archives on a cluster of Ray: each task loads the model on its own GPU.

python examples/ray/extract.py MODEL questions.jsonl traces/
"""

import sys

import h5traces
import h5traces.ray
from h5traces.extract import DatasetChoice, ExtractOptions, GenerationOptions, ModelChoice


def main(model: str, questions: str, traces: str, num_gpus: float = 1) -> None:
    """Ask all questions, and check what came out."""
    reports = h5traces.ray.extract(
        ModelChoice(model_id=model),
        DatasetChoice(dataset=questions),
        traces,
        ExtractOptions(generation=GenerationOptions(max_new_tokens=16)),
        num_gpus=num_gpus,
    )
    print(sum(report.num_written for report in reports), "samples")
    found = h5traces.collect(traces)
    print("complete" if found.ok else found)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
