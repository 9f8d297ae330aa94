"""The parts of a decoder: what runs, its blocks, and what transformers takes as their attention."""

from __future__ import annotations

import inspect
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from h5traces.errors import ExtractionError
from h5traces.format import layout
from h5traces.format.kinds import STATE_NORMS, WEIGHT_KINDS
from h5traces.format.text import and_more

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

Side = Literal["input", "output", "query", "key", "value"]
_EAGER: Final = "eager"
_NUM_AXES_OF_STATES: Final = 3
_NUM_AXES_OF_WEIGHTS: Final = 4


@dataclass(frozen=True)
class Site:
    """Where one kind is taken in one block.

    ``module`` is called `name` inside of the block; ``part`` is the place in a tuple that it
    returns; ``heads`` is the number of heads that lie side by side in the last axis. `by_product`
    says that the module multiplies queries and keys itself, and calls no attention function.
    """

    name: str
    module: nn.Module
    side: Side
    part: int = 0
    factor: float = 1.0
    heads: int = 0
    by_product: bool = False

    def taken(self, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The array ``(B, *axes)`` in what the module took or gave."""
        values = tensor
        if self.side in ("input", "output") and values.ndim == 2:
            # Experts and some MLPs see all tokens of a batch in one row.
            values = values.reshape(num_rows, -1, values.shape[-1])
        if self.factor != 1:
            values = values * self.factor
        if self.heads:
            values = values.view(*values.shape[:-1], self.heads, -1).transpose(1, 2)
        return values

    def __str__(self) -> str:
        """The place in words, as archives record it."""
        if self.side in ("input", "output"):
            factor = f", times {self.factor:g}" if self.factor != 1 else ""
            return f"{self.side} of {self.name}{factor}"
        where = "products" if self.by_product else "attention function"
        return f"{self.side} of the {where} of {self.name}"


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only model.

    ``family`` is its ``model_type``; ``model`` makes scores of tokens, its ``decoder`` runs
    embedding, blocks and final norm. ``attentions`` has None for blocks without an attention
    module, such as those of state spaces. ``sites`` says where other kinds are taken, by kind and
    layer.
    """

    model: Any

    model_class: str
    family: str
    decoder: Any
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module | None, ...]
    sites: Mapping[str, Mapping[int, Site]] = field(default_factory=dict)
    # Layers of which queries and keys were found to give the weights, by which variant of the rule.
    recomputed: Mapping[int, int] = field(default_factory=dict)

    def layers_with(self, kind: str) -> tuple[int, ...]:
        """The layers that have a kind."""
        if kind in WEIGHT_KINDS:
            return tuple(n for n, each in enumerate(self.attentions) if each is not None)
        if kind in (layout.HIDDEN_STATES, STATE_NORMS):
            return tuple(range(self.num_layers))
        return tuple(sorted(self.sites.get(kind, ())))

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.decoder.get_input_embeddings().weight.device
        return device

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Those of a batch's inputs that the decoder takes; a mask without padding may go."""
        parameters = inspect.signature(self.decoder.forward).parameters
        taken = {*parameters}
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            taken.add("attention_mask")
        return {name: value for name, value in inputs.items() if name in taken}


def anatomy_of(model: Any) -> Anatomy:
    """Find the parts of a model.

    Raises
    ------
    ExtractionError
        It is not a decoder-only model, or of an unknown structure.
    """
    name = type(model).__name__
    check_decoder_only(model.config, name)
    config = model.config.get_text_config()
    decoder, blocks = _decoder(model, config.num_hidden_layers, name)
    return Anatomy(
        model=model,
        model_class=name,
        family=config.model_type,
        decoder=decoder,
        blocks=blocks,
        attentions=tuple(
            _attention(block, f"{name}, layer {layer}") for layer, block in enumerate(blocks)
        ),
    )


