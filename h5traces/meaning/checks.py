"""The register of checks: what may be wrong with the meaning of a trace, and what to do about it.

A check that a sample does not pass makes a `Finding`. Findings of many samples are gathered in
`Findings`, which counts them by check and message. ``docs/checks.md`` is made of the register.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from h5traces.errors import OptionError
from h5traces.format.text import as_names, counted

if TYPE_CHECKING:
    from collections.abc import Iterable

Severity = Literal["error", "warning", "note"]
FailOn = Literal["error", "warning"]
SEVERITIES: Final[tuple[Severity, ...]] = get_args(Severity)
_MAX_SAMPLES: Final = 5
# Groups of samples that are kept apart where one finding is in several layers.
_MAX_GROUPS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One entry of the register.

    Attributes
    ----------
    id
        Name for the command line and for programs, such as ``constant-layer``.
    severity
        ``error`` for what contradicts the format's meaning, ``warning`` for what is probably a
        mistake, ``note`` for what was understood.
    reason
        Why this matters, and when exactly the check fires.
    remedy
        One sentence: what to do.
    of_reading
        Whether it fires only where files of other programs, or dicts, are read.
    """

    id: str
    severity: Severity
    reason: str
    remedy: str
    of_reading: bool = False


_ALL: Final = (
    Check(
        id="first-state-unknown",
        severity="warning",
        reason="Without attentions, nothing says whether the first hidden state is the "
        "embedding or the output of block 0.",
        remedy="Say what it is, to convert or repack: first_state='embedding' or "
        "first_state='block'.",
        of_reading=True,
    ),
    Check(
        id="embedding-first",
        severity="note",
        reason="There is one hidden state more than attentions, as transformers returns them: the "
        "first is the embedding, and block k is item k + 1.",
        remedy="Count blocks with trace.layer(k); trace['hidden_states'][k + 1] is the same.",
    ),
    Check(
        id="attentions-absent",
        severity="note",
        reason="The field is empty or holds None only: sdpa and flash attention return no weights.",
        remedy='To get attentions, load the model with attn_implementation="eager".',
    ),
    Check(
        id="layers-absent",
        severity="note",
        reason="Items of the list are None: hybrid models compute attentions in some blocks only. "
        "Nothing is stored for these layers, and the dict of the trace has the None again.",
        remedy="Nothing to do, if the other blocks of the model have no such output.",
        of_reading=True,
    ),
    Check(
        id="stacked-layers",
        severity="note",
        reason="One array holds all layers. The lengths of the other fields say which axis is "
        "which; the axes come back in the dict of the trace.",
        remedy="Nothing to do, if the axes are right.",
    ),
    Check(
        id="layers-by-key",
        severity="note",
        reason="A dict holds the layers, and its keys are taken for their numbers.",
        remedy="Nothing to do, if the keys count decoder blocks from 0.",
    ),
    Check(
        id="batch-of-one",
        severity="note",
        reason="Arrays have a batch axis of length 1. It is not stored, and comes back in the dict "
        "of the trace.",
        remedy="Nothing to do.",
    ),
    Check(
        id="one-vector",
        severity="note",
        reason="Each layer is one vector without a token axis; it is taken for one position.",
        remedy="Nothing to do, if the vector is the state of one token.",
    ),
    Check(
        id="steps-outermost",
        severity="note",
        reason="generate() returns one item per generation step, each with all layers. Steps are "
        "stored by layer, and come back as they were in the dict of the trace.",
        remedy="Nothing to do.",
    ),
    Check(
        id="further-kind",
        severity="note",
        reason="A field holds one array per decoder block with an axis of the tokens. It is stored "
        "as a layered kind, with the source's values.",
        remedy="Nothing to do; trace.layer(n, kind) reads one layer of it.",
    ),
    Check(
        id="unlike-earlier",
        severity="warning",
        reason="This sample says another order of axes, or another first hidden state, than "
        "earlier samples, or other files of its run, say for as many states. Each is stored as it "
        "says itself; samples that say nothing follow the earlier ones.",
        remedy="Convert the files of each producer by themselves.",
        of_reading=True,
    ),
    Check(
        id="last-position-only",
        severity="warning",
        reason="The arrays hold one position, though there are tokens of the whole sequence: the "
        "'350 MB bug' of old extractors. They are stored as they are.",
        remedy="Extract the traces again to get whole sequences.",
    ),
    Check(
        id="one-position",
        severity="note",
        reason="The arrays hold one position, and there are no tokens: probes and studies of "
        "uncertainty save the states of one token.",
        remedy="Nothing to do, if one token's states were saved on purpose.",
    ),
    Check(
        id="generation-steps",
        severity="note",
        reason="The arrays are generation steps, not one sequence. They are stored as they are, "
        "with coverage 'steps'.",
        remedy="Join the steps before you compare positions.",
    ),
    Check(
        id="no-arrays",
        severity="warning",
        reason="The sample has no array of hidden states or attentions, or only empty ones.",
        remedy="If there should be some, ask the extractor for them "
        "(output_hidden_states=True, and attn_implementation='eager' for attentions).",
    ),
    Check(
        id="last-token-uncovered",
        severity="note",
        reason="The arrays have one position fewer than there are tokens: generate() returns the "
        "last token without feeding it to the model. Position p is what the model computed at "
        "token p.",
        remedy="Nothing to do; features and datasets leave the last token out.",
    ),
    Check(
        id="tokens-do-not-fit",
        severity="warning",
        reason="Token ids, their texts and the positions of the arrays belong together one by "
        "one; arrays may lack the last position, which generation never feeds back.",
        remedy="Store the ids that were fed to the model.",
    ),
    Check(
        id="token-out-of-vocabulary",
        severity="error",
        reason="A negative id, or one at or beyond the vocabulary of the model that the archive "
        "names, is not a token; -100 marks positions that a loss ignores.",
        remedy="Store the ids that were fed to the model (input_ids), not its labels.",
    ),
    Check(
        id="padding-cut",
        severity="note",
        reason="The attention mask marks these positions as padding. They were left out of "
        "arrays, tokens and texts, and the length of the prompt moved with them.",
        remedy="keep_padding=True keeps them, with the mask.",
        of_reading=True,
    ),
    Check(
        id="padding-kept",
        severity="note",
        reason="Padded positions are stored with their mask, which features, datasets and graphs "
        "honour.",
        remedy="Without keep_padding they are cut.",
        of_reading=True,
    ),
    Check(
        id="padding-suspected",
        severity="warning",
        reason="A sequence begins or ends with a run of positions that have the same state, or "
        "of the same special token: padding looks like this. Without a mask nothing was cut.",
        remedy="Store the mask as 'attention_mask', or cut the rows before they are saved.",
    ),
    Check(
        id="mask-with-holes",
        severity="warning",
        reason="The attention mask is 0 between positions where it is 1, so it marks more than "
        "padding at the ends. Nothing was cut; the mask is stored and honoured.",
        remedy="If these positions are padding, cut them before the sample is saved.",
        of_reading=True,
    ),
    Check(
        id="mask-unused",
        severity="warning",
        reason="The attention mask does not say which stored positions are padding: its length is "
        "another, it has a row for every position, or it masks everything. It is kept as a "
        "further field, and nothing was cut.",
        remedy="Store one mask value (0 or 1) for every stored position.",
        of_reading=True,
    ),
    Check(
        id="not-finite",
        severity="warning",
        reason="NaN or infinite values come from an overflow (float16 ends at 65504) or from a "
        "fault of the model. They are stored as they are.",
        remedy="Run the model in bfloat16 or float32, or leave the sample out.",
    ),
    Check(
        id="constant-layer",
        severity="warning",
        reason="All values of a layer are the same, or all its tokens have the same state. Models "
        "that are split over devices have returned such layers.",
        remedy="Extract the traces again, on one device, and compare.",
    ),
    Check(
        id="norm-outlier",
        severity="warning",
        reason="The norm of one layer's states is more than 8 times as large, or as small, as "
        "those of the two layers before it and the two after it. Each block adds to the residual "
        "stream, so norms change step by step.",
        remedy="Compare this layer with the model's own output.",
    ),
    Check(
        id="attention-out-of-range",
        severity="warning",
        reason="Attention weights are results of a softmax, from 0 to 1. Others are scores before "
        "the softmax, or of an attention that subtracts.",
        remedy="Store the weights after the softmax under 'attentions', others under another name.",
    ),
    Check(
        id="attention-rows",
        severity="warning",
        reason="Rows of attention weights do not sum to 1 (within 1 %): learned attention sinks "
        "take a part, dropout or a mask changes them. They are stored as they are. Of the "
        "features, entropy and sink mass divide each row by its sum, and the others take the "
        "weights as stored.",
        remedy="Check that this is what the model computes; dropout must be off (model.eval()).",
    ),
    Check(
        id="attention-not-causal",
        severity="warning",
        reason="Tokens attend to later ones, though the sample was generated or its other layers "
        "are causal: axes are exchanged, the mask was missing, or the model is not a causal one.",
        remedy="Check the order of the axes: (head, query, key).",
    ),
    Check(
        id="duplicate-sample",
        severity="warning",
        reason="Two samples hold the same bytes in every array, text and field. A run that was "
        "resumed without care writes them.",
        remedy="Leave one out: 'h5traces repack' takes the indices of samples to keep.",
    ),
    Check(
        id="repeated-id",
        severity="note",
        reason="Several samples have one id, and are told apart by their generation index: "
        "answers that were sampled for one question, or a mistake.",
        remedy="If they are of different questions, give each its own question_id.",
    ),
)
CHECKS: Final[dict[str, Check]] = {each.id: each for each in _ALL}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """Which findings are shown, and which of them are a failure.

    Attributes
    ----------
    ignore
        Ids of checks whose findings are left out.
    fail_on
        ``error`` or ``warning``: from this severity on, a report is not ``ok``.
    """

    ignore: str | Iterable[str] = ()
    fail_on: FailOn = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", as_names(self.ignore))
        for each in self.ignore:
            if each not in CHECKS:
                close = get_close_matches(str(each), CHECKS, 1)
                guess = f"; did you mean {close[0]!r}?" if close else "."
                message = (
                    f"ignore names {each!r}, which is not a check{guess} The checks are "
                    f"{', '.join(CHECKS)}"
                )
                raise OptionError(message)
        if self.fail_on not in get_args(FailOn):
            message = f"fail_on is {self.fail_on!r}, expected 'error' or 'warning'"
            raise OptionError(message)

    @property
    def num_checks(self) -> int:
        """How many checks of samples count, archives' own included."""
        return sum(not each.of_reading and each.id not in self.ignore for each in _ALL)

    def fails(self, found: Iterable[FindingSummary]) -> bool:
        """Whether one of the findings is a failure."""
        most = SEVERITIES.index(self.fail_on)
        return any(SEVERITIES.index(each.severity) <= most for each in found)


