"""Tiny random models of every family fluxc is tested on: 2 layers, hidden size 32, vocabulary 97.

Each function builds one model from its configuration alone (no download, seeded, eval mode, fp32). Every model has at
least one routable layer. Keyword arguments override fields of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VOCAB = 97
CONTEXT = 128
WINDOW = 8

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family: str, *, seed: int = 0, **fields: Any) -> Any:
    """A random causal LM of the transformers model type `family` in eval mode, with spread-out weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        _spread(model)
    return model


def _spread(model: Any) -> None:
    """Move norms, biases and sinks off their initial ones and zeros, so that dropping one shows in the logits."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 if parameter.dim() < 2 else 0.08
            parameter.add_(torch.randn_like(parameter) * noise)


def tiny_llama(**fields: Any) -> Any:
    """Llama with tied embeddings; `tie_word_embeddings=False` unties them."""
    return build("llama", **{**_BASE, "tie_word_embeddings": True, **fields})


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


def tiny_llama_rope(kind: str, **fields: Any) -> Any:
    """Llama with the RoPE kind `kind`: default, linear, llama3, yarn, longrope or dynamic; original context 16."""
    original = {"original_max_position_embeddings": 16}
    kinds: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        "yarn": {"factor": 8.0, **original},
        "longrope": {"factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], **original},
    }
    return tiny_llama(**{**_rope(rope_type=kind, **kinds[kind]), **fields})


def tiny_phi3_longrope(**fields: Any) -> Any:
    """Phi-3 with longrope: short factors up to 16 tokens, long factors beyond."""
    long = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    extra = {"original_max_position_embeddings": 16, **_rope(**long, original_max_position_embeddings=16)}
    return build("phi3", **{**_BASE, **extra, **fields})


def _alternating(layers: int, full_every: int) -> dict[str, Any]:
    kinds = ["full_attention" if (i + 1) % full_every == 0 else "sliding_attention" for i in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": kinds, "sliding_window": WINDOW}


def _family(family: str, **extra: Any) -> Callable[..., Any]:
    def make(**fields: Any) -> Any:
        return build(family, **{**_BASE, **extra, **fields})

    make.__name__ = f"tiny_{family}"
    make.__doc__ = f"Tiny random {family}."
    return make


def tiny_gpt2(**fields: Any) -> Any:
    """GPT-2: learned positions, Conv1D projections."""
    own = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 48}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return build("gpt2", **{**own, **tokens, **fields})


def tiny_opt(**fields: Any) -> Any:
    """OPT: learned positions with an offset of two."""
    own = {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}
    for absent in ("intermediate_size", "num_key_value_heads"):
        own.pop(absent)
    return build("opt", **{**own, **fields})


_GPT_NEOX = {"rotary_pct": 0.5, "num_key_value_heads": None}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}
_GPT_OSS = {**_alternating(2, 2), **_MOE, "num_local_experts": 4, "head_dim": 8}

TINY_FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": tiny_llama,
    "llama-untied": _family("llama", tie_word_embeddings=False),
    "qwen2": _family("qwen2"),
    "qwen3": _family("qwen3", head_dim=16),
    "qwen3-moe": _family("qwen3_moe", head_dim=8, moe_intermediate_size=16, num_experts=4, **_MOE),
    "mistral": _family("mistral", sliding_window=None, head_dim=8),
    "mixtral": _family("mixtral", sliding_window=None, num_local_experts=4, **_MOE),
    "phi3": _family("phi3"),
    "phi3-longrope": tiny_phi3_longrope,
    "gemma2": _family("gemma2", **_alternating(2, 2), head_dim=8, query_pre_attn_scalar=16),
    "gemma3": _family("gemma3_text", **_alternating(2, 2), head_dim=8, query_pre_attn_scalar=16),
    "olmo2": _family("olmo2"),
    "granite": _family(
        "granite", attention_multiplier=0.3, logits_scaling=2.0, residual_multiplier=0.7, embedding_multiplier=3.0
    ),
    "smollm3": _family("smollm3", no_rope_layer_interval=2),
    "starcoder2": _family("starcoder2", sliding_window=None),
    "gpt-neox": _family("gpt_neox", **_GPT_NEOX),
    "opt": tiny_opt,
    "gpt2": tiny_gpt2,
    "cohere2": _family("cohere2", **_alternating(2, 2), logit_scale=0.25),
    "gpt-oss": _family("gpt_oss", **_GPT_OSS),
}
