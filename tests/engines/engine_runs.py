"""Work for engines, and what came out."""

from __future__ import annotations

import json
from pathlib import Path

import h5traces

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MODEL = EXAMPLES / "tiny-llama-pydocs"


def write_questions(path: Path, count: int) -> Path:
    rows = ({"question_id": f"q{n}", "question": f"What is number {n}?"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def digests(folder: Path) -> dict[str, list[tuple[str | None, str | None]]]:
    """By archive, id and digest of every sample, in order."""
    found = {}
    for path in sorted(folder.glob("*.h5")):
        with h5traces.open(path) as archive:
            found[path.name] = [(e.metadata.sample_id, e.metadata.digest) for e in archive]
    return found
