"""Looks at samples: at some numbers of each, at all, and at what two of them have in common."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from h5traces.format import layout
from h5traces.format.record import StepArrays
from h5traces.meaning.array_checks import (
    ROW_TOLERANCE,
    run_lengths,
    state_findings,
    weight_findings,
)
from h5traces.meaning.checks import Finding
from h5traces.meaning.lengths import covered_tokens
from h5traces.precision.attention import LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from h5traces.format.precision import Precision
    from h5traces.format.record import LayeredArrays, TraceRecord

_ANSWERS: Final = ("generated_text", "generated_answer", "generated_answer_clean")
# Texts of tokens that stand for no text: <pad>, </s>, <|endoftext|>, [PAD].
_SPECIAL: Final = re.compile(r"<(?!0x)[^<>\s]+>\Z|\[[A-Z]+\]\Z")
_MIN_SPECIAL: Final = 2
# Pairs of equal samples that are named.
_MAX_PAIRS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How samples are looked at.

    Attributes
    ----------
    quick
        At some tokens, heads and rows of every layer; else at every value.
    vocabulary
        Number of token ids of the model, where it is known.
    precision
        How the arrays were stored, where that is not exact.
    """

    quick: bool = True
    vocabulary: int | None = None
    precision: Precision | None = None


QUICK: Final = Look()


def sample_findings(record: TraceRecord, look: Look = QUICK) -> list[Finding]:
    """What a sample shows by itself, with what was found when it was read.

    Only arrays in memory are looked at. Cost of a quick look: see ``benchmarks/checks.py``.
    """
    found = list(record.findings)
    found += _coverage_findings(record)
    found += _token_findings(record, look.vocabulary)
    found += _padding_findings(record)
    is_causal = record.prompt_len is not None or any(each in record.texts for each in _ANSWERS)
    for kind, layered in record.layered.items():
        axes = _axes(kind, layered)
        if axes[:1] == ("token",):
            found += state_findings(kind, layered, num_axes=len(axes), quick=look.quick)
        elif axes[-2:] == ("query", "key"):
            tolerance = _row_tolerance(look.precision, record, kind)
            found += weight_findings(
                kind,
                layered,
                quick=look.quick,
                num_axes=len(axes),
                is_causal=is_causal,
                tolerance=tolerance,
            )
    return found


def _axes(kind: str, layered: LayeredArrays) -> tuple[str, ...]:
    return layout.KINDS[kind].axes if kind in layout.KINDS else ()


def vocabulary_of(config: Any) -> int | None:
    """The size of the vocabulary in a configuration as transformers writes it, if it is there."""
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    sizes = [each.get("vocab_size") for each in parts if isinstance(each, dict)]
    return next((each for each in sizes if type(each) is int and each > 0), None)


def _row_tolerance(precision: Precision | None, record: TraceRecord, kind: str) -> float:
    """How far a row's sum may be from 1; lossy tiers move it by a bounded amount."""
    if precision is None or precision.is_exact:
        return ROW_TOLERANCE
    found = ROW_TOLERANCE
    if precision.mantissa_bits is not None:
        found += 2.0 ** -(precision.mantissa_bits + 1)
    if precision.attention_bits is not None:
        # A root is off by at most 1 / (2 levels), so a weight by sqrt(weight) / levels and a little
        # more; by Cauchy and Schwarz, the roots of a row sum to at most the root of its length.
        arrays = (each.array for each in record.layered[kind].arrays)
        shapes = [each.shape for each in arrays if not isinstance(each, StepArrays)]
        num_keys = max((shape[-1] for shape in shapes if shape), default=0)
        found += math.sqrt(num_keys) / LEVELS + num_keys / (4 * LEVELS**2)
    return found


def _coverage_findings(record: TraceRecord) -> Iterator[Finding]:
    coverage = record.coverage()
    kinds = list(record.layered)
    place = kinds[0] if kinds else layout.HIDDEN_STATES
    if coverage == "last_position":
        yield Finding("last-position-only", place, "one position instead of the sequence")
    elif coverage == "steps":
        yield Finding("generation-steps", place, "generation steps, not one sequence")
    elif coverage == "empty":
        yield Finding("no-arrays", place, "no values are stored")
    elif coverage == "partial" and record.tokens is not None:
        yield from _position_findings(record, len(record.tokens))