@dataclass(frozen=True, slots=True)
class Finding:
    """A check that something in a sample did not pass.

    Attributes
    ----------
    check
        Key of `CHECKS`.
    place
        Field or layer inside the sample, such as ``hidden_states/layer_002``.
    message
        What was found; samples with the same text are counted together. In it, ``{number row}``
        stands for `number` with its noun, and ``{span}`` for `span`.
    number
        How many rows, values or positions it is about; added up over samples.
    span
        The smallest and the largest number found; joined over samples.
    """

    check: str
    place: str
    message: str
    number: int = field(default=0, compare=False)
    span: tuple[float, float] | None = field(default=None, compare=False)


@dataclass(slots=True)
class FindingSummary:
    """What one check found in a set of samples.

    Attributes
    ----------
    check, severity
        Key of `CHECKS`, and its severity.
    places
        Fields or layers.
    message
        What was found.
    num_samples, samples
        How many samples have it, and the positions of the first of these.
    remedy
        What to do.
    """

    check: str
    severity: Severity
    places: list[str]
    message: str
    num_samples: int
    samples: list[int]
    remedy: str

    def __str__(self) -> str:
        more = self.num_samples - len(self.samples)
        listed = ", ".join(map(str, self.samples)) + (f" and {more} more" if more else "")
        return (
            f"[{self.check}] {named_places(self.places)}: {self.message} "
            f"({counted(self.num_samples, 'sample')}: {listed}). {self.remedy}"
        )


