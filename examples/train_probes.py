#!/usr/bin/env python3
"""Train probes and a small GNN on every layer of the shipped model, from archives and from pickles.

    pip install '.[graph,extract,bench]'
    python examples/train_probes.py out/probes

The task: does a question ask about a method of a type ("What does str.lower do?") or about a
function of a module ("What does math.sqrt do?")? Python itself has the labels. (Whether the shipped
model answers correctly is not a task: it never does.)

A probe is a logistic regression on the last token's state in one layer. The GNN sees the attention
graph of one layer. Both run twice, with h5traces' datasets on archives and with the old class on
pickles, and must give the same numbers to the last digit. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib
import inspect
import json
import pickle
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as loss_of
from torch.utils.data import DataLoader, Subset
from torch_geometric.loader import DataLoader as GraphLoader
from torch_geometric.nn import GraphConv, global_mean_pool

import h5traces
from h5traces.graph import TraceGraphDataset
from h5traces.torch_data import TraceDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from legacy_graphs import LegacyTraceGraphDataset, unpickle  # noqa: E402  # the old class

SEED = 0
TYPES = (str, bytes, list, dict, set, int, float, frozenset, tuple, bytearray, memoryview)
MODULES = "math json os shutil heapq random statistics textwrap itertools functools operator cmath"
# More files than the six that the old class keeps, as real runs have.
FILE_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained and tested.

    Attributes
    ----------
    labels
        By question id.
    train, test
        Indices of samples.
    epochs
        Of the GNN.
    """

    labels: dict[str, int]
    train: list[int]
    test: list[int]
    epochs: int


def make_questions(num_questions: int) -> list[dict[str, Any]]:
    """Equally many questions about methods and about functions, in random order."""
    methods = [
        f"{kind.__name__}.{name}"
        for kind in TYPES
        for name, value in inspect.getmembers(kind)
        if name[0] != "_" and callable(value)
    ]
    functions = [
        f"{module}.{name}"
        for module in MODULES.split()
        for name, value in inspect.getmembers(importlib.import_module(module))
        if name[0] != "_" and inspect.isroutine(value) and name.islower()
    ]
    chosen = random.Random(SEED)
    half = num_questions // 2
    named = [(name, 1) for name in chosen.sample(methods, half)]
    named += [(name, 0) for name in chosen.sample(functions, half)]
    chosen.shuffle(named)
    return [
        {"question_id": f"q_{number:04d}", "question": f"What does {name} do?", "label": label}
        for number, (name, label) in enumerate(named)
    ]


def make_traces(folder: Path, questions: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Traces of the shipped model, as the old pipeline's pickles and as archives."""
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools" / "make_example_batch.py")]
    command += ["--model", str(ROOT / "examples" / "tiny-llama-pydocs")]
    command += ["--questions", str(folder / "questions.jsonl")]
    command += ["--num-samples", str(len(questions)), "--max-new-tokens", "12"]
    command += ["-o", str(folder / "all.pkl.gz")]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    samples = h5traces.load(folder / "all.pkl.gz")
    pickles, archives = folder / "pickles", folder / "archives"
    pickles.mkdir()
    archives.mkdir()
    for start in range(0, len(samples), FILE_SAMPLES):
        name = f"tiny_pydocs_batch_{start // FILE_SAMPLES:04d}.pkl.gz"
        with gzip.open(pickles / name, "wb", compresslevel=6) as file:
            pickle.dump(samples[start : start + FILE_SAMPLES], file, protocol=4)
    report = h5traces.convert(pickles, f"{archives}/")
    if not report.ok:
        raise SystemExit(str([each.error for each in report.files if each.error]))
    return pickles, archives


def read_labels(folder: Path, questions: list[dict[str, Any]]) -> dict[str, int]:
    """Labels from a CSV, as in real runs."""
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["question_id", "label"])
        rows.writerows((question["question_id"], question["label"]) for question in questions)
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        return {row["question_id"]: int(row["label"]) for row in csv.DictReader(file)}


# --- the two ways to read -------------------------------------------------------------------------


