"""Restored states put back into the model: what becomes of its predictions."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from downstream.capturing import Trace
    from downstream.coding import Coder
    from downstream.resampling import Bootstrap
    from h5traces.extract.models import Anatomy

    # Replaces the states of one text behind one layer.
    Change = Callable[[NDArray[np.float16]], NDArray[np.float16]]

EVERY_LAYER: Final = "every layer at once"
MEAN: Final = "mean of single layers"
ROUNDING: Final = "float16 instead of float32"
_BATCH: Final = 16


@dataclass(frozen=True, slots=True)
class Patched:
    """How a model is run with states put in.

    Attributes
    ----------
    model, anatomy
        The causal model, and its blocks.
    layers
        Whose states are looked at, in the model's own count.
    """

    model: Any
    anatomy: Anatomy
    layers: list[int]

    @torch.inference_mode()
    def logits(self, batch: Sequence[Trace], changes: dict[int, list[Change]]) -> torch.Tensor:
        """Logits of texts with states replaced: float64 ``(texts, tokens, vocabulary)``.

        Parameters
        ----------
        batch
            Texts, padded at their end, where a causal model does not look.
        changes
            By layer, for each text, what to call with its float16 states.
        """
        device = self.model.get_input_embeddings().weight.device
        longest = max(len(each.tokens) for each in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.int64, device=device)
        for row, each in enumerate(batch):
            ids[row, : len(each.tokens)] = torch.tensor(each.tokens)
        with contextlib.ExitStack() as hooks:
            for layer, of_texts in changes.items():
                hooks.callback(self._hook(layer, batch, of_texts).remove)
            found = self.model(input_ids=ids, use_cache=False).logits
        return found.to(torch.float64)

    def _hook(self, layer: int, batch: Sequence[Trace], of_texts: list[Change]) -> Any:
        def replaced(states: torch.Tensor) -> torch.Tensor:
            states = states.clone()
            for row, (trace, change) in enumerate(zip(batch, of_texts, strict=True)):
                part = states[row, : len(trace.tokens)]
                values = change(part.to(torch.float16).cpu().numpy())
                part.copy_(torch.from_numpy(np.ascontiguousarray(values)))
            return states

        def behind_block(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return replaced(output[0]), *output[1:]
            return replaced(output)

        def before_head(_module: Any, args: Any) -> Any:
            return replaced(args[0]), *args[1:]

        # The last state of a trace is behind the final norm, in front of the head.
        if layer == self.anatomy.num_layers - 1:
            return self.model.get_output_embeddings().register_forward_pre_hook(before_head)
        return self.anatomy.blocks[layer].register_forward_hook(behind_block)


def batches(traces: Sequence[Trace]) -> Iterator[list[int]]:
    """Indices of texts of similar length."""
    order = sorted(range(len(traces)), key=lambda index: len(traces[index].tokens))
    for start in range(0, len(order), _BATCH):
        yield order[start : start + _BATCH]


def losses(logits: torch.Tensor, trace: Trace, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of every token but the first, and the loss of that which came."""
    length = len(trace.tokens)
    log_p = logits[row, : length - 1].log_softmax(-1)
    targets = torch.tensor(trace.tokens[1:], device=log_p.device).unsqueeze(1)
    return log_p, -log_p.gather(1, targets).squeeze(1)


class Effects:
    """Change of loss and KL of every text, summed over its tokens."""

    def __init__(self, num_texts: int) -> None:
        self.loss, self.kl = np.zeros(num_texts), np.zeros(num_texts)

    def add(self, text: int, trace: Trace, row: int, *, of: Any, against: Any) -> None:
        """Compare two runs of one text."""
        log_p, loss = losses(against, trace, row)
        log_q, changed = losses(of, trace, row)
        self.loss[text] = float((changed - loss).sum())
        self.kl[text] = float((log_p.exp() * (log_p - log_q)).sum())

    def summary(self, bootstrap: Bootstrap, tokens: NDArray[Any]) -> dict[str, Any]:
        """Means over tokens, with intervals."""
        return {
            "loss_change": bootstrap.per_token(self.loss, tokens),
            "kl": bootstrap.per_token(self.kl, tokens),
        }


def mean_of(places: Sequence[Effects]) -> Effects:
    """The mean of several effects, text by text."""
    found = Effects(len(places[0].loss))
    found.loss = np.mean([each.loss for each in places], axis=0)
    found.kl = np.mean([each.kl for each in places], axis=0)
    return found


def predicted_tokens(traces: Sequence[Trace]) -> NDArray[np.int64]:
    """Tokens of each text that are predicted."""
    return np.array([len(each.tokens) - 1 for each in traces])


def measure_patching(
    patched: Patched, coders: dict[str, Coder], traces: Sequence[Trace], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Change of next-token loss (nats) and KL to the same run with float16 states put in.

    Each layer is patched alone, with what an archive gives back of it; then every layer at once,
    where each block computes from restored states and its own output is stored and restored again.

    Returns
    -------
    dict
        ``loss``, nats per token without a patch, ``rounding``, by place the changes that float16
        makes of the model's own float32, and ``by_encoding`` and place those of the encodings.
    """
    places = [f"layer {layer}" for layer in patched.layers] + [EVERY_LAYER]
    effects = {
        name: {place: Effects(len(traces)) for place in places} for name in (ROUNDING, *coders)
    }
    loss = np.zeros(len(traces))
    for indices in batches(traces):
        batch = [traces[index] for index in indices]
        plain = patched.logits(batch, {})
        for row, index in enumerate(indices):
            loss[index] = float(losses(plain, traces[index], row)[1].sum())
        for number, place in enumerate(places):
            reference = patched.logits(batch, _changes(patched, batch, number, None))
            for row, index in enumerate(indices):
                effects[ROUNDING][place].add(index, batch[row], row, of=reference, against=plain)
            for name, coder in coders.items():
                found = patched.logits(batch, _changes(patched, batch, number, coder))
                for row, index in enumerate(indices):
                    effects[name][place].add(index, batch[row], row, of=found, against=reference)
    tokens = predicted_tokens(traces)
    for of_places in effects.values():
        of_places[MEAN] = mean_of([of_places[place] for place in places[:-1]])
    changes = {
        name: {place: each.summary(bootstrap, tokens) for place, each in of_places.items()}
        for name, of_places in effects.items()
    }
    rounding = changes.pop(ROUNDING)
    return {
        "loss": bootstrap.per_token(loss, tokens),
        "rounding": rounding,
        "by_encoding": changes,
    }


def _changes(
    patched: Patched, batch: Sequence[Trace], place: int, coder: Coder | None
) -> dict[int, list[Change]]:
    """By layer of the model and text, the function that replaces its states.

    Parameters
    ----------
    patched
        The model.
    batch
        Texts.
    place
        Position of a layer among those that are looked at; their number means every layer.
    coder
        The encoding; None leaves values as they are in float16.
    """
    if place < len(patched.layers):
        return {patched.layers[place]: [_stored(each, place, coder) for each in batch]}
    return {
        layer: [_passing(position, coder)] * len(batch)
        for position, layer in enumerate(patched.layers)
    }


def _stored(trace: Trace, position: int, coder: Coder | None) -> Change:
    """What an archive of the trace gives back, whatever the model computes."""
    states = trace.states[position]
    values = states if coder is None else coder.restore(position, states)
    return lambda _states: values


def _passing(position: int, coder: Coder | None) -> Change:
    """What the model computes, after storing and reading."""
    if coder is None:
        return lambda states: states
    return lambda states: coder.restore(position, states)
