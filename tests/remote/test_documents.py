"""What docs/remote.md shows is run as it stands there, against a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import s3fs
from servers import running

import h5traces

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]


def test_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next((ROOT / "examples" / "legacy").glob("*.pkl.gz"))
    h5traces.convert(batch, tmp_path / "a.h5")
    text = (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
    with running("s3_server.py") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
        monkeypatch.chdir(tmp_path)
        files = s3fs.S3FileSystem(use_listings_cache=False)
        files.mkdir("bucket")
        files.put(str(tmp_path / "a.h5"), "bucket/run/a.h5")
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            names: dict[str, object] = {"h5traces": h5traces}
            exec(code, names)
            assert len(names["archive"]) == 8
    assert list((tmp_path / "cache").iterdir())
