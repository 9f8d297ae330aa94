"""How much room samples take: from shapes alone, or from rates that were measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ExtractionError
from h5traces.format import layout
from h5traces.format.dtypes import CARRIERS, DtypePolicy
from h5traces.format.precision import EXACT, TIERS, Precision
from h5traces.precision.channel_steps import StepFormat
from h5traces.storage.codecs import GZIP
from h5traces.writing.create import DEFAULT_SHARD_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from h5traces.extract.extractor import Job
    from h5traces.extract.options import ExtractOptions, StoreOptions
    from h5traces.format.dtypes import DtypePolicy


_BITS: Final = 8
PER: Final = 1000


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a model decides how large its traces are.

    Attributes
    ----------
    num_layers, hidden_size, num_heads
        Decoder blocks, width of hidden states, attention heads.
    """

    num_layers: int
    hidden_size: int
    num_heads: int


LLAMA2_7B: Final = ModelShape(num_layers=32, hidden_size=4096, num_heads=32)
# What is told of 1000 samples of LLAMA2_7B in "gzip + float16", in bytes; nobody has shown it.
CLAIM_NBYTES: Final = (1.5e9, 2.5e9)
_CLAIM_SEQ_LEN: Final = 43
# 0, 5, 10, 15, 20, 25, 31: what graphs are built of.
_SUBSET: Final = 7
_FEW: Final = 12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How well values compress.

    Attributes
    ----------
    bits
        Stored bits per value, by kind.
    array_nbytes, sample_nbytes
        What one array and one sample take beside their values: headers, tokens, texts, footer.
    source
        Where the figures come from.
    is_measured
        Whether that is a pilot of the run itself.
    """

    bits: dict[str, float]
    array_nbytes: float
    sample_nbytes: float
    source: str
    is_measured: bool = False


_SOURCE: Final = (
    "examples/tiny-llama-pydocs in float32, its 40 questions, by 'h5traces estimate --pilot 40'"
)
# Of gzip, by stored type. docs/extraction.md says how they were measured.
STATED_RATES: Final[dict[DtypePolicy, Rates]] = {
    "float16": Rates(
        bits={layout.HIDDEN_STATES: 13.7, layout.ATTENTIONS: 7.6},
        array_nbytes=350,
        sample_nbytes=3500,
        source=_SOURCE,
    ),
    "bfloat16": Rates(
        bits={layout.HIDDEN_STATES: 10.9, layout.ATTENTIONS: 6.2},
        array_nbytes=350,
        sample_nbytes=3500,
        source=_SOURCE,
    ),
    "float32": Rates(
        bits={layout.HIDDEN_STATES: 26.9, layout.ATTENTIONS: 15.3},
        array_nbytes=350,
        sample_nbytes=3500,
        source=_SOURCE,
    ),
}


# By the formula of hidden states in steps, 2.05 - log2(step), bits are those of a Gaussian. Whole
# bits of Huffman codes, tables, rounded steps and exceptions take the rest, by bytes of a number:
# benchmarks/precision.md, large chunks.
_GAUSSIAN_BITS: Final = 2.05
_CODING_BITS: Final = {"uint8": 0.05, "uint16": 0.15}
# Of the pilot's attentions, by bits of the square-root scale; and of their mean over heads.
_ATTENTION_BITS: Final = 3.7
_MEAN_BITS: Final = 3.9
# Of the pilot's hidden states and attentions, rounded to 1 to 9 mantissa bits.
_ROUNDED_BITS: Final = {
    layout.HIDDEN_STATES: (4.8, 5.7, 7.1, 8.0, 8.8, 9.8, 10.8, 11.8, 12.7),
    layout.ATTENTIONS: (3.0, 3.5, 4.3, 4.8, 5.2, 5.7, 6.2, 6.7, 7.1),
}
# Attributes that tell how to decode an array.
_DECODING_NBYTES: Final = 260


def precise_rates(precision: Precision, exact: Rates) -> Rates:
    """The rates of a tier, from those of exact storage in float16.

    Parameters
    ----------
    precision
        Of the tier.
    exact
        Stated, or of a pilot; kinds that stay exact keep their bits.
    """
    bits = dict(exact.bits)
    for kind, rounded in _ROUNDED_BITS.items():
        if precision.mantissa_bits is not None and kind in bits:
            bits[kind] = rounded[precision.mantissa_bits - 1]
    if precision.step is not None and layout.HIDDEN_STATES in bits:
        ideal = _GAUSSIAN_BITS - math.log2(precision.step)
        coding = _CODING_BITS[StepFormat.of(precision.step).dtype]
        bits[layout.HIDDEN_STATES] = ideal + coding
    if layout.ATTENTIONS in bits:
        if precision.head_mean != "none":
            bits[layout.ATTENTION_MEAN] = _MEAN_BITS
        if precision.attention_bits is not None:
            bits[layout.ATTENTIONS] = _ATTENTION_BITS
        if precision.head_mean == "only":
            del bits[layout.ATTENTIONS]
    return Rates(
        bits=bits,
        array_nbytes=exact.array_nbytes + (0 if precision.is_exact else _DECODING_NBYTES),
        sample_nbytes=exact.sample_nbytes,
        source=exact.source,
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to store the samples.

    Attributes
    ----------
    name
        Which.
    precision
        How precisely; None where it is no archive.
    sample_nbytes
        Bytes per sample.
    num_layers
        Layers that are stored.
    basis
        ``exact`` arithmetic, ``estimated`` from stated rates, or ``measured`` on a pilot.
    """

    name: str
    sample_nbytes: float
    num_layers: int
    basis: str
    precision: Precision | None = None

    @property
    def per_thousand(self) -> float:
        """Bytes of 1000 samples."""
        return self.sample_nbytes * PER