@dataclass(slots=True)
class _Gathered:
    """Findings of one check at one place."""

    number: int = 0
    span: tuple[float, float] | None = None
    samples: list[int] = field(default_factory=list)
    num_samples: int = 0
    last: int | None = None

    def add(self, found: Finding, sample: int) -> None:
        if sample != self.last:
            self.num_samples += 1
            if len(self.samples) < _MAX_SAMPLES:
                self.samples.append(sample)
        self.last = sample
        self.join(found.number, found.span)

    def join(self, number: int, span: tuple[float, float] | None) -> None:
        self.number += number
        if span is not None and self.span is not None:
            span = min(span[0], self.span[0]), max(span[1], self.span[1])
        self.span = self.span if span is None else span


class Findings:
    """Findings of many samples, by check, message and place."""

    def __init__(self) -> None:
        self._found: dict[Finding, _Gathered] = {}
        self._of_message: dict[tuple[str, str], _Gathered] = {}

    def add(self, found: Iterable[Finding], sample: int) -> None:
        """Note what was found in the sample at this position; samples come in order."""
        for each in found:
            self._found.setdefault(each, _Gathered()).add(each, sample)
            key = each.check, each.message
            self._of_message.setdefault(key, _Gathered()).add(each, sample)

    def summaries(self, options: CheckOptions = CheckOptions()) -> list[FindingSummary]:
        """One entry for all places with the same finding in the same samples, gravest first.

        A finding that is in other samples at every place has one entry, with all places.
        """
        summaries = [
            FindingSummary(
                check=check,
                severity=CHECKS[check].severity,
                places=places,
                message=_filled(message, total),
                num_samples=total.num_samples,
                samples=list(total.samples),
                remedy=CHECKS[check].remedy,
            )
            for (check, message), groups in self._groups().items()
            if check not in options.ignore
            for places, total in groups
        ]
        return sorted(summaries, key=lambda each: SEVERITIES.index(each.severity))

    def _groups(self) -> dict[tuple[str, str], list[tuple[list[str], _Gathered]]]:
        """By check and message: the places that have it in the same samples."""
        groups: dict[tuple[str, str], dict[Any, tuple[list[str], _Gathered]]] = {}
        for found, of_place in self._found.items():
            samples = of_place.num_samples, tuple(of_place.samples)
            of_message = groups.setdefault((found.check, found.message), {})
            places, total = of_message.setdefault(
                samples, ([], _Gathered(samples=of_place.samples, num_samples=of_place.num_samples))
            )
            places.append(found.place)
            total.join(of_place.number, of_place.span)
        joined = {}
        for key, of_message in groups.items():
            joined[key] = list(of_message.values())
            if len(of_message) > _MAX_GROUPS:
                every = [place for places, _ in of_message.values() for place in places]
                joined[key] = [(every, self._of_message[key])]
        return joined

    def messages(self) -> list[str]:
        """One line per finding."""
        return [f"{each.severity} {each}" for each in self.summaries()]


