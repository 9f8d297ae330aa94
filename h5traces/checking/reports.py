"""What checks report: the problems of each archive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from h5traces.errors import Problem
from h5traces.format.html import Report, reports_page
from h5traces.meaning.checks import CheckOptions, FindingSummary


@dataclass(slots=True)
class FileReport(Report):
    """What a check found in one archive.

    Attributes
    ----------
    path
        The archive.
    num_samples
        Samples in it.
    problems
        Every finding with its HDF5 path; empty if there is none.
    notes
        What is worth knowing and no problem, such as a missing footer.
    """

    path: str
    num_samples: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def add(self, loc: str, error: Exception | str, kind: str = "damaged") -> None:
        """Add a problem; its message does not repeat the file and the place."""
        message = str(error).removeprefix(f"{self.path}: ").removeprefix(f"{loc}: ")
        self.problems.append(Problem(loc, message, kind))


Checked = TypeVar("Checked", bound=FileReport)


class Reports(list[Checked]):
    """One report per archive, in order."""

    @property
    def ok(self) -> bool:
        """Whether no archive has problems."""
        return all(each.ok for each in self)

    @property
    def problems(self) -> list[Problem]:
        """The problems of all archives."""
        return [problem for each in self for problem in each.problems]

    @property
    def notes(self) -> list[str]:
        """The notes of all archives."""
        return [note for each in self for note in each.notes]

    def _repr_html_(self) -> str:
        return reports_page(type(self).__name__, self)


@dataclass(slots=True)
class ValidationReport(FileReport):
    """What `validate` found in one archive; `FileReport` describes the other attributes.

    Attributes
    ----------
    num_datasets
        Datasets that were checked.
    findings
        What the checks of meaning found, see ``docs/checks.md``; empty after a quick check.
    checks
        Which findings are shown, and which are a failure.
    is_quick
        Whether no array was read.
    """

    num_datasets: int = 0
    findings: list[FindingSummary] = field(default_factory=list)
    checks: CheckOptions = CheckOptions()
    is_quick: bool = False

    @property
    def ok(self) -> bool:
        """Whether there are no problems, and no findings that are a failure."""
        return not self.problems and not self.checks.fails(self.findings)

    @property
    def covers(self) -> str:
        """What a good verdict is about, for people."""
        structure = "structure, schema, index"
        if self.is_quick:
            return f"{structure}; no array was read (quick)"
        return f"{structure}; {self.checks.num_checks} checks of meaning on every value"
