"""Some damages; ``tools/damage_test.py`` tries as many as one likes."""

from __future__ import annotations

import pytest
from damage import ARCHIVES, KINDS, REPORTED, run

from h5traces.checking import verify

FLIPS, FLIPS_OF_OTHERS, OTHERS = 300, 6, 2


@pytest.mark.parametrize("name", ARCHIVES)
def test_damage_is_reported_or_harmless(name: str) -> None:
    counts = dict.fromkeys(KINDS, OTHERS)
    counts["single bit"] = FLIPS if name == "float16" else FLIPS_OF_OTHERS
    found = run(name, counts, seed=11)
    assert not found.bad
    assert sum(found.outcomes.values()) == sum(counts.values())
    # Checksums cover every byte, so what is not reported hit the footer, which is derived.
    assert found.outcomes["single bit", REPORTED] > counts["single bit"] / 3
    assert found.outcomes["chunk never written", REPORTED] == OTHERS


def test_these_tests_notice_a_check_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify._Verification, "_check_bytes", lambda *_: None)
    found = run("float16", {"single bit": 10}, seed=11)
    assert any("verified, but" in each for each in found.bad)