def _filled(message: str, total: _Gathered) -> str:
    ends = [_figure(each) for each in total.span or (0.0,)]
    told = message.replace("{span}", " to ".join(dict.fromkeys(ends)))
    return _NUMBER.sub(lambda found: counted(total.number, found["noun"]), told)


_NUMBER: Final = re.compile(r"\{number (?P<noun>[^}]+)\}")


def _figure(value: float) -> str:
    return f"{value:.0f}" if value % 1 == 0 and abs(value) < 1e9 else f"{value:.3g}"


_NUMBERED: Final = re.compile(r"(?P<kind>.+)/(?P<what>layer|position)_(?P<number>\d+)\Z")


def named_places(places: Iterable[str]) -> str:
    """Places for people: ``hidden_states, layers 2, 5-31; tokens``."""
    by_kind: dict[tuple[str, str], list[int]] = {}
    plain: list[str] = []
    for each in dict.fromkeys(places):
        if (parts := _NUMBERED.match(each)) is None:
            plain.append(each)
        else:
            by_kind.setdefault((parts["kind"], parts["what"]), []).append(int(parts["number"]))
    named = [
        f"{kind}, {what}{'s' * (len(numbers) > 1)} {_runs(sorted(numbers))}"
        for (kind, what), numbers in by_kind.items()
    ]
    return "; ".join(named + plain)


def _runs(numbers: list[int]) -> str:
    """Ascending numbers as text, three and more in a row as a range."""
    runs: list[list[int]] = []
    for each in numbers:
        if runs and each == runs[-1][-1] + 1:
            runs[-1].append(each)
        else:
            runs.append([each])
    parts = [
        [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(each) for each in run] for run in runs
    ]
    return ", ".join(each for part in parts for each in part)
