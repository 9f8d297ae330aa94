"""What graphs are made of, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from h5traces.errors import DatasetError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from h5traces.torch_data.labels import Labels


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What all graphs of one sample share."""

    question_id: Any
    answer: Any
    tokens_decoded: Any


class GraphSource(Protocol):
    """Samples whose layers become graphs."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers."""

    @property
    def shard_numbers(self) -> NDArray[np.int64]:
        """For every sample, the shard that it lies in."""

    @property
    def fingerprint(self) -> str:
        """The same text for the same samples of the same shards."""

    def facts(self, index: int) -> SampleFacts:
        """What the graphs of a sample share."""

    def arrays(self, index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``(seq_len, hidden_size)`` and attention of one layer of a sample."""

    def place(self, index: int) -> str:
        """Shard and sample, for messages."""

    def labels(self, labels: Labels, *, allow_unused: bool) -> list[Any]:
        """The label of every sample."""


def check_finite(array: torch.Tensor, place: str) -> None:
    """Refuse an array with NaN or infinite values."""
    if not bool(array.isfinite().all()):
        message = (
            f"{place}: values are NaN or infinite; leave the sample out, or pass non_finite='keep'"
        )
        raise DatasetError(message)
