"""What a model has of every kind, and that it is taken right: passes over eleven tokens show it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from h5traces.archive.recomputing import attention_weights
from h5traces.errors import ExtractionError
from h5traces.extract.anatomy import check_eager, weights_of
from h5traces.extract.capture import CaptureOptions, Capturer, no_rule, no_weights, padded
from h5traces.extract.rules import variants
from h5traces.extract.sites import find_sites
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray
from h5traces.format.kinds import (
    KEYS,
    MODEL_KINDS,
    QUERIES,
    ROUTER_LOGITS,
    STATE_NORMS,
    TOKEN_KINDS,
    WEIGHT_KINDS,
)
from h5traces.format.text import and_more

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.extract.anatomy import Anatomy
    from h5traces.format.record import LayerArray

# A prime: nothing else in a small model is as long.
_CHECK_TOKENS: Final = tuple(range(11))
# Kernels of accelerators may round differently from run to run; wrong arrays differ far more.
_TOLERANCE: Final = 1e-2
# By which weights that eager attention rounds may differ from those of queries and keys.
_WEIGHT_TOLERANCES: Final = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Kinds that transformers returns, too.
_RETURNED: Final = (layout.HIDDEN_STATES, layout.ATTENTIONS, ROUTER_LOGITS)


def with_kinds(
    anatomy: Anatomy,
    kinds: Sequence[str],
    layers: Sequence[int],
    *,
    needs_rules: bool = False,
) -> Anatomy:
    """The anatomy with what is known of the kinds asked for.

    `needs_rules` says whether queries and keys must give the weights of every layer that has any.

    Raises
    ------
    ExtractionError
        None of the layers has a kind.
    """
    if set(kinds) & set(WEIGHT_KINDS):
        check_eager(anatomy.model)
        anatomy = with_weights(anatomy)
    plain = (layout.HIDDEN_STATES, *WEIGHT_KINDS, STATE_NORMS, *TOKEN_KINDS)
    if any(kind not in plain for kind in kinds):
        inputs = padded([_CHECK_TOKENS], 0, anatomy.device)
        anatomy = replace(anatomy, sites=find_sites(anatomy, anatomy.inputs(inputs)))
    for kind in kinds:
        having = anatomy.layers_with(kind)
        if kind in MODEL_KINDS and not set(having) & set(layers):
            raise ExtractionError(_no_kind(anatomy, kind, layers, having))
    if QUERIES in kinds and KEYS in kinds:
        anatomy = replace(anatomy, recomputed=_recomputed(anatomy))
        lacking = sorted(set(layers) & set(anatomy.layers_with(QUERIES)) - {*anatomy.recomputed})
        if needs_rules and lacking:
            raise ExtractionError(no_rule(anatomy, lacking))
    return anatomy


def _recomputed(anatomy: Anatomy) -> dict[int, int]:
    """Layers whose eager weights over eleven tokens follow from queries and keys, by variant."""
    model = anatomy.model
    before = model.config.get_text_config()._attn_implementation
    both = set(anatomy.layers_with(QUERIES)) & set(anatomy.layers_with(KEYS))
    options = CaptureOptions(
        layers=tuple(sorted(both)), kinds=(QUERIES, KEYS, layout.ATTENTIONS), dtype="auto"
    )
    try:
        if before != "eager":
            model.set_attn_implementation("eager")
        anatomy = replace(with_weights(anatomy), recomputed=dict.fromkeys(both, 0))
        (found,) = Capturer(anatomy, options).run([_CHECK_TOKENS])
    except ExtractionError:
        return {}
    finally:
        if before != "eager":
            model.set_attn_implementation(before)
    arrays = {kind: {each.name: each for each in found.arrays[kind]} for kind in options.kinds}
    tolerance = _WEIGHT_TOLERANCES.get(model.dtype, 1e-5)
    holding = {
        layer: _variant([each[layout.layer_name(layer)] for each in arrays.values()], tolerance)
        for layer in sorted(both & set(anatomy.layers_with(layout.ATTENTIONS)))
    }
    return {layer: variant for layer, variant in holding.items() if variant is not None}


def _variant(arrays: Sequence[LayerArray], tolerance: float) -> int | None:
    """By which variant of their rule queries and keys give the weights; all three of one layer."""
    rule = arrays[0].rule
    asked, known, expected = map(values_of, arrays)
    if rule is None or len(asked) % len(known) or asked.shape[1:] != known.shape[1:]:
        return None
    every = {"heads": np.arange(len(asked)), "rows": np.arange(asked.shape[1])}
    for number, each in enumerate(variants(rule)):
        found = attention_weights(asked, known, each, **every)
        if found.shape == expected.shape and np.abs(found - expected).max() <= tolerance:
            return number
    return None


def _no_kind(anatomy: Anatomy, kind: str, layers: Sequence[int], having: Sequence[int]) -> str:
    if having:
        return (
            f"{anatomy.model_class}: none of the layers {and_more(layers, 8)} has {kind}; this "
            f"model has it in layers {and_more(having, 8)}"
        )
    others = [each for each in MODEL_KINDS if anatomy.layers_with(each)]
    return (
        f"{anatomy.model_class} has no {kind}, or h5traces does not know where; it has "
        f"{', '.join(others)}"
    )


def with_weights(anatomy: Anatomy) -> Anatomy:
    """The anatomy without those attention modules that return no weights, such as linear ones.

    Raises
    ------
    ExtractionError
        No module returned weights, or one of a class of which others did.
    """
    returned: dict[int, bool] = {}
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for layer, module in enumerate(anatomy.attentions):
            if module is not None:

                def note(_module: Any, _args: Any, output: Any, layer: int = layer) -> None:
                    weights = weights_of(output, len(_CHECK_TOKENS))
                    returned[layer] = weights is not None

                hooks.callback(module.register_forward_hook(note).remove)
        inputs = padded([_CHECK_TOKENS], 0, anatomy.device)
        anatomy.decoder(**anatomy.inputs(inputs), use_cache=False)
    giving = {type(anatomy.attentions[layer]) for layer, found in returned.items() if found}
    if not giving:
        message = (
            f"{anatomy.model_class}: no block has attention weights; load the model with "
            "attn_implementation='eager', or extract hidden_states only"
        )
        raise ExtractionError(message)
    for layer, found in returned.items():
        if not found and type(anatomy.attentions[layer]) in giving:
            raise ExtractionError(no_weights(layout.layer_name(layer), anatomy.attentions[layer]))
    kept = tuple(
        module if returned.get(layer) else None for layer, module in enumerate(anatomy.attentions)
    )
    return replace(anatomy, attentions=kept)


def with_whole_weights(kinds: Sequence[str]) -> tuple[str, ...]:
    """Kinds with attention weights for what is made of them: if they are right, so is that."""
    found = (layout.ATTENTIONS if each in WEIGHT_KINDS else each for each in kinds)
    return tuple(dict.fromkeys(found))


def check_capture(model: Any, anatomy: Anatomy, kinds: tuple[str, ...]) -> float:
    """Compare the arrays of eleven tokens with those that transformers returns.

    Returns
    -------
    float
        The largest difference, relative to the largest value of an array; 0 if all are bit-equal.

    Raises
    ------
    ExtractionError
        An array is another, or transformers returns another number of them.
    """
    kinds = with_whole_weights(kinds)
    with torch.inference_mode():
        output = model(
            **anatomy.inputs(padded([_CHECK_TOKENS], 0, anatomy.device)),
            output_hidden_states=layout.HIDDEN_STATES in kinds,
            output_attentions=layout.ATTENTIONS in kinds,
            use_cache=False,
            **({"output_router_logits": True} if ROUTER_LOGITS in kinds else {}),
        )
    largest = 0.0
    for kind in (each for each in kinds if each in _RETURNED):
        # Some list None for blocks without attention, or matrices of another size.
        expected = [each for each in getattr(output, kind, None) or () if _is_whole(each)]
        problem = None
        for found in _ways(anatomy, kind):
            difference = _difference(kind, found, expected)
            if isinstance(difference, float):
                largest = max(largest, difference)
                break
            problem = problem or difference
        else:
            message = (
                f"{anatomy.model_class}: {problem}; h5traces does not know the structure of this "
                "model"
            )
            raise ExtractionError(message)
    return largest


def _is_whole(values: torch.Tensor | None) -> bool:
    """Whether hidden states, or attention weights, cover the tokens of the check."""
    return values is not None and values.shape[-2] == len(_CHECK_TOKENS)


def _ways(anatomy: Anatomy, kind: str) -> Iterator[list[LayerArray]]:
    """Arrays of a kind in the ways in which models of transformers list them.

    Most list the embedding and all states but the last block's, which the final norm replaces;
    Mamba and its kin list the states of all blocks, and then the final norm.
    """
    options = CaptureOptions(
        layers=tuple(range(anatomy.num_layers)), kinds=(kind,), embedding=True, dtype="auto"
    )
    (captured,) = Capturer(anatomy, options).run([_CHECK_TOKENS])
    arrays = captured.arrays.get(kind, [])
    yield arrays
    if kind == layout.HIDDEN_STATES:
        options = replace(options, embedding=False, last_state="block_output")
        (captured,) = Capturer(anatomy, options).run([_CHECK_TOKENS])
        yield [*captured.arrays[kind], arrays[-1]]


def _difference(
    kind: str, found: list[LayerArray], expected: Sequence[torch.Tensor]
) -> float | str:
    """The largest difference from the arrays of transformers; in words where it is too large."""
    if len(found) != len(expected):
        return f"transformers returns {len(expected)} {kind}, the hooks took {len(found)}"
    largest = 0.0
    for entry, tensor in zip(found, expected, strict=True):
        # Routers see all tokens of a batch in one row.
        one = tensor if kind == ROUTER_LOGITS and tensor.ndim == 2 else tensor[0]
        difference = relative_difference(values_of(entry), one.float().cpu().numpy())
        if difference > _TOLERANCE:
            return f"{kind}/{entry.name} is not what transformers returns"
        largest = max(largest, difference)
    return largest


def values_of(entry: LayerArray) -> NDArray[Any]:
    """The numbers of a captured array."""
    assert isinstance(entry.array, TypedArray)
    return entry.array.to_numpy()


def relative_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, relative to the largest value; 0 where all bits are equal.

    Infinite where shapes differ, or NaN or infinite values are in other places.
    """
    if found.shape != expected.shape:
        return math.inf
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    largest = np.abs(b[finite]).max(initial=0.0)
    difference = np.abs(a[finite] - b[finite]).max(initial=0.0)
    return float(difference / largest) if difference else 0.0
