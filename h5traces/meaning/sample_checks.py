"""Looks at samples: at some or all numbers of each, and at what samples share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from h5traces.format import layout
from h5traces.format.kinds import POSITIONS
from h5traces.format.record import StepArrays
from h5traces.meaning.array_checks import (
    ROW_TOLERANCE,
    Layers,
    state_findings,
    weight_findings,
)
from h5traces.meaning.checks import Finding, Findings
from h5traces.meaning.lengths import covered_tokens, is_one_less
from h5traces.meaning.numbering import FIRST_STATE_UNKNOWN
from h5traces.precision.attention import LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from h5traces.format.precision import Precision
    from h5traces.format.record import LayeredArrays, TraceRecord
    from h5traces.meaning.array_checks import Mapper

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
    full_mapper
        For a look at every value: how a function is applied to each layer, such as ``map``, or
        ``pool.map`` of an executor. None: a quick look, at some tokens, heads and rows.
    vocabulary
        Number of token ids of the model, where it is known.
    losses
        What precision the arrays were stored with, where that is not exact.
    """

    full_mapper: Mapper | None = None
    vocabulary: int | None = None
    losses: tuple[Precision, ...] = ()


QUICK: Final = Look()


def sample_findings(record: TraceRecord, look: Look = QUICK) -> list[Finding]:
    """Findings in a single sample, and those made when it was read.

    Only arrays in memory are looked at. Cost of a quick look: see ``benchmarks/checks.py``.
    """
    found = list(record.findings)
    states = record.layered.get(layout.HIDDEN_STATES)
    names = () if states is None else (each.name for each in states.arrays)
    # Archives hold positions as well.
    if FIRST_STATE_UNKNOWN not in found and any(map(layout.is_position, names)):
        found.append(FIRST_STATE_UNKNOWN)
    found += _coverage_findings(record)
    found += _token_findings(record, look.vocabulary)
    found += _special_token_findings(record)
    is_causal = record.prompt_len is not None or any(
        each in record.texts for each in layout.ANSWER_FIELDS
    )
    for kind, layered in record.layered.items():
        layers = Layers(
            kind=kind,
            layered=layered,
            axes=_axes(kind, layered),
            mapper=look.full_mapper,
            mask=record.attention_mask,
        )
        if layers.axes[:1] == ("token",):
            found += state_findings(layers, is_masked=record.attention_mask is not None)
        elif layers.axes[-2:] == ("query", "key"):
            tolerance = row_tolerance(look.losses, _num_keys(layered))
            if POSITIONS in record.extra:
                # Weights of keys that are not stored are missing.
                tolerance = math.inf
            found += weight_findings(layers, is_causal=is_causal, tolerance=tolerance)
    return found


def _axes(kind: str, layered: LayeredArrays) -> tuple[str, ...]:
    # Checks of states and weights do not apply to further kinds.
    return layout.KINDS[kind].axes if kind in layout.KINDS else ()


def vocabulary_of(config: Any) -> int | None:
    """The size of the vocabulary in a configuration as transformers writes it, if it is there."""
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    sizes = [each.get("vocab_size") for each in parts if isinstance(each, dict)]
    return next((each for each in sizes if type(each) is int and each > 0), None)


def _num_keys(layered: LayeredArrays) -> int:
    arrays = (each.array for each in layered.arrays)
    shapes = [each.shape for each in arrays if not isinstance(each, StepArrays)]
    return max((shape[-1] for shape in shapes if shape), default=0)


def row_tolerance(losses: Iterable[Precision], num_keys: int) -> float:
    """How far a row's sum may be from 1; lossy tiers move it by a bounded amount."""
    return ROW_TOLERANCE + sum(_row_loss(each, num_keys) for each in losses)


def _row_loss(precision: Precision, num_keys: int) -> float:
    found = 0.0
    if precision.mantissa_bits is not None:
        found += 2.0 ** -(precision.mantissa_bits + 1)
    if precision.attention_bits is not None:
        # A root is off by at most 1 / (2 levels), so a weight by sqrt(weight) / levels and a little
        # more; by Cauchy and Schwarz, the roots of a row sum to at most the root of its length.
        found += math.sqrt(num_keys) / LEVELS + num_keys / (4 * LEVELS**2)
    return found


def _coverage_findings(record: TraceRecord) -> Iterator[Finding]:
    coverage = record.coverage()
    kinds = list(record.layered)
    place = kinds[0] if kinds else layout.HIDDEN_STATES
    if coverage == "last_position" and record.tokens is None and not record.tokens_decoded:
        if all(each.check != "one-vector" for each in record.findings):
            yield Finding("one-position", place, "one position")
    elif coverage == "last_position":
        yield Finding(
            "last-position-only",
            place,
            "one position instead of the sequence: the '350 MB bug' of old extractors",
        )
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
        if index < len(shape) and is_one_less(num_tokens, shape[index]):
            yield Finding("last-token-uncovered", kind, "the last token has no position")
            return
        if index < len(shape) and covered_tokens(num_tokens, shape[index]) is None:
            difference = float(shape[index] - num_tokens)
            message = "positions beyond the token ids: {span}"
            if difference < 0:
                message = "token ids without a position: {span}"
            yield Finding("tokens-do-not-fit", kind, message, span=(abs(difference),) * 2)
            return


