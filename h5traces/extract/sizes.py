"""How many bytes a trace takes: shapes of models, and bits per stored value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from h5traces.arguments import checked_options, shown
from h5traces.errors import ExtractionError, OptionError
from h5traces.format import layout
from h5traces.format.kinds import KEYS, MODEL_KINDS, STATE_NORMS, VALUES, WEIGHT_KINDS
from h5traces.format.precision import EXACT
from h5traces.precision.channel_steps import StepFormat
from h5traces.precision.encoding import STEPPED_KINDS, has_levels
from h5traces.storage.codecs import GZIP

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from h5traces.format.dtypes import DtypePolicy
    from h5traces.format.precision import Precision
    from h5traces.writing.options import PrecisionOptions

_BITS_PER_BYTE: Final = 8


@checked_options
@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions of a model that decide the size of its traces.

    Attributes
    ----------
    num_layers
        Decoder blocks.
    hidden_size
        Width of the hidden states.
    num_heads
        Attention heads per layer.
    num_key_value_heads
        Heads of keys and values; `num_heads` by default.
    head_size
        Channels of a head; `hidden_size` by `num_heads` by default.
    num_experts
        Experts per layer.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int | None = None
    head_size: int | None = None
    num_experts: int = 0

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape that a configuration of transformers describes."""
        text = config.get_text_config()
        return cls(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            # Mamba and its kin have none.
            num_heads=getattr(text, "num_attention_heads", 0),
            num_key_value_heads=_number(text, "num_key_value_heads"),
            head_size=_number(text, "head_dim"),
            num_experts=_number(text, "num_experts", "num_local_experts", "n_routed_experts") or 0,
        )

    def num_values(
        self, lengths: Sequence[int], kinds: Iterable[str], window: int = 0
    ) -> dict[str, float]:
        """Values per sample and layer, by kind, averaged over samples.

        The mean is taken over samples, since attentions grow with the square of the length;
        `window` is the width of ``attention_window``.
        """
        count = len(lengths)
        if not count or min(lengths) < 0:
            message = f"lengths are {shown(list(lengths))}, expected numbers of tokens"
            raise OptionError(message)
        weights = sum(n * n for n in lengths) / count
        per_token = sum(lengths) / count
        num_grouped = self.num_key_value_heads or self.num_heads
        head_size = self.head_size or (self.hidden_size // self.num_heads if self.num_heads else 0)
        widths = {
            "hidden": self.hidden_size,
            "channel": head_size,
            "expert": self.num_experts,
            "head": self.num_heads,
            "offset": window,
        }
        values = {layout.ATTENTION_MEAN: weights, layout.ATTENTIONS: self.num_heads * weights}
        for kind, each in MODEL_KINDS.items():
            if "key" not in each.axes:
                sizes = [widths[axis] for axis in each.axes if axis not in ("token", "query")]
                values[kind] = per_token * math.prod(sizes)
        for kind in (KEYS, VALUES):
            values[kind] = per_token * num_grouped * head_size
        return {kind: values[kind] for kind in _known(kinds, values)}


def _number(config: Any, *names: str) -> int | None:
    """The first of these numbers that a configuration has."""
    found = (getattr(config, name, None) for name in names)
    return next((each for each in found if isinstance(each, int)), None)


def _known(kinds: Iterable[str], known: Mapping[str, float]) -> tuple[str, ...]:
    names = tuple(kinds)
    if not set(names) <= known.keys():
        message = f"kinds are {shown(names)}, expected some of {', '.join(known)}"
        raise OptionError(message)
    return names


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How well values compress.

    Attributes
    ----------
    bits
        Stored bits per value, by kind.
    array_nbytes, sample_nbytes
        Bytes of one array and of one sample beside the values: headers, tokens, texts, index.
    source
        What the figures were measured on.
    is_measured
        Whether a pilot of this run measured them.
    """

    bits: dict[str, float]
    array_nbytes: float
    sample_nbytes: float
    source: str
    is_measured: bool = False

    def stored_nbytes(self, values: Mapping[str, float], num_layers: int) -> float:
        """Bytes of a sample in an archive, from its values per layer and kind."""
        arrays = sum(values[kind] * self.bits[kind] / _BITS_PER_BYTE for kind in values)
        return (arrays + self.array_nbytes * len(values)) * num_layers + self.sample_nbytes

    def of_kinds(self, kinds: Iterable[str]) -> Rates:
        """The same rates for some kinds only."""
        return replace(self, bits={kind: self.bits[kind] for kind in _known(kinds, self.bits)})

    def of_precision(self, precision: Precision) -> Rates:
        """The rates of a precision, where `self` are those of float16 without quantisation."""
        if precision == EXACT:
            return self
        bits = dict(self.bits)
        for kind in bits:
            if precision.step is not None and kind in STEPPED_KINDS:
                ideal = _GAUSSIAN_BITS - math.log2(precision.step)
                bits[kind] = ideal + _CODING_BITS[StepFormat.of(precision.step).dtype]
            elif has_levels(kind, precision):
                is_mean = kind == layout.ATTENTION_MEAN
                bits[kind] = _MEAN_BITS if is_mean else _SQUARE_ROOT_BITS
            elif precision.mantissa_bits is not None and kind != STATE_NORMS:
                like = layout.ATTENTIONS if kind in WEIGHT_KINDS else layout.HIDDEN_STATES
                bits[kind] = _ROUNDED_BITS[like][precision.mantissa_bits - 1]
        if layout.ATTENTIONS in bits and precision.head_mean != "none":
            bits[layout.ATTENTION_MEAN] = _MEAN_BITS
            if precision.head_mean == "only":
                del bits[layout.ATTENTIONS]
        return replace(
            self, bits=bits, array_nbytes=self.array_nbytes + _DECODING_NBYTES, is_measured=False
        )


def _stated(
    hidden_states: float, attentions: float, array_nbytes: int, sample_nbytes: int
) -> Rates:
    return Rates(
        # Of the others, nothing is known but that they are floats like the states.
        bits={kind: attentions if kind in WEIGHT_KINDS else hidden_states for kind in MODEL_KINDS},
        array_nbytes=array_nbytes,
        sample_nbytes=sample_nbytes,
        source="examples/tiny-llama-pydocs in float32, its 40 questions, by a pilot",
    )


# Rates of gzip, by stored type; docs/extraction.md says how they were measured. What a cast changed
# takes attributes of the array.
STATED_RATES: Final[dict[DtypePolicy, Rates]] = {
    "float16": _stated(13.7, 7.6, 500, 4500),
    "bfloat16": _stated(10.9, 6.2, 455, 4500),
    "float32": _stated(26.9, 15.3, 400, 4040),
}

# An ideal code of a Gaussian needs 2.05 - log2(step) bits. Whole bits of Huffman codes, tables,
# rounded steps and exceptions take the rest, by the integer type (benchmarks/precision.md, large
# chunks).
_GAUSSIAN_BITS: Final = 2.05
_CODING_BITS: Final = {"uint8": 0.05, "uint16": 0.15}
# The pilot's attentions on a square-root scale of 8 bits, and their mean over heads.
_SQUARE_ROOT_BITS: Final = 3.7
_MEAN_BITS: Final = 3.9
# The pilot's values, rounded to 1 to 9 mantissa bits.
_ROUNDED_BITS: Final = {
    layout.HIDDEN_STATES: (4.8, 5.7, 7.1, 8.0, 8.8, 9.8, 10.8, 11.8, 12.7),
    layout.ATTENTIONS: (3.0, 3.5, 4.3, 4.8, 5.2, 5.7, 6.2, 6.7, 7.1),
}
# Attributes that a quantised array needs for decoding.
_DECODING_NBYTES: Final = 260


def stated_rates(dtype: DtypePolicy, codec: str) -> Rates:
    """The rates known for a stored type and codec."""
    if codec != GZIP.name or dtype not in STATED_RATES:
        message = (
            f"no rates are known for dtype {dtype} with codec {codec}; measure them with a pilot "
            f"on your model, or choose gzip and one of {', '.join(STATED_RATES)}"
        )
        raise ExtractionError(message)
    return STATED_RATES[dtype]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that planned samples take at most.

    Attributes
    ----------
    shape
        Of the model.
    layers, kinds
        What is stored.
    lengths
        Tokens of every sample, with the longest possible answer.
    precision
        How the arrays are stored.
    window
        Width of ``attention_window``.
    """

    shape: ModelShape
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    precision: PrecisionOptions
    window: int = 0

    @property
    def rates(self) -> Rates:
        """Stated rates without quantisation; those of float32, the largest, if there are none."""
        dtype, codec = self.precision.dtype or "float16", self.precision.codec or GZIP.name
        is_known = codec == GZIP.name and dtype in STATED_RATES
        return STATED_RATES[dtype if is_known else "float32"].of_kinds(self.kinds)

    @property
    def sample_nbytes(self) -> float:
        """Bytes of a sample in an archive."""
        return self._nbytes(self.rates.of_precision(self.precision.precision))

    def needed_nbytes(self, num_done: int, shard_samples: int | None) -> float:
        """Bytes for the samples that are left, and for a shard that waits without quantisation."""
        num_samples = len(self.lengths)
        waiting = min(shard_samples or num_samples, num_samples)
        left = max(0, num_samples - num_done)
        return self.sample_nbytes * left + self._nbytes(self.rates) * waiting

    def waiting_nbytes(self, shard_samples: int | None) -> float:
        """Bytes of the largest samples of a shard, of its archive, and of one that is uploaded."""
        longest = tuple(sorted(self.lengths, reverse=True)[:shard_samples])
        largest = replace(self, lengths=longest)
        return largest.needed_nbytes(0, None) + largest.sample_nbytes * len(longest)

    def _nbytes(self, rates: Rates) -> float:
        values = self.shape.num_values(self.lengths, rates.bits, self.window)
        return rates.stored_nbytes(values, len(self.layers))

    def as_dict(self) -> dict[str, Any]:
        """The forecast as JSON-ready values."""
        return {
            "shape": asdict(self.shape),
            "layers": list(self.layers),
            "mean_seq_len": sum(self.lengths) / len(self.lengths),
            "sample_nbytes": self.sample_nbytes,
        }
