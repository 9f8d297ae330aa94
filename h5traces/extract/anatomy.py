"""Where in a transformers model the numbers are: blocks, attentions, final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from h5traces.errors import ExtractionError

# Families whose left-padded batches were compared with one-by-one runs; see docs/extraction.md.
BATCHING_FAMILIES: Final = frozenset({"llama", "qwen2", "mistral", "gpt2"})
_EAGER: Final = "eager"


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only model.

    Attributes
    ----------
    model_class, family
        Class name and ``model_type``.
    decoder
        The module that runs embedding, blocks and final norm.
    blocks, attentions
        The decoder blocks, and the attention module of each.
    num_heads, hidden_size
        As the configuration says.
    context
        Tokens that the model takes; None where its configuration does not say.
    """

    model_class: str
    family: str
    decoder: Any
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    num_heads: int
    hidden_size: int
    context: int | None

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)


def check_decoder_only(config: Any, name: str) -> None:
    """Refuse models that are no decoder.

    Raises
    ------
    ExtractionError
        The configuration is that of an encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        message = (
            f"{name} is an encoder-decoder ({config.model_type}); expected a decoder-only model: "
            "an archive holds one token sequence per sample, and this model has two"
        )
        raise ExtractionError(message)


def anatomy_of(model: Any) -> Anatomy:
    """Find the parts of a model.

    Raises
    ------
    ExtractionError
        It is an encoder-decoder, or built in a way that is not known.
    """
    name = type(model).__name__
    check_decoder_only(model.config, name)
    config = model.config.get_text_config()
    decoder = model.get_decoder()
    blocks = _blocks(decoder, config.num_hidden_layers, name)
    return Anatomy(
        model_class=name,
        family=config.model_type,
        decoder=decoder,
        blocks=blocks,
        attentions=tuple(
            _attention(block, f"{name}, layer {layer}") for layer, block in enumerate(blocks)
        ),
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        context=getattr(config, "max_position_embeddings", None),
    )


def _blocks(decoder: nn.Module, num_layers: int, name: str) -> tuple[nn.Module, ...]:
    found = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if len(found) != 1:
        message = (
            f"{name}: found {len(found)} lists of {num_layers} blocks in {type(decoder).__name__}, "
            "expected one; h5traces does not know how this model is built"
        )
        raise ExtractionError(message)
    return tuple(found[0])


def _attention(block: nn.Module, place: str) -> nn.Module:
    found = [child for child in block.children() if type(child).__name__.endswith("Attention")]
    if len(found) != 1:
        message = (
            f"{place}: found {len(found)} attention modules in {type(block).__name__}, expected "
            "one; h5traces does not know how this model is built"
        )
        raise ExtractionError(message)
    return found[0]


def check_eager(model: Any) -> None:
    """Refuse attention implementations that give no weights.

    Raises
    ------
    ExtractionError
        The implementation is another than eager.
    """
    found = model.config.get_text_config()._attn_implementation
    if found != _EAGER:
        message = (
            f"{type(model).__name__} computes attention with {found!r}, which gives no attention "
            "weights; load it with attn_implementation='eager', call "
            "model.set_attn_implementation('eager'), or extract hidden_states only"
        )
        raise ExtractionError(message)
