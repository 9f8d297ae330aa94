"""Archives that go to a server: each is finished and verified on disk, then uploaded whole."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from h5traces.errors import ArchiveExistsError, H5TracesError, OptionError, TargetError
from h5traces.format.text import utc_now
from h5traces.ranks.plan import RANKS, RUN, RunPlan, parse_plan, serialised
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath, is_url

if TYPE_CHECKING:
    from h5traces.paths import Source, Target
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
        """Uploads to a folder of a bucket; None where `dest` is none."""
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


class UploadedRun:
    """The share of a rank whose archives go to a server; see `RankRun`.

    The first rank writes the plan, and each archive has an object of its own that says what became
    of it, since objects cannot be appended to.

    Attributes
    ----------
    plan
        The plan in force.
    """

    def __init__(self, uploads: Uploads, rank: Rank, plan: RunPlan) -> None:
        from h5traces.storage.remote.uploading import put_new, read_document_at

        if str(plan.options.get("scales")).startswith("measured"):
            message = (
                f"{uploads.url}: ranks that upload cannot share scales that one of them measures; "
                "calibrate first, and pass scales"
            )
            raise OptionError(message)
        self._uploads, self._rank, self.plan = uploads, rank, plan
        place = RemotePath(f"{uploads.url}{RUN}")
        if put_new(place, serialised(plan), DEFAULT_REMOTE):
            return
        before = parse_plan(read_document_at(place, DEFAULT_REMOTE), str(place))
        differences = plan.differences(before)
        if differences:
            message = (
                f"{uploads.url}: its run was planned otherwise: {'; '.join(differences)}. Run the "
                f"ranks alike, or name another folder; where no rank runs, deleting {place} allows "
                "another plan"
            )
            raise TargetError(message)

    def note(self, item: int, **facts: Any) -> None:
        """Write down what became of a piece of work, unless that was done before."""
        from h5traces.storage.remote.uploading import put_new

        line = {"event": "item", "time": utc_now(), "item": item, **facts}
        name = f"{RANKS}/{self._rank.name}/{item:07d}-{facts.get('status')}.json"
        put_new(
            RemotePath(f"{self._uploads.url}{name}"),
            json.dumps(line).encode("utf-8", "surrogatepass"),
            DEFAULT_REMOTE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
