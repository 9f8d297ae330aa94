"""Faults at a chosen call to the system, and a log of all calls that change files.

`System` replaces functions of ``os`` in this process, so it is for a child process that ends after
one scenario. h5traces writes through these functions only; HDF5 itself writes through a Python file
object.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a fault can hit.
CALLS = ("open", "pwrite", "ftruncate", "fsync", "link", "unlink", "replace", "mkdir", "rmdir")


@dataclass(frozen=True)
class Event:
    """One call that changed files, or an acknowledgement.

    Attributes
    ----------
    call
        Name of the call; ``create`` for an open that made a file, ``sync_folder`` for an fsync of
        a folder, ``ack`` for an acknowledgement.
    path
        Name that was made, removed or synced, relative to the watched folder.
    file
        Number of the file; a file may have several names, and a name several files one by one.
    offset, data
        What was written where; the new size of a truncated file is its offset.
    acked
        What was acknowledged.
    """

    call: str
    path: str = ""
    file: int = -1
    offset: int = 0
    data: bytes = b""
    old_path: str = ""
    acked: tuple[Any, ...] = ()


@dataclass
class Fault:
    """What happens at which call.

    Attributes
    ----------
    at
        Number of the call, counted from 0 over the calls that the fault can hit.
    action
        ``kill``; ``tear`` (a write is cut in half, then ``kill``); ``int`` or ``term`` (the
        signal); or the name of an error number.
    calls
        The calls that the fault can hit.
    lasting
        Errors go on from then on, as a full disk does.
    """

    at: int
    action: str = "kill"
    calls: tuple[str, ...] = CALLS
    lasting: bool = False


@dataclass
class System:
    """Watches the calls that change a folder, keeps a log of them and makes one of them fail.

    Attributes
    ----------
    folder
        The folder.
    fault
        What fails.
    log
        Whether to keep what is written.
    calls
        Names of the calls so far.
    events
        The log.
    """

    folder: Path
    fault: Fault | None = None
    log: bool = False
    calls: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._real = {name: getattr(os, name) for name in (*CALLS, "close")}
        self._num_hits = 0
        self._files: dict[int, int] = {}
        self._folders: dict[int, str] = {}
        self._names: dict[str, int] = {}
        self._num_files = 0

    def install(self) -> None:
        """Replace the functions of ``os``, for good."""
        for name in (*CALLS, "close"):
            setattr(os, name, getattr(self, f"_{name}"))

    def ack(self, *what: Any) -> None:
        """Log that something was acknowledged."""
        self.events.append(Event("ack", acked=what))

    def _relative(self, path: Any) -> str | None:
        try:
            return str(Path(os.path.abspath(os.fspath(path))).relative_to(self.folder))  # noqa: PTH100
        except (ValueError, TypeError):
            return None

    def _hit(self, call: str, *, tear: Any = None) -> None:
        self.calls.append(call)
        fault = self.fault
        if fault is None or call not in fault.calls:
            return
        number, self._num_hits = self._num_hits, self._num_hits + 1
        if number != fault.at and not (fault.lasting and number > fault.at):
            return
        if fault.action in ("kill", "tear"):
            if fault.action == "tear" and tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "int":
            os.kill(os.getpid(), signal.SIGINT)
        elif fault.action == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            if tear is not None and fault.action == "ENOSPC":
                tear()
            code = getattr(errno, fault.action)
            raise OSError(code, os.strerror(code))

    def _note(self, event: Event) -> None:
        if self.log:
            self.events.append(event)

    def _open(self, path: Any, flags: int, mode: int = 0o777, **kwargs: Any) -> int:
        relative = self._relative(path)
        if relative is None:
            return self._real["open"](path, flags, mode, **kwargs)
        is_new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        if is_new:
            self._hit("open")
        descriptor = self._real["open"](path, flags, mode, **kwargs)
        if flags & os.O_DIRECTORY:
            self._folders[descriptor] = relative
            return descriptor
        if is_new:
            self._num_files += 1
            self._names[relative] = self._num_files
            self._note(Event("create", relative, self._num_files))
        if relative in self._names:
            self._files[descriptor] = self._names[relative]
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._files.pop(descriptor, None)
        self._folders.pop(descriptor, None)
        self._real["close"](descriptor)

    def _pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if descriptor not in self._files:
            return self._real["pwrite"](descriptor, data, offset)
        half = bytes(data)[: len(data) // 2]
        self._hit("pwrite", tear=lambda: self._real["pwrite"](descriptor, half, offset))
        written = self._real["pwrite"](descriptor, data, offset)
        kept = bytes(data[:written]) if self.log else b""
        self._note(Event("pwrite", "", self._files[descriptor], offset, kept))
        return written

    def _ftruncate(self, descriptor: int, size: int) -> None:
        if descriptor in self._files:
            self._hit("ftruncate")
        self._real["ftruncate"](descriptor, size)
        if descriptor in self._files:
            self._note(Event("ftruncate", "", self._files[descriptor], size))

    def _fsync(self, descriptor: int) -> None:
        watched = descriptor in self._files or descriptor in self._folders
        if watched:
            self._hit("fsync")
        self._real["fsync"](descriptor)
        if descriptor in self._folders:
            self._note(Event("sync_folder", self._folders[descriptor]))
        elif watched:
            self._note(Event("fsync", "", self._files[descriptor]))

    def _link(self, source: Any, target: Any, **kwargs: Any) -> None:
        new, old = self._relative(target), self._relative(source)
        if new is not None:
            self._hit("link")
        self._real["link"](source, target, **kwargs)
        if new is not None and old is not None:
            self._names[new] = self._names[old]
            self._note(Event("link", new, self._names[new]))

    def _replace(self, source: Any, target: Any, **kwargs: Any) -> None:
        new, old = self._relative(target), self._relative(source)
        if new is not None:
            self._hit("replace")
        self._real["replace"](source, target, **kwargs)
        if new is not None and old is not None:
            self._names[new] = self._names.pop(old)
            self._note(Event("replace", new, self._names[new], old_path=old))

    def _unlink(self, path: Any, **kwargs: Any) -> None:
        relative = self._relative(path)
        if relative is not None and os.path.lexists(path):
            self._hit("unlink")
        self._real["unlink"](path, **kwargs)
        if relative is not None:
            self._names.pop(relative, None)
            self._note(Event("unlink", relative))

    def _mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        relative = self._relative(path)
        if relative is not None and not os.path.lexists(path):
            self._hit("mkdir")
        self._real["mkdir"](path, *args, **kwargs)
        if relative is not None:
            self._note(Event("mkdir", relative))

    def _rmdir(self, path: Any, **kwargs: Any) -> None:
        relative = self._relative(path)
        if relative is not None:
            self._hit("rmdir")
        self._real["rmdir"](path, **kwargs)
        if relative is not None:
            self._note(Event("rmdir", relative))
