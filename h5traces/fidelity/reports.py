"""What a comparison of two archives found."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from h5traces.format.html import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """Measures that states and weights have in common; None if a measure is not defined.

    Attributes
    ----------
    name
        ``layer_005``, ``embedding`` or ``total``.
    num_samples, num_values
        Samples and values that were compared.
    nrmse
        Root mean square of the errors, in units that the subclass states.
    max_error, max_relative
        The largest error, and the largest ``error / |value of A|`` where that value is not zero.
    num_from_zero, num_to_zero
        Zeros of A that are not zero in B, and values of A that are zero in B.
    num_not_finite, num_misplaced
        Values of A that are NaN or infinite, and places where one archive has such a value and the
        other a different one. All other measures leave both out.
    """

    name: str
    num_samples: int
    num_values: int
    nrmse: float | None
    max_error: float
    max_relative: float
    num_from_zero: int
    num_to_zero: int
    num_not_finite: int
    num_misplaced: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFidelity(LayerFidelity):
    """Hidden states of one layer, or of all.

    Sigma is the standard deviation of a channel in A, over the compared tokens except the first of
    each sample, whose activations are often hundreds of times as large. Tokens with a value that
    is not finite do not count. Channels whose sigma is less than 2^-12 of the median (over the
    channels of the layer that vary) are given that much.

    Attributes
    ----------
    nrmse
        ``sqrt(mean((error / sigma) ** 2))`` over all values.
    max_sigma
        The largest error in sigma.
    num_tokens, mean_cosine, min_cosine
        Tokens, and the cosine between a token's state in A and in B.
    num_neighbours, neighbour_agreement
        Tokens with another one in their sample, and the share of them whose nearest other token,
        by cosine, is the same in A and B. Cosines within 1e-6 of the largest are ties; one nearest
        token in common is enough.
    num_differences, difference_nrmse
        As `nrmse`, of the difference to the compared layer before, in units of the sigma of that
        difference in A.
    """

    max_sigma: float | None
    num_tokens: int
    mean_cosine: float | None
    min_cosine: float | None
    num_neighbours: int
    neighbour_agreement: float | None
    num_differences: int
    difference_nrmse: float | None

    @classmethod
    def total(cls, layers: Sequence[StateFidelity]) -> StateFidelity:
        """All layers together: means over all their values, tokens or differences."""
        return cls(
            nrmse=_root_mean((each.nrmse, each.num_values) for each in layers),
            max_sigma=_extreme(max, (each.max_sigma for each in layers)),
            mean_cosine=_mean((each.mean_cosine, each.num_tokens) for each in layers),
            min_cosine=_extreme(min, (each.min_cosine for each in layers)),
            neighbour_agreement=_mean(
                (each.neighbour_agreement, each.num_neighbours) for each in layers
            ),
            difference_nrmse=_root_mean(
                (each.difference_nrmse, each.num_differences) for each in layers
            ),
            **_sums(layers, "num_tokens", "num_neighbours", "num_differences"),
        )

    def problem(self, limit: float) -> str | None:
        """Why an error exceeds `limit` sigma; None if none does."""
        if self.max_sigma is None:
            # Without a channel that varies there is no sigma, but equal values pass every limit.
            return f"errors of {self.max_error:g} without a sigma" if self.max_error else None
        if self.max_sigma <= limit:
            return None
        return f"the largest error is {self.max_sigma:.6g} sigma, more than {limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFidelity(LayerFidelity):
    """Attention weights of one layer, or of all.

    Attributes
    ----------
    nrmse
        ``sqrt(mean(error ** 2))`` divided by `rms`.
    rms
        ``sqrt(mean(value ** 2))`` of A.
    num_edges
        Pairs of a query and a key up to it whose mean weight over heads exceeds the threshold in A,
        as `h5traces.graph` makes graphs.
    num_added, num_removed
        Edges that only B has, and that only A has.
    num_rows, mean_kl, max_kl
        Rows with weights, and the Kullback-Leibler divergence of B's row from A's in nats, both
        scaled to sum to 1. A weight that is zero in B only counts as 2^-24.
    """

    rms: float | None
    num_edges: int
    num_added: int
    num_removed: int
    num_rows: int
    mean_kl: float | None
    max_kl: float | None

    @property
    def num_flips(self) -> int:
        """Edges that only one archive has."""
        return self.num_added + self.num_removed

    @property
    def flip_share(self) -> float | None:
        """`num_flips` per edge of A; None if A has no edge but B has."""
        if not self.num_edges:
            return None if self.num_flips else 0.0
        return self.num_flips / self.num_edges

    @classmethod
    def total(cls, layers: Sequence[WeightFidelity]) -> WeightFidelity:
        """All layers together: means over all their weights or rows."""
        rms = _root_mean((each.rms, each.num_values) for each in layers)
        error = _root_mean(
            ((each.nrmse or 0) * (each.rms or 0), each.num_values) for each in layers
        )
        return cls(
            nrmse=error / rms if rms and error is not None else None,
            rms=rms,
            mean_kl=_mean((each.mean_kl, each.num_rows) for each in layers),
            max_kl=_extreme(max, (each.max_kl for each in layers)),
            **_sums(layers, "num_edges", "num_added", "num_removed", "num_rows"),
        )

    def problem(self, limit: float) -> str | None:
        """Why more than `limit` of the edges flip; None if no more do."""
        if self.num_flips <= limit * self.num_edges:
            return None
        return f"{self.num_flips} of {self.num_edges} edges flip, more than {limit:g} of them"


@dataclass(frozen=True, slots=True)
class KindFidelity:
    """One kind of arrays.

    Attributes
    ----------
    kind, reference
        The kind in B, and the kind in A that it was compared with: the same, or ``attentions``,
        whose mean over heads is compared with ``attention_mean``.
    total, layers
        All layers together, and each.
    """

    kind: str
    reference: str
    total: StateFidelity | WeightFidelity
    layers: list[StateFidelity] | list[WeightFidelity]


@dataclass(slots=True)
class Unmatched:
    """Samples and arrays that only one of the archives has.

    Attributes
    ----------
    samples
        Ids, with their generation unless it is the first, or indices of samples without an id.
    arrays
        By kind and layer, such as ``attentions/layer_005``: in how many of the samples compared.
    """

    samples: list[str] = field(default_factory=list)
    arrays: dict[str, int] = field(default_factory=dict)

    def kinds(self) -> dict[str, int]:
        """Number of layers by kind."""
        return dict(Counter(path.partition("/")[0] for path in self.arrays))


@dataclass(slots=True)
class FidelityReport(Report):
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
        What was not compared, since the other archive has no such thing.
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
        """The layers that exceed a limit, a line each; empty if all is well.

        Parameters
        ----------
        max_sigma
            Largest error of hidden states, in sigma.
        max_flips
            Largest number of flipped edges per edge of A.

        Notes
        -----
        NaN and infinite values at different places always exceed a limit; so does a kind with a
        limit that was not compared.
        """
        found = []
        for limit, measure, what in (
            (max_sigma, StateFidelity, "hidden states"),
            (max_flips, WeightFidelity, "attentions"),
        ):
            if limit is not None:
                found += self._exceeding(limit, measure, what)
        return found

    def _exceeding(self, limit: float, measure: type[LayerFidelity], what: str) -> list[str]:
        kinds = [each for each in self.kinds if isinstance(each.total, measure)]
        if not kinds:
            return [f"no {what} were compared, so they cannot be within a limit"]
        found = []
        for kind in kinds:
            for each in kind.layers:
                problem = each.problem(limit)
                if each.num_misplaced:
                    problem = f"{each.num_misplaced} values are not finite in one archive only"
                if problem is not None:
                    found.append(f"{kind.kind}/{each.name}: {problem}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values; None for infinite ones."""
        document = asdict(self)
        for found, kind in zip(document["kinds"], self.kinds, strict=True):
            found["total"] = _as_dict(kind.total)
            found["layers"] = [_as_dict(each) for each in kind.layers]
        return document


