"""What the files of a run establish for each other.

A request that has as many tokens as layers does not say which axis is which, and hidden states
without attentions do not say what the first is; other files of the run do. The first file, in the
given order, that says something decides, whoever reads which file, and in how many processes.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.errors import H5TracesError
from h5traces.meaning.options import ReadingOptions, RunFacts
from h5traces.sources.opening import open_source, run_stem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Files of a run whose first samples are looked at.
_MOST_FILES: Final = 16
# Files of one folder are a run if their names differ in numbers only.
Run = tuple[Path, str]
Runs = dict[Run, RunFacts]


def run_of(path: Path) -> Run:
    """The run that a file belongs to."""
    return path.parent, run_stem(path.name)


def facts_of_runs(paths: Iterable[Path], reading: ReadingOptions) -> Runs:
    """What the runs of these files establish; nothing for a file alone.

    The first samples of the first files are read, until one says what its first state is.
    """
    if reading.mapping is not None:
        return {}
    files: defaultdict[Run, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        files[run_of(path)].append(path)
    found = {run: _facts(each, reading) for run, each in files.items() if len(each) > 1}
    return {run: facts for run, facts in found.items() if facts}


def _facts(paths: Sequence[Path], reading: ReadingOptions) -> RunFacts:
    found = RunFacts()
    for path in paths[:_MOST_FILES]:
        # What cannot be read is named when it is converted.
        with contextlib.suppress(H5TracesError, OSError), open_source(path, reading) as source:
            next(source.records(), None)
            told = source.established
            found = merged([found, RunFacts(told.first_states, told.axes)])
        if found.first_states:
            break
    return found


def reading_in_run(
    path: Path, reading: ReadingOptions, runs: Mapping[Run, RunFacts]
) -> ReadingOptions:
    """How to read a file of a run."""
    facts = runs.get(run_of(path))
    return reading if facts is None else replace(reading, run=facts)


def merged(facts: Iterable[RunFacts]) -> RunFacts:
    """All facts; of contradicting ones the first."""
    found = RunFacts()
    for each in facts:
        found = RunFacts({**each.first_states, **found.first_states}, {**each.axes, **found.axes})
    return found


def readings_of(
    paths: Iterable[Path], reading: ReadingOptions = ReadingOptions()
) -> dict[Path, ReadingOptions]:
    """How to read each of these files, by path."""
    paths = list(paths)
    runs = facts_of_runs(paths, reading)
    return {path: reading_in_run(path, reading, runs) for path in paths}
