"""One clean forward pass; hooks keep the arrays that were asked for and nothing else."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from h5traces.archive.torch_values import from_tensor
from h5traces.errors import ExtractionError
from h5traces.extract.anatomy import states_in, states_of, weights_of
from h5traces.extract.options import KINDS, Kind, LastState
from h5traces.format import layout
from h5traces.format.dtypes import CastCounts, TypedArray
from h5traces.format.record import EarlierCast, LayerArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.extract.anatomy import Anatomy
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
# A prime: nothing else in a small model is as long.
_CHECK_TOKENS: Final = tuple(range(11))
# Kernels of accelerators may round differently from run to run; wrong arrays differ far more.
_TOLERANCE: Final = 1e-2


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What to keep of a forward pass, as in `ExtractOptions`; ``layers`` ascend.

    ``dtype`` is the stored type; casts to the narrow ones are made on the device.
    """

    layers: tuple[int, ...]
    kinds: tuple[Kind, ...] = KINDS
    embedding: bool = False
    last_state: LastState = "final_norm"
    dtype: DtypePolicy = "float16"


@dataclass
class Captured:
    """The arrays of one sample by kind, the embedding first; NaN values by kind and name."""

    arrays: dict[str, list[LayerArray]] = field(default_factory=dict)
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


class Capturer:
    """Runs forward passes of one model."""

    def __init__(self, anatomy: Anatomy, options: CaptureOptions) -> None:
        self._anatomy, self._options = anatomy, options
        # Arrays that overflowed once; they go to the writer without a cast.
        self._too_wide: set[tuple[str, str]] = set()

    @torch.inference_mode()
    def run(self, sequences: Sequence[Sequence[int]], *, pad_id: int = 0) -> list[Captured]:
        """Hidden states ``(S, H)`` and attentions ``(A, S, S)`` of every sequence of token ids.

        Shorter ones are padded on the left; the padding is masked, and removed again.
        """
        while True:
            passed = _Pass(self._anatomy, self._options, self._too_wide, sequences)
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
    ) -> None:
        self._anatomy, self._options = anatomy, options
        self._too_wide = too_wide
        self._lengths = [len(each) for each in sequences]
        self._sequences = sequences
        self._taken: list[list[_Taken]] = [[] for _ in sequences]
        self._devices: set[torch.device] = set()

    def run(self, pad_id: int) -> None:
        """Compute and copy; all copies are complete when this returns."""
        inputs = self._anatomy.inputs(padded(self._sequences, pad_id, self._anatomy.device))
        with contextlib.ExitStack() as hooks:
            for handle in self._hooks():
                hooks.callback(handle.remove)
            output = self._anatomy.decoder(**inputs, use_cache=False)
        last = self._anatomy.num_layers - 1
        if self._keeps(layout.HIDDEN_STATES, last) and self._options.last_state == "final_norm":
            self._take(
                layout.HIDDEN_STATES,
                layout.layer_name(last),
                layout.SITE_FINAL_NORM,
                output.last_hidden_state,
            )
        for used in self._devices:
            if used.type == "cuda":
                torch.cuda.synchronize(used)

    def _keeps(self, kind: Kind, layer: int) -> bool:
        return kind in self._options.kinds and layer in self._options.layers

    def _hooks(self) -> Iterator[Any]:
        anatomy, options = self._anatomy, self._options
        if options.embedding and layout.HIDDEN_STATES in options.kinds:
            yield anatomy.blocks[0].register_forward_pre_hook(
                self._take_embedding, with_kwargs=True
            )
        for layer in options.layers:
            name = layout.layer_name(layer)
            is_last = layer == anatomy.num_layers - 1
            if self._keeps("hidden_states", layer) and not (
                is_last and options.last_state == "final_norm"
            ):
                yield anatomy.blocks[layer].register_forward_hook(self._taker(name))
            attention = anatomy.attentions[layer]
            if self._keeps("attentions", layer) and attention is not None:
                yield attention.register_forward_hook(self._weights_taker(name))

    def _take_embedding(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = states_in(args, kwargs)
        self._take(layout.HIDDEN_STATES, layout.EMBEDDING, layout.SITE_EMBEDDING, value)

    def _taker(self, name: str) -> Any:
        def take(_module: Any, _args: Any, output: Any) -> None:
            self._take(layout.HIDDEN_STATES, name, layout.SITE_BLOCK_OUTPUT, states_of(output))

        return take

    def _weights_taker(self, name: str) -> Any:
        def take(module: Any, _args: Any, output: Any) -> None:
            value = weights_of(output, max(self._lengths))
            if value is None:
                raise ExtractionError(_no_weights(name, module))
            self._take(layout.ATTENTIONS, name, None, value)

        return take

    def _take(self, kind: str, name: str, site: str | None, values: torch.Tensor) -> None:
        """Cast each sample's part on the device and start its copy to the host."""
        longest = max(self._lengths)
        axes = (1,) if kind == layout.HIDDEN_STATES else (2, 3)
        found = [values.shape[axis] for axis in axes]
        if values.shape[0] != len(self._lengths) or any(each != longest for each in found):
            message = (
                f"{kind}/{name}: the model gave shape {tuple(values.shape)} for "
                f"{len(self._lengths)} sequences of {longest} tokens; expected whole sequences"
            )
            raise ExtractionError(message)
        too_wide = (kind, name) in self._too_wide
        target = None if too_wide else _NARROW.get(self._options.dtype)
        if target == values.dtype:
            target = None
        self._devices.add(values.device)
        for row, length in enumerate(self._lengths):
            start = longest - length
            part = (
                values[row, start:]
                if kind == layout.HIDDEN_STATES
                else values[row, :, start:, start:]
            )
            copied, counts = cast(part, target)
            self._taken[row].append(
                _Taken(kind, name, site, values.dtype, _to_host(copied), _to_host(counts))
            )

    def overflowed(self) -> set[tuple[str, str]]:
        """Arrays with finite values beyond the type that they were cast to."""
        return {(each.kind, each.name) for row in self._taken for each in row if each.counts[0] > 0}

    def captured(self) -> list[Captured]:
        """The arrays of every sample."""
        return [self._sample(row) for row in self._taken]

    def _sample(self, row: list[_Taken]) -> Captured:
        found = Captured()
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
            array = LayerArray(each.name, typed, each.site, earlier=earlier)
            found.arrays.setdefault(each.kind, []).append(array)
        return found


def cast(values: torch.Tensor, target: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous copy of `values`, in the target type if there is one, and what the cast changed.

    The latter is int64 ``(5,)`` on the same device: values that overflow, become zero, become
    subnormal, or change at all, and NaN values of the source.
    """
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
            raise ExtractionError(_no_weights(layout.layer_name(layer), anatomy.attentions[layer]))
    kept = tuple(
        module if returned.get(layer) else None for layer, module in enumerate(anatomy.attentions)
    )
    return replace(anatomy, attentions=kept)


def _no_weights(name: str, module: Any) -> str:
    return (
        f"{name}: {type(module).__name__} returned no attention weights; load the model with "
        "attn_implementation='eager', or extract hidden_states only"
    )


def check_capture(model: Any, anatomy: Anatomy, kinds: tuple[Kind, ...]) -> None:
    """Compare the arrays of eleven tokens with those that transformers returns.

    Raises
    ------
    ExtractionError
        An array is another, or transformers returns another number of them.
    """
    with torch.inference_mode():
        output = model(
            **anatomy.inputs(padded([_CHECK_TOKENS], 0, anatomy.device)),
            output_hidden_states=layout.HIDDEN_STATES in kinds,
            output_attentions=layout.ATTENTIONS in kinds,
            use_cache=False,
        )
    for kind in kinds:
        # Some list None for blocks without attention, or matrices of another size.
        expected = [each for each in getattr(output, kind, None) or () if _is_whole(each)]
        message = None
        for found in _ways(anatomy, kind):
            problem = _difference(kind, found, expected)
            if problem is None:
                break
            message = message or problem
        else:
            message = (
                f"{anatomy.model_class}: {message}; h5traces does not know the structure of this "
                "model"
            )
            raise ExtractionError(message)


def _is_whole(values: torch.Tensor | None) -> bool:
    """Whether hidden states, or attention weights, cover the tokens of the check."""
    return values is not None and values.shape[-2] == len(_CHECK_TOKENS)


def _ways(anatomy: Anatomy, kind: Kind) -> Iterator[list[LayerArray]]:
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
    kind: Kind, found: list[LayerArray], expected: Sequence[torch.Tensor]
) -> str | None:
    """How arrays differ from those of transformers, in words."""
    if len(found) != len(expected):
        return f"transformers returns {len(expected)} {kind}, the hooks took {len(found)}"
    for entry, tensor in zip(found, expected, strict=True):
        if not is_close(values_of(entry), tensor[0].float().cpu().numpy(), _TOLERANCE):
            return f"{kind}/{entry.name} is not what transformers returns"
    return None


def values_of(entry: LayerArray) -> NDArray[Any]:
    """The numbers of a captured array."""
    assert isinstance(entry.array, TypedArray)
    return entry.array.to_numpy()


def is_close(found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> bool:
    """Whether two arrays differ by rounding at most, with NaN values in the same places.

    The tolerance is relative to the largest value.
    """
    if found.shape != expected.shape:
        return False
    a, b = found.astype(np.float64), expected.astype(np.float64)
    largest = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    return np.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
