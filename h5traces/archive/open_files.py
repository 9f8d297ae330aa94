"""How many files of an archive stay open."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from h5traces.storage.remote.paths import RemotePath

if TYPE_CHECKING:
    from h5traces.archive.file import ArchiveFile

# Files kept open at a time; the usual limit on descriptors is 1024 for the whole process, and
# where it is lower, other files need most of them.
MAX_OPEN_FILES = 64
_MOST_OF_LIMIT = 1 / 4
# Those on servers take no descriptor but their footers in memory, and new requests when reopened.
MAX_OPEN_REMOTE_FILES = 128


def _most_open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else int(soft * _MOST_OF_LIMIT)
    return max(1, min(MAX_OPEN_FILES, allowed))


class OpenFiles:
    """Closes the file that was not used for longest when too many are open."""

    def __init__(self) -> None:
        self._local: OrderedDict[int, ArchiveFile] = OrderedDict()
        self._remote: OrderedDict[int, ArchiveFile] = OrderedDict()
        self._lock = threading.Lock()

    def use(self, file: ArchiveFile) -> None:
        """Note that `file` is about to be read."""
        is_remote = isinstance(file.path, RemotePath)
        used = self._remote if is_remote else self._local
        with self._lock:
            if id(file) in used:
                used.move_to_end(id(file))
                return
            used[id(file)] = file
            most = MAX_OPEN_REMOTE_FILES if is_remote else _most_open_files()
            while len(used) > most:
                _, oldest = used.popitem(last=False)
                oldest.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()
