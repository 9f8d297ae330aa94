"""Files that are read at random, as maps: of compressed ones, what they hold."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError
from h5traces.sources.compressed import STEP_NBYTES
from h5traces.sources.mapped import MappedFile
from h5traces.sources.pickle.source import FileSource, PickleLimits
from h5traces.sources.signatures import identify

if TYPE_CHECKING:
    from pathlib import Path

# What is kept in memory of a compressed file; more goes to a temporary file without a name.
_MEMORY_NBYTES: Final = 32 << 20
_LIMITS: Final = PickleLimits()


def mapped_file(path: Path, limits: PickleLimits = _LIMITS) -> MappedFile:
    """A file as a map; a compressed one is decompressed first, within `limits`.

    Raises
    ------
    ConversionError
        The compressed file is cut off or damaged, or the disk for temporary files is full.
    UnsafePickleError
        It expands more than `limits` allow.
    """
    if identify(path).compression is None:
        return MappedFile(path)
    with FileSource(path, limits) as source, tempfile.SpooledTemporaryFile(_MEMORY_NBYTES) as file:
        while block := source.file.read(STEP_NBYTES):
            try:
                file.write(block)
            except OSError as error:
                message = f"{path}: cannot be decompressed in {tempfile.gettempdir()}: {error}"
                raise ConversionError(message) from error
        if file.tell() <= _MEMORY_NBYTES:
            file.seek(0)
            return MappedFile(path, file.read())
        file.flush()
        return MappedFile(path, descriptor=file.fileno())
