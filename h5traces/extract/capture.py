"""One clean forward pass, of which only what was asked for is kept."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from h5traces.errors import ExtractionError
from h5traces.extract.casting import as_typed, cast, target_of, to_host, type_name
from h5traces.format import layout
from h5traces.format.dtypes import CastCounts
from h5traces.format.record import EarlierCast, LayerArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from h5traces.extract.anatomy import Anatomy
    from h5traces.format.dtypes import DtypePolicy

Kind = Literal["hidden_states", "attentions"]
LastState = Literal["final_norm", "block_output"]
KINDS: Final[tuple[Kind, ...]] = ("hidden_states", "attentions")


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What of a forward pass is kept.

    Attributes
    ----------
    layers
        Decoder blocks, ascending.
    kinds
        Hidden states, attentions, or both.
    embedding
        Whether to keep the input of the first block, too.
    last_state
        Where the last block's hidden state is taken: behind the final norm, as transformers returns
        it, or before.
    dtype
        Stored type; casts to the narrow ones are made on the device.
    """

    layers: tuple[int, ...]
    kinds: tuple[Kind, ...] = KINDS
    embedding: bool = False
    last_state: LastState = "final_norm"
    dtype: DtypePolicy = "float16"


@dataclass
class Captured:
    """The arrays of one sample.

    Attributes
    ----------
    arrays
        By kind, in order of layer; the embedding first.
    num_nan
        NaN values by kind and name.
    """

    arrays: dict[str, list[LayerArray]] = field(default_factory=dict)
    num_nan: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass
class _Taken:
    """A layer's array of one sample on its way to the host."""

    kind: str
    name: str
    site: str | None
    source: torch.dtype
    host: torch.Tensor
    counts: torch.Tensor


class Capturer:
    """Runs forward passes of one model.

    Parameters
    ----------
    anatomy
        The model's parts.
    options
        What to keep.
    """

    def __init__(self, anatomy: Anatomy, options: CaptureOptions) -> None:
        self._anatomy, self._options = anatomy, options
        # Arrays that overflowed once; the writer gets them as they are and widens them.
        self._too_wide: set[tuple[str, str]] = set()

    @torch.inference_mode()
    def run(self, sequences: Sequence[Sequence[int]], *, pad_id: int = 0) -> list[Captured]:
        """Hidden states ``(S, H)`` and attentions ``(A, S, S)`` of every sequence.

        Parameters
        ----------
        sequences
            Token ids; shorter ones are padded on the left and their padding is removed again.
        pad_id
            Token to pad with; it is masked.

        Raises
        ------
        ExtractionError
            The model returns no attention weights, or arrays of another length.
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
        """Compute, and start all copies; they are complete when this returns."""
        device = self._anatomy.decoder.get_input_embeddings().weight.device
        inputs = padded(self._sequences, pad_id, device)
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
            if self._keeps("attentions", layer):
                yield anatomy.attentions[layer].register_forward_hook(self._weights_taker(name))

    def _take_embedding(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["hidden_states"]
        self._take(layout.HIDDEN_STATES, layout.EMBEDDING, layout.SITE_EMBEDDING, value)

    def _taker(self, name: str) -> Any:
        def take(_module: Any, _args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            self._take(layout.HIDDEN_STATES, name, layout.SITE_BLOCK_OUTPUT, value)

        return take

    def _weights_taker(self, name: str) -> Any:
        def take(module: Any, _args: Any, output: Any) -> None:
            value = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if value is None:
                message = (
                    f"{name}: {type(module).__name__} returned no attention weights; load the "
                    "model with attn_implementation='eager', or extract hidden_states only"
                )
                raise ExtractionError(message)
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
        target = None if too_wide else target_of(self._options.dtype, values.dtype)
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
                _Taken(kind, name, site, values.dtype, to_host(copied), to_host(counts))
            )

    def overflowed(self) -> set[tuple[str, str]]:
        """Arrays with finite values beyond the type they were cast to."""
        return {(each.kind, each.name) for row in self._taken for each in row if each.counts[0] > 0}

    def captured(self) -> list[Captured]:
        """The arrays of every sample."""
        return [self._sample(row) for row in self._taken]

    def _sample(self, row: list[_Taken]) -> Captured:
        found = Captured()
        # Hooks fire in the order of computing, which puts the final norm and layers where they go.
        for each in row:
            _, to_zero, to_subnormal, num_nan = each.counts.tolist()
            earlier = None
            if each.host.dtype != each.source:
                counts = CastCounts(num_to_zero=to_zero, num_to_subnormal=to_subnormal)
                earlier = EarlierCast(type_name(each.source), counts)
            if num_nan:
                found.num_nan[each.kind, each.name] = num_nan
            array = LayerArray(each.name, as_typed(each.host), each.site, earlier=earlier)
            found.arrays.setdefault(each.kind, []).append(array)
        return found


def padded(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs of a model: ids ``(B, S)`` padded on the left, and their mask.

    Positions count from each sequence's own first token; a single sequence needs none, and models
    that take no positions run all the same.
    """
    longest = max(len(each) for each in sequences)
    ids = [[pad_id] * (longest - len(each)) + list(each) for each in sequences]
    mask = [[0] * (longest - len(each)) + [1] * len(each) for each in sequences]
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    if len(sequences) > 1:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        inputs["position_ids"] = positions
    return inputs
