"""What files read as one sequence must share, and what archives made of them inherit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.archive.scales import stored_scales
from h5traces.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.archive import ArchiveMetadata
    from h5traces.precision.scales import ScaleSet

# What must agree among shards that are read as one sequence.
_SHARED_FIELDS = ("model_id", "model_revision", "num_layers", "hidden_size", "num_heads", "layers")
# What must agree where a file that does not have it is not just silent, but says so.
_SHARED_OR_ABSENT = ("precision", "earlier_precisions")
SHARED_FACTS = (*_SHARED_FIELDS, *_SHARED_OR_ABSENT)


def _fact(file: ArchiveFile, name: str) -> Any:
    """A fact of a file's metadata; its stored layers are spelled out."""
    return (file.layers or None) if name == "layers" else getattr(file.metadata, name)


def _stated(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "exact" if value is None else str(value)


def check_alike(files: Sequence[ArchiveFile]) -> None:
    """Raise ArchiveError for archives of different models, layers or precisions."""
    if not files:
        message = "there is no archive to open"
        raise ArchiveError(message)
    first = files[0]
    for other in files[1:]:
        for name in _SHARED_OR_ABSENT:
            ours, theirs = getattr(first.metadata, name), getattr(other.metadata, name)
            if ours != theirs and first.num_samples and other.num_samples:
                message = (
                    f"{other.path} has {name} {_stated(theirs)}, but {first.path} has "
                    f"{_stated(ours)}; shards read as one must be equally precise; open them one "
                    "by one"
                )
                raise ArchiveError(message)
        for name in _SHARED_FIELDS:
            ours, theirs = _fact(first, name), _fact(other, name)
            # What a file does not know contradicts nothing: it may hold empty samples only.
            if ours != theirs and None not in (ours, theirs):
                message = (
                    f"{other.path} has {name}={theirs!r}, but {first.path} has {name}={ours!r}; "
                    "shards read as one must be of one model and one set of layers; open them "
                    "one by one"
                )
                raise ArchiveError(message)


# Facts that a new archive takes over where all its sources agree.
_FACTS: Final = ("model_id", "model_revision", "dataset", "num_layers", "extraction")


def inherited_facts(files: Sequence[ArchiveFile]) -> dict[str, Any]:
    """Facts that all sources state alike."""
    facts = {}
    for name in _FACTS:
        values = [getattr(file.metadata, name) for file in files]
        facts[name] = values[0] if all(each == values[0] for each in values) else None
    return facts


def shared_metadata(files: Sequence[ArchiveFile]) -> ArchiveMetadata:
    """Metadata of the first file with samples, which states the precision of all."""
    return next((file.metadata for file in files if file.num_samples), files[0].metadata)


def inherited_scales(files: Sequence[ArchiveFile]) -> ScaleSet | None:
    """The scales that stored integers of all files are read with; ArchiveError if they differ."""
    first: tuple[ArchiveFile, ScaleSet] | None = None
    for file in files:
        found = stored_scales(file.store) if file.num_samples else None
        if found is None:
            continue
        if first is None:
            first = file, found
        elif not found.equals(first[1]):
            message = (
                f"{file.path} and {first[0].path} have different scales, so their chunks cannot go "
                "into one archive; keep them as shards, which are read as one"
            )
            raise ArchiveError(message)
    return None if first is None else first[1]
