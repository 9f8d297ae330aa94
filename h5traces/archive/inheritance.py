"""What a rewritten archive takes over from those it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.archive.scales import stored_scales
from h5traces.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.archive import ArchiveMetadata
    from h5traces.precision.scales import ScaleSet

# What archives that become one must have said alike, or not at all.
_FACTS: Final = ("model_id", "model_revision", "dataset", "num_layers", "extraction")


def inherited_facts(files: Sequence[ArchiveFile]) -> dict[str, Any]:
    """Facts that all sources state alike."""
    facts = {}
    for name in _FACTS:
        values = [getattr(file.metadata, name) for file in files]
        facts[name] = values[0] if all(each == values[0] for each in values) else None
    return facts


def shared_metadata(files: Sequence[ArchiveFile]) -> ArchiveMetadata:
    """Metadata that tells how precise files are that go together.

    It is the first one's; files without samples have no say where others have some.
    """
    return next((file.metadata for file in files if file.num_samples), files[0].metadata)


def inherited_scales(files: Sequence[ArchiveFile]) -> ScaleSet | None:
    """The scales that stored integers of all files are read with.

    Raises
    ------
    ArchiveError
        Files have different ones, so that their chunks cannot go into one archive.
    """
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