def _position_findings(record: TraceRecord, num_tokens: int) -> Iterator[Finding]:
    for kind, layered in record.layered.items():
        axes = _axes(kind, layered)
        axis = next((each for each in ("token", "query") if each in axes), None)
        array = layered.arrays[0].array if layered.arrays else None
        if axis is None or array is None or isinstance(array, StepArrays):
            continue
        index, shape = axes.index(axis), array.shape
        if index < len(shape) and covered_tokens(num_tokens, shape[index]) is None:
            difference = float(shape[index] - num_tokens)
            message = "arrays have {span} positions more than there are token ids"
            if difference < 0:
                message = "arrays have {span} positions fewer than there are token ids"
            yield Finding("tokens-do-not-fit", kind, message, span=(abs(difference),) * 2)
            return


def _token_findings(record: TraceRecord, vocabulary: int | None) -> Iterator[Finding]:
    tokens = record.tokens
    decoded = record.extra.get(layout.TOKENS_DECODED)
    if tokens is None:
        return
    if isinstance(decoded, (list, tuple)) and len(decoded) != len(tokens):
        difference = float(len(decoded) - len(tokens))
        message = f"{{span}} texts {'more' if difference > 0 else 'fewer'} than token ids"
        place = layout.TOKENS_DECODED
        yield Finding("tokens-do-not-fit", place, message, span=(abs(difference),) * 2)
    if not tokens.size:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        number = int((tokens < 0).sum())
        message = "{number} negative ids, the lowest {span}"
        yield Finding("token-out-of-vocabulary", layout.TOKENS, message, number, (low, low))
    if vocabulary is not None and high >= vocabulary:
        number = int((tokens >= vocabulary).sum())
        message = f"{{number}} ids beyond the vocabulary of {vocabulary}, the highest {{span}}"
        yield Finding("token-out-of-vocabulary", layout.TOKENS, message, number, (high, high))


def _padding_findings(record: TraceRecord) -> Iterator[Finding]:
    """Padding that no mask marks: one state at a whole end, or one special token."""
    if record.attention_mask is not None or record.coverage() in ("steps", "empty"):
        return
    states = record.layered.get(layout.HIDDEN_STATES)
    start, end = run_lengths(states) if states is not None else (0, 0)
    for number, where in ((start, "begins"), (end, "ends")):
        if number:
            message = f"{where} with {{number}} positions of the same state"
            yield Finding("padding-suspected", layout.HIDDEN_STATES, message, number)
    decoded = record.tokens_decoded or ()
    for texts, number, where in ((decoded, start, "begins"), (decoded[::-1], end, "ends")):
        length = _special_run(texts)
        if not number and _MIN_SPECIAL <= length < len(texts):
            message = f"{where} with {{number}} tokens {texts[0]!r}"
            yield Finding("padding-suspected", layout.TOKENS_DECODED, message, length)


def _special_run(texts: Sequence[str]) -> int:
    """How many texts at the beginning are one and the same special token."""
    if not texts or not _SPECIAL.match(texts[0].strip()):
        return 0
    return next((n for n, each in enumerate(texts) if each != texts[0]), len(texts))


class SampleSet:
    """Samples that were seen, to tell which repeat another."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}
        self._ids: set[str] = set()
        self._num_samples = self._num_pairs = 0

    def findings(self, sample_id: str | None, content: str | None) -> Iterator[Finding]:
        """What the next sample repeats; `content` is a digest of its arrays, texts and fields."""
        sample, self._num_samples = self._num_samples, self._num_samples + 1
        if sample_id is not None:
            if sample_id in self._ids:
                yield Finding("repeated-id", layout.QUESTION_ID, "the id of an earlier sample")
            self._ids.add(sample_id)
        if content is None:
            return
        first = self._first.setdefault(content, sample)
        if first != sample:
            self._num_pairs += 1
            named = f"sample {first}" if self._num_pairs <= _MAX_PAIRS else "an earlier sample"
            yield Finding("duplicate-sample", "sample", f"the same bytes as {named}")