def _token_findings(record: TraceRecord, vocabulary: int | None) -> Iterator[Finding]:
    tokens = record.tokens
    decoded = record.extra.get(layout.TOKENS_DECODED)
    if tokens is None:
        return
    if isinstance(decoded, (list, tuple)) and len(decoded) != len(tokens):
        difference = float(len(decoded) - len(tokens))
        message = f"texts {'beyond' if difference > 0 else 'missing for'} the token ids: {{span}}"
        place = layout.TOKENS_DECODED
        yield Finding("tokens-do-not-fit", place, message, span=(abs(difference),) * 2)
    if not tokens.size:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        number = int((tokens < 0).sum())
        message = "{number negative id}, the lowest {span}"
        yield Finding("token-out-of-vocabulary", layout.TOKENS, message, number, (low, low))
    if vocabulary is not None and high >= vocabulary:
        number = int((tokens >= vocabulary).sum())
        message = f"{{number id}} beyond the vocabulary of {vocabulary}, the highest {{span}}"
        yield Finding("token-out-of-vocabulary", layout.TOKENS, message, number, (high, high))


def _special_token_findings(record: TraceRecord) -> Iterator[Finding]:
    """Runs of one special token, which no mask marks."""
    if record.attention_mask is not None:
        return
    decoded = record.tokens_decoded or ()
    for texts, where in ((decoded, "begins"), (decoded[::-1], "ends")):
        length = _special_run(texts)
        if _MIN_SPECIAL <= length < len(texts):
            message = f"{where} with {{number token}} {texts[0]!r}"
            yield Finding("padding-suspected", layout.TOKENS_DECODED, message, length)


def _special_run(texts: Sequence[str]) -> int:
    """How many texts at the beginning are one and the same special token."""
    if not texts or not _SPECIAL.match(texts[0].strip()):
        return 0
    return next((n for n, each in enumerate(texts) if each != texts[0]), len(texts))


class SampleChecks:
    """Checks samples as they come, also against each other.

    Attributes
    ----------
    findings
        What was found so far, by position of the sample.
    num_samples
        Position of the next sample.
    """

    def __init__(self, look: Look = QUICK) -> None:
        self._look = look
        self.findings = Findings()
        self.num_samples = self._num_pairs = 0
        # With the generation index of what a model was asked: a question may have several answers.
        self._ids: set[tuple[str, int | None]] = set()
        self._first: dict[str, int] = {}

    def resume(self, num_samples: int, sample_ids: Iterable[str]) -> None:
        """Go on after samples with these ids, which are not looked at."""
        self.num_samples = num_samples
        self._ids.update((each, None) for each in sample_ids)

    def skip(self) -> None:
        """Count a sample that cannot be looked at."""
        self.num_samples += 1

    def add(
        self,
        record: TraceRecord,
        content: str | None = None,
        further: Iterable[Finding] = (),
        *,
        look: Look | None = None,
    ) -> None:
        """Check the next sample.

        Parameters
        ----------
        record
            The sample.
        content
            Its `h5traces.format.digests.content_digest`, if it was written or read.
        further
            What others found in it.
        look
            How it is looked at, if not as the others.
        """
        found = sample_findings(record, look or self._look)
        generation = record.generation_index if record.extraction else None
        self.add_found([*found, *further], record.sample_id, content, generation)

    def add_found(
        self,
        found: Iterable[Finding],
        sample_id: str | None,
        content: str | None,
        generation: int | None = None,
    ) -> None:
        """Add what was found in the next sample by itself; its id and content as in `add`.

        `generation` is the generation index of what a model was asked.
        """
        repeated = self._repeated(sample_id, generation, content)
        self.findings.add([*found, *repeated], self.num_samples)
        self.num_samples += 1

    def _repeated(
        self, sample_id: str | None, generation: int | None, content: str | None
    ) -> Iterator[Finding]:
        if sample_id is not None:
            if (sample_id, generation) in self._ids:
                yield Finding("repeated-id", layout.QUESTION_ID, "the id of an earlier sample")
            self._ids.add((sample_id, generation))
        if content is None:
            return
        first = self._first.setdefault(content, self.num_samples)
        if first != self.num_samples:
            self._num_pairs += 1
            named = f"sample {first}" if self._num_pairs <= _MAX_PAIRS else "an earlier sample"
            yield Finding("duplicate-sample", "sample", f"the same bytes as {named}")
