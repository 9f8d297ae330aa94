"""Progress, report and warnings of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from h5traces.errors import ConversionError
from h5traces.format.html import Report
from h5traces.format.text import and_more
from h5traces.meaning.checks import CheckOptions

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.format.dtypes import CastCounts
    from h5traces.meaning.checks import FindingSummary
    from h5traces.sources.collecting import Leftover
    from h5traces.writing.options import WriteOptions


# From this many archives of one sample on, one archive of all is better.
_MANY_SINGLE: Final = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    Attributes
    ----------
    source
        The file being read.
    done_nbytes, total_nbytes
        Bytes of all sources read so far, and to be read.
    num_samples
        Samples written so far.
    """

    source: Path
    done_nbytes: int
    total_nbytes: int
    num_samples: int


@dataclass(slots=True)
class FileReport(Report):
    """The result of one job: one batch file, or all of them with ``merge``.

    Attributes
    ----------
    sources, targets
        Files read, and archives written (or, in a dry run, to be written).
    status
        ``converted``, ``skipped``, ``planned`` or ``failed``.
    num_samples
        Samples in the archives.
    source_nbytes, archive_nbytes
        Sizes of the files before and after.
    raw_nbytes, stored_nbytes
        Bytes of the arrays as stored before and after compression, by kind.
    is_lossless
        Whether every stored array holds every bit of its source; None if none were written.
    kept_layers
        Such as ``3 of 6 layers`` where the archives hold some only; empty if they hold all.
    num_cut
        Padded positions that were cut.
    changes
        What distinguishes them from the sources: casts, with counts, and a tier.
    seconds
        Wall-clock time.
    understood
        How the sources were understood.
    unread
        What of the sources was not read, and why.
    warnings
        Messages for the user.
    findings
        What checks found in the samples, see ``docs/checks.md``.
    error
        Why it failed, where it did.
    is_usage_error
        Whether that is about the arguments: an existing target, or a layer that no source has.
    """

    sources: list[str]
    targets: list[str]
    status: str = "planned"
    num_samples: int = 0
    source_nbytes: int = 0
    archive_nbytes: int = 0
    raw_nbytes: dict[str, int] = field(default_factory=dict)
    stored_nbytes: dict[str, int] = field(default_factory=dict)
    is_lossless: bool | None = None
    kept_layers: str = ""
    num_cut: int = 0
    changes: str = ""
    seconds: float = 0.0
    understood: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    findings: list[FindingSummary] = field(default_factory=list)
    error: str | None = None
    is_usage_error: bool = False


@dataclass(slots=True)
class ConversionReport(Report):
    """The result for every file that was named.

    Attributes
    ----------
    precision
        The lossy precision; None if nothing was lost.
    files
        One report per job.
    leftovers
        Files that were not read though they seem to belong to the others, and why: unfinished
        ``.part`` files, files of a kind that cannot be read.
    unrelated
        Files of the folders that were not read and need not be: notes, tables, archives.
    notes
        What else the user should know.
    checks
        Which findings are shown, and which are a failure.
    """

    precision: str | None = None
    files: list[FileReport] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    unrelated: list[Leftover] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: CheckOptions = CheckOptions()

    @property
    def problems(self) -> list[str]:
        """Why `ok` is false: a message for every file, or part of one, that was not converted."""
        found = [each.error for each in self.files if each.error is not None]
        found += [f"not read: {part}" for each in self.files for part in each.unread]
        found += [each.reason for each in self.leftovers]
        return found + [
            f"{and_more(each.sources, 3)}: {finding}"
            for each in self.files
            for finding in each.findings
            if self.checks.fails([finding])
        ]

    @property
    def ok(self) -> bool:
        """Whether everything that was named is now an archive, without grave findings."""
        return not self.problems

    def raise_for_errors(self) -> None:
        """Raise ConversionError, with every problem, unless `ok`."""
        if not self.ok:
            raise ConversionError("; ".join(self.problems))

    def note_single_samples(self) -> None:
        """Say that many archives of one sample could be one archive."""
        single = sum(each.status == "converted" and each.num_samples == 1 for each in self.files)
        if single >= _MANY_SINGLE:
            self.notes.append(
                f"{single} archives hold one sample each; merge=True makes one archive of all, "
                "which opens faster"
            )


def cast_warnings(counts: dict[str, CastCounts], options: WriteOptions) -> list[str]:
    found = []
    stored, treatment = (
        options.dtype,
        {
            "float32": "their arrays are stored in float32",
            "clip": "they were clipped to the largest finite value",
            "error": "",
        }[options.on_overflow],
    )
    for kind, each in counts.items():
        if each.num_overflow:
            found.append(f"{kind}: {each.num_overflow} values are beyond {stored}; {treatment}")
        if each.num_to_zero or each.num_to_subnormal:
            parts = {"became 0": each.num_to_zero, "lost precision": each.num_to_subnormal}
            told = " and ".join(
                f"{n} value{'s' * (n != 1)} {what}" for what, n in parts.items() if n
            )
            # Tiers have one stored type.
            remedy = "; dtype='auto' keeps every bit" if options.precision.is_exact else ""
            found.append(f"{kind}: {told} (too small for {stored}){remedy}")
    return found
