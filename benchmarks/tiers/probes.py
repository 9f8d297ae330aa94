"""Probes of single layers: do they read as much from restored states as from the original ones?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tiers.resampling import Ranking

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from tiers.capturing import Trace
    from tiers.coding import Coder
    from tiers.resampling import Bootstrap

# How tokenizers write a space, and a line break, in front of or inside a token.
_MARKS: Final = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
# The first token's state is the same in every text.
_FIRST: Final = 1

TASKS: Final = {
    "word": "the next token begins a word",
    "mark": "the next token is punctuation",
    "seen": "the next token has been in the text before",
}


class Tasks:
    """Labels of tokens, made from the tokens behind them, which the model has not seen there.

    Parameters
    ----------
    tokenizer
        Of the model.
    traces
        Texts.
    """

    def __init__(self, tokenizer: Any, traces: Sequence[Trace]) -> None:
        self.num_texts = len(traces)
        self.texts = np.concatenate(
            [np.full(len(each.tokens) - 1 - _FIRST, n) for n, each in enumerate(traces)]
        )
        labels: dict[str, list[bool]] = {name: [] for name in TASKS}
        for trace in traces:
            pieces = [
                piece.translate(_MARKS) for piece in tokenizer.convert_ids_to_tokens(trace.tokens)
            ]
            for here in range(_FIRST, len(pieces) - 1):
                piece = pieces[here + 1]
                labels["word"].append(piece[:1].isspace() and not piece.isspace())
                labels["mark"].append(
                    bool(piece.strip()) and not any(each.isalnum() for each in piece)
                )
                labels["seen"].append(trace.tokens[here + 1] in trace.tokens[: here + 1])
        self.labels = {name: np.array(each) for name, each in labels.items()}


def features(coder: Coder | None, traces: Sequence[Trace], layer: int) -> NDArray[np.float32]:
    """States of the tokens that have labels, ``(tokens, hidden)``; restored, where a coder is."""
    parts = []
    for trace in traces:
        states = trace.states[layer]
        values = states if coder is None else coder.restore(layer, states)
        parts.append(values[_FIRST:-1])
    return np.concatenate(parts).astype(np.float32)


def scores(
    train: NDArray[np.float32], labels: NDArray[np.bool_], test: NDArray[np.float32]
) -> NDArray[np.float64]:
    """What a logistic regression gives the tokens of the test."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-6, max_iter=2000))
    probe.fit(train.astype(np.float64), labels)
    found: NDArray[np.float64] = probe.decision_function(test.astype(np.float64))
    return found


def measure_probes(
    coders: dict[str, Coder],
    training: Tasks,
    training_traces: Sequence[Trace],
    testing: Tasks,
    testing_traces: Sequence[Trace],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Area under the curve on original states, and its change where all states are restored.

    Probes learn on restored states and are tested on restored states, as those will be who have an
    archive and nothing else.

    Returns
    -------
    dict
        ``auroc`` by task and layer, ``positives`` by task, and by encoding the changes: of every
        task and layer (``by_task``), of every layer (``by_layer``, the mean of the tasks), of the
        layer that loses most (``worst``), of the task and layer that do (``worst_of_all``), and
        the ``mean``.
    """
    num_layers = len(testing_traces[0].states)
    auroc: dict[str, list[float]] = {task: [] for task in TASKS}
    pairs: dict[str, dict[str, list[tuple[Ranking, Ranking]]]] = {
        name: {task: [] for task in TASKS} for name in coders
    }
    one = np.ones((1, testing.num_texts))
    for layer in range(num_layers):
        original = _rankings(None, training, training_traces, testing, testing_traces, layer)
        for task in TASKS:
            auroc[task].append(float(original[task].auroc(one)[0]))
        for name, coder in coders.items():
            found = _rankings(coder, training, training_traces, testing, testing_traces, layer)
            for task in TASKS:
                pairs[name][task].append((original[task], found[task]))
    return {
        "tasks": TASKS,
        "positives": {task: float(testing.labels[task].mean()) for task in TASKS},
        "auroc": auroc,
        "by_encoding": {name: _summary(each, bootstrap) for name, each in pairs.items()},
    }


def _rankings(
    coder: Coder | None,
    training: Tasks,
    training_traces: Sequence[Trace],
    testing: Tasks,
    testing_traces: Sequence[Trace],
    layer: int,
) -> dict[str, Ranking]:
    train = features(coder, training_traces, layer)
    test = features(coder, testing_traces, layer)
    return {
        task: Ranking(
            scores(train, training.labels[task], test),
            testing.labels[task],
            testing.texts,
            testing.num_texts,
        )
        for task in TASKS
    }


def _summary(
    pairs: dict[str, list[tuple[Ranking, Ranking]]], bootstrap: Bootstrap
) -> dict[str, Any]:
    by_task = {
        task: [bootstrap.auroc_change([pair]) for pair in of_task]
        for task, of_task in pairs.items()
    }
    by_layer = [bootstrap.auroc_change(list(of)) for of in zip(*pairs.values(), strict=True)]
    return {
        "by_task": by_task,
        "by_layer": by_layer,
        "worst": lowest({"layer": layer, **each} for layer, each in enumerate(by_layer)),
        "worst_of_all": lowest(
            {"task": task, "layer": layer, **each}
            for task, changes in by_task.items()
            for layer, each in enumerate(changes)
        ),
        "mean": bootstrap.auroc_change([pair for each in pairs.values() for pair in each]),
    }


def lowest(changes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The change that takes most."""
    return min(changes, key=lambda change: float(change["value"]))