def _as_dict(layer: LayerFidelity) -> dict[str, Any]:
    found = asdict(layer)
    if isinstance(layer, WeightFidelity):
        found |= {"num_flips": layer.num_flips, "flip_share": layer.flip_share}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }


def _sums(layers: Sequence[LayerFidelity], *counts: str) -> dict[str, Any]:
    """What all totals have, and the sums of more counts."""
    counts += ("num_values", "num_from_zero", "num_to_zero", "num_not_finite", "num_misplaced")
    found: dict[str, Any] = {name: sum(getattr(each, name) for each in layers) for name in counts}
    for name in ("num_samples", "max_error", "max_relative"):
        found[name] = max((getattr(each, name) for each in layers), default=0)
    return {"name": "total", **found}


def _mean(parts: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean over all, from means over parts of these sizes."""
    known = [(mean, count) for mean, count in parts if mean is not None and count]
    total = sum(count for _, count in known)
    return sum(mean * count for mean, count in known) / total if total else None


def _root_mean(parts: Iterable[tuple[float | None, int]]) -> float | None:
    """As `_mean`, of root mean squares."""
    mean = _mean((None if root is None else root * root, count) for root, count in parts)
    return None if mean is None else math.sqrt(mean)


def _extreme(
    choose: Callable[[list[float]], float], values: Iterable[float | None]
) -> float | None:
    known = [each for each in values if each is not None]
    return choose(known) if known else None