def num_values(shape: ModelShape, lengths: Sequence[int], kinds: Iterable[str]) -> dict[str, float]:
    """Values per sample and layer, by kind, averaged over lengths.

    Attentions grow with the square of the length, so a mean length would not do.
    """
    count = len(lengths)
    each = {
        layout.HIDDEN_STATES: shape.hidden_size * sum(lengths) / count,
        layout.ATTENTIONS: shape.num_heads * sum(n * n for n in lengths) / count,
        layout.ATTENTION_MEAN: sum(n * n for n in lengths) / count,
    }
    return {kind: each[kind] for kind in kinds}


def raw_nbytes(values: dict[str, float], num_layers: int, itemsize: int) -> float:
    """Bytes of the values as they lie in memory."""
    return sum(values.values()) * num_layers * itemsize


def stored_nbytes(values: dict[str, float], num_layers: int, rates: Rates) -> float:
    """Bytes of a sample in an archive."""
    arrays = sum(values[kind] * rates.bits[kind] / _BITS for kind in values)
    overhead = rates.array_nbytes * len(values)
    return (arrays + overhead) * num_layers + rates.sample_nbytes


def stated_rates(dtype: DtypePolicy, codec: str) -> Rates:
    """The rates of a stored type, where some are stated.

    Raises
    ------
    ExtractionError
        None are: only a pilot can tell.
    """
    if codec != GZIP.name or dtype not in STATED_RATES:
        message = (
            f"no rates are stated for dtype {dtype} with codec {codec}; measure them with --pilot "
            f"on your model, or choose gzip and one of {', '.join(STATED_RATES)}"
        )
        raise ExtractionError(message)
    return STATED_RATES[dtype]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure that circulates for Llama-2-7B, and what the rates make of it.

    Attributes
    ----------
    low_nbytes, high_nbytes
        What is told of 1000 samples.
    seq_len
        Their tokens.
    all_layers_nbytes, seven_layers_nbytes
        1000 samples in float16 by the stated rates: all 32 layers, and 7 of them.
    compact_nbytes, compact_seven_layers_nbytes
        The same of the tier ``compact``, which is not exact.
    """

    low_nbytes: float
    high_nbytes: float
    seq_len: int
    all_layers_nbytes: float
    seven_layers_nbytes: float
    compact_nbytes: float
    compact_seven_layers_nbytes: float


def claim() -> Claim:
    """The figure that circulates, beside the stated rates."""
    exact = STATED_RATES["float16"]
    compact = precise_rates(TIERS["compact"], exact)
    low, high = CLAIM_NBYTES

    def thousand(num_layers: int, rates: Rates) -> float:
        values = num_values(LLAMA2_7B, [_CLAIM_SEQ_LEN], rates.bits)
        return PER * stored_nbytes(values, num_layers, rates)

    return Claim(
        low_nbytes=low,
        high_nbytes=high,
        seq_len=_CLAIM_SEQ_LEN,
        all_layers_nbytes=thousand(LLAMA2_7B.num_layers, exact),
        seven_layers_nbytes=thousand(_SUBSET, exact),
        compact_nbytes=thousand(LLAMA2_7B.num_layers, compact),
        compact_seven_layers_nbytes=thousand(_SUBSET, compact),
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How much room samples take.

    Attributes
    ----------
    shape
        The model's.
    mean_seq_len
        Tokens per sample, on average.
    rows
        The ways to store them.
    rates
        What compression was reckoned with.
    claim
        The figure that circulates, beside the truth.
    """

    shape: ModelShape
    mean_seq_len: float
    rows: tuple[Row, ...]
    rates: Rates
    claim: Claim

    def sample_nbytes(self, precision: Precision, num_layers: int) -> float:
        """Bytes of a sample in an archive; those of exact storage where no rates are known."""
        found = [each for each in self.rows if each.num_layers == num_layers and each.precision]
        alike = [each for each in found if each.precision == precision]
        return (alike or found)[0].sample_nbytes

    def as_dict(self) -> dict[str, Any]:
        """The estimate as JSON-ready values."""
        rows = [
            {
                **asdict(each),
                "precision": each.precision and each.precision.model_dump(exclude_none=True),
                "per_1000_nbytes": each.per_thousand,
            }
            for each in self.rows
        ]
        return {**asdict(self), "rows": rows}


