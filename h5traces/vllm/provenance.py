"""What archives record of an engine: program, model, types, sites, how answers were sampled."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import torch

from h5traces.format import layout
from h5traces.format.archive import ExtractionMetadata

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of a request, those that decide which tokens are chosen.
_SAMPLING: Final = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens", "min_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "ignore_eos"),
)


def engine_name() -> str:
    """Program, release and method, as archives record them."""
    import vllm

    return f"vllm {vllm.__version__}, extract_hidden_states"


def sampling_of(parameters: Any) -> dict[str, Any]:
    """How the tokens of a request were chosen; what was not asked for is left out."""
    found = {name: getattr(parameters, name, None) for name in _SAMPLING}
    return {name: value for name, value in found.items() if value not in (None, [])}


def described(config: Any, layers: Sequence[int], **known: Any) -> ExtractionMetadata:
    """How an engine ran its model; each request has its own sampling.

    Parameters
    ----------
    config
        vLLM's configuration of the engine.
    layers
        Blocks whose outputs are stored.
    known
        Fields of `ExtractionMetadata` that the caller knows better.
    """
    from vllm.platforms import current_platform

    model, parallel = config.model_config, config.parallel_config
    device = current_platform.get_device_name()
    fields: dict[str, Any] = {
        "model_class": (getattr(model.hf_config, "architectures", None) or ["unknown"])[0],
        "config": _plain(model.hf_config.to_dict()),
        "transformers_version": version("transformers"),
        "torch_version": torch.__version__,
        "engine": engine_name(),
        "attention": _attention(config),
        "sites": {layout.HIDDEN_STATES: {layout.SITE_BLOCK_OUTPUT: list(layers)}},
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "device": f"cpu ({platform.machine()})" if device == "cpu" else device,
        "generation": {
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "max_model_len": model.max_model_len,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "enable_prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "enforce_eager": bool(model.enforce_eager),
        },
        "seed": model.seed or 0,
        "batch_size": config.scheduler_config.max_num_seqs,
        **known,
    }
    return ExtractionMetadata(**fields)


def _attention(config: Any) -> str | None:
    """The implementation of attention that the model's layers have."""
    layers = config.compilation_config.static_forward_context.values()
    found = [each.attn_backend.get_name() for each in layers if hasattr(each, "attn_backend")]
    return next((each for each in found if each), None)


def _plain(document: Any) -> Any:
    """A document as JSON returns it; values that JSON has no type for become text."""
    return json.loads(json.dumps(document, default=str))