def states_from_archives(archives: Path, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Last-token states ``(samples, layers, hidden)`` and labels."""
    dataset = TraceDataset(archives, tokens="last", dtype=torch.float32, labels=task.labels)
    batches = list(DataLoader(dataset, batch_size=32))
    states = torch.cat([batch["hidden_states"] for batch in batches])
    return states, torch.cat([batch["label"] for batch in batches])


def states_from_pickles(pickles: Path, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from whole pickles."""
    traces = [each for path in sorted(pickles.iterdir()) for each in unpickle(str(path))]
    states = [np.stack([layer[-1] for layer in each["hidden_states"]]) for each in traces]
    labels = [task.labels[each["question_id"]] for each in traces]
    return torch.from_numpy(np.stack(states)).float(), torch.tensor(labels)


# --- what is trained ------------------------------------------------------------------------------


def probe(states: torch.Tensor, labels: torch.Tensor, task: Task) -> float:
    """Test accuracy of a logistic regression on the states of one layer, ``(samples, hidden)``."""
    train, test = torch.tensor(task.train), torch.tensor(task.test)
    centre, spread = states[train].mean(0), states[train].std(0) + 1e-6
    inputs, wanted = (states - centre) / spread, labels.float()
    torch.manual_seed(SEED)
    model = nn.Linear(states.shape[1], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(model(inputs[train])[:, 0], wanted[train]).backward()
        optimizer.step()
    found = model(inputs[test])[:, 0] > 0
    return float((found == (wanted[test] > 0)).float().mean())


class SmallGNN(nn.Module):
    """Two graph convolutions weighted by attention, a mean over tokens, one output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = GraphConv(width, 32), GraphConv(32, 32)
        self.last = nn.Linear(32, 1)

    def forward(self, graph: Any) -> torch.Tensor:
        """One logit per graph of the batch."""
        x = graph.x / graph.x.norm(dim=1, keepdim=True)
        for convolution in (self.first, self.second):
            x = convolution(x, graph.edge_index, graph.edge_attr[:, 0]).relu()
        return self.last(global_mean_pool(x, graph.batch))[:, 0]


def train_gnn(graphs: Any, layer: int, num_layers: int, task: Task) -> float:
    """Test accuracy of a GNN on the graphs of one layer."""
    parts = [[i * num_layers + layer for i in half] for half in (task.train, task.test)]
    order = torch.Generator().manual_seed(SEED)
    train = GraphLoader(Subset(graphs, parts[0]), batch_size=16, shuffle=True, generator=order)
    torch.manual_seed(SEED)
    model = SmallGNN(graphs[0].x.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(task.epochs):
        for batch in train:
            optimizer.zero_grad()
            loss_of(model(batch), _labels_of(batch, task)).backward()
            optimizer.step()
    model.eval()
    right = [
        (model(batch) > 0) == (_labels_of(batch, task) > 0)
        for batch in GraphLoader(Subset(graphs, parts[1]), batch_size=32)
    ]
    return float(torch.cat(right).float().mean())


def _labels_of(batch: Any, task: Task) -> torch.Tensor:
    return torch.tensor([float(task.labels[each]) for each in batch.question_id])


def run(
    states: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    graphs: Callable[[], Any],
    task: Task,
) -> dict[str, Any]:
    """Accuracies of all layers, and seconds, of one way to read."""
    start = time.perf_counter()
    features, labels = states()
    num_layers = features.shape[1]
    probes = [probe(features[:, layer], labels, task) for layer in range(num_layers)]
    middle = time.perf_counter()
    dataset = graphs()
    gnns = [train_gnn(dataset, layer, num_layers, task) for layer in range(num_layers)]
    end = time.perf_counter()
    return {"probe": probes, "gnn": gnns, "seconds": [middle - start, end - middle]}


def plot(results: dict[str, Any], majority: float, path: Path) -> None:
    """Accuracy by layer."""
    import matplotlib as mpl

    mpl.use("Agg")
    titles = {"probe": "probe of the last token", "gnn": "GNN on attention graphs"}
    scores = {title: results["archives"][name] for name, title in titles.items()}
    axes = h5traces.plotting.scores_by_layer(scores, ylabel="test accuracy")
    axes.axhline(majority, color="grey", linestyle=":", label="always the same answer")
    axes.set(ylim=(0.4, 1.02), title="method of a type, or function of a module?")
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where traces, results and the plot go")
    parser.add_argument("--num-questions", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=6, help="of the GNN (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Make traces, train twice, compare, plot."""
    options = parse(argv)
    torch.set_num_threads(1)  # sums in one order, so that numbers repeat to the last digit
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        message = f"{options.folder} is not empty: name a new folder, or delete that one"
        raise SystemExit(message)
    questions = make_questions(options.num_questions)
    start = time.perf_counter()
    pickles, archives = make_traces(options.folder, questions)
    print(f"traces of {len(questions)} questions: {time.perf_counter() - start:.1f} s")
    split = random.Random(SEED).sample(range(len(questions)), len(questions))
    quarter = len(questions) // 4
    labels = read_labels(options.folder, questions)
    task = Task(labels, sorted(split[quarter:]), sorted(split[:quarter]), options.epochs)
    results = {
        "archives": run(
            lambda: states_from_archives(archives, task),
            lambda: TraceGraphDataset(archives / "*.h5"),
            task,
        ),
        "pickles": run(
            lambda: states_from_pickles(pickles, task),
            lambda: LegacyTraceGraphDataset(str(pickles / "*.pkl.gz")),
            task,
        ),
    }
    tested = [questions[index]["label"] for index in task.test]
    majority = max(sum(tested), len(tested) - sum(tested)) / len(tested)
    print(f"\n{len(tested)} test questions; always the same answer: {majority:.3f}")
    print("layer   probe: archives  pickles     GNN: archives  pickles")
    for layer, row in enumerate(
        zip(*(results[way][what] for what in ("probe", "gnn") for way in results), strict=True)
    ):
        print("{:5}   {:15.3f}  {:7.3f}   {:15.3f}  {:7.3f}".format(layer, *row))
    for way, found in results.items():
        print(f"{way}: probes {found['seconds'][0]:.1f} s, GNNs {found['seconds'][1]:.1f} s")
    plot(results, majority, options.folder / "accuracy_by_layer.png")
    text = json.dumps({**results, "majority": majority}, indent=1)
    (options.folder / "results.json").write_text(text + "\n", encoding="utf-8")
    print(f"plot: {options.folder / 'accuracy_by_layer.png'}")
    same = all(results["archives"][what] == results["pickles"][what] for what in ("probe", "gnn"))
    if not same:
        message = "archives and pickles gave different numbers"
        raise SystemExit(message)
    print("archives and pickles gave the same numbers")


if __name__ == "__main__":
    main()
