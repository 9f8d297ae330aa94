"""The register of checks: what may be wrong with the meaning of a trace, and what to do about it.

A check that a sample does not pass makes a `Finding`. Findings of many samples are gathered in
`Findings`, which counts them by check and place and keeps the first few samples of each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from h5traces.format.text import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

Severity = Literal["error", "warning", "note"]
_MAX_SAMPLES: Final = 5


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
        One sentence: why this matters.
    remedy
        One sentence: what to do.
    """

    id: str
    severity: Severity
    reason: str
    remedy: str


def _note(name: str, reason: str) -> Check:
    return Check(id=name, severity="note", reason=reason, remedy="Nothing needs to be done.")


CHECKS: Final[dict[str, Check]] = {
    each.id: each
    for each in (
        Check(
            id="first-state-unknown",
            severity="warning",
            reason="Without attentions, nothing says whether the first hidden state is the "
            "embedding or the output of block 0.",
            remedy="Say what it is: first_state='embedding' or 'block'.",
        ),
        _note("embedding-first", "One hidden state more than attentions: the first is no block."),
        _note("stacked-layers", "Lengths of the other fields say which axis is which."),
        _note("layers-by-key", "The keys number the layers."),
        _note("batch-of-one", "The axis comes back where the source's dict is rebuilt."),
        _note("one-vector", "Without a token axis, arrays hold one position of the sequence."),
        _note("steps-outermost", "generate() returns one item per step; they are stored by layer."),
        _note("one-state-less", "generate() never runs the model on the last token."),
        _note("further-kind", "One array per decoder block is a kind, whatever its name."),
        Check(
            id="attentions-absent",
            severity="note",
            reason="The source holds None, as fast attention kernels return no weights.",
            remedy='To get attentions, load the model with attn_implementation="eager".',
        ),
    )
}


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
        What was found; samples with the same text are counted together.
    """

    check: str
    place: str
    message: str


@dataclass(slots=True)
class Findings:
    """Findings of many samples, by check, place and message.

    Attributes
    ----------
    samples
        Positions of the first samples of each finding, in the order in which they were added.
    counts
        How many samples have it.
    """

    samples: dict[Finding, list[int]] = field(default_factory=dict)
    counts: dict[Finding, int] = field(default_factory=dict)

    def add(self, found: Iterable[Finding], sample: int) -> None:
        """Note what was found in the sample at this position."""
        for each in found:
            self.counts[each] = self.counts.get(each, 0) + 1
            if len(places := self.samples.setdefault(each, [])) < _MAX_SAMPLES:
                places.append(sample)

    def messages(self) -> list[str]:
        """One line per finding, with its check, how many samples have it, and the remedy."""
        return [
            f"{CHECKS[each.check].severity} [{each.check}] {each.place}: {each.message} "
            f"({_samples(self.samples[each], number)}). "
            f"{CHECKS[each.check].remedy}"
            for each, number in self.counts.items()
        ]


def _samples(first: list[int], number: int) -> str:
    more = f" and {number - len(first)} more" if number > len(first) else ""
    return f"{counted(number, 'sample')}: {', '.join(map(str, first))}{more}"
