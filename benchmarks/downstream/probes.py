"""Probes of single layers: do they read as much from restored states as from the original ones?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from downstream.resampling import Ranking, change

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from downstream.capturing import Trace
    from downstream.coding import Coder
    from downstream.resampling import Bootstrap

    # By task and then layer, what `Bootstrap.auroc` gives.
    Areas = dict[str, list[NDArray[np.float64]]]

# How tokenizers write a space, and a line break, in front of or inside a token.
_MARKS: Final = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
# The first token's state is the same in every text.
_FIRST: Final = 1

TASKS: Final = {
    "word": "the next token begins a word",
    "mark": "the next token is punctuation",
    "seen": "the next token has been in the text before",
}


class Labelled:
    """Texts with labels of tokens, made from the tokens behind them, which a state has not seen.

    Parameters
    ----------
    tokenizer
        Of the model.
    traces
        Of the texts.
    """

    def __init__(self, tokenizer: Any, traces: Sequence[Trace]) -> None:
        self.traces = traces
        self.texts = np.concatenate(
            [np.full(len(each.tokens) - 1 - _FIRST, n) for n, each in enumerate(traces)]
        )
        labels: dict[str, list[bool]] = {name: [] for name in TASKS}
        for trace in traces:
            tokens = trace.tokens
            pieces = [each.translate(_MARKS) for each in tokenizer.convert_ids_to_tokens(tokens)]
            for here in range(_FIRST, len(pieces) - 1):
                piece = pieces[here + 1]
                is_mark = bool(piece.strip()) and not any(each.isalnum() for each in piece)
                labels["word"].append(piece[:1].isspace() and not piece.isspace())
                labels["mark"].append(is_mark)
                labels["seen"].append(tokens[here + 1] in tokens[: here + 1])
        self.labels = {name: np.array(each) for name, each in labels.items()}

    def states(self, coder: Coder | None, layer: int) -> NDArray[np.float64]:
        """Of the tokens that have labels, ``(tokens, hidden)``; restored, where a coder is."""
        parts = []
        for trace in self.traces:
            states = trace.states[layer]
            values = states if coder is None else coder.restore(layer, states)
            parts.append(values[_FIRST:-1])
        return np.concatenate(parts).astype(np.float64)


def scores(
    train: NDArray[np.float64], labels: NDArray[np.bool_], test: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What a logistic regression gives the tokens of the test."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-6, max_iter=2000))
    probe.fit(train, labels)
    found: NDArray[np.float64] = probe.decision_function(test)
    return found


def measure_probes(
    coders: dict[str, Coder], training: Labelled, testing: Labelled, bootstrap: Bootstrap
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
    before: Areas = {task: [] for task in TASKS}
    changes: dict[str, Areas] = {name: {task: [] for task in TASKS} for name in coders}
    for layer in range(len(testing.traces[0].states)):
        original = _areas(None, layer, training, testing, bootstrap)
        for task in TASKS:
            before[task].append(original[task])
        for name, coder in coders.items():
            found = _areas(coder, layer, training, testing, bootstrap)
            for task in TASKS:
                changes[name][task].append(found[task] - original[task])
    return {
        "tasks": TASKS,
        "positives": {task: float(testing.labels[task].mean()) for task in TASKS},
        "auroc": {task: [float(each[0]) for each in areas] for task, areas in before.items()},
        "by_encoding": {name: _summary(each) for name, each in changes.items()},
    }


def _areas(
    coder: Coder | None, layer: int, training: Labelled, testing: Labelled, bootstrap: Bootstrap
) -> dict[str, NDArray[np.float64]]:
    """By task, what `Bootstrap.auroc` gives of a probe."""
    train, test = training.states(coder, layer), testing.states(coder, layer)
    found = {}
    for task in TASKS:
        given = scores(train, training.labels[task], test)
        ranking = Ranking(given, testing.labels[task], testing.texts, len(testing.traces))
        found[task] = bootstrap.auroc(ranking)
    return found


def _summary(changes: Areas) -> dict[str, Any]:
    by_task = {task: [change([each]) for each in areas] for task, areas in changes.items()}
    by_layer = [change(areas) for areas in zip(*changes.values(), strict=True)]
    return {
        "by_task": by_task,
        "by_layer": by_layer,
        "worst": lowest({"layer": layer, **each} for layer, each in enumerate(by_layer)),
        "worst_of_all": lowest(
            {"task": task, "layer": layer, **each}
            for task, of_task in by_task.items()
            for layer, each in enumerate(of_task)
        ),
        "mean": change([each for areas in changes.values() for each in areas]),
    }


def lowest(changes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The change that takes most."""
    return min(changes, key=lambda each: float(each["value"]))
