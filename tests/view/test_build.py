"""The built page is that of its source."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "h5traces" / "view" / "page"


def test_the_page_was_built_of_its_source() -> None:
    """After a change in viewer/, run ./tools/build_viewer."""
    viewer = ROOT / "viewer"
    files = [
        *sorted((viewer / "src").iterdir()),
        viewer / "build.mjs",
        viewer / "package-lock.json",
    ]
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()
    assert (PAGE / "SOURCE.sha256").read_text().strip() == digest


def test_the_page_is_small() -> None:
    names = ("index.html", "viewer.js", "worker.js", "viewer.css")
    assert sum(len(gzip.compress((PAGE / name).read_bytes())) for name in names) <= 300_000


def test_licences_of_what_is_in_it_come_with_it() -> None:
    text = (PAGE / "LICENSES.txt").read_text()
    assert all(name in text for name in ("preact", "hash-wasm", "fzstd"))
    assert text.count("Permission is hereby granted") >= 3
