"""Archives that go to a server: each is finished and verified on disk, then uploaded whole."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from h5traces.archive.opening import open as open_archive
from h5traces.errors import ArchiveExistsError, H5TracesError, TargetError
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath, is_url
from h5traces.writing.shards import holds, sample_digests

if TYPE_CHECKING:
    from h5traces.paths import Source, Target
    from h5traces.rewriting.convert_plan import Job
    from h5traces.rewriting.reports import FileReport


@dataclass(frozen=True, slots=True)
class Uploads:
    """Where archives go that are made in a folder on disk.

    Attributes
    ----------
    folder
        The folder on disk, which holds one archive at a time for each process.
    url
        The folder on the server, which ends in a slash.
    """

    folder: Path
    url: str

    @classmethod
    def to(cls, dest: Source) -> Self | None:
        """Uploads to a folder of a bucket; None if `dest` is none."""
        if not is_url(dest) or RemotePath(str(dest)).protocol not in ("s3", "s3a"):
            return None
        if not str(dest).endswith("/"):
            message = f"{dest}: only folders of a bucket can be written; end it in a slash"
            raise TargetError(message)
        return cls(Path(tempfile.gettempdir(), f"h5traces-{uuid.uuid4().hex}"), str(dest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def run_folder(self) -> RemotePath:
        """Where the plan of a run of ranks is."""
        return RemotePath(self.url)

    def place(self, path: Path) -> RemotePath:
        """The address that a file gets."""
        return RemotePath(f"{self.url}{path.relative_to(self.folder).as_posix()}")

    def existing(self, job: Job) -> ExistingUploads | None:
        """The archives of a job that are on the server, or None."""
        from h5traces.storage.remote.uploading import exists

        found: list[RemotePath] = []
        while exists(place := self.place(job.target.shard(len(found))), DEFAULT_REMOTE):
            found.append(place)
            if job.target.shard_samples is None:
                break
        return ExistingUploads(job.target, found) if found else None

    def send(self, report: FileReport, *, overwrite: bool) -> None:
        """Upload the archives of a job, the first one last, and delete them here."""
        paths = [Path(each) for each in report.targets]
        report.targets = [str(self.place(path)) for path in paths]
        try:
            sent = [self.upload(path, overwrite=overwrite) for path in reversed(paths)]
            report.status = "converted" if any(sent) else "skipped"
        except (H5TracesError, OSError) as error:
            report.status, report.error = "failed", str(error)
            report.is_usage_error = isinstance(error, ArchiveExistsError)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def upload(self, path: Path, *, overwrite: bool = False) -> bool:
        """Upload one archive; false if another process was faster, with the same samples."""
        from h5traces.storage.remote.uploading import upload

        place = self.place(path)
        try:
            upload(path, place, DEFAULT_REMOTE, overwrite=overwrite)
        except ArchiveExistsError:
            with open_archive(path) as archive:
                digests = sample_digests(archive._files[0])
            if not holds(place, digests):
                raise
            return False
        return True


def private_folder(name: str) -> Path:
    """A folder of this name for files on their way, which another start of the run finds again."""
    path = Path(tempfile.gettempdir(), f"h5traces-{name}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        message = f"{path}: belongs to somebody else; set TMPDIR to a folder of yours"
        raise TargetError(message)
    return path


@dataclass(frozen=True, slots=True)
class ExistingUploads:
    """The archives of a target, on a server.

    Attributes
    ----------
    target
        Where they would be on disk.
    shards
        Their addresses.
    """

    target: Target
    shards: list[RemotePath]

    @property
    def shard_samples(self) -> int | None:
        """The largest number of samples in one."""
        return self.target.shard_samples

    def existing(self) -> list[RemotePath]:
        """Their addresses, in order."""
        return self.shards
