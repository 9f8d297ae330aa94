"""Archives that go to a server: each is finished and verified on disk, then uploaded whole."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from h5traces.errors import ArchiveExistsError, H5TracesError, OptionError, TargetError
from h5traces.ranks.bucket import BucketRun
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath, is_url

if TYPE_CHECKING:
    from h5traces.paths import Source, Target
    from h5traces.ranks.plan import RunPlan
    from h5traces.ranks.rank import Rank
    from h5traces.rewriting.convert_plan import Job
    from h5traces.rewriting.reports import FileReport


@dataclass(frozen=True, slots=True)
class Uploads:
    """Where archives go that a conversion makes in a folder on disk.

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

    def run(self, rank: Rank, plan: RunPlan) -> BucketRun:
        """The share of a rank."""
        if str(plan.options.get("scales")).startswith("measured"):
            message = (
                f"{self.url}: ranks that upload cannot share scales that one of them measures; "
                "calibrate first, and pass scales"
            )
            raise OptionError(message)
        return BucketRun(self.url, rank, plan)

    def place(self, path: Path) -> RemotePath:
        """The address that a file gets."""
        return RemotePath(f"{self.url}{path.relative_to(self.folder).as_posix()}")

    def existing(self, job: Job) -> ExistingUploads | None:
        """The archives of a job that are on the server; None if there are none."""
        from h5traces.storage.remote.uploading import exists

        found: list[RemotePath] = []
        while exists(place := self.place(job.target.shard(len(found))), DEFAULT_REMOTE):
            found.append(place)
            if job.target.shard_samples is None:
                break
        return ExistingUploads(job.target, found) if found else None

    def send(self, report: FileReport, *, overwrite: bool) -> None:
        """Upload the archives of a job, the first one last, and delete them here."""
        from h5traces.storage.remote.uploading import upload

        paths = [Path(each) for each in report.targets]
        report.targets = [str(self.place(path)) for path in paths]
        try:
            for path in reversed(paths):
                upload(path, self.place(path), DEFAULT_REMOTE, overwrite=overwrite)
        except (H5TracesError, OSError) as error:
            report.status, report.error = "failed", str(error)
            report.is_usage_error = isinstance(error, ArchiveExistsError)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)


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