def estimate(
    shape: ModelShape,
    lengths: Sequence[int],
    *,
    layers: tuple[int, ...] | None = None,
    kinds: Sequence[str] = (layout.HIDDEN_STATES, layout.ATTENTIONS),
    dtype: DtypePolicy = "float16",
    codec: str = GZIP.name,
    rates: Rates | None = None,
    tier_rates: Mapping[Precision, Rates] | None = None,
    precision: Precision = EXACT,
) -> Estimate:
    """Bytes of samples, raw and in archives, of all layers and of some.

    Parameters
    ----------
    shape
        The model's.
    lengths
        Tokens of every sample, or one length that stands for all.
    layers
        The subset to compare with; seven evenly spread ones by default.
    kinds
        What is stored.
    dtype, codec
        Of the archive.
    rates
        Those of a pilot, for instance; the stated ones by default.
    tier_rates
        Those of tiers, measured by a pilot; the stated ones by default. Tiers go with float16 only.
    precision
        One to list beside the tiers.

    Raises
    ------
    ExtractionError
        No rates are known for the type and codec.
    """
    rates = rates or _of_kinds(stated_rates(dtype, codec), kinds)
    values = num_values(shape, lengths, kinds)
    subset = layers or spread(shape.num_layers)
    rows = [
        Row(
            name=f"raw {each}",
            sample_nbytes=raw_nbytes(values, shape.num_layers, CARRIERS[each].itemsize),
            num_layers=shape.num_layers,
            basis="exact",
        )
        for each in ("float32", "float16")
    ]
    choices = dict.fromkeys((tuple(range(shape.num_layers)), subset))
    rows += [
        _row(f"archive, {dtype}, {codec}", EXACT, rates, shape, lengths, chosen)
        for chosen in choices
    ]
    if dtype == "float16" and codec == GZIP.name:
        for each in dict.fromkeys((*TIERS.values(), precision)):
            if not each.is_exact:
                known = (tier_rates or {}).get(each) or precise_rates(each, rates)
                rows += [
                    _row(f"tier {each.tier}", each, known, shape, lengths, chosen)
                    for chosen in choices
                ]
    return Estimate(
        shape=shape,
        mean_seq_len=sum(lengths) / len(lengths),
        rows=tuple(rows),
        rates=rates,
        claim=claim(),
    )


def _of_kinds(rates: Rates, kinds: Iterable[str]) -> Rates:
    return replace(rates, bits={kind: rates.bits[kind] for kind in kinds})


def _row(
    name: str,
    precision: Precision,
    rates: Rates,
    shape: ModelShape,
    lengths: Sequence[int],
    layers: tuple[int, ...],
) -> Row:
    values = num_values(shape, lengths, rates.bits)
    return Row(
        name=name if len(layers) == shape.num_layers else f"{name}, layers {_listed(layers)}",
        sample_nbytes=stored_nbytes(values, len(layers), rates),
        num_layers=len(layers),
        basis="measured" if rates.is_measured else "estimated",
        precision=precision,
    )


def spread(num_layers: int) -> tuple[int, ...]:
    """Every fifth layer and the last, as people choose them; of few layers every other one."""
    step = 5 if num_layers > _FEW else 2
    return tuple(sorted({*range(0, max(1, num_layers - step), step), num_layers - 1}))


def _listed(layers: tuple[int, ...]) -> str:
    return ",".join(str(each) for each in layers)


def shape_of(config: Any) -> ModelShape:
    """What of a configuration decides the size of traces."""
    text = config.get_text_config()
    return ModelShape(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=text.num_attention_heads,
    )


class Forecast:
    """Room that samples need at most: every answer as long as it may be."""

    def __init__(
        self,
        shape: ModelShape,
        jobs: list[Job],
        layers: tuple[int, ...],
        options: ExtractOptions,
        store: StoreOptions,
    ) -> None:
        self._shape, self._layers = shape, layers
        self._options, self._store = options, store
        longest = options.generation.max_new_tokens
        self._lengths = [len(each.prompt) + longest for each in jobs]

    def estimate(self) -> Estimate:
        """The table."""
        return estimate(
            self._shape,
            self._lengths,
            layers=self._layers,
            kinds=self._options.kinds,
            dtype=self._options.dtype,
            codec=self._store.codec,
            rates=_rates(self._options.dtype, self._store.codec),
            precision=Precision.of(self._store.tier),
        )

    def needed_nbytes(self, num_done: int) -> float:
        """Room for all samples but the first so many, and for one shard that waits to be packed.

        Samples wait exactly, whatever the tier.
        """
        found = self.estimate()
        precision = Precision.of(self._store.tier)
        waiting = found.sample_nbytes(EXACT, len(self._layers))
        stored = found.sample_nbytes(precision, len(self._layers))
        left = max(0, len(self._lengths) - num_done)
        shard = self._store.shard_samples or DEFAULT_SHARD_SAMPLES
        return stored * left + waiting * min(shard, len(self._lengths))


def _rates(dtype: DtypePolicy, codec: str) -> Rates:
    """Stated rates, or for types and codecs that have none those of float32, which are larger."""
    try:
        return stated_rates(dtype, codec)
    except ExtractionError:
        return stated_rates("float32", GZIP.name)
