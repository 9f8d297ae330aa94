"""Whether a model computes left-padded batches as it computes their sequences one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from h5traces.errors import ExtractionError
from h5traces.extract.capture import CaptureOptions, Capturer, padded
from h5traces.extract.generation import generation_config, in_force
from h5traces.extract.options import GenerationOptions
from h5traces.extract.trials import relative_difference, values_of, with_whole_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from h5traces.extract.anatomy import Anatomy

# The largest difference that docs/extraction.md states, relative to the largest value of an array.
TOLERANCES: Final = {torch.float32: 3e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Long enough for windows and convolutions of small models to end inside.
_SEQUENCES: Final = (tuple(range(12)), (3, 1, 4, 1, 5), (2,))
_NUM_STEPS: Final = 3
_TOKEN: Final = 3


def check_batches(model: Any, anatomy: Anatomy, kinds: tuple[str, ...], pad_id: int) -> float:
    """Compare a left-padded batch of three sequences with the same ones alone.

    Returns
    -------
    float
        The largest difference, relative to the largest value of an array; 0 if all are bit-equal.

    Raises
    ------
    ExtractionError
        Arrays differ, or the scores of the first generated tokens, by more than rounding.
    """
    tolerance = TOLERANCES.get(model.dtype, TOLERANCES[torch.float32])
    options = CaptureOptions(
        layers=tuple(range(anatomy.num_layers)),
        kinds=with_whole_weights(kinds),
        embedding=True,
        dtype="auto",
    )
    capturer = Capturer(anatomy, options)
    try:
        together = capturer.run(_SEQUENCES, pad_id=pad_id)
        scores = _scores(model, _SEQUENCES, pad_id)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = f"it fails with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ExtractionError(_refusal(anatomy, reason)) from error
    largest = 0.0
    for row, sequence in enumerate(_SEQUENCES):
        (alone,) = capturer.run([sequence])
        for kind, entries in alone.arrays.items():
            for one, other in zip(entries, together[row].arrays[kind], strict=True):
                difference = relative_difference(values_of(other), values_of(one))
                largest = max(largest, difference)
                if difference > tolerance:
                    reason = f"{kind}/{one.name} of a padded sequence differs from that of it alone"
                    raise ExtractionError(_refusal(anatomy, reason))
        for step, expected in enumerate(_scores(model, [sequence], pad_id)):
            difference = relative_difference(scores[step][row : row + 1], expected)
            largest = max(largest, difference)
            if difference > tolerance:
                reason = f"the scores of generated token {step} differ in a padded batch"
                raise ExtractionError(_refusal(anatomy, reason))
    return largest


def _refusal(anatomy: Anatomy, reason: str) -> str:
    return (
        f"{anatomy.model_class} ({anatomy.family}) cannot be run in batches: {reason}; use a batch "
        "size of 1"
    )


def _scores(
    model: Any, sequences: Sequence[Sequence[int]], pad_id: int
) -> list[NDArray[np.float32]]:
    """Scores ``(B, V)`` of the first generated tokens, one array for each step."""
    forcing = _Forcing()
    inputs = padded(sequences, pad_id, model.get_input_embeddings().weight.device)
    inputs.pop("position_ids", None)
    config = generation_config(model, GenerationOptions(max_new_tokens=_NUM_STEPS), pad_id)
    config.eos_token_id = None
    with torch.inference_mode(), in_force(model, config):
        model.generate(
            **inputs, generation_config=config, logits_processor=LogitsProcessorList([forcing])
        )
    return forcing.scores


class _Forcing(LogitsProcessor):
    """Keeps the scores, and lets one token follow, so that a near tie cannot lead elsewhere."""

    def __init__(self) -> None:
        self.scores: list[NDArray[np.float32]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.scores.append(scores.float().cpu().numpy().copy())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, _TOKEN] = 0
        return cast("torch.FloatTensor", forced)