def check_decoder_only(config: Any, name: str) -> None:
    """Reject encoder-decoders and encoders, by their configuration."""
    if getattr(config, "is_encoder_decoder", False):
        message = (
            f"{name} is an encoder-decoder ({config.model_type}); expected a decoder-only model: "
            "an archive holds one token sequence per sample, and this model has two"
        )
        raise ExtractionError(message)
    # BERT and its kin have a flag for their use as decoders.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        message = (
            f"{name} is an encoder ({config.model_type}), which generates no text; expected a "
            "decoder-only model. States that another program took of it are archived with "
            "h5traces.create or 'h5traces convert'"
        )
        raise ExtractionError(message)


def _decoder(model: Any, num_layers: int, name: str) -> tuple[Any, tuple[nn.Module, ...]]:
    """What runs from token ids to the final norm, and its blocks."""
    named = model.get_decoder()
    found: list[nn.ModuleList] = []
    # Some models name one with a head, or a part of it.
    for decoder in (named, *named.modules(), *model.modules()):
        if not isinstance(decoder, PreTrainedModel) or _has_head(decoder):
            continue
        found = _lists_of_blocks(decoder, num_layers)
        if len(found) == 1:
            return decoder, tuple(found[0])
    message = (
        f"{name}: found {len(found)} lists of {num_layers} blocks in {type(named).__name__}, "
        "expected one; h5traces does not know the structure of this model"
    )
    raise ExtractionError(message)


def _has_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def _lists_of_blocks(decoder: nn.Module, num_layers: int) -> list[nn.ModuleList]:
    """The lists of that many blocks nearest to the root, which are not inside of a block."""
    level = deque([decoder])
    while level:
        children = [child for module in level for child in module.children()]
        found = [
            child
            for child in children
            if isinstance(child, nn.ModuleList)
            and len(child) == num_layers
            # Not one projection or norm per block.
            and all(list(each.children()) for each in child)
        ]
        if found:
            return found
        level = deque(child for child in children if not isinstance(child, nn.ModuleList))
    return []


def _attention(block: nn.Module, place: str) -> nn.Module | None:
    """The outermost attention module of a block."""
    found = list(dict.fromkeys(_attentions(block)))
    if len(found) > 1:
        names = and_more([type(each).__name__ for each in found], 3)
        message = (
            f"{place}: found {len(found)} attention modules in {type(block).__name__} ({names}), "
            "expected at most one; h5traces does not know the structure of this model"
        )
        raise ExtractionError(message)
    return found[0] if found else None


def _attentions(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__.endswith("Attention"):
            yield child
        else:
            yield from _attentions(child)


def weights_of(output: Any, num_tokens: int) -> torch.Tensor | None:
    """The weights ``(B, A, S, S)`` that an attention module returned, if it did.

    Linear attention may return other matrices.
    """
    for found in output[1:] if isinstance(output, (tuple, list)) else ():
        shape = getattr(found, "shape", ())
        if len(shape) == _NUM_AXES_OF_WEIGHTS and shape[2:] == (num_tokens, num_tokens):
            return cast("torch.Tensor", found)
    return None


def states_of(output: Any) -> torch.Tensor:
    """The hidden states ``(B, S, H)`` that a block returned."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    return cast("torch.Tensor", found)


def states_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states ``(B, S, H)`` that a block was called with."""
    named = kwargs.get("hidden_states")
    for value in (*args, named):
        if getattr(value, "ndim", 0) == _NUM_AXES_OF_STATES:
            return cast("torch.Tensor", value)
    message = "a block was called without hidden states of three axes"
    raise ExtractionError(message)


def check_eager(model: Any) -> None:
    """Reject attention implementations that return no weights."""
    found = model.config.get_text_config()._attn_implementation
    if found != _EAGER:
        message = (
            f"{type(model).__name__} computes attention with {found!r}, which gives no attention "
            "weights; load it with attn_implementation='eager', call "
            "model.set_attn_implementation('eager'), or extract hidden_states only"
        )
        raise ExtractionError(message)
