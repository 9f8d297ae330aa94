"""Reading: archives, traces and their arrays."""

from h5traces.archive.archive import Archive
from h5traces.archive.archive_file import ArchiveFile
from h5traces.archive.layer_sequence import LayerSequence
from h5traces.archive.opening import expand_paths, expand_sources, load, open_archive
from h5traces.archive.trace import Trace

__all__ = [
    "Archive",
    "ArchiveFile",
    "LayerSequence",
    "Trace",
    "expand_paths",
    "expand_sources",
    "load",
    "open_archive",
]
