"""Objects in a notebook: what they show, and that no text of a file becomes markup."""

from __future__ import annotations

import pickle
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import h5traces

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> &amp; \u202eevil\x1b[31m \ud800"


class Page(HTMLParser):
    """Tags, attributes and text of a page whose tags are all closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data + "\n"


PLAIN = {"style", "div", "strong", "table", "thead", "tbody", "tr", "th", "td", "bdi"}
PLAIN |= {"details", "summary"}


def page(value: Any) -> Page:
    found = Page(value._repr_html_())
    assert set(found.tags) <= PLAIN
    assert found.attributes <= {"class", "open"}
    found.text.encode()
    return found


@pytest.fixture
def archive(tmp_path: Path) -> h5traces.Archive:
    path = tmp_path / "run.h5"
    with h5traces.create(path, model_id="tiny <b>model</b>") as writer:
        for number in range(12):
            writer.append(
                {
                    "question_id": f"q{number}",
                    "question": HOSTILE if number == 1 else f"Question {number}?",
                    "hidden_states": [np.ones((3, 4), "f2")] * 2,
                    "tokens": [1, 2, 3],
                    "tokens_decoded": ["a", "<i>", HOSTILE],
                    "label": number % 2,
                }
            )
    return h5traces.open(path)


def test_an_archive_shows_its_first_samples(archive: h5traces.Archive) -> None:
    shown = page(archive)
    assert "h5traces.Archive: 12 traces" in shown.text
    assert "Question 9?" in shown.text
    assert "Question 10?" not in shown.text
    assert "and 2 more" in shown.text
    assert "tiny <b>model</b>" in shown.text
    assert str(archive.paths[0]) in shown.text
    assert "token, hidden" in shown.text


def test_a_view_shows_its_own_samples(archive: h5traces.Archive) -> None:
    shown = page(archive[[11, 3]].select(layers=[1]))
    assert "h5traces.Archive: 2 traces" in shown.text
    assert shown.text.index("q11") < shown.text.index("q3")


def test_texts_of_files_stay_text(archive: h5traces.Archive) -> None:
    shown = page(archive[1])
    assert "<script>alert(1)</script><img src=x onerror=alert(2)> &amp; " in shown.text
    assert "\x1b" not in shown.text
    assert "\u202e" not in shown.text
    assert "script" not in shown.tags


def test_a_trace_shows_arrays_and_tokens(archive: h5traces.Archive) -> None:
    shown = page(archive[0])
    assert "h5traces.Trace 0: 3 tokens" in shown.text
    assert "(3, 4)" in shown.text
    assert "float16" in shown.text
    assert "<i>" in shown.text


def test_layers_show_where_they_were_taken(archive: h5traces.Archive) -> None:
    shown = page(archive[0]["hidden_states"])
    assert "hidden_states: 2 arrays" in shown.text
    assert shown.text.count("(3, 4)") == 2


def test_nothing_is_read_to_show_an_archive(
    archive: h5traces.Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    from h5traces.archive.stored_trace import StoredTrace

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(StoredTrace, "read_layer", fail)
    assert page(archive).text
    assert page(archive[0]).text
    assert page(archive[0]["hidden_states"]).text


def test_long_texts_and_tokens_are_cut(tmp_path: Path) -> None:
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(
            {
                "question": "x" * 1_000_000,
                "tokens": list(range(5000)),
                "tokens_decoded": ["y" * 100] * 5000,
                "hidden_states": [np.ones((5000, 1), "f2")] * 2,
            }
        )
    archive = h5traces.open(tmp_path / "run.h5")
    assert len(archive._repr_html_()) < 50_000
    shown = archive[0]._repr_html_()
    assert len(shown) < 100_000
    assert "and 4800 more" in shown


def test_an_empty_archive_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.pkl").write_bytes(pickle.dumps([]))
    h5traces.convert(tmp_path / "run.pkl", tmp_path / "run.h5")
    assert "0 traces" in page(h5traces.open(tmp_path / "run.h5")).text


def test_reports_are_tables(archive: h5traces.Archive, tmp_path: Path) -> None:
    path = archive.paths[0]
    assert "num_samples" in page(h5traces.validate(path)).text
    assert "constant-layer" in page(h5traces.validate(path)).text
    assert str(path) in page(h5traces.verify(path)).text
    (inspection,) = h5traces.inspect(path)
    assert "samples (1)" in page(inspection).text
    copied = h5traces.repack(path, tmp_path / "copy.h5", layers=[0])
    assert "copy.h5" in page(copied).text
