"""States and attention weights of a model, as archives store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What a model computed of one text.

    Attributes
    ----------
    tokens
        Ids.
    states
        float16 ``(layers, tokens, hidden)``; of a decoder, the last is behind the final norm.
    attentions
        float16 ``(layers, heads, tokens, tokens)``.
    """

    tokens: list[int]
    states: NDArray[np.float16]
    attentions: NDArray[np.float16]

    def of_layers(self, layers: list[int]) -> Trace:
        """Some layers of it."""
        return Trace(self.tokens, self.states[layers], self.attentions[layers])


@torch.inference_mode()
def capture(model: Any, texts: list[list[int]]) -> list[Trace]:
    """Run a model over texts, one by one, and keep what it computed in float16."""
    device = model.get_input_embeddings().weight.device
    traces = []
    for tokens in texts:
        ids = torch.tensor([tokens], device=device)
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
        traces.append(
            Trace(tokens, _float16(output.hidden_states[1:]), _float16(output.attentions))
        )
    return traces


def _float16(layers: tuple[torch.Tensor, ...]) -> NDArray[np.float16]:
    found: NDArray[np.float16] = torch.cat(layers).to(torch.float16).cpu().numpy()
    if not np.isfinite(found).all():
        message = (
            "the model has values that float16 cannot hold; archives would store those layers in "
            "float32, which this study does not cover"
        )
        raise SystemExit(message)
    return found
