"""Finds and loads models and tokenizers."""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from h5traces.errors import ExtractionError, MissingDependencyError

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


ModelDtype = Literal["auto", "float32", "float16", "bfloat16"]

# Short names; add to them here, or in the file that `aliases_path` names.
MODEL_ALIASES: dict[str, str] = {
    "llama2_7B": "meta-llama/Llama-2-7b-hf",
    "llama2_chat_7B": "meta-llama/Llama-2-7b-chat-hf",
    "llama2_chat_13B": "meta-llama/Llama-2-13b-chat-hf",
    "llama3.1_8B_instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral_7B_instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5_7B_instruct": "Qwen/Qwen2.5-7B-Instruct",
    "gemma2_9B_it": "google/gemma-2-9b-it",
}
_SECTION: Final = "models"


def aliases_path() -> Path:
    """The user's own table: ``[models]`` in ``$XDG_CONFIG_HOME/h5traces/models.toml``."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "h5traces" / "models.toml"


def known_aliases() -> dict[str, str]:
    """All short names, those of the user's table before ours.

    Raises
    ------
    ExtractionError
        The user's table is no TOML, or maps names to something else than text.
    """
    path = aliases_path()
    if not path.exists():
        return dict(MODEL_ALIASES)
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8")).get(_SECTION, {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{path}: is no TOML: {error}"
        raise ExtractionError(message) from error
    if not isinstance(own, dict) or not all(isinstance(each, str) for each in own.values()):
        message = f'{path}: expected a table [{_SECTION}] with lines such as mine = "/data/llama"'
        raise ExtractionError(message)
    return {**MODEL_ALIASES, **own}


def resolve_model(model_id: str) -> str:
    """The hub id or path behind a name; a folder of that name comes first."""
    return model_id if Path(model_id).is_dir() else known_aliases().get(model_id, model_id)


def load_config(model_id: str, *, revision: str | None = None) -> Any:
    """A model's configuration.

    Raises
    ------
    ExtractionError
        It cannot be found, or is that of an encoder-decoder.
    """
    name = resolve_model(model_id)
    config = _loaded(AutoConfig, model_id, name, revision=revision)
    check_decoder_only(config, name)
    return config


def load_tokenizer(model_id: str, *, revision: str | None = None) -> Any:
    """A model's tokenizer.

    Raises
    ------
    ExtractionError
        It cannot be found.
    """
    return _loaded(AutoTokenizer, model_id, resolve_model(model_id), revision=revision)


def default_device() -> str:
    """CUDA where there is some, else the processor."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: ModelDtype = "auto",
    device: str | None = None,
    load_in_4bit: bool = False,
    eager: bool = True,
) -> Any:
    """A causal language model in evaluation mode.

    Parameters
    ----------
    model_id
        Hub id, local folder, or alias.
    revision
        Commit, branch or tag on the hub.
    dtype
        Type to compute in. ``auto``: the checkpoint's own, but float32 on processors.
    device
        As torch names it, or ``auto`` to spread the model over all; CUDA by default, where there is
        some.
    load_in_4bit
        Quantise the weights with bitsandbytes.
    eager
        Compute attention so that its weights can be seen.

    Raises
    ------
    ExtractionError
        The model or the device cannot be found.
    MissingDependencyError
        A library for 4 bits, or for spreading, is not installed.
    """
    device = device or default_device()
    options: dict[str, Any] = {"revision": revision}
    if eager:
        options["attn_implementation"] = "eager"
    options["dtype"] = "float32" if dtype == "auto" and device.startswith("cpu") else dtype
    if load_in_4bit:
        options["quantization_config"] = _four_bits(device)
    if load_in_4bit or device == "auto":
        _require("accelerate", f"--device {device}" if device == "auto" else "--load-in-4bit")
        options["device_map"] = "auto" if device == "auto" else {"": device}
    model = _loaded(AutoModelForCausalLM, model_id, resolve_model(model_id), **options)
    if "device_map" not in options:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            message = (
                f"the model cannot be moved to device {device!r}: {str(error).splitlines()[0]}"
            )
            raise ExtractionError(message) from error
    return model.eval()


def _four_bits(device: str) -> Any:
    _require("bitsandbytes", "--load-in-4bit")
    if device.startswith("cpu"):
        message = "--load-in-4bit computes on CUDA; choose --device cuda, or leave it out"
        raise ExtractionError(message)
    from transformers import BitsAndBytesConfig  # needs the library when it is used

    untyped: Any = BitsAndBytesConfig
    return untyped(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)


def _require(library: str, option: str) -> None:
    try:
        __import__(library)
    except ImportError as error:
        message = f"{option} needs {library}, which is not installed; pip install {library}"
        raise MissingDependencyError(message) from error


def _loaded(factory: Any, model_id: str, name: str, **options: Any) -> Any:
    """What `factory` makes of the name, or an error that says what was looked for."""
    try:
        return factory.from_pretrained(name, **options)
    # transformers, huggingface_hub, tokenizers and safetensors each have errors of their own.
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = f"{_not_found(model_id, name)}: {_first_line(error)}"
        raise ExtractionError(message) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _not_found(model_id: str, name: str) -> str:
    if Path(name).is_dir():
        return f"the model in {name} cannot be loaded"
    aliases = known_aliases()
    if model_id in aliases:
        hint = f"{model_id} stands for {name}"
    else:
        close = difflib.get_close_matches(model_id, aliases, n=3)
        hint = f"no folder and no alias has that name ({'close' if close else 'known'} aliases: "
        hint += f"{', '.join(close or aliases)})"
    return (
        f"the model {name!r} cannot be loaded; {hint}; without a network it must be in the cache "
        "(HF_HOME), or name a local folder"
    )


def hide_progress_bars() -> None:
    """No bars of transformers between the lines of a command."""
    untyped: Any = logging.disable_progress_bar
    untyped()
