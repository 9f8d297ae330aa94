"""Random tiny models of the families of causal language models that transformers has."""

from __future__ import annotations

import inspect

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# What configurations call their sizes; each takes those that it has.
_SIZES = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "lru_width"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "embed_dim"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 256),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk"], 2),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1),
    **dict.fromkeys(["sliding_window", "attention_window_size"], 6),
    # Of latent attention.
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 8),
    # Of state spaces and linear attention.
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups"], 1),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    **dict.fromkeys(["expand", "mamba_expand"], 2),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "vocab_size": 2048,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    # Else all attention is uniform, and windows hardly matter.
    "initializer_range": 0.4,
    "init_std": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
# What a family needs besides; None: its configuration's default.
FAMILIES = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1, 3]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {},
    "cohere": {},
    "cohere2": {},
    "ctrl": {"dff": 48},
    "cwm": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"vocab_size_per_layer_input": 2048, "hidden_size_per_layer_input": 8},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {},
    "granite": {"residual_multiplier": 0.5},
    "granitemoe": {"residual_multiplier": 0.5},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {},
    "mamba": {},
    "mamba2": {},
    "minicpm3": _LATENT,
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "minimax_m2": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": _HYBRID,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_moe": {},
    "qwen3_next": _HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {"attention_heads": 4},
    "xlstm": {},
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def make_family(family, *, dtype=torch.float32, **changes):
    """A new model with random weights, in evaluation mode; always the same ones."""
    torch.manual_seed(0)
    factory = CONFIG_MAPPING[family]
    known = {*factory().to_dict(), *inspect.signature(factory.__init__).parameters}
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    merged = {**sizes, **FAMILIES[family], **changes}
    config = factory(**{name: value for name, value in merged.items() if value is not None})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Their configuration alone makes biases 0 and norms 1, which would hide a swapped site.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()
