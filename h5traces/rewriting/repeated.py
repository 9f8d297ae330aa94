"""Samples that several archives hold, the same or nearly so: a merge would store them twice."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format import layout
from h5traces.format.digests import DIGEST
from h5traces.format.text import and_more, counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.format.entries import ObjectEntry

_SAME: Final = "byte for byte"
_OTHER_FACTS: Final = "with other labels, scores or texts"
_OTHER_TYPE: Final = "with arrays of another type"
_PLAIN_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
_MOST_NAMED: Final = 3


def repeated_samples(archive: Archive, indices: Sequence[int]) -> list[str]:
    """Warnings that name samples which several files hold under one id.

    Besides those that are the same byte for byte, these are samples whose arrays are the same but
    not what is said about them, and samples whose arrays hold the same values in a wider type.
    """
    if len(archive._files) == 1:
        return []
    found: defaultdict[str, list[str]] = defaultdict(list)
    for group in _of_one_id(archive, indices):
        earlier: list[Trace] = []
        for trace in group:
            for other in earlier:
                how = None if other.path == trace.path else _how_alike(other, trace)
                if how is not None:
                    name = _attrs(trace).get("sample_id")
                    found[how].append(f"{name!r} of {other.path} and {trace.path}")
                    break
            earlier.append(trace)
    return [
        f"{counted(len(names), 'sample is', 'samples are')} stored twice, {how}: "
        f"{and_more(names, _MOST_NAMED)}"
        for how, names in found.items()
    ]


def _of_one_id(archive: Archive, indices: Sequence[int]) -> list[list[Trace]]:
    """Samples that share an id and their tokens, where they lie in several files."""
    by_id: defaultdict[object, list[Trace]] = defaultdict(list)
    for trace in (archive[index] for index in indices):
        name = _attrs(trace).get("sample_id")
        if name is not None:
            by_id[name].append(trace)
    found: list[list[Trace]] = []
    for group in by_id.values():
        if len({trace.path for trace in group}) > 1:
            alike: defaultdict[object, list[Trace]] = defaultdict(list)
            for trace in group:
                alike[_tokens_digest(trace)].append(trace)
            found += (each for each in alike.values() if len(each) > 1)
    return found


def _attrs(trace: Trace) -> dict[str, Any]:
    return dict(trace._stored.file.sample_attrs(trace.position_in_file))


def _tokens_digest(trace: Trace) -> object:
    objects = trace._stored.objects
    return objects[layout.TOKENS].attrs.get(DIGEST) if layout.TOKENS in objects else None


def _how_alike(first: Trace, second: Trace) -> str | None:
    """How two samples are the same; None if they are not."""
    digests = [_attrs(each).get(DIGEST) for each in (first, second)]
    if digests[0] == digests[1] and digests[0] is not None:
        return _SAME
    one, two = _arrays(first), _arrays(second)
    if not one or one.keys() != two.keys():
        return None
    if any(one[path].shape != two[path].shape for path in one):
        return None
    if all(one[path].attrs.get(DIGEST) == two[path].attrs.get(DIGEST) for path in one):
        return _OTHER_FACTS
    same_types = all(one[path].dtype == two[path].dtype for path in one)
    return None if same_types or not _same_values(first, second, one, two) else _OTHER_TYPE


def _arrays(trace: Trace) -> dict[str, ObjectEntry]:
    """The datasets of layers, by path."""
    stored = trace._stored
    kinds = stored.file.store.kinds
    paths = (path for path in stored.objects if path.partition("/")[0] in kinds)
    entries = {path: stored.objects[path] for path in paths}
    return {path: each for path, each in entries.items() if not each.is_group}


def _same_values(
    first: Trace, second: Trace, one: dict[str, ObjectEntry], two: dict[str, ObjectEntry]
) -> bool:
    """Whether all layers hold the same numbers; ends at the first that does not."""
    for path, entry in one.items():
        left = _as_float64(first, entry)
        right = None if left is None else _as_float64(second, two[path])
        if left is None or right is None or not np.array_equal(left, right, equal_nan=True):
            return False
    return True


def _as_float64(trace: Trace, entry: ObjectEntry) -> NDArray[np.float64] | None:
    """The numbers of a layer that is stored as floats; None for an encoded one."""
    if entry.dtype not in _PLAIN_FLOATS:
        return None
    values = trace._stored.values(entry.path)
    if entry.dtype == "bfloat16":
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
