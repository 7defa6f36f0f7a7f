"""What the tests of all parts share: tiny models and helpers for exported programs. Nothing else imports this."""

from __future__ import annotations

from fluxc.tiny_models import TINY_FAMILIES, tiny_llama, tiny_llama_rope
from fluxc.toy_decoder import TOY_ROPES, ToyConfig, toy_inputs, toy_module, toy_program, toy_routed_inputs

__all__ = [
    "TINY_FAMILIES",
    "TOY_ROPES",
    "ToyConfig",
    "tiny_llama",
    "tiny_llama_rope",
    "toy_inputs",
    "toy_module",
    "toy_program",
    "toy_routed_inputs",
]
