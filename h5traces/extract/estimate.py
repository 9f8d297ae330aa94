"""Estimates how many bytes traces take, from the shape of a model; needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from h5traces.archive.selection import choose_layers
from h5traces.arguments import checked
from h5traces.extract.options import window_of, with_form
from h5traces.extract.sizes import ModelShape, Rates, stated_rates
from h5traces.format import layout
from h5traces.format.dtypes import CARRIERS
from h5traces.format.html import Report
from h5traces.format.kinds import KEYS, QUERIES
from h5traces.format.precision import EXACT, TIERS
from h5traces.storage.codecs import GZIP
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from h5traces.archive.selection import LayerChoice
    from h5traces.format.precision import Precision, Tier

# Models with fewer layers are thinned out less.
_FEW_LAYERS: Final = 12
# Of queries and keys in float16, and rounded to some mantissa bits; and how weights shrink with
# the number of tokens, from those of the stated rates on (docs/long-traces.md: 7.5 bits at 43
# tokens, 4.9 at 2,048).
_QUERY_BITS: Final = 13.7
_ROUNDING: Final = 5
_ROUNDED_QUERY_BITS: Final = 8.8
_WEIGHT_BITS: Final = 7.6
_STATED_LENGTH: Final = 43
_SHRINKING: Final = -0.11


@dataclass(frozen=True, kw_only=True)
class EstimateRow:
    """One way to store samples.

    Attributes
    ----------
    name
        Name of the way.
    sample_nbytes
        Bytes per sample.
    num_layers
        Stored layers.
    basis
        ``computed`` from the shape, ``estimated`` with stated rates, or ``measured`` by a pilot.
    precision
        Precision of an archive; None for raw arrays.
    """

    name: str
    sample_nbytes: float
    num_layers: int
    basis: str
    precision: Precision | None = None

    @property
    def per_thousand(self) -> float:
        """Bytes of 1000 samples."""
        return self.sample_nbytes * 1000


@dataclass(frozen=True, kw_only=True)
class Estimate(Report):
    """How many bytes samples take.

    Attributes
    ----------
    shape
        Of the model.
    mean_seq_len
        Mean number of tokens per sample.
    rows
        The ways to store them.
    rates
        Rates of storage without quantisation.
    """

    shape: ModelShape
    mean_seq_len: float
    rows: tuple[EstimateRow, ...]
    rates: Rates

    @property
    def advice(self) -> str:
        """Which form of attention takes less than the one that was asked for; else empty."""
        bits, length = self.rates.bits, max(1, round(self.mean_seq_len))
        has_weights = layout.ATTENTIONS in bits
        if not self.shape.num_heads or not (has_weights or {QUERIES, KEYS} <= bits.keys()):
            return ""
        values = self.shape.num_values([length], (layout.ATTENTIONS, QUERIES, KEYS))
        measured = bits if self.rates.is_measured else {}
        shrunk = min(1.0, (length / _STATED_LENGTH) ** _SHRINKING)
        per_weight = measured.get(layout.ATTENTIONS, _WEIGHT_BITS * shrunk)
        weights = values[layout.ATTENTIONS] * per_weight
        others = sum(values[kind] * measured.get(kind, _QUERY_BITS) for kind in (QUERIES, KEYS))
        few, many = (others, weights) if has_weights else (weights, others)
        if few >= many:
            return ""
        names = ("queries and keys", f"attention weights of {length:,} tokens")
        one, other = names if has_weights else names[::-1]
        form = "qk" if has_weights else "full"
        found = f"{one} would take 1/{many / few:.1f} of what {other} take: extract with "
        rounded = many / few * _QUERY_BITS / _ROUNDED_QUERY_BITS
        further = f"; 1/{rounded:.1f} with {_ROUNDING} mantissa bits, see docs/long-traces.md"
        return f"{found}attentions={form!r}" + (further if has_weights else "")

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


@checked
def estimate(
    shape: ModelShape,
    lengths: int | Sequence[int],
    *,
    layers: LayerChoice = None,
    kinds: str | Sequence[str] = (layout.HIDDEN_STATES, layout.ATTENTIONS),
    attentions: str | None = None,
    precision: PrecisionOptions | Tier | Precision | None = None,
    rates: Rates | None = None,
    tier_rates: Mapping[Precision, Rates] | None = None,
) -> Estimate:
    """Estimate the bytes per sample: raw, in archives, and in every tier.

    >>> from h5traces.extract import ModelShape
    >>> llama = ModelShape(num_layers=32, hidden_size=4096, num_heads=32)
    >>> estimate(llama, 43).rows[1].sample_nbytes
    15058944.0

    Parameters
    ----------
    shape
        Of the model.
    lengths
        Tokens of prompt and answer: one number for all samples, or one per sample.
    layers
        A subset to list beside all layers: 0-based numbers, or text such as ``0,5,10-12,last``;
        every fifth layer and the last by default.
    kinds, attentions
        What is stored, as for `ExtractOptions`.
    precision
        Stored type and codec, and a precision to list beside the tiers. Tiers need float16.
    rates
        Rates of storage without quantisation; stated ones by default.
    tier_rates
        Rates of tiers; by default they are derived from `rates`.

    Returns
    -------
    Estimate
        A row for every way to store the samples.

    Raises
    ------
    ExtractionError
        No rates are known for the type and codec, or `attentions` is unknown.
    LayerIndexError
        The model has no such layer.
    """
    lengths = [lengths] if isinstance(lengths, int) else lengths
    options = PrecisionOptions.of(precision)
    dtype, codec = options.dtype or "float16", options.codec or GZIP.name
    kinds = with_form(kinds, attentions)
    window = min(window_of(attentions), max(lengths, default=0))
    rates = (rates or stated_rates(dtype, codec)).of_kinds(kinds)
    everything = tuple(range(shape.num_layers))
    subset = spread(shape.num_layers)
    if layers is not None:
        subset = choose_layers(layers, range(shape.num_layers))
    ways = [(f"archive, {dtype}, {codec}", EXACT, rates)]
    if dtype == "float16" and codec == GZIP.name:
        ways += [
            (f"tier {each.tier}", each, (tier_rates or {}).get(each) or rates.of_precision(each))
            for each in dict.fromkeys((*TIERS.values(), options.precision))
            if each != EXACT
        ]
    rows = [
        _row(shape, lengths, chosen, way, window)
        for way in ways
        for chosen in dict.fromkeys((everything, subset))
    ]
    return Estimate(
        shape=shape,
        mean_seq_len=sum(lengths) / len(lengths),
        rows=(*_raw_rows(shape, lengths, kinds, window), *rows),
        rates=rates,
    )


def _raw_rows(
    shape: ModelShape, lengths: Sequence[int], kinds: Sequence[str], window: int
) -> Iterator[EstimateRow]:
    num_values = sum(shape.num_values(lengths, kinds, window).values()) * shape.num_layers
    for dtype in ("float32", "float16"):
        yield EstimateRow(
            name=f"raw {dtype}",
            sample_nbytes=num_values * CARRIERS[dtype].itemsize,
            num_layers=shape.num_layers,
            basis="computed",
        )


def _row(
    shape: ModelShape,
    lengths: Sequence[int],
    layers: tuple[int, ...],
    way: tuple[str, Precision, Rates],
    window: int,
) -> EstimateRow:
    name, precision, rates = way
    values = shape.num_values(lengths, rates.bits, window)
    if len(layers) < shape.num_layers:
        name += f", layers {','.join(map(str, layers))}"
    return EstimateRow(
        name=name,
        sample_nbytes=rates.stored_nbytes(values, len(layers)),
        num_layers=len(layers),
        basis="measured" if rates.is_measured else "estimated",
        precision=precision,
    )


def spread(num_layers: int) -> tuple[int, ...]:
    """Every fifth layer and the last; every other one of models with few layers."""
    stride = 5 if num_layers > _FEW_LAYERS else 2
    return tuple(sorted({*range(0, max(1, num_layers - stride), stride), num_layers - 1}))
