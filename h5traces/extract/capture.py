"""One clean forward pass; hooks keep the arrays that were asked for and nothing else."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # as torch's own documents name it

from h5traces.archive.torch_values import from_tensor, to_tensor
from h5traces.errors import ExtractionError
from h5traces.extract.anatomy import states_in, states_of, weights_of
from h5traces.extract.options import DEFAULT_KINDS, LastState
from h5traces.extract.rules import rule_of, variants
from h5traces.extract.sites import CALL_SIDES, attention_calls, first_tensor
from h5traces.format import layout
from h5traces.format.dtypes import CastCounts, TypedArray, compiled_cast
from h5traces.format.kinds import (
    ATTENTION_WINDOW,
    ENTROPY,
    LOGITS,
    LOGPROBS,
    MODEL_KINDS,
    QUERIES,
    STATE_NORMS,
    TOKEN_KINDS,
    TOP_LOGIT_IDS,
    TOP_LOGITS,
    WEIGHT_KINDS,
)
from h5traces.format.record import EarlierCast, LayerArray
from h5traces.format.text import and_more

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.extract.anatomy import Anatomy, Site
    from h5traces.format.attention import AttentionRule
    from h5traces.format.dtypes import DtypePolicy, FloatType


# Types that arrays are cast to on the device: the copy to the host becomes smaller.
_NARROW: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_TYPE_NAMES: Final[dict[torch.dtype, FloatType]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
# Integers of the same size, to compare values bit by bit.
_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What to keep of a forward pass, as in `ExtractOptions`; ``layers`` ascend.

    ``dtype`` is the stored type; casts to the narrow ones are made on the device. ``top_logits`` is
    how many scores are kept of every token; None for all. ``window`` is the width of
    ``attention_window``.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...] = DEFAULT_KINDS
    embedding: bool = False
    last_state: LastState = "final_norm"
    dtype: DtypePolicy = "float16"
    top_logits: int | None = None
    window: int = 0
    # Whether attention must follow from queries and keys.
    needs_rules: bool = False


@dataclass
class Captured:
    """The arrays of one sample by kind, the embedding first; NaN values by kind and name.

    ``of_tokens`` are numbers of every token, by field.
    """

    arrays: dict[str, list[LayerArray]] = field(default_factory=dict)
    of_tokens: dict[str, NDArray[Any]] = field(default_factory=dict)
    num_nan: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass
class _Taken:
    """An array of one sample on its way to the host."""

    kind: str
    name: str
    site: str | None
    source: torch.dtype
    host: torch.Tensor
    counts: torch.Tensor
    rule: AttentionRule | None = None


class Capturer:
    """Runs forward passes of one model."""

    def __init__(self, anatomy: Anatomy, options: CaptureOptions) -> None:
        self._anatomy, self._options = anatomy, options
        # Arrays that overflowed once; they go to the writer without a cast.
        self._too_wide: set[tuple[str, str]] = set()

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        pad_id: int = 0,
        kept: Sequence[NDArray[np.int64]] | None = None,
    ) -> list[Captured]:
        """Hidden states ``(S, H)`` and attentions ``(A, S, S)`` of every sequence of token ids.

        Shorter ones are padded on the left; the padding is masked, and removed again. Of tokens,
        those at the places `kept` of each sequence are kept; all by default.
        """
        kept = kept or [np.arange(len(each)) for each in sequences]
        while True:
            passed = _Pass(self._anatomy, self._options, self._too_wide, sequences, kept)
            passed.run(pad_id)
            overflowed = passed.overflowed()
            if not overflowed:
                return passed.captured()
            self._too_wide |= overflowed


class _Pass:
    """One forward pass."""

    def __init__(
        self,
        anatomy: Anatomy,
        options: CaptureOptions,
        too_wide: set[tuple[str, str]],
        sequences: Sequence[Sequence[int]],
        kept: Sequence[NDArray[np.int64]],
    ) -> None:
        self._kept = kept
        self._anatomy, self._options = anatomy, options
        self._too_wide = too_wide
        self._lengths = [len(each) for each in sequences]
        self._longest = max(self._lengths)
        self._sequences = sequences
        self._taken: list[list[_Taken]] = [[] for _ in sequences]
        self._of_tokens: list[dict[str, NDArray[Any]]] = [{} for _ in sequences]
        self._devices: set[torch.device] = set()
        # The block that runs; blocks may share modules.
        self._layer = -1

    def run(self, pad_id: int) -> None:
        """Compute and copy; all copies are complete when this returns."""
        anatomy = self._anatomy
        inputs = anatomy.inputs(padded(self._sequences, pad_id, anatomy.device))
        needs_scores = any(each in TOKEN_KINDS for each in self._options.kinds)
        with contextlib.ExitStack() as hooks:
            for handle in self._hooks():
                hooks.callback(handle.remove)
            if any(each in CALL_SIDES for each in self._options.kinds):
                products = (
                    site.module
                    for kind in CALL_SIDES
                    for site in anatomy.sites.get(kind, {}).values()
                    if site.by_product
                )
                hooks.enter_context(attention_calls(self._take_call, products))
            output = (anatomy.model if needs_scores else anatomy.decoder)(**inputs, use_cache=False)
        if needs_scores:
            self._take_scores(output.logits)
        for used in self._devices:
            if used.type == "cuda":
                torch.cuda.synchronize(used)

    def _keeps(self, kind: str, layer: int) -> bool:
        return kind in self._options.kinds and layer in self._options.layers

    def _hooks(self) -> Iterator[Any]:
        anatomy, options = self._anatomy, self._options
        for layer, block in enumerate(anatomy.blocks):
            yield block.register_forward_pre_hook(self._enter(layer), with_kwargs=True)
            if layer not in options.layers:
                continue
            yield block.register_forward_hook(self._block_taker(layer))
            attention = anatomy.attentions[layer]
            keeps_weights = any(self._keeps(kind, layer) for kind in WEIGHT_KINDS)
            if keeps_weights and attention is not None:
                yield attention.register_forward_hook(self._weights_taker(layer))
            for kind in options.kinds:
                site = anatomy.sites.get(kind, {}).get(layer)
                if site is not None and site.side == "input":
                    yield site.module.register_forward_pre_hook(
                        self._input_taker(kind, layer, site), with_kwargs=True
                    )
                elif site is not None and site.side == "output":
                    yield site.module.register_forward_hook(self._output_taker(kind, layer, site))
        yield anatomy.decoder.register_forward_hook(self._take_last)

    def _enter(self, layer: int) -> Any:
        def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._layer = layer
            is_first = layer == 0 and self._options.embedding
            if is_first and layout.HIDDEN_STATES in self._options.kinds:
                value = states_in(args, kwargs)
                self._take(layout.HIDDEN_STATES, layout.EMBEDDING, value, layout.SITE_EMBEDDING)

        return note

    def _replaces(self, layer: int) -> bool:
        """Whether the final norm takes the place of a block's output."""
        is_last = layer == self._anatomy.num_layers - 1
        return is_last and self._options.last_state == "final_norm"

    def _block_taker(self, layer: int) -> Any:
        def take(_module: Any, _args: Any, output: Any) -> None:
            name, value = layout.layer_name(layer), states_of(output)
            if self._keeps(layout.HIDDEN_STATES, layer) and not self._replaces(layer):
                self._take(layout.HIDDEN_STATES, name, value, layout.SITE_BLOCK_OUTPUT)
            if self._keeps(STATE_NORMS, layer):
                self._take(STATE_NORMS, name, value.float().norm(dim=-1))

        return take

    def _take_last(self, _module: Any, _args: Any, output: Any) -> None:
        last = self._anatomy.num_layers - 1
        if self._keeps(layout.HIDDEN_STATES, last) and self._replaces(last):
            name = layout.layer_name(last)
            value = output.last_hidden_state
            self._take(layout.HIDDEN_STATES, name, value, layout.SITE_FINAL_NORM)

    def _weights_taker(self, layer: int) -> Any:
        name = layout.layer_name(layer)

        def take(module: Any, _args: Any, output: Any) -> None:
            if self._layer != layer:
                return
            value = weights_of(output, self._longest)
            if value is None:
                raise ExtractionError(no_weights(name, module))
            for kind in WEIGHT_KINDS:
                if self._keeps(kind, layer):
                    self._take(kind, name, _weights_as(kind, value, self._options.window))

        return take

    def _input_taker(self, kind: str, layer: int, site: Site) -> Any:
        def take(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._layer == layer:
                self._take_site(kind, site, first_tensor(args, kwargs))

        return take

    def _output_taker(self, kind: str, layer: int, site: Site) -> Any:
        def take(_module: Any, _args: Any, output: Any) -> None:
            if self._layer == layer:
                is_tuple = isinstance(output, (tuple, list))
                self._take_site(kind, site, output[site.part] if is_tuple else output)

        return take

    def _take_call(
        self, module: Any, parts: dict[str, torch.Tensor], facts: dict[str, Any]
    ) -> None:
        for kind, side in CALL_SIDES.items():
            site = self._anatomy.sites.get(kind, {}).get(self._layer)
            if site is not None and site.module is module and self._keeps(kind, self._layer):
                self._take_site(kind, site, parts[side])
                if kind == QUERIES and self._layer in self._anatomy.recomputed:
                    self._note_rules(module, parts["query"], facts)

    def _note_rules(self, module: Any, query: torch.Tensor, facts: dict[str, Any]) -> None:
        """Keep with the queries of every sequence how they make its weights."""
        name = layout.layer_name(self._layer)
        for row, length in enumerate(self._lengths):
            if len(self._kept[row]) < length:
                continue  # weights need every key
            rule = rule_of(module, query, facts, row, length)
            if rule is not None:
                rule = variants(rule)[self._anatomy.recomputed[self._layer]]
            if rule is None and self._options.needs_rules:
                raise ExtractionError(no_rule(self._anatomy, [self._layer]))
            taken = next(
                each for each in self._taken[row] if (each.kind, each.name) == (QUERIES, name)
            )
            taken.rule = rule

    def _take_site(self, kind: str, site: Site, value: torch.Tensor | None) -> None:
        name = layout.layer_name(self._layer)
        if value is None:
            message = f"{kind}/{name}: {site.name} was called without numbers"
            raise ExtractionError(message)
        self._take(kind, name, site.taken(value, len(self._lengths)))

    def _take(self, kind: str, name: str, values: torch.Tensor, site: str | None = None) -> None:
        """Cast each sample's part on the device and start its copy to the host."""
        axes = MODEL_KINDS[kind].axes
        token_axes = [n for n, axis in enumerate(axes) if axis in ("token", "query", "key")]
        expected = [self._longest] * len(token_axes)
        is_whole = values.ndim == len(axes) + 1 and len(values) == len(self._lengths)
        if not is_whole or [values.shape[n + 1] for n in token_axes] != expected:
            message = (
                f"{kind}/{name}: the model gave shape {tuple(values.shape)} for "
                f"{len(self._lengths)} sequences of {self._longest} tokens; expected whole "
                "sequences"
            )
            raise ExtractionError(message)
        # A length is a sum over channels, which float16 would often not hold.
        keeps_type = (kind, name) in self._too_wide or kind == STATE_NORMS
        target = None if keeps_type else _NARROW.get(self._options.dtype)
        if target == values.dtype:
            target = None
        self._devices.add(values.device)
        for row, length in enumerate(self._lengths):
            part = values[row]
            if kind == ATTENTION_WINDOW:
                width = min(part.shape[-1], length)
                part = part[..., -width:]  # shorter than others of its batch
            for axis in token_axes:
                part = part.narrow(axis, self._longest - length, length)
                if len(self._kept[row]) < length:
                    places = torch.as_tensor(self._kept[row], device=part.device)
                    part = part.index_select(axis, places)
            copied, counts = cast(part, target)
            self._taken[row].append(
                _Taken(kind, name, site, values.dtype, _to_host(copied), _to_host(counts))
            )

    def _take_scores(self, scores: torch.Tensor) -> None:
        """Keep what is asked for of the scores ``(B, S, V)``; all of it is float32."""
        kinds, most = self._options.kinds, self._options.top_logits
        for row, length in enumerate(self._lengths):
            logits = scores[row, self._longest - length :].float()
            found = self._of_tokens[row]
            if LOGITS in kinds and most is None:
                found[LOGITS] = logits.cpu().numpy()
            elif LOGITS in kinds and most is not None:
                top = logits.topk(most, dim=-1)
                found[TOP_LOGITS] = top.values.cpu().numpy()
                found[TOP_LOGIT_IDS] = top.indices.cpu().numpy()
            if LOGPROBS in kinds or ENTROPY in kinds:
                logprobs = logits.log_softmax(dim=-1)
            if LOGPROBS in kinds:
                ids = torch.tensor(self._sequences[row][1:], device=logits.device)
                chosen = logprobs[:-1].gather(1, ids[:, None])[:, 0]
                # Nothing comes before the first.
                first = torch.full((1,), torch.nan, device=logits.device)
                found[LOGPROBS] = torch.cat([first, chosen]).cpu().numpy()
            if ENTROPY in kinds:
                found[ENTROPY] = torch.special.entr(logprobs.exp()).sum(dim=-1).cpu().numpy()
            if len(self._kept[row]) < length:
                found.update({name: each[self._kept[row]] for name, each in found.items()})

    def overflowed(self) -> set[tuple[str, str]]:
        """Arrays with finite values beyond the type that they were cast to."""
        return {(each.kind, each.name) for row in self._taken for each in row if each.counts[0] > 0}

    def captured(self) -> list[Captured]:
        """The arrays of every sample."""
        return [
            self._sample(row, of_tokens)
            for row, of_tokens in zip(self._taken, self._of_tokens, strict=True)
        ]

    def _sample(self, row: list[_Taken], of_tokens: dict[str, NDArray[Any]]) -> Captured:
        found = Captured(of_tokens=of_tokens)
        # Hooks fire in the order of computation: embedding, layers, final norm.
        for each in row:
            _, to_zero, to_subnormal, changed, num_nan = each.counts.tolist()
            earlier = None
            if each.host.dtype != each.source:
                counts = CastCounts(num_to_zero=to_zero, num_to_subnormal=to_subnormal)
                earlier = EarlierCast(_TYPE_NAMES[each.source], counts, changed)
            if num_nan:
                found.num_nan[each.kind, each.name] = num_nan
            values, _ = from_tensor(each.host)
            typed = TypedArray(values, _TYPE_NAMES[each.host.dtype])
            array = LayerArray(each.name, typed, each.site, earlier=earlier, rule=each.rule)
            found.arrays.setdefault(each.kind, []).append(array)
        return found


def _weights_as(kind: str, weights: torch.Tensor, width: int) -> torch.Tensor:
    """Attention weights ``(B, A, S, S)`` as a kind has them.

    Means are those of `h5traces.precision.attention.HeadMean`; a window is ``(B, A, S, W)``, W
    being `width`, or S if that is less.
    """
    if kind == layout.ATTENTION_MEAN:
        return weights.half().float().mean(dim=1)
    if kind == ATTENTION_WINDOW:
        width = min(width, weights.shape[-1])
        # Row i of the padded square begins width - 1 keys before key 0: a diagonal of columns.
        padded = F.pad(weights, (width - 1, 0))
        *outer, step, _ = padded.stride()
        return padded.as_strided((*weights.shape[:3], width), (*outer, step + 1, 1))
    return weights


def cast(values: torch.Tensor, target: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous copy of `values`, in the target type if there is one, and what the cast changed.

    The latter is int64 ``(5,)`` on the same device: values that overflow, become zero, become
    subnormal, or change at all, and NaN values of the source.
    """
    if values.device.type == "cpu" and target is not None:
        array, _ = from_tensor(values)
        typed = TypedArray(array, _TYPE_NAMES[values.dtype])
        found = compiled_cast(typed, _TYPE_NAMES[target])
        if found is not None:
            lost = found.counts
            counts = (lost.num_overflow, lost.num_to_zero, lost.num_to_subnormal, found.num_changed)
            return to_tensor(found.array.values, found.array.dtype), torch.tensor([*counts, 0])
    return cast_on_device(values, target)


def cast_on_device(
    values: torch.Tensor, target: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch, wherever `values` are."""
    num_nan = values.isnan().sum()
    if target is None:
        copied = values.clone(memory_format=torch.contiguous_format)
        zero = torch.zeros_like(num_nan)
        return copied, torch.stack([zero, zero, zero, zero, num_nan])
    narrow = values.to(target).contiguous()
    # Both narrow types fit into float32; float64 models are compared in their own.
    wide = values.dtype if values.dtype == torch.float64 else torch.float32
    before, after = values.to(wide), narrow.to(wide)
    tiny = torch.finfo(target).smallest_normal
    overflow = (after.isinf() & before.isfinite()).sum()
    to_zero = ((after == 0) & (before != 0)).sum()
    is_subnormal = (after.abs() < tiny) & (after != 0)
    to_subnormal = (is_subnormal & (after != before)).sum()
    bits = _BITS[values.element_size()]
    changed = (narrow.to(values.dtype).view(bits) != values.view(bits)).sum()
    return narrow, torch.stack([overflow, to_zero, to_subnormal, changed, num_nan])


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; one from CUDA is complete after the device was synchronised."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=values.is_cuda)


def padded(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs of a model: ids ``(B, S)`` padded on the left, their mask, and positions of a batch.

    Positions count from the first token of each sequence. A single sequence needs none, so models
    that take no positions run as well.
    """
    longest = max(len(each) for each in sequences)
    ids = [[pad_id] * (longest - len(each)) + list(each) for each in sequences]
    mask = [[0] * (longest - len(each)) + [1] * len(each) for each in sequences]
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    if len(sequences) > 1:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def no_rule(anatomy: Anatomy, layers: Sequence[int]) -> str:
    """Why weights of these layers cannot be computed."""
    return (
        f"{anatomy.model_class}: attention of layer {and_more(layers, 8)} does not follow from "
        "queries and keys by scale, soft cap, slopes, sinks and mask; store the weights "
        "(attentions='full')"
    )


def no_weights(name: str, module: Any) -> str:
    """Why a module has no weights to take."""
    return (
        f"{name}: {type(module).__name__} returned no attention weights; load the model with "
        "attn_implementation='eager', or extract hidden_states only"
    )
