"""What a comparison of two archives found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from h5traces.format import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

TOTAL = "total"


@dataclass(frozen=True, slots=True)
class StateFidelity:
    """Hidden states of one layer, or of all; None is what cannot be told.

    Sigma is the standard deviation of a channel in A, over the compared tokens but the first of
    each sample, whose activations are often hundreds of times as large. Tokens with values that
    are not finite do not count. Channels with less than 2^-12 of the median sigma of the layer's
    channels that vary are given that much.

    Attributes
    ----------
    name
        ``layer_005``, ``embedding`` or ``total``.
    num_samples, num_values
        Samples and values that were compared, the first tokens included.
    nrmse
        ``sqrt(mean((error / sigma) ** 2))`` over all values.
    max_sigma, max_error
        The largest error in sigma, and as it is.
    max_relative
        The largest ``error / |value of A|``, where that value is not zero.
    num_from_zero, num_to_zero
        Zeros of A that are none in B, and values of A that are zero in B.
    num_tokens, mean_cosine, min_cosine
        Tokens, and the cosine of a token's state in A and in B; without tokens that hold values
        which are not finite.
    num_neighbours, neighbour_agreement
        Tokens with another one in their sample, and the share of them whose nearest other token,
        by cosine, is the same in A and B. Cosines within 1e-6 of the largest are ties; one nearest
        token in common is enough.
    num_differences, difference_nrmse
        As `nrmse`, of the difference to the compared layer before, in units of that difference's
        own sigma in A.
    num_not_finite, num_misplaced
        Values of A that are NaN or infinite, and places where only one archive has such a value,
        or both have others. They are left out of all else.
    """

    name: str
    num_samples: int
    num_values: int
    nrmse: float | None
    max_sigma: float | None
    max_error: float
    max_relative: float
    num_from_zero: int
    num_to_zero: int
    num_tokens: int
    mean_cosine: float | None
    min_cosine: float | None
    num_neighbours: int
    neighbour_agreement: float | None
    num_differences: int
    difference_nrmse: float | None
    num_not_finite: int
    num_misplaced: int

    @classmethod
    def total(cls, layers: Sequence[StateFidelity]) -> StateFidelity:
        """All layers together: means over all their values, tokens or differences."""
        return cls(
            name=TOTAL,
            nrmse=_root_mean(layers, lambda each: (each.nrmse, each.num_values)),
            max_sigma=_largest(each.max_sigma for each in layers),
            mean_cosine=_mean(layers, lambda each: (each.mean_cosine, each.num_tokens)),
            min_cosine=_smallest(each.min_cosine for each in layers),
            neighbour_agreement=_mean(
                layers, lambda each: (each.neighbour_agreement, each.num_neighbours)
            ),
            difference_nrmse=_root_mean(
                layers, lambda each: (each.difference_nrmse, each.num_differences)
            ),
            num_tokens=sum(each.num_tokens for each in layers),
            num_neighbours=sum(each.num_neighbours for each in layers),
            num_differences=sum(each.num_differences for each in layers),
            **_common(layers),
        )


@dataclass(frozen=True, slots=True)
class WeightFidelity:
    """Attention weights of one layer, or of all; None is what cannot be told.

    Attributes
    ----------
    name
        ``layer_005`` or ``total``.
    num_samples, num_values
        Samples and weights that were compared.
    nrmse
        ``sqrt(mean(error ** 2))`` divided by `rms`.
    rms
        ``sqrt(mean(value ** 2))`` of A.
    max_error, max_relative, num_from_zero, num_to_zero
        As in `StateFidelity`.
    num_edges
        Pairs of a query and a key up to it whose mean weight over heads exceeds the threshold in A,
        as `h5traces.graph` makes graphs.
    num_added, num_removed
        Edges that only B has, and that only A has.
    num_rows, mean_kl, max_kl
        Rows with weights, and the Kullback-Leibler divergence of B's row from A's in nats, both
        scaled to sum to 1. A weight that is zero in B only counts as 2^-24.
    num_not_finite, num_misplaced
        As in `StateFidelity`.
    """

    name: str
    num_samples: int
    num_values: int
    nrmse: float | None
    rms: float | None
    max_error: float
    max_relative: float
    num_from_zero: int
    num_to_zero: int
    num_edges: int
    num_added: int
    num_removed: int
    num_rows: int
    mean_kl: float | None
    max_kl: float | None
    num_not_finite: int
    num_misplaced: int

    @property
    def num_flips(self) -> int:
        """Edges that only one of both has."""
        return self.num_added + self.num_removed

    @property
    def flip_share(self) -> float | None:
        """`num_flips` per edge of A; None where A has no edge but B has."""
        if not self.num_edges:
            return None if self.num_flips else 0.0
        return self.num_flips / self.num_edges

    @classmethod
    def total(cls, layers: Sequence[WeightFidelity]) -> WeightFidelity:
        """All layers together: means over all their weights or rows."""
        rms = _root_mean(layers, lambda each: (each.rms, each.num_values))
        error = _root_mean(
            layers, lambda each: ((each.nrmse or 0) * (each.rms or 0), each.num_values)
        )
        return cls(
            name=TOTAL,
            nrmse=error / rms if rms and error is not None else None,
            rms=rms,
            num_edges=sum(each.num_edges for each in layers),
            num_added=sum(each.num_added for each in layers),
            num_removed=sum(each.num_removed for each in layers),
            num_rows=sum(each.num_rows for each in layers),
            mean_kl=_mean(layers, lambda each: (each.mean_kl, each.num_rows)),
            max_kl=_largest(each.max_kl for each in layers),
            **_common(layers),
        )


LayerFidelity = StateFidelity | WeightFidelity


@dataclass(frozen=True, slots=True)
class KindFidelity:
    """One kind of arrays.

    Attributes
    ----------
    kind, reference
        The kind in B, and what of A it was compared with: the same, or ``attentions``, whose mean
        over heads is compared with ``attention_mean``.
    total, layers
        All layers together, and each.
    """

    kind: str
    reference: str
    total: LayerFidelity
    layers: list[LayerFidelity]


@dataclass(slots=True)
class Unmatched:
    """What only one of the archives has.

    Attributes
    ----------
    samples
        Ids, with their generation where it is not the first, or indices of samples without one.
    arrays
        By kind and layer, such as ``attentions/layer_005``: of how many of the samples compared.
    """

    samples: list[str] = field(default_factory=list)
    arrays: dict[str, int] = field(default_factory=dict)

    def kinds(self) -> dict[str, int]:
        """Layers by kind."""
        found: dict[str, int] = {}
        for path in self.arrays:
            kind = path.partition("/")[0]
            found[kind] = found.get(kind, 0) + 1
        return found


@dataclass(slots=True)
class FidelityReport:
    """What a comparison found.

    Attributes
    ----------
    a, b
        Files of the reference, and of the archive that is judged.
    threshold
        Of edges.
    num_samples
        Samples compared.
    matched_by
        ``id``, ``ordinal`` where there are no ids, or ``id and ordinal``.
    kinds
        The kinds that were compared.
    only_in_a, only_in_b
        What could not be compared, since the other has none of it.
    skipped
        Arrays that cannot be compared, and why.
    """

    a: list[str]
    b: list[str]
    threshold: float
    num_samples: int = 0
    matched_by: str = "id"
    kinds: list[KindFidelity] = field(default_factory=list)
    only_in_a: Unmatched = field(default_factory=Unmatched)
    only_in_b: Unmatched = field(default_factory=Unmatched)
    skipped: list[str] = field(default_factory=list)

    def kind(self, name: str) -> KindFidelity:
        """One kind by name.

        Raises
        ------
        KeyError
            It was not compared.
        """
        return {each.kind: each for each in self.kinds}[name]

    def exceeding(
        self, *, max_sigma: float | None = None, max_flips: float | None = None
    ) -> list[str]:
        """Which layers differ by more than is allowed, a line each; empty where all is well.

        Parameters
        ----------
        max_sigma
            Largest error of hidden states, in sigma.
        max_flips
            Largest number of flipped edges per edge of A.

        Notes
        -----
        NaN and infinite values at other places are always too much; so is a measure that is limited
        and was not taken, since nothing of its kind was compared.
        """
        found = []
        if max_sigma is not None:
            found += self._exceeding(StateFidelity, lambda each: _beyond_sigma(each, max_sigma))
        if max_flips is not None:
            found += self._exceeding(WeightFidelity, lambda each: _beyond_flips(each, max_flips))
        return found

    def _exceeding(
        self, measure: type[LayerFidelity], judge: Callable[[Any], str | None]
    ) -> list[str]:
        layers = [
            (kind.kind, each)
            for kind in self.kinds
            for each in kind.layers
            if isinstance(each, measure)
        ]
        if not layers:
            what = "hidden states" if measure is StateFidelity else "attentions"
            return [f"no {what} were compared, so they cannot be within a limit"]
        found = []
        for kind, each in layers:
            problem = judge(each)
            if each.num_misplaced:
                problem = f"{each.num_misplaced} values are not finite in one archive only"
            if problem is not None:
                found.append(f"{kind}/{each.name}: {problem}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values; what is infinite is None."""
        document = asdict(self)
        document["kinds"] = [
            {
                "kind": each.kind,
                "reference": each.reference,
                "total": _as_dict(each.total),
                "layers": [_as_dict(layer) for layer in each.layers],
            }
            for each in self.kinds
        ]
        return document


