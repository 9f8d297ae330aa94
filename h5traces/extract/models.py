"""Models of transformers: found by name, loaded, and taken apart into their blocks."""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from h5traces.errors import ExtractionError, MissingDependencyError
from h5traces.extract.sizes import ModelShape

if TYPE_CHECKING:
    from h5traces.extract.options import ModelDtype

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
# Families whose left-padded batches were compared with one-by-one runs; see docs/extraction.md.
BATCHING_FAMILIES: Final = frozenset({"llama", "qwen2", "mistral", "gpt2"})
_ALIASES_TABLE: Final = "models"
_EAGER: Final = "eager"


def aliases_path() -> Path:
    """The user's own table: ``[models]`` in ``$XDG_CONFIG_HOME/h5traces/models.toml``."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "h5traces" / "models.toml"


def known_aliases() -> dict[str, str]:
    """All aliases; the user's own win over `MODEL_ALIASES`."""
    path = aliases_path()
    if not path.exists():
        return dict(MODEL_ALIASES)
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8")).get(_ALIASES_TABLE, {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{path}: is not TOML: {error}"
        raise ExtractionError(message) from error
    if not isinstance(own, dict) or not all(isinstance(each, str) for each in own.values()):
        message = (
            f'{path}: expected a table [{_ALIASES_TABLE}] with lines such as mine = "/data/llama"'
        )
        raise ExtractionError(message)
    return {**MODEL_ALIASES, **own}


def resolve_model(model_id: str) -> str:
    """The hub id or path behind a name; a folder of that name wins over an alias."""
    return model_id if Path(model_id).is_dir() else known_aliases().get(model_id, model_id)


def load_config(model_id: str, *, revision: str | None = None) -> Any:
    """Load the configuration of a model."""
    name = resolve_model(model_id)
    config = _loaded(AutoConfig, model_id, name, revision=revision)
    _check_decoder_only(config, name)
    return config


def model_shape(model_id: str, *, revision: str | None = None) -> ModelShape:
    """The shape of a model, from its configuration alone.

    Raises
    ------
    ExtractionError
        The configuration cannot be loaded, or is that of an encoder-decoder.
    """
    return ModelShape.of(load_config(model_id, revision=revision))


def load_tokenizer(model_id: str, *, revision: str | None = None) -> Any:
    """Load the tokenizer of a model; arguments as in `ModelChoice`.

    Raises
    ------
    ExtractionError
        It cannot be loaded.
    """
    return _loaded(AutoTokenizer, model_id, resolve_model(model_id), revision=revision)


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: ModelDtype = "auto",
    device: str | None = None,
    load_in_4bit: bool = False,
    eager: bool = True,
) -> Any:
    """Load a causal language model in evaluation mode.

    Parameters
    ----------
    model_id, revision, dtype, device, load_in_4bit
        As in `ModelChoice`.
    eager
        Compute attention in the implementation that returns attention weights.

    Raises
    ------
    ExtractionError
        The model cannot be loaded, or not on that device.
    MissingDependencyError
        A library for 4 bits, or for several devices, is not installed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"revision": revision}
    if eager:
        options["attn_implementation"] = _EAGER
    options["dtype"] = "float32" if dtype == "auto" and device.startswith("cpu") else dtype
    if load_in_4bit:
        options["quantization_config"] = _four_bits(device)
    if load_in_4bit or device == "auto":
        _require("accelerate", "device 'auto'" if device == "auto" else "load_in_4bit")
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
    _require("bitsandbytes", "load_in_4bit")
    if device.startswith("cpu"):
        message = "load_in_4bit needs CUDA, but the device is 'cpu'; choose device 'cuda'"
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
    """What `factory` loads by that name, or an error that says what was looked for."""
    try:
        return factory.from_pretrained(name, **options)
    # transformers, huggingface_hub, tokenizers and safetensors each have their own errors.
    except (OSError, ValueError, KeyError, ImportError) as error:
        lines = (line for line in str(error).splitlines() if line.strip())
        message = f"{_not_loaded(model_id, name)}: {next(lines, type(error).__name__)}"
        raise ExtractionError(message) from error


def _not_loaded(model_id: str, name: str) -> str:
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
    """Keep transformers' progress bars out of the output of a command."""
    untyped: Any = logging.disable_progress_bar
    untyped()


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only model.

    ``family`` is its ``model_type``; ``decoder`` runs embedding, blocks and final norm.
    """

    model_class: str
    family: str
    decoder: Any
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)


def anatomy_of(model: Any) -> Anatomy:
    """Find the parts of a model."""
    name = type(model).__name__
    _check_decoder_only(model.config, name)
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
    )


def _check_decoder_only(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        message = (
            f"{name} is an encoder-decoder ({config.model_type}); expected a decoder-only model: "
            "an archive holds one token sequence per sample, and this model has two"
        )
        raise ExtractionError(message)


def _blocks(decoder: nn.Module, num_layers: int, name: str) -> tuple[nn.Module, ...]:
    found = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if len(found) != 1:
        message = (
            f"{name}: found {len(found)} lists of {num_layers} blocks in {type(decoder).__name__}, "
            "expected one; h5traces does not know the structure of this model"
        )
        raise ExtractionError(message)
    return tuple(found[0])


def _attention(block: nn.Module, place: str) -> nn.Module:
    found = [child for child in block.children() if type(child).__name__.endswith("Attention")]
    if len(found) != 1:
        message = (
            f"{place}: found {len(found)} attention modules in {type(block).__name__}, expected "
            "one; h5traces does not know the structure of this model"
        )
        raise ExtractionError(message)
    return found[0]


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
