"""Compares what the hooks take with what transformers itself returns, before a run begins.

Tests do so for some families; this does it for the model at hand, whatever its family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from h5traces.errors import ExtractionError
from h5traces.extract.capture import CaptureOptions, Capturer, padded
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from h5traces.extract.anatomy import Anatomy
    from h5traces.extract.capture import Kind

_TOKENS: Final = tuple(range(8))
# Kernels of accelerators need not give the same bits twice; another place gives other numbers.
_TOLERANCE: Final = 1e-2


def check_capture(model: Any, anatomy: Anatomy, kinds: tuple[Kind, ...]) -> None:
    """Run eight tokens both ways.

    Raises
    ------
    ExtractionError
        An array is another than transformers' own.
    """
    options = CaptureOptions(
        layers=tuple(range(anatomy.num_layers)), kinds=kinds, embedding=True, dtype="auto"
    )
    (captured,) = Capturer(anatomy, options).run([_TOKENS])
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model(
            **padded([_TOKENS], 0, device),
            output_hidden_states=layout.HIDDEN_STATES in kinds,
            output_attentions=layout.ATTENTIONS in kinds,
            use_cache=False,
        )
    expected = {layout.HIDDEN_STATES: output.hidden_states, layout.ATTENTIONS: output.attentions}
    for kind in kinds:
        found = captured.arrays[kind]
        if len(found) != len(expected[kind]):
            message = (
                f"{anatomy.model_class}: transformers returns {len(expected[kind])} {kind}, the "
                f"hooks took {len(found)}; h5traces does not know how this model is built"
            )
            raise ExtractionError(message)
        for entry, tensor in zip(found, expected[kind], strict=True):
            if not isinstance(entry.array, TypedArray) or not _is_close(
                entry.array.to_numpy(), tensor[0].float().cpu().numpy()
            ):
                message = (
                    f"{anatomy.model_class}: {kind}/{entry.name} is not what transformers returns; "
                    "h5traces does not know how this model is built"
                )
                raise ExtractionError(message)


def _is_close(found: NDArray[Any], expected: NDArray[np.float32]) -> bool:
    """Whether two arrays differ by rounding at most; NaN where the model gives NaN."""
    if found.shape != expected.shape:
        return False
    a, b = torch.from_numpy(found).float(), torch.from_numpy(expected)
    finite = b[b.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True)
