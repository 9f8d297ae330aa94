"""What became of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from h5traces.errors import ExtractionError
from h5traces.storage.publish import PartFile, make_folder

if TYPE_CHECKING:
    from h5traces.extract.estimate import Estimate

SkipReason = Literal["too_long", "out_of_memory", "nan"]
Status = Literal["planned", "stopped", "failed", "finished"]


@dataclass(frozen=True)
class Skipped:
    """A sample that is not in the archive.

    Attributes
    ----------
    sample_id, row
        Which.
    reason
        Why, for programs.
    message
        Why, for people.
    """

    sample_id: str
    row: int
    reason: SkipReason
    message: str


@dataclass
class ExtractionReport:
    """What became of a run.

    Attributes
    ----------
    output
        Archive, or folder of shards.
    status
        ``planned`` in a dry run; ``stopped`` or ``failed`` runs go on when started again.
    num_planned
        Samples asked for.
    num_before
        Samples that earlier starts had written.
    num_written
        Samples that this start wrote.
    skipped
        Samples that are not in the archive, and why.
    halved
        Batches that did not fit into memory and were halved: the ids of their samples.
    num_tokens
        Tokens of the samples written, prompts included.
    num_generated
        Of these, tokens of answers.
    nbytes
        Bytes of the samples written.
    seconds
        Wall-clock time, without loading the model.
    free_nbytes
        Room on the disk at the start.
    needed_nbytes
        Room that the samples to be written need at most, while a shard is being packed.
    estimate
        The forecast.
    warnings
        What casts changed in the samples written.
    error
        Why the run failed.
    """

    output: str
    status: Status = "planned"
    num_planned: int = 0
    num_before: int = 0
    num_written: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    halved: list[list[str]] = field(default_factory=list)
    num_tokens: int = 0
    num_generated: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    free_nbytes: int = 0
    needed_nbytes: float = 0.0
    estimate: Estimate | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for is in the archive, or would be."""
        return self.status in ("planned", "finished") and not self.skipped

    @property
    def tokens_per_second(self) -> float:
        """Tokens of samples per second of wall-clock time."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        found = {
            **asdict(self),
            "estimate": self.estimate.as_dict() if self.estimate else None,
        }
        return {"ok": self.ok, "tokens_per_second": self.tokens_per_second, **found}

    def save(self) -> None:
        """Write the report beside the output, in one step, over that of an earlier start."""
        path = report_path(Path(self.output))
        make_folder(path.parent)
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        with PartFile(path) as part:
            part.append(text.encode("utf-8", "surrogatepass"))
            part.publish(overwrite=True)


def report_path(output: Path) -> Path:
    """Where the report of a run lies: beside its archive or folder."""
    return output.with_name(f"{output.name}.report.json")


def skipped_before(output: Path) -> dict[str, Skipped]:
    """Samples that earlier starts left out, by id.

    Raises
    ------
    ExtractionError
        There is a report that is none.
    """
    path = report_path(output)
    try:
        document = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        found = [Skipped(**each) for each in document["skipped"]]
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        message = f"{path}: is no report of an extraction ({error!r}); move it away"
        raise ExtractionError(message) from error
    return {each.sample_id: each for each in found}
