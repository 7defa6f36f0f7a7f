"""Models that are refused before anything is run, each by name and reason."""

from __future__ import annotations

from typing import Any

from fluxc.capture import rope
from fluxc.errors import CaptureError, SourceError, UnsupportedAttentionError


def refuse_unsupported(model: Any) -> None:
    """Raise for a model that is no plain decoder, or whose attention or positions fluxc cannot capture."""
    refuse_config(model.config)
    _refuse_class(type(model), model.config.model_type)
    if model.get_output_embeddings() is None:
        raise SourceError(
            f"{type(model).__name__} has no language-model head", hint="load it with AutoModelForCausalLM"
        )
    _refuse_packed(model)


def refuse_config(config: Any) -> None:
    """Raise for a config whose model would be refused, before its weights are loaded.

    SourceError for an encoder, an encoder-decoder or a multimodal model, UnsupportedAttentionError for attention that
    is the model's own, CaptureError for its RoPE kind.
    """
    from transformers.models.auto import modeling_auto

    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(f"{name} is an encoder-decoder model", hint="fluxc takes decoder-only language models")
    masked = name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        raise SourceError(f"{name} is an encoder", hint="fluxc takes decoder-only language models")
    if name not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(f"{name} is not a causal language model", hint="fluxc takes decoder-only language models")
    if getattr(config, "text_config", None) is not None:
        raise SourceError(f"{name} is a multimodal model", hint="save its language model alone and capture that")
    _refuse_class(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], name)
    rope.refuse_unsupported(config)


def _refuse_class(kind: Any, name: str) -> None:
    if not getattr(kind, "_supports_attention_backend", False):
        raise UnsupportedAttentionError(
            f"{name}: its attention does not go through transformers' AttentionInterface",
            hint="export it with torch.export and give fluxc the .pt2 file",
        )


def _refuse_packed(model: Any) -> None:
    """Weights that are packed are not what a graph of plain linear layers reads."""
    quantizer = getattr(model, "hf_quantizer", None)
    packed = [name for name, tensor in model.named_parameters() if not tensor.is_floating_point()]
    if packed:
        kind = type(quantizer).__name__ if quantizer else "packed weights"
        raise CaptureError(f"{packed[0]} is quantized ({kind})", hint="load the model dequantized")
