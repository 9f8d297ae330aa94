"""Some damaged archives; ``tools/fuzz_archives.py`` runs as many as one likes."""

from __future__ import annotations

from fuzz_archives import Fuzzer, run

COUNT = 100


def test_damaged_archives_end_in_errors_of_ours() -> None:
    found = run(Fuzzer(seed=7), COUNT)
    assert not found.bad, [(case.number, case.what, how) for case, how in found.bad]
    assert sum(found.outcomes.values()) == COUNT
    # The damage is not for nothing.
    assert found.outcomes["CorruptArchiveError"] > COUNT / 10


def test_cases_repeat() -> None:
    fuzzer = Fuzzer(seed=7)
    assert fuzzer.case(3) == fuzzer.case(3)
