"""Which samples and arrays of two archives belong together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from h5traces.errors import FidelityError
from h5traces.format import layout

if TYPE_CHECKING:
    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace

# Sample id, generation and how many such came before; or index, where there is no id.
SampleKey = tuple[str | None, int | None, int]

_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class SamplePairs:
    """Samples that belong together.

    Attributes
    ----------
    indices
        Index in A and in B, in the order of A.
    only_in_a, only_in_b
        Names of the others.
    matched_by
        ``id``, ``ordinal``, or ``id and ordinal``.
    """

    indices: list[tuple[int, int]]
    only_in_a: list[str]
    only_in_b: list[str]
    matched_by: str


def pair_samples(a: Archive, b: Archive) -> SamplePairs:
    """Match samples by id and generation, those without an id by index.

    Samples that share both are matched in their order. Where one archive has no ids at all, all are
    matched by index.

    Raises
    ------
    FidelityError
        They have none in common.
    """
    keys_a, keys_b = _keys(a), _keys(b)
    if not all(any(key[0] is not None for key in keys) for keys in (keys_a, keys_b)):
        keys_a, keys_b = _ordinals(a), _ordinals(b)
    places = {key: index for index, key in enumerate(keys_b)}
    found = [(index, places[key]) for index, key in enumerate(keys_a) if key in places]
    known = set(keys_a)
    only_in_a = [_named(key) for key in keys_a if key not in places]
    only_in_b = [_named(key) for key in keys_b if key not in known]
    if not found:
        message = (
            f"{_place(a)} and {_place(b)} have no sample in common: the first has "
            f"{_listed(only_in_a)}, the second {_listed(only_in_b)}; expected archives of the same "
            "samples"
        )
        raise FidelityError(message)
    has_id = {keys_a[index][0] is not None for index, _ in found}
    ways = (["id"] if True in has_id else []) + (["ordinal"] if False in has_id else [])
    return SamplePairs(found, only_in_a, only_in_b, " and ".join(ways))


def _keys(archive: Archive) -> list[SampleKey]:
    repeats: Counter[tuple[str, int | None]] = Counter()
    keys: list[SampleKey] = []
    for index, trace in enumerate(archive):
        sample_id, generation = trace.metadata.sample_id, trace.metadata.generation_index
        if sample_id is None:
            keys.append((None, None, index))
            continue
        keys.append((sample_id, generation, repeats[sample_id, generation]))
        repeats[sample_id, generation] += 1
    return keys


def _ordinals(archive: Archive) -> list[SampleKey]:
    return [(None, None, index) for index in range(len(archive))]


def _named(key: SampleKey) -> str:
    sample_id, generation, number = key
    if sample_id is None:
        return f"index {number}"
    name = f"{sample_id} (generation {generation})" if generation else sample_id
    return f"{name}, number {number + 1} of that name" if number else name


def _place(archive: Archive) -> str:
    more = len(archive.paths) - 1
    return f"{archive.paths[0]}" + (f" and {more} more" if more else "")


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return (", ".join(names[:_MOST_NAMED]) or "none") + (f" and {more} more" if more > 0 else "")


def stored_names(trace: Trace, kind: str) -> list[str]:
    """Datasets of a kind, the embedding first, then by layer."""
    names = [layout.layer_name(layer) for layer in trace.stored_layers(kind)]
    embedding = f"{kind}/{layout.EMBEDDING}" in trace.objects
    return [layout.EMBEDDING, *names] if embedding else names


def stored_kinds(trace: Trace) -> list[str]:
    """Kinds of which a trace has an array, in their order in the file."""
    paths = (path.partition("/") for path in trace.objects)
    found = (
        kind
        for kind, _, name in paths
        if name == layout.EMBEDDING or layout.parse_layer_name(name) is not None
    )
    return list(dict.fromkeys(found))
