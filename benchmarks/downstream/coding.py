"""Hidden states through the encodings of `h5traces.precision`, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format import layout
from h5traces.format.dtypes import TypedArray
from h5traces.format.precision import EXACT, TIERS, Precision
from h5traces.precision.decoding import decode
from h5traces.precision.encoding import Encoder
from h5traces.precision.scales import ChannelAccumulator, ScaleSet, channel_scale
from h5traces.storage.arrays import encode_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from downstream.capturing import Trace
    from h5traces.precision.encoding import EncodedLayer
    from h5traces.precision.scales import ChannelScale, ChannelStatistics

STEPS: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
FLOAT16: Final = "float16"
_CODEC: Final = "gzip"


def state_precision(precision: Precision) -> Precision:
    """Of a precision, what concerns hidden states."""
    return Precision(step=precision.step, mantissa_bits=precision.mantissa_bits)


def name_of(precision: Precision) -> str:
    """Name of an encoding of hidden states."""
    if precision.step is not None:
        return f"step {precision.step:g}"
    bits = precision.mantissa_bits
    return FLOAT16 if bits is None else f"{bits} mantissa bits"


def encodings() -> dict[str, Precision]:
    """Encodings of hidden states by name: those of the tiers, and steps between them."""
    found = [EXACT, *(Precision(step=step) for step in STEPS)]
    found += [state_precision(each) for each in TIERS.values()]
    return {name_of(each): each for each in found}


def encoding_of_tier(tier: str) -> str:
    """The encoding of hidden states that a tier has."""
    return name_of(state_precision({str(name): each for name, each in TIERS.items()}[tier]))


def calibrate(traces: Sequence[Trace], *, differences: bool = False) -> list[ChannelStatistics]:
    """Statistics of the channels, layer by layer; or of the differences of neighbouring layers."""
    found = []
    for layer in range(len(traces[0].states) - differences):
        accumulator = ChannelAccumulator()
        for trace in traces:
            values = trace.states[layer]
            if differences:
                values = trace.states[layer + 1].astype(np.float32) - values
            accumulator.add(values)
        found.append(accumulator.statistics())
    return found


class Coder:
    """One encoding, with the scales of all layers.

    Parameters
    ----------
    precision
        Of hidden states.
    statistics
        By layer.
    """

    def __init__(self, precision: Precision, statistics: Sequence[ChannelStatistics]) -> None:
        self.precision, self._statistics = precision, statistics
        step = precision.step
        self._scales = {
            f"{layout.HIDDEN_STATES}/{layout.layer_name(layer)}": channel_scale(each, step)
            for layer, each in enumerate(statistics)
            if step is not None
        }
        self._encoder = Encoder(precision, ScaleSet(self._scales))

    def scale(self, layer: int) -> ChannelScale | None:
        """Steps and sigma of a layer; None where there are no steps."""
        return self._scales.get(f"{layout.HIDDEN_STATES}/{layout.layer_name(layer)}")

    def sigma(self, layer: int) -> NDArray[np.float64]:
        """What errors of a layer are stated in, by channel."""
        scale = self.scale(layer)
        sigma = self._statistics[layer].sigma if scale is None else scale.sigma
        return sigma.astype(np.float64)

    def encode(self, layer: int, values: NDArray[np.float16]) -> EncodedLayer:
        """Of float16 ``(tokens, hidden)``."""
        array = TypedArray(np.ascontiguousarray(values), "float16")
        return self._encoder.encode(layout.HIDDEN_STATES, layout.layer_name(layer), array)

    def decode(self, encoded: EncodedLayer) -> NDArray[np.float16]:
        """What a reader gets."""
        return restored(encoded, self._scales)

    def restore(self, layer: int, values: NDArray[np.float16]) -> NDArray[np.float16]:
        """Values after storing and reading."""
        return self.decode(self.encode(layer, values))

    def restore_all(self, states: NDArray[np.float16]) -> NDArray[np.float16]:
        """All layers after storing and reading: ``(layers, tokens, hidden)``."""
        return np.stack([self.restore(layer, each) for layer, each in enumerate(states)])


def restored(encoded: EncodedLayer, scales: dict[str, ChannelScale]) -> NDArray[Any]:
    """Values of an encoded layer, in float16."""
    if "encoding" not in encoded.attrs or "restored_dtype" not in encoded.attrs:
        return encoded.values
    prefix = f"/{layout.SCALES_GROUP}/"
    table = encoded.exceptions
    return decode(
        encoded.values,
        encoded.attrs,
        scale=lambda path: scales[path.removeprefix(prefix)],
        exceptions=lambda: np.empty((0, 2)) if table is None else table,
    ).values


def chunk_nbytes(values: NDArray[Any]) -> int:
    """Stored bytes of an array, by the codec that archives have."""
    return sum(map(len, encode_array(np.ascontiguousarray(values), _CODEC).chunks))


def exceptions_nbytes(layers: Sequence[EncodedLayer]) -> tuple[int, int]:
    """How many exceptions a sample has, and the stored bytes of their table.

    The table is float64 ``(n, 3)``: layer, index, value.
    """
    parts = [
        np.column_stack((np.full(len(each.exceptions), layer), each.exceptions))
        for layer, each in enumerate(layers)
        if each.exceptions is not None
    ]
    table = np.concatenate(parts) if parts else np.empty((0, 3))
    return len(table), chunk_nbytes(table) if len(table) else 0