def _as_dict(layer: LayerFidelity) -> dict[str, Any]:
    found = asdict(layer)
    if isinstance(layer, WeightFidelity):
        found |= {"num_flips": layer.num_flips, "flip_share": layer.flip_share}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }


def is_state(kind: str) -> bool:
    """Whether a kind is measured as states are."""
    return kind == layout.HIDDEN_STATES


def _beyond_sigma(layer: StateFidelity, limit: float) -> str | None:
    if layer.max_sigma is None:
        # Without a channel that varies there is no sigma, but equal values are within every limit.
        return f"errors of {layer.max_error:g} without a sigma" if layer.max_error else None
    if layer.max_sigma <= limit:
        return None
    return f"the largest error is {layer.max_sigma:.6g} sigma, more than {limit:g}"


def _beyond_flips(layer: WeightFidelity, limit: float) -> str | None:
    if layer.num_flips <= limit * layer.num_edges:
        return None
    return f"{layer.num_flips} of {layer.num_edges} edges flip, more than {limit:g} of them"


def _common(layers: Sequence[LayerFidelity]) -> dict[str, Any]:
    counts = ("num_values", "num_from_zero", "num_to_zero", "num_not_finite", "num_misplaced")
    found: dict[str, Any] = {name: sum(getattr(each, name) for each in layers) for name in counts}
    for name in ("num_samples", "max_error", "max_relative"):
        found[name] = max((getattr(each, name) for each in layers), default=0)
    return found


def _mean(layers: Sequence[Any], part: Callable[[Any], tuple[float | None, int]]) -> float | None:
    """The mean of means over so many each."""
    parts = [(mean, count) for mean, count in map(part, layers) if mean is not None and count]
    total = sum(count for _, count in parts)
    return sum(mean * count for mean, count in parts) / total if total else None


def _root_mean(
    layers: Sequence[Any], part: Callable[[Any], tuple[float | None, int]]
) -> float | None:
    """The root mean square of such over so many each."""

    def squared(layer: Any) -> tuple[float | None, int]:
        root, count = part(layer)
        return None if root is None else root * root, count

    mean = _mean(layers, squared)
    return None if mean is None else math.sqrt(mean)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((each for each in values if each is not None), default=None)


def _smallest(values: Iterable[float | None]) -> float | None:
    return min((each for each in values if each is not None), default=None)
