"""Labels of samples, complete before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from h5traces.errors import DatasetError
from h5traces.torch_data.tensors import named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace

Labels = Mapping[Any, Any] | str
# A sample's id, and its generation index where several share the id.
Key = tuple[Any, int | None]
_MOST_NAMED = 5


def labels_of(
    archive: Archive, indices: Sequence[int], labels: Labels, *, allow_unused: bool
) -> list[Any]:
    """The label of every sample, in the order of `indices`.

    Parameters
    ----------
    archive, indices
        The samples.
    labels
        Values by sample id, or by (sample id, generation index) where ids repeat; or the name of
        what the archive itself knows: ``label``, or one of its ``scores``.
    allow_unused
        Whether a mapping may hold ids that no sample has.

    Raises
    ------
    DatasetError
        A sample has no label, an id is ambiguous, or a label belongs to no sample; the message
        names shard and sample.
    """
    if isinstance(labels, str):
        return [_stored_label(archive[index], labels) for index in indices]
    ids = Counter(archive.ids)
    keys = [
        (each, archive[index].metadata.generation_index if ids[each] > 1 else None)
        for index, each in enumerate(archive.ids)
    ]
    where = ", ".join(str(path) for path in archive.paths[:_MOST_NAMED])
    return mapped_labels(
        keys,
        indices,
        labels,
        place=lambda index: named(archive[index]),
        where=where,
        allow_unused=allow_unused,
    )


def _stored_label(trace: Trace, name: str) -> Any:
    metadata = trace.metadata
    value: Any = metadata.label if name == "label" else (metadata.scores or {}).get(name)
    if value is None:
        known = sorted(metadata.scores or {}) + (["label"] if metadata.label is not None else [])
        message = (
            f"{named(trace)}: has no label {name!r}; stored: {', '.join(known) or 'none'}; pass "
            "labels={sample_id: value}, or leave the sample out with indices="
        )
        raise DatasetError(message)
    return value


def mapped_labels(
    keys: Sequence[Key],
    indices: Sequence[int],
    labels: Mapping[Any, Any],
    *,
    place: Callable[[int], str],
    where: str,
    allow_unused: bool,
) -> list[Any]:
    """The labels that a mapping has for some samples.

    Parameters
    ----------
    keys
        Id and generation index of all samples.
    indices
        Which of them to label.
    labels
        Values by id, or by both.
    place
        Names a sample, for messages.
    where
        Names the shards, for messages.
    allow_unused
        Whether the mapping may hold ids that no sample has.

    Raises
    ------
    DatasetError
        As `labels_of`.
    """
    ids = Counter(sample_id for sample_id, _ in keys)
    found = []
    for index in indices:
        sample_id, _ = key = keys[index]
        if key in labels:
            found.append(labels[key])
        elif sample_id not in labels:
            message = (
                f"{place(index)}: labels holds no value for it; a missing label is never 0: add "
                "it, or leave the sample out"
            )
            raise DatasetError(message)
        elif ids[sample_id] > 1:
            message = (
                f"{place(index)}: {ids[sample_id]} samples have that id, so one label for it would "
                "be given to all of them; use the keys (sample_id, generation_index)"
            )
            raise DatasetError(message)
        else:
            found.append(labels[sample_id])
    unused = [] if allow_unused else [key for key in labels if _id_of(key) not in ids]
    if unused:
        names = ", ".join(repr(key) for key in unused[:_MOST_NAMED])
        more = f" and {len(unused) - _MOST_NAMED} more" if len(unused) > _MOST_NAMED else ""
        message = (
            f"{where}: labels names {names}{more}, which no sample there has as its id; check the "
            "ids, or pass allow_unused_labels=True for shards that hold a part of the data"
        )
        raise DatasetError(message)
    return found


def _id_of(key: Any) -> Any:
    return key[0] if isinstance(key, tuple) and key else key
