"""What docs/spans.md shows is run as it stands there."""

from __future__ import annotations

from document_pages import ROOT, run_page


def test_the_page_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/spans.md", "python", "bash")
    trace = names["trace"]
    words = trace["tokens_decoded"]
    assert "math.sqrt" in "".join(words[n] for n in trace.tokens_of(10, 19, "question"))
    assert "returns" in "".join(words[n] for n in trace.tokens_of(4, 11))
    assert set(names["labels"]) == {0, 1}
