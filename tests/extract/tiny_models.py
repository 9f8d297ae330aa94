"""Randomly initialised models of every family, small enough for tests, and a real tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
TINY_LLAMA = ROOT / "examples" / "tiny-llama-pydocs"
QUESTIONS = ROOT / "examples" / "questions.jsonl"

_SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GEMMA = {**_SHAPE, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
_SPREAD = {"initializer_range": 0.4}  # else all attention is uniform, and windows hardly matter


def _configs() -> dict[str, transformers.PretrainedConfig]:
    return {
        "llama": transformers.LlamaConfig(**_SHAPE, **_SPREAD),
        "qwen2": transformers.Qwen2Config(**_SHAPE, **_SPREAD),
        "mistral": transformers.MistralConfig(**_SHAPE, **_SPREAD, sliding_window=6),
        "gpt2": transformers.GPT2Config(
            vocab_size=2048,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            **_SPREAD,
        ),
        "gemma2": transformers.Gemma2Config(
            **_GEMMA, **_SPREAD, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        ),
        "gemma3_text": transformers.Gemma3TextConfig(
            **_GEMMA,
            **_SPREAD,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    }


FAMILIES = tuple(_configs())


def make_model(family, *, dtype=torch.float32, attn_implementation="eager", **changes):
    """A new model with random weights, in evaluation mode; always the same ones."""
    torch.manual_seed(0)
    config = _configs()[family]
    config.update(changes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation
    )
    # Their configuration alone makes biases 0 and norms 1, which would hide a swapped site.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


@cache
def shared_model(family):
    """One model per family, for tests that change nothing in it."""
    return make_model(family)


@cache
def tokenizer():
    """The tokenizer of the trained example."""
    return AutoTokenizer.from_pretrained(TINY_LLAMA)
