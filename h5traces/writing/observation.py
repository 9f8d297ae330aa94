"""What the samples of an archive have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from h5traces.errors import SchemaError
from h5traces.format import layout
from h5traces.format.record import StepArrays

if TYPE_CHECKING:
    from h5traces.format.record import TraceRecord


@dataclass(slots=True)
class Observation:
    """Layers and sizes, of one sample or of all that were seen.

    Attributes
    ----------
    layers
        Layer numbers by kind; empty for a kind that is stored without arrays.
    hidden_sizes, head_counts
        Every width of hidden states, and every number of heads.
    reductions
        Every way in which heads were reduced, by kind; None where it is not known.
    """

    layers: dict[str, set[int]] = field(default_factory=dict)
    hidden_sizes: set[int] = field(default_factory=set)
    head_counts: set[int] = field(default_factory=set)
    reductions: dict[str, set[str | None]] = field(default_factory=dict)

    def add_array(self, kind: str, name: str, shape: tuple[int, ...]) -> None:
        """Note one layer's array, without a beam axis."""
        number = layout.parse_layer_name(name)
        if number is not None:
            self.layers.setdefault(kind, set()).add(number)
        # Arrays without a value say nothing of the model.
        if 0 in shape:
            return
        if kind == layout.HIDDEN_STATES and len(shape) == 2:
            self.hidden_sizes.add(shape[1])
        if kind == layout.ATTENTIONS and len(shape) == 3:
            self.head_counts.add(shape[0])

    def add_sample(self, sample: Observation, ordinal: int) -> None:
        """Note what one sample holds.

        Raises
        ------
        SchemaError
            It has other layers than the samples before.
        """
        for kind, numbers in sample.layers.items():
            known = self.layers.setdefault(kind, set())
            if known and numbers and known != numbers:
                message = (
                    f"{kind} has layers {sorted(numbers)}, the {ordinal} samples before it have "
                    f"{sorted(known)}; expected one model and one set of layers in an archive"
                )
                raise SchemaError(message)
            known |= numbers
        self.hidden_sizes |= sample.hidden_sizes
        self.head_counts |= sample.head_counts
        for kind, reductions in sample.reductions.items():
            self.reductions.setdefault(kind, set()).update(reductions)


def observe(record: TraceRecord) -> Observation:
    """What one record holds."""
    found = Observation()
    for kind, layered in record.layered.items():
        found.layers.setdefault(kind, set())
        found.reductions[kind] = {layered.reduction}
        for entry in layered.arrays:
            if isinstance(entry.array, StepArrays):
                found.add_array(kind, entry.name, ())
                for step in entry.array.steps:
                    found.add_array(kind, entry.name, step.shape[1:])
            else:
                found.add_array(kind, entry.name, entry.array.shape)
    return found
