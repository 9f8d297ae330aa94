"""Texts for the study: some to calibrate with, others to measure on."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
TINY: Final = REPOSITORY / "examples" / "tiny-llama-pydocs"
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much text is used.

    Attributes
    ----------
    calibration, held_out
        Numbers of texts. Where there are too few, calibration has its number first.
    shortest, longest
        Tokens of a text; shorter texts are left out, longer ones cut off.
    """

    calibration: int = 200
    held_out: int = 240
    shortest: int = 12
    longest: int = 64


@dataclass(frozen=True, slots=True)
class Split:
    """Texts as tokens, in two parts without a text in common.

    Attributes
    ----------
    calibration, held_out
        Token ids, text by text.
    """

    calibration: list[list[int]]
    held_out: list[list[int]]


def shipped_texts() -> tuple[list[str], dict[str, Any]]:
    """Documents that the shipped model has never seen, and what is known of them.

    They are Python's own docstrings, as `tools/train_tiny_model.py` reads and splits them.
    """
    sys.path.insert(0, str(REPOSITORY / "tools"))
    from train_tiny_model import read_corpus

    corpus = read_corpus()
    trained = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    about = {
        "texts": "documentation that training of the shipped model held out",
        "same_corpus_as_training": _find(trained, "corpus_sha256") == corpus.sha256(),
    }
    return corpus.held_out, about


def _find(document: Any, name: str) -> Any:
    """The value of that name, at any depth."""
    if not isinstance(document, dict):
        return None
    if name in document:
        return document[name]
    return next((found for each in document.values() if (found := _find(each, name))), None)


def texts_of_file(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Texts of a file, one per line; repeated ones once."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(line for line in lines if line)), {"texts": f"lines of {path.name}"}


def split(texts: list[str], tokenizer: Any, limits: Limits) -> Split:
    """Texts in random order, cut and parted; the same for the same texts and tokenizer.

    Raises
    ------
    SystemExit
        There are too few texts.
    """
    encoded = [
        tokenizer(text, truncation=True, max_length=limits.longest)["input_ids"] for text in texts
    ]
    long_enough = [each for each in encoded if len(each) >= limits.shortest]
    random.Random(_SEED).shuffle(long_enough)
    first, rest = long_enough[: limits.calibration], long_enough[limits.calibration :]
    if len(first) < limits.calibration or len(rest) < 2:
        message = (
            f"there are {len(long_enough)} texts of {limits.shortest} tokens or more; expected "
            f"{limits.calibration} to calibrate with and two or more to measure on: give more "
            "texts, or a smaller --calibration"
        )
        raise SystemExit(message)
    return Split(first, rest[: limits.held_out])
